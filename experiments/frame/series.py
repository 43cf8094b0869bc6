"""Finished runs as series: rows that differ in their seed only, averaged, beside the paper's.

What a report says is kept as data too, results.json: an entry a series, so that runs need not be
kept for ever, nor on one machine.
"""

import functools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.frame.rows import SPLIT, theirs
from experiments.frame.run import SCHEMA, UsageError, replacing
from supsup_jax.inference.evaluation import SCENARIOS

# Of results.json: 2 names the seeds, the setup and the tasks judged.
REPORT_SCHEMA = 2
NETWORKS = {
    "lenet_300_100": "LeNet-300-100",
    "fc_1024_1024": "FC-1024-1024",
    "notebook_300_300": "784-300-300",
    "bnnet": "BNNet",
    "gem_resnet18": "GEMResNet18",
    "resnet50": "ResNet-50",
}
# Fields of a config that a series names, and those that do not change its numbers.
NAMED = {"dataset", "model", "outputs", "method", "stream"}
APART = {
    "seed",
    "tasks",
    "checkpoints",
    "protocols",
    "objectives",
    "images_per_task",
    "judge_most",
    "every_image_at_the_end",
    "save_every",
}
EXPERIMENTS = {
    "permuted": "permuted",
    "rotated": "rotated",
    "nns": "permuted, no ids",
    "split_mnist": "split",
}


class Series(NamedTuple):
    """What must agree for results to differ in their seed only."""

    experiment: str
    dataset: str
    model: str
    outputs: int
    method: str
    scenario: str
    objective: str | None
    protocol: str
    images: int | None
    setup: str  # the rest of the config, as JSON
    tasks: int
    judged: int  # of these, evenly spread

    @property
    def network(self) -> str:
        width, scale = self.field("width"), self.field("scale")
        name = NETWORKS.get(self.model, self.model)
        if self.model == "bnnet":
            name += f"-{width}-{width}"
        elif width:
            name += f" of width {width}"
        if scale:
            name += f", density by s = {scale:g}"
        return f"{name}, {self.outputs} outputs"

    def field(self, name: str) -> Any:
        """Of the setup; None where it has none of the name."""
        return json.loads(self.setup).get(name)


class Mean(NamedTuple):
    """One line: mean and deviation over seeds, and what the paper has.

    split: of whole runs of split classes, the id given: "bytes" by kind, "density" where masks were
      learned (weights kept, of all), and "per_task", the accuracy of each task.
    """

    series: Series
    accuracy: float
    deviation: float | None  # of the sample; None of one seed
    task_accuracy: float | None
    decisions: int
    seeds: list[int]
    paper: float | None
    seconds: float  # training and evaluation, mean over the seeds' whole runs
    device: str
    last: bool  # of its run
    split: dict[str, Any] | None = None
    added: bool = True  # to by a run below --runs, rather than kept from the reports before


def read(folder: Path) -> list[dict]:
    """Every finished run below `folder`. Raises UsageError for none, or a damaged one."""
    if not folder.is_dir():
        raise UsageError(f"--runs {folder} is no folder")
    results = (_loaded(path, SCHEMA) for path in sorted(folder.rglob("result.json")))
    wanted = {"config", "experiment", "rows", "seed", "seconds", "device"}
    if not (found := [result for result in results if wanted <= set(result)]):
        raise UsageError(f"--runs {folder} holds no finished run (no result.json below it)")
    return found


def save(path: Path, entries: list[Mean]) -> None:
    """Writes results.json, a line an entry."""
    rows = [entry._asdict() | entry.series._asdict() for entry in entries]
    for row in rows:
        del row["series"], row["added"]
    text = ",\n".join(map(json.dumps, rows))
    with replacing(path) as file:
        file.write(f'{{"schema": {REPORT_SCHEMA}, "entries": [\n{text}\n]}}\n'.encode())


def kept(path: Path) -> list[Mean]:
    """The entries of the results.json at `path`. Raises UsageError for a damaged one."""
    try:
        rows = [dict(row) for row in _loaded(path, REPORT_SCHEMA)["entries"]]
        series = [Series(*(row.pop(name) for name in Series._fields)) for row in rows]
        return [Mean(each, **row, added=False) for each, row in zip(series, rows, strict=True)]
    except (KeyError, TypeError) as error:
        raise UsageError(f"{path} is damaged: {error!r}") from error


def _loaded(path, wanted):
    """The JSON at `path`. Raises UsageError where it is damaged, or of another schema."""
    try:
        result = json.loads(path.read_text())
        schema = result["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is damaged: {error!r}") from error
    if schema != wanted:
        raise UsageError(f"{path} has schema {schema}, this release {wanted}")
    return result


def lines(results: list[dict]) -> Iterator[tuple[Series, dict, dict]]:
    """(series, row, result) of every row of every run."""
    for result in results:
        config = result["config"]
        setup = _given({n: value for n, value in config.items() if n not in NAMED | APART})
        for row in result["rows"]:
            yield (
                Series(
                    result["experiment"],
                    config["dataset"],
                    config["model"],
                    config["outputs"],
                    row["method"],
                    row["scenario"],
                    row["objective"],
                    row["protocol"],
                    row.get("images_per_task"),
                    json.dumps(setup, sort_keys=True),
                    row["tasks_learned"],
                    len(range(0, row["tasks_learned"], row.get("judge_every", 1))),
                ),
                row,
                result,
            )


