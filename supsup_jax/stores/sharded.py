"""Tasks over many devices: a store whose masks lie along the axis `task` of a mesh.

    mesh = jax.make_mesh((8,), ("task",))
    store = ss.shard(store, mesh)
    belief = ss.one_shot(net, store, x)

With K slots on D devices along `task`, device s holds the tasks s K / D to (s + 1) K / D - 1, in
tiles of its own, and the counts of all masks, so that the uniform mixture is at hand everywhere.
Products with masks need no other device; what does cross is written down in `devices`. A mesh that
has an axis `data` too splits the rows of a batch over it where its size divides them; otherwise
each device has all rows.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from supsup_jax import devices
from supsup_jax.checks import check_int
from supsup_jax.devices import (
    DATA,
    ROWS,
    SLOTS,
    TASK,
    WHOLE,
    MeshDevices,
    auto,
    check_mesh,
    on_axes,
    on_host,
    on_mesh,
)
from supsup_jax.kernels import contraction
from supsup_jax.layout import WORD_BITS, Layout, unpack
from supsup_jax.network import Network
from supsup_jax.stores import arrays
from supsup_jax.stores.base import TaskStore
from supsup_jax.stores.mask_store import MaskStore
from supsup_jax.stores.origin import Origin
from supsup_jax.types import PyTree, Task

# Where a bank's arrays lie: words by tiles, statistics by slots, the rest on every device.
BANK = arrays.Bank(words=SLOTS, counts=WHOLE, states=SLOTS, num_tasks=WHOLE, dropped=WHOLE)


def shard(
    store: "MaskStore | ShardedStore", mesh: Mesh, capacity: int | None = None
) -> "ShardedStore":
    """The store's tasks spread over the devices along the axis `task` of `mesh`.

    mesh: its axes are `task` and, where rows of a batch shall be split, `data`; of any axis type.
    capacity: for how many tasks there is room before the store grows, rounded up to a multiple of
      the devices along `task`. None: for those it holds, so that all devices have as much to do.
    The arrays go through the memory of the host, each device getting its part of them; of several
    hosts each has all of a MaskStore, the same, and a call of its own. `DiskStore.load(mesh=mesh)`
    reads on each host what its devices hold.
    Raises TypeError for what is no MaskStore or Mesh, and ValueError for a mesh of other axes, less
    room than tasks, or more (CapacityError) than a device has.
    """
    if not isinstance(store, MaskStore | ShardedStore):
        raise TypeError(f"store must be a MaskStore, got {type(store).__name__}")
    check_mesh(mesh, TASK)
    least = max(1, int(store.num_tasks))
    capacity = least if capacity is None else capacity
    check_int("capacity", capacity, least)
    parts = mesh.shape[TASK]
    capacity = parts * -(-int(capacity) // parts)
    held, held_parts = store, 1
    if isinstance(store, ShardedStore):
        held, held_parts = store._store, store._parts
    state = arrays.like_state(held.bank)
    devices.check_room(arrays.nbytes(held.layout, state, capacity // parts), capacity)
    return _moved(held.with_bank(_tiled_anew(held, held_parts, capacity, parts), capacity), mesh)


def of_tasks(net: Network, num_tasks: int, read: Callable, mesh: Mesh) -> "ShardedStore":
    """A store of tasks that come from files, of which each process reads those of its own devices.

    read: range of ids -> words uint32 [nw] and the leaves of the statistics, one task after another
    Raises as `shard`.
    """
    check_mesh(mesh, TASK)
    parts = mesh.shape[TASK]
    each = -(-num_tasks // parts)
    devices.check_room(arrays.nbytes(net.layout, net.state, each), parts * each)
    tiles, num_words, lanes = arrays.tiling(net.layout, each)

    @functools.cache
    def part(s):
        ids = range(s * each, min((s + 1) * each, num_tasks))
        words, states, _ = arrays.tiled(net.layout, net.state, each, read(ids))
        return words, states

    def placed(shape, size, take):
        """An array along `task`, of parts of `size` rows; take: of what a part holds, which."""

        def rows(index):
            return take(part((index[0].start or 0) // size))

        return jax.make_array_from_callback(shape, on_mesh(mesh, SLOTS), rows)

    like, treedef = jax.tree.flatten(net.state)
    states = [
        placed((parts * each, *leaf.shape), each, lambda held, j=j: jax.tree.leaves(held[1])[j])
        for j, leaf in enumerate(like)
    ]
    bank = arrays.Bank(
        placed((parts * tiles, num_words, lanes), tiles, lambda held: held[0]),
        np.zeros(WORD_BITS * num_words, np.min_scalar_type(parts * each)),
        jax.tree.unflatten(treedef, states),
        np.int32(num_tasks),
        np.int32(0),
    )
    return _counted(_moved(MaskStore(bank, Origin.of(net), parts * each), mesh))


@functools.partial(jax.tree_util.register_dataclass, data_fields=("_store",), meta_fields=("mesh",))
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ShardedStore(TaskStore):
    """The masks of a `MaskStore` over a mesh; made by `shard`.

    A pytree: it goes through jit, vmap and grad, but into no shard_map, being one. Every function
    of inference, and `evaluate`, takes it where it takes a MaskStore, and returns the same to
    rounding: scores [B, K] lie along `task`, and along `data` where rows are split; tasks and
    logits on every device along `task`.
    `append` fills one device after another. Share out anew, `shard(store, mesh)`, to even that out.
    """

    # A MaskStore whose arrays lie on the mesh, and whose words are tiled device by device: only
    # what does not read them is asked of it.
    _store: MaskStore
    mesh: Mesh

    @property
    def num_tasks(self) -> jax.Array:
        """T, int32 []."""
        return self._store.num_tasks

    @property
    def capacity(self) -> int:
        """K: slots of all devices, filled or not."""
        return self._store.capacity

    @property
    def layout(self) -> Layout:
        """Which leaves are masked, and their order."""
        return self._store.layout

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves, those that every device has a copy of counted once."""
        return self._store.nbytes

    def append(self, task: Task | PyTree, *, donate: bool = False) -> "ShardedStore":
        """As `MaskStore.append`: outside jit a full store grows to twice its capacity.

        Growing moves tasks from device to device, by way of the host.
        """
        task, store = self._store.checked(task), self
        if not self._traced and int(self.num_tasks) == self.capacity:
            store = shard(self, self.mesh, 2 * self.capacity)
        in_place = not self._traced and (donate or store is not self)
        written = store._written(store.num_tasks, task, in_place, append=True)
        if donate and store is not self:
            self._store.consume()
        return written

    def replace(self, i: int, task: Task | PyTree, *, donate: bool = False) -> "ShardedStore":
        """As `MaskStore.replace`."""
        i, task = self._index(i), self._store.checked(task)
        return self._written(i, task, donate and not self._traced, append=False)

    def remove(self, i: int) -> "ShardedStore":
        """As `MaskStore.remove`, by way of one device: outside jit only."""
        return shard(self.gathered().remove(i), self.mesh, self.capacity)

    def task(self, i: int) -> Task:
        """Task i on every device, with its statistics, its mask bool. Raises as `mask`."""
        return _task(self, self._index(i))

    def mixture(self, alphas: jax.Array | None = None) -> PyTree:
        """As `MaskStore.mixture`. Any but the uniform one is a sum over all devices, n floats."""
        if alphas is None:
            return self._store.mixture()
        self.check_holds_tasks()
        if jnp.ndim(alphas) != 1:
            raise ValueError(f"alphas must be [{self.capacity}], got shape {jnp.shape(alphas)}")
        return _mixture(self, self.per_slot(alphas))

    def counts(self) -> jax.Array:
        """How many tasks keep each weight: unsigned [32 nw], in the layout's order."""
        return self._store.counts()

    def contract(self, v: jax.Array, implementation: str | None = None) -> jax.Array:
        """As `MaskStore.contract`: [..., K] along `task`, of v [..., n] on every device."""
        self._store.check_usable()
        return _contract(self, v, implementation)

    def certified_scores(self, v: jax.Array) -> jax.Array:
        """As `MaskStore.certified_scores`: devices tell each other their best, and how many doubts
        they have.
        """
        self._store.check_usable()
        return _certified_scores(self, v)

    def gathered(self) -> MaskStore:
        """The same tasks in one store on one device."""
        bank = _tiled_anew(self._store, self._parts, self.capacity, 1)
        bank, origin = jax.tree.map(jnp.asarray, (bank, jax.device_get(self._store.origin)))
        return MaskStore(bank, origin, self.capacity)

    def save(self, path: Any, overwrite: bool = False) -> None:
        """Writes the gathered store, as `MaskStore.save`; `MaskStore.load` and `shard` read it."""
        self.gathered().save(path, overwrite)

    def check_fits(self, net: Network) -> None:
        """Raises StoreError as `MaskStore.check_fits`."""
        self._store.check_fits(net)

    def spread(self, function: Callable, *args: tuple[PyTree, Any], out: PyTree) -> PyTree:
        """As `TaskStore.spread`: one shard_map over the whole mesh."""
        mesh, names, parts = self.mesh, self.mesh.axis_names, self._parts
        rows = [
            len(leaf) for value, spec in args if spec == ROWS for leaf in jax.tree.leaves(value)
        ]
        if any(number % mesh.shape.get(DATA, 1) for number in rows):
            names = (TASK,)
        devices = MeshDevices(rows_split=DATA in names)

        there = functools.partial(on_axes, names)

        def local(tasks, *values):
            return function(_Shard(tasks, self.layout, self.capacity // parts, devices), *values)

        specs = [there(spec) for _, spec in args]
        values = [
            _resharded(mesh, value, spec) for (value, _), spec in zip(args, specs, strict=True)
        ]
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(BANK, *specs),
            out_specs=jax.tree.map(there, out, is_leaf=lambda spec: isinstance(spec, P)),
            # A network may loop from constants of its own, whose type the check would refuse.
            check_vma=False,
        )(self._store.bank, *values)

    def untyped(self) -> "ShardedStore":
        """The same arrays over a mesh of no explicit axes."""
        return _moved(self._store, auto(self.mesh))

    @property
    def _parts(self):
        return self.mesh.shape[TASK]

    def _written(self, i, task, in_place, append):
        mesh, bank = self.mesh, self._store.bank
        if not self._traced:
            task = jax.device_put(task, on_mesh(mesh, WHOLE))
        write = _write_in_place if in_place else _write
        slot = arrays.Slot(i, _held(self, i) if in_place else None)
        static = {"mesh": mesh, "layout": self.layout, "capacity": self.capacity, "append": append}
        bank = write(bank[:3], bank[3:], slot, task, **static)
        return ShardedStore(self._store.with_bank(bank), mesh)

    def __repr__(self) -> str:
        return f"ShardedStore({self._store!r} over {dict(self.mesh.shape)})"


class _Shard(MaskStore):
    """What one device holds of a ShardedStore, inside its shard_map: a store of K / D slots."""

    def __init__(self, bank, layout, capacity, devices):
        first = devices.first(capacity)
        here = jnp.clip(bank.num_tasks - first, 0, capacity)
        super().__init__(bank._replace(num_tasks=here), Origin(layout), capacity)
        self.devices, self._first, self._all_tasks = devices, first, bank.num_tasks

    @property
    def all_tasks(self):
        return self._all_tasks

    def slot_of(self, ids):
        slots = ids - self._first
        return jnp.where((slots >= 0) & (slots < self.capacity), slots, self.capacity)

    def under(self, slot, function):
        def here(slot):
            return function(self.task(slot))

        like = jax.eval_shape(here, slot)

        def elsewhere(_):
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)

        return lax.cond(slot < self.capacity, here, elsewhere, slot)


