"""All finished runs under a folder as one table and one picture a figure, beside the paper.

    python -m experiments.report --runs runs --out docs/results --readme README.md

Reads every result.json below --runs, averages over seeds, and writes results.md and the figures to
--out; with --readme also puts the table between that file's two result markers. Each line names
what it stands on: network, method, scenario, objective, protocol, tasks, seeds, seconds, device.
With --add the lines of the results.md that is there stay, where no run below --runs has the like:
runs need not be kept for ever, nor on one machine. So does a figure to which no run adds.
"""

import dataclasses
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro

import supsup_jax as ss
from experiments import permuted
from experiments.frame import figures as report_split
from experiments.frame import paper, plots
from experiments.frame import rows as reports
from experiments.frame import run as runs
from supsup_jax.inference.evaluation import SCENARIOS

MARKERS = "<!-- results -->", "<!-- /results -->"
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
    "every_image_at_the_end",
    "save_every",
}
EXPERIMENTS = {
    "permuted": "permuted",
    "rotated": "rotated",
    "nns": "permuted, no ids",
    "split_mnist": "split",
}


HEADER = (
    "| experiment | network | method | scenario | objective | protocol | tasks | ours | paper "
    "| difference | GNs | task accuracy | decisions | seeds | seconds a run |"
)


@dataclasses.dataclass(frozen=True)
class Args:
    """Gathers result.json files into a table and the paper's figures."""

    runs: Path = Path("runs")
    """Folder below which every result.json is read."""
    out: Path = Path("runs/report")
    readme: Path | None = None
    """Markdown file whose results section is replaced by the table."""
    scenario: str | None = None
    """Only this one: GG, GNs, GNu, NNs, or task-il, domain-il, class-il, task-free."""
    add: bool = False
    """Keep what the report in --out says of other runs."""
    tiny: bool = False
    """A report of one tiny run, made first."""


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

    @property
    def network(self) -> str:
        setup = json.loads(self.setup)
        width, scale = setup.get("width"), setup.get("scale")
        name = NETWORKS.get(self.model, self.model)
        if self.model == "bnnet":
            name += f"-{width}-{width}"
        elif width:
            name += f" of width {width}"
        if scale:
            name += f", density by s = {scale:g}"
        return f"{name}, {self.outputs} outputs"


class Mean(NamedTuple):
    """One line: mean and deviation over seeds, and what the paper has."""

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
    added: bool = True  # by a run below --runs, rather than kept from the report before


def read(folder: Path) -> list[dict]:
    """Every finished run below `folder`. Raises UsageError for none, or a damaged one."""
    if not folder.is_dir():
        raise runs.UsageError(f"--runs {folder} is no folder")
    found = []
    for path in sorted(folder.rglob("result.json")):
        try:
            result = json.loads(path.read_text())
            if result["schema"] != runs.SCHEMA:
                raise runs.UsageError(
                    f"{path} has schema {result['schema']}, this release {runs.SCHEMA}"
                )
            if isinstance(result.get("rows"), list) and "config" in result:
                found.append(result)
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, runs.UsageError):
                raise
            raise runs.UsageError(f"{path} is damaged: {error!r}") from error
    if not found:
        raise runs.UsageError(f"--runs {folder} holds no finished run (no result.json below it)")
    return found


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
    return [
        _mean(series, list(seeds.values())) for series, seeds in sorted(groups.items(), key=_order)
    ]


def _order(item):
    series = item[0]
    return tuple("" if value is None else str(value).zfill(6) for value in series)


def _mean(series, found):
    accuracies = [row["accuracy"] for row, _ in found]
    task_accuracies = [row["task_accuracy"] for row, _ in found]
    row, result = found[0]
    return Mean(
        series,
        float(np.mean(accuracies)),
        float(np.std(accuracies, ddof=1)) if len(found) > 1 else None,
        None if None in task_accuracies else float(np.mean(task_accuracies)),
        sum(row["decisions"] for row, _ in found),
        len(found),
        reports.theirs(result["config"], row),
        float(np.mean([_seconds(result) for _, result in found])),
        result["device"],
        all(row["tasks_learned"] == result["config"]["tasks"] for row, result in found),
    )


