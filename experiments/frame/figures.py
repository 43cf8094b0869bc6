"""Pictures of split runs: accuracy against bytes (Figure 2), against density, and what transfer
gains. `report` draws them where there are such runs.
"""

from pathlib import Path

import numpy as np

from experiments.frame import plots
from experiments.frame import rows as reports

# Of a mask learner's bytes, each with a style: the masks as coded here, and as the paper counts.
CODED = {"masks_enumerative": ("entropy-coded", "o-"), "masks_csc16_indices": ("csc16", "o--")}


def draw(out: Path, results: list[dict]) -> list[str]:
    """The figures of every kind of split run; the names of the files."""
    named = []
    for (dataset, model, width, tasks, epochs), runs in _by_kind(results).items():
        kind = f"{dataset}_{width}x{tasks}x{epochs}"
        title = f"{dataset}, {model} of width {width}, {tasks} tasks, {epochs} epochs"
        curves = bytes_curves(runs)
        if sum(len(curve["points"]) for curve in curves) > 1:
            name = f"figure_2_{kind}.png"
            plots.accuracy_against(out / name, f"Figure 2: {title}", "MB of all tasks", curves)
            named.append(name)
        curves = density_curves(runs)
        if any(len(curve["points"]) > 1 for curve in curves):
            name = f"density_{kind}.png"
            plots.accuracy_against(out / name, title, "weights kept, of the whole network", curves)
            named.append(name)
        if gains := transfer_gains(runs):
            name = f"transfer_{kind}.png"
            plots.gain_of_transfer(out / name, f"Transfer: {title}", gains)
            named.append(name)
    return named


def bytes_curves(runs: list[dict]) -> list[dict]:
    """{MB: accuracy} of each method, a mask learner's by two codecs."""
    curves = []
    for method, found in _by_method(runs).items():
        row = {"method": method, "scenario": "gg", "objective": None}
        label = plots.METHODS[method]
        if "masks" not in found[0]["bytes"]:
            points = {run["bytes"]["total"] / 1e6: _accuracy(found, run) for run in found}
            curves.append(plots.curve(label, points, row, "s"))
            continue
        for kind, (codec, style) in CODED.items():
            points = {
                (run["bytes"]["total"] - run["bytes"]["masks"] + run["bytes"][kind]) / 1e6: (
                    _accuracy(found, run)
                )
                for run in found
            }
            curves.append(plots.curve(f"{label}, {codec}", points, row, style))
    return curves


def density_curves(runs: list[dict]) -> list[dict]:
    """{density: accuracy} of each method that learns masks."""
    curves = []
    for method, found in _by_method(runs).items():
        if found[0].get("kept"):
            row = {"method": method, "scenario": "gg", "objective": None}
            points = {_density(run): _accuracy(found, run) for run in found}
            curves.append(plots.curve(plots.METHODS[method], points, row))
    return curves


def transfer_gains(runs: list[dict]) -> dict[str, list[float]]:
    """Accuracy with transfer less that without, a task, mean over the seeds that have both."""
    by_method = _by_method(runs)
    gains = {}
    for run in by_method.get("supsup_transfer", []):
        for plain in by_method.get("supsup", []):
            same = all(run["config"][name] == plain["config"][name] for name in ("scale", "seed"))
            if same:
                gain = np.subtract(_per_task(run), _per_task(plain))
                gains.setdefault(f"s = {run['config']['scale']:g}", []).append(gain)
    return {label: np.mean(each, axis=0).tolist() for label, each in gains.items()}


def _by_kind(results):
    kinds = {}
    for result in results:
        config = result["config"]
        if config["model"] in reports.SPLIT:
            names = ("dataset", "model", "width", "tasks", "epochs")
            kinds.setdefault(tuple(config[name] for name in names), []).append(result)
    return kinds


def _by_method(runs):
    by_method = {}
    for run in runs:
        by_method.setdefault(run["config"]["method"], []).append(run)
    return by_method


def _given(run):
    (found,) = [each for each in run["metrics"] if each["scenario"] == "gg"]
    return found


def _per_task(run):
    return _given(run)["per_task"]


def _accuracy(runs, like):
    """Mean over the seeds of the runs at one scale."""
    same = [run for run in runs if run["config"]["scale"] == like["config"]["scale"]]
    return float(np.mean([_given(run)["acc"] for run in same]))


def _density(run):
    kept, weights = np.sum(list(run["kept"].values()), axis=0)
    return float(kept / weights)