@jax.jit
def _counted(store):
    """The store with the counts of the masks that it holds."""

    def count(store):
        words, everything = store.bank.words, jnp.ones(store.bank.words.shape[::2], bool)
        return store.devices.total(
            contraction.count(words, everything.reshape(-1), store.num_tasks)
        )

    held = store._store
    counts = store.spread(count, out=WHOLE).astype(held.bank.counts.dtype)
    return ShardedStore(held.with_bank(held.bank._replace(counts=counts)), store.mesh)


@jax.jit
def _task(store, i):
    def read(store, i):
        slot = store.slot_of(jnp.clip(i, 0, jnp.maximum(store.all_tasks - 1, 0)))
        mine = arrays.held(store.bank, jnp.minimum(slot, store.capacity - 1))

        def from_holder(leaf):
            there = jnp.where(slot < store.capacity, leaf, 0).astype(leaf.dtype)
            return store.devices.total(there).astype(leaf.dtype)

        words, state = jax.tree.map(from_holder, mine)
        return Task(store.layout.unravel(unpack(words).reshape(-1) != 0), state)

    return store.spread(read, (i, WHOLE), out=WHOLE)


@jax.jit
def _mixture(store, alphas):
    return store.spread(lambda store, alphas: store.mixture(alphas), (alphas, SLOTS), out=WHOLE)


