"""The mask store: every task's mask at one bit a weight, as a pytree of arrays."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from supsup_jax import contraction
from supsup_jax.network import Network
from supsup_jax.packing import MAX_LANES, WORD_BITS, Layout, named_leaves, pack, unpack
from supsup_jax.types import PyTree, Task


class StoreError(ValueError):
    """A store that cannot be used as asked; the message says what to do."""


class TaskIdError(StoreError, IndexError):
    """No task of that number."""


class _Masks(NamedTuple):
    """The leaves that change as tasks come and go; see MaskStore."""

    words: jax.Array
    counts: jax.Array
    states: PyTree
    num_tasks: jax.Array
    dropped: jax.Array


class _Static(NamedTuple):
    layout: Layout
    capacity: int
    initializer: str | None


@jax.tree_util.register_pytree_with_keys_class
class MaskStore:
    """The masks, and normalisation statistics, of the tasks learned in one network.

    A pytree: it goes through jit, vmap and shard_map, and every method returns a new store.
    Make one with `MaskStore.create(net)` or `MaskStore.load(path, net)`.

    Leaves (K the capacity; words and tiles as in `packing`):
      words: uint32 [num_tiles, nw, lanes], the packed masks, zero where there is no task.
      counts: unsigned [32 nw], how many masks keep each weight, so that the uniform mixture
        costs O(n) whatever T is; the smallest dtype that holds K.
      states: each task's normalisation statistics, [K, ...]; None for a stateless network.
      num_tasks: int32 [], T. dropped: int32 [], tasks that a full store refused inside jit.
      fingerprint: uint8 [32], the weights' sha256; zeros when the store was made inside jit.
      seed: of the weights; None where they were given.
    """

    def __init__(self, masks: "_Masks", fingerprint: jax.Array, seed: Any, static: "_Static"):
        self._masks, self._fingerprint, self._seed, self._static = masks, fingerprint, seed, static

    @classmethod
    def create(cls, net: Network, capacity: int = 64) -> "MaskStore":
        """An empty store for tasks of `net`, with room for `capacity` before it grows.

        Raises TypeError unless net is a Network, ValueError unless capacity is at least 1.
        """
        if not isinstance(net, Network):
            raise TypeError(f"net must be a Network, got {type(net).__name__}")
        if isinstance(capacity, bool) or not isinstance(capacity, int | np.integer):
            raise TypeError(f"capacity must be an int, got {capacity!r}")
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(net.params))
        digest = bytes(32) if traced else bytes.fromhex(net.fingerprint)
        return cls(
            masks=_Masks(
                words=jnp.zeros(_tiling(net.layout, capacity), jnp.uint32),
                counts=jnp.zeros(WORD_BITS * net.layout.num_words, np.min_scalar_type(capacity)),
                states=jax.tree.map(
                    lambda leaf: jnp.zeros((capacity, *leaf.shape), leaf.dtype), net.state
                ),
                num_tasks=jnp.zeros((), jnp.int32),
                dropped=jnp.zeros((), jnp.int32),
            ),
            fingerprint=jnp.asarray(np.frombuffer(digest, np.uint8)),
            # A copy: donating a store must never consume what the network holds.
            seed=None if net.seed is None else jnp.array(net.seed, copy=True),
            static=_Static(net.layout, int(capacity), net.initializer),
        )

    @property
    def num_tasks(self) -> jax.Array:
        """T, int32 []."""
        return self._usable()._masks.num_tasks

    @property
    def capacity(self) -> int:
        """K: slots, filled or not."""
        return self._static.capacity

    @property
    def layout(self) -> Layout:
        """Which leaves are masked, and their order."""
        return self._static.layout

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves: masks, counts, statistics, for the whole capacity."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._usable()))

    @property
    def slots(self) -> jax.Array:
        """bool [K], whether each slot holds a task."""
        return jnp.arange(self.capacity) < self.num_tasks

    def append(self, task: Task | PyTree, *, donate: bool = False) -> "MaskStore":
        """This store and one more task, behind the others.

        Outside jit a full store grows first, to twice its capacity. Inside jit it cannot: a
        task that finds no room is dropped, and the next call on the host raises StoreError.
        task: a Task, or a bare mask where the network has no state.
        donate: consume this store's masks and statistics (in place, where nothing grows); its
          later use raises StoreError. Inside jit the caller's own donation decides.
        Raises TypeError or ValueError for a mask of another network, or not of 0 and 1 only.
        """
        leaves, state = self._usable()._fields(task)
        store = self
        if not self._traced and int(self.num_tasks) == self.capacity:
            store = self._resized(2 * self.capacity)
        in_place = not self._traced and (donate or store is not self)
        write = _append_in_place if in_place else _append
        masks = write(*store._masks, leaves, state, store._static)
        if donate and store is not self and not self._traced:
            _delete(self._masks)
        return store._with(masks)

    def replace(self, i: int, task: Task | PyTree) -> "MaskStore":
        """This store with task i exchanged. Raises as `append`, IndexError for no such task."""
        i = self._index(i)
        return self._with(_replace(self._masks, i, *self._fields(task), self.layout))

    def remove(self, i: int) -> "MaskStore":
        """This store without task i; later tasks move down by one, as in a list."""
        return self._with(_remove(self._masks, self._index(i), self._static))

    def mask(self, i: int) -> PyTree:
        """Mask of task i: bool pytree like params, None where not masked.

        Raises IndexError, a ValueError too, unless 0 <= i < T (where both are concrete).
        """
        return self._mask(self._index(i))

    def task(self, i: int) -> Task:
        """Task i, with its statistics. Raises as `mask`."""
        i = self._index(i)
        return Task(
            self._mask(i),
            jax.tree.map(
                lambda leaf: lax.dynamic_index_in_dim(leaf, i, keepdims=False), self._masks.states
            ),
        )

    def mixture(self, alphas: jax.Array | None = None) -> PyTree:
        """sum_i alphas_i M_i as a float32 pytree like params, None where not masked.

        alphas: [K] or [T] coefficients, differentiable; None is 1/T each, read off the counts.
        Raises ValueError for an empty store or alphas of another length.
        """
        self.check_holds_tasks()
        if alphas is None:
            mean = self._masks.counts.astype(jnp.float32) / self.num_tasks.astype(jnp.float32)
            return self.layout.unravel(mean)
        alphas = self.per_slot(alphas)
        return self.layout.unravel(
            contraction.superpose(self._masks.words, self._pad_slots(alphas), self.num_tasks)
        )

    def per_slot(self, alphas: jax.Array) -> jax.Array:
        """Coefficients [..., K] of [..., K] or [..., T], 0 where there is no task."""
        alphas = jnp.asarray(alphas)
        if not jnp.issubdtype(alphas.dtype, jnp.floating):
            raise TypeError(f"alphas must be floats, got dtype {alphas.dtype}")
        length = alphas.shape[-1] if alphas.ndim else 0
        fits = length == self.capacity or (
            0 < length < self.capacity and (self._traced or length == int(self.num_tasks))
        )
        if not fits:
            held = "" if self._traced else f", or {int(self.num_tasks)}, the tasks held"
            raise ValueError(
                f"alphas must end in {self.capacity}, the capacity{held}; got {alphas.shape}"
            )
        spare = [(0, 0)] * (alphas.ndim - 1) + [(0, self.capacity - length)]
        return jnp.where(self.slots, jnp.pad(alphas.astype(jnp.float32), spare), 0)

    def contract(self, v: jax.Array, implementation: str | None = None) -> jax.Array:
        """<v, M_i> for every task: [..., K] of v [..., n] in the layout's order; 0 if no task."""
        s = contraction.contract(
            self._usable()._masks.words, self.layout.pad(v), self.num_tasks, implementation
        )
        return s[..., : self.capacity]

    def check_holds_tasks(self) -> None:
        """Raises StoreError when the store is known to be empty, consumed or overfull."""
        if not self._usable()._traced and int(self.num_tasks) == 0:
            raise StoreError("the store is empty: append a task first")

    def check_fits(self, net: Network) -> None:
        """Raises StoreError unless the masks have the network's leaves and shapes."""
        if not isinstance(net, Network):
            raise TypeError(f"net must be a Network, got {type(net).__name__}")
        if self.layout != net.layout:
            raise StoreError(
                f"the store holds masks of {dict(self.layout.shapes)}, "
                f"but the network masks {dict(net.layout.shapes)}"
            )

    def save(self, path, overwrite: bool = False) -> None:
        """Writes the store to the file `path`, wholly or not at all; see `store_file`."""
        from supsup_jax import store_file

        store_file.save(self, path, overwrite)

    @classmethod
    def load(cls, path, net: Network) -> "MaskStore":
        """The store saved at `path`, once it is seen to belong to `net`; see `store_file`."""
        from supsup_jax import store_file

        return store_file.load(path, net)

    @property
    def _traced(self):
        return isinstance(self._masks.words, jax.core.Tracer)

    def _with(self, masks, capacity=None):
        static = self._static._replace(capacity=capacity or self.capacity)
        return MaskStore(masks, self._fingerprint, self._seed, static)

    def _resized(self, capacity):
        return self._with(_resize(self._masks, self.layout, capacity), capacity)

    def _usable(self):
        """This store, unless it is consumed or overfull; reads nothing inside jit."""
        if isinstance(self._masks.words, jax.Array) and not self._traced:
            if self._masks.words.is_deleted():
                raise StoreError(
                    "this store was consumed by append(..., donate=True): use the returned store"
                )
            if dropped := int(self._masks.dropped):
                raise StoreError(
                    f"{dropped} task(s) were appended inside jit beyond the capacity "
                    f"{self.capacity} and dropped: create the store with a larger capacity"
                )
        return self

    def _fields(self, task):
        mask, state = task if isinstance(task, Task) else (task, None)
        leaves = self.layout.leaves(mask, "the mask")
        for name, leaf in zip(self.layout.shapes, leaves, strict=True):
            if not isinstance(leaf, jax.core.Tracer):
                _check_binary(name, leaf)
        like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), self._masks.states
        )
        if jax.tree.structure(state) != jax.tree.structure(like):
            if self._masks.states is None:
                raise ValueError("the network has no state, but the task brings one")
            raise ValueError(
                f"append Task(mask, state) with the statistics {list(named_leaves(like))}: "
                f"the network has state; got {list(named_leaves(state))}"
            )
        for (name, want), got in zip(
            named_leaves(like).items(), jax.tree.leaves(state), strict=True
        ):
            if jnp.shape(got) != want.shape or jnp.result_type(got) != want.dtype:
                raise ValueError(
                    f"state must be {want.dtype} {want.shape} at {name!r}, "
                    f"got {jnp.result_type(got)} {jnp.shape(got)}"
                )
        return leaves, state

    def _index(self, i):
        self._usable()
        if isinstance(i, jax.core.Tracer) or self._traced:
            return i
        if isinstance(i, bool) or not hasattr(i, "__index__"):
            raise TypeError(f"a task id must be an integer, got {i!r}")
        if not 0 <= (i := i.__index__()) < self.num_tasks:
            raise TaskIdError(f"task {i} is not in the store, which holds {int(self.num_tasks)}")
        return i

    def _mask(self, i):
        return self.layout.unravel(unpack(_column(self._masks.words, i)).reshape(-1) != 0)

    def _pad_slots(self, alphas):
        num_tiles, _, lanes = self._masks.words.shape
        spare = num_tiles * lanes - self.capacity
        return jnp.pad(alphas, [(0, 0)] * (alphas.ndim - 1) + [(0, spare)])

    def tree_flatten_with_keys(self):
        key = jax.tree_util.GetAttrKey
        leaves = [(key(n), getattr(self, f"_{n}")) for n in ("masks", "fingerprint", "seed")]
        return leaves, self._static

    @classmethod
    def tree_unflatten(cls, static, leaves):
        return cls(*leaves, static=static)

    def __repr__(self) -> str:
        held = "traced" if self._traced else int(self.num_tasks)
        return (
            f"MaskStore(tasks={held}, capacity={self.capacity}, "
            f"weights={self.layout.num_weights:,}, bytes={self.nbytes:,})"
        )


