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
        if donate and store is not self and not isinstance(masks.words, jax.core.Tracer):
            _delete(self._masks)
        return store._with(masks)

    def replace(self, i: int, task: Task | PyTree) -> "MaskStore":
        """This store with task i exchanged. Raises as `append` and `mask`.

        Inside jit an id that names no task changes nothing, and the next host call raises.
        """
        i = self._index(i)
        return self._with(_replace(self._masks, i, *self._fields(task), self.layout))

    def remove(self, i: int) -> "MaskStore":
        """This store without task i; later tasks move down by one, as in a list.

        Inside jit an id that names no task changes nothing, and the next host call raises.
        """
        return self._with(_remove(self._masks, self._index(i), self._static))

    def mask(self, i: int) -> PyTree:
        """Mask of task i: bool pytree like params, None where not masked.

        Raises IndexError, a ValueError too, unless 0 <= i < T, where both are concrete; inside
        jit the id is clipped to that range.
        """
        return self._mask(self._read_index(i))

    def task(self, i: int) -> Task:
        """Task i, with its statistics. Raises as `mask`."""
        i = self._read_index(i)
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
        if jnp.ndim(alphas) != 1:
            raise ValueError(f"alphas must be [{self.capacity}], got shape {jnp.shape(alphas)}")
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
        """Raises StoreError unless the masks have the network's leaves, shapes and weights.

        Weights are compared by fingerprint where both are at hand: a network's is computed when
        a store is created or loaded for it, not here, and never inside jit.
        """
        if not isinstance(net, Network):
            raise TypeError(f"net must be a Network, got {type(net).__name__}")
        if self.layout.shapes != net.layout.shapes:
            raise StoreError(
                f"the store holds masks of {self.layout.shapes}, "
                f"but the network masks {net.layout.shapes}"
            )
        if self.layout != net.layout:
            raise StoreError(
                f"the store's masks have the structure {self.layout.treedef}, "
                f"but the network's {net.layout.treedef}"
            )
        if net._fingerprint and not isinstance(self._fingerprint, jax.core.Tracer):
            mine = np.asarray(self._fingerprint).tobytes()
            if any(mine) and mine != bytes.fromhex(net._fingerprint):
                raise StoreError(
                    f"the store belongs to other weights (sha256 {mine.hex()[:12]}...) than this "
                    f"network's ({net._fingerprint[:12]}...)"
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

    @property
    def _consumed(self):
        words = getattr(self._masks, "words", None)  # transformations put placeholders here
        concrete = isinstance(words, jax.Array) and not isinstance(words, jax.core.Tracer)
        return concrete and words.is_deleted()

    def _with(self, masks, capacity=None):
        static = self._static._replace(capacity=capacity or self.capacity)
        return MaskStore(masks, self._fingerprint, self._seed, static)

    def _resized(self, capacity):
        return self._with(_resize(self._masks, self.layout, capacity), capacity)

    def _usable(self):
        """This store, unless it is consumed or overfull; reads nothing inside jit."""
        if self._consumed:
            raise StoreError(
                "this store was consumed by append(..., donate=True): use the returned store"
            )
        if not self._traced and (dropped := int(self._masks.dropped)):
            raise StoreError(
                f"{dropped} write(s) inside jit were dropped: appended beyond the capacity "
                f"{self.capacity}, which cannot grow there, or to a task that does not exist"
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
        if isinstance(i, jax.core.Tracer):
            return i.astype(jnp.int32)
        if isinstance(i, bool) or not hasattr(i, "__index__"):
            raise TypeError(f"a task id must be an integer, got {i!r}")
        held = self.capacity if self._traced else int(self.num_tasks)
        if not 0 <= (i := i.__index__()) < held:
            raise TaskIdError(f"task {i} is not in the store, which holds {held}")
        return jnp.int32(i)

    def _read_index(self, i):
        return jnp.clip(self._index(i), 0, jnp.maximum(self.num_tasks - 1, 0))

    def _mask(self, i):
        return self.layout.unravel(unpack(_column(self._masks.words, i)).reshape(-1) != 0)

    def _pad_slots(self, alphas):
        num_tiles, _, lanes = self._masks.words.shape
        spare = num_tiles * lanes - self.capacity
        return jnp.pad(alphas, [(0, 0)] * (alphas.ndim - 1) + [(0, spare)])

    def tree_flatten_with_keys(self):
        if self._consumed:  # before jit finds out in its own words
            self._usable()
        key = jax.tree_util.GetAttrKey
        leaves = [(key(n), getattr(self, f"_{n}")) for n in ("masks", "fingerprint", "seed")]
        return leaves, self._static

    @classmethod
    def tree_unflatten(cls, static, leaves):
        return cls(*leaves, static=static)

    def __repr__(self) -> str:
        # Shapes only: whatever state a store is in, an error message may have to show it.
        state = "consumed, " if self._consumed else ""
        return (
            f"MaskStore({state}capacity={self.capacity}, "
            f"weights={self.layout.num_weights:,} in {len(self.layout.shapes)} leaves)"
        )


def _tiling(layout, capacity):
    """[num_tiles, nw, lanes] for a capacity: tiles of equal width, MAX_LANES at most."""
    num_tiles = -(-capacity // MAX_LANES)
    return num_tiles, layout.num_words, -(-capacity // num_tiles)


def _column(words, i):
    """Words [nw] of task i."""
    column = lax.dynamic_slice(words, _place(words, i), (1, words.shape[1], 1))
    # Without the barrier XLA fuses this strided read into each of the 32 planes unpacked from it.
    return lax.optimization_barrier(column.reshape(-1))


def _place(words, i):
    """Where task i's words start."""
    lanes = words.shape[2]
    return i // lanes, jnp.zeros_like(i), i % lanes


def _write(masks, i, old, bits, state):
    """Task i becomes `bits` [32 nw] and `state`, where it held the words `old`."""
    words, counts, states, _, _ = masks
    kept_before = unpack(old).reshape(-1).astype(counts.dtype)
    return masks._replace(
        words=lax.dynamic_update_slice(words, pack(bits)[None, :, None], _place(words, i)),
        counts=counts - kept_before + bits.astype(counts.dtype),
        states=jax.tree.map(
            lambda rows, row: lax.dynamic_update_index_in_dim(rows, row, i, 0), states, state
        ),
    )


def _bits(leaves, layout):
    return layout.pad(jnp.concatenate([jnp.ravel(leaf) != 0 for leaf in leaves]))


def _append_impl(words, counts, states, num_tasks, dropped, leaves, state, static):
    masks = _Masks(words, counts, states, num_tasks, dropped)
    free = num_tasks < static.capacity
    slot = jnp.minimum(num_tasks, static.capacity - 1)
    written = _write_if(free, masks, slot, leaves, state, static.layout)
    return written._replace(num_tasks=num_tasks + free)


def _write_if(valid, masks, i, leaves, state, layout):
    """Task i replaced where `valid`; else written back as it is, and counted as dropped."""
    old = _column(masks.words, i)
    bits = jnp.where(valid, _bits(leaves, layout), unpack(old).reshape(-1) != 0)
    state = jax.tree.map(
        lambda rows, row: jnp.where(valid, row, lax.dynamic_index_in_dim(rows, i, keepdims=False)),
        masks.states,
        state,
    )
    written = _write(masks, i, old, bits, state)
    return written._replace(dropped=masks.dropped + ~valid)


_append = jax.jit(_append_impl, static_argnames="static")
_append_in_place = jax.jit(
    _append_impl, static_argnames="static", donate_argnames=("words", "counts", "states")
)


@functools.partial(jax.jit, static_argnames="layout")
def _replace(masks, i, leaves, state, layout):
    valid = (i >= 0) & (i < masks.num_tasks)
    return _write_if(valid, masks, jnp.where(valid, i, 0), leaves, state, layout)


@functools.partial(jax.jit, static_argnames="static")
def _remove(masks, i, static):
    valid = (i >= 0) & (i < masks.num_tasks)
    slots = jnp.arange(static.capacity)
    source = jnp.minimum(slots + ((slots >= i) & valid), static.capacity - 1)
    left = masks.num_tasks - valid

    def shift(rows):
        kept = (slots < left).reshape(-1, *[1] * (rows.ndim - 1))
        return jnp.where(kept, rows[source], 0)

    gone = unpack(_column(masks.words, jnp.where(valid, i, 0))).reshape(-1) * valid
    return masks._replace(
        words=tile_words(shift(untile_words(masks.words, static.capacity)), static.layout),
        counts=masks.counts - gone.astype(masks.counts.dtype),
        states=jax.tree.map(shift, masks.states),
        num_tasks=left,
        dropped=masks.dropped + ~valid,
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
    values = np.asarray(leaf)  # in NumPy: under the caller's jit, jnp would trace it
    if not np.all((values == 0) | (values == 1)):
        raise ValueError(
            f"the mask must hold only 0 and 1 at {name!r}: a store keeps one bit a weight "
            "(signed masks do not fit)"
        )


def _delete(masks):
    for leaf in jax.tree.leaves((masks.words, masks.counts, masks.states)):
        leaf.delete()
