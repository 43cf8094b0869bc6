"""Pictures of a run, and of a report: the paper's figures, accuracy against bytes and density, and
what transfer gains, each where there are runs for it.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.frame import paper, plots
from experiments.frame.rows import accuracy_rows, figure, points
from experiments.frame.rows import series as series_of
from experiments.frame.run import Run
from experiments.frame.series import (
    NETWORKS,
    Mean,
    Series,
    distinctions,
    order,
    scenario_name,
)

# Of a mask learner's bytes, each with a style: the masks as coded here, and as the paper counts.
CODED = {"masks_enumerative": ("entropy-coded", "o-"), "masks_csc16_indices": ("csc16", "o--")}


def of_run(run: Run, config: Any, learner: Any) -> dict[str, Any]:
    """accuracy.png, matrix.png where all tasks were judged, and inferred.png where tasks were
    inferred.

    Returns the weights kept of each layer, which result.json has too.
    """
    curves, matrices = [], {}
    for label, rows in drawn_series(run.rows, config):
        R = accuracy_rows(rows)
        if R is not None and len(R) == len(config.checkpoints):  # some are measured at the end only
            matrices[label] = R
        curves.append(plots.curve(f"ours, {label}", points(rows), rows[0]))
    curves += _paper_curves(figure(run.config), (config.method, "supsup", "upper_bound"))
    title = (
        f"{config.stream.capitalize()} {config.dataset}, {config.model}, {config.outputs} outputs, "
        f"seed {config.seed}"
    )
    plots.accuracy_against_tasks(run.out / "accuracy.png", title, curves)
    if matrices:
        plots.accuracy_matrices(run.out / "matrix.png", matrices, list(config.checkpoints))
    if (counts := run.out / "inferred.npz").exists():
        plots.inferred_tasks(
            run.out / "inferred.png",
            f"{config.tasks} tasks, {config.protocols[0]}",
            np.load(counts)["counts"],
        )
    return {"kept": learner.kept()}


def drawn_series(rows: list[dict], config: Any) -> list[tuple[str, list[dict]]]:
    """GG, and GNu by the first protocol, each objective: (label, rows)."""
    found = []
    for (method, scenario, objective, protocol, images), series in series_of(rows).items():
        if scenario == "gg" and images is None:
            found.append((f"{plots.METHODS[method]}, GG", series))
        elif scenario == "gnu" and protocol == config.protocols[0]:
            symbol = plots.OBJECTIVES[objective]
            first = f", first {images} images" if images else ""
            found.append((f"{plots.METHODS[method]}, GNu, {symbol} ({protocol}{first})", series))
    return found


class Figure(NamedTuple):
    """A figure of the paper's: accuracy against tasks learned.

    keep: which series it shows; methods: which curves of the paper's, where not all.
    commands: of the runs it is made of.
    paper: whose curves stand beside, as `paper.CURVES` names them.
    least: curves of ours without which it is not drawn.
    beyond: a number of tasks up to which alone it is not drawn.
    bottom: where the accuracy axis starts.
    """

    file: str
    title: str
    keep: Callable[[Series], bool]
    commands: tuple[str, ...]
    paper: str | None = None
    least: int = 1
    beyond: int = 0
    bottom: float | None = None
    methods: tuple[str, ...] | None = None


class Page(NamedTuple):
    """What a report says of one figure, on a page of its own.

    pictures: files beside it. entries: the points of the pictures' curves.
    """

    name: str
    title: str
    pictures: list[str]
    commands: tuple[str, ...]
    entries: list[Mean]


def _permuted(series, model):
    return (series.experiment, series.dataset, series.model) == ("permuted", "mnist", model)


def _figure_3(series, model, outputs):
    supsup = series.method == "supsup"
    return (
        _permuted(series, model)
        and series.outputs == (outputs if supsup else 10)
        and series.images is None
        and (series.scenario == "gnu") == supsup
        and series.protocol in ("paper", "given")
    )


def _figure_4(series, most=2500, scenarios=("gnu", "nns")):
    return (
        (series.model, series.outputs, series.dataset) == ("lenet_300_100", 500, "mnist")
        and series.scenario in scenarios
        and series.protocol == "paper"
        and series.images is None
        and series.tasks <= most
    )


def _figure_5_left(series):
    named = (series.experiment, series.dataset, series.model)
    supsup = series.method == "supsup"
    return (
        named == ("rotated", "mnist", "fc_1024_1024")
        and series.outputs == (200 if supsup else 10)
        and (series.scenario == "gnu") == supsup
    )


def _figure_5_right(series):
    inferred = (series.scenario, series.protocol) == ("gnu", "paper")
    return _permuted(series, "fc_1024_1024") and series.outputs == 500 and inferred


_TO_2500 = (
    "permuted --preset mnist-2500-lenet --judge-most 100",
    "permuted --preset mnist-2500-lenet --tasks 100",
)

FIGURES = (
    *(
        Figure(
            f"figure_3_{side}.png",
            f"Figure 3, {side}: permuted MNIST, {NETWORKS[model]}, {outputs} outputs",
            functools.partial(_figure_3, model=model, outputs=outputs),
            (
                f"permuted --preset {preset}{judged}",
                f"permuted --preset {preset}{few} --method batche  # psp, upper_bound, lower_bound",
            ),
            f"{model}/{outputs}",
            bottom=0.87,  # as in the paper, below which PSP and the lower bound soon fall
        )
        for model, outputs, side, preset, judged, few in (
            ("lenet_300_100", 100, "left", "mnist-250-lenet", "", ""),
            ("fc_1024_1024", 500, "right", "mnist-250-fc", " --judge-most 100", " --tasks 50"),
        )
    ),
    Figure(
        "figure_4.png",
        "Figure 4: permuted MNIST, LeNet-300-100, 500 outputs",
        _figure_4,
        (*_TO_2500, "nns --preset mnist-2500 --judge-most 100"),
        "lenet_300_100/500",
        bottom=0.92,  # below which NNs end, where all else lies within .003
    ),
    Figure(
        "beyond_figure_4.png",
        "Beyond Figure 4: permuted MNIST, LeNet-300-100, 500 outputs",
        functools.partial(_figure_4, most=10_000, scenarios=("gnu",)),
        (*_TO_2500, "permuted --preset mnist-10000-lenet --tasks 7500"),
        "lenet_300_100/500",
        beyond=2500,
        bottom=0.92,  # as the figure that it goes on from
        methods=("supsup",),
    ),
    Figure(
        "figure_5_left.png",
        "Figure 5, left: rotated MNIST, FC-1024-1024",
        _figure_5_left,
        ("rotated", "rotated --method batche  # psp, upper_bound, lower_bound"),
        bottom=0.9,  # below which one network alone falls, and soon
    ),
    Figure(
        "figure_5_right.png",
        "Figure 5, right: permuted MNIST, FC-1024-1024, 500 outputs, one-shot",
        _figure_5_right,
        (
            "permuted --preset mnist-250-fc --judge-most 100",
            "permuted --preset mnist-250-fc --tasks 10 --method abatche",
        ),
        least=3,  # SupSup's two, and any of BatchE
    ),
)


def of_report(out: Path, entries: list[Mean]) -> list[str]:
    """The figures that the runs have something for; the names of the files."""
    named = [each.file for each in FIGURES if _against_tasks(out, each, entries)]
    for model in ("lenet_300_100", "fc_1024_1024"):
        by_outputs = _by_outputs(entries, model)
        name = f"figure_6_{model.split('_')[0]}.png"
        widths = [entry for width in by_outputs.values() for entry in width.values()]
        if len(by_outputs) > 1 and any(entry.added for entry in widths):
            title = f"Figure 6: permuted MNIST, {NETWORKS[model]}"
            plots.accuracy_against_outputs(out / name, title, by_outputs)
            named.append(name)
    return named + of_split(out, entries)


def pages(out: Path, entries: list[Mean]) -> list[Page]:
    """A page for each figure that has its pictures in `out`, and entries."""
    entries = sorted(entries, key=lambda entry: order(entry.series))
    found = [
        Page(
            Path(each.file).stem,
            each.title,
            [each.file],
            each.commands,
            [entry for entry in entries if each.keep(entry.series)],
        )
        for each in FIGURES
        if (out / each.file).exists()
    ]
    narrow = "--outputs 25  # 100, 200; --seed 0, 1, 2"
    for model, preset in (("lenet_300_100", "mnist-50-lenet"), ("fc_1024_1024", "mnist-250-fc")):
        name = f"figure_6_{model.split('_')[0]}"
        if (out / f"{name}.png").exists():
            widths = _by_outputs(entries, model).values()
            drawn = [entry for width in widths for entry in width.values()]
            title = f"Figure 6: permuted MNIST, {NETWORKS[model]}"
            commands = (f"permuted --preset {preset} --tasks 50 {narrow}",)
            found.append(Page(name, title, [f"{name}.png"], commands, drawn))
    kinds = ("figure_2_*.png", "density_*.png", "transfer_*.png")
    if split := [path.name for kind in kinds for path in sorted(out.glob(kind))]:
        script = "split_cifar --preset tiny-imagenet32-cpu"
        commands = (
            f"{script} --scale 8  # 4, 32; --method supsup_transfer",
            f"{script} --method upper_bound  # separate_heads, batche",
        )
        drawn = sorted(
            (entry for entry in entries if entry.split),
            key=lambda entry: (entry.series.method, entry.series.field("scale") or 0),
        )
        found.append(Page("figure_2", "Figure 2's kind: split classes", split, commands, drawn))
    return sorted(page for page in found if page.entries)


def _against_tasks(out, figure, entries):
    """Draws a figure where a run adds to it; whether it did."""
    found = [entry for entry in entries if figure.keep(entry.series)]
    curves = _curves(found)
    added = any(entry.added and entry.series.tasks > figure.beyond for entry in found)
    if len(curves) < figure.least or not added:
        return False
    curves += _paper_curves(figure.paper, figure.methods)
    plots.accuracy_against_tasks(out / figure.file, figure.title, curves, figure.bottom)
    return True


def _paper_curves(figure, methods=None):
    """The paper's of a figure, of these methods or of all; one where H and G coincide."""
    curves = []
    for (of, method, objective), theirs in paper.CURVES.items():
        if of == figure and (methods is None or method in methods):
            h, g = (paper.CURVES.get((of, method, name)) for name in ("entropy", "superfluous"))
            both = h is not None and h == g
            if not (both and objective == "superfluous"):
                curves.append(plots.paper_curve(method, objective, theirs, both))
    return curves


