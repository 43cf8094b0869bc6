"""A network a task, one network for all, and separate heads: the paper's bounds and its simplest
baseline.
"""

import dataclasses

import jax
import jax.numpy as jnp

from supsup_jax.baselines.sharing import (
    STATIC,
    Baseline,
    check_kernels,
    draw_kernels,
    put_leaves,
)
from supsup_jax.layout import named_leaves
from supsup_jax.network import Network
from supsup_jax.types import PyTree


def upper_bound(net: Network) -> Baseline:
    """A network of its own for every task, kernels from its own draw: all float params each.

    Biases and the like, which are not drawn, start as the network's.
    """
    names = [
        name
        for name, leaf in named_leaves(check_kernels(net).params).items()
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    return OwnLeaves("never", True, net, tuple(names))


def lower_bound(net: Network) -> Baseline:
    """One network for all tasks, trained on one after another, with nothing against forgetting.

    Its normalisation statistics go on from task to task as its weights do.
    """
    return OwnLeaves("always", True, check_kernels(net), ())


def separate_heads(net: Network, trained: bool = True, head: str | None = None) -> Baseline:
    """The classifier's kernel belongs to the task, all other weights are shared.

    trained: the shared ones learn with the first task; otherwise they stay as drawn.
    head: the classifier's kernel, by name; None for the one dense kernel [in, out] whose outputs
      are no other dense kernel's inputs, wherever its name sorts.
    Raises ValueError for a network of one kernel, a head that is none, and where several kernels,
    or none, may be the head.
    """
    kernels = list(check_kernels(net).layout.shapes)
    if len(kernels) < 2:
        raise ValueError(f"separate heads need a kernel beside the head, the network has {kernels}")
    if head is None:
        head = last_dense(net.layout.shapes)
    elif head not in kernels:
        raise ValueError(f"head must be one of the kernels {kernels}, got {head!r}")
    return OwnLeaves("first" if trained else "never", True, net, (head,))


def last_dense(shapes: dict[str, tuple[int, ...]]) -> str:
    """The dense kernel that feeds no other. Raises ValueError unless there is exactly one."""
    dense = {name: shape for name, shape in shapes.items() if len(shape) == 2}
    last = [
        name
        for name, (_, width) in dense.items()
        if not any(other != name and shape[0] == width for other, shape in dense.items())
    ]
    if len(last) != 1:
        raise ValueError(
            "the head must be named, as separate_heads(net, head=...): it is not plain from the "
            f"dense kernels {dense} which is applied last"
        )
    return last[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OwnLeaves(Baseline):
    """A task has leaves of its own, `names`, in place of the shared ones."""

    names: tuple[str, ...] = dataclasses.field(metadata=STATIC)

    def draw_own(self, key: jax.Array) -> dict[str, jax.Array]:
        """The leaves of a new task: kernels drawn anew, others as the network has them."""
        start = named_leaves(self.net.params) | draw_kernels(key, self.net.layout)
        return {name: start[name] for name in self.names}

    def weights(self, shared: PyTree, own: dict[str, jax.Array]) -> PyTree:
        """The shared leaves, the task's own in their places."""
        return put_leaves(shared, own)

    @property
    def owns_state(self) -> bool:
        """Whether each task has normalisation statistics of its own."""
        return bool(self.names)