@functools.partial(jax.jit, static_argnames="implementation")
def _contract(store, v, implementation):
    out = P(*[None] * (v.ndim - 1), TASK)
    return store.spread(lambda store, v: store.contract(v, implementation), (v, WHOLE), out=out)


@jax.jit
def _certified_scores(store, v):
    return store.spread(lambda store, v: store.certified_scores(v), (v, WHOLE), out=SLOTS)


@jax.jit
def _held(store, i):
    """What the slot of task i holds, or on other devices some slot, each leaf [D, ...]."""

    def read(store, i):
        slot = jnp.minimum(store.slot_of(i), store.capacity - 1)
        return jax.tree.map(lambda leaf: leaf[None], arrays.held(store.bank, slot))

    return store.spread(read, (i, WHOLE), out=SLOTS)


def _write_task(large, small, slot, task, *, mesh, layout, capacity, append):
    """The slot's task exchanged; one without a place is dropped.

    large, small: as in `arrays.append`. slot.held: as in `_held`. task: as in `arrays.write_if`.
    """
    bank = arrays.Bank(*large, *small)
    store = ShardedStore(MaskStore(bank, Origin(layout), capacity), mesh)
    valid = (slot.i >= 0) & (slot.i < (capacity if append else bank.num_tasks))

    def write(store, i, held, valid, task):
        place, was = store.slot_of(i), store.bank
        here = valid & (place < store.capacity)
        if held is not None:
            held = jax.tree.map(lambda leaf: leaf[0], held)
        slot = arrays.Slot(jnp.minimum(place, store.capacity - 1), held)
        new = arrays.write_if(here, was, slot, task, store.layout)
        # Of all devices one has another count, which all must learn of.
        change = new.counts.astype(jnp.int32) - was.counts.astype(jnp.int32)
        counts = was.counts.astype(jnp.int32) + store.devices.total(change)
        return new._replace(
            counts=counts.astype(was.counts.dtype),
            num_tasks=store.all_tasks + (valid if append else 0),
            dropped=was.dropped + ~valid,
        )

    args = ((slot.i, WHOLE), (slot.held, SLOTS), (valid, WHOLE), (task, WHOLE))
    return store.spread(write, *args, out=BANK)