def _curves(entries):
    """A curve a series; where tasks were judged by samples too, of most of them."""
    grouped: dict[Series, list[Mean]] = {}
    for entry in sorted(entries, key=lambda entry: entry.series.judged):
        grouped.setdefault(entry.series._replace(tasks=0, judged=0), []).append(entry)
    curves, seen = [], []
    for series, own in distinctions(grouped).items():
        label = plots.METHODS.get(series.method, series.method)
        label += f", {scenario_name(series.scenario)}"
        if series.objective:
            label += f", {plots.OBJECTIVES[series.objective]}"
        points = {entry.series.tasks: entry.accuracy for entry in grouped[series]}
        nth = seen.count(label)
        seen.append(label)
        label += f", {own}" if own else ""
        curves.append(plots.curve(label, points, series._asdict(), nth=nth))
    return curves


def _by_outputs(entries, model):
    """{outputs: {objective: Mean}} at the most tasks that three widths share, or else two; of one
    setup, and where tasks were judged by samples too, of most of them.
    """
    at: dict[tuple, dict[int, dict]] = {}
    for entry in sorted(entries, key=lambda entry: entry.series.judged):
        s = entry.series
        inferred = (s.method, s.scenario, s.protocol) == ("supsup", "gnu", "paper")
        if _permuted(s, model) and inferred and s.images is None:
            widths = at.setdefault((s.tasks, s.setup), {})
            widths.setdefault(s.outputs, {})[s.objective] = entry
    shared = [key for key, widths in at.items() if len(widths) > 1]
    best = max(shared, key=lambda key: (min(3, len(at[key])), *key), default=None)
    return {} if best is None else at[best]


