"""A network a task, one network for all, and separate heads: the paper's bounds and its simplest
baseline.
"""

import dataclasses
from collections.abc import Callable

import jax

from supsup_jax.baselines.sharing import Baseline, draw_kernels, put_kernels
from supsup_jax.network import Network
from supsup_jax.packing import Layout
from supsup_jax.types import PyTree


def upper_bound(net: Network) -> Baseline:
    """A network of its own for every task, trained from its own draw: n floats a task."""
    names = check_stateless(net).layout.shapes
    return OwnKernels("never", True, net.apply, net.layout, tuple(names))


def lower_bound(net: Network) -> Baseline:
    """One network for all tasks, trained on one after another, with nothing against forgetting."""
    check_stateless(net)
    return OwnKernels("always", True, net.apply, net.layout, ())


def separate_heads(net: Network, trained: bool = True) -> Baseline:
    """The last kernel belongs to the task, all others are shared.

    trained: the shared ones learn with the first task; otherwise they stay as drawn.
    Raises ValueError for a network of one kernel.
    """
    names = tuple(check_stateless(net).layout.shapes)
    if len(names) < 2:
        raise ValueError(f"separate heads need a kernel before the last, the network has {names}")
    when = "first" if trained else "never"
    return OwnKernels(when, True, net.apply, net.layout, names[-1:])


def check_stateless(net: Network) -> Network:
    """`net`, unless it has normalisation statistics, which baselines do not keep, or masks what is
    no kernel [..., in, out].
    """
    if not isinstance(net, Network):
        raise TypeError(f"net must be a Network, got {type(net).__name__}")
    if net.state is not None:
        raise ValueError("baselines take a network without normalisation statistics (state)")
    for name, shape in net.layout.named_shapes:
        if len(shape) < 2:
            raise ValueError(f"baselines take kernels [..., in, out], {name!r} has shape {shape}")
    return net


@dataclasses.dataclass(frozen=True)
class OwnKernels(Baseline):
    """A task has kernels of its own, `names`, in place of the shared ones."""

    apply: Callable
    layout: Layout
    names: tuple[str, ...]

    def draw_own(self, key: jax.Array) -> dict[str, jax.Array]:
        drawn = draw_kernels(key, self.layout)
        return {name: drawn[name] for name in self.names}

    def logits(self, shared: PyTree, own: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return self.apply(put_kernels(shared, own), x)
