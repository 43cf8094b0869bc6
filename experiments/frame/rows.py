"""What a run measured: its rows, and from them its accuracy matrices, metrics, CSV and table."""

import csv
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.frame import paper
from supsup_jax import metrics
from supsup_jax.layout import Layout
from supsup_jax.stores import codecs

# Networks of split classes, whose numbers in the paper are all with the id.
SPLIT = ("gem_resnet18", "small_resnet", "resnet50")
EPOCHS = {"cifar100": 250, "imagenet2012": 100}  # of the paper's
# Methods whose numbers in the paper are without an id, and by which protocol; the others' are with.
INFERRED = {"supsup": "paper", "nns": "paper", "hopsupsup": "stream"}
SERIES = ("method", "scenario", "objective", "protocol", "images_per_task")


@dataclasses.dataclass(frozen=True)
class Row:
    """How well one method, judged in one way, did on the tasks learned so far.

    scenario: gg, gns, gnu or nns.
    per_task: the accuracy of each task judged, as fractions.
    objective, protocol: what inference minimised, and who decided; None and "given" with the id.
    images_per_task: how many test images of each task were looked at; None for all.
    task_accuracy: of the decisions; None where that has no meaning.
    tasks_learned: None where all of them were judged. judge_every: tasks 0, n, 2n, ... were judged.
    more: what a script measured beside, by name.
    """

    method: str
    scenario: str
    per_task: list[float]
    objective: str | None = None
    protocol: str = "given"
    images_per_task: int | None = None
    decisions: int = 0
    task_accuracy: float | None = None
    more: dict[str, Any] = dataclasses.field(default_factory=dict)
    tasks_learned: int | None = None
    judge_every: int = 1

    def __post_init__(self):
        if self.tasks_learned is None:
            object.__setattr__(self, "tasks_learned", len(self.per_task))

    @property
    def accuracy(self) -> float:
        """Mean over the tasks."""
        return float(np.mean(self.per_task))

    def json(self) -> dict[str, Any]:
        """As progress.json holds it, and result.json without `per_task`; what follows reads it."""
        fields = {name: getattr(self, name) for name in (*SERIES, "tasks_learned", "decisions")}
        fields |= {"judge_every": self.judge_every} if self.judge_every > 1 else {}
        accuracies = {"accuracy": self.accuracy, "task_accuracy": self.task_accuracy}
        return fields | accuracies | self.more | {"per_task": self.per_task}


def evaluated(
    protocol: str,
    objective: str | None,
    images: int | None,
    measured: list,
    method: str,
    **sample: Any,
) -> list[Row]:
    """The rows of one `ss.evaluate`: GG when ids were given, else GNs and GNu.

    sample: tasks_learned and judge_every, where not all tasks were judged.
    """
    accuracies = {"gg": [row.accuracy for row in measured]}
    decisions = sum(row.decisions for row in measured)
    task_accuracy = None
    if protocol != "given":
        accuracies = {"gns": [row.shared_accuracy for row in measured], "gnu": accuracies["gg"]}
        right = sum(int(np.sum(row.inferred == row.task)) for row in measured)
        task_accuracy = right / decisions
    how = (objective, protocol, images, decisions, task_accuracy)
    return [
        Row(method, scenario, per_task, *how, **sample) for scenario, per_task in accuracies.items()
    ]


def summary(measured: list[Row]) -> str:
    """A line on a checkpoint: the first row with the id, and the first without."""
    given = next(row for row in measured if row.protocol == "given")
    said = f"{given.tasks_learned} tasks: {given.accuracy:.4f} given"
    for row in measured:
        if row.protocol != "given" and row.scenario != "gns":
            said += f", {row.accuracy:.4f} inferred ({row.protocol}, {row.objective})"
            return said + f", task accuracy {row.task_accuracy:.4f}"
    return said


def points(rows: list[dict]) -> dict[int, float]:
    """Accuracy by tasks learned, as a picture takes it."""
    return {row["tasks_learned"]: row["accuracy"] for row in rows}


def find(rows: list[dict], **fields: Any) -> list[dict]:
    """The rows with these values, by tasks learned."""
    found = [row for row in rows if all(row[name] == value for name, value in fields.items())]
    return sorted(found, key=lambda row: row["tasks_learned"])


def series(rows: list[dict]) -> dict[tuple, list[dict]]:
    """Rows of one method, scenario, objective, protocol and set of images, by those five."""
    keys = dict.fromkeys(tuple(row[name] for name in SERIES) for row in rows)
    return {key: find(rows, **dict(zip(SERIES, key, strict=True))) for key in keys}


def accuracy_rows(rows: list[dict]) -> np.ndarray | None:
    """The measured rows of the accuracy matrix R of one series, [checkpoints, T]: NaN above the
    diagonal. None where a checkpoint judged a sample of the tasks.
    """
    if any(row.get("judge_every", 1) > 1 for row in rows):
        return None
    measured = np.full((len(rows), rows[-1]["tasks_learned"]), np.nan)
    for accuracies, row in zip(measured, rows, strict=True):
        accuracies[: row["tasks_learned"]] = row["per_task"]
    return measured


