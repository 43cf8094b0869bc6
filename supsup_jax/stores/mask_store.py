"""The mask store: every task's mask at one bit a weight, as a pytree of arrays."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from supsup_jax import devices
from supsup_jax.checks import check_int, check_type, is_traced
from supsup_jax.devices import SLOTS, WHOLE
from supsup_jax.kernels import contraction, race
from supsup_jax.network import Network
from supsup_jax.stores import arrays
from supsup_jax.stores.base import TaskStore, checked_task
from supsup_jax.stores.origin import (
    Origin,
    Owned,
    arrays_in,
    load_record,
    manifest_of,
    save_arrays,
    sensible,
)
from supsup_jax.types import Facts, PyTree, StoreError, Task

FORMAT = "supsup_jax.MaskStore"


@jax.tree_util.register_pytree_with_keys_class
class MaskStore(Owned, TaskStore):
    """The masks, and normalisation statistics, of the tasks learned in one network.

    A pytree: it goes through jit, vmap and shard_map, and every method returns a new store.
    Make one with `MaskStore.create(net)` or `MaskStore.load(path, net)`.

    Leaves: the `arrays.Bank` of masks and statistics, and the seed and fingerprint of its `origin`,
    which says whose they are.
    """

    def __init__(
        self,
        bank: arrays.Bank,
        origin: Origin,
        capacity: int,
        label_counts: tuple[int, ...] = (),
    ):
        self._bank, self.origin, self._capacity = bank, origin, capacity
        self.label_counts = label_counts

    @classmethod
    def create(cls, net: Network, capacity: int = 64) -> "MaskStore":
        """An empty store for tasks of `net`, with room for `capacity` before it grows.

        Raises TypeError unless net is a Network, ValueError unless capacity is at least 1.
        """
        check_type("net", net, Network)
        check_int("capacity", capacity, 1)
        capacity = int(capacity)
        if not is_traced(net.params):
            devices.check_room(arrays.nbytes(net.layout, net.state, capacity), capacity)
        return MaskStore(arrays.empty(net.layout, net.state, capacity), Origin.of(net), capacity)

    @classmethod
    def of_tasks(
        cls,
        net: Network,
        capacity: int,
        tasks: Iterable[tuple[np.ndarray, Sequence[np.ndarray]]],
        state: PyTree = None,
    ) -> "MaskStore":
        """A store of tasks of `net` that come from files, as `arrays.tiled` takes them.

        state: what the statistics of one are like (`like_state`).
        """
        devices.check_room(arrays.nbytes(net.layout, state, capacity), capacity)
        words, states, held = arrays.tiled(net.layout, state, capacity, tasks)
        bank = arrays.empty(net.layout, None, capacity)._replace(states=states)
        bank = arrays.holding(bank, words, held)
        return MaskStore(bank, Origin.of(net), capacity)._recounted()

    def with_bank(self, bank: arrays.Bank, capacity: int | None = None) -> "MaskStore":
        """A store of the same network with other arrays, and of another capacity unless None."""
        return MaskStore(bank, self.origin, capacity or self.capacity, self.label_counts)

    @property
    def num_labels(self) -> jax.Array | None:
        """Of each task how many outputs are its labels, int32 [K]; None where tasks do not tell."""
        states = self.bank.states
        return states.num_labels if isinstance(states, Facts) else None

    @property
    def moments(self) -> dict[str, jax.Array]:
        """As `TaskStore.moments`."""
        states = self.bank.states
        return (states.moments or {}) if isinstance(states, Facts) else {}

    def with_moments(self, moments: Mapping[str, jax.Array]) -> "MaskStore":
        """This store with these moments of its tasks' scores beside, or in place of, others:
        float32 [T, 2] by objectives' names. Outside jit.
        """
        states, held = self.bank.states, int(self.num_tasks)
        facts = states if isinstance(states, Facts) else Facts(states)
        new = dict(facts.moments or {})
        for name, value in moments.items():
            if jnp.shape(value) != (held, 2):
                raise ValueError(f"moments must be [{held}, 2], got {jnp.shape(value)} of {name}")
            rows = np.zeros((self.capacity, 2), np.float32)
            rows[:held] = value
            new[name] = self._placed(rows)
        return self.with_bank(self.bank._replace(states=facts._replace(moments=new)))

    def _placed(self, rows):
        """Rows [K, ...] where statistics lie."""
        return jnp.asarray(rows)

    @property
    def bank(self) -> arrays.Bank:
        """The arrays of the store. Raises as `check_usable`."""
        self.check_usable()
        return self._bank

    def check_usable(self) -> None:
        """Raises StoreError where the store was consumed or, outside jit, where it is overfull."""
        if self._consumed:
            raise StoreError(
                "this store was consumed by append(..., donate=True): use the returned store"
            )
        if not self._traced and (dropped := int(self._bank.dropped)):
            raise StoreError(
                f"{dropped} write(s) inside jit were dropped: appended beyond the capacity "
                f"{self.capacity}, which cannot grow there, or to a task that does not exist"
            )

    @property
    def num_tasks(self) -> jax.Array:
        """T, int32 []."""
        return self.bank.num_tasks

    @property
    def capacity(self) -> int:
        """K: slots, filled or not."""
        return self._capacity

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves: masks, counts, statistics, for the whole capacity."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves((self.bank, self.origin)))

    @property
    def state_bytes(self) -> int:
        """Bytes of one task's normalisation statistics."""
        like = jax.tree.leaves(arrays.like_state(self._bank))
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in like)

    def append(
        self, task: Task | PyTree, *, donate: bool = False, num_labels: int | None = None
    ) -> "MaskStore":
        """This store and one more task, behind the others.

        Outside jit a full store grows first, to twice its capacity. Inside jit it cannot: a
        task that finds no room is dropped, and the next call on the host raises StoreError.
        task: a Task, or a bare mask where the network has no state.
        num_labels: how many of the outputs, the first, are the task's labels, where tasks differ in
          that: objectives of labels then count a task's own. Told of all tasks or of none, of the
          first outside jit.
        donate: consume this store's masks and statistics (in place, where nothing grows); its
          later use raises StoreError. Inside jit the caller's own donation decides.
        Raises TypeError or ValueError for a mask of another network, or not of 0 and 1 only.
        """
        store = self._labelled(num_labels)
        task = store.checked(task, num_labels)
        if not self._traced and int(self._bank.num_tasks) == self.capacity:
            store = store._grown()
        moved = store._bank is not self._bank
        in_place = not self._traced and (donate or moved)
        written = store._written(store._bank.num_tasks, task, in_place, append=True)
        if donate and moved and not written._traced:
            self.consume()
        return written

    def replace(
        self,
        i: jax.Array | int,
        task: Task | PyTree,
        *,
        donate: bool = False,
        num_labels: int | None = None,
    ) -> "MaskStore":
        """This store with task i exchanged. Options as of `append`; raises as that and `mask`.

        Inside jit an id that names no task changes nothing, and the next host call raises.
        """
        slot, store = self._index(i), self._labelled(num_labels)
        task = store.checked(task, num_labels)
        return store._written(slot, task, donate and not self._traced, append=False)._recounted()

    def _recounted(self):
        """This store, that knows the numbers of labels that are left."""
        if self._traced or self.num_labels is None:
            return self
        held = devices.on_host(self.num_labels)[: int(self.num_tasks)]
        store = self.with_bank(self._bank)
        store.label_counts = tuple(np.unique(held).tolist())
        return store

    def _labelled(self, num_labels):
        """This store, with that number of labels among those that there are."""
        if num_labels is None:
            return self
        store = self
        if self.num_labels is None and not self._traced and int(self._bank.num_tasks) == 0:
            state = arrays.like_state(self._bank)
            state = state if isinstance(state, Facts) else Facts(state)
            state = state._replace(num_labels=jax.ShapeDtypeStruct((), jnp.int32))
            bank = arrays.empty(self.layout, state, self.capacity)
            store = self.with_bank(bank)
        if store.num_labels is None:
            if self._traced:
                raise ValueError("the first task that tells its num_labels is appended outside jit")
            return store
        check_int("num_labels", num_labels, 1)
        counts = tuple(sorted({*self.label_counts, int(num_labels)}))
        if counts == store.label_counts:
            return store
        store = store.with_bank(store._bank)
        store.label_counts = counts
        return store

    def remove(self, i: jax.Array | int) -> "MaskStore":
        """This store without task i; later tasks move down by one, as in a list.

        Inside jit an id that names no task changes nothing, and the next host call raises.
        """
        bank = arrays.remove(self.bank, self._index(i), self.layout, self.capacity)
        return self.with_bank(bank)._recounted()

    def checked(self, task: Task | PyTree, num_labels: int | None = None) -> Task:
        """A task as `arrays.write` takes it, mask and statistics. Raises as `append`."""
        return Task(*checked_task(task, self.layout, arrays.like_state(self.bank), num_labels))

    def consume(self) -> None:
        """Frees the large arrays, wherever they are held: a later use raises StoreError."""
        for leaf in jax.tree.leaves(self._bank[:3]):
            leaf.delete()

    def task(self, i: int) -> Task:
        """Task i, with its statistics, its mask bool. Raises as `mask`."""
        return arrays.read(self.bank, self._index(i), self.layout)

    def mixture(self, alphas: jax.Array | np.ndarray | None = None) -> PyTree:
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
        return self._mixed(self.per_slot(alphas))

    def _mixed(self, alphas):
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
        bank = arrays.taken(self._bank, ids, num_tasks, self.layout)
        return self.with_bank(bank, len(ids))

    def counts(self) -> jax.Array:
        """How many tasks keep each weight: unsigned [32 nw], in the layout's order."""
        return self.bank.counts

    def contract(self, v: jax.Array, implementation: str | None = None) -> jax.Array:
        """<v, M_i> for every task: [..., K] of v [..., 32 nw] as `Layout.ravel`; 0 if no task.

        implementation: as in `contraction.contract`; None chooses.
        """
        bank = self.bank
        s = contraction.contract(bank.words, v, bank.num_tasks, implementation)
        return s[..., : self.capacity]

    def best_scores(self, v: jax.Array, error: float | None = None) -> race.Finish:
        """Scores [K] of v [32 nw] whose argmax is that of `contract`, -inf if no task, and the
        share of the masks' words that was read. error: as of `race.best_scores`.
        """
        bank = self.bank
        finish = race.best_scores(bank.words, v, bank.num_tasks, error, self.devices)
        return finish._replace(scores=finish.scores[: self.capacity])

    def save(self, path: str | os.PathLike, overwrite: bool = False) -> None:
        """Writes the store to the file `path`, wholly or not at all; `docs/format.md` is its page.

        Raises StoreError for a consumed store or one made inside jit, FileExistsError when
        something is there and overwrite is False, FileNotFoundError for a missing folder, OSError
        for the rest; whatever happens, `path` holds what it held or the whole new store.
        """
        bank, held = self.bank, int(self.num_tasks)
        rows = arrays.untile_words(bank.words, self.capacity)
        save_arrays(
            path,
            manifest_of(FORMAT, self.origin, arrays.like_state(bank)),
            {"num_tasks": held, "capacity": self.capacity},
            [leaf[:held] for leaf in (rows, *jax.tree.leaves(bank.states))],
            overwrite,
        )

    @classmethod
    def load(cls, path: str | os.PathLike, net: Network) -> "MaskStore":
        """The store saved at `path`, once it is seen to belong to `net`.

        Raises FileNotFoundError when nothing is there, and StoreError, naming what differs, for a
        file that is damaged, not a store, of another version, or of another network.
        """
        record, like_state = load_record(path, FORMAT, net)
        with sensible(path):
            held, capacity = (record.metadata[name] for name in ("num_tasks", "capacity"))
            if not (type(held) is type(capacity) is int and 0 <= held <= capacity > 0):
                raise ValueError(f"{held!r} tasks in a capacity of {capacity!r}")
        like = [(leaf.dtype, (held, *leaf.shape)) for leaf in jax.tree.leaves(like_state)]
        kinds = [("<u4", (held, net.layout.num_words)), *like]
        words, *states = arrays_in(record.body, kinds, path)
        tasks = ((row, [leaf[i] for leaf in states]) for i, row in enumerate(words))
        return cls.of_tasks(net, capacity, tasks, like_state)

    @property
    def _traced(self):
        return isinstance(self._bank.words, Tracer)

    @property
    def _consumed(self):
        words = getattr(self._bank, "words", None)  # transformations put placeholders here
        if not isinstance(words, jax.Array) or isinstance(words, Tracer):
            return False
        return words.is_deleted()

    def _written(self, i, task, in_place, append):
        write, bank = _write_in_place if in_place else _write, self._bank
        hollow = self.with_bank(arrays.Bank._make([None, None, None, *bank[3:]]))
        held = _held(self, i) if in_place else None
        return self.with_bank(write(bank[:3], hollow, i, held, task, append=append))

    def _grown(self):
        """A copy with twice the room."""
        larger = 2 * self.capacity
        more = arrays.nbytes(self.layout, arrays.like_state(self._bank), larger)
        devices.check_room(self.nbytes + more, larger)
        return self.with_bank(arrays.resize(self._bank, self.layout, larger), larger)

    def _pad_slots(self, alphas):
        num_tiles, _, lanes = self._bank.words.shape
        spare = num_tiles * lanes - self.capacity
        return jnp.pad(alphas, [(0, 0)] * (alphas.ndim - 1) + [(0, spare)])

    def tree_flatten_with_keys(self):
        """For JAX: the arrays by name, and what is static. Raises ValueError once consumed."""
        if self._consumed:  # before jit finds out in its own words
            self.check_usable()
        key = jax.tree_util.GetAttrKey
        static = self._capacity, self.label_counts
        return [(key("bank"), self._bank), (key("origin"), self.origin)], static

    @classmethod
    def tree_unflatten(cls, static, leaves):
        """For JAX: the inverse of `tree_flatten_with_keys`."""
        return cls(*leaves, *static)

    def __repr__(self) -> str:
        # Shapes only: whatever state a store is in, an error message may have to show it.
        state = "consumed, " if self._consumed else ""
        return (
            f"MaskStore({state}capacity={self.capacity}, "
            f"weights={self.layout.num_weights:,} in {len(self.layout.shapes)} leaves)"
        )


