"""Training, step by step: what learning a task at once, from batches, from a stream and the
baselines have in common.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.core import Tracer
from jax.sharding import Mesh

from supsup_jax import devices, masks, prng
from supsup_jax.checks import cause, check_key, check_type, is_traced
from supsup_jax.layout import named_leaves
from supsup_jax.loops import equations, fast_in_loops
from supsup_jax.masks import kept_counts
from supsup_jax.network import Network, num_outputs
from supsup_jax.training.config import TrainConfig
from supsup_jax.types import PyTree, Task, TaskData, TrainResult, kinds_of

# Where scores start that keep the whole network.
ALL = "all"


class ScoreMean(NamedTuple):
    """The running mean of the scores of the tasks learned so far (paper section 3.2): O(n).

    num_tasks: int32 []. mean: float32 pytree like a mask, 0 before the first task.
    A pytree; `train_task(..., init_scores=mean)` starts there, or from a draw before any task.
    """

    num_tasks: jax.Array
    mean: PyTree

    @classmethod
    def create(cls, net: Network) -> "ScoreMean":
        """Of no task yet."""
        zeros = [jnp.zeros(shape, jnp.float32) for shape in net.layout.shapes.values()]
        return cls(jnp.int32(0), net.layout.tree(zeros))

    def include(self, scores: PyTree) -> "ScoreMean":
        """With one more task's scores, a TrainResult's `scores`.

        Raises ValueError when they are not a pytree like the mean, leaf by leaf.
        """
        if jax.tree.structure(scores) != jax.tree.structure(self.mean):
            raise ValueError(
                f"scores must be a pytree like {jax.tree.structure(self.mean)}, as a TrainResult "
                f"holds them, got {jax.tree.structure(scores)}"
            )
        for mean, each in zip(jax.tree.leaves(self.mean), jax.tree.leaves(scores), strict=True):
            if jnp.shape(each) != mean.shape:
                raise ValueError(
                    f"scores must be of one task, {mean.shape}, got {jnp.shape(each)}: include "
                    "those of several one by one"
                )
        num_tasks = self.num_tasks + 1
        mean = jax.tree.map(lambda m, s: m + (s - m) / num_tasks, self.mean, scores)
        return ScoreMean(num_tasks, mean)

    def start(self, drawn: PyTree) -> PyTree:
        """The mean, or the `drawn` scores where there is no earlier task."""
        return jax.tree.map(lambda m, d: jnp.where(self.num_tasks > 0, m, d), self.mean, drawn)


class TrainState(NamedTuple):
    """What one step hands the next: what is trained (scores, or a baseline's weights), the
    optimizer's state, the network's state.
    """

    scores: PyTree
    optimizer: optax.OptState
    state: PyTree


# (trained, network state, x [B, ...], y [B]) -> (mean loss [], network state)
Loss = Callable[[PyTree, PyTree, jax.Array, jax.Array], tuple[jax.Array, PyTree]]


def start_scores(key: jax.Array, net: Network, init_scores: PyTree | ScoreMean | None) -> PyTree:
    """Where scores start, as `train_task` says."""
    if init_scores is not None and not isinstance(init_scores, ScoreMean):
        return init_scores
    drawn = masks.draw_scores(key, net.layout)
    return drawn if init_scores is None else init_scores.start(drawn)


def init_train_state(
    key: jax.Array, config: TrainConfig, start: PyTree, state: PyTree
) -> TrainState:
    """The state before the first step: what is trained at `start`, the network at `state`.

    key: the task's, from which the keys in the network's state, such as dropout's, then follow.
    """
    return TrainState(start, config.transformation().init(start), prng.own_keys(key, state))


def mask_loss(net: Network, config: TrainConfig) -> Loss:
    """The loss of scores: config's under their mask, the weights fixed."""

    def loss(scores, state, x, y):
        logits, state = net.train_logits(config.mask(net.layout, scores), state, x)
        return mean_loss(config, logits, y), state

    return loss


def mean_loss(config: TrainConfig, logits: jax.Array, y: jax.Array) -> jax.Array:
    """The mean of config's loss over the batch, and over what else it returns, float32 []."""
    return config.loss(logits, y).astype(jnp.float32).mean()


def fit(
    key: jax.Array, loss: Loss, start: PyTree, state: PyTree, data: TaskData, config: TrainConfig
) -> tuple[TrainState, jax.Array]:
    """Minimises `loss` from `start` over config.steps batches of `data`, in one scan.

    For use inside jit. Returns where it arrived, and the losses [steps], each before its update.
    """
    augment_key = prng.purpose_key(key, "augment")
    batches = batch_indices(key, data.num_examples, config, data.labels)
    step = functools.partial(data_step, augment_key, loss, data, config)
    before = init_train_state(key, config, start, state)
    return lax.scan(step, before, (jnp.arange(config.steps), batches))


def batch_indices(
    key: jax.Array, num_examples: int, config: TrainConfig, labels: jax.Array | None = None
) -> jax.Array:
    """Examples of each step, int32 [steps, batch_size].

    One epoch after another, each a new order of all examples, cut into batches; a batch may
    straddle two epochs, so no example is ever left out. Balanced, each is drawn by itself: first a
    class of `labels`, all alike, then one of its examples.
    """
    total = config.steps * config.batch_size
    if config.balanced:
        return _balanced(prng.purpose_key(key, "batches"), labels, total).reshape(
            config.steps, config.batch_size
        )
    if not config.shuffle:
        return (jnp.arange(total) % num_examples).reshape(config.steps, config.batch_size)
    epochs = -(-total // num_examples)
    keys = jax.random.split(prng.purpose_key(key, "batches"), epochs)
    orders = jax.vmap(lambda k: jax.random.permutation(k, num_examples))(keys)
    return orders.reshape(-1)[:total].reshape(config.steps, config.batch_size)


def _balanced(key, labels, total):
    """Indices [total] into labels [N] of classes, each class as likely as another."""
    order = jnp.argsort(labels)
    ordered = labels[order]
    first = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
    # Where the i-th class that there is starts; behind the last of them, the end.
    starts = jnp.nonzero(first, size=len(labels) + 1, fill_value=len(labels))[0]
    class_key, example_key = jax.random.split(key)
    which = jax.random.randint(class_key, (total,), 0, first.sum())
    place = jax.random.randint(example_key, (total,), starts[which], starts[which + 1])
    return order[place].astype(jnp.int32)


def data_step(
    augment_key: jax.Array,
    loss: Loss,
    data: TaskData,
    config: TrainConfig,
    before: TrainState,
    batch: tuple[jax.Array, jax.Array],
) -> tuple[TrainState, jax.Array]:
    """A step on the examples of one batch (i [], index [B]), for a scan over batches."""
    i, index = batch
    x, y = data.batch(index)
    if config.augment is not None:
        x = config.augment(jax.random.fold_in(augment_key, i), x)
    if config.views is not None:
        x, y = config.views(jax.random.fold_in(prng.purpose_key(augment_key, "views"), i), x, y)
    return train_step(loss, config, before, x, y)


def train_step(
    loss: Loss, config: TrainConfig, before: TrainState, x: jax.Array, y: jax.Array
) -> tuple[TrainState, jax.Array]:
    """One step on network inputs x [B, ...] and labels y [B, ...]; and the loss before it."""
    step = fast_in_loops(jax.value_and_grad(loss, has_aux=True))
    (value, state), grads = step(before.scores, before.state, x, y)
    updates, optimizer = config.transformation().update(grads, before.optimizer, before.scores)
    return TrainState(optax.apply_updates(before.scores, updates), optimizer, state), value


def split_rows(loss: Loss, mesh: Mesh) -> Loss:
    """`loss` with the rows of a batch split along the axis `data` of an auto mesh.

    A program for all devices is the program for one, but for where its arrays lie: batch
    statistics, too, are still those of the whole batch.
    """
    rows = devices.on_mesh(mesh, devices.ROWS)

    def split(trained, state, x, y):
        x, y = lax.with_sharding_constraint((x, y), rows)
        return loss(trained, state, x, y)

    return split


def learned(net: Network, after: TrainState, loss: jax.Array, config: TrainConfig) -> TrainResult:
    """What was learned, where training arrived."""
    return TrainResult(task_of(net, after, config), after.scores, loss)


def task_of(net: Network, after: TrainState, config: TrainConfig) -> Task:
    """The task that these scores and statistics make."""
    mask = jax.tree.map(lambda leaf: leaf != 0, config.mask(net.layout, after.scores))
    return Task(mask, after.state)


@jax.jit
def all_finite(tree: PyTree) -> jax.Array:
    """bool [], whether every leaf is."""
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))


