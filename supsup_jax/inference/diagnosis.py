"""Which rule names the tasks of these data: measured, and said in words.

One gradient names tasks that the network sees very differently, such as permuted images. Of natural
images every mask makes something, and then it helps to try each alone, to compare raw logits rather
than certainties, to have learned superfluous outputs, and to let several images decide together.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from supsup_jax.checks import check_int
from supsup_jax.devices import in_pieces, on_host
from supsup_jax.inference import arguments
from supsup_jax.inference.evaluation import (
    LabelAccuracy,
    check_stream,
    evaluate,
    labels_told,
    parts_of,
)
from supsup_jax.inference.search import Rule
from supsup_jax.network import Network, num_outputs
from supsup_jax.objectives import MaxLogit, Standardised, Superfluous, entropy, name_of, of_labels
from supsup_jax.stores.base import TaskStore
from supsup_jax.types import Integers, Objective, TaskData, TaskIdError, as_data

# Images that decide together in `diagnose`, and the share of `MaxLogit(normalised=)` that it tries.
TOGETHER = 16
NORMALISED = 0.8


def measure_statistics(
    net: Network,
    store: TaskStore,
    stream: Sequence[TaskData | Iterable],
    objective: Objective,
    *,
    tasks: Integers | None = None,
    batch_size: int = 128,
) -> TaskStore:
    """The store, with the mean and deviation of each task's own scores, for `Standardised`.

    net: the one that will be asked: `LabelledViews.averaged(net)` scores otherwise than `net`, and
      the store keeps of an objective what was measured last.
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
    if any(mark in name for mark in ("<lambda>", "<locals>", " at 0x")):
        raise ValueError(
            f"moments are kept under the objective's name, and {name} is not its alone: pass a "
            "function of a module, or a frozen dataclass"
        )
    before = store.moments.get(name)
    moments = (
        np.zeros((held, 2)) if before is None else np.array(on_host(before)[:held], np.float64)
    )
    counts = None if store.num_labels is None else on_host(store.num_labels)
    check_stream(stream, held)
    for i in range(held) if tasks is None else tasks:
        if not 0 <= i < held:
            raise TaskIdError(f"tasks must lie in [0, {held}), got {i}")
        own = of_labels(objective, None if counts is None else int(counts[i]))
        parts = [
            -own(_logits(net, store, data, i, batch_size=batch_size))
            for data in _examples(stream, i)
        ]
        if not parts:
            raise ValueError(f"stream[{i}] holds no batch: it must hold one at least")
        scores = np.concatenate(jax.device_get(parts)).astype(np.float64)
        moments[i] = scores.mean(), scores.std()
        # What float32 makes of equal scores is no deviation.
        noise = np.finfo(np.float32).eps * np.abs(scores).max()
        if not np.isfinite(moments[i]).all() or moments[i, 1] <= noise:
            raise ValueError(
                f"the scores of task {i} must differ and be finite, and the {len(scores)} of "
                f"stream[{i}] have mean {moments[i, 0]:g} and deviation {moments[i, 1]:g}"
            )
    return keep({name: moments})


class Finding(NamedTuple):
    """How well one rule does on data of learned tasks.

    rule, objective: as `evaluate` takes them. together: how many images decide.
    task_accuracy: fraction of decisions that named the task, mean over tasks. accuracy: of images
      with the right label under the right task. decisions: how many were made.
    """

    rule: str | Rule
    objective: Objective
    together: int
    task_accuracy: float
    accuracy: float
    decisions: int = 0


