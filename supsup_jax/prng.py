"""Keys split by purpose.

Drawing a task's scores from the key that drew the weights correlates the two, and one such mask
then wins nearly every inference (100 tasks: accuracy .9995 -> .13). So no draw in this library
uses a caller's key or seed as it came: each folds in the name of its purpose first.
"""

import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.random import threefry_2x32


def purpose_key(key: jax.Array, purpose: str) -> jax.Array:
    """The key of `key` for one purpose; different purposes give independent draws."""
    return jax.random.fold_in(key, _number(purpose))


def pinned_signs(seed: jax.Array, purpose: str, shapes: list[tuple[int, ...]]) -> list[jax.Array]:
    """For each shape +-1, float32, uniform: of a seed, uint32 [], alone, whatever JAX's flags say.

    A network's weights are told to others by their seed, and keys of JAX draw by generators that
    users choose. This is threefry written out, as JAX's own draws it by default (`jax.random`:
    fold_in, split, rademacher), and in that form for good.
    """
    key = _hashed(
        jnp.stack([jnp.zeros_like(seed), seed]), np.uint32(0), np.uint32(_number(purpose))
    )
    each = np.arange(len(shapes), dtype=np.uint32)
    keys = _hashed(key, np.zeros_like(each), each).reshape(2, -1)
    return [_signs(keys[:, i], shape) for i, shape in enumerate(shapes)]


def _signs(key, shape):
    place = lax.iota(jnp.uint32, math.prod(shape))  # 2**32 weights a leaf are enough
    bits = _hashed(key, jnp.zeros_like(place), place).reshape(2, -1)
    return jnp.where((bits[0] ^ bits[1]) >> 31 == 0, 1, -1).astype(jnp.float32).reshape(shape)


def _hashed(key, high, low):
    """threefry of pairs of counters: uint32 [2 len], the high words first."""
    return threefry_2x32(key, jnp.concatenate([jnp.ravel(high), jnp.ravel(low)]))


def _number(purpose):
    return zlib.crc32(purpose.encode()) & 0x7FFFFFFF
