"""Weights that tasks share and weights of their own: the frame of every baseline.

A network a task, one network for all, separate heads, BatchE and PSP differ only in what is shared,
when the shared part is trained, and what each task adds. So a baseline is two methods and two
choices, and `learn` is the library's one training loop on them. All stand on a `Network`, with
normalisation statistics or without: its masked leaves are the kernels. Statistics are trained with
a task and belong to it, as with masks; sharing them costs every task but the last its accuracy.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from supsup_jax import prng
from supsup_jax.checks import check_type, is_traced
from supsup_jax.devices import in_pieces
from supsup_jax.layout import Layout, named_leaves
from supsup_jax.network import Network
from supsup_jax.training.config import TrainConfig
from supsup_jax.training.steps import all_finite, check_labels, diverged, fit, mean_loss
from supsup_jax.types import PyTree, TaskData

WHEN = ("never", "first", "always")
# (key, shape) -> array. Normal with variance 2 / fan_in: what the paper's trained nets start from.
Initializer = Callable[[jax.Array, tuple[int, ...]], jax.Array]
HE_NORMAL = jax.nn.initializers.he_normal()
STATIC = {"static": True}  # metadata of a field that compiled programs are made for


@dataclasses.dataclass(frozen=True)
class Baseline:
    """How tasks share a network; a subclass says what a task adds.

    A subclass is a pytree (`jax.tree_util.register_dataclass`), its network the only child: equal
    choices and equal shapes share compiled programs.

    shared_learns: when the shared weights are trained: with no task, the first or every one.
      "always" is where earlier tasks can be forgotten.
    own_learns: whether what a task adds is trained, or stays as drawn (PSP's rotations).
    net: what is shared out; its state is where a task's normalisation statistics start.
    Raises ValueError on construction for another choice.
    """

    shared_learns: str = dataclasses.field(metadata=STATIC)
    own_learns: bool = dataclasses.field(metadata=STATIC)
    net: Network

    def __post_init__(self):
        if self.shared_learns not in WHEN:
            raise ValueError(f"shared_learns must be one of {WHEN}, got {self.shared_learns!r}")

    def draw_own(self, key: jax.Array) -> PyTree:
        """What a task adds, before its training; a pytree without leaves for nothing."""
        raise NotImplementedError(f"{type(self).__name__} must say what a task adds")

    def weights(self, shared: PyTree, own: PyTree) -> PyTree:
        """The weights of a task's network; they and `shared` are pytrees like net.params."""
        raise NotImplementedError(f"{type(self).__name__} must say what a task's network is")

    def forward(
        self, shared: PyTree, own: PyTree, state: PyTree, x: jax.Array, train: bool
    ) -> tuple[jax.Array, PyTree]:
        """Logits [B, C] of a task's network, and the state behind x [B, ...]."""
        return self.net.forward(self.weights(shared, own), state, x, train)

    def logits(self, shared: PyTree, own: PyTree, x: jax.Array, state: PyTree = None) -> jax.Array:
        """[B, C] of x [B, ...] in eval mode, under the task's statistics.

        Raises ValueError unless state is like the network's.
        """
        check_state(self.net.state, state)
        return self.forward(shared, own, state, x, train=False)[0]

    @property
    def forgets(self) -> bool:
        """Whether a later task may change what an earlier one computes."""
        return self.shared_learns == "always"

    @property
    def owns_state(self) -> bool:
        """Whether statistics belong to the task; else one network's go on from task to task."""
        return True


class Learned(NamedTuple):
    """After one task: the shared weights, the task's own, its normalisation statistics (None for a
    network without), and the losses [steps] in nats.
    """

    shared: PyTree
    own: PyTree
    state: PyTree
    loss: jax.Array


def check_kernels(net: Network) -> Network:
    """`net`, unless it masks what is no kernel [..., in, out]."""
    check_type("net", net, Network)
    for name, shape in net.layout.named_shapes:
        if len(shape) < 2:
            raise ValueError(f"baselines take kernels [..., in, out], {name!r} has shape {shape}")
    return net


def check_state(like: PyTree, state: PyTree) -> None:
    """Raises ValueError unless `state` is a pytree like the network's."""
    if jax.tree.structure(state) != jax.tree.structure(like):
        raise ValueError(
            f"state must hold the statistics {list(named_leaves(like))} of the network, as "
            f"Learned.state does, got {list(named_leaves(state))}"
        )


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
    return put_leaves(net.params, draw_kernels(key, net.layout, initializer))


def put_leaves(params: PyTree, leaves: dict[str, jax.Array]) -> PyTree:
    """`params` with the leaves that `leaves` names exchanged for those."""
    put = [leaves.get(name, leaf) for name, leaf in named_leaves(params).items()]
    return jax.tree.unflatten(jax.tree.structure(params), put)


@jax.jit
def own_weights(baseline: Baseline, key: jax.Array) -> PyTree:
    """What a task adds, as drawn; `key` is the task's."""
    return baseline.draw_own(prng.purpose_key(key, "own"))


def own_bytes(baseline: Baseline) -> int:
    """Bytes that a task adds, its normalisation statistics among them; none for what is not
    trained, which its key draws again.
    """
    added = []
    if baseline.own_learns:
        added.append(jax.eval_shape(baseline.draw_own, jax.random.key(0)))
    if baseline.owns_state:
        added.append(baseline.net.state)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(added))


