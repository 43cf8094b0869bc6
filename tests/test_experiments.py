import csv
import dataclasses
import json

import numpy as np
import pytest

from experiments import permuted, reports, runs
from experiments.permuted import Args


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "tiny"
    return permuted.main(Args(tiny=True, out=out)), out


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
        "store.npz",
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
    train_tasks, calls = permuted.ss.train_tasks, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train_tasks(*arguments)

    monkeypatch.setattr(permuted.ss, "train_tasks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        permuted.main(args)
    assert not (args.out / "result.json").exists()
    got = permuted.main(dataclasses.replace(args, resume=True))
    assert len(calls) == 4  # the two tasks saved were not learned again
    assert got["rows"] == want["rows"]
    with np.load(args.out / "store.npz") as a, np.load(finished_out / "store.npz") as b:
        np.testing.assert_array_equal(a["masks"], b["masks"])


def test_a_finished_run_is_shown_and_not_repeated(finished, capsys, monkeypatch):
    want, out = finished
    monkeypatch.setattr(permuted.ss, "train_tasks", None)
    assert permuted.main(Args(tiny=True, out=out, resume=True)) == want
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
    monkeypatch.setattr(permuted, "finish", lambda *_: {})
    permuted.main(args)
    store = args.out / "store.npz"
    store.write_bytes(store.read_bytes()[:-100])
    capsys.readouterr()
    assert "not a whole store" in error_of(["--tiny", "--out", str(args.out), "--resume"], capsys)


def test_compile_seconds_are_counted_once(tmp_path):
    import jax

    run = runs.Run(tmp_path, {"seed": 0}, None)
    with run.phase("work"):
        jax.block_until_ready(jax.jit(lambda x: x * 3 + 1.2345)(1.0))
    assert set(run.seconds) == {"work", "compile"}
    assert run.seconds["work"] >= 0