class Diagnosis(NamedTuple):
    """What `diagnose` found; print it for the words.

    given: accuracy where the task is told. chance: 1 / T. findings: the best first, of one image.
    advice: what else to try, sentences.
    """

    given: float
    chance: float
    findings: tuple[Finding, ...]
    advice: tuple[str, ...] = ()

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

    stream: of each learned task data that its mask has not learned, as TaskData: as many examples
      of each as the smallest has, in its order. Every other one finds the moments for
      `Standardised`, the rest are judged.
    num_labels: how many outputs, the first, are labels; None: as many as `LabelledViews.averaged`
      says, or else the labels in the stream. Outputs beyond them are superfluous. Tasks that tell
      their own number are scored by it.
    progress: wraps the loop over tasks, whose data meets every mask once: T^2 passes of half a
      task's data in all.
    The store stays as it is: to use a `Standardised` objective, `measure_statistics` first.
    Raises as `evaluate` and `measure_statistics`, and ValueError for fewer than 3 images a task.
    """
    arguments.check_pair(net, store)
    check_int("batch_size", batch_size, 1)
    store.check_holds_tasks()
    held = int(store.num_tasks)
    check_stream(stream, held)
    data = [as_data(stream[i], f"stream[{i}]") for i in range(held)]
    if num_labels is None:
        num_labels = labels_told(net) or 1 + max(int(np.max(each.labels)) for each in data)
    check_int("num_labels", num_labels, 1)
    if (fewest := min(each.num_examples for each in data)) < 3:
        raise ValueError(f"each task of stream must hold at least 3 examples, one has {fewest}")
    # Every other example, at least two, which have a deviation; and the rest.
    first, second = ([_rows(each, slice(n, fewest, 2)) for each in data] for n in (0, 1))
    raw = MaxLogit(num_labels)
    measured = measure_statistics(net, store, first, raw, batch_size=batch_size)
    gradients, alone = [entropy], [entropy, raw, Standardised(raw)]
    if num_outputs(net, data[0]) > num_labels:
        gradients.append(Superfluous(num_labels))
        alone += [Superfluous(num_labels), MaxLogit(num_labels, normalised=NORMALISED)]
    sizes = sorted({1, min(TOGETHER, *(each.num_examples for each in second))})
    how = {"metric": LabelAccuracy(num_labels), "batch_size": batch_size}
    found = _by_gradients(net, store, second, gradients, sizes, how)
    given, others = _by_masks(net, measured, second, alone, sizes, how, progress)
    found = sorted(found + others, key=lambda each: (each.together, -each.task_accuracy))
    advice = ()
    if len(gradients) == 1:
        advice = (
            f"The network has no outputs beyond its {num_labels} labels: with some, G "
            "(Superfluous) and LabelledViews could be tried.",
        )
    elif labels_told(net) is None:
        advice = (
            "Where a turned input is another thing, masks learned with TrainConfig(views="
            f"LabelledViews({num_labels})) and asked through its averaged(net) may tell more.",
        )
    return Diagnosis(given, 1 / held, tuple(found), advice)


def _by_gradients(net, store, data, objectives, sizes, how):
    """Findings of `one_shot`."""
    found = []
    for size in sizes:
        protocol = "per_example" if size == 1 else f"batch-{size}"
        for objective in objectives:
            rows = evaluate(net, store, data, protocol, objective=objective, **how)
            named, right = (_mean(rows, field) for field in ("task_accuracy", "accuracy"))
            decisions = sum(row.decisions for row in rows)
            found.append(Finding("one_shot", objective, size, named, right, decisions))
    return found


def _by_masks(net, store, data, objectives, sizes, how, progress):
    """Accuracy with the id, and findings of `oracle`: what a mask makes of a task's data serves all
    objectives and sizes of group.
    """
    held, given = len(data), []
    tried = {(objective, size): [] for objective in objectives for size in sizes}
    for i in progress(range(held)):
        logits = [
            _logits(net, store, data[i], j, batch_size=how["batch_size"]) for j in range(held)
        ]
        labels = jnp.asarray(data[i].labels)
        right = np.stack([how["metric"](each, labels) for each in logits])
        given.append(right[i].mean())
        for objective in objectives:
            scores = np.stack([_score(store, objective, *each) for each in enumerate(logits)])
            for size in sizes:
                tried[objective, size].append(_named(scores, right[i], i, size))
    found = []
    for (objective, size), each in tried.items():
        named, correct, decisions = zip(*each, strict=True)
        found.append(
            Finding(
                "oracle",
                objective,
                size,
                float(np.mean(named)),
                float(np.mean(correct)),
                sum(decisions),
            )
        )
    return float(np.mean(given)), found


def _words(found):
    chance = found.chance
    groups = {n: [f for f in found.findings if f.together == n] for n in _sizes(found.findings)}
    yield f"Told the task, the network is right on {found.given:.3f} of inputs."
    for size, each in groups.items():
        who = "one input alone" if size == 1 else f"{size} inputs together"
        error = _error(each[0])
        counted = f"{each[0].decisions:,} decisions, standard error up to {error:.3f}"
        yield f"Decided by {who} (chance {chance:.3f}; {counted}): task accuracy, accuracy"
        yield from (f"  {f.task_accuracy:.3f}  {f.accuracy:.3f}  {_told(f)}" for f in each)
    unsure = False
    for size, each in groups.items():
        best = max(each, key=lambda f: f.task_accuracy)
        gradient = max(f.task_accuracy for f in each if f.rule == "one_shot")
        who = "By one input" if size == 1 else f"By {size} inputs together"
        if best.task_accuracy < chance + 2 * _error(best):
            yield f"{who} no rule names tasks better than chance."
        elif gradient >= best.task_accuracy - _error(best):
            yield f"{who} one gradient names tasks as well as any other rule: use one_shot."
        else:
            yield f"{who} try each mask: {_told(best)}; one gradient names {gradient:.3f}."
        # Midway between what chance and certainty would name.
        unsure |= size == 1 and best.task_accuracy < (1 + chance) / 2
    if unsure:
        yield (
            "No rule is sure of a single input: let inputs that are known to share a task decide "
            "together."
        )
        yield from found.advice
    yield "Each best was chosen on these inputs: on others it does no better, rather worse."


def _mean(rows, field):
    return float(np.mean([getattr(row, field) for row in rows]))


def _sizes(findings):
    return dict.fromkeys(each.together for each in findings)


def _error(finding):
    """Of a task accuracy of 1/2, which has the largest; 0 where decisions were not counted."""
    return 0.5 / math.sqrt(finding.decisions) if finding.decisions else 0.0


def _told(each):
    return f"rule={each.rule!r}, objective={name_of(each.objective)}"


@functools.partial(jax.jit, static_argnames="batch_size")
def _logits(net, store, data, i, *, batch_size):
    """[N, C] of the examples under task i's mask and statistics."""
    task = store.task(i)

    def under(index):
        return net(task.mask, data.batch(index)[0], task.state)

    return in_pieces(under, jnp.arange(data.num_examples), batch_size)


def _score(store, objective, i, logits):
    """Scores [N] of task i, as `oracle` has them."""
    base = objective.objective if isinstance(objective, Standardised) else objective
    own = of_labels(base, None if store.num_labels is None else int(store.num_labels[i]))
    scores = np.asarray(-own(logits), np.float64)
    if isinstance(objective, Standardised):
        mean, deviation = on_host(store.moments[objective.name])[i]
        scores = (scores - mean) / deviation
    return scores


def _named(scores, right, i, size):
    """Of task i's inputs, scored [T, N] by all and right [N] under their own, decided by so many
    together: fraction of decisions for i, of inputs right under i, and how many decisions.
    """
    groups = range(0, len(right), size)
    named = np.add.reduceat(scores, groups, axis=1).argmax(axis=0) == i
    return named.mean(), (np.repeat(named, size)[: len(right)] & right).mean(), len(named)


def _rows(data, rows):
    inputs = jax.tree.map(lambda leaf: leaf[rows], data.inputs)
    return dataclasses.replace(data, inputs=inputs, labels=data.labels[rows])


def _examples(stream, i):
    def check(data, _):
        data.check()

    return (data for _, data in parts_of(stream[i], f"stream[{i}]", None, check))