_STATIC = ("mesh", "layout", "capacity", "append")
_write = jax.jit(_write_task, static_argnames=_STATIC)
_write_in_place = jax.jit(_write_task, static_argnames=_STATIC, donate_argnames="large")


def _tiled_anew(store, parts, new_capacity, new_parts):
    """The bank of a MaskStore tiled in `parts`, as NumPy arrays tiled for others."""
    tasks, num_tasks = store.bank, int(store.num_tasks)
    words = np.moveaxis(on_host(tasks.words), 1, 0)  # [nw, tiles, lanes]
    words = words.reshape(len(words), parts, -1)[:, :, : store.capacity // parts]
    words = words.reshape(len(words), -1)[:, :num_tasks]
    tiles, num_words, lanes = arrays.tiling(store.layout, new_capacity // new_parts)

    def widen(rows, size, axis=0):
        spare = [(0, 0)] * rows.ndim
        spare[axis] = (0, size - rows.shape[axis])
        return np.pad(rows, spare)

    words = widen(words, new_capacity, axis=1).reshape(num_words, new_parts, -1)
    words = widen(words, tiles * lanes, axis=2).reshape(num_words, new_parts * tiles, lanes)
    return tasks._replace(
        words=np.moveaxis(words, 0, 1),
        counts=on_host(tasks.counts).astype(np.min_scalar_type(new_capacity)),
        states=jax.tree.map(
            lambda rows: widen(on_host(rows)[:num_tasks], new_capacity), tasks.states
        ),
    )


def _moved(store, mesh):
    """The sharded store of a MaskStore tiled for the mesh, its arrays there."""

    def put(tree, spec):
        sharding = on_mesh(mesh, spec)

        def there(leaf):
            if isinstance(leaf, jax.Array):
                return jax.device_put(leaf, sharding)
            # Of what all hosts have, each takes its part; device_put would compare it all first.
            return jax.make_array_from_callback(leaf.shape, sharding, leaf.__getitem__)

        return jax.tree.map(there, tree)

    bank = arrays.Bank(*map(put, store.bank, BANK))
    return ShardedStore(MaskStore(bank, put(store.origin, WHOLE), store.capacity), mesh)


def _resharded(mesh, tree, spec):
    """`tree` of the type that shard_map wants of arrays on a mesh whose axes are explicit."""
    if AxisType.Explicit not in mesh.axis_types:
        return tree
    sharding = on_mesh(mesh, spec)
    return jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, sharding), tree)
