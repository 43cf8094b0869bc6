"""Learning one task's mask: one compiled scan over steps, in which only the scores move."""

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh

from supsup_jax import devices, masks, prng
from supsup_jax.checks import check_int, check_key, check_type
from supsup_jax.layout import Layout
from supsup_jax.masks import Density, kept_counts
from supsup_jax.network import Network, num_outputs
from supsup_jax.types import PyTree, Task, TaskData, TrainResult

RULES = ("threshold", "topk")
OPTIMIZERS = ("rmsprop", "adam", "sgd")
SCHEDULES = ("constant", "cosine")
# Working memory of the tasks that `train_tasks` batches, as `working_bytes` estimates it: 88 tasks
# of LeNet-300-100 with 100 outputs, or 13 of FC-1024-1024 with 500. Chosen by counting, to keep
# launches few beside work and the whole within a small GPU; not tuned on one.
CHUNK_BYTES = 2 * 2**30


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How a task is trained; hashable by value, so equal configs share one compiled program.

    The defaults are the paper's MNIST runs (section 4.2): the threshold rule, 1,000 batches of
    128, RMSprop at 1e-4 without a schedule (`golden/train_rmsprop.npz`).
    Raises ValueError on construction for an unknown name or a number out of range.
    """

    rule: str = "threshold"  # or "topk", which needs a density
    # Fraction of each masked leaf that topk keeps, or a function of its shape, as ErdosRenyi is.
    density: Density | None = None
    steps: int = 1000
    batch_size: int = 128
    optimizer: str = "rmsprop"  # or "adam", "sgd"
    learning_rate: float = 1e-4
    momentum: float = 0.0  # of sgd and rmsprop
    decay: float = 0.99  # of rmsprop's squared gradients
    eps: float = 1e-8  # of rmsprop and adam, added outside the root
    weight_decay: float = 0.0  # added to the gradient
    schedule: str = "constant"  # or "cosine", to 0 at the last step
    warmup_steps: int = 0  # linear, from 0
    shuffle: bool = True  # every example once an epoch, in a new order; False keeps the given order
    augment: Callable | None = None  # (key, x [B, ...]) -> x, traced inside jit, equal by value

    def __post_init__(self):
        for name, allowed in (("rule", RULES), ("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        for name, least in (("steps", 1), ("batch_size", 1), ("warmup_steps", 0)):
            value = getattr(self, name)
            check_int(name, value, least)
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate!r}")
        for name, most in (
            ("momentum", 1),
            ("decay", 1),
            ("eps", math.inf),
            ("weight_decay", math.inf),
        ):
            if not 0 <= getattr(self, name) < most:
                raise ValueError(f"{name} must lie in [0, {most}), got {getattr(self, name)!r}")
        if self.momentum and self.optimizer == "adam":
            raise ValueError("adam has a momentum of its own: momentum must be 0")
        if self.augment is not None and not (
            callable(self.augment) and isinstance(self.augment, Hashable)
        ):
            raise TypeError(f"augment must be a hashable function, got {self.augment!r}")
        if self.rule == "topk" and self.density is None:
            raise ValueError("rule 'topk' needs a density in (0, 1], got None")
        if self.rule == "threshold" and self.density is not None:
            raise ValueError("rule 'threshold' keeps what it keeps: density must be None")
        if callable(self.density):
            if not isinstance(self.density, Hashable):
                raise TypeError(f"density must hash by value, got {self.density!r}")
        elif self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"density must lie in (0, 1], got {self.density!r}")

    def transformation(self) -> optax.GradientTransformation:
        """The optimizer, as optax builds it."""
        rate = self.learning_rate
        if self.schedule == "cosine" or self.warmup_steps:
            rest = max(1, self.steps - self.warmup_steps)
            after = (
                optax.cosine_decay_schedule(rate, rest)
                if self.schedule == "cosine"
                else optax.constant_schedule(rate)
            )
            warmup = optax.linear_schedule(0.0, rate, self.warmup_steps)
            rate = optax.join_schedules([warmup, after], [self.warmup_steps])
        momentum = self.momentum or None
        step = {
            # PyTorch adds eps to the root; optax's default inside it costs .7 points of accuracy.
            "rmsprop": lambda: optax.rmsprop(
                rate, decay=self.decay, eps=self.eps, eps_in_sqrt=False, momentum=momentum
            ),
            "adam": lambda: optax.adam(rate, eps=self.eps),
            "sgd": lambda: optax.sgd(rate, momentum=momentum),
        }[self.optimizer]()
        if self.weight_decay:
            step = optax.chain(optax.add_decayed_weights(self.weight_decay), step)
        return step

    def mask(self, layout: Layout, scores: PyTree) -> PyTree:
        """The mask of `scores` by this rule, straight-through, as a pytree like them."""
        leaves = layout.leaves(scores, "scores")
        if self.rule == "threshold":
            return layout.tree([masks.threshold_mask(leaf) for leaf in leaves])
        counts = kept_counts(layout, self.density).values()
        return layout.tree(
            [masks.topk_mask(leaf, k) for leaf, k in zip(leaves, counts, strict=True)]
        )


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
        zeros = [jnp.zeros(shape) for shape in net.layout.shapes.values()]
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


def train_task(
    key: jax.Array,
    net: Network,
    data: TaskData,
    config: TrainConfig = TrainConfig(),
    init_scores: PyTree | ScoreMean | None = None,
    *,
    mesh: Mesh | None = None,
) -> TrainResult:
    """Learns one task: cross-entropy over all C outputs, with the network's weights fixed.

    key: draws the scores and the order of the examples, each from a key of its own.
    init_scores: where scores start, pytree like a mask; drawn when None. A ScoreMean starts them
      at the mean of earlier tasks' scores (the paper's transfer). It is not consumed.
    mesh: splits each batch over the devices along its axis `data`, and the compiler sums their
      gradients: what one device learns, to rounding. The result lies on every device.
    Equal shapes and an equal config compile once, for any key, weights, data and view.
    Raises TypeError or ValueError before compiling for inputs that do not fit, such as a batch
    that the devices do not divide, and ValueError when training ends with scores or losses that
    are not finite.
    """
    check_start(key, net, config, init_scores)
    check_type("data", data, TaskData)
    data.check()
    data.check_labels(num_outputs(net, data))
    if mesh is None:
        result = _train(key, net, data, init_scores, config)
    else:
        devices.check_mesh(mesh, devices.DATA)
        if config.batch_size % (parts := mesh.shape[devices.DATA]):
            raise ValueError(
                f"batch_size must be a multiple of the {parts} devices along the axis "
                f"{devices.DATA!r} of mesh, got {config.batch_size}"
            )
        mesh = devices.auto(mesh)
        inputs = (key, net, data, init_scores)
        if not mesh.is_multi_process:  # of several hosts each has them, and jit takes them so
            inputs = jax.device_put(inputs, devices.on_mesh(mesh, devices.WHOLE))
        result = _train(*inputs, config, mesh)
    check_finite(result, config)
    return result


def train_tasks(
    keys: jax.Array,
    net: Network,
    data: TaskData,
    config: TrainConfig = TrainConfig(),
    init_scores: PyTree | None = None,
    *,
    mesh: Mesh | None = None,
) -> TrainResult:
    """Learns T tasks in one program: what `train_task` learns of each key and view, to rounding.

    keys: random keys [T], one a task.
    data: images [N, ...] and labels [N] that all tasks share, never copied; its view is
      [T, ...], one a task, or None where the tasks differ in their keys only. Or images
      [T, N, ...] and labels [T, N], each task its own, without a view.
    init_scores: where scores start, each leaf [T, ...]; drawn when None. It is not consumed.
    mesh: deals the tasks out to all its devices, an even share of consecutive ones to each, which
      learn without a word to each other. T need not be a multiple of them: the last task is then
      learned more than once. The result lies where it was learned, or, in that case, everywhere.
    Every leaf of the result has a leading T: scores and masks take 5 bytes a weight and task, so
    thousands of tasks are better learned in several calls (of equal T, which compile once).

    On a CPU, whose cores one task keeps busy, tasks follow one another. Elsewhere they are
    batched in even chunks, as many as `CHUNK_BYTES` hold, one chunk after another; there rounding
    may put a score near 0 on its other side, and after 1,000 steps some .4% of mask bits differ.
    Raises as `train_task` does, and for keys, view and init_scores that do not agree on T; tasks
    that diverged are named.
    """
    num_tasks = _num_tasks(keys)
    check_types(net, config)
    check_type("data", data, TaskData)
    if isinstance(init_scores, ScoreMean):
        raise TypeError(
            "init_scores must be scores with a leading T: tasks learned at once have no earlier "
            "ones; call train_task on one after another to start from a ScoreMean"
        )
    if init_scores is not None:
        shapes = tuple((name, (num_tasks, *shape)) for name, shape in net.layout.named_shapes)
        _check_scores(dataclasses.replace(net.layout, named_shapes=shapes), init_scores)
    _check_many(data, num_tasks)
    data.check_labels(num_outputs(net, _one_task(data)))
    if mesh is None:
        result = _train_tasks(keys, net, data, init_scores, config)
    else:
        devices.check_mesh(mesh, devices.TASK)
        result = _train_tasks_over(keys, net, data, init_scores, config, devices.auto(mesh))
    if not isinstance(result.loss, jax.core.Tracer):
        finite = devices.on_host(jax.vmap(all_finite)((result.scores, result.loss)))
        if not finite.all():
            bad = np.flatnonzero(~finite)
            some = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
            raise diverged(config, f" in {len(bad)} of {num_tasks} tasks ({some})")
    return result


def start_scores(key: jax.Array, net: Network, init_scores: PyTree | ScoreMean | None) -> PyTree:
    """Where scores start, as `train_task` says."""
    if init_scores is not None and not isinstance(init_scores, ScoreMean):
        return init_scores
    drawn = net.layout.tree(masks.draw_scores(key, net.layout.shapes))
    return drawn if init_scores is None else init_scores.start(drawn)


def learned(net: Network, after: TrainState, loss: jax.Array, config: TrainConfig) -> TrainResult:
    """What was learned, where training arrived."""
    mask = jax.tree.map(lambda leaf: leaf != 0, config.mask(net.layout, after.scores))
    return TrainResult(Task(mask, after.state), after.scores, loss)


def init_train_state(config: TrainConfig, start: PyTree, state: PyTree) -> TrainState:
    """The state before the first step: what is trained at `start`, the network at `state`."""
    return TrainState(start, config.transformation().init(start), state)


def mask_loss(net: Network, config: TrainConfig) -> Loss:
    """The loss of scores: cross-entropy under their mask, the weights fixed."""

    def loss(scores, state, x, y):
        logits, state = net.train_logits(config.mask(net.layout, scores), state, x)
        return cross_entropy(logits, y), state

    return loss


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    """Mean over the batch, in nats, in float32."""
    logits = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def fit(
    key: jax.Array, loss: Loss, start: PyTree, state: PyTree, data: TaskData, config: TrainConfig
) -> tuple[TrainState, jax.Array]:
    """Minimises `loss` from `start` over config.steps batches of `data`, in one scan.

    For use inside jit. Returns where it arrived, and the losses [steps], each before its update.
    """
    augment_key = prng.purpose_key(key, "augment")
    batches = batch_indices(key, data.num_examples, config)
    step = functools.partial(data_step, augment_key, loss, data, config)
    before = init_train_state(config, start, state)
    return lax.scan(step, before, (jnp.arange(config.steps), batches))


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
    return train_step(loss, config, before, x, y)


def train_step(
    loss: Loss, config: TrainConfig, before: TrainState, x: jax.Array, y: jax.Array
) -> tuple[TrainState, jax.Array]:
    """One step on network inputs x [B, ...] and labels y [B]; and the loss before it."""
    (value, state), grads = jax.value_and_grad(loss, has_aux=True)(
        before.scores, before.state, x, y
    )
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


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _train(key, net, data, init_scores, config, mesh=None):
    scores = start_scores(key, net, init_scores)
    loss = mask_loss(net, config)
    if mesh is not None:
        loss = split_rows(loss, mesh)
    result = learned(net, *fit(key, loss, scores, net.state, data, config), config)
    if mesh is not None:
        result = lax.with_sharding_constraint(result, devices.on_mesh(mesh, devices.WHOLE))
    return result


@functools.partial(jax.jit, static_argnames=("config", "together"))
def _train_tasks(keys, net, data, init_scores, config, together=None):
    """Tasks one by one or `together` at a time; None leaves the choice to the platform."""

    def one(task):
        key, own, scores = task
        return _train(key, net, dataclasses.replace(data, **own), scores, config)

    tasks = (keys, _own_fields(data), init_scores)
    if together is not None:
        return _in_chunks(one, tasks, together)
    size = max(1, CHUNK_BYTES // working_bytes(net, _one_task(data), config))
    return lax.platform_dependent(
        tasks,
        cpu=lambda tasks: lax.map(one, tasks),
        default=lambda tasks: _in_chunks(one, tasks, size),
    )


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _train_tasks_over(keys, net, data, init_scores, config, mesh):
    """`_train_tasks`, each device of an auto mesh learning its share."""
    own = (keys, _own_fields(data), init_scores)
    shared = dataclasses.replace(data, **dict.fromkeys(own[1]))
    num_tasks = keys.shape[0]
    padded = mesh.size * -(-num_tasks // mesh.size)
    if padded > num_tasks:
        index = jnp.minimum(jnp.arange(padded), num_tasks - 1)
        own = jax.tree.map(lambda leaf: leaf[index], own)

    def share(own, net, shared):
        keys, fields, init_scores = own
        return _train_tasks(keys, net, dataclasses.replace(shared, **fields), init_scores, config)

    names = mesh.axis_names
    everywhere, scattered = (
        devices.on_axes(names, spec) for spec in (devices.WHOLE, devices.SCATTERED)
    )
    result = jax.shard_map(
        share,
        mesh=mesh,
        in_specs=(scattered, everywhere, everywhere),
        out_specs=scattered,
        # A network may loop from constants of its own, whose type the check would refuse.
        check_vma=False,
    )(own, net, shared)
    if padded > num_tasks:
        result = lax.with_sharding_constraint(result, devices.on_mesh(mesh, devices.WHOLE))
        result = jax.tree.map(lambda leaf: leaf[:num_tasks], result)
    return result


def _in_chunks(one, tasks, size):
    """`one` of each of `tasks`, batched: at most `size` at once, in chunks of equal size.

    Equal chunks need one program; the last repeats the last task, fewer times than there are
    chunks.
    """
    num_tasks = jax.tree.leaves(tasks)[0].shape[0]
    chunks = -(-num_tasks // size)
    size = -(-num_tasks // chunks)
    index = jnp.minimum(jnp.arange(chunks * size), num_tasks - 1).reshape(chunks, size)
    results = lax.map(lambda i: jax.vmap(one)(jax.tree.map(lambda leaf: leaf[i], tasks)), index)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:num_tasks], results)


def batch_indices(key: jax.Array, num_examples: int, config: TrainConfig) -> jax.Array:
    """Examples of each step, int32 [steps, batch_size].

    One epoch after another, each a new order of all examples, cut into batches; a batch may
    straddle two epochs, so no example is ever left out.
    """
    total = config.steps * config.batch_size
    if not config.shuffle:
        return (jnp.arange(total) % num_examples).reshape(config.steps, config.batch_size)
    epochs = -(-total // num_examples)
    keys = jax.random.split(prng.purpose_key(key, "batches"), epochs)
    orders = jax.vmap(lambda k: jax.random.permutation(k, num_examples))(keys)
    return orders.reshape(-1)[:total].reshape(config.steps, config.batch_size)


def working_bytes(net: Network, data: TaskData, config: TrainConfig) -> int:
    """Bytes that learning one task takes beside what tasks share, estimated from above.

    All values of one step, as if each had memory of its own (XLA fuses most of them), and the
    order of the examples. Traces the step, computes nothing.
    """

    def step(key, net, data, scores, batch):
        before = init_train_state(config, scores, net.state)
        return data_step(key, mask_loss(net, config), data, config, before, batch)

    array = jax.ShapeDtypeStruct
    scores = net.layout.tree([array(shape, jnp.float32) for shape in net.layout.shapes.values()])
    batch = (array((), jnp.int32), array((config.batch_size,), jnp.int32))
    jaxpr = jax.make_jaxpr(step)(jax.random.key(0), net, data, scores, batch)
    values = [var.aval for equation in jaxpr.eqns for var in equation.outvars]
    epochs = -(-config.steps * config.batch_size // data.num_examples)
    # A shuffle sorts pairs of a random number and an index from one buffer to another.
    order = 16 * epochs * data.num_examples
    return order + sum(value.size * value.dtype.itemsize for value in values)


@jax.jit
def all_finite(tree: PyTree) -> jax.Array:
    """bool [], whether every leaf is."""
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))


def _own_fields(data):
    """Of many tasks' data, by name, what each has of its own, [T, ...]."""
    if data.labels.ndim == 2:
        return {"images": data.images, "labels": data.labels}
    return {} if data.view is None else {"view": data.view}


