"""Weights that tasks share and weights of their own: the frame of every baseline.

A network a task, one network for all, separate heads, BatchE and PSP differ only in what is shared,
when the shared part is trained, and what each task adds. So a baseline is two methods and two
choices, and `learn` is the library's one training loop on them. All stand on a `Network`: its
masked leaves are the kernels, and leaves that it does not mask are shared.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from supsup_jax import prng
from supsup_jax.infer import in_pieces
from supsup_jax.network import Network
from supsup_jax.packing import Layout, named_leaves
from supsup_jax.train import TrainConfig, all_finite, cross_entropy, diverged, fit
from supsup_jax.types import PyTree, TaskData

WHEN = ("never", "first", "always")
# (key, shape) -> array. Normal with variance 2 / fan_in: what the paper's trained nets start from.
Initializer = Callable[[jax.Array, tuple[int, ...]], jax.Array]
HE_NORMAL = jax.nn.initializers.he_normal()


@dataclasses.dataclass(frozen=True)
class Baseline:
    """How tasks share a network; a subclass says what a task adds. Hashable by value.

    shared_learns: when the shared weights are trained: with no task, the first or every one.
      "always" is where earlier tasks can be forgotten.
    own_learns: whether what a task adds is trained, or stays as drawn (PSP's rotations).
    Raises ValueError on construction for another choice.
    """

    shared_learns: str
    own_learns: bool

    def __post_init__(self):
        if self.shared_learns not in WHEN:
            raise ValueError(f"shared_learns must be one of {WHEN}, got {self.shared_learns!r}")

    def draw_own(self, key: jax.Array) -> PyTree:
        """What a task adds, before its training; a pytree without leaves for nothing."""
        raise NotImplementedError(f"{type(self).__name__} must say what a task adds")

    def logits(self, shared: PyTree, own: PyTree, x: jax.Array) -> jax.Array:
        """[B, C] of x [B, ...]; shared is a pytree like the network's params."""
        raise NotImplementedError(f"{type(self).__name__} must say what it computes")

    @property
    def forgets(self) -> bool:
        """Whether a later task may change what an earlier one computes."""
        return self.shared_learns == "always"


class Learned(NamedTuple):
    """After one task: the shared weights, the task's own, and the losses [steps] in nats."""

    shared: PyTree
    own: PyTree
    loss: jax.Array


def draw_kernels(
    key: jax.Array, layout: Layout, initializer: Initializer = HE_NORMAL
) -> dict[str, jax.Array]:
    """Trainable kernels for the masked leaves, by name."""
    keys = jax.random.split(prng.purpose_key(key, "kernels"), len(layout.shapes))
    return {
        name: initializer(k, shape)
        for k, (name, shape) in zip(keys, layout.named_shapes, strict=True)
    }


def shared_weights(net: Network, key: jax.Array, initializer: Initializer = HE_NORMAL) -> PyTree:
    """The network's params with every masked leaf drawn anew; `key` is the run's."""
    return put_kernels(net.params, draw_kernels(key, net.layout, initializer))


def put_kernels(params: PyTree, kernels: dict[str, jax.Array]) -> PyTree:
    """`params` with the leaves that `kernels` names exchanged for those."""
    leaves = [kernels.get(name, leaf) for name, leaf in named_leaves(params).items()]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


@functools.partial(jax.jit, static_argnums=0)
def own_weights(baseline: Baseline, key: jax.Array) -> PyTree:
    """What a task adds, as drawn; `key` is the task's."""
    return baseline.draw_own(prng.purpose_key(key, "own"))


def own_bytes(baseline: Baseline) -> int:
    """Bytes that a task adds; none for what is not trained, which its key draws again."""
    if not baseline.own_learns:
        return 0
    own = jax.eval_shape(baseline.draw_own, jax.random.key(0))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(own))


@functools.partial(jax.jit, static_argnames=("baseline", "batch_size"))
def is_right(
    baseline: Baseline, shared: PyTree, own: PyTree, data: TaskData, batch_size: int = 128
) -> jax.Array:
    """bool [N], whether each image of a task gets its label, the id given (GG)."""

    def judge(index):
        x, y = data.batch(index)
        return jnp.argmax(baseline.logits(shared, own, x), axis=-1) == y

    return in_pieces(judge, jnp.arange(data.num_examples), batch_size)


def learn(
    key: jax.Array,
    baseline: Baseline,
    shared: PyTree,
    data: TaskData,
    config: TrainConfig,
    *,
    first: bool,
) -> Learned:
    """Learns one task by `config`'s optimizer, steps and batches (its mask rule has no meaning).

    shared: as the tasks before left it, or `shared_weights`.
    key: the task's; draws its own weights and the order of the examples.
    first: whether this is the first task; compiles once for the first and once for the others.
    Raises TypeError or ValueError for bad data, and ValueError when nothing would be trained or
    training ends with weights or losses that are not finite.
    """
    trains_shared = baseline.shared_learns == "always" or (
        baseline.shared_learns == "first" and first
    )
    if not isinstance(data, TaskData):
        raise TypeError(f"data must be a TaskData, got {type(data).__name__}")
    if not isinstance(config, TrainConfig):
        raise TypeError(f"config must be a TrainConfig, got {type(config).__name__}")
    data.check()
    data.check_labels(_num_outputs(baseline, shared, data))
    has_own = baseline.own_learns and jax.tree.leaves(jax.eval_shape(baseline.draw_own, key))
    if not trains_shared and not has_own:
        raise ValueError("nothing is trained: neither the shared weights nor the task's own")
    learned = _learn(key, baseline, shared, data, config, trains_shared)
    traced = isinstance(learned.loss, jax.core.Tracer)
    if not traced and not bool(all_finite(learned)):
        raise diverged(config)
    return learned


def _num_outputs(baseline, shared, data):
    def logits(shared, data):
        own = own_weights(baseline, jax.random.key(0))
        return baseline.logits(shared, own, data.batch(jnp.zeros(2, jnp.int32))[0])

    return jax.eval_shape(logits, shared, data).shape[1]


@functools.partial(jax.jit, static_argnames=("baseline", "config", "trains_shared"))
def _learn(key, baseline, shared, data, config, trains_shared):
    start = (shared if trains_shared else None, None)
    own = own_weights(baseline, key)
    if baseline.own_learns:
        start = (start[0], own)

    def parts(trained):
        """Shared and own weights, each as trained or else as it stands."""
        return (
            trained[0] if trains_shared else shared,
            trained[1] if baseline.own_learns else own,
        )

    def loss(trained, state, x, y):
        return cross_entropy(baseline.logits(*parts(trained), x), y), state

    after, losses = fit(key, loss, start, None, data, config)
    return Learned(*parts(after.scores), losses)
