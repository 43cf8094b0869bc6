"""The report of finished runs: its table, its figures, and what it keeps of the reports before."""

import contextlib
import json
import re
import subprocess

import numpy as np
import pytest

from experiments import report
from experiments.frame import figures, plots, series
from experiments.frame.run import SCHEMA
from tests.conftest import ROOT


def fake_run(
    folder,
    seed,
    accuracy,
    method="supsup",
    outputs=100,
    tasks=50,
    experiment="permuted",
    judge_every=1,
    **config,
):
    """A result.json as a run of permuted MNIST would leave it."""
    folder.mkdir(parents=True)
    scenario = "gnu" if method == "supsup" else "gg"
    row = {
        "method": method,
        "scenario": scenario,
        "objective": "entropy" if scenario == "gnu" else None,
        "protocol": "paper" if scenario == "gnu" else "given",
        "images_per_task": None,
        "tasks_learned": tasks,
        "decisions": 79 * tasks,
        "judge_every": judge_every,
        "accuracy": accuracy,
        "task_accuracy": 1.0 if scenario == "gnu" else None,
    }
    result = {
        "schema": SCHEMA,
        "experiment": experiment,
        "seed": seed,
        "seconds": {"train": 2.0, "evaluate": 1.0, "compile": 0.5},
        "device": "1 x cpu, 2 cores",
        "config": {
            "dataset": "mnist",
            "model": "lenet_300_100",
            "outputs": outputs,
            "tasks": tasks,
            "stream": "permuted",
            "method": method,
            **config,
        },
        "rows": [row, {**row, "tasks_learned": 7, "accuracy": 0.5}],
    }
    (folder / "result.json").write_text(json.dumps(result))


def test_the_report_averages_seeds_and_stands_beside_the_paper(tmp_path, capsys):
    for seed, accuracy in enumerate((0.93, 0.94, 0.95)):
        fake_run(tmp_path / f"runs/a/{seed}", seed, accuracy)
    fake_run(tmp_path / "runs/b", 0, 0.88, method="batche", outputs=10)
    fake_run(tmp_path / "runs/c", 0, 0.90, outputs=25)
    made = report.main(report.Args(tmp_path / "runs", tmp_path / "out"))
    assert made["figures"] == ["figure_3_left.png", "figure_6_lenet.png"]
    assert all((tmp_path / "out" / name).stat().st_size > 1000 for name in made["figures"])
    text = (tmp_path / "out" / "results.md").read_text()
    assert text.startswith("# All runs\n")
    assert "\n5 runs, gathered at commit " in text
    title = "Figure 3, left: permuted MNIST, LeNet-300-100, 100 outputs"
    assert f"\n- [{title}](figure_3_left.md)\n" in text
    page = (tmp_path / "out" / "figure_3_left.md").read_text()
    assert page.startswith(f"# {title}\n\n![{title}](figure_3_left.png)\n")
    assert "\n    python -m experiments.permuted --preset mnist-250-lenet\n" in page
    assert "\nIn all lines: experiment permuted mnist, seconds a run 4.\n" in page
    lines = [line for line in page.splitlines() if line.startswith("| LeNet")]
    assert [line.split(" | ")[5] for line in lines] == ["7", "50", "7", "50"]  # every point
    assert not any("25 outputs" in line for line in lines)
    widths = (tmp_path / "out" / "figure_6_lenet.md").read_text()
    assert [line.split(" | ")[1] for line in widths.splitlines()[-4:-2]] == ["50", "50"]
    supsup = next(line for line in text.splitlines() if "100 outputs | SupSup" in line)
    cells = [cell.strip() for cell in supsup.split("|")]
    # Paper: .9368 at 50 tasks; deviation of .93, .94, .95 is .01.
    assert cells[7:11] == ["50", "0.9400 ± 0.0100", "0.9368", "+0.0032"]
    assert cells[-3:-1] == ["0 to 2", "4"]  # seeds; 3.5 seconds each
    batche = next(line for line in text.splitlines() if "BatchE" in line)
    assert "| 0.8800 | 0.8833 | -0.0033 |" in batche
    given = report.main(report.Args(tmp_path / "runs", tmp_path / "out2", scenario="task-IL"))
    assert {entry.series.scenario for entry in given["entries"]} == {"gg"}
    assert "| 7 |" not in text  # neither the end of a run nor a number of the paper's