def _one_task(data):
    """The data of one of many tasks."""
    own = _own_fields(data)
    return dataclasses.replace(data, **{name: leaf[0] for name, leaf in own.items()})


def _check_many(data, num_tasks):
    """Raises ValueError unless data is of `num_tasks` tasks."""
    if data.labels.ndim == 2 and data.view is not None:
        raise ValueError(
            "images must be [N, ...] and labels [N], which tasks share, beside a view; "
            f"tasks with images of their own take none; got labels {data.labels.shape}"
        )
    for name, leaf in _own_fields(data).items():
        if leaf.ndim < 2 or leaf.shape[0] != num_tasks:
            raise ValueError(
                f"{name} must have a leading axis of {num_tasks} tasks, as many as keys has, "
                f"got shape {leaf.shape}"
            )
    if data.labels.ndim == 2 and data.images.shape[:2] != data.labels.shape:
        raise ValueError(
            "images must be [T, N, ...] and labels [T, N], got "
            f"{data.images.shape} and {data.labels.shape}"
        )
    if data.view is None:
        _one_task(data).check()
    else:
        data.check()


def diverged(config: TrainConfig, where: str = "") -> ValueError:
    """The error of a training that ended without numbers."""
    return ValueError(
        f"training diverged{where}: scores or losses are not finite; "
        f"lower learning_rate ({config.learning_rate:g}) or check the images for NaN"
    )


