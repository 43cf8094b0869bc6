"""All finished runs under a folder as one table and one page a figure, beside the paper.

    python -m experiments.report --runs runs --out docs/results --add

Reads every result.json below --runs, averages over seeds, and writes to --out the figures, each
with a page of its own, results.md (the ends of all runs) and results.json (all as data). Each line
names what it stands on: network, method, scenario, objective, protocol, tasks (and of how many a
sample was judged), seeds, seconds. With --add the entries of the results.json that is there stay,
or are pooled with those of other seeds, until runs of all their seeds take their place: runs need
not be kept for ever, nor on one machine. Pictures to which no run adds stay too.
"""

import dataclasses
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

import supsup_jax as ss
from experiments.frame import plots
from experiments.frame.figures import Page, of_report, pages
from experiments.frame.run import UsageError, usage_errors, writable_folder
from experiments.frame.series import (
    EXPERIMENTS,
    Mean,
    distinctions,
    kept,
    means,
    read,
    save,
    scenario_name,
)

TITLE = """# All runs

H and G are what inference minimises: H is `ss.entropy`, G is `ss.Superfluous(num_labels)`. The
paper's numbers are digitised from its figures, to about .0003. GNs stands beside GNu: the same
decisions, judged by the label alone. `python -m experiments.report` made this page.

"""
COLUMNS = (
    "experiment",
    "network",
    "method",
    "scenario",
    "objective",
    "protocol",
    "tasks",
    "ours",
    "paper",
    "difference",
    "GNs",
    "task accuracy",
    "decisions",
    "seeds",
    "seconds a run",
)


@dataclasses.dataclass(frozen=True)
class Args:
    """Gathers result.json files into a table and the paper's figures."""

    runs: Path = Path("runs")
    """Folder below which every result.json is read."""
    out: Path = Path("runs/report")
    scenario: str | None = None
    """Only this one: GG, GNs, GNu, NNs, or task-il, domain-il, class-il, task-free."""
    add: bool = False
    """Keep what the report in --out says of other runs."""
    tiny: bool = False
    """A report of one tiny run, made first."""


def table(entries: list[Mean]) -> str:
    """Markdown: every series at the end of its runs, and where the paper's numbers begin."""
    return markdown(COLUMNS, lines(entries)) + devices(entries)


def lines(entries: list[Mean], every: bool = False) -> list[tuple[str, ...]]:
    """Cells by COLUMNS: of every series the end of its runs, and where the paper's numbers begin;
    or with `every` all checkpoints.

    GNs stands beside GNu, which is the same decisions judged more strictly.
    """
    found = []
    by_series = {entry.series: entry for entry in entries}
    own = distinctions(by_series)
    begun = set()  # series, whatever the tasks, of which the paper's first number was shown
    for entry in sorted(entries, key=lambda entry: entry.series.tasks):
        if (
            entry.paper is not None
            and (any_tasks := entry.series._replace(tasks=0, judged=0)) not in begun
        ):
            begun.add(any_tasks)
            by_series[entry.series] = entry._replace(last=True)
    for entry in by_series.values():
        series = entry.series
        if not (every or entry.last) or (
            series.scenario == "gns" and series._replace(scenario="gnu") in by_series
        ):
            continue
        shared = by_series.get(series._replace(scenario="gns"))
        ours = f"{entry.accuracy:.4f}"
        if entry.deviation is not None:
            ours += f" ± {entry.deviation:.4f}"
        cells = (
            f"{EXPERIMENTS.get(series.experiment, series.experiment)} {series.dataset}",
            series.network,
            plots.METHODS.get(series.method, series.method) + (own[series] and f", {own[series]}"),
            scenario_name(series.scenario),
            plots.OBJECTIVES[series.objective] or "-",
            series.protocol + (f", first {series.images} images" if series.images else ""),
            f"{series.tasks:,}" + (f" ({series.judged:,} judged)" * (series.judged < series.tasks)),
            ours,
            number(entry.paper, ".4f"),
            number(entry.paper and round(entry.accuracy - entry.paper, 4) + 0.0, "+.4f"),
            number(shared and shared.accuracy, ".4f"),
            number(entry.task_accuracy, ".4f"),
            f"{entry.decisions:,}" if entry.decisions else "-",
            listed(entry.seeds),
            f"{entry.seconds:,.0f}",
        )
        found.append(cells)
    return found


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    rule = ["---"] * len(columns)
    return "".join("| " + " | ".join(cells) + " |\n" for cells in (columns, rule, *rows))