def continual_metrics(rows: list[dict]) -> list[dict]:
    """ACC, and where all tasks were judged average incremental accuracy, forgetting and BWT of each
    series; the accuracies of its tasks at the end.
    """
    found = []
    for key, of_series in series(rows).items():
        measured: dict[str, Any] = dict(zip(SERIES, key, strict=True))
        measured["measured_after"] = [row["tasks_learned"] for row in of_series]
        measured["acc"] = of_series[-1]["accuracy"]
        if (accuracies := accuracy_rows(of_series)) is not None:
            R = np.full((accuracies.shape[1],) * 2, np.nan)
            R[[learned - 1 for learned in measured["measured_after"]]] = accuracies
            measured["average_incremental_accuracy"] = metrics.average_incremental_accuracy(R)
            measured["forgetting"] = metrics.forgetting(R)
            measured["bwt"] = metrics.backward_transfer(R)
        found.append(measured | {"per_task": of_series[-1]["per_task"]})
    return found


def store_bytes(masks: Iterable, layout: Layout, state_bytes: int, path: Path) -> dict[str, float]:
    """Bytes of what a run keeps; of the masks also as each codec would take, and their bound.

    masks: one after another, so that memory need not hold them all.
    state_bytes: of the normalisation statistics of one task.
    path: of the file, or the folder of files, that they are saved in.
    """
    files = list(path.iterdir()) if path.is_dir() else [path]
    coded = [codecs.coded_bytes(mask) for mask in masks]
    words = len(coded) * layout.num_words * 4
    statistics = len(coded) * state_bytes
    return {
        "masks": words,
        "masks_bound": round(sum(each.bound for each in coded)),
        "masks_enumerative": sum(each.enumerative for each in coded),
        "masks_csc16_indices": sum(each.csc16_indices for each in coded),
        "norm_statistics": statistics,
        "heads": 0,
        "seed": 4,
        "total": words + statistics + 4,
        "store_file": sum(file.stat().st_size for file in files),
    }


def write_csv(path: Path, rows: list[dict]) -> None:
    """R in long form: a line for each accuracy measured."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*SERIES, "tasks_learned", "task", "accuracy"])
        for row in rows:
            shared = [row[name] for name in SERIES] + [row["tasks_learned"]]
            step = row.get("judge_every", 1)
            writer.writerows([*shared, step * i, each] for i, each in enumerate(row["per_task"]))


def figure(config: dict) -> str | None:
    """The paper's figure that a run repeats, as `paper.CURVES` names it.

    Baselines have as many outputs as there are labels, and belong to their network's figure.
    """
    if config["model"] in SPLIT:
        if config["epochs"] != EPOCHS.get(config["dataset"]):
            return None
        return f"{config['dataset']}/{config['scale']:g}" if config["scale"] else config["dataset"]
    if config["dataset"] != "mnist" or config["stream"] == "rotated":
        return None
    if "train" in config and config["train"]["steps"] != 1000:
        return None
    outputs = config["outputs"]
    if config["method"] in INFERRED or config["method"] == "abatche":
        return f"{config['model']}/{outputs}"
    wide = {"lenet_300_100": 100, "fc_1024_1024": 500}.get(config["model"], outputs)
    return f"{config['model']}/{wide}"


def theirs(config: dict, row: dict) -> float | None:
    """The paper's number for a row, where it has one: on all test images, the task inferred or
    given as in the paper.
    """
    method = "nns" if row["scenario"] == "nns" else row["method"]
    if row["scenario"] == "gns" or row.get("images_per_task") is not None:
        return None
    inferred = {} if config["model"] in SPLIT else INFERRED
    if row["protocol"] != inferred.get(method, "given"):
        return None
    curve = paper.CURVES.get((figure(config), method, row["objective"]), {})
    return curve.get(row["tasks_learned"])


def print_table(result: dict) -> None:
    """Ours beside the paper's, a line a row; then seconds and bytes."""
    print(
        "\ntasks  method           scenario  objective       protocol     images    ours   paper"
        "     diff  task acc  decisions"
    )
    for row in result["rows"]:
        known = theirs(result["config"], row)
        print(
            f"{row['tasks_learned']:5}  {row['method']:15}  {row['scenario']:8}  "
            f"{row['objective'] or '-':14}  "
            f"{row['protocol']:11}  {row['images_per_task'] or 'all':>6}  {row['accuracy']:.4f}  "
            f"{_number(known, '6.4f')}  {_number(known and row['accuracy'] - known, '+7.4f')}  "
            f"{_number(row['task_accuracy'], '8.4f')}  {row['decisions']:9}"
        )
    spent = ", ".join(f"{name} {seconds:.1f}" for name, seconds in result["seconds"].items())
    print(f"\nseconds: {spent}")
    print("bytes: " + ", ".join(f"{name} {size:,}" for name, size in result["bytes"].items()))
    if layers := result.get("kept"):
        print("\nkept a task, of each layer:")
        for name, (kept, size) in layers.items():
            print(f"{kept:10,} of {size:10,}  {kept / size:7.2%}  {name}")


def _number(value, form):
    width = int(form.strip("+").split(".")[0])
    return "-".rjust(width) if value is None else f"{value:{form}}"
