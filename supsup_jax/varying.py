"""Loop carries under shard_map, where what differs between devices has a type of its own."""

import jax
import jax.numpy as jnp


def varying_like(value: jax.Array, like: jax.Array) -> jax.Array:
    """`value`, made to depend on `like` (of at least one element) and otherwise unchanged.

    A loop's carry must enter with the type it leaves with, and a constant that meets sharded data
    on the way does not. Adding a zero made of that data gives it the type on every release of
    JAX, where the explicit cast has changed its name.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return value  # not inside shard_map
    return value + (jnp.ravel(like)[0] > 0).astype(value.dtype) * 0
