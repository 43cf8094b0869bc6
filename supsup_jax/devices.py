"""What devices of a mesh tell each other: everything that crosses between them is on this page.

Tasks lie along the mesh axis `task`: with K slots on D devices, device s holds the ids from s K / D
up to (s + 1) K / D. The rows of a batch lie along the axis `data`, where the mesh has one. Every
device runs inference on its own tasks and rows, and asks `store.devices` where it needs those of
others; on one device, asking costs nothing.
"""

import contextlib
import dataclasses
import functools
import os
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from supsup_jax.types import CapacityError, PyTree, is_open

TASK, DATA = "task", "data"
# Where the arrays of a program lie.
WHOLE = P()
ROWS = P(DATA)
SLOTS = P(TASK)
ROWS_OF_SLOTS = P(DATA, TASK)
SCATTERED = P((TASK, DATA))  # along the first axis, over all devices


class OneDevice:
    """All slots and all rows are here. k and K, the slots here and the slots there are, agree."""

    def first(self, capacity: int) -> jax.Array | int:
        """The id of the first of the `capacity` slots here."""
        del capacity
        return 0

    def best_here(self, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The highest of scores [..., k], and its task, [...]; of equal ones the lower task."""
        slot = jnp.argmax(scores, axis=-1).astype(jnp.int32)
        score = jnp.take_along_axis(scores, slot[..., None], axis=-1)[..., 0]
        return score, self.first(scores.shape[-1]) + slot

    def best(self, score: jax.Array, task: jax.Array) -> jax.Array:
        """The task of the best of every device's `best_here`."""
        del score
        return task

    def argmax(self, scores: jax.Array) -> jax.Array:
        """The task of the highest of all scores, of each device [..., k]: int32 [...]."""
        return self.best(*self.best_here(scores))

    def few_here(self, scores: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
        """The highest `count` of scores [..., k], or all k, and their tasks."""
        size = scores.shape[-1]
        scores, slots = lax.top_k(scores, min(count, size))
        return scores, self.first(size) + slots.astype(jnp.int32)

    def best_few(self, scores: jax.Array, tasks: jax.Array, count: int) -> jax.Array:
        """The tasks [..., count] of the best of every device's `few_here`."""
        del scores
        return tasks[..., :count]

    def across_slots(self, function: Callable, *values: jax.Array) -> jax.Array:
        """function(values [..., K]) [..., K] of values [..., k] here: the part that is here."""
        return self.own_slots(function(*map(self.all_slots, values)))

    def all_slots(self, values: jax.Array) -> jax.Array:
        """[..., k] -> [..., K]."""
        return values

    def own_slots(self, values: jax.Array) -> jax.Array:
        """[..., K] -> [..., k]."""
        return values

    def total(self, value: jax.Array) -> jax.Array:
        """The sum over the axis `task`."""
        return value

    def largest(self, value: jax.Array) -> jax.Array:
        """The maximum over the axis `task`."""
        return value

    def mean(self, value: jax.Array) -> jax.Array:
        """The mean over the axis `data`: of means over the rows here, that over all rows."""
        return value

    def all_rows(self, x: PyTree) -> PyTree:
        """The rows of all devices, [b, ...] -> [B, ...]."""
        return x


ONE_DEVICE = OneDevice()


@dataclasses.dataclass(frozen=True)
class MeshDevices(OneDevice):
    """Inside shard_map over a mesh with the axis `task`.

    rows_split: whether rows lie along `data`, or are all on every device.
    """

    rows_split: bool

    def first(self, capacity):
        return lax.axis_index(TASK).astype(jnp.int32) * capacity

    def best(self, score, task):
        scores, tasks = lax.all_gather((score, task), TASK)  # [D, ...], in order of id
        return jnp.take_along_axis(tasks, jnp.argmax(scores, axis=0)[None], axis=0)[0]

    def best_few(self, scores, tasks, count):
        scores, tasks = self.all_slots(scores), self.all_slots(tasks)
        return jnp.take_along_axis(tasks, lax.top_k(scores, count)[1], axis=-1)

    def all_slots(self, values):
        return lax.all_gather(values, TASK, axis=values.ndim - 1, tiled=True)

    def own_slots(self, values):
        size = values.shape[-1] // lax.axis_size(TASK)
        return lax.dynamic_slice_in_dim(values, self.first(size), size, axis=-1)

    def total(self, value):
        return lax.psum(value, TASK)

    def largest(self, value):
        return lax.pmax(value, TASK)

    def mean(self, value):
        return lax.pmean(value, DATA) if self.rows_split else value

    def all_rows(self, x):
        return lax.all_gather(x, DATA, tiled=True) if self.rows_split else x


def check_mesh(mesh: Mesh, axis: str) -> None:
    """Raises TypeError or ValueError unless `mesh` has this axis, and none but task and data."""
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, got {type(mesh).__name__}")
    if axis not in mesh.axis_names:
        raise ValueError(f"mesh must have an axis named {axis!r}, got the axes {mesh.axis_names}")
    if foreign := [name for name in mesh.axis_names if name not in (TASK, DATA)]:
        raise ValueError(
            f"the axes of mesh must be {TASK!r} and {DATA!r} at most, got {foreign[0]!r}"
        )


def on_axes(names: tuple[str, ...], spec: P) -> P:
    """The spec without the axes that are not among `names`."""

    def there(entry):
        entry = (entry,) if isinstance(entry, str) else entry or ()
        return tuple(name for name in entry if name in names) or None

    return P(*map(there, spec))


def on_mesh(mesh: Mesh, spec: P) -> NamedSharding:
    """The sharding of arrays that lie by `spec`, of whose axes `mesh` need not have all."""
    return NamedSharding(mesh, on_axes(mesh.axis_names, spec))


def on_host(array: jax.Array | np.ndarray) -> np.ndarray:
    """All of an array in NumPy, whichever hosts hold it: all of them must ask."""
    if isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    ):
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def auto(mesh: Mesh) -> Mesh:
    """The same devices with axes that the compiler sees to (jax.sharding.AxisType.Auto)."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)


def varying_like(value: PyTree, like: PyTree) -> PyTree:
    """`value`, made to depend on `like` (whose first leaf has elements) and otherwise unchanged.

    Inside shard_map the gradient in what all devices share is summed over them. And a loop's carry
    must enter with the type it leaves with, and a constant that meets sharded data on the way does
    not. Adding a zero made of that data gives it the type on every release of JAX, where the
    explicit cast has changed its name.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return value  # not inside shard_map
    here = jnp.ravel(jax.tree.leaves(like)[0])[0] > 0
    return jax.tree.map(lambda leaf: leaf + here.astype(leaf.dtype) * 0, value)


def in_pieces(function: Callable, rows: PyTree, size: int) -> PyTree:
    """function(rows) computed for `size` rows at a time, and the rest at the end.

    Unlike lax.map with a batch_size, function sees whole pieces and is not vmapped. Rows whose
    number an export leaves open are one piece.
    """
    num_rows = jax.tree.leaves(rows)[0].shape[0]
    if is_open(num_rows):
        return function(rows)
    whole = num_rows - num_rows % size if num_rows > size else 0
    parts = []
    if whole:
        pieces = jax.tree.map(lambda row: row[:whole].reshape(-1, size, *row.shape[1:]), rows)
        mapped = lax.map(function, pieces)
        parts.append(jax.tree.map(lambda part: part.reshape(whole, *part.shape[2:]), mapped))
    if whole < num_rows:
        parts.append(function(jax.tree.map(lambda row: row[whole:], rows)))
    return jax.tree.map(lambda *part: jnp.concatenate(part), *parts)


CPU_INFO = Path("/proc/cpuinfo")
GROUPS, GROUPS_MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# What XLA may be held to that has no such instruction (--xla_cpu_max_isa).
_WITHOUT_POPCOUNT = ("SSE4_2", "AVX", "AVX2")


@functools.cache
def has_vector_popcount() -> bool:
    """Whether programs for this CPU count the bits of a whole vector in one instruction.

    As ARM does, and x86 since Ice Lake and Zen 4; where x86 does not say (off Linux) it does not.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    held_to = re.search(r"--xla_cpu_max_isa=(\w+)", os.environ.get("XLA_FLAGS", ""))
    if held_to and held_to[1].upper() in _WITHOUT_POPCOUNT:
        return False
    try:
        return "avx512_vpopcntdq" in CPU_INFO.read_text()
    except OSError:
        return False


def device_bytes() -> int:
    """Of the default device; where that is the CPU, or does not say, of the machine."""
    # A device, the name of a platform, or None.
    chosen: Any = getattr(jax.config, "jax_default_device", None)
    device = chosen if hasattr(chosen, "memory_stats") else jax.local_devices(backend=chosen)[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    try:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows: what there is shows when it is taken
        machine = sys.maxsize
    return min([machine, *_group_limits()])


def _group_limits():
    """Bytes of memory that the control groups of this process may use, as containers set them."""
    try:
        groups = [line.split(":", 2) for line in GROUPS.read_text().splitlines()]
    except OSError:  # no Linux
        return
    for _, controllers, path in groups:
        if controllers and "memory" not in controllers.split(","):
            continue
        # Of version 1, and of version 2.
        top = GROUPS_MOUNT / "memory" if controllers else GROUPS_MOUNT
        limit = "memory.limit_in_bytes" if controllers else "memory.max"
        # A group obeys those above it. Inside a container only some of them can be seen.
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # not there; "max"
                yield int((folder / limit).read_text())
            if folder == top:
                break


def check_room(num_bytes: int, capacity: int) -> None:
    """Raises CapacityError when a store of `capacity` takes more bytes than there are."""
    if num_bytes > (room := device_bytes()):
        raise CapacityError(
            f"a store of capacity {capacity:,} takes {num_bytes:,} bytes, and there are {room:,}: "
            "split the tasks over several stores and let one_shot_streamed read them in turn"
        )
