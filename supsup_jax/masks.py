"""Scores to binary masks, with straight-through gradients.

Each rule maps one array of real scores to one mask of the same shape and dtype. A step function
has derivative zero, so each states the derivative it uses instead. The rules are `custom_jvp`
functions whose tangent is linear, so that forward and reverse mode, vmap and jit all work.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from supsup_jax import prng
from supsup_jax.devices import varying_like
from supsup_jax.layout import Layout
from supsup_jax.types import PyTree

# One number for every layer, or what gives a layer's density by its kernel's shape [..., in, out].
Density = float | Callable[[tuple[int, ...]], float]


def kept_count(density: float, n: int) -> int:
    """Weights kept out of `n` at `density` in (0, 1]: a host integer, rounded to the nearest.

    Raises ValueError for a density outside (0, 1], or one that keeps nothing.
    """
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density must lie in (0, 1], got {density!r}")
    if (kept := round(density * n)) == 0:
        raise ValueError(f"density {density!r} keeps none of {n} weights")
    return kept


@dataclasses.dataclass(frozen=True)
class ErdosRenyi:
    """Density min(most, scale (I + O) / (I O window)) for a kernel [window..., I, O].

    Small layers are kept denser than large ones: the paper's budget for conv nets, whose `scale`
    it calls s (`golden/er_density.json`). Equal by value, so it never retraces.
    Raises ValueError on construction for a scale or most that is no density.
    """

    scale: float
    most: float = 0.5

    def __post_init__(self):
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale must be positive and finite, got {self.scale!r}")
        if not 0 < self.most <= 1:
            raise ValueError(f"most must be a density in (0, 1], got {self.most!r}")

    def __call__(self, shape: tuple[int, ...]) -> float:
        if len(shape) < 2:
            raise ValueError(
                f"an Erdos-Renyi density needs a kernel [..., in, out], got shape {shape}"
            )
        return min(self.most, self.scale * (shape[-2] + shape[-1]) / math.prod(shape))


def kept_counts(layout: Layout, density: Density) -> dict[str, int]:
    """Weights kept of each masked leaf, by name, in the layout's order.

    A density that is a function sees each kernel's shape as [window..., in, out], however its axes
    lie, and of stacked ones that of one.

    Raises ValueError, naming the layer, where a density is outside (0, 1] or keeps nothing.
    """
    counts = {}
    for (name, shape), kernel in zip(layout.named_shapes, layout.kernels, strict=True):
        try:
            share = density(kernel) if callable(density) else density
            counts[name] = kept_count(share, math.prod(shape))
        except ValueError as error:
            raise ValueError(f"layer {name!r} of shape {shape}: {error}") from error
    return counts


def draw_scores(key: jax.Array, layout: Layout) -> PyTree:
    """Fresh float32 scores for the masked leaves, a pytree like a mask.

    Uniform in +-1/sqrt(fan_in), 1 where that has no meaning: Kaiming's with a = sqrt(5), as the
    reference starts them.
    """
    keys = jax.random.split(prng.purpose_key(key, "scores"), len(layout.named_shapes))
    drawn = []
    for key, (_, shape), fan_in in zip(keys, layout.named_shapes, layout.fan_ins, strict=True):
        bound = 1 / math.sqrt(fan_in or 1)
        drawn.append(jax.random.uniform(key, shape, jnp.float32, -bound, bound))
    return layout.tree(drawn)


def threshold_mask(scores: jax.Array) -> jax.Array:
    """1 where score >= 0, else 0: the rule of the paper's MNIST experiments.

    Under differentiation the map is the identity: the score gradient is the mask's.
    Raises TypeError unless scores are floats.
    """
    return _threshold(_checked_floats(scores))


def topk_mask(scores: jax.Array, k: int) -> jax.Array:
    """1 for the `k` largest |score| of the whole array, else 0: the rule of the conv nets.

    The lower flat index wins ties, so exactly `k` entries are kept. Under differentiation the
    map is |score|: the score gradient is the mask's times sign(score) (`golden/topk.npz`).
    Raises TypeError unless scores are floats and k is an int, ValueError unless 0 <= k <= size.
    """
    scores = _checked_floats(scores)
    _check_count(k, scores.size)
    return _topk(scores, k)


def signed_topk_mask(scores: jax.Array, k: int) -> jax.Array:
    """sign(score) for the `k` largest |score|, else 0: values in {-1, 0, 1}.

    Under differentiation the map is the identity. A store keeps one bit a weight and refuses
    such a mask. Ties and errors as `topk_mask`.
    """
    scores = _checked_floats(scores)
    _check_count(k, scores.size)
    return _signed_topk(scores, k)


@jax.custom_jvp
def _threshold(scores):
    return (scores >= 0).astype(scores.dtype)


@_threshold.defjvp
def _threshold_jvp(primals, tangents):
    return _threshold(*primals), tangents[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _topk(scores, k):
    return _largest(jnp.abs(scores), k).astype(scores.dtype)


@_topk.defjvp
def _topk_jvp(k, primals, tangents):
    return _topk(*primals, k), tangents[0] * jnp.sign(primals[0])


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _signed_topk(scores, k):
    return _topk(scores, k) * jnp.sign(scores)


@_signed_topk.defjvp
def _signed_topk_jvp(k, primals, tangents):
    return _signed_topk(*primals, k), tangents[0]


# Jitted for calls outside jit, where its loop would compile op by op; within, as if written out.
@functools.partial(jax.jit, static_argnames="k", inline=True)
def _largest(magnitudes: jax.Array, k: int) -> jax.Array:
    """True for the k largest of the non-negative `magnitudes`, lower index first among equals.

    Non-negative floats order as their bit patterns do, so the k-th largest is found by binary
    search over its bits: one count of the array a bit, where a sort needs log2 n passes of
    scattered moves.
    """
    width = jnp.finfo(magnitudes.dtype).bits
    bits = lax.bitcast_convert_type(magnitudes, jnp.dtype(f"uint{width}"))

    def settle(i, kth):
        trial = kth | (jnp.ones((), bits.dtype) << (width - 2 - i).astype(bits.dtype))
        return jnp.where(jnp.sum(bits >= trial, dtype=jnp.int32) >= k, trial, kth)

    zero = varying_like(jnp.zeros((), bits.dtype), bits)
    kth = lax.fori_loop(0, width - 1, settle, zero)
    above, equal = bits > kth, bits == kth
    spare = k - jnp.sum(above, dtype=jnp.int32)

    def first(equal):
        place = jnp.cumsum(equal.reshape(-1), dtype=jnp.int32).reshape(equal.shape)
        return equal & (place <= spare)

    # Scores seldom tie at the border, and then all that equal the k-th are kept.
    tied = jnp.sum(equal, dtype=jnp.int32) > spare
    return above | lax.cond(tied, first, lambda equal: equal, equal)


def _checked_floats(scores):
    scores = jnp.asarray(scores)
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        raise TypeError(f"scores must be floats, got dtype {scores.dtype}")
    return scores


def _check_count(k, size):
    if isinstance(k, bool) or not hasattr(k, "__index__") or isinstance(k, Tracer):
        raise TypeError(f"k must be a host integer (see kept_count), got {k!r}")
    if not 0 <= k <= size:
        raise ValueError(f"k must lie in [0, {size}], the size of scores, got {k}")


def check_binary(name: str, leaf: Any) -> None:
    """Raises TypeError or ValueError unless a mask's leaf, if concrete, holds 0 and 1 only."""
    if isinstance(leaf, Tracer):
        return
    dtype = jnp.result_type(leaf)
    if jnp.issubdtype(dtype, jnp.bool_):
        return
    if not jnp.issubdtype(dtype, jnp.number):
        raise TypeError(f"the mask must hold bool or numbers at {name!r}, got dtype {dtype}")
    values = np.asarray(leaf)  # in NumPy: under the caller's jit, jnp would trace it
    if not np.all((values == 0) | (values == 1)):
        raise ValueError(
            f"the mask must hold only 0 and 1 at {name!r}: a store keeps one bit a weight "
            "(signed masks do not fit)"
        )