def _num_tasks(keys):
    if not hasattr(keys, "dtype"):
        raise TypeError(f"keys must be an array of JAX random keys, got {keys!r}")
    typed = jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)
    if not typed and keys.dtype != jnp.uint32:
        raise TypeError(f"keys must be JAX random keys, got dtype {keys.dtype}")
    if keys.ndim != (1 if typed else 2):
        raise ValueError(
            f"keys must be random keys [T], one a task (jax.random.split), got shape {keys.shape}"
        )
    if not keys.shape[0]:
        raise ValueError("keys must hold at least one key, got 0")
    return keys.shape[0]


def check_start(key, net, config, init_scores):
    """Raises TypeError or ValueError unless a task's training can start from these."""
    check_key(key)
    check_types(net, config)
    if isinstance(init_scores, ScoreMean):
        _check_scores(net.layout, init_scores.mean)
    elif init_scores is not None:
        _check_scores(net.layout, init_scores)


def check_types(net, config):
    check_type("net", net, Network)
    check_type("config", config, TrainConfig)
    if config.rule == "topk":
        kept_counts(net.layout, config.density)


def check_finite(result, config):
    """Raises ValueError unless scores and losses, if concrete, are numbers."""
    traced = isinstance(result.loss, jax.core.Tracer)
    if not traced and not bool(all_finite((result.scores, result.loss))):
        raise diverged(config)


def _check_scores(layout, scores):
    for name, leaf in zip(layout.shapes, layout.leaves(scores, "init_scores"), strict=True):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(f"init_scores must be floats, got {jnp.result_type(leaf)} at {name!r}")
        # In NumPy: under the caller's jit, jnp would trace even what is concrete.
        if not isinstance(leaf, jax.core.Tracer) and not np.isfinite(np.asarray(leaf)).all():
            raise ValueError(f"init_scores must be finite, got NaN or infinity at {name!r}")