def test_a_report_adds_to_the_one_before(tmp_path):
    out = tmp_path / "out"
    for seed in range(3):
        fake_run(tmp_path / f"a/{seed}", seed, 0.93 + seed / 100)
    report.main(report.Args(tmp_path / "a", out))
    before = (out / "results.md").read_text()
    picture = (out / "figure_3_left.png").read_bytes()
    kept = json.loads((out / "results.json").read_text())["entries"]
    # A run of something else: every line stays to the letter, and so does the picture.
    fake_run(tmp_path / "b", 0, 0.7, dataset="digits")
    made = report.main(report.Args(tmp_path / "b", out, add=True))
    after = (out / "results.md").read_text()
    assert re.search(
        r"^1 run, gathered at commit \S+, beside those of the reports before\.$", after, re.M
    )
    lines = [line for line in before.splitlines() if line.startswith("|")]
    assert set(lines) < set(after.splitlines())
    assert len([line for line in after.splitlines() if line.startswith("|")]) == len(lines) + 1
    assert made["figures"] == []
    assert (out / "figure_3_left.png").read_bytes() == picture
    assert "](figure_3_left.md)" in after
    entries = json.loads((out / "results.json").read_text())["entries"]
    assert all(entry in entries for entry in kept)
    # Runs of the same series with all of its seeds take the line's place, and draw anew.
    for seed in range(3):
        fake_run(tmp_path / f"c/{seed}", seed, 0.8)
    report.main(report.Args(tmp_path / "c", out, add=True))
    text = (out / "results.md").read_text()
    assert "| 0.8000 ± 0.0000 | 0.9368 |" in text
    assert "0.9400 ± 0.0100" not in text
    assert (out / "figure_3_left.png").read_bytes() != picture


def test_seeds_come_one_after_another(tmp_path):
    """As if all had been gathered at once; one that is there already counts once."""
    accuracies = [0.93, 0.95, 0.91, 0.96, 0.90]
    for seed, accuracy in enumerate(accuracies):
        fake_run(tmp_path / f"all/{seed}", seed, accuracy)
        fake_run(tmp_path / f"{min(seed, 3)}/{seed}", seed, accuracy)
    fake_run(tmp_path / "2/again", 0, 0.1)
    at_once = report.main(report.Args(tmp_path / "all", tmp_path / "at_once"))["entries"]
    for i in range(4):
        made = report.main(report.Args(tmp_path / str(i), tmp_path / "out", add=i > 0))
    for got, want in zip(made["entries"], at_once, strict=True):
        for name in ("series", "seeds", "decisions", "task_accuracy", "last", "device"):
            assert getattr(got, name) == getattr(want, name)
        for name in ("accuracy", "deviation", "seconds"):
            assert getattr(got, name) == pytest.approx(getattr(want, name), rel=1e-12)
    at_end = next(entry for entry in at_once if entry.series.tasks == 50)
    assert at_end.accuracy == pytest.approx(np.mean(accuracies))
    assert at_end.deviation == pytest.approx(np.std(accuracies, ddof=1))
    assert report.listed(at_end.seeds) == "0 to 4"
    assert [report.listed(seeds) for seeds in ([3], [0, 2])] == ["3", "0 2"]


