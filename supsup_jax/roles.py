"""What each leaf of a network is: how many inputs one output of it sums over, or none.

A supermask chooses connections, so what is masked unless asked otherwise are the weights that
connect: kernels, which sum over their inputs, and embeddings, of which one row is read. Biases,
scales and offsets of norms, tokens and tables of positions connect nothing.

Flax's own modules say which axes of a kernel are inputs (`adapters`). Here is what names and
shapes say of the rest, by the customs of the libraries: a "kernel" or "w" [..., in, out] (Flax,
Haiku, Keras), a "weight" [out, in, ...] (PyTorch, Equinox). A bias beside a kernel decides, for its
axes are those of the outputs.
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from supsup_jax.layout import named_leaves
from supsup_jax.types import PyTree

# By the last part of a leaf's name. What ends like a kernel is one, whatever stands before.
_KERNEL = re.compile(r"(.*_)?(w|weights?|kernel|proj|mlp)\d*|.*(kernel|weight|conv).*")
_B = re.compile(r"b\d*")  # beside a w
_BIAS = re.compile(r"(bias|biases|scale|offset|gamma|beta|shift|gain)(\d*|_.*)|.*_(bias|scale)")
_POSITIONS = re.compile(r"w?pe|(.*_)?pos(ition|itional|itions|emb)?(_.*|\d*)")
_EMBEDDING = re.compile(r"wte|(.*_)?(embedding|embeddings|embed)\d*")
_TOKENS = re.compile(r"(.*_)?(tokens?|registers?)(_.*|\d*)")
_CLASS = re.compile(r"(.*_)?cls(_.*|\d*)")  # a token where there is one of it
_ATTENTION = "query", "key", "value", "out"
_OUT_FIRST = re.compile(r"(.*_)?weight(_.*)?")


class Role(NamedTuple):
    """What a leaf is. connects: whether it is masked unless asked otherwise.

    fan_in: inputs that one output of it sums over; None where that has no meaning, and its weights
      stay as they are given. kernel: its shape as [window..., in, out], of stacked ones that of
      one, for densities that go by it.
    """

    connects: bool
    fan_in: int | None
    kernel: tuple[int, ...] | None = None


# What says the fan-in of a leaf: (name, leaf) -> int, or None for what `of_names` says.
FanIn = Callable[[str, jax.Array], int | None]

NONE = Role(False, None)


def of_names(params: PyTree) -> dict[str, Role]:
    """The role of each leaf by its name, its shape and what is beside it."""
    leaves = named_leaves(params)
    return {name: _of_attention(name, leaves) or _of_name(name, leaves) for name in leaves}


def of_kernel(kernel: tuple[int, ...]) -> Role:
    """Of a kernel [window..., in, out]."""
    return Role(True, math.prod(kernel[:-1]), tuple(kernel))


def of_embedding(table: tuple[int, ...], positions: bool = False) -> Role:
    """Of a table [vocabulary, features], of which each input reads one row."""
    return Role(not positions, 1, tuple(table))


def is_table(name: str) -> bool:
    """Whether `name`, of a leaf or of an embedding's layer, is that of positions or of tokens."""
    last = _last(name)
    if _KERNEL.fullmatch(last):
        return False
    tokens = _TOKENS.fullmatch(last) and not _EMBEDDING.fullmatch(last)
    return bool(_POSITIONS.fullmatch(last) or tokens)


def _last(name):
    return name.rsplit("/", 1)[-1].lower()


def _of_attention(name, leaves):
    """Of kernels [in, heads, dim] and [heads, dim, out], as Flax names those of its attention."""
    *block, layer, leaf = ["", *name.split("/")]
    if leaf != "kernel" or leaves[name].ndim < 3:
        return None
    beside = {other for other in _ATTENTION if "/".join([*block[1:], other, leaf]) in leaves}
    *_, first, second, third = leaves[name].shape
    if layer in _ATTENTION and beside == set(_ATTENTION):
        return of_kernel((first * second, third) if layer == "out" else (first, second * third))
    return None


def _of_name(name, leaves):
    leaf, bias = leaves[name], _bias_of(name, leaves)
    (folder, _, _), last, shape = name.rpartition("/"), _last(name), leaf.shape
    if not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.ndim < 2:
        return NONE
    kernel = _KERNEL.fullmatch(last)
    if is_table(name) or (_CLASS.fullmatch(last) and not kernel and shape[0] == 1):
        return NONE
    if not kernel and (_BIAS.fullmatch(last) or _is_b(name, leaves)):
        return NONE
    if _EMBEDDING.fullmatch(last) or (last == "weight" and _EMBEDDING.fullmatch(_last(folder))):
        return NONE if is_table(folder) else of_embedding(shape)
    if leaf.ndim == 3 and shape[0] == 1 and not kernel:
        return NONE  # [1, 1, D] or [1, length, D]: added to every example
    if _OUT_FIRST.fullmatch(last) and (bias is None or math.prod(bias) == shape[0]):
        return of_kernel((*shape[2:], shape[1], shape[0]))
    return of_kernel(_one_kernel(shape, bias))


def _is_b(name, leaves):
    """Whether a leaf is the b beside a w, or [1, n] beside [m, n]."""
    folder, leaf = name.rpartition("/")[0], leaves[name]
    beside = [other for other in leaves if other.rpartition("/")[0] == folder and other != name]
    if _B.fullmatch(_last(name)) and any(re.fullmatch(r"w\d*", _last(other)) for other in beside):
        return True
    shapes = [leaves[other].shape for other in beside]
    row = leaf.ndim == 2 and leaf.shape[0] == 1
    return row and any(len(s) == 2 and s[0] > 1 and s[1] == leaf.shape[1] for s in shapes)


def _bias_of(name, leaves):
    """Shape of the bias beside a leaf, or None."""
    folder = name.rpartition("/")[0]
    beside = f"{folder}/bias" if folder else "bias"
    return leaves[beside].shape if beside in leaves and beside != name else None


def _one_kernel(shape, bias):
    """[window..., in, out] of a kernel [stacked..., inputs..., outputs...], as its bias tells."""
    for stacked in range(len(bias or ())):
        rest = bias[stacked:]
        if len(shape) > len(bias) and (*shape[:stacked], *shape[-len(rest) :]) == tuple(bias):
            if len(rest) == 1:
                return shape[stacked:]
            inputs = shape[stacked : len(shape) - len(rest)]
            return math.prod(inputs), math.prod(rest)
    return shape