def of_split(out: Path, entries: list[Mean]) -> list[str]:
    """The figures of every kind of split runs to which a run adds; the names of the files."""
    kinds: dict[tuple, list[Mean]] = {}
    for entry in entries:
        if entry.split:
            s = entry.series
            kind = (s.dataset, s.model, s.field("width"), s.tasks, s.field("epochs"))
            kinds.setdefault(kind, []).append(entry)
    named = []
    for (dataset, model, width, tasks, epochs), found in kinds.items():
        if not any(entry.added for entry in found):
            continue
        kind = f"{dataset}_{model}_{width}x{tasks}x{epochs}"
        network = f"{NETWORKS.get(model, model)} of width {width}"
        title = f"{dataset}, {tasks} tasks, {network}, {epochs} epochs"
        curves = bytes_curves(found)
        if sum(len(curve["points"]) for curve in curves) > 1:
            name = f"figure_2_{kind}.png"
            plots.accuracy_against(out / name, f"Figure 2: {title}", "MB of all tasks", curves)
            named.append(name)
        curves = density_curves(found)
        if any(len(curve["points"]) > 1 for curve in curves):
            name = f"density_{kind}.png"
            plots.accuracy_against(out / name, title, "weights kept, of the whole network", curves)
            named.append(name)
        if gains := transfer_gains(found):
            name = f"transfer_{kind}.png"
            plots.gain_of_transfer(out / name, f"Transfer: {title}", gains)
            named.append(name)
    return named


