"""What inference asks of a store, and what a store asks of a task."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from supsup_jax.checks import is_traced
from supsup_jax.devices import ONE_DEVICE, OneDevice
from supsup_jax.layout import Layout, named_leaves
from supsup_jax.masks import check_binary
from supsup_jax.network import Network
from supsup_jax.stores.origin import check_layout
from supsup_jax.types import Facts, PyTree, StoreError, Task, TaskIdError, TrainResult


class TaskStore:
    """What inference asks of the tasks it chooses among: a MaskStore, or a baseline's like it.

    A subclass, a pytree, has `layout`, `capacity` (K, static), `num_tasks` (int32 []), `task(i)`,
    `mixture(alphas)`, `contract(v, implementation)`, `best_scores(v, error)` and `taken(ids,
    num_tasks)` as MaskStore has; its masks may hold any real numbers.

    The rest is here as it is for a store on one device. Over a mesh (see `sharded`) every device
    has a store of its own slots, whose `devices` reaches the others' and whose masks and rows are
    a part of all; there a *slot* is a place in this store, and a task's id counts through all.
    """

    if TYPE_CHECKING:  # of a subclass's own

        @property
        def layout(self) -> Layout: ...
        @property
        def capacity(self) -> int: ...
        @property
        def num_tasks(self) -> jax.Array: ...
        def task(self, i: jax.Array | int) -> Task: ...
        def mixture(self, alphas: jax.Array | np.ndarray | None = None) -> PyTree: ...
        def contract(self, v: jax.Array, implementation: Any = None) -> jax.Array: ...
        def best_scores(self, v: jax.Array, error: float | None = None) -> Any: ...
        def taken(self, ids: jax.Array, num_tasks: jax.Array) -> "TaskStore": ...

    devices: OneDevice = ONE_DEVICE
    # Of each task how many outputs are its labels, int32 [K], where tasks differ in that; and the
    # numbers that there are, static and rising.
    num_labels: jax.Array | None = None
    label_counts: tuple[int, ...] = ()

    @property
    def moments(self) -> dict[str, jax.Array]:
        """By objectives' names, float32 [K, 2]: the mean and deviation of each task's own scores,
        zeros where they were not measured. `measure_statistics` gives them.
        """
        return {}

    @property
    def slots(self) -> jax.Array:
        """bool [K], whether each slot holds a task."""
        return jnp.arange(self.capacity) < self.num_tasks

    @property
    def all_tasks(self) -> jax.Array:
        """T, int32 [], over all devices."""
        return self.num_tasks

    def slot_of(self, ids: jax.Array) -> jax.Array:
        """The slots here of the tasks `ids`; `capacity` where another device has the task."""
        return ids

    def under(self, slot: jax.Array, function: Callable[[Task], jax.Array]) -> jax.Array:
        """function(the task in `slot`), zeros for a slot that is not here."""
        return function(self.task(slot))

    def spread(self, function: Callable, *args: tuple[PyTree, Any], out: PyTree) -> PyTree:
        """function(the store of a device, *arrays), on every device of this store.

        args: pairs (arrays, where they lie: a PartitionSpec of `devices`); out: where the results
        lie. A device sees its own part of each.
        """
        del out
        return function(self, *(value for value, _ in args))

    def mask(self, i: jax.Array | int) -> PyTree:
        """Mask of task i: bool pytree like params, None where not masked.

        Raises IndexError, a ValueError too, unless 0 <= i < T, where both are concrete; inside
        jit the id is clipped to that range.
        """
        return self.task(i).mask

    def per_slot(self, alphas: jax.Array | np.ndarray) -> jax.Array:
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

    def mixture_of(self, kept: jax.Array) -> PyTree:
        """The uniform mixture of the tasks `kept`, bool [K], at least one."""
        return self.mixture(kept / kept.sum().astype(jnp.float32))

    def check_holds_tasks(self) -> None:
        """Raises StoreError when the store is known to be empty."""
        if not is_traced(self.num_tasks) and int(self.num_tasks) == 0:
            raise StoreError("the store is empty: append a task first")

    def check_fits(self, net: Network) -> None:
        """Raises StoreError unless the masks have the network's leaves and shapes."""
        check_layout(self.layout, net)

    @property
    def _traced(self):
        return isinstance(self.num_tasks, Tracer)

    def _index(self, i):
        if isinstance(i, Tracer):
            return i.astype(jnp.int32)
        held = self.capacity if self._traced else int(self.num_tasks)
        if not 0 <= (i := as_index(i)) < held:
            raise TaskIdError(f"task {i} is not in the store, which holds {held}")
        return jnp.int32(i)


def as_index(i: Any) -> int:
    """A task's number as an int. Raises TypeError for what is none."""
    if isinstance(i, bool) or not hasattr(i, "__index__"):
        raise TypeError(f"a task id must be an integer, got {i!r}")
    return i.__index__()


def checked_mask(layout: Layout, mask: PyTree, what: str) -> list[jax.Array]:
    """The leaves of a mask, in order, once they are seen to fit and to hold 0 and 1 only."""
    leaves = layout.leaves(mask, what)
    for name, leaf in zip(layout.shapes, leaves, strict=True):
        check_binary(name, leaf)
    return leaves


def checked_task(
    task: Task | PyTree, layout: Layout, like_state: PyTree, num_labels: int | None = None
) -> tuple[list[jax.Array], PyTree]:
    """The leaves of a task's mask, in order, and its statistics, once they are seen to fit.

    task: a Task, or a bare mask where there are no statistics. like_state: shapes and dtypes.
    Raises TypeError or ValueError, naming the leaf, as `MaskStore.append`.
    """
    if isinstance(task, TrainResult):
        raise TypeError("task must be a Task or a mask, got a TrainResult: append its .task")
    mask, state = task if isinstance(task, Task) else (task, None)
    leaves = checked_mask(layout, mask, "the mask")
    facts = like_state if isinstance(like_state, Facts) else Facts(like_state)
    if facts.num_labels is not None and num_labels is None:
        raise ValueError("the store knows the num_labels of each task: pass this one's, too")
    if facts.num_labels is None and num_labels is not None:
        raise ValueError(
            "num_labels is told of all tasks of a store or of none, and here those before have none"
        )
    if like_state is facts:
        _, state = checked_task(Task(mask, state), layout, facts.state)
        count = None if num_labels is None else jnp.int32(num_labels)
        # Not measured: those of another task would be wrong.
        return leaves, Facts(state, count, jax.tree.map(lambda _: jnp.zeros(2), facts.moments))
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
