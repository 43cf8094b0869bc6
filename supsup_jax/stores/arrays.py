"""The arrays of a store, and what happens to them as tasks come and go: pure functions, jitted.

Ids are int32 arrays and nothing here reads a value on the host; `mask_store` wraps this in checks.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from supsup_jax.devices import SLOTS, WHOLE
from supsup_jax.kernels import contraction
from supsup_jax.layout import (
    MAX_LANES,
    VECTOR_LANES,
    WORD_BITS,
    Layout,
    column,
    pack,
    place,
    unpack,
)
from supsup_jax.types import Facts, PyTree, Task


class Bank(NamedTuple):
    """K slots, the first T of which hold a task.

    words: uint32 [num_tiles, nw, lanes], the packed masks (see `layout`), 0 where there is none.
    counts: unsigned [32 nw], how many masks keep each weight, so that the uniform mixture costs
      O(n) whatever T is; the smallest dtype that holds K.
    states: each task's normalisation statistics, [K, ...]; None for a stateless network.
    num_tasks: int32 [], T.
    dropped: int32 [], writes inside jit that found no room, or no task.
    """

    words: jax.Array
    counts: jax.Array
    states: PyTree
    num_tasks: jax.Array
    dropped: jax.Array


# Where these lie on a mesh: words by tiles, statistics by slots, the rest on every device.
ON_MESH = Bank._make([SLOTS, WHOLE, SLOTS, WHOLE, WHOLE])


def like_state(bank: Bank) -> PyTree:
    """Shapes and dtypes of one task's statistics."""
    return jax.tree.map(lambda rows: jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype), bank.states)


def nbytes(layout: Layout, state: PyTree, capacity: int) -> int:
    """Bytes of a bank, before it is made."""
    arrays = jax.tree.leaves(jax.eval_shape(lambda: empty(layout, state, capacity)))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in arrays)


def empty(layout: Layout, state: PyTree, capacity: int) -> Bank:
    """A bank without tasks, for networks of this layout and state."""
    leaves, treedef = jax.tree.flatten(state)
    like = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    return _empty(layout, treedef, like, capacity)


@functools.partial(jax.jit, static_argnums=range(4))
def _empty(layout, treedef, like, capacity):
    states = [jnp.zeros((capacity, *shape), dtype) for shape, dtype in like]
    return Bank(
        words=jnp.zeros(tiling(layout, capacity), jnp.uint32),
        counts=jnp.zeros(WORD_BITS * layout.num_words, np.min_scalar_type(capacity)),
        states=jax.tree.unflatten(treedef, states),
        num_tasks=jnp.zeros((), jnp.int32),
        dropped=jnp.zeros((), jnp.int32),
    )


@jax.jit
def holding(bank: Bank, words: jax.Array, num_tasks: jax.Array | int) -> Bank:
    """The bank with the masks `words`, laid out like its own and 0 beyond `num_tasks`."""
    everything = jnp.ones(words.shape[0] * words.shape[2], bool)
    counts = contraction.count(words, everything, jnp.asarray(num_tasks, jnp.int32))
    return bank._replace(
        words=words,
        counts=counts.astype(bank.counts.dtype),
        num_tasks=jnp.asarray(num_tasks, jnp.int32),
    )


def tiled(
    layout: Layout,
    state: PyTree,
    capacity: int,
    tasks: Iterable[tuple[np.ndarray, Sequence[np.ndarray]]],
) -> tuple[np.ndarray, PyTree, int]:
    """Words and statistics of tasks as a bank has them, in NumPy, and how many they are.

    state: of one task, for its shapes. tasks: words uint32 [nw] and the leaves of the statistics
      of one task after another.
    """
    num_tiles, num_words, lanes = tiling(layout, capacity)
    words = _aligned_zeros((num_tiles, num_words, lanes))
    like, treedef = jax.tree.flatten(state)
    states = [np.zeros((capacity, *leaf.shape), leaf.dtype) for leaf in like]
    tasks, num_tasks = iter(tasks), 0
    # A cache line of lanes at a time: several times as fast as the whole transposed at once.
    while group := list(itertools.islice(tasks, VECTOR_LANES)):
        tile, lane = divmod(num_tasks, lanes)
        words[tile, :, lane : lane + len(group)] = np.stack([row for row, _ in group]).T
        for _, leaves in group:
            for rows, leaf in zip(states, leaves, strict=True):
                rows[num_tasks] = leaf
            num_tasks += 1
    return words, jax.tree.unflatten(treedef, states), num_tasks


def _aligned_zeros(shape):
    """uint32 zeros that a CPU backend takes as they are, where others cost it a copy of all."""
    size, line = 4 * math.prod(shape), 64
    data = np.zeros(size + line, np.uint8)
    start = -data.ctypes.data % line
    return data[start : start + size].view(np.uint32).reshape(shape)


@functools.partial(jax.jit, static_argnames="layout")
def pack_leaves(leaves: list[jax.Array], layout: Layout) -> jax.Array:
    """uint32 words [nw] of a mask's leaves in the layout's order."""
    return pack(_bits(leaves, layout))