def means(results: list[dict], before: Sequence[Mean] = ()) -> list[Mean]:
    """One entry a series, over seeds: of these runs, and of the entries before.

    A seed counts once: in its longest run, and in an entry before unless all of that entry's seeds
    come anew.
    """
    found: dict[Series, dict[int, tuple[int, Mean]]] = {}
    for series, row, result in lines(results):
        seeds, tasks = found.setdefault(series, {}), result["config"]["tasks"]
        if tasks >= seeds.get(result["seed"], (0,))[0]:
            seeds[result["seed"]] = (tasks, _of_run(series, row, result))
    entries = {entry.series: entry for entry in before}
    for series, seeds in found.items():
        new = [entry for _, (_, entry) in sorted(seeds.items())]
        old = entries.get(series)
        if old is not None and not set(old.seeds) <= seeds.keys():
            new = [old, *(entry for entry in new if entry.seeds[0] not in old.seeds)]
        pooled = functools.reduce(pool, new)
        entries[series] = pooled._replace(last=pooled.last or (old is not None and old.last))
    return sorted(entries.values(), key=lambda entry: order(entry.series))


def pool(a: Mean, b: Mean) -> Mean:
    """Two entries of one series, and of different seeds, as one."""
    m, n = len(a.seeds), len(b.seeds)

    def mean(x, y):
        return (m * x + n * y) / (m + n)

    squares = m * n / (m + n) * (a.accuracy - b.accuracy) ** 2
    squares += (m - 1) * (a.deviation or 0) ** 2 + (n - 1) * (b.deviation or 0) ** 2
    return a._replace(
        accuracy=mean(a.accuracy, b.accuracy),
        deviation=math.sqrt(squares / (m + n - 1)),
        task_accuracy=None if a.task_accuracy is None else mean(a.task_accuracy, b.task_accuracy),
        decisions=a.decisions + b.decisions,
        seeds=sorted(a.seeds + b.seeds),
        seconds=mean(a.seconds, b.seconds),
        device="; ".join(sorted({*a.device.split("; "), *b.device.split("; ")})),
        last=a.last or b.last,
        split=jax.tree.map(mean, a.split, b.split) if a.split and b.split else None,
        added=a.added or b.added,
    )


def order(series: Series) -> tuple[str, ...]:
    """By which a report sorts its entries."""
    return tuple("" if value is None else str(value).zfill(6) for value in series)


def distinctions(series: Iterable[Series]) -> dict[Series, str]:
    """Of each series, in words, what of its setup others lack that look like it; or ""."""
    alike: dict[Series, list[Series]] = {}
    for each in series:
        seen = each._replace(model=each.network, setup="", tasks=0, judged=0)
        alike.setdefault(seen, []).append(each)
    found = {}
    for group in alike.values():
        setups = {each.setup: json.loads(each.setup) for each in group}
        words: dict[str, list[str]] = {setup: [] for setup in setups}
        for name, values in _differing(list(setups.values())):
            for setup, value in zip(setups, values, strict=True):
                words[setup].append(f"{name} {'given' if isinstance(value, dict) else value}")
        found |= {each: ", ".join(words[each.setup]) for each in group}
    return found


def _differing(values, name=""):
    """(name, its values) of the fields that not all setups share."""
    if all(isinstance(value, dict) for value in values):
        for key in sorted(set().union(*values)):
            yield from _differing([v.get(key) for v in values], f"{name}.{key}".lstrip("."))
    elif any(value != values[0] for value in values):
        yield name, values


def _given(setup):
    """Without the fields that are off, so that one that a release adds changes no setup."""
    return {
        name: _given(value) if isinstance(value, dict) else value
        for name, value in setup.items()
        if value is not None and value is not False
    }


def _of_run(series, row, result):
    """The entry of one run, which is one seed."""
    last = row["tasks_learned"] == result["config"]["tasks"]
    whole = last and series.judged == series.tasks and series.scenario == "gg"
    return Mean(
        series,
        row["accuracy"],
        None,
        row["task_accuracy"],
        row["decisions"],
        [result["seed"]],
        theirs(result["config"], row),
        sum(result["seconds"].get(phase, 0) for phase in ("train", "evaluate", "compile")),
        result["device"],
        last,
        _split(result) if whole and series.model in SPLIT else None,
    )


def _split(result):
    """As `Mean.split` has it."""
    (given,) = [each for each in result["metrics"] if each["scenario"] == "gg"]
    found = {"bytes": result["bytes"], "per_task": given["per_task"]}
    if layers := result.get("kept"):
        kept, weights = np.sum(list(layers.values()), axis=0)
        found["density"] = float(kept / weights)
    return found


def scenario_name(scenario: str) -> str:
    """The paper's spelling."""
    return next(name for name in SCENARIOS if name.lower() == scenario)
