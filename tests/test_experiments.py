import csv
import dataclasses
import json
import re
import types

import chex
import jax
import numpy as np
import pytest
from flax import nnx

import supsup_jax as ss
from experiments import permuted, report, rotated
from experiments.frame import learners, plots
from experiments.frame import loop as continual
from experiments.frame import rows as reports
from experiments.frame import run as runs
from experiments.permuted import Args
from supsup_jax import data
from tests.conftest import ConvNet


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "tiny"
    return continual.main(Args(tiny=True, out=out)), out


def test_a_run_writes_what_it_promises(finished):
    result, out = finished
    assert json.loads((out / "result.json").read_text()) == result
    assert {path.name for path in out.iterdir()} == {
        "accuracy.csv",
        "accuracy.png",
        "inferred.npz",
        "inferred.png",
        "matrix.png",
        "progress.json",
        "result.json",
        "tasks",
    }
    for key in ("schema", "config", "seed", "seconds", "bytes", "versions", "device", "rows"):
        assert key in result
    learned = [row["tasks_learned"] for row in result["rows"]]
    assert learned == sorted(learned)
    assert set(learned) == {2, 3}
    for row in result["rows"]:
        assert row["method"] == "supsup"
        assert row["scenario"] in ("gg", "gns", "gnu")
        assert 0 <= row["accuracy"] <= 1
        assert (row["task_accuracy"] is None) == (row["scenario"] == "gg")
    best = max(row["accuracy"] for row in result["rows"] if row["scenario"] == "gg")
    assert best > 0.8