def diverged(config: TrainConfig, where: str = "") -> ValueError:
    """The error of a training that ended without numbers."""
    return ValueError(
        f"training diverged{where}: scores or losses are not finite; "
        f"lower the learning rate ({config.told_rate}) or check the inputs for NaN"
    )


def check_start(key, net, config, init_scores):
    """init_scores, written out where they are "all".

    Raises TypeError or ValueError unless a task's training can start from these.
    """
    check_key(key)
    check_types(net, config)
    if isinstance(init_scores, str):
        init_scores = whole_network(net, config, init_scores)
    if isinstance(init_scores, ScoreMean):
        check_scores(net.layout, init_scores.mean)
    elif init_scores is not None:
        check_scores(net.layout, init_scores)
    return init_scores


def whole_network(net: Network, config: TrainConfig, name: str = ALL) -> PyTree:
    """The scores that `train_task` starts from by init_scores="all": each weight's magnitude.

    None is negative, so by the threshold all weights are kept; by top-k the largest are.
    """
    if name != ALL:
        raise ValueError(f"init_scores must be {ALL!r}, scores or a ScoreMean, got {name!r}")
    if net.initializer is not None and config.rule == "topk":
        raise ValueError(
            f"init_scores={ALL!r} keeps the largest weights by topk, and those of "
            f"{net.initializer} are all as large: leave init_scores out"
        )
    leaves = named_leaves(net.params)
    return net.layout.tree(
        [jnp.abs(leaves[each].astype(jnp.float32)) for each in net.layout.shapes]
    )


