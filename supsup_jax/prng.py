"""Keys split by purpose.

Drawing a task's scores from the key that drew the weights correlates the two, and one such mask
then wins nearly every inference (100 tasks: accuracy .9995 -> .13). So no draw in this library
uses a caller's key or seed as it came: each folds in the name of its purpose first.
"""

import dataclasses
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.random import threefry_2x32


def purpose_key(key: jax.Array, purpose: str) -> jax.Array:
    """The key of `key` for one purpose; different purposes give independent draws."""
    return jax.random.fold_in(key, _number(purpose))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyData:
    """Where a typed PRNG key stood: state is stored, stacked and saved as plain numbers."""

    data: jax.Array
    impl: str = dataclasses.field(metadata={"static": True})


def unwrap_keys(tree: Any) -> Any:
    """A tree with its typed keys as KeyData."""

    def unwrap(leaf):
        if not jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
            return jnp.asarray(leaf)
        return KeyData(jax.random.key_data(leaf), str(jax.random.key_impl(leaf)))

    return jax.tree.map(unwrap, tree)


def wrap_keys(tree: Any) -> Any:
    """What was unwrapped, as it was."""

    def wrap(node):
        if not isinstance(node, KeyData):
            return node
        return jax.random.wrap_key_data(node.data, impl=node.impl)

    return jax.tree.map(wrap, tree, is_leaf=lambda node: isinstance(node, KeyData))


def own_keys(key: jax.Array, tree: Any) -> Any:
    """A state whose keys, such as dropout's, follow from `key`, a task's, each in its own way."""

    def fold(node):
        if isinstance(node, KeyData):
            return unwrap_keys(fold(wrap_keys(node)))
        if not jnp.issubdtype(node.dtype, jax.dtypes.prng_key):
            return node
        number = jax.random.bits(purpose_key(key, "state"))
        keys = jax.vmap(lambda each: jax.random.fold_in(each, number))(node.reshape(-1))
        return keys.reshape(node.shape)

    return jax.tree.map(fold, tree, is_leaf=lambda node: isinstance(node, KeyData))


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
