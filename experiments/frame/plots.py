"""Pictures of a run, in the paper's form."""

import contextlib
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

# Names of rows as pictures show them.
METHODS = {
    "supsup": "SupSup",
    "supsup_transfer": "SupSup, transfer",
    "nns": "SupSup, NNs",
    "upper_bound": "a network a task",
    "lower_bound": "one network",
    "separate_heads": "separate heads",
    "separate_heads_random": "separate heads, random weights",
    "batche": "BatchE",
    "batche_random": "BatchE, random weights",
    "abatche": "ABatchE",
    "batche_one_shot": "BatchE, one-shot",
    "psp": "PSP",
    "hopsupsup": "HopSupSup",
}
LINES = ("-", ":", "-.")
MARKERS = {"superfluous": "^", "max_confidence": "v"}
OBJECTIVES = {None: "", "entropy": "H", "superfluous": "G", "max_confidence": "confidence"}
# One colour a method, for colour-blind readers too (Okabe and Ito); SupSup's by how it is judged.
OURS = {"gg": "#009E73", "entropy": "#0072B2", "superfluous": "#CC79A7"}
COLORS = {
    "upper_bound": "#000000",
    "lower_bound": "#888888",
    "separate_heads": "#8C564B",
    "separate_heads_random": "#C49C94",
    "batche": "#D55E00",
    "batche_random": "#F0A060",
    "abatche": "#E69F00",
    "batche_one_shot": "#7F3F98",
    "psp": "#56B4E9",
    "nns": "#7F3F98",
    "supsup_transfer": "#0072B2",
}
# Of an accuracy axis: less would draw a tenth of a point as a cliff.
MIN_SPAN = 0.02
BOUND = "#888888"


def color(row: dict) -> str:
    """Of a row's series."""
    for kind in (row["method"], row["scenario"]):
        if kind in COLORS:
            return COLORS[kind]
    return OURS.get(row["scenario"], OURS.get(row["objective"], "#009E73"))


def curve(
    label: str, points: dict[int, float], row: dict, style: str | None = None, nth: int = 0
) -> dict:
    """One of ours, coloured as `row`'s series, marked as its objective; the nth of one look."""
    style = style or MARKERS.get(row["objective"], "o") + LINES[nth % len(LINES)]
    return {"label": label, "points": points, "color": color(row), "style": style}


def paper_curve(
    method: str, objective: str | None, points: dict[int, float], both: bool = False
) -> dict:
    """One of the paper's, dashed, in the colour of ours. both: it is that of G, too."""
    label = f"paper, {METHODS[method]}" + (f", {OBJECTIVES[objective]}" if objective else "")
    row = {"method": method, "scenario": "gnu", "objective": objective}
    return curve(label + (" and G" if both else ""), points, row, "s--")


@contextlib.contextmanager
def _axes(path, title, xlabel, ylabel, size=(6.4, 4.0)):
    """One pair of axes, saved with grid and legend."""
    fig, ax = plt.subplots(figsize=size, layout="constrained")
    yield ax
    ax.set_title(title, fontsize=10)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.grid(alpha=0.3, which="both" if ax.get_xscale() == "log" else "major")
    if ax.get_legend() is None and not fig.legends:
        ax.legend(fontsize=8)
    _save(fig, path)


def _save(fig, path):
    fig.savefig(path, dpi=120)
    plt.close(fig)


def _plot(ax, curve, **style):
    x = sorted(curve["points"])
    y = [curve["points"][each] for each in x]
    ax.plot(x, y, curve["style"], color=curve["color"], label=curve["label"], **style)


def _ticks(ax, values):
    """These values alone, written out, on a logarithmic axis."""
    ax.set_xscale("log")
    ax.set_xticks(values, [str(value) for value in values])
    ax.set_xticks([], minor=True)


def _whole(*axes):
    for axis in axes:
        axis.set_major_locator(MaxNLocator(integer=True))


def accuracy_against_tasks(
    path: Path, title: str, curves: list[dict], bottom: float | None = None
) -> None:
    """curves: as `curve` makes them, points {tasks: accuracy}.

    bottom: where the accuracy axis starts, below which curves leave the picture; the legend says
      which lie there whole.
    """
    with _axes(path, title, "tasks learned", "accuracy, mean over tasks") as ax:
        for each in curves:
            below = bottom is not None and max(each["points"].values()) < bottom
            label = each["label"] + (" (below)" if below else "")
            _plot(ax, each | {"label": label}, markersize=4, linewidth=1.5)
        low, high = ax.get_ylim()
        room = max(0, MIN_SPAN - (high - low))
        ax.set_ylim(low - 0.75 * room, high + 0.25 * room)
        _whole(ax.xaxis)
        if bottom is not None:
            ax.set_ylim(bottom, max(max(each["points"].values()) for each in curves) + 0.01)
            # Curves that leave the picture come in many; a legend among them would cover some.
            ax.figure.legend(fontsize=7, ncols=3, loc="outside lower center")