def kept(path: Path, entries: list[Mean]) -> list[Mean]:
    """What the results.md at `path` says of other series than `entries`.

    Raises UsageError where there is no table of this release's columns.
    """
    text = path.read_text() if path.is_file() else ""
    rows = [_cells(line) for line in text.splitlines() if line.startswith("| ")]
    if not rows or rows[0] != _cells(HEADER):
        raise runs.UsageError(f"{path} has no table of this release's columns to add to")
    device = text.partition("Devices: ")[2].partition(".\n")[0]
    try:
        found = [entry for cells in rows[1:] for entry in _parsed(cells, device)]
    except (ValueError, KeyError) as error:
        raise runs.UsageError(
            f"{path} has a line that this report does not write: {error}"
        ) from error
    added = {_shown(entry.series) for entry in entries}
    return [entry for entry in found if _shown(entry.series) not in added]


def _shown(series):
    """What a line says of its series: two experiments may go by one name there."""
    experiment = EXPERIMENTS.get(series.experiment, series.experiment)
    return series._replace(experiment=experiment, model=series.network, outputs=0, setup="")


def _cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def _parsed(cells, device):
    """The entries behind one line of `table`: itself, and GNs where it has that beside GNu."""
    experiment, network, method, scenario, objective, protocol, tasks, ours, paper_, _ = cells[:10]
    shared, task_accuracy, decisions, seeds, seconds = cells[10:]
    kind, _, dataset = experiment.rpartition(" ")
    model, _, outputs = network.removesuffix(" outputs").rpartition(", ")
    protocol, _, images = protocol.removesuffix(" images").partition(", first ")
    accuracy, _, deviation = ours.partition(" ± ")

    def name_of(names, shown):
        return next((name for name, label in names.items() if label == shown), shown)

    entry = Mean(
        Series(
            name_of(EXPERIMENTS, kind),
            dataset,
            name_of(NETWORKS, model),
            int(outputs),
            name_of(plots.METHODS, method),
            scenario.lower(),
            None if objective == "-" else name_of(plots.OBJECTIVES, objective),
            protocol,
            int(images) if images else None,
            "{}",
            _whole(tasks),
        ),
        float(accuracy),
        float(deviation) if deviation else None,
        _optional(task_accuracy),
        0 if decisions == "-" else _whole(decisions),
        _whole(seeds),
        _optional(paper_),
        _whole(seconds),
        device,
        last=True,
        added=False,
    )
    if shared == "-":
        return [entry]
    gns = entry.series._replace(scenario="gns")
    return [entry, entry._replace(series=gns, accuracy=float(shared), deviation=None, paper=None)]


def _whole(text):
    return int(text.replace(",", ""))


def _optional(text):
    return None if text == "-" else float(text)


def _seconds(result):
    return sum(result["seconds"].get(phase, 0) for phase in ("train", "evaluate", "compile"))