def test_a_run_of_another_setup_or_of_a_sample_stands_beside(tmp_path):
    """What does not differ in its seed alone is no second measurement of one thing."""
    out = tmp_path / "out"
    train = {"decay": 0.9, "rule": None}
    fake_run(tmp_path / "a", 0, 0.93, train={"steps": 1000, **train})
    report.main(report.Args(tmp_path / "a", out))
    fake_run(tmp_path / "b/steps", 0, 0.91, train={"steps": 500, **train}, new=None)
    fake_run(tmp_path / "b/sample", 0, 0.92, judge_every=3, train={"steps": 1000, **train})
    fake_run(tmp_path / "b/narrow", 0, 0.90, outputs=25, train={"steps": 1000, **train})
    made = report.main(report.Args(tmp_path / "b", out, add=True))
    text = (out / "figure_3_left.md").read_text()
    found = re.findall(r"\| ([^|]+) \| (0\.9\d+) \|", text)
    ours = [("50", "0.9300"), ("50 (17 judged)", "0.9200"), ("50", "0.9100")]
    assert sorted(pair for pair in found if not pair[0].startswith("7")) == sorted(ours)
    assert text.count("| SupSup, train.steps 500 | ") == text.count("train.steps 500") == 2
    # Of one series the picture has the points of most tasks judged; of another setup, that said.
    drawn = figures._curves([e for e in made["entries"] if e.series[3::7] == (100, 50)])
    curves = {curve["label"]: (curve["points"], curve["style"]) for curve in drawn}
    assert curves == {
        "SupSup, GNu, H, train.steps 1000": ({50: 0.93}, "o-"),
        "SupSup, GNu, H, train.steps 500": ({50: 0.91}, "o:"),
    }
    # Widths are compared at one setup.
    widths = figures._by_outputs(made["entries"], "lenet_300_100")
    assert {n: entry["entropy"].accuracy for n, entry in widths.items()} == {100: 0.93, 25: 0.9}


def test_what_a_report_has_is_not_lost(tmp_path, capsys):
    out = tmp_path / "out"
    for seed in range(3):
        fake_run(tmp_path / f"a/{seed}", seed, 0.93)
    report.main(report.Args(tmp_path / "a", out))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    fake_run(tmp_path / "b", 3, 0.9, outputs=25)
    fake_run(tmp_path / "c", 0, 0.9)
    for folder, options, message in (
        ("b", {}, "has 2 entries of other runs: pass --add to keep them"),
        ("c", {}, "has 2 entries of other runs: pass --add to keep them"),
        ("b", {"add": True, "scenario": "GNu"}, "of one scenario alone: leave out --add"),
        ("b", {"scenario": "NNs"}, "has nothing of --scenario NNs"),
    ):
        with pytest.raises(SystemExit):
            report.main(report.Args(tmp_path / folder, out, **options))
        assert message in capsys.readouterr().err
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    report.main(report.Args(tmp_path / "a", out))  # the same runs again lose nothing


def test_what_lies_beyond_a_figure_has_one_of_its_own(tmp_path):
    out = tmp_path / "out"
    fake_run(tmp_path / "a", 0, 0.9345, outputs=500, tasks=2500)
    made = report.main(report.Args(tmp_path / "a", out))
    assert made["figures"] == ["figure_4.png"]
    fake_run(tmp_path / "b", 0, 0.9340, outputs=500, tasks=5000)
    made = report.main(report.Args(tmp_path / "b", out, add=True))
    assert "beyond_figure_4.png" in made["figures"]
    for page, tasks in (("beyond_figure_4", [7, 2500, 5000]), ("figure_4", [7, 2500])):
        lines = (out / f"{page}.md").read_text().splitlines()
        found = [line.split(" | ")[0] for line in lines if " | 0." in line]
        assert found == [f"| {number:,}" for number in tasks]


def test_a_picture_that_no_run_stands_behind_has_no_page(tmp_path):
    out = tmp_path / "out"
    fake_run(tmp_path / "a", 0, 0.93)
    report.main(report.Args(tmp_path / "a", out))
    (out / "results.json").unlink()
    fake_run(tmp_path / "b", 0, 0.9, dataset="digits")
    report.main(report.Args(tmp_path / "b", out))
    assert "figure_3_left" not in (out / "results.md").read_text()


def lines_of(out):
    """Of a report's page all lines but the one that says what was gathered when."""
    lines = (out / "results.md").read_text().splitlines()
    return [line for line in lines if "gathered at commit" not in line]


