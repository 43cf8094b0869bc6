"""Stores of any number of tasks, without learning them."""

import functools

import jax
import jax.numpy as jnp

import supsup_jax as ss
from supsup_jax.layout import column, pack, place
from supsup_jax.stores import arrays


def random_store(
    net: ss.Network, num_tasks: int, learned: ss.MaskStore | None = None
) -> ss.MaskStore:
    """`num_tasks` masks: those of `learned` first, the others independent fair bits.

    To a network, another task's mask is little else: two masks learned by the threshold rule
    agree on half of the weights.
    """
    first = min(num_tasks, int(learned.num_tasks)) if learned is not None else 0
    store = ss.MaskStore.create(net, num_tasks)
    tiles, num_words, lanes = store._bank.words.shape
    # 1 wherever a bit stands for a weight: the last words may hold fewer than 32.
    whole = pack(net.layout.pad(jnp.ones(net.layout.num_weights, bool)))

    @jax.jit
    def draw():
        def tile(i):
            words = jax.random.bits(
                jax.random.fold_in(jax.random.key(0), i), (num_words, lanes), jnp.uint32
            )
            task = i * lanes + jnp.arange(lanes)
            return jnp.where((task < num_tasks)[None], words & whole[:, None], 0)

        return jax.lax.map(tile, jnp.arange(tiles, dtype=jnp.int32))

    @functools.partial(jax.jit, donate_argnums=0)
    def with_learned(words, learned):
        def copy(i, words):
            mask = column(learned, i)[None, :, None]
            return jax.lax.dynamic_update_slice(words, mask, place(words, i))

        return jax.lax.fori_loop(jnp.int32(0), jnp.int32(first), copy, words)

    words = draw()
    if first:
        words = with_learned(words, learned._bank.words)
    return store._with(arrays.holding(store._bank, words, num_tasks))
