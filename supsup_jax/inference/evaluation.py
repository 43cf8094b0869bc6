"""Accuracy over a stream of tasks, with the task id given or inferred."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from supsup_jax.checks import check_int
from supsup_jax.devices import in_pieces
from supsup_jax.inference.arguments import check_measured, check_objective, check_pair
from supsup_jax.inference.one_shot import Uncertainty, task_ids
from supsup_jax.inference.predict import predict
from supsup_jax.inference.search import Rule
from supsup_jax.labelled_views import Averaged
from supsup_jax.network import Network, num_outputs
from supsup_jax.objectives import entropy
from supsup_jax.stores.base import TaskStore
from supsup_jax.types import (
    Integers,
    Objective,
    TaskBelief,
    TaskData,
    TaskIdError,
    as_data,
    num_rows,
    shapes_of,
)

# The paper's names (is the id given in training, in testing; are labels shared) and the field's.
SCENARIOS = {"GG": "task-il", "GNs": "domain-il", "GNu": "class-il", "NNs": "task-free"}


class Protocol(NamedTuple):
    """Who decides: of every `context` images in order, groups of `group`, whose first `deciders`
    name the task for all of the group. A stateful network takes its statistics from the context.
    """

    context: int
    group: int
    deciders: int


class Row(NamedTuple):
    """One task's result.

    task: its place in the stream, which is its id in the store unless `ids` said otherwise.
    decisions: how many inferences were made (0 when ids were given).
    accuracy: fraction of images with the right label and, where the task was inferred, under
      the right task: GG for protocol "given", GNu otherwise.
    shared_accuracy: fraction with the right label under any task (GNs).
    task_accuracy: fraction of decisions that named the task; None when ids were given.
    inferred: the id each decision named, int32 [decisions].
    """

    task: int
    accuracy: float
    shared_accuracy: float
    task_accuracy: float | None
    decisions: int
    inferred: np.ndarray

    def __repr__(self) -> str:
        named = "" if self.task_accuracy is None else f", task_accuracy={self.task_accuracy:.4f}"
        return (
            f"Row(task={self.task}, accuracy={self.accuracy:.4f}, "
            f"shared_accuracy={self.shared_accuracy:.4f}{named}, decisions={self.decisions})"
        )


class _Outcome(NamedTuple):
    value: jax.Array  # [N], the metric: whether the label is right
    task: jax.Array  # int32 [N], under which the image was judged
    inferred: jax.Array  # int32 [D]


def parse_scenario(name: str) -> str:
    """ "gg", "gns", "gnu" or "nns" for a scenario's name or alias, in any case.

    Raises ValueError for another name.
    """
    wanted = name.lower() if isinstance(name, str) else name
    for scenario, alias in SCENARIOS.items():
        if wanted in (scenario.lower(), alias):
            return scenario.lower()
    known = ", ".join(f"{scenario} ({alias})" for scenario, alias in SCENARIOS.items())
    raise ValueError(f"scenario must be one of {known}, got {name!r}")


def parse_protocol(name: str, batch_size: int = 128) -> Protocol | None:
    """The protocol of a name; None for "given".

    "paper": the first image of each batch names the task for the batch, as the authors' code
    does. "per_example": every image its own. "batch-m", m a number: m images decide together.
    Raises ValueError for another name.
    """
    if name == "given":
        return None
    if name == "paper":
        return Protocol(batch_size, batch_size, 1)
    if name == "per_example":
        return Protocol(batch_size, 1, 1)
    kind, _, count = name.partition("-") if isinstance(name, str) else ("", "", "")
    if kind == "batch" and count.isdecimal() and int(count) > 0:
        return Protocol(int(count), int(count), int(count))
    raise ValueError(
        "protocol must be one of 'given', 'paper', 'per_example' and 'batch-m' (as in batch-16), "
        f"got {name!r}"
    )


def parse_rule(rule: Rule | Callable | str | None) -> Callable | None:
    """The rule that names tasks, as a function like `one_shot`; None for `one_shot` itself.

    Raises ValueError for a name that is none, TypeError for what cannot be called or hashed.
    """
    rule = Rule(rule) if isinstance(rule, str) else rule
    if rule is None or rule == Rule("one_shot"):
        return None
    if not callable(rule) or not isinstance(rule, Hashable):
        raise TypeError(
            "rule must be a name, a Rule, or a hashable function (net, store, x, objective=, "
            f"per_example=) -> TaskBelief, got {rule!r}"
        )
    return rule


def evaluate(
    net: Network,
    store: TaskStore,
    stream: Sequence[TaskData | Iterable],
    protocol: str = "given",
    *,
    objective: Objective = entropy,
    rule: Rule | Callable | str | None = None,
    metric: Callable | None = None,
    batch_size: int = 128,
    tasks: Integers | None = None,
    ids: Integers | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> list[Row]:
    """A Row for each learned task i, on its test data `stream[i]`, a sequence of TaskData.

    stream: of each task a TaskData, or a pair (inputs, labels). Where memory does not hold them,
      `stream[i]` may also be an iterable of batches, each what `as_data` takes for a TaskData.
      Those who decide together, and the contexts of statistics, are then filled up across batches.
    protocol: "given" (GG); or inferred, "paper" (the first image of each batch names the task for
      the batch), "per_example" (every image its own), "batch-m" (m images decide together).
    objective: what the inference minimises.
    rule: what names the tasks. None: `one_shot`, in its fastest form. A name ("binary_search"), a
      Rule with options (`Rule("rerank", best=3)`), or any function that is called like `one_shot`
      and returns a TaskBelief, traced inside jit, equal by value: with per_example where each
      decision is one image's, and without for m images that decide together. What it names -1
      (see `reject`) counts as wrong.
    metric: (logits [B, C], labels [B, ...]) -> [B], what rows give the mean of as accuracy:
      traced, equal by value. None: whether the largest logit is the label's, as the authors' code
      has it, so that a superfluous output that is largest is wrong; of `LabelledViews.averaged`,
      whose other outputs are views of the same labels, `LabelAccuracy`, which looks at labels
      alone.
    tasks: which of the learned tasks; None for all.
    ids: the store's id of each task of the stream, where masks were found rather than told, and
      may be more or fewer than tasks; -1 where no mask belongs to it. None: task i has id i.
    progress: wraps the loop over tasks, such as tqdm.tqdm.
    Tasks of equal data shape share one compiled program, whatever the number of tasks learned.
    Raises TypeError or ValueError before compiling for arguments that do not fit, such as an
    empty store, a stream shorter than the tasks learned, or test data of fewer images than m.
    """
    check_int("batch_size", batch_size, 1)
    decide = parse_protocol(protocol, batch_size)
    check_pair(net, store)
    check_objective(objective)
    if decide is not None:
        check_measured(objective, store)
    rule = parse_rule(rule)
    if metric is not None:
        check_objective(metric, "metric")
    own = labels_told(net)
    right = metric or (is_right if own is None else LabelAccuracy(own))
    num_tasks = int(store.num_tasks)
    if isinstance(rule, Rule):
        rule.check_tasks(num_tasks)
        check_measured(rule.judge, store)
    ids = range(num_tasks) if ids is None else [int(i) for i in ids]
    tasks = range(len(ids)) if tasks is None else tasks
    check_stream(stream, len(ids))
    _check_ids(tasks, ids, num_tasks, protocol)

    def judge(data, i):
        if decide is None:
            return _given(net, store, data, i, batch_size=batch_size, metric=right)
        how = How(decide, objective, rule, right)
        return _inferred(net, store, data, how=how)

    known = None

    def check(data, name):
        nonlocal known
        data.check()
        known = known or num_outputs(net, data)
        if metric is None:
            data.check_classes(known, name)

    outcomes, counts = [], []
    for i in progress(tasks):
        counts.append(0)
        for name, data in parts_of(stream[i], f"stream[{i}]", decide, check):
            first = not counts[-1]  # the last may be what is left over
            if first and decide is not None and data.num_examples < decide.deciders:
                raise ValueError(
                    f"protocol {protocol!r} needs at least {decide.deciders} test images of each "
                    f"task, {name} holds {data.num_examples}"
                )
            outcomes.append(judge(data, ids[i]))
            counts[-1] += 1
            if len(outcomes) > 1:  # one ahead of the device, and no further
                outcomes[-2] = jax.device_get(outcomes[-2])
        if not counts[-1]:
            raise ValueError(f"stream[{i}] must hold at least one batch, got none")
    parts = iter(jax.device_get(outcomes))
    return [
        _row(i, ids[i], _joined(itertools.islice(parts, count)), decide)
        for i, count in zip(tasks, counts, strict=True)
    ]


def check_stream(stream: Any, num_tasks: int) -> None:
    """Raises TypeError or ValueError unless stream is a sequence of at least so many tasks."""
    if not hasattr(stream, "__getitem__"):
        raise TypeError(
            f"stream must be a sequence of TaskData, such as a stream's .test, "
            f"got {type(stream).__name__}"
        )
    if len(stream) < num_tasks:
        raise ValueError(f"stream must hold test data of {num_tasks} tasks, got {len(stream)}")


def _check_ids(tasks, ids, num_tasks, protocol):
    if outside := [i for i in tasks if not 0 <= i < len(ids)]:
        raise TaskIdError(f"tasks must lie in [0, {len(ids)}), got {outside[0]}")
    least = 0 if protocol == "given" else -1
    if outside := [i for i in tasks if not least <= ids[i] < num_tasks]:
        raise TaskIdError(
            f"ids must lie in [{least}, {num_tasks}) under protocol {protocol!r}, "
            f"got {ids[outside[0]]} for task {outside[0]}"
        )


def parts_of(
    task: Any, name: str, decide: Protocol | None, check: Callable
) -> Iterator[tuple[str, TaskData]]:
    """The TaskData of one task of a stream, each with its name; check(data, name) as they come."""
    pair = isinstance(task, tuple | list) and len(task) == 2 and hasattr(task[1], "__array__")
    if pair or isinstance(task, TaskData | Mapping):
        check(data := as_data(task, name), name)
        yield name, data
        return
    if not isinstance(task, Iterable):
        raise TypeError(f"{name} must be a TaskData, or batches of them, got {type(task).__name__}")
    whole, rest = decide.context if decide else 1, None
    for number, batch in enumerate(task):
        what = f"batch {number} of {name}"
        check(data := as_data(batch, what), what)
        data = data if rest is None else _behind(rest, data)
        end = data.num_examples - data.num_examples % whole
        rest = _part(data, slice(end, None)) if end < data.num_examples else None
        if end:
            yield what, _part(data, slice(end))
    if rest is not None:
        yield f"the last of {name}", rest


def _part(data, rows):
    own = jax.tree.map(lambda leaf: leaf[rows], (data.inputs, data.labels))
    return dataclasses.replace(data, inputs=own[0], labels=own[1])


def _behind(first, second):
    """The examples of one batch and then of another, of the same task."""
    pair = [(data.inputs, data.labels) for data in (first, second)]
    inputs, labels = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *pair)
    return dataclasses.replace(second, inputs=inputs, labels=labels)


def _row(i, mask, outcome, decide):
    # A refusal, -1, names no task, not even where there is none to name.
    named = outcome.inferred[outcome.inferred >= 0] == mask
    under = (outcome.task == mask) & (outcome.task >= 0)
    return Row(
        task=i,
        accuracy=float(np.mean(np.where(under, outcome.value, 0))),
        shared_accuracy=float(np.mean(outcome.value)),
        task_accuracy=None if decide is None else float(np.sum(named) / len(outcome.inferred)),
        decisions=len(outcome.inferred),
        inferred=outcome.inferred,
    )


@functools.partial(jax.jit, static_argnames=("batch_size", "metric"))
def _given(net, store, data, i, *, batch_size, metric):
    task = store.task(i)

    def judge(index):
        x, y = data.batch(index)
        return _measured(metric, net(task.mask, x, task.state), y)

    right = in_pieces(judge, jnp.arange(data.num_examples), batch_size)
    return _Outcome(right, jnp.full(len(right), i, jnp.int32), jnp.zeros(0, jnp.int32))


class How(NamedTuple):
    """Who decides, by which rule and objective, and how outputs are judged."""

    protocol: Protocol
    objective: Objective
    rule: Callable | None
    metric: Callable


class _Test(NamedTuple):
    """A network asked about data."""

    net: Network
    store: TaskStore
    data: TaskData
    how: How


@functools.partial(jax.jit, static_argnames="how")
def _inferred(net, store, data, *, how):
    test = _Test(net, store, data, how)
    num, size = data.num_examples, how.protocol.context
    rest = num % size
    ends = [end for end in ((0, num - rest, size), (num - rest, num, rest)) if end[0] < end[1]]
    return _joined([_outcome(test, *end) for end in ends], jnp)


def _outcome(test, start, stop, width):
    """Of the examples `start` to `stop` in contexts of `width`."""
    index = jnp.arange(start, stop).reshape(-1, width)
    group = min(test.how.protocol.group, width)
    deciders = index.reshape(len(index), -1, group)[:, :, : test.how.protocol.deciders]
    ids = _ids(test, index, deciders)  # [contexts, groups]
    value = lax.map(functools.partial(_judged, test), (index, ids)).reshape(-1)
    each = jnp.repeat(ids.reshape(-1), group)
    # Without a task, -1 of a rule that may refuse, an image has no right label either.
    return _Outcome(jnp.where(each >= 0, value, jnp.zeros_like(value)), each, ids.reshape(-1))


def _judged(test, each):
    """The metric of each image of one context under the task named for it."""
    index, ids = each  # [images], [groups]
    x, y = test.data.batch(index)
    task = ids[0] if len(ids) == 1 else jnp.repeat(ids, len(index) // len(ids))
    return _measured(test.how.metric, predict(test.net, test.store, x, task), y)


def _ids(test, index, deciders):
    """Ids [contexts, groups] named for the examples index [contexts, images]."""
    shape = deciders.shape
    alike = (
        not test.net.has_statistics
    )  # no statistics: decisions are alike, whatever their context
    if test.how.rule is None:
        name = functools.partial(_ids_by_one_shot, test, test.store.mixture())
        if alike:
            return name((index.reshape(-1), deciders.reshape(-1, shape[2]))).reshape(shape[:2])
        return lax.map(name, (index, deciders))
    if alike and test.how.protocol.deciders == 1:
        x, _ = test.data.batch(deciders.reshape(-1))
        name = functools.partial(_named, test, True)
        return in_pieces(name, x, test.how.protocol.context).reshape(shape[:2])
    return lax.map(functools.partial(_ids_by_rule, test), (index, deciders))


def _ids_by_one_shot(test, mixture, context):
    index, deciders = context  # [images], [groups, m]
    uncertainty = Uncertainty.among(
        test.net, test.how.objective, mixture, test.data.batch(index)[0]
    )
    x, _ = test.data.batch(deciders.reshape(-1))
    x = jax.tree.map(lambda leaf: leaf.reshape(*deciders.shape, *leaf.shape[1:]), x)
    return task_ids(uncertainty, test.store, mixture, x)


def _ids_by_rule(test, context):
    index, deciders = context  # all go in: their statistics count, or they are one group
    x, _ = test.data.batch(index)
    if test.how.protocol.deciders > 1:
        return _named(test, False, x)[None]
    return _named(test, True, x)[:: len(index) // len(deciders)]


def _named(test, per_example, x):
    """Ids [B], or [], by a rule that may be the user's."""
    found = test.how.rule(
        test.net, test.store, x, objective=test.how.objective, per_example=per_example
    )
    want = (num_rows(x),) if per_example else ()
    if not isinstance(found, TaskBelief) or jnp.shape(found.task) != want:
        raise TypeError(
            f"rule must return a TaskBelief whose task has shape {want} for x of shape "
            f"{shapes_of(x)} and per_example={per_example}, got {found!r}"
        )
    return found.task


def _joined(outcomes, numpy=np):
    """One outcome of several parts, in order."""
    return jax.tree.map(lambda *part: numpy.concatenate(part), *outcomes)


def is_right(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Whether the largest logit is the label's, bool [B]."""
    return jnp.argmax(logits, axis=-1) == labels


def labels_told(net: Network) -> int | None:
    """How many of the outputs are labels, where the network tells: that of averaged views does."""
    return net.apply.num_labels if isinstance(net.apply, Averaged) else None


@dataclasses.dataclass(frozen=True)
class LabelAccuracy:
    """A metric of `evaluate`: whether the largest of the first `num_labels` logits is the label's.

    Superfluous outputs name the task and are no answer; by default one that is largest is wrong.
    """

    num_labels: int

    def __post_init__(self):
        check_int("num_labels", self.num_labels, 1)

    def __call__(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        return is_right(logits[:, : self.num_labels], labels)


def _measured(metric, logits, labels):
    value = metric(logits, labels)
    if jnp.shape(value) != logits.shape[:1]:
        raise ValueError(
            f"metric must return [B] = [{len(logits)}] for logits [B, C], got {jnp.shape(value)}"
        )
    return value