def bytes_curves(entries: list[Mean]) -> list[dict]:
    """{MB: accuracy} of each method, a mask learner's by two codecs."""
    curves = []
    for method, found in _by_method(entries).items():
        label, row = plots.METHODS[method], found[0].series._asdict()
        if "masks" not in found[0].split["bytes"]:
            points = {entry.split["bytes"]["total"] / 1e6: entry.accuracy for entry in found}
            curves.append(plots.curve(label, points, row, "s"))
            continue
        for kind, (codec, style) in CODED.items():
            points = {}
            for entry in found:
                of = entry.split["bytes"]
                points[(of["total"] - of["masks"] + of[kind]) / 1e6] = entry.accuracy
            curves.append(plots.curve(f"{label}, {codec}", points, row, style))
    return curves


def density_curves(entries: list[Mean]) -> list[dict]:
    """{density: accuracy} of each method that learns masks."""
    return [
        plots.curve(
            plots.METHODS[method],
            {entry.split["density"]: entry.accuracy for entry in found},
            found[0].series._asdict(),
        )
        for method, found in _by_method(entries).items()
        if "density" in found[0].split
    ]


def transfer_gains(entries: list[Mean]) -> dict[str, list[float]]:
    """Accuracy with transfer less that without, a task, of each scale that has both."""
    transferred, plain = (
        {entry.series.field("scale"): entry.split["per_task"] for entry in found}
        for found in map(_by_method(entries).get, ("supsup_transfer", "supsup"), ([], []))
    )
    return {
        f"s = {scale:g}": np.subtract(transferred[scale], plain[scale]).tolist()
        for scale in sorted(transferred.keys() & plain.keys())
    }


def _by_method(entries):
    by_method = {}
    for entry in entries:
        by_method.setdefault(entry.series.method, []).append(entry)
    return by_method