def test_the_csv_means_what_the_result_says(finished):
    result, out = finished
    with open(out / "accuracy.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    for row in result["rows"]:
        mine = [
            float(line["accuracy"])
            for line in lines
            if all(line[name] == str(row[name] or "") for name in reports.SERIES)
            and int(line["tasks_learned"]) == row["tasks_learned"]
        ]
        assert len(mine) == row["tasks_learned"]
        assert np.mean(mine) == pytest.approx(row["accuracy"])


def test_an_interrupted_run_resumes_to_the_same_result(finished, tmp_path, monkeypatch):
    want, finished_out = finished
    args = Args(tiny=True, out=tmp_path / "run")
    train_tasks, calls = ss.train_tasks, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train_tasks(*arguments)

    monkeypatch.setattr(ss, "train_tasks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        continual.main(args)
    assert not (args.out / "result.json").exists()
    got = continual.main(dataclasses.replace(args, resume=True))
    assert len(calls) == 4  # the two tasks saved were not learned again
    assert got["rows"] == want["rows"]
    for name in ("tasks.bin", "index.bin", "manifest.json"):
        assert (args.out / "tasks" / name).read_bytes() == (
            finished_out / "tasks" / name
        ).read_bytes()


def test_a_finished_run_is_shown_and_not_repeated(finished, capsys, monkeypatch):
    want, out = finished
    monkeypatch.setattr(ss, "train_tasks", None)
    assert continual.main(Args(tiny=True, out=out, resume=True)) == want
    assert "is finished" in capsys.readouterr().out


def test_presets_that_need_data_have_tiny_runs_of_drawn_images():
    for preset in permuted.PRESETS:
        config = Args(preset=preset, tiny=True).config()
        assert config.dataset in ("digits", "synthetic")
        assert config.tasks == 3


@pytest.mark.parametrize("preset", permuted.PRESETS)
def test_presets_are_consistent(preset):
    config = permuted.PRESETS[preset]
    assert config.checkpoints[-1] == config.tasks
    assert list(config.checkpoints) == sorted(set(config.checkpoints))


def error_of(argv, capsys):
    with pytest.raises(SystemExit) as exit_:
        permuted.cli(argv)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_mistakes_end_in_one_line_and_exit_code_2(finished, tmp_path, capsys):
    _, out = finished
    new = tmp_path / "new"
    mnist = ["--preset", "mnist-10", "--out", str(new)]
    assert "tfds build mnist" in error_of([*mnist, "--data-dir", str(tmp_path / "no")], capsys)
    assert "mnist needs --data-dir" in error_of(mnist, capsys)
    assert "pass --resume to continue it" in error_of(["--tiny", "--out", str(out)], capsys)
    changed = error_of(["--tiny", "--out", str(out), "--seed", "1", "--resume"], capsys)
    assert "seed is 0 there, 1 here" in changed
    assert "train.steps is 50 there, 7 here" in error_of(
        ["--tiny", "--out", str(out), "--steps", "7", "--resume"], capsys
    )
    assert "--tasks must be at least 1" in error_of(["--tasks", "0", "--out", str(new)], capsys)
    assert "--steps must be at least 1" in error_of(["--steps", "0", "--out", str(new)], capsys)
    assert "--seed must not be negative" in error_of(["--seed", "-1", "--out", str(new)], capsys)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("")
    assert "files of something else" in error_of(["--tiny", "--out", str(foreign)], capsys)
    assert "is a file" in error_of(["--tiny", "--out", str(foreign / "thesis.tex")], capsys)
    assert not new.exists()
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]


def test_an_unwritable_folder(tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        raise PermissionError(13, "Permission denied", str(tmp_path / "run"))

    monkeypatch.setattr(runs.Path, "mkdir", fail)
    assert "Permission denied" in error_of(["--tiny", "--out", str(tmp_path / "run")], capsys)


def test_a_damaged_progress_file(tmp_path, capsys):
    (tmp_path / "progress.json").write_text("{")
    assert "is damaged" in error_of(["--tiny", "--out", str(tmp_path), "--resume"], capsys)


def test_a_damaged_store_stops_a_resume(tmp_path, capsys, monkeypatch):
    args = Args(tiny=True, out=tmp_path / "run")
    monkeypatch.setattr(continual, "finish", lambda *_: {})
    continual.main(args)
    tasks = args.out / "tasks" / "tasks.bin"
    tasks.write_bytes(tasks.read_bytes()[:-100])
    capsys.readouterr()
    assert "was cut short" in error_of(["--tiny", "--out", str(args.out), "--resume"], capsys)


def test_compile_seconds_are_counted_once(tmp_path):
    run = runs.Run(tmp_path, {"seed": 0}, None)
    with run.phase("work"):
        jax.block_until_ready(jax.jit(lambda x: x * 3 + 1.2345)(1.0))
    assert set(run.seconds) == {"work", "compile"}
    assert run.seconds["work"] >= 0


@pytest.mark.parametrize("method", ["psp", "abatche"])
def test_an_interrupted_baseline_resumes_to_the_same_result(tmp_path, monkeypatch, method):
    args = Args(tiny=True, method=method, out=tmp_path / "whole")
    want = continual.main(args)
    assert [row["method"] for row in want["rows"]][:1] == [method]
    assert max(row["accuracy"] for row in want["rows"]) > 0.5
    learn, calls = learners.baselines.learn, []

    def interrupted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return learn(*arguments, **options)

    monkeypatch.setattr(learners.baselines, "learn", interrupted)
    args = dataclasses.replace(args, out=tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        continual.main(args)
    got = continual.main(dataclasses.replace(args, resume=True))
    assert len(calls) == 4  # the two tasks saved were not learned again
    assert got["rows"] == want["rows"]


@pytest.mark.parametrize("method", ["lower_bound", "abatche"])
def test_statistics_of_norms_are_saved_restored_and_counted(tmp_path, method):
    config = Args(tiny=True, method=method, steps=3).config()
    net = ss.signed_constant(ss.Network.from_nnx(ConvNet(10, rngs=nnx.Rngs(0))), 0)
    stream = data.PermutedStream(data.synthetic(jax.random.key(0), (8, 8), 10, 128, 40), 3)
    run = types.SimpleNamespace(out=tmp_path)
    whole, cut = (learners.Compared(config, net, stream) for _ in range(2))
    for i in range(2):
        whole.learn(range(i, i + 1))
    whole.save(run)
    cut.restore(run)
    assert cut.done == 2
    for learner in (whole, cut):
        learner.learn(range(2, 3))
    np.testing.assert_array_equal(cut.accuracies, whole.accuracies)
    chex.assert_trees_all_equal(cut._state(), whole._state())
    statistics = 2 * 2 * 4 * 4  # mean and variance of two norms of four features
    if method == "abatche":
        first = jax.tree.map(lambda rows: rows[0], cut.store.states)
        chex.assert_trees_all_equal(first, cut.store.task(0).state)
        assert not np.array_equal(first["stem_norm"]["mean"], cut.statistics["stem_norm"]["mean"])
        statistics *= 3
    counted = cut.bytes(run)
    assert counted["norm_statistics"] == statistics
    kernels = (3 * 3 * 4) + (3 * 3 * 4 * 4) + (4 * 10)
    factors = 3 * ((1 + 4) + (4 + 4) + (4 + 10)) if method == "abatche" else 0
    assert counted["total"] == 4 * (kernels + factors) + statistics + 4


def test_abatche_is_judged_by_every_rule(tmp_path):
    result = continual.main(Args(tiny=True, method="abatche", out=tmp_path / "run"))
    found = {(row["method"], row["scenario"], row["objective"]) for row in result["rows"]}
    inferred = {
        (method, scenario, name)
        for method, _, name in learners.INFERENCES
        for scenario in ("gns", "gnu")
    }
    assert found == {("abatche", "gg", None), *inferred}
    assert set(plots.METHODS) >= {method for method, _, _ in found}


def test_rotated_runs_by_the_binary_rule(tmp_path):
    args = rotated.Args(tiny=True, out=tmp_path / "run")
    assert args.config().rule == "binary_search"
    result = continual.main(args)
    assert result["experiment"] == "rotated"
    (gnu,) = reports.find(result["rows"], scenario="gnu", tasks_learned=3)
    assert (gnu["protocol"], gnu["decisions"]) == ("batch-128", 3)


def test_mistakes_of_methods_and_widths(capsys, tmp_path):
    new = ["--out", str(tmp_path / "new"), "--tiny"]
    assert "--method must be one of supsup, supsup_transfer, upper_bound" in error_of(
        [*new, "--method", "ewc"], capsys
    )
    assert "outputs must be at least 11" in error_of([*new, "--outputs", "10"], capsys)
    assert not (tmp_path / "new").exists()


def fake_run(
    folder,
    seed,
    accuracy,
    method="supsup",
    outputs=100,
    tasks=50,
    experiment="permuted",
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
        "accuracy": accuracy,
        "task_accuracy": 1.0 if scenario == "gnu" else None,
    }
    result = {
        "schema": runs.SCHEMA,
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
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
    made = report.main(report.Args(tmp_path / "runs", tmp_path / "out", readme))
    assert made["figures"] == ["figure_3_left.png", "figure_6_lenet.png"]
    assert all((tmp_path / "out" / name).stat().st_size > 1000 for name in made["figures"])
    text = readme.read_text()
    assert text.startswith("before\n<!-- results -->\n5 runs, gathered at commit ")
    assert "\n![Figure 3 left](out/figure_3_left.png)\n" in text
    assert text.endswith("<!-- /results -->\nafter\n")
    assert "old" not in text
    supsup = next(line for line in text.splitlines() if "100 outputs | SupSup" in line)
    cells = [cell.strip() for cell in supsup.split("|")]
    # Paper: .9368 at 50 tasks; deviation of .93, .94, .95 is .01.
    assert cells[7:11] == ["50", "0.9400 ± 0.0100", "0.9368", "+0.0032"]
    assert cells[-3:-1] == ["3", "4"]  # seeds; 3.5 seconds each
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
    # A run of something else: every line stays to the letter, and so does the picture.
    fake_run(tmp_path / "b", 0, 0.7, dataset="digits")
    made = report.main(report.Args(tmp_path / "b", out, add=True))
    after = (out / "results.md").read_text()
    assert re.match(r"1 runs, gathered at commit \S+, beside those of the reports before\.", after)
    lines = [line for line in before.splitlines() if line.startswith("|")]
    assert set(lines) < set(after.splitlines())
    assert len([line for line in after.splitlines() if line.startswith("|")]) == len(lines) + 1
    assert made["figures"] == ["figure_3_left.png"]
    assert (out / "figure_3_left.png").read_bytes() == picture
    # A run of the same series takes the line's place, and draws anew.
    fake_run(tmp_path / "c", 5, 0.8)
    report.main(report.Args(tmp_path / "c", out, add=True))
    text = (out / "results.md").read_text()
    assert "| 0.8000 | 0.9368 |" in text
    assert "0.9400 ± 0.0100" not in text
    assert (out / "figure_3_left.png").read_bytes() != picture


def test_a_report_added_to_itself_stays_as_it_is(tmp_path):
    """Two experiments go by one name in the table; no line may come twice for that."""
    out = tmp_path / "out"
    for experiment in ("permuted", "rotated", "split", "split_mnist", "nns"):
        for scale in (None, 8, 32):
            folder = tmp_path / "runs" / f"{experiment}{scale}"
            made = {"experiment": experiment, "dataset": f"{experiment}_data"}
            fake_run(folder, 0, 0.9, width=10, scale=scale, **made)
    report.main(report.Args(tmp_path / "runs", out))
    before = (out / "results.md").read_text().splitlines()
    report.main(report.Args(tmp_path / "runs", out, add=True))
    after = (out / "results.md").read_text().splitlines()
    assert sorted(after[1:]) == sorted(before[1:])


def test_mistakes_of_the_report(tmp_path, capsys):
    def error(*args):
        with pytest.raises(SystemExit) as exit_:
            report.main(report.Args(*args))
        assert exit_.value.code == 2
        return capsys.readouterr().err

    out = tmp_path / "out"
    assert "is no folder" in error(tmp_path / "none", out)
    fake_run(tmp_path / "one", 0, 0.9)
    assert "NNs (task-free), got 'x'" in error(tmp_path / "one", out, None, "x")
    assert "has no table of this release's columns" in error(
        tmp_path / "one", out, None, None, True
    )
    (tmp_path / "runs").mkdir()
    assert "holds no finished run" in error(tmp_path / "runs", out)
    fake_run(tmp_path / "runs/a", 0, 0.9)
    (tmp_path / "README.md").write_text("no markers")
    assert "must hold <!-- results -->" in error(tmp_path / "runs", out, tmp_path / "README.md")
    (tmp_path / "runs/a/result.json").write_text("{")
    assert "result.json is damaged" in error(tmp_path / "runs", out)
    assert not out.exists()
