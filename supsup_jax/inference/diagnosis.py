"""Which rule names the tasks of these data: measured, and said in words.

One gradient names tasks that the network sees very differently, such as permuted images. Of natural
images every mask makes something, and then it helps to try each alone, to compare raw logits rather
than certainties, to have learned superfluous outputs, and to let several images decide together.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from supsup_jax.checks import check_int
from supsup_jax.devices import in_pieces
from supsup_jax.inference import arguments
from supsup_jax.inference.evaluation import (
    LabelAccuracy,
    check_stream,
    evaluate,
    parts_of,
)
from supsup_jax.inference.search import Rule
from supsup_jax.network import Network, num_outputs
from supsup_jax.objectives import MaxLogit, Standardised, Superfluous, entropy, name_of, of_labels
from supsup_jax.stores.base import TaskStore
from supsup_jax.types import Objective, TaskData, TaskIdError, as_data

# Images that decide together in `diagnose`.
TOGETHER = 16


def measure_statistics(
    net: Network,
    store: TaskStore,
    stream: Sequence[TaskData | Iterable],
    objective: Objective,
    *,
    tasks: Sequence[int] | None = None,
    batch_size: int = 128,
) -> TaskStore:
    """The store, with the mean and deviation of each task's own scores, for `Standardised`.

    A task's scores are -objective(logits) of its own inputs under its own mask and statistics.
    They are kept beside its mask, two floats an objective, through `save`, `DiskStore.extend`,
    `shard`, `remove`; a task that is appended or put in another's place has none until measured.
    stream: of each task data that its mask has not learned, as `evaluate` takes it: of those it has
      learned a network is surer (measured: 7 points of accuracy on CIFAR-10).
    tasks: which to measure, None for all; others keep what they have.
    Raises as `evaluate`, and ValueError for a task whose inputs all score alike.
    """
    check_int("batch_size", batch_size, 1)
    arguments.check_pair(net, store)
    arguments.check_objective(objective)
    if isinstance(objective, Standardised):
        raise TypeError(f"measure the objective itself, {objective.name}, not {objective!r}")
    keep = getattr(store, "with_moments", None)
    if keep is None:
        raise TypeError(f"store must be a MaskStore, got {type(store).__name__}")
    held, name = int(store.num_tasks), name_of(objective)
    before = store.moments.get(name)
    moments = np.zeros((held, 2)) if before is None else np.array(before[:held], np.float64)
    counts = None if store.num_labels is None else np.asarray(store.num_labels)
    check_stream(stream, held)
    for i in range(held) if tasks is None else tasks:
        if not 0 <= i < held:
            raise TaskIdError(f"tasks must lie in [0, {held}), got {i}")
        own = of_labels(objective, None if counts is None else int(counts[i]))
        parts = [
            _scores(net, store, data, i, objective=own, batch_size=batch_size)
            for data in _examples(stream, i)
        ]
        scores = np.concatenate(jax.device_get(parts)).astype(np.float64)
        moments[i] = scores.mean(), scores.std()
        if not np.isfinite(moments[i]).all() or not moments[i, 1]:
            raise ValueError(
                f"the scores of task {i} must differ and be finite, and the {len(scores)} of "
                f"stream[{i}] have mean {moments[i, 0]:g} and deviation {moments[i, 1]:g}"
            )
    return keep({name: moments})


class Finding(NamedTuple):
    """How well one rule does on data of learned tasks.

    rule, objective: as `evaluate` takes them. together: how many images decide.
    task_accuracy: fraction of decisions that named the task. accuracy: of images with the right
      label under the right task.
    """

    rule: str | Rule
    objective: Objective
    together: int
    task_accuracy: float
    accuracy: float


class Diagnosis(NamedTuple):
    """What `diagnose` found; print it for the words.

    given: accuracy where the task is told. chance: 1 / T. findings: the best first, of one image.
    """

    given: float
    chance: float
    findings: tuple[Finding, ...]

    @property
    def best(self) -> Finding:
        """The rule that names the task of a single input most often."""
        return self.findings[0]

    def __str__(self) -> str:
        return "\n".join(_words(self))


def diagnose(
    net: Network,
    store: TaskStore,
    stream: Sequence[TaskData],
    *,
    num_labels: int | None = None,
    batch_size: int = 128,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Diagnosis:
    """Which rule names the tasks of these data best, by trying them.

    stream: of each learned task data that its mask has not learned, as TaskData. The first half of
      each finds the moments for `Standardised`, the second is judged.
    num_labels: how many outputs, the first, are labels; None: as many as the labels in the stream
      say. Outputs beyond them are superfluous.
    progress: wraps the loop over rules.
    The store stays as it is: to use a `Standardised` objective, `measure_statistics` first.
    Raises as `evaluate`, and ValueError for fewer than 2 images a task.
    """
    arguments.check_pair(net, store)
    held = int(store.num_tasks)
    check_stream(stream, held)
    data = [as_data(stream[i], f"stream[{i}]") for i in range(held)]
    if num_labels is None:
        num_labels = 1 + max(int(np.max(each.labels)) for each in data)
    check_int("num_labels", num_labels, 1)
    halves = [_halves(each, i) for i, each in enumerate(data)]
    first, second = zip(*halves, strict=True)
    raw = MaxLogit(num_labels)
    measured = measure_statistics(net, store, first, raw, batch_size=batch_size)
    metric = LabelAccuracy(num_labels)
    rows = evaluate(net, store, second, metric=metric, batch_size=batch_size)
    given = _mean(rows, "accuracy")
    objectives = [entropy]
    if num_outputs(net, data[0]) > num_labels:
        objectives.append(Superfluous(num_labels))
    tries = [("one_shot", objective) for objective in objectives]
    tries += [("oracle", objective) for objective in (*objectives, raw, Standardised(raw))]
    together = min(TOGETHER, *(each.num_examples for each in second))
    found = []
    for rule, objective in progress(tries):
        for deciders in sorted({1, together}):
            protocol = "per_example" if deciders == 1 else f"batch-{deciders}"
            rows = evaluate(
                net,
                measured,
                second,
                protocol,
                objective=objective,
                rule=rule,
                metric=metric,
                batch_size=batch_size,
            )
            means = _mean(rows, "task_accuracy"), _mean(rows, "accuracy")
            found.append(Finding(rule, objective, deciders, *means))
    found.sort(key=lambda each: (each.together, -each.task_accuracy))
    return Diagnosis(given, 1 / held, tuple(found))


def _words(found):
    best, chance = found.best, found.chance
    yield f"Told the task, the network is right on {found.given:.3f} of inputs."
    for together in dict.fromkeys(each.together for each in found.findings):
        who = "one input alone" if together == 1 else f"{together} inputs together"
        yield f"Decided by {who} (chance {chance:.3f}): task accuracy, accuracy"
        yield from (
            f"  {each.task_accuracy:.3f}  {each.accuracy:.3f}  {_told(each)}"
            for each in found.findings
            if each.together == together
        )
    gradient = max(each.task_accuracy for each in found.findings if each.rule == "one_shot")
    # Midway between what chance and certainty would name.
    halfway = (1 + chance) / 2
    if gradient >= 0.99 * best.task_accuracy:
        yield "One gradient names tasks as well as any other rule here: use one_shot."
    elif gradient >= halfway:
        yield (
            f"One gradient names {gradient:.3f} of tasks, {_told(best)} {best.task_accuracy:.3f}: "
            "rerank(best=...) with that objective as its judge has most of both."
        )
    else:
        yield (
            f"One gradient is of little use here ({gradient:.3f}): try each mask by {_told(best)}."
        )
    if best.task_accuracy < halfway:
        yield (
            "No rule is sure of a single input. Let inputs that are known to share a task decide "
            "together (batch-m), and where a turned input is another thing, train with "
            "TrainConfig(views=LabelledViews(labels))."
        )


def _told(each):
    return f"rule={each.rule!r}, objective={name_of(each.objective)}"


def _mean(rows, field):
    return float(np.mean([getattr(row, field) for row in rows]))


def _halves(data, i):
    """Every other example, and the rest."""
    if data.num_examples < 2:
        raise ValueError(f"stream[{i}] must hold at least 2 examples, got {data.num_examples}")

    def part(rows):
        inputs = jax.tree.map(lambda leaf: leaf[rows], data.inputs)
        return dataclasses.replace(data, inputs=inputs, labels=data.labels[rows])

    return part(slice(0, None, 2)), part(slice(1, None, 2))


def _examples(stream, i):
    def check(data, _):
        data.check()

    return (data for _, data in parts_of(stream[i], f"stream[{i}]", None, check))


@functools.partial(jax.jit, static_argnames=("objective", "batch_size"))
def _scores(net, store, data, i, *, objective, batch_size):
    """-objective [N] of the examples under their task's own mask."""
    task = store.task(i)

    def score(index):
        return -objective(net(task.mask, data.batch(index)[0], task.state))

    return in_pieces(score, jnp.arange(data.num_examples), batch_size)
