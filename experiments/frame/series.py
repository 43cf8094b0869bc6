"""Finished runs as series: rows that differ in their seed only, averaged, beside the paper's.

What a report says is kept as data too, results.json: an entry a series, so that runs need not be
kept for ever, nor on one machine.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.frame.rows import SPLIT, theirs
from experiments.frame.run import SCHEMA, UsageError, replacing
from supsup_jax.inference.evaluation import SCENARIOS

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
    seeds: int
    paper: float | None
    seconds: float  # training and evaluation, mean over the seeds' whole runs
    device: str
    last: bool  # of its run
    split: dict[str, Any] | None = None
    added: bool = True  # by a run below --runs, rather than kept from the reports before


def read(folder: Path) -> list[dict]:
    """Every finished run below `folder`. Raises UsageError for none, or a damaged one."""
    if not folder.is_dir():
        raise UsageError(f"--runs {folder} is no folder")
    results = map(_loaded, sorted(folder.rglob("result.json")))
    wanted = {"config", "experiment", "rows"}
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
        file.write(f'{{"schema": {SCHEMA}, "entries": [\n{text}\n]}}\n'.encode())


def kept(path: Path, entries: list[Mean]) -> list[Mean]:
    """What the results.json at `path` has of other series than `entries`; nothing where there is
    none.

    Raises UsageError for a damaged one, and where it has a series of `entries` over more seeds.
    """
    if not path.is_file():
        return []
    try:
        rows = [dict(row) for row in _loaded(path)["entries"]]
        series = [Series(*(row.pop(name) for name in Series._fields)) for row in rows]
        found = [Mean(each, **row, added=False) for each, row in zip(series, rows, strict=True)]
    except (KeyError, TypeError) as error:
        raise UsageError(f"{path} is damaged: {error!r}") from error
    new = {entry.series: entry.seeds for entry in entries}
    for of, seeds in ((entry.series, entry.seeds) for entry in found):
        if seeds > new.get(of, seeds):
            raise UsageError(
                f"{path} has {of.method} of {of.network}, {of.tasks} tasks, over {seeds} seeds, "
                f"the runs here over {new[of]}: gather the other seeds' runs with them"
            )
    return [entry for entry in found if entry.series not in new]


def _loaded(path):
    """The JSON at `path`. Raises UsageError where it is damaged, or of another schema."""
    try:
        result = json.loads(path.read_text())
        schema = result["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is damaged: {error!r}") from error
    if schema != SCHEMA:
        raise UsageError(f"{path} has schema {schema}, this release {SCHEMA}")
    return result


def lines(results: list[dict]) -> Iterator[tuple[Series, dict, dict]]:
    """(series, row, result) of every row of every run."""
    for result in results:
        config = result["config"]
        setup = {name: value for name, value in config.items() if name not in NAMED | APART}
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


def means(results: list[dict]) -> list[Mean]:
    """One entry a series, over seeds; a seed seen twice counts once, in its longest run."""
    groups: dict[Series, dict[int, tuple[dict, dict]]] = {}
    for series, row, result in lines(results):
        seeds = groups.setdefault(series, {})
        old = seeds.get(result["seed"])
        if old is None or result["config"]["tasks"] >= old[1]["config"]["tasks"]:
            seeds[result["seed"]] = (row, result)
    return [_mean(series, list(groups[series].values())) for series in sorted(groups, key=order)]


def order(series: Series) -> tuple[str, ...]:
    """By which a report sorts its entries."""
    return tuple("" if value is None else str(value).zfill(6) for value in series)


def _mean(series, found):
    accuracies = [row["accuracy"] for row, _ in found]
    task_accuracies = [row["task_accuracy"] for row, _ in found]
    row, result = found[0]
    last = all(row["tasks_learned"] == result["config"]["tasks"] for row, result in found)
    whole_split = last and series.model in SPLIT and series.scenario == "gg"
    return Mean(
        series,
        float(np.mean(accuracies)),
        float(np.std(accuracies, ddof=1)) if len(found) > 1 else None,
        None if None in task_accuracies else float(np.mean(task_accuracies)),
        sum(row["decisions"] for row, _ in found),
        len(found),
        theirs(result["config"], row),
        float(np.mean([_seconds(result) for _, result in found])),
        result["device"],
        last,
        _split([result for _, result in found]) if whole_split else None,
    )


def _split(results):
    """Means over the seeds' runs, as `Mean.split` has them."""
    given = [each for run in results for each in run["metrics"] if each["scenario"] == "gg"]
    found = {
        "bytes": {
            kind: float(np.mean([run["bytes"][kind] for run in results]))
            for kind in results[0]["bytes"]
        },
        "per_task": np.mean([each["per_task"] for each in given], axis=0).tolist(),
    }
    if layers := results[0].get("kept"):
        kept, weights = np.sum(list(layers.values()), axis=0)
        found["density"] = float(kept / weights)
    return found


def scenario_name(scenario: str) -> str:
    """The paper's spelling."""
    return next(name for name in SCENARIOS if name.lower() == scenario)


def _seconds(result):
    return sum(result["seconds"].get(phase, 0) for phase in ("train", "evaluate", "compile"))
