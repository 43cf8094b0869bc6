"""The mask store: every task's mask at one bit a weight, as a pytree of arrays."""

import math
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from supsup_jax import devices
from supsup_jax.checks import check_int, check_type, is_traced
from supsup_jax.kernels import certify, contraction
from supsup_jax.layout import Layout, named_leaves
from supsup_jax.masks import check_binary
from supsup_jax.network import Network
from supsup_jax.stores import arrays, store_file
from supsup_jax.stores.base import TaskStore, check_same_network, digest_of
from supsup_jax.types import PyTree, StoreError, Task, TrainResult


class _Static(NamedTuple):
    layout: Layout
    capacity: int
    initializer: str | None


@jax.tree_util.register_pytree_with_keys_class
class MaskStore(TaskStore):
    """The masks, and normalisation statistics, of the tasks learned in one network.

    A pytree: it goes through jit, vmap and shard_map, and every method returns a new store.
    Make one with `MaskStore.create(net)` or `MaskStore.load(path, net)`.

    Leaves: the `bank.Bank` of masks and statistics; the fingerprint of the weights, uint8 [32],
    zeros when the store was made inside jit; and their seed, None where they were given.
    """

    def __init__(self, tasks: arrays.Bank, fingerprint: jax.Array, seed: Any, static: _Static):
        self._bank, self._fingerprint, self._seed, self._static = tasks, fingerprint, seed, static

    @classmethod
    def create(cls, net: Network, capacity: int = 64) -> "MaskStore":
        """An empty store for tasks of `net`, with room for `capacity` before it grows.

        Raises TypeError unless net is a Network, ValueError unless capacity is at least 1.
        """
        check_type("net", net, Network)
        check_int("capacity", capacity, 1)
        if not is_traced(net.params):
            devices.check_room(arrays.nbytes(net.layout, net.state, int(capacity)), int(capacity))
        return cls(
            arrays.empty(net.layout, net.state, int(capacity)),
            fingerprint=digest_of(net),
            # A copy: donating a store must never consume what the network holds.
            seed=None if net.seed is None else jnp.array(net.seed, copy=True),
            static=_Static(net.layout, int(capacity), net.initializer),
        )

    @property
    def num_tasks(self) -> jax.Array:
        """T, int32 []."""
        return self._usable()._bank.num_tasks

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
    def state_bytes(self) -> int:
        """Bytes of one task's normalisation statistics."""
        like = jax.tree.leaves(self._like_state)
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in like)

    def append(self, task: Task | PyTree, *, donate: bool = False) -> "MaskStore":
        """This store and one more task, behind the others.

        Outside jit a full store grows first, to twice its capacity. Inside jit it cannot: a
        task that finds no room is dropped, and the next call on the host raises StoreError.
        task: a Task, or a bare mask where the network has no state.
        donate: consume this store's masks and statistics (in place, where nothing grows); its
          later use raises StoreError. Inside jit the caller's own donation decides.
        Raises TypeError or ValueError for a mask of another network, or not of 0 and 1 only.
        """
        leaves, state = self._fields(task)
        store = self
        if not self._traced and int(self.num_tasks) == self.capacity:
            larger = 2 * self.capacity
            devices.check_room(
                self.nbytes + arrays.nbytes(self.layout, self._like_state, larger), larger
            )
            store = self._with(arrays.resize(self._bank, self.layout, larger), larger)
        in_place = not self._traced and (donate or store is not self)
        write = arrays.append_in_place if in_place else arrays.append
        old = arrays.held(store._bank, store._bank.num_tasks) if in_place else None
        tasks = write(*store._bank, old, leaves, state, store.layout, store.capacity)
        if donate and store is not self and not isinstance(tasks.words, jax.core.Tracer):
            for leaf in jax.tree.leaves(self._bank[:3]):
                leaf.delete()
        return store._with(tasks)

    def replace(self, i: int, task: Task | PyTree, *, donate: bool = False) -> "MaskStore":
        """This store with task i exchanged. donate as in `append`; raises as that and `mask`.

        Inside jit an id that names no task changes nothing, and the next host call raises.
        """
        i, fields = self._index(i), self._fields(task)
        in_place = donate and not self._traced
        write = arrays.replace_in_place if in_place else arrays.replace
        old = arrays.held(self._bank, i) if in_place else None
        return self._with(write(*self._bank, i, old, *fields, self.layout))

    def remove(self, i: int) -> "MaskStore":
        """This store without task i; later tasks move down by one, as in a list.

        Inside jit an id that names no task changes nothing, and the next host call raises.
        """
        return self._with(arrays.remove(self._bank, self._index(i), self.layout, self.capacity))

    def task(self, i: int) -> Task:
        """Task i, with its statistics, its mask bool. Raises as `mask`."""
        return arrays.read(self._bank, self._index(i), self.layout)

    def mixture(self, alphas: jax.Array | None = None) -> PyTree:
        """sum_i alphas_i M_i as a float32 pytree like params, None where not masked.

        alphas: [K] or [T] coefficients, differentiable; None is 1/T each, read off the counts.
        Raises ValueError for an empty store or alphas of another length.
        """
        self.check_holds_tasks()
        if alphas is None:
            mean = self._bank.counts.astype(jnp.float32) / self.all_tasks.astype(jnp.float32)
            return self.layout.unravel(mean)
        if jnp.ndim(alphas) != 1:
            raise ValueError(f"alphas must be [{self.capacity}], got shape {jnp.shape(alphas)}")
        alphas = self.per_slot(alphas)
        mixed = contraction.superpose(self._bank.words, self._pad_slots(alphas), self.num_tasks)
        return self.layout.unravel(self.devices.total(mixed))

    def mixture_of(self, kept: jax.Array) -> PyTree:
        """As `TaskStore.mixture_of`, by counting: not differentiable."""
        counts = contraction.count(self._bank.words, self._pad_slots(kept), self.num_tasks)
        total = self.devices.total
        return self.layout.unravel(total(counts) / total(kept.sum()).astype(jnp.float32))

    def taken(self, ids: jax.Array, num_tasks: jax.Array) -> "MaskStore":
        """A store of capacity S with the tasks ids [S], the first `num_tasks` of them.

        For use inside jit: where nothing reads the counts of the new store, none are made.
        """
        return self._with(arrays.taken(self._bank, ids, num_tasks, self.layout), len(ids))

    def counts(self) -> jax.Array:
        """How many tasks keep each weight: unsigned [32 nw], in the layout's order."""
        return self._usable()._bank.counts

    def contract(self, v: jax.Array, implementation: str | None = None) -> jax.Array:
        """<v, M_i> for every task: [..., K] of v [..., n] in the layout's order; 0 if no task.

        implementation: as in `contraction.contract`; None chooses.
        """
        s = contraction.contract(
            self._usable()._bank.words, self.layout.pad(v), self.num_tasks, implementation
        )
        return s[..., : self.capacity]

    def certified_scores(self, v: jax.Array) -> jax.Array:
        """[K] of v [n], whose argmax is that of `contract`: see `certify`. -inf if no task."""
        words = self._usable()._bank.words
        v = self.layout.pad(v)
        return certify.best_scores(words, v, self.num_tasks, self.devices)[: self.capacity]

    def check_holds_tasks(self) -> None:
        """Raises StoreError when the store is known to be empty, consumed or overfull."""
        super(MaskStore, self._usable()).check_holds_tasks()

    def check_fits(self, net: Network) -> None:
        """Raises StoreError unless the masks have the network's leaves, shapes and weights.

        Weights are compared by seed, where both were drawn, and by fingerprint where both are at
        hand: a network's is computed when a store is created or loaded for it. Neither inside jit.
        """
        check_same_network(self.layout, self._seed, self._fingerprint, net)

    def save(self, path: str | os.PathLike, overwrite: bool = False) -> None:
        """Writes the store to the file `path`, wholly or not at all; the format is `store_file`'s.

        Raises StoreError for a consumed store or one made inside jit, FileExistsError when
        something is there and overwrite is False, FileNotFoundError for a missing folder, OSError
        for the rest; whatever happens, `path` holds what it held or the whole new store.
        """
        store_file.save(
            path,
            self._usable()._bank,
            store_file.Origin(
                self.layout,
                self._static.initializer,
                self._seed,
                np.asarray(self._fingerprint).tobytes(),
            ),
            capacity=self.capacity,
            overwrite=overwrite,
        )

    @classmethod
    def load(cls, path: str | os.PathLike, net: Network) -> "MaskStore":
        """The store saved at `path`, once it is seen to belong to `net`.

        Raises FileNotFoundError when nothing is there, and StoreError, naming what differs, for a
        file that is damaged, not a store, of a newer version, or of another network.
        """
        check_type("net", net, Network)
        return cls.of_bank(net, *store_file.load(path, net))

    @classmethod
    def of_bank(cls, net: Network, tasks: arrays.Bank, capacity: int) -> "MaskStore":
        """The store of a bank of tasks of `net`, as loaded from files."""
        return cls.create(net, capacity)._with(tasks)

    @property
    def _traced(self):
        return isinstance(self._bank.words, jax.core.Tracer)

    @property
    def _consumed(self):
        words = getattr(self._bank, "words", None)  # transformations put placeholders here
        concrete = isinstance(words, jax.Array) and not isinstance(words, jax.core.Tracer)
        return concrete and words.is_deleted()

    def _with(self, tasks, capacity=None):
        static = self._static._replace(capacity=capacity or self.capacity)
        return MaskStore(tasks, self._fingerprint, self._seed, static)

    def _usable(self):
        """This store, unless it is consumed or overfull; reads nothing inside jit."""
        if self._consumed:
            raise StoreError(
                "this store was consumed by append(..., donate=True): use the returned store"
            )
        if not self._traced and (dropped := int(self._bank.dropped)):
            raise StoreError(
                f"{dropped} write(s) inside jit were dropped: appended beyond the capacity "
                f"{self.capacity}, which cannot grow there, or to a task that does not exist"
            )
        return self

    def _fields(self, task):
        return checked_task(task, self.layout, self._usable()._like_state)

    @property
    def _like_state(self):
        """Shapes and dtypes of one task's statistics."""
        return jax.tree.map(
            lambda rows: jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype), self._bank.states
        )

    def _index(self, i):
        return super(MaskStore, self._usable())._index(i)

    def _pad_slots(self, alphas):
        num_tiles, _, lanes = self._bank.words.shape
        spare = num_tiles * lanes - self.capacity
        return jnp.pad(alphas, [(0, 0)] * (alphas.ndim - 1) + [(0, spare)])

    def tree_flatten_with_keys(self):
        if self._consumed:  # before jit finds out in its own words
            self._usable()
        key = jax.tree_util.GetAttrKey
        leaves = [(key(n), getattr(self, f"_{n}")) for n in ("bank", "fingerprint", "seed")]
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