def _tiling(layout, capacity):
    """[num_tiles, nw, lanes] for a capacity: tiles of equal width, MAX_LANES at most."""
    num_tiles = -(-capacity // MAX_LANES)
    return num_tiles, layout.num_words, -(-capacity // num_tiles)


def _column(words, i):
    """Words [nw] of task i."""
    _, num_words, lanes = words.shape
    column = lax.dynamic_slice(words, (i // lanes, 0, i % lanes), (1, num_words, 1))
    # Without the barrier XLA fuses this strided read into each of the 32 planes unpacked from it.
    return lax.optimization_barrier(column.reshape(num_words))


def _write(masks, i, old, bits, state):
    """Task i becomes `bits` [32 nw] and `state`, where it held the words `old`."""
    words, counts, states, _, _ = masks
    lanes = words.shape[2]
    kept_before = unpack(old).reshape(-1).astype(counts.dtype)
    return masks._replace(
        words=lax.dynamic_update_slice(
            words, pack(bits)[None, :, None], (i // lanes, 0, i % lanes)
        ),
        counts=counts - kept_before + bits.astype(counts.dtype),
        states=jax.tree.map(
            lambda rows, row: lax.dynamic_update_index_in_dim(rows, row, i, 0), states, state
        ),
    )


def _bits(leaves, layout):
    return layout.pad(jnp.concatenate([jnp.ravel(leaf) != 0 for leaf in leaves]))


def _append_impl(words, counts, states, num_tasks, dropped, leaves, state, static):
    masks = _Masks(words, counts, states, num_tasks, dropped)
    full = num_tasks >= static.capacity
    slot = jnp.minimum(num_tasks, static.capacity - 1)
    old = _column(words, slot)
    # A full store writes its last task back: nothing is lost, and nothing is copied.
    bits = jnp.where(full, unpack(old).reshape(-1) != 0, _bits(leaves, static.layout))
    state = jax.tree.map(
        lambda rows, row: jnp.where(
            full, lax.dynamic_index_in_dim(rows, slot, keepdims=False), row
        ),
        states,
        state,
    )
    return _write(masks, slot, old, bits, state)._replace(
        num_tasks=num_tasks + ~full, dropped=dropped + full
    )


_append = jax.jit(_append_impl, static_argnames="static")
_append_in_place = jax.jit(
    _append_impl, static_argnames="static", donate_argnames=("words", "counts", "states")
)


@functools.partial(jax.jit, static_argnames="layout")
def _replace(masks, i, leaves, state, layout):
    return _write(masks, i, _column(masks.words, i), _bits(leaves, layout), state)


@functools.partial(jax.jit, static_argnames="static")
def _remove(masks, i, static):
    slots = jnp.arange(static.capacity)
    source = jnp.minimum(slots + (slots >= i), static.capacity - 1)
    kept = slots < masks.num_tasks - 1

    def shift(rows):
        moved = rows[source]
        return jnp.where(kept.reshape(-1, *[1] * (rows.ndim - 1)), moved, 0)

    gone = unpack(_column(masks.words, i)).reshape(-1).astype(masks.counts.dtype)
    return masks._replace(
        words=tile_words(shift(untile_words(masks.words, static.capacity)), static.layout),
        counts=masks.counts - gone,
        states=jax.tree.map(shift, masks.states),
        num_tasks=masks.num_tasks - 1,
    )


@functools.partial(jax.jit, static_argnames=("layout", "capacity"))
def _resize(masks, layout, capacity):
    old = masks.words.shape[0] * masks.words.shape[2]

    def widen(rows):
        return jnp.pad(rows, [(0, capacity - len(rows))] + [(0, 0)] * (rows.ndim - 1))

    return masks._replace(
        words=tile_words(widen(untile_words(masks.words, min(old, capacity))), layout),
        counts=masks.counts.astype(np.min_scalar_type(capacity)),
        states=jax.tree.map(widen, masks.states),
    )


def untile_words(words: jax.Array, capacity: int) -> jax.Array:
    """[num_tiles, nw, lanes] -> [capacity, nw], a row a task."""
    return jnp.moveaxis(words, 1, 2).reshape(-1, words.shape[1])[:capacity]


def tile_words(rows: jax.Array, layout: Layout) -> jax.Array:
    """[capacity, nw] -> [num_tiles, nw, lanes]."""
    num_tiles, num_words, lanes = _tiling(layout, len(rows))
    rows = jnp.pad(rows, [(0, num_tiles * lanes - len(rows)), (0, 0)])
    return jnp.moveaxis(rows.reshape(num_tiles, lanes, num_words), 1, 2)


def _check_binary(name, leaf):
    dtype = jnp.result_type(leaf)
    if jnp.issubdtype(dtype, jnp.bool_):
        return
    if not jnp.issubdtype(dtype, jnp.number):
        raise TypeError(f"the mask must hold bool or numbers at {name!r}, got dtype {dtype}")
    if not bool(jnp.all((leaf == 0) | (leaf == 1))):
        raise ValueError(
            f"the mask must hold only 0 and 1 at {name!r}: a store keeps one bit a weight "
            "(signed masks do not fit)"
        )


def _delete(masks):
    for leaf in jax.tree.leaves((masks.words, masks.counts, masks.states)):
        leaf.delete()