@jax.jit
def _held(store, i):
    """What the slot of task i holds, or on other devices some slot, each leaf [1, ...].

    To be read before the bank is changed in place: in one program XLA reads and writes in no order
    that it can see, and so writes to a copy of all words, 60 ms where the change alone takes 1,
    among 2,400 tasks.
    """

    def read(store, i):
        slot = jnp.minimum(store.slot_of(i), store.capacity - 1)
        return jax.tree.map(lambda leaf: leaf[None], arrays.held(store.bank, slot))

    return store.spread(read, (i, WHOLE), out=SLOTS)


def _write_task(large, hollow, i, held, task, *, append):
    """The store's bank with task i exchanged, or appended there; one without a place is dropped.

    large: the first three fields of the bank, which can be donated; the store is hollow without.
    held: of `_held`; None to be read in this program. task: as in `arrays.write`.
    """
    store = hollow.with_bank(arrays.Bank(*large, *hollow._bank[3:]))
    valid = (i >= 0) & (i < (store.capacity if append else store.num_tasks))

    def write(store, i, held, valid, task):
        place, bank, total = store.slot_of(i), store.bank, store.devices.total
        slot = jnp.clip(place, 0, store.capacity - 1)
        held = jax.tree.map(lambda leaf: leaf[0], held) if held else arrays.held(bank, slot)
        here = valid & (place < store.capacity)
        written = arrays.write(bank, slot, here, held, task, store.layout, total)
        return written._replace(
            num_tasks=store.all_tasks + (valid.astype(jnp.int32) if append else 0),
            dropped=bank.dropped + (~valid).astype(jnp.int32),
        )

    args = ((i, WHOLE), (held, SLOTS), (valid, WHOLE), (task, WHOLE))
    return store.spread(write, *args, out=arrays.ON_MESH)


_write = jax.jit(_write_task, static_argnames="append")
_write_in_place = jax.jit(_write_task, static_argnames="append", donate_argnames="large")