def devices(entries: list[Mean]) -> str:
    """A line of all machines that the entries were measured on."""
    found = {device for entry in entries for device in entry.device.split("; ")}
    return f"\nDevices: {'; '.join(sorted(found))}.\n"


def number(value: float | None, form: str) -> str:
    """A cell; a dash for None."""
    return "-" if value is None else f"{value:{form}}"


def listed(seeds: list[int]) -> str:
    """A cell: "0", "6 to 25" where none between is missing, or all of them."""
    if len(seeds) > 1 and seeds == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]} to {seeds[-1]}"
    return " ".join(map(str, seeds))


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


def written(page: Page) -> str:
    """Markdown: a figure, the commands that make it, and its points beside the paper's."""
    text = f"# {page.title}\n\n"
    text += "".join(f"![{page.title}]({name})\n\n" for name in page.pictures)
    text += "".join(f"    python -m experiments.{command}\n" for command in page.commands)
    # What all lines share is said once.
    columns = dict(zip(COLUMNS, zip(*lines(page.entries, every=True), strict=True), strict=True))
    own = ("tasks", "ours", "paper")
    shared = {n: cells[0] for n, cells in columns.items() if n not in own and len(set(cells)) == 1}
    said = ", ".join(f"{name} {cell}" for name, cell in shared.items() if cell != "-")
    text += f"\nIn all lines: {said}.\n\n" if said else "\n"
    differing = {name: cells for name, cells in columns.items() if name not in shared}
    text += markdown(list(differing), list(zip(*differing.values(), strict=True)))
    return text + devices(page.entries)


def main(args: Args) -> dict[str, Any]:
    """Writes the report; returns its lines and the figures' names."""
    if args.tiny:
        with tempfile.TemporaryDirectory() as folder:
            script = [sys.executable, "-m", "experiments.permuted", "--tiny"]
            subprocess.run([*script, "--out", f"{folder}/tiny"], check=True)
            return main(dataclasses.replace(args, runs=Path(folder), tiny=False))
    with usage_errors():
        results = read(args.runs)
        path = args.out / "results.json"
        before = kept(path) if path.is_file() else []
        if args.add and not path.is_file():
            raise UsageError(f"{path} is not there to add to: make a report without --add first")
        if args.add and args.scenario is not None:
            raise UsageError("--scenario makes a report of one scenario alone: leave out --add")
        entries = means(results, before if args.add else ())
        if args.scenario is not None:
            wanted = ss.parse_scenario(args.scenario)
            entries = [entry for entry in entries if entry.series.scenario == wanted]
            if not entries:
                raise UsageError(f"--runs {args.runs} has nothing of --scenario {args.scenario}")
        seeds = {entry.series: set(entry.seeds) for entry in entries}
        lost = [old for old in before if not set(old.seeds) <= seeds.get(old.series, set())]
        if lost:
            raise UsageError(
                f"{path} has {len(lost)} entries of other runs: pass --add to keep them, or name "
                "another --out"
            )
        runs = f"{len(results)} run" + "s" * (len(results) > 1)
        section = f"{runs}, gathered at commit {commit()}"
        section += ", beside those of the reports before" if args.add else ""
        section += f".\n\n{table(entries)}"
        writable_folder(args.out)
    figures = of_report(args.out, entries)
    links = ""
    for page in pages(args.out, entries):
        (args.out / f"{page.name}.md").write_text(written(page))
        links += f"- [{page.title}]({page.name}.md)\n"
    (args.out / "results.md").write_text(TITLE + section + (links and f"\n{links}"))
    save(path, entries)  # last: what was cut off before has replaced no data
    print(section)
    print("figures: " + (", ".join(str(args.out / name) for name in figures) or "none"))
    return {"entries": entries, "figures": figures}


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