def accuracy_against(path: Path, title: str, xlabel: str, curves: list[dict]) -> None:
    """curves: as `curve` makes them, points {x: accuracy}, x on a logarithmic axis."""
    with _axes(path, title, xlabel, "accuracy, mean over tasks") as ax:
        for each in curves:
            _plot(ax, each, markersize=5)
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())


def gain_of_transfer(path: Path, title: str, gains: dict[str, list[float]]) -> None:
    """Points of accuracy that each task gained, in the order of learning, by label."""
    labels = "task, in order of learning", "gain, points of accuracy"
    with _axes(path, title, *labels, size=(6.4, 3.6)) as ax:
        for label, gain in gains.items():
            y = 100 * np.asarray(gain)
            ax.plot(range(1, len(gain) + 1), y, "o-", label=label, markersize=4)
        ax.axhline(0, color=BOUND, linewidth=1)
        _whole(ax.xaxis)


def accuracy_matrices(path: Path, matrices: dict[str, np.ndarray], checkpoints: list[int]) -> None:
    """R side by side, by title: row after each checkpoint, column a task, NaN left white."""
    fig, axes = plt.subplots(
        1, len(matrices), figsize=(4.2 * len(matrices), 3.6), layout="constrained", squeeze=False
    )
    low = min(float(np.nanmin(matrix)) for matrix in matrices.values())
    for ax, (title, matrix) in zip(axes[0], matrices.items(), strict=True):
        image = ax.imshow(matrix, aspect="auto", vmin=low, vmax=1, interpolation="nearest")
        ax.set(title=title, xlabel="accuracy on task", ylabel="after learning")
        ax.set_yticks(range(len(checkpoints)), [str(tasks) for tasks in checkpoints])
    fig.colorbar(image, ax=axes[0].tolist())
    _save(fig, path)


def inferred_tasks(path: Path, title: str, confusion: np.ndarray) -> None:
    """Which task was inferred for which; each row is a share of that task's decisions."""
    _shares(path, title, "task inferred", confusion, "share of decisions")


def assigned_windows(path: Path, title: str, counts: np.ndarray) -> None:
    """Which mask learned which task: windows [true task, mask], a share of each task's."""
    _shares(path, title, "mask, in order of allocation", counts, "share of the task's windows")


def _shares(path, title, xlabel, counts, label):
    """counts [true task, ...] as shares of each row."""
    fig, ax = plt.subplots(figsize=(4.8, 4.2), layout="constrained")
    share = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    image = ax.imshow(share, vmin=0, vmax=1, interpolation="nearest")
    ax.set(title=title, xlabel=xlabel, ylabel="true task")
    _whole(ax.xaxis, ax.yaxis)
    fig.colorbar(image, ax=ax, label=label)
    _save(fig, path)


def novelty_against_windows(
    path: Path, title: str, height: np.ndarray, first: np.ndarray, threshold: float
) -> None:
    """height [windows]: max nu times max(T, floor); first: whether a new task begins there."""
    with _axes(path, title, "window", "max nu x masks asked") as ax:
        windows = np.arange(len(height))
        for kind, label, color in (
            (~first, "a task goes on", OURS["entropy"]),
            (first, "a task begins", COLORS["batche"]),
        ):
            ax.plot(windows[kind], height[kind], ".", label=label, color=color, markersize=4)
        ax.axhline(threshold, color=BOUND, linestyle="--", label=f"new below {threshold:g}")


# The authors' PyTorch code, milliseconds of a decision of a batch of 128, LeNet-300-100 with 100
# outputs, by tasks: on 2 cores of another machine (AMD EPYC), where a read took 3.5 at 2,500.
AUTHORS = {250: 392, 2500: 4695}