def test_a_report_added_to_itself_stays_as_it_is(tmp_path):
    """Two experiments go by one name in the table; no line may come twice for that."""
    out = tmp_path / "out"
    for experiment in ("permuted", "rotated", "split", "split_mnist", "nns"):
        for scale in (None, 8, 32):
            folder = tmp_path / "runs" / f"{experiment}{scale}"
            made = {"experiment": experiment, "dataset": f"{experiment}_data"}
            fake_run(folder, 0, 0.9, width=10, scale=scale, **made)
    report.main(report.Args(tmp_path / "runs", out))
    before = lines_of(out)
    data = (out / "results.json").read_bytes()
    report.main(report.Args(tmp_path / "runs", out, add=True))
    assert lines_of(out) == before
    assert (out / "results.json").read_bytes() == data


def test_mistakes_of_the_report(tmp_path, capsys):
    def error(*args):
        with pytest.raises(SystemExit) as exit_:
            report.main(report.Args(*args))
        assert exit_.value.code == 2
        return capsys.readouterr().err

    out = tmp_path / "out"
    assert "is no folder" in error(tmp_path / "none", out)
    fake_run(tmp_path / "one", 0, 0.9)
    assert "NNs (task-free), got 'x'" in error(tmp_path / "one", out, "x")
    assert "results.json is not there to add to" in error(tmp_path / "one", out, None, True)
    before = tmp_path / "before"
    before.mkdir()
    for text, message in (
        ("[", "is damaged"),
        ('{"schema": 1}', "has schema 1, this release 2"),
        ('{"schema": 2, "entries": [{"tasks": 1}]}', "is damaged: KeyError('experiment')"),
    ):
        (before / "results.json").write_text(text)
        said = error(tmp_path / "one", before, None, True)
        assert f"results.json {message}" in said
        assert [path.name for path in before.iterdir()] == ["results.json"]
    (tmp_path / "runs").mkdir()
    assert "holds no finished run" in error(tmp_path / "runs", out)
    fake_run(tmp_path / "runs/a", 0, 0.9)
    (tmp_path / "runs/a/result.json").write_text("{")
    assert "result.json is damaged" in error(tmp_path / "runs", out)
    assert not out.exists()


def test_what_was_measured_once_is_kept_as_data():
    """docs/results: its pages say what their data say, which no run need be kept for."""
    folder = ROOT / "docs" / "results"
    entries = series.kept(folder / "results.json")
    assert report.table(entries) in (folder / "results.md").read_text()
    pages = figures.pages(folder, entries)
    assert len(pages) == len({path.stem for path in folder.glob("*figure_*.md")}) > 6
    for page in pages:
        assert (folder / f"{page.name}.md").read_text() == report.written(page)


def test_the_legend_says_which_curves_lie_below_the_picture(tmp_path, monkeypatch):
    said = []

    def keep(fig, path):
        said.extend(text.get_text() for text in fig.legends[0].get_texts())

    monkeypatch.setattr(plots, "_save", keep)
    row = {"objective": None, "method": "psp", "scenario": "gg"}
    heights = {"above": (0.95, 0.94), "falls": (0.95, 0.5), "one": (0.5, 0.4)}
    curves = [plots.curve(name, dict(enumerate(each)), row) for name, each in heights.items()]
    plots.accuracy_against_tasks(tmp_path / "it.png", "", curves, bottom=0.9)
    assert said == ["above", "falls", "one (below)"]


def test_a_tiny_report_is_of_a_run_made_first(tmp_path, monkeypatch):
    commands = []

    def made(command, **_):
        if command[0] != "git":
            commands.append(command[1:])
            fake_run(tmp_path / "runs", 0, 0.9)
        return subprocess.CompletedProcess(command, 0, stdout="")

    monkeypatch.setattr(report.subprocess, "run", made)
    folder = contextlib.nullcontext(str(tmp_path / "runs"))
    monkeypatch.setattr(report.tempfile, "TemporaryDirectory", lambda: folder)
    made = report.main(report.Args(out=tmp_path / "out", tiny=True))
    assert commands[0][:3] == ["-m", "experiments.permuted", "--tiny"]
    assert len(made["entries"]) == 2
