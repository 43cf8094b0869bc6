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

# By the last part of a leaf's name.
_B = re.compile(r"b\d*")  # beside a w
_BIAS = re.compile(r"(bias|biases|scale|offset|gamma|beta|shift|gain)(\d*|_.*)|.*_(bias|scale)")
_POSITIONS = re.compile(r"w?pe|(.*_)?pos(ition|itional|itions|emb)?(_.*|\d*)")
_EMBEDDING = re.compile(r"wte|(.*_)?(embedding|embeddings|embed)\d*")
_TOKEN = re.compile(r"(.*_)?(tokens?|cls|registers?)(_.*|\d*)")
_KERNEL = re.compile(r"w\d*|.*(kernel|weight|conv).*")
_ATTENTION = "query", "key", "value", "out"
_OUT_FIRST = re.compile(r"(.*_)?weight(_.*)?")


class Role(NamedTuple):
    """connects: whether it is masked unless asked otherwise. fan_in: inputs that one output of it
    sums over; None where that has no meaning, and its weights stay as they are given.
    """

    connects: bool
    fan_in: int | None


# What says the fan-in of a leaf: (name, leaf) -> int, or None for what `of_names` says.
FanIn = Callable[[str, jax.Array], int | None]

NONE = Role(False, None)


def of_names(params: PyTree) -> dict[str, Role]:
    """The role of each leaf by its name, its shape and what is beside it."""
    leaves = named_leaves(params)
    return {name: _of_attention(name, leaves) or _of_name(name, leaves) for name in leaves}


def of_kernel(shape: tuple[int, ...], bias: tuple[int, ...] | None = None) -> Role:
    """Of a kernel [..., in, out], or [stacked..., in..., out...] where a bias tells the outputs."""
    return Role(True, math.prod(shape) // math.prod(_outputs(shape, bias)))


def embedding() -> Role:
    """Of a table [vocabulary, features], of which each input reads one row."""
    return Role(True, 1)


def is_table(name: str) -> bool:
    """Whether `name`, of a leaf or of an embedding's layer, is that of positions or a token."""
    last = _last(name)
    if _POSITIONS.fullmatch(last):
        return True
    return bool(_TOKEN.fullmatch(last)) and not _EMBEDDING.fullmatch(last)


def _last(name):
    return name.rsplit("/", 1)[-1].lower()


def _of_attention(name, leaves):
    """Of kernels [in, heads, dim] and [heads, dim, out], as Flax names those of its attention."""
    *block, layer, leaf = ["", *name.split("/")]
    if leaf != "kernel" or leaves[name].ndim < 3:
        return None
    beside = {other for other in _ATTENTION if "/".join([*block[1:], other, leaf]) in leaves}
    *_, first, second, _ = leaves[name].shape
    if layer in _ATTENTION and beside == set(_ATTENTION):
        return Role(True, first * second if layer == "out" else first)
    return None


def _of_name(name, leaves):
    leaf, bias = leaves[name], _bias_of(name, leaves)
    last, shape = _last(name), leaf.shape
    if not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.ndim < 2:
        return NONE
    if _BIAS.fullmatch(last) or is_table(name) or (_B.fullmatch(last) and _w_beside(name, leaves)):
        return NONE
    if _EMBEDDING.fullmatch(last):
        return NONE if is_table(name.rpartition("/")[0]) else embedding()
    if leaf.ndim == 3 and shape[0] == 1 and not _KERNEL.fullmatch(last):
        return NONE  # [1, 1, D] or [1, length, D]: added to every example
    if _OUT_FIRST.fullmatch(last) and (bias is None or math.prod(bias) == shape[0]):
        return Role(True, math.prod(shape[1:]))
    return of_kernel(shape, bias)


def _w_beside(name, leaves):
    folder = name.rpartition("/")[0]
    others = (other for other in leaves if other.rpartition("/")[0] == folder)
    return any(re.fullmatch(r"w\d*", _last(other)) for other in others)


def _bias_of(name, leaves):
    """Shape of the bias beside a leaf, or None."""
    folder = name.rpartition("/")[0]
    beside = f"{folder}/bias" if folder else "bias"
    return leaves[beside].shape if beside in leaves and beside != name else None


def _outputs(shape, bias):
    """Axes of a kernel that are no inputs: those of its bias, stacked ones and outputs."""
    for stacked in range(len(bias or ())):
        rest = bias[stacked:]
        if len(shape) > len(bias) and (*shape[:stacked], *shape[-len(rest) :]) == tuple(bias):
            return bias
    return shape[-1:]