def checked_task(
    task: Task | PyTree, layout: Layout, like_state: PyTree
) -> tuple[list[jax.Array], PyTree]:
    """The leaves of a task's mask, in order, and its statistics, once they are seen to fit.

    task: a Task, or a bare mask where there are no statistics. like_state: shapes and dtypes.
    Raises TypeError or ValueError, naming the leaf, as `MaskStore.append`.
    """
    if isinstance(task, TrainResult):
        raise TypeError("task must be a Task or a mask, got a TrainResult: append its .task")
    mask, state = task if isinstance(task, Task) else (task, None)
    leaves = layout.leaves(mask, "the mask")
    for name, leaf in zip(layout.shapes, leaves, strict=True):
        check_binary(name, leaf)
    if jax.tree.structure(state) != jax.tree.structure(like_state):
        if like_state is None:
            raise ValueError("the network has no state, but the task brings one")
        raise ValueError(
            f"append Task(mask, state) with the statistics {list(named_leaves(like_state))}: "
            f"the network has state; got {list(named_leaves(state))}"
        )
    for (name, want), got in zip(
        named_leaves(like_state).items(), jax.tree.leaves(state), strict=True
    ):
        if jnp.shape(got) != want.shape or jnp.result_type(got) != want.dtype:
            raise ValueError(
                f"state must be {want.dtype} {want.shape} at {name!r}, "
                f"got {jnp.result_type(got)} {jnp.shape(got)}"
            )
    return leaves, state