@functools.partial(jax.jit, static_argnames="batch_size")
def is_right(
    baseline: Baseline,
    shared: PyTree,
    own: PyTree,
    data: TaskData,
    state: PyTree = None,
    batch_size: int = 128,
) -> jax.Array:
    """bool [N], whether each image of a task gets its label, the id given (GG).

    state: the task's statistics (of `lower_bound`, the newest). Raises ValueError as `logits`.
    """

    def judge(index):
        x, y = data.batch(index)
        return jnp.argmax(baseline.logits(shared, own, x, state), axis=-1) == y

    return in_pieces(judge, jnp.arange(data.num_examples), batch_size)


def learn(
    key: jax.Array,
    baseline: Baseline,
    shared: PyTree,
    data: TaskData,
    config: TrainConfig,
    *,
    first: bool,
    state: PyTree = None,
) -> Learned:
    """Learns one task by `config`'s optimizer, steps and batches (its mask rule has no meaning).

    shared: as the tasks before left it, or `shared_weights`.
    key: the task's; draws its own weights and the order of the examples.
    first: whether this is the first task; compiles once for the first and once for the others.
    state: the Learned.state of the task before, from which one network's statistics go on. Where
      they belong to the task it has no effect: they start at the network's, as for a first task.
    Raises TypeError or ValueError for bad data, and ValueError when nothing would be trained,
    state is missing, or training ends with weights or losses that are not finite.
    """
    trains_shared = {"never": False, "first": first, "always": True}[baseline.shared_learns]
    check_type("data", data, TaskData)
    check_type("config", config, TrainConfig)
    data.check()
    check_labels(baseline.net, data, config)
    has_own = baseline.own_learns and jax.tree.leaves(jax.eval_shape(baseline.draw_own, key))
    if not trains_shared and not has_own:
        raise ValueError("nothing is trained: neither the shared weights nor the task's own")
    if first or baseline.owns_state:
        state = baseline.net.state
    check_state(baseline.net.state, state)
    learned = _learn(key, baseline, shared, state, data, config, trains_shared)
    if not is_traced(learned.loss) and not bool(all_finite(learned)):
        raise diverged(config)
    return learned


@functools.partial(jax.jit, static_argnames=("config", "trains_shared"))
def _learn(key, baseline, shared, state, data, config, trains_shared):
    own = own_weights(baseline, key)
    start = shared if trains_shared else None, own if baseline.own_learns else None

    def parts(trained):
        """Shared and own weights, each as trained or else as it stands."""
        return trained[0] if trains_shared else shared, trained[1] if baseline.own_learns else own

    def loss(trained, state, x, y):
        logits, state = baseline.forward(*parts(trained), state, x, train=True)
        return mean_loss(config, logits, y), state

    after, losses = fit(key, loss, start, state, data, config)
    return Learned(*parts(after.scores), after.state, losses)
