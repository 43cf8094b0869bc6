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

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from supsup_jax import devices
from supsup_jax.checks import check_int, check_type
from supsup_jax.devices import DATA, ROWS, SLOTS, TASK, WHOLE
from supsup_jax.kernels import race
from supsup_jax.layout import WORD_BITS
from supsup_jax.network import Network
from supsup_jax.stores import arrays
from supsup_jax.stores.base import TaskStore
from supsup_jax.stores.mask_store import MaskStore
from supsup_jax.stores.origin import Origin
from supsup_jax.types import PyTree, Task


def shard(store: MaskStore, mesh: Mesh, capacity: int | None = None) -> "ShardedStore":
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
    check_type("store", store, MaskStore)
    devices.check_mesh(mesh, TASK)
    least = max(1, int(store.num_tasks))
    wanted = least if capacity is None else capacity
    check_int("capacity", wanted, least)
    parts = mesh.shape[TASK]
    room = parts * -(-int(wanted) // parts)
    state = arrays.like_state(store.bank)
    devices.check_room(arrays.nbytes(store.layout, state, room // parts), room)
    return _moved(store.with_bank(_tiled_anew(store, room, parts), room), mesh)


def of_tasks(
    net: Network, num_tasks: int, read: Callable, mesh: Mesh, state: PyTree, counts: Sequence[int]
) -> "ShardedStore":
    """A store of tasks that come from files, of which each process reads those of its own devices.

    read: range of ids -> words uint32 [nw] and the leaves of the statistics, one task after another
    state: what the statistics of one are like. counts: the numbers of labels that there are.
    Raises as `shard`.
    """
    devices.check_mesh(mesh, TASK)
    parts = mesh.shape[TASK]
    each = -(-num_tasks // parts)
    devices.check_room(arrays.nbytes(net.layout, state, each), parts * each)
    tiles, num_words, lanes = arrays.tiling(net.layout, each)

    @functools.cache
    def part(s):
        ids = range(s * each, min((s + 1) * each, num_tasks))
        words, states, _ = arrays.tiled(net.layout, state, each, read(ids))
        return words, states

    def placed(shape, size, take):
        """An array along `task`, of parts of `size` rows; take: of what a part holds, which."""

        def rows(index):
            return take(part((index[0].start or 0) // size))

        return jax.make_array_from_callback(shape, devices.on_mesh(mesh, SLOTS), rows)

    like, treedef = jax.tree.flatten(state)
    states = [
        placed((parts * each, *leaf.shape), each, lambda held, j=j: jax.tree.leaves(held[1])[j])
        for j, leaf in enumerate(like)
    ]
    held = (
        placed((parts * tiles, num_words, lanes), tiles, lambda held: held[0]),
        np.zeros(WORD_BITS * num_words, np.min_scalar_type(parts * each)),
        jax.tree.unflatten(treedef, states),
        np.int32(num_tasks),
        np.int32(0),
    )
    bank = arrays.Bank._make(held)
    counts = tuple(sorted(set(counts)))
    return _counted(_moved(MaskStore(bank, Origin.of(net), parts * each, counts), mesh))


@jax.tree_util.register_pytree_with_keys_class
class ShardedStore(MaskStore):
    """The masks of a `MaskStore` over a mesh; made by `shard`.

    A pytree: it goes through jit, vmap and grad, but into no shard_map, being one. Every function
    of inference, and `evaluate`, takes it where it takes a MaskStore, and returns the same to
    rounding: scores [B, K] lie along `task`, and along `data` where rows are split; tasks and
    logits on every device along `task`. What it has in common with MaskStore works as there.
    `append` fills one device after another, and moves tasks from one to the other, by way of the
    host, where it grows. Share out anew, `shard(store, mesh)`, to even that out.
    """

    # Words are tiled device by device: what reads them is of its own here, or asked of a shard.
    mixture_of = TaskStore.mixture_of
    taken: Any = None

    def __init__(
        self,
        bank: arrays.Bank,
        origin: Origin,
        capacity: int,
        mesh: Mesh,
        label_counts: tuple[int, ...] = (),
    ):
        super().__init__(bank, origin, capacity, label_counts)
        self.mesh = mesh

    def with_bank(self, bank: arrays.Bank, capacity: int | None = None) -> "ShardedStore":
        """As `MaskStore.with_bank`, over the same mesh."""
        capacity = capacity or self.capacity
        return ShardedStore(bank, self.origin, capacity, self.mesh, self.label_counts)

    def checked(self, task: Task | PyTree, num_labels: int | None = None) -> Task:
        """As `MaskStore.checked`; outside jit on every device."""
        task, sharding = super().checked(task, num_labels), devices.on_mesh(self.mesh, WHOLE)
        return task if self._traced else jax.device_put(task, sharding)

    def _placed(self, rows):
        return jax.device_put(rows, devices.on_mesh(self.mesh, SLOTS))

    def remove(self, i: int) -> "ShardedStore":
        """As `MaskStore.remove`, by way of one device: outside jit only."""
        return shard(self.gathered().remove(i), self.mesh, self.capacity)

    def task(self, i: int) -> Task:
        """Task i on every device, with its statistics, its mask bool. Raises as `mask`."""
        return _task(self, self._index(i))

    def _mixed(self, alphas):
        return _mixture(self, alphas)  # a sum over all devices, n floats

    def contract(self, v: jax.Array, implementation: str | None = None) -> jax.Array:
        """As `MaskStore.contract`: [..., K] along `task`, of v [..., 32 nw] on every device."""
        self.check_usable()
        return _contract(self, v, implementation)

    def best_scores(self, v: jax.Array, error: float | None = None) -> race.Finish:
        """As `MaskStore.best_scores`: after each round devices tell each other their best, and how
        many tasks are left.
        """
        self.check_usable()
        return _best_scores(self, v, error)

    def gathered(self) -> MaskStore:
        """The same tasks in one store on one device."""
        bank = _tiled_anew(self, self.capacity, 1)
        bank, origin = jax.tree.map(jnp.asarray, (bank, jax.device_get(self.origin)))
        return MaskStore(bank, origin, self.capacity, self.label_counts)

    def save(self, path: Any, overwrite: bool = False) -> None:
        """Writes the gathered store, as `MaskStore.save`; `MaskStore.load` and `shard` read it."""
        self.gathered().save(path, overwrite)

    def spread(self, function: Callable, *args: tuple[PyTree, Any], out: PyTree) -> PyTree:
        """As `TaskStore.spread`: one shard_map over the whole mesh."""
        mesh, context = self.mesh, jax.sharding.get_abstract_mesh()
        if dict(context.shape) == dict(mesh.shape):  # the caller's `jax.set_mesh`
            mesh = context
        names = mesh.axis_names
        rows = [
            len(leaf) for value, spec in args if spec == ROWS for leaf in jax.tree.leaves(value)
        ]
        if any(number % mesh.shape.get(DATA, 1) for number in rows):
            names = (TASK,)
        here = devices.MeshDevices(rows_split=DATA in names)

        there = functools.partial(devices.on_axes, names)

        def local(tasks, *values):
            capacity = self.capacity // mesh.shape[TASK]
            shard = _Shard(tasks, self.layout, capacity, here, self.label_counts)
            return function(shard, *values)

        specs = [there(spec) for _, spec in args]
        bank = arrays.Bank(
            *(_resharded(mesh, *pair) for pair in zip(self.bank, arrays.ON_MESH, strict=True))
        )
        values = [
            _resharded(mesh, value, spec) for (value, _), spec in zip(args, specs, strict=True)
        ]
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(arrays.ON_MESH, *specs),
            out_specs=jax.tree.map(there, out, is_leaf=lambda spec: isinstance(spec, P)),
            # A network may loop from constants of its own, whose type the check would refuse.
            check_vma=False,
        )(bank, *values)

    def _grown(self):
        return shard(self, self.mesh, 2 * self.capacity)

    def tree_flatten_with_keys(self):
        children, (capacity, counts) = super().tree_flatten_with_keys()
        return children, (capacity, self.mesh, counts)

    @classmethod
    def tree_unflatten(cls, static, leaves):
        return cls(*leaves, *static)

    def __repr__(self) -> str:
        return f"ShardedStore({super().__repr__()} over {dict(self.mesh.shape)})"


class _Shard(MaskStore):
    """What one device holds of a ShardedStore, inside its shard_map: a store of K / D slots."""

    all_tasks: Any = None  # set below: more than those here

    def __init__(self, bank, layout, capacity, mesh_devices, label_counts):
        first = mesh_devices.first(capacity)
        here = jnp.clip(bank.num_tasks - first, 0, capacity)
        own = bank._replace(num_tasks=here)
        super().__init__(own, Origin(layout), capacity, label_counts)
        self.devices, self.all_tasks = mesh_devices, bank.num_tasks

    def slot_of(self, ids):
        slots = ids - self.devices.first(self.capacity)
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
        here = arrays.holding(store.bank, store.bank.words, store.num_tasks)
        return store.devices.total(here.counts.astype(jnp.int32))

    counts = store.spread(count, out=WHOLE).astype(store.bank.counts.dtype)
    return store.with_bank(store.bank._replace(counts=counts))


@jax.jit
def _task(store, i):
    def read(store, i):
        slot = store.slot_of(jnp.clip(i, 0, jnp.maximum(store.all_tasks - 1, 0)))
        mine = arrays.held(store.bank, jnp.minimum(slot, store.capacity - 1))

        def from_holder(leaf):
            there = jnp.where(slot < store.capacity, leaf, 0).astype(leaf.dtype)
            return store.devices.total(there).astype(leaf.dtype)

        words, state = jax.tree.map(from_holder, mine)
        return arrays.as_task(arrays.mask_of(words, store.layout), state)

    return store.spread(read, (i, WHOLE), out=WHOLE)


@jax.jit
def _mixture(store, alphas):
    return store.spread(lambda store, alphas: store._mixed(alphas), (alphas, SLOTS), out=WHOLE)


@functools.partial(jax.jit, static_argnames="implementation")
def _contract(store, v, implementation):
    out = P(*[None] * (v.ndim - 1), TASK)
    return store.spread(lambda store, v: store.contract(v, implementation), (v, WHOLE), out=out)


@functools.partial(jax.jit, static_argnames="error")
def _best_scores(store, v, error):
    out = race.Finish._make([SLOTS, WHOLE])
    return store.spread(lambda store, v: store.best_scores(v, error), (v, WHOLE), out=out)


def _tiled_anew(store, new_capacity, new_parts):
    """The store's bank as NumPy arrays tiled for others."""
    tasks, num_tasks = store.bank, int(store.num_tasks)
    parts = store.mesh.shape[TASK] if isinstance(store, ShardedStore) else 1
    words = np.moveaxis(devices.on_host(tasks.words), 1, 0)  # [nw, tiles, lanes]
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
        counts=devices.on_host(tasks.counts).astype(np.min_scalar_type(new_capacity)),
        states=jax.tree.map(
            lambda rows: widen(devices.on_host(rows)[:num_tasks], new_capacity), tasks.states
        ),
    )


def _moved(store, mesh):
    """The sharded store of a MaskStore tiled for the mesh, its arrays there."""
    mesh = devices.auto(mesh)  # of explicit axes, types would refuse slices, and mixing with others

    def put(tree, spec):
        sharding = devices.on_mesh(mesh, spec)

        def there(leaf):
            if isinstance(leaf, jax.Array):
                return jax.device_put(leaf, sharding)
            # Of what all hosts have, each takes its part; device_put would compare it all first.
            return jax.make_array_from_callback(leaf.shape, sharding, leaf.__getitem__)

        return jax.tree.map(there, tree)

    bank = arrays.Bank(*map(put, store.bank, arrays.ON_MESH))
    origin = put(store.origin, WHOLE)
    return ShardedStore(bank, origin, store.capacity, mesh, store.label_counts)


def _resharded(mesh, tree, spec):
    """`tree` of the type that shard_map wants of arrays on a mesh whose axes are explicit."""
    if AxisType.Explicit not in mesh.axis_types:
        return tree
    sharding = devices.on_mesh(mesh, spec)
    return jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, sharding), tree)