def check_labels(
    net: Network, data: TaskData, config: TrainConfig, known: int | None = None, where: str = ""
) -> int:
    """Raises TypeError or ValueError unless the network takes the inputs, and config's loss labels.

    known: what is returned, C, of earlier batches. where: which batch, for messages.
    """
    known = known or num_outputs(net, data)
    if config.views is not None:
        config.views.check(data, known, where)
    if config.takes_classes:
        data.check_classes(known, where)
        if (weights := config.loss.weights) is not None and len(weights) < known:
            high = int(np.max(data.labels)) if not is_traced(data.labels) else 0
            high = high if config.views is None else config.views.num_outputs - 1
            if high >= len(weights):
                raise ValueError(
                    f"the loss has weights of {len(weights)} classes, got a label of {high}"
                )
    elif config.balanced and (
        data.labels.ndim != 1 or not jnp.issubdtype(data.labels.dtype, jnp.integer)
    ):
        raise TypeError(f"balanced wants integer labels [N], got {data.labels.dtype}")
    if not config.takes_classes:
        _check_loss(config, known, data.labels)
    return known


def _check_loss(config, num_outputs, labels):
    """Raises ValueError unless a loss of the user's takes these labels, example by example."""
    num = config.batch_size
    logits = jax.ShapeDtypeStruct((num, num_outputs), jnp.float32)
    y = jax.ShapeDtypeStruct((num, *labels.shape[1:]), labels.dtype)
    said = f"for logits {kinds_of(logits)} and labels {kinds_of(y)}"
    try:
        jaxpr, value = jax.make_jaxpr(config.loss, return_shape=True)(logits, y)
    except Exception as error:
        raise ValueError(f"the loss fails {said}: {cause(error)}") from error
    made = [value.shape]
    if num_outputs == 1:  # inside it, too, where it returns the mean
        made += [var.aval.shape for each in equations(jaxpr.jaxpr) for var in each.outvars]
    alone = num not in (1, num_outputs, *y.shape[1:])  # an axis of that length is of examples
    if alone and any(shape.count(num) > 1 for shape in made):
        raise ValueError(
            f"the loss pairs each example with each other, [B, B], {said}, as arrays of unequal "
            "axes do: give labels the shape of the logits, or reshape them in the loss"
        )


def check_types(net, config):
    """Raises TypeError for other arguments, ValueError for a density that topk cannot keep."""
    check_type("net", net, Network)
    check_type("config", config, TrainConfig)
    if config.rule == "topk":
        kept_counts(net.layout, config.density)


def check_finite(result, config):
    """Raises ValueError unless scores and losses, if concrete, are numbers."""
    traced = isinstance(result.loss, Tracer)
    if not traced and not bool(all_finite((result.scores, result.loss))):
        raise diverged(config)


def check_scores(layout, scores):
    """Raises TypeError or ValueError, naming the leaf, unless all are finite floats like params."""
    for name, leaf in zip(layout.shapes, layout.leaves(scores, "init_scores"), strict=True):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(f"init_scores must be floats, got {jnp.result_type(leaf)} at {name!r}")
        # In NumPy: under the caller's jit, jnp would trace even what is concrete.
        if not isinstance(leaf, Tracer) and not np.isfinite(np.asarray(leaf)).all():
            raise ValueError(f"init_scores must be finite, got NaN or infinity at {name!r}")
