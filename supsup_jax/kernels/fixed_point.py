"""Floats as bit planes, so that a sum over a mask's weights becomes popcounts.

Each word of a mask holds 32 weights. Their 32 floats become integers of `planes` bits at a step
of the word's own, v ~ step * q, and bit p of the 32 integers becomes one uint32, the word's plane
p. Then sum_j M_j v_j over the word is step * sum_p 2^p popcount(M & plane_p), the last plane
counting negatively (two's complement). A step per word costs one multiplication and keeps what
large weights elsewhere would round away: on a trained LeNet the largest of 32 weights is 3.3 times
the typical one, the largest of all up to 60 times.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

MIN_PLANES, MAX_PLANES = 2, 24


class Planes(NamedTuple):
    """bits: uint32 [planes, W], plane p of each word. step: float32 [W]; v is close to step * q."""

    bits: jax.Array
    step: jax.Array


@functools.partial(jax.jit, static_argnums=1)
def bit_planes(values: jax.Array, planes: int, dither: jax.Array | None = None) -> Planes:
    """Values [32, W], value b of word w at [b, w], rounded to the nearest of 2^planes steps.

    planes: MIN_PLANES to MAX_PLANES. A value that is not finite makes its word's step so.
    dither: of `dither`, [32, W]; values are then rounded to the step above or below, the more often
      to one the nearer they are, so that errors have mean 0. 0 stays 0.
    """
    q, step = _quantize(values, planes, dither)
    index = jnp.arange(planes, dtype=jnp.int32)[:, None]
    rows = [value[None] for value in q]
    # Python's sum and not a reduction: XLA fuses it into one loop along the words.
    bits = sum(((value >> index) & 1).astype(jnp.uint32) << b for b, value in enumerate(rows))
    return Planes(jnp.asarray(bits), step)


@jax.jit
def word_sums(words: jax.Array, planes: Planes) -> jax.Array:
    """sum of each word's selected values, float32 [..., lanes], of words uint32 [..., lanes].

    planes: of the words, [planes, ...] and [...], the same in all lanes.
    """
    terms = [
        lax.population_count(words & bits[..., None]).astype(jnp.int32) << p
        for p, bits in enumerate(planes.bits)
    ]
    terms[-1] = -terms[-1]
    # The sum over 32 integers of 24 bits stays below 2^28: exact in int32.
    return sum(terms[1:], terms[0]).astype(jnp.float32) * planes.step[..., None]


def checksum(values: jax.Array) -> jax.Array:
    """uint32 [] of float32 values [n]: another for nearly any other vector."""
    bits = lax.bitcast_convert_type(values, jnp.uint32)
    return jnp.sum(bits * (2 * lax.iota(jnp.uint32, bits.size) + 1), dtype=jnp.uint32)


def residual(values: jax.Array, planes: int) -> jax.Array:
    """What rounding to `planes` bits leaves of values [32, W]: v - step * q, float32."""
    q, step = _quantize(values, planes)
    return values - q.astype(jnp.float32) * step[None]


def dither(places: jax.Array) -> jax.Array:
    """Of each place, a uint32, a float in [0, 1) of 24 bits: the finalizer of MurmurHash3.

    As good as drawn for what it is used for, and in a hundredth of the time.
    """
    bits = places + jnp.uint32(0x9E3779B9)
    for factor, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    bits = bits ^ (bits >> 16)
    return (bits >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)


def _quantize(values, planes, dither=None):
    """q int32 [32, W] with |q| < 2^(planes - 1), step [W]."""
    most = 2 ** (planes - 1) - 1
    step = jnp.max(jnp.abs(values), axis=0) / most
    q = values / jnp.where(step > 0, step, 1.0)[None]
    q = jnp.round(q) if dither is None else jnp.floor(q + dither)
    # The step is rounded too: at 24 planes the quotient may come out one too large, which in
    # two's complement is the most negative number.
    return jnp.clip(q, -most, most).astype(jnp.int32), step