def tiling(layout, capacity):
    """[num_tiles, nw, lanes] for a capacity: tiles of equal width, MAX_LANES at most."""
    num_tiles = -(-capacity // MAX_LANES)
    vectors = -(-capacity // (num_tiles * VECTOR_LANES))
    return num_tiles, layout.num_words, vectors * VECTOR_LANES


class Held(NamedTuple):
    """What a slot holds: words uint32 [nw], and its statistics."""

    words: jax.Array
    state: PyTree


def held(bank: Bank, i: jax.Array) -> Held:
    """What slot i holds."""
    row = functools.partial(lax.dynamic_index_in_dim, index=i, keepdims=False)
    return Held(column(bank.words, i), jax.tree.map(row, bank.states))


@functools.partial(jax.jit, static_argnames="layout")
def read(bank, i, layout):
    """Task i, or the nearest there is."""
    words, state = held(bank, jnp.clip(i, 0, jnp.maximum(bank.num_tasks - 1, 0)))
    return as_task(mask_of(words, layout), state)


def as_task(mask: PyTree, state: PyTree) -> Task:
    """A task as its owner knows it, of what a slot holds."""
    return Task(mask, state.state if isinstance(state, Facts) else state)


def mask_of(words: jax.Array, layout: Layout) -> PyTree:
    """The mask, of bools, in words [nw]."""
    return layout.unravel(unpack(words).reshape(-1) != 0)


def write(
    bank: Bank,
    i: jax.Array,
    valid: jax.Array,
    old: Held,
    task: Task,
    layout: Layout,
    total: Callable[[jax.Array], jax.Array],
) -> Bank:
    """Slot i, which held `old`, given to a task where `valid`; else it is written back as it is.

    task: its mask as leaves in the layout's order, and its statistics.
    total: the sum of the counts' change over the devices that have counts in common.
    """
    before = unpack(old.words).reshape(-1)
    bits = jnp.where(valid, _bits(task.mask, layout), before != 0)
    change = total(bits.astype(jnp.int32) - before.astype(jnp.int32))
    state = jax.tree.map(lambda was, row: jnp.where(valid, row, was), old.state, task.state)
    return bank._replace(
        words=lax.dynamic_update_slice(bank.words, pack(bits)[None, :, None], place(bank.words, i)),
        counts=bank.counts + change.astype(bank.counts.dtype),  # -1 wraps round, and back
        states=jax.tree.map(
            lambda rows, row: lax.dynamic_update_index_in_dim(rows, row, i, 0), bank.states, state
        ),
    )


def _bits(leaves, layout):
    return layout.ravel_leaves([leaf.astype(bool) for leaf in leaves])


@functools.partial(jax.jit, static_argnames=("layout", "capacity"))
def remove(bank, i, layout, capacity):
    """Task i gone and later ones moved down; an id that names no task is dropped."""
    valid = (i >= 0) & (i < bank.num_tasks)
    slots = jnp.arange(capacity)
    source = jnp.minimum(slots + ((slots >= i) & valid).astype(jnp.int32), capacity - 1)
    left = bank.num_tasks - valid.astype(jnp.int32)

    def shift(rows):
        kept = (slots < left).reshape(-1, *[1] * (rows.ndim - 1))
        return jnp.where(kept, rows[source], 0)

    gone = jnp.where(valid, unpack(column(bank.words, jnp.where(valid, i, 0))).reshape(-1), 0)
    return bank._replace(
        words=tile_words(shift(untile_words(bank.words, capacity)), layout),
        counts=bank.counts - gone.astype(bank.counts.dtype),
        states=jax.tree.map(shift, bank.states),
        num_tasks=left,
        dropped=bank.dropped + (~valid).astype(jnp.int32),
    )


@functools.partial(jax.jit, static_argnames=("layout", "capacity"))
def resize(bank, layout, capacity):
    """A copy with more slots."""
    old = bank.words.shape[0] * bank.words.shape[2]

    def widen(rows):
        return jnp.pad(rows, [(0, capacity - len(rows))] + [(0, 0)] * (rows.ndim - 1))

    return bank._replace(
        words=tile_words(widen(untile_words(bank.words, min(old, capacity))), layout),
        counts=bank.counts.astype(np.min_scalar_type(capacity)),
        states=jax.tree.map(widen, bank.states),
    )


@functools.partial(jax.jit, static_argnames="layout")
def taken(bank, ids, num_tasks, layout):
    """A bank of the tasks ids [S], of which the first `num_tasks` count."""
    num_tiles, num_words, lanes = tiling(layout, len(ids))
    slots = jnp.pad(ids, (0, num_tiles * lanes - len(ids)))
    # One gather along the lanes of all tiles side by side; a column a task is twice as slow.
    words = jnp.moveaxis(bank.words, 0, 1).reshape(num_words, -1)[:, slots]
    words = jnp.where(jnp.arange(len(slots)) < num_tasks, words, 0)
    words = jnp.moveaxis(words.reshape(num_words, num_tiles, lanes), 1, 0)
    states = jax.tree.map(lambda rows: rows[ids], bank.states)
    return holding(bank._replace(states=states), words, num_tasks)


def untile_words(words: jax.Array, capacity: int) -> jax.Array:
    """[num_tiles, nw, lanes] -> [capacity, nw], a row a task."""
    return jnp.moveaxis(words, 1, 2).reshape(-1, words.shape[1])[:capacity]


def tile_words(rows: jax.Array, layout: Layout) -> jax.Array:
    """[capacity, nw] -> [num_tiles, nw, lanes]."""
    num_tiles, num_words, lanes = tiling(layout, len(rows))
    rows = jnp.pad(rows, [(0, num_tiles * lanes - len(rows)), (0, 0)])
    return jnp.moveaxis(rows.reshape(num_tiles, lanes, num_words), 1, 2)
