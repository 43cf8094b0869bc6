"""Learning one task's mask, or many at once: one compiled scan, in which only the scores move."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import Mesh

from supsup_jax import devices, prng
from supsup_jax.checks import check_type, in_trace
from supsup_jax.network import Network
from supsup_jax.training.batches import TrainProgress, begin, finish
from supsup_jax.training.config import TrainConfig
from supsup_jax.training.steps import (
    ScoreMean,
    all_finite,
    batch_indices,
    check_finite,
    check_labels,
    check_scores,
    check_start,
    check_types,
    data_step,
    diverged,
    fit,
    init_train_state,
    learned,
    mask_loss,
    split_rows,
    start_scores,
    whole_network,
)
from supsup_jax.types import PyTree, TaskData, TrainResult, shapes_of

# How often a task's training reports, at most twice as often.
REPORTS = 20
# Working memory of the tasks that `train_tasks` batches, as `working_bytes` estimates it: 88 tasks
# of LeNet-300-100 with 100 outputs, or 13 of FC-1024-1024 with 500. Chosen by counting, to keep
# launches few beside work and the whole within a small GPU; not tuned on one.
CHUNK_BYTES = 2 * 2**30


def train_task(
    key: jax.Array,
    net: Network,
    data: TaskData,
    config: TrainConfig = TrainConfig(),
    init_scores: PyTree | ScoreMean | None = None,
    *,
    mesh: Mesh | None = None,
    on_step: Callable[[int, TrainProgress], None] | None = None,
) -> TrainResult:
    """Learns one task: config's loss over all C outputs, with the network's weights fixed.

    key: draws the scores, the order of the examples and what the network drops, each from a key
      of its own.
    init_scores: where scores start, pytree like a mask; drawn when None. A ScoreMean starts them
      at the mean of earlier tasks' scores (the paper's transfer). It is not consumed. "all" starts
      from the whole network, by the magnitudes of its weights (`whole_network`): what weights that
      were trained want, half of which a drawn start would drop.
    mesh: splits each batch over the devices along its axis `data`, and the compiler sums their
      gradients: what one device learns, to rounding. The result lies on every device.
    on_step: called some `REPORTS` times with the number of steps taken and the progress after them,
      as by `train_on_batches`; the next steps consume that progress.
    Equal shapes and an equal config compile once, for any key, weights, data and view. All steps
    are one program; with on_step the host calls one of some steps, again and again. Equal to
    rounding. Differentiable itself, such as in the weights, by sgd: the roots of rmsprop and adam
    have no derivative where a gradient is 0.
    Raises TypeError or ValueError before compiling for inputs that do not fit, such as a batch
    that the devices do not divide, or on_step inside jit, and ValueError when training ends with
    scores or losses that are not finite.
    """
    init_scores = check_start(key, net, config, init_scores)
    check_type("data", data, TaskData)
    data.check()
    check_labels(net, data, config)
    traced = in_trace(key, net, data, init_scores)
    if traced and on_step is not None:
        raise ValueError("on_step is called by the host: it has no meaning inside jit")
    if mesh is not None:
        devices.check_mesh(mesh, devices.DATA)
        if config.batch_size % (parts := mesh.shape[devices.DATA]):
            raise ValueError(
                f"batch_size must be a multiple of the {parts} devices along the axis "
                f"{devices.DATA!r} of mesh, got {config.batch_size}"
            )
        mesh = devices.auto(mesh)
        if not mesh.is_multi_process:  # of several hosts each has them, and jit takes them so
            key, net, data, init_scores = jax.device_put(
                (key, net, data, init_scores), devices.on_mesh(mesh, devices.WHOLE)
            )
    if on_step is None:
        result = _train(key, net, data, init_scores, config, mesh)
    else:
        result = _reporting(key, net, data, init_scores, config, mesh, on_step)
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
    on_step: Callable[[int, TrainResult], None] | None = None,
) -> TrainResult:
    """Learns T tasks in one program: what `train_task` learns of each key and view, to rounding.

    keys: random keys [T], one a task.
    data: inputs [N, ...] and labels [N] that all tasks share, never copied; its view is
      [T, ...], one a task, or None where the tasks differ in their keys only. Or inputs
      [T, N, ...] and labels [T, N], each task its own, without a view.
    init_scores: where scores start, each leaf [T, ...]; drawn when None. It is not consumed.
    mesh: deals the tasks out to all its devices, an even share of consecutive ones to each, which
      learn without a word to each other. T need not be a multiple of them: the last task is then
      learned more than once. The result lies where it was learned, or, in that case, everywhere.
    on_step: called with the number of tasks learned and the result of the latest, [t, ...], each
      time that some are; not with a mesh.
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
    if isinstance(init_scores, str):
        one = whole_network(net, config, init_scores)
        init_scores = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], num_tasks, axis=0), one)
    if init_scores is not None:
        shapes = tuple((name, (num_tasks, *shape)) for name, shape in net.layout.named_shapes)
        check_scores(dataclasses.replace(net.layout, named_shapes=shapes), init_scores)
    _check_many(data, num_tasks, config)
    one = _one_task(data, num_tasks, config)
    if "labels" in _own_fields(data, num_tasks, config):  # the values of all tasks' count
        one = dataclasses.replace(one, labels=data.labels.reshape(-1, *data.labels.shape[2:]))
    check_labels(net, one, config)
    traced = in_trace(keys, net, data, init_scores)
    if on_step is not None and (traced or mesh is not None):
        raise ValueError("on_step is called by the host: it has no meaning inside jit or on a mesh")
    if on_step is not None:
        result = _in_groups(keys, net, data, init_scores, config, on_step)
    elif mesh is None:
        result = _train_tasks(keys, net, data, init_scores, config)
    else:
        devices.check_mesh(mesh, devices.TASK)
        result = _train_tasks_over(keys, net, data, init_scores, config, devices.auto(mesh))
    if not isinstance(result.loss, Tracer):
        finite = devices.on_host(jax.vmap(all_finite)((result.scores, result.loss)))
        if not finite.all():
            bad = np.flatnonzero(~finite)
            some = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
            raise diverged(config, f" in {len(bad)} of {num_tasks} tasks ({some})")
    return result