def table(entries: list[Mean]) -> str:
    """Markdown: every series at the end of its runs, and where the paper's numbers begin.

    GNs stands beside GNu, which is the same decisions judged more strictly.
    """
    text = [
        HEADER,
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    by_series = {entry.series: entry for entry in entries}
    begun = set()  # series, whatever the tasks, of which the paper's first number was shown
    for entry in sorted(entries, key=lambda entry: entry.series.tasks):
        if entry.paper is not None and (any_tasks := entry.series._replace(tasks=0)) not in begun:
            begun.add(any_tasks)
            by_series[entry.series] = entry._replace(last=True)
    for entry in by_series.values():
        series = entry.series
        if not entry.last or (
            series.scenario == "gns" and series._replace(scenario="gnu") in by_series
        ):
            continue
        shared = by_series.get(series._replace(scenario="gns"))
        ours = f"{entry.accuracy:.4f}"
        if entry.deviation is not None:
            ours += f" ± {entry.deviation:.4f}"
        cells = [
            f"{EXPERIMENTS.get(series.experiment, series.experiment)} {series.dataset}",
            series.network,
            plots.METHODS.get(series.method, series.method),
            _scenario(series.scenario),
            plots.OBJECTIVES[series.objective] or "-",
            series.protocol + (f", first {series.images} images" if series.images else ""),
            f"{series.tasks:,}",
            ours,
            _number(entry.paper, ".4f"),
            _number(entry.paper and entry.accuracy - entry.paper, "+.4f"),
            _number(shared and shared.accuracy, ".4f"),
            _number(entry.task_accuracy, ".4f"),
            f"{entry.decisions:,}" if entry.decisions else "-",
            str(entry.seeds),
            f"{entry.seconds:,.0f}",
        ]
        text.append("| " + " | ".join(cells) + " |")
    devices = sorted({entry.device for entry in entries})
    text += ["", f"Devices: {'; '.join(devices)}."]
    return "\n".join(text) + "\n"


def _scenario(name):
    return next(paper_name for paper_name in SCENARIOS if paper_name.lower() == name)


def _number(value, form):
    return "-" if value is None else f"{value:{form}}"


def draw(out: Path, entries: list[Mean]) -> list[str]:
    """The paper's figures that the runs have something for; the names of the files."""
    named = []

    def tasks(name, title, keep, figure=None, least=1, bottom=None):
        found = [entry for entry in entries if keep(entry.series)]
        curves = _curves(found)
        if len(curves) < least or not any(entry.added for entry in found):
            return
        for (of, method, objective), points in paper.CURVES.items():
            twin = objective == "superfluous" and points == paper.CURVES[of, method, "entropy"]
            if of == figure and not twin:  # H and G coincide in some figures
                curves.append(plots.paper_curve(method, objective, points))
        plots.accuracy_against_tasks(out / name, title, curves, bottom)
        named.append(name)

    def permuted_mnist(model, outputs):
        def keep(series):
            return (
                (series.experiment, series.dataset, series.model) == ("permuted", "mnist", model)
                and series.outputs == (outputs if series.method == "supsup" else 10)
                and series.images is None
                and (series.scenario == "gnu") == (series.method == "supsup")
                and series.protocol in ("paper", "given")
            )

        return keep

    for model, outputs, side in (("lenet_300_100", 100, "left"), ("fc_1024_1024", 500, "right")):
        tasks(
            f"figure_3_{side}.png",
            f"Figure 3, {side}: permuted MNIST, {NETWORKS[model]}, {outputs} outputs",
            permuted_mnist(model, outputs),
            f"{model}/{outputs}",
            bottom=0.87,  # as in the paper, below which PSP and the lower bound soon fall
        )
    tasks(
        "figure_4.png",
        "Figure 4: permuted MNIST, LeNet-300-100, 500 outputs",
        lambda s: (
            (s.model, s.outputs, s.dataset) == ("lenet_300_100", 500, "mnist")
            and s.scenario in ("gnu", "nns")
            and s.protocol == "paper"
            and s.images is None
        ),
        "lenet_300_100/500",
    )
    tasks(
        "figure_5_left.png",
        "Figure 5, left: rotated MNIST, FC-1024-1024",
        lambda s: (
            (s.experiment, s.dataset) == ("rotated", "mnist")
            and (s.scenario == "gnu") == (s.method == "supsup")
        ),
    )
    tasks(
        "figure_5_right.png",
        "Figure 5, right: permuted MNIST, FC-1024-1024, 500 outputs, one-shot",
        lambda s: (
            (s.experiment, s.dataset, s.model, s.outputs)
            == ("permuted", "mnist", "fc_1024_1024", 500)
            and s.scenario == "gnu"
            and s.protocol == "paper"
        ),
        least=3,  # SupSup's two, and any of BatchE
    )
    for model in ("lenet_300_100", "fc_1024_1024"):
        by_outputs = _by_outputs(entries, model)
        name = f"figure_6_{model.split('_')[0]}.png"
        widths = [entry for width in by_outputs.values() for entry in width.values()]
        if len(by_outputs) > 1 and any(entry.added for entry in widths):
            plots.accuracy_against_outputs(
                out / name, f"Figure 6: permuted MNIST, {NETWORKS[model]}", by_outputs
            )
            named.append(name)
    return named


def _curves(entries):
    grouped: dict[Series, list[Mean]] = {}
    # A line of an earlier report says nothing of its setup: it goes on with a curve of its name.
    names: dict[tuple, Series] = {}
    for entry in sorted(entries, key=lambda entry: not entry.added):
        series = entry.series._replace(tasks=0)
        if not entry.added:
            series = names.get(_shown(series), series)
        names.setdefault(_shown(series), series)
        grouped.setdefault(series, []).append(entry)
    curves = []
    for series, found in grouped.items():
        label = plots.METHODS.get(series.method, series.method)
        label += f", {_scenario(series.scenario)}"
        if series.objective:
            label += f", {plots.OBJECTIVES[series.objective]}"
        curves.append(
            plots.curve(label, {e.series.tasks: e.accuracy for e in found}, series._asdict())
        )
    return curves


def _by_outputs(entries, model):
    """{outputs: {objective: Mean}} at the most tasks that three widths share, or else two."""
    at: dict[int, dict[int, dict]] = {}
    for entry in entries:
        s = entry.series
        if (
            (s.experiment, s.dataset, s.model, s.method) == ("permuted", "mnist", model, "supsup")
            and s.scenario == "gnu"
            and s.protocol == "paper"
            and s.images is None
        ):
            at.setdefault(s.tasks, {}).setdefault(s.outputs, {})[s.objective] = entry
    shared = [tasks for tasks, widths in at.items() if len(widths) > 1]
    best = max(shared, key=lambda tasks: (min(3, len(at[tasks])), tasks), default=None)
    return at.get(best, {})


def commit() -> str:
    """The commit that this report is made at, with a star where files differ from it."""

    def git(*words):
        done = subprocess.run(["git", *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=10", "HEAD") + ("*" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def pictures(names: list[str], folder: Path) -> str:
    """Markdown that shows the figures of a folder, each under its name."""
    titles = [Path(name).stem.replace("_", " ").capitalize() for name in names]
    shown = [f"\n![{t}]({folder / name})\n" for t, name in zip(titles, names, strict=True)]
    return "".join(shown)


def put_between_markers(text: str, section: str) -> str:
    """`text` with what stands between the markers exchanged. Raises UsageError without them."""
    start, end = MARKERS
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise runs.UsageError(f"--readme must hold {start} and then {end}, once each")
    pattern = f"({re.escape(start)}\n).*?({re.escape(end)})"
    return re.sub(pattern, lambda found: found[1] + section + found[2], text, flags=re.DOTALL)


def main(args: Args) -> dict[str, Any]:
    """Writes the report; returns its lines and the figures' names."""
    if args.tiny:
        with tempfile.TemporaryDirectory() as folder:
            permuted.cli(["--tiny", "--out", f"{folder}/tiny"])
            return main(dataclasses.replace(args, runs=Path(folder), tiny=False))
    with runs.usage_errors():
        results = read(args.runs)
        readme = args.readme and args.readme.read_text()
        entries = means(results)
        if args.scenario is not None:
            wanted = ss.parse_scenario(args.scenario)
            entries = [entry for entry in entries if entry.series.scenario == wanted]
        section = f"{len(results)} runs, gathered at commit {commit()}"
        if args.add:
            before = kept(args.out / "results.md", entries)
            entries = sorted(entries + before, key=lambda entry: _order([entry.series]))
            section += ", beside those of the reports before"
        section += f".\n\n{table(entries)}"
        if readme:
            put_between_markers(readme, section)  # fails now if it ever will
        runs.writable_folder(args.out)
    figures = draw(args.out, entries) + report_split.draw(args.out, results)
    if args.add:  # figures to which no run adds stay as they are
        figures = sorted({path.name for path in args.out.glob("*.png")})
    (args.out / "results.md").write_text(section + pictures(figures, Path()))
    if readme:
        folder = Path(os.path.relpath(args.out, args.readme.parent))
        args.readme.write_text(put_between_markers(readme, section + pictures(figures, folder)))
    print(section)
    print("figures: " + (", ".join(str(args.out / name) for name in figures) or "none"))
    return {"entries": entries, "figures": figures}


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
