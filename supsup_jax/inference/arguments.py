"""What the rules of inference are called with, checked before anything is compiled."""

from collections.abc import Callable, Hashable
from typing import Any

import jax.numpy as jnp

from supsup_jax.kernels import contraction
from supsup_jax.network import Network
from supsup_jax.stores.base import TaskStore
from supsup_jax.types import Objective

# An implementation that is no form of contraction: see `kernels.certify`.
CERTIFIED = "certified"


def check_call(
    net: Network, store: TaskStore, x: Any, objective: Objective, implementation: str | None = None
) -> None:
    """Raises TypeError or ValueError for arguments that do not fit, and for an empty store."""
    check_pair(net, store)
    check_objective(objective)
    contraction.check_implementation(implementation, CERTIFIED)
    check_input(x)


def check_pair(net: Network, store: TaskStore) -> None:
    """Raises TypeError or ValueError unless the store holds tasks of this network."""
    if not isinstance(store, TaskStore):
        raise TypeError(f"store must be a MaskStore, got {type(store).__name__}")
    store.check_fits(net)
    store.check_holds_tasks()


def check_objective(objective: Objective, name: str = "objective") -> None:
    if not isinstance(objective, Callable) or not isinstance(objective, Hashable):
        raise TypeError(f"{name} must be a hashable function of logits, got {objective!r}")


def check_input(x: Any) -> None:
    if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            "x must be a float array as the network takes it (a TaskData's batch(index)[0] applies "
            f"its view and transform), got {getattr(x, 'dtype', type(x).__name__)}"
        )
    if x.ndim < 2 or x.shape[0] == 0:
        raise ValueError(f"x must be [B, ...] with B >= 1, got shape {x.shape}")