def cost_against_tasks(path: Path, rows: list[dict]) -> None:
    """Milliseconds, and memory beside it, against the number of tasks; log-log."""
    network = rows[0]["network"]
    fig, (left, right) = plt.subplots(
        1, 2, figsize=(12, 5.2), layout="constrained", width_ratios=(1.6, 1)
    )
    for name, label, style in (
        ("oracle", "oracle, a batch of 128", "C3o-"),
        ("dense", "dense float32 masks, one product", "C1o-"),
        ("128", "128 decisions", "C4o-"),
        ("128/cert", "128 decisions, certified", "C4s--"),
        ("128/error", "128 decisions, error 1e-6", "C4^:"),
        ("shared", "one decision of a batch of 128", "C0o-"),
        ("shared/cert", "the same, certified", "C0s--"),
        ("shared/error", "the same, error 1e-6", "C0^:"),
        ("gradient", "of that, forward and backward", "C2o-"),
        ("read", "packed masks read by NumPy", "k:"),
    ):
        times = {row["tasks"]: row["milliseconds"].get(name) for row in rows}
        points = [(tasks, time) for tasks, time in times.items() if time is not None]
        if points:
            left.loglog(*zip(*points, strict=True), style, label=label, markersize=4)
    left.loglog(
        *zip(*AUTHORS.items(), strict=True), "C5D-", label="the authors' code, another machine"
    )
    left.set(xlabel="tasks K", ylabel="milliseconds", title=f"One call, {network}")
    # Room for the legend above the curves, which all rise.
    left.set_ylim(top=left.get_ylim()[1] * 30)
    tasks = [row["tasks"] for row in rows]
    for name, label in (
        ("peak_resident_bytes", "process, peak"),
        ("peak_device_bytes", "device, peak"),
        ("store_bytes", "store"),
        ("temporary_bytes", "temporaries of a shared decision"),
    ):
        if rows[0][name] is not None:
            right.loglog(tasks, [row[name] / 1e6 for row in rows], "o-", label=label, markersize=4)
    right.set(xlabel="tasks K", ylabel="MB", title="Memory")
    for ax, columns in ((left, 2), (right, 1)):
        ax.grid(alpha=0.3, which="both")
        ax.legend(fontsize=8, loc="upper left", ncols=columns)
    _save(fig, path)


def rate_against_tasks(path: Path, title: str, rows: list[dict], bound: float) -> None:
    """Tasks a minute against the number learned at once, log-log; bound: a rate drawn level."""
    with _axes(path, title, "tasks at once", "tasks a minute", size=(6.4, 4.4)) as ax:
        tasks = [row["tasks"] for row in rows]
        for i, name in enumerate(rows[0]["tasks_per_minute"]):
            rates = [row["tasks_per_minute"][name] for row in rows]
            ax.loglog(tasks, rates, "o-", label=name, color=f"C{i}", markersize=4)
        ax.axhline(bound, color=BOUND, linestyle="--", label="matrix products alone, one by one")
        _ticks(ax, tasks)


def accuracy_against_outputs(path: Path, title: str, entries: dict[int, dict]) -> None:
    """entries: {outputs: {objective: an entry with accuracy and deviation (None of one seed)}}."""
    outputs = sorted(entries)
    some = next(iter(entries[outputs[0]].values()))
    seeds = max(len(entry.seeds) for width in entries.values() for entry in width.values())
    bars = f", bars: deviation over {seeds} seeds" if seeds > 1 else ""
    labels = "outputs", f"accuracy, mean over {some.series.tasks} tasks{bars}"
    with _axes(path, title, *labels) as ax:
        for objective in ("entropy", "superfluous"):
            found = {n: entries[n][objective] for n in outputs if objective in entries[n]}
            ax.errorbar(
                list(found),
                [entry.accuracy for entry in found.values()],
                [entry.deviation or np.nan for entry in found.values()],
                fmt=MARKERS.get(objective, "o") + "-",
                color=OURS[objective],
                label=f"GNu, {OBJECTIVES[objective]}",
                capsize=3,
            )
        _ticks(ax, outputs)


def distance_against_steps(
    path: Path, title: str, curves: dict[str, dict[int, np.ndarray]]
) -> None:
    """Bits that differ from the task's mask, [S + 1] by panel and task; two panels a row."""
    rows = -(-len(curves) // 2)
    fig, axes = plt.subplots(
        rows, 2, figsize=(9.2, 3.6 * rows), layout="constrained", squeeze=False, sharey=True
    )
    for ax, (name, tasks) in zip(axes.flat, curves.items(), strict=False):
        for task, distance in sorted(tasks.items()):
            ax.plot(distance, label=f"task {task}", linewidth=1.5)
        ax.set(title=name, xlabel="recovery step", ylabel="bits that differ from the mask")
        _whole(ax.xaxis)
        ax.grid(alpha=0.3)
    axes[0, 0].set_ylim(bottom=0)  # shared, once all is drawn
    axes[0, -1].legend(fontsize=8)
    fig.suptitle(title)
    _save(fig, path)


def retrieved_against_stored(path: Path, title: str, rows: list[dict]) -> None:
    """rows: dicts of rule, stored, retrieved (share given back whole), known_capacity."""
    labels = "masks stored", "share retrieved without a wrong bit"
    with _axes(path, title, *labels, size=(6.0, 3.8)) as ax:
        for i, rule in enumerate(dict.fromkeys(row["rule"] for row in rows)):
            mine = [row for row in rows if row["rule"] == rule]
            points = [row["stored"] for row in mine], [row["retrieved"] for row in mine]
            ax.plot(*points, "o-", color=f"C{i}", label=rule, markersize=4)
            bound = mine[0]["known_capacity"]
            label = f"{rule}, known: {bound:.0f}"
            ax.axvline(bound, color=f"C{i}", linestyle="--", label=label)
        ax.set_ylim(-0.03, 1.03)
