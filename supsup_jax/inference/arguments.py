"""What the rules of inference are called with, checked before anything is compiled."""

from collections.abc import Callable, Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from supsup_jax import devices
from supsup_jax.checks import is_traced
from supsup_jax.kernels import contraction
from supsup_jax.kernels.race import check_error
from supsup_jax.network import Network
from supsup_jax.objectives import Standardised
from supsup_jax.stores.base import TaskStore
from supsup_jax.types import Objective, PyTree, StoreError, num_rows, shapes_of

CERTIFIED = "certified"


class Race(NamedTuple):
    """An implementation that is no form of contraction: `kernels.race`, at this error."""

    error: float | None = None


def how_to_contract(implementation: str | None, error: float | None) -> str | Race | None:
    """Of the two arguments of `one_shot`. Raises TypeError or ValueError for what is none."""
    if error is not None:
        check_error(error)
        if implementation is not None:
            raise ValueError(
                f"error is for implementation=None, got {implementation!r}, which makes none"
            )
        return Race(float(error))
    contraction.check_implementation(implementation, CERTIFIED)
    return Race() if implementation == CERTIFIED else implementation


def check_call(
    net: Network,
    store: TaskStore,
    x: PyTree,
    objective: Objective,
    gradient: bool = True,
) -> PyTree:
    """x of `check_input`. Raises TypeError or ValueError for arguments that do not fit, and for an
    empty store.

    gradient: whether the rule descends the objective, which one that judges whole masks has not.
    """
    check_pair(net, store)
    check_objective(objective)
    if gradient and isinstance(objective, Standardised):
        objective(jnp.zeros(0))  # which says so
    check_measured(objective, store)
    return check_input(x)


def check_measured(objective: Objective | None, store: TaskStore) -> None:
    """Raises StoreError unless the store has the moments that a `Standardised` objective needs."""
    if not isinstance(objective, Standardised):
        return
    moments = store.moments.get(objective.name)
    lacking = "no task"
    if moments is not None:
        if is_traced((moments, store.num_tasks)):
            return
        without = np.flatnonzero(devices.on_host(moments)[: int(store.num_tasks), 1] == 0)
        if not len(without):
            return
        lacking = f"not task {without[0]}"
    raise StoreError(
        f"{objective!r} needs the mean and deviation of each task's own scores, and {lacking} has "
        f"them: store = measure_statistics(net, store, stream, {objective.name}) finds them in "
        "data of each task that its mask has not learned"
    )


def check_pair(net: Network, store: TaskStore) -> None:
    """Raises TypeError or ValueError unless the store holds tasks of this network."""
    if not isinstance(store, TaskStore):
        raise TypeError(f"store must be a MaskStore, got {type(store).__name__}")
    store.check_fits(net)
    store.check_holds_tasks()


def check_objective(objective: Objective, name: str = "objective") -> None:
    """Raises TypeError unless `objective` is a function that hashes, so that it never retraces."""
    if not isinstance(objective, Callable) or not isinstance(objective, Hashable):
        raise TypeError(f"{name} must be a hashable function of logits, got {objective!r}")


def check_input(x: PyTree) -> PyTree:
    """x [B, ...], arrays whose values the network takes as they are.

    Raises TypeError for what holds no arrays, or bytes, which no network takes unscaled, and
    ValueError unless its leaves are [B, ...] of one B >= 1.
    """
    leaves = jax.tree.leaves(x)
    wanted = (
        "x must be a float array, or tokens, or a pytree of such, as the network takes it (a "
        "TaskData's batch(index)[0] applies its view and transform), got "
    )
    if not leaves or not all(hasattr(leaf, "dtype") and hasattr(leaf, "shape") for leaf in leaves):
        raise TypeError(wanted + type(x).__name__)
    x = jax.tree.map(lambda leaf: leaf if hasattr(leaf, "aval") else np.asarray(leaf), x)
    leaves = jax.tree.leaves(x)
    for dtype in (leaf.dtype for leaf in leaves):
        number = jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)
        if not number or dtype in (np.uint8, np.int8):
            raise TypeError(f"{wanted}{dtype}")
    least = 2 if hasattr(x, "ndim") else 1  # a bare array of one axis is a slip
    if any(leaf.ndim < least or leaf.shape[:1] != leaves[0].shape[:1] for leaf in leaves):
        raise ValueError(
            f"x must be [B, ...] with one B, got shape {shapes_of(x)}: a single example is x[None]"
        )
    if not num_rows(x):
        raise ValueError(f"x must be [B, ...] with B >= 1, got shape {shapes_of(x)}")
    return x