def _reporting(key, net, data, init_scores, config, mesh, on_step):
    """`_train` in calls of some steps each, between which the host reports."""
    progress, order = _begin(key, net, data, init_scores, config)
    some = -(-config.steps // REPORTS)
    done, behind = 0, None
    while done < config.steps:
        done = min(done + some, config.steps)
        progress, loss = _advance(
            key, net, data, order, progress, np.int32(done), config=config, mesh=mesh
        )
        if behind is not None:  # the host stays one call ahead of the device, and no further
            behind.block_until_ready()
        behind = loss
        on_step(done, progress)
    return finish(net, progress, config)


@functools.partial(jax.jit, static_argnames="config")
def _begin(key, net, data, init_scores, config):
    state = init_train_state(key, config, start_scores(key, net, init_scores), net.state)
    order = batch_indices(key, data.num_examples, config, data.labels)
    # Copies, as the first call consumes them.
    return jax.tree.map(jnp.copy, begin(state, config)), order


@functools.partial(jax.jit, static_argnames=("config", "mesh"), donate_argnames="progress")
def _advance(key, net, data, order, progress, until, *, config, mesh):
    loss = mask_loss(net, config)
    if mesh is not None:
        loss = split_rows(loss, mesh)
    step = functools.partial(data_step, prng.purpose_key(key, "augment"), loss, data, config)

    def advance(i, carry):
        progress, _ = carry
        state, value = step(progress.state, (i, order[i]))
        return TrainProgress(i + 1, progress.loss.at[i].set(value), state), value

    start = progress, jnp.zeros((), progress.loss.dtype)
    return lax.fori_loop(progress.step, until, advance, start)


def _in_groups(keys, net, data, init_scores, config, on_step):
    """`_train_tasks` of some tasks at a time, one on a CPU, between which the host reports."""
    num_tasks, size = keys.shape[0], 1
    if jax.default_backend() != "cpu":
        one = _one_task(data, num_tasks, config)
        size = max(1, CHUNK_BYTES // working_bytes(net, one, config))
    own, parts = _own_fields(data, num_tasks, config), []
    for start in range(0, num_tasks, size):
        some = jax.tree.map(lambda leaf: leaf[start : start + size], (keys, own, init_scores))  # noqa: B023
        here, fields, scores = some
        result = _train_tasks(here, net, dataclasses.replace(data, **fields), scores, config)
        parts.append(result)
        on_step(min(start + size, num_tasks), result)
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


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

    tasks = (keys, _own_fields(data, keys.shape[0], config), init_scores)
    if together is not None:
        return _in_chunks(one, tasks, together)
    size = max(1, CHUNK_BYTES // working_bytes(net, _one_task(data, keys.shape[0], config), config))
    return lax.platform_dependent(
        tasks,
        cpu=lambda tasks: lax.map(one, tasks),
        default=lambda tasks: _in_chunks(one, tasks, size),
    )


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _train_tasks_over(keys, net, data, init_scores, config, mesh):
    """`_train_tasks`, each device of an auto mesh learning its share."""
    own = (keys, _own_fields(data, keys.shape[0], config), init_scores)
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


def working_bytes(net: Network, data: TaskData, config: TrainConfig) -> int:
    """Bytes that learning one task takes beside what tasks share, estimated from above.

    All values of one step, as if each had memory of its own (XLA fuses most of them), and the
    order of the examples. Traces the step, computes nothing.
    """

    def step(key, net, data, scores, batch):
        before = init_train_state(key, config, scores, net.state)
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


def _own_fields(data, num_tasks, config):
    """Of many tasks' data, by name, what each has of its own, [T, ...]."""
    own = data.labels.ndim > 1
    if not config.takes_classes:  # labels of several axes may be shared, too
        leading = {leaf.shape[:2] for leaf in jax.tree.leaves((data.inputs, data.labels))}
        own = leading == {data.labels.shape[:2]} and len(data.labels) == num_tasks
        bare = isinstance(data.inputs, jax.Array) and data.inputs.ndim < 3
        own = own and data.view is None and not bare
    if own:
        return {"inputs": data.inputs, "labels": data.labels}
    return {} if data.view is None else {"view": data.view}


def _one_task(data, num_tasks, config):
    """The data of one of many tasks."""
    own = _own_fields(data, num_tasks, config)
    return dataclasses.replace(data, **jax.tree.map(lambda leaf: leaf[0], own))


def _check_many(data, num_tasks, config):
    """Raises ValueError unless data is of `num_tasks` tasks."""
    own = _own_fields(data, num_tasks, config)
    if "labels" in own and data.view is not None:
        raise ValueError(
            "inputs must be [N, ...] and labels [N], which tasks share, beside a view; "
            f"tasks with inputs of their own take none; got labels {data.labels.shape}"
        )
    for name, field in own.items():
        for leaf in jax.tree.leaves(field):
            if leaf.ndim < 2 or leaf.shape[0] != num_tasks:
                raise ValueError(
                    f"{name} must have a leading axis of {num_tasks} tasks, as many as keys has, "
                    f"got shape {leaf.shape}"
                )
    leaves = jax.tree.leaves(data.inputs)
    if "labels" in own and any(leaf.shape[:2] != data.labels.shape[:2] for leaf in leaves):
        raise ValueError(
            "inputs must be [T, N, ...] and labels [T, N], got "
            f"{shapes_of(data.inputs)} and {data.labels.shape}"
        )
    if data.view is None:
        _one_task(data, num_tasks, config).check()
    else:
        data.check()


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
