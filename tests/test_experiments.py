"""The script of permuted images, and what all scripts of runs refuse."""

import csv
import shutil
import time
from typing import ClassVar

import jax
import numpy as np
import pytest

from experiments import nns, permuted, rotated, split_cifar, split_imagenet, split_mnist
from experiments.frame import run
from tests.runs import MATRICES, EveryRun, error_of, main

pytestmark = pytest.mark.scripts

MODULES = {
    "permuted": permuted,
    "rotated": rotated,
    "nns": nns,
    "split_cifar": split_cifar,
    "split_imagenet": split_imagenet,
    "split_mnist": split_mnist,
}


class TestPermuted(EveryRun):
    module = permuted
    learned: ClassVar = [2] * 13 + [3] * 13
    files = f"{MATRICES} inferred.npz inferred.png"
    cut, calls = 3, 4
    kept = "tasks/tasks.bin tasks/index.bin tasks/manifest.json inferred.npz"
    changed = ("--steps 7", "train.steps is 50 there, 7 here")

    def test_a_sample_of_tasks_is_judged(self, finished, tmp_path):
        whole, _ = finished
        sample = main(permuted, tmp_path / "run", judge_most=2)
        assert len(sample["rows"]) == len(whole["rows"])
        for got, want in zip(sample["metrics"], whole["metrics"], strict=True):
            assert got["per_task"] == want["per_task"][::2]
            assert got["acc"] == np.mean(got["per_task"])
            assert {"forgetting", "bwt"} <= want.keys() - got.keys()
        for got, want in zip(sample["rows"], whole["rows"], strict=True):
            learned = want["tasks_learned"]
            assert (got["tasks_learned"], got.get("judge_every", 1)) == (learned, learned - 1)
            assert got["decisions"] * learned == want["decisions"] * 2
        assert not list((tmp_path / "run").glob("inferred.*"))  # 2 of 2 tasks, then 2 of 3
        with open(tmp_path / "run" / "accuracy.csv", newline="") as file:
            judged = {(row["tasks_learned"], row["task"]) for row in csv.DictReader(file)}
        assert judged == {("2", "0"), ("2", "1"), ("3", "0"), ("3", "2")}

    def test_a_damaged_store_stops_a_resume(self, finished, tmp_path, capsys):
        out = tmp_path / "run"
        shutil.copytree(finished[1], out)
        (out / "result.json").unlink()
        tasks = out / "tasks" / "tasks.bin"
        tasks.write_bytes(tasks.read_bytes()[:-100])
        argv = ["--tiny", "--out", str(out), "--resume"]
        assert "was cut short" in error_of(permuted, argv, capsys)


@pytest.mark.parametrize(
    ("name", "preset"),
    [(name, preset) for name, module in MODULES.items() for preset in module.PRESETS],
)
def test_presets_are_consistent(name, preset):
    module = MODULES[name]
    config = module.EXPERIMENT.config(module.Args(preset=preset))
    assert config.checkpoints[-1] == config.tasks
    assert list(config.checkpoints) == sorted(set(config.checkpoints))
    tiny = module.EXPERIMENT.config(module.Args(preset=preset, tiny=True))
    assert tiny.dataset in ("digits", "synthetic", "tiny_imagenet")
    assert tiny.tasks == tiny.checkpoints[-1] <= 3
    few = module.EXPERIMENT.config(module.Args(preset=preset, tasks=1))
    assert (few.tasks, tuple(few.checkpoints)) == (1, (1,))


@pytest.mark.parametrize(
    ("name", "argv", "message"),
    [
        *((name, "--seed -1", "--seed must not be negative, got -1") for name in MODULES),
        *((name, "--tasks 0", "--tasks must be at least 1, got 0") for name in MODULES),
        ("permuted", "--preset mnist-10 --data-dir {new}", "tfds build mnist"),
        ("permuted", "--preset mnist-10", "mnist needs --data-dir"),
        ("nns", "--preset mnist-100", "mnist needs --data-dir"),
        ("split_mnist", "--preset mnist-hopsupsup", "mnist needs --data-dir"),
        ("split_imagenet", "", "imagenet2012 needs --data-dir"),
        ("split_imagenet", "--data-dir {new}/..", "tfds build imagenet2012 --data_dir="),
        ("permuted", "--steps 0", "--steps must be at least 1"),
        ("permuted", "--judge-most 0", "--judge-most must be at least 1"),
        ("permuted", "--tiny --outputs 10", "outputs must be at least 11"),
        (
            "permuted",
            "--tiny --method ewc",
            "--method must be one of supsup, supsup_transfer, upper_bound",
        ),
        ("rotated", "--independent-seeds", "is of permutations, and rotated tasks have none"),
        ("split_cifar", "--independent-seeds", "is of permutations, and split tasks have none"),
        ("split_mnist", "--tasks 6", "--tasks must lie in [1, 5], got 6"),
        ("split_imagenet", "--tasks 101", "--tasks must lie in [1, 100], got 101"),
        ("split_imagenet", "--epochs 0", "--epochs must be at least 1, got 0"),
        ("split_imagenet", "--workers -1", "--workers must not be negative"),
        ("split_cifar", "--outputs 7", "takes --epochs, and as many outputs"),
        ("split_cifar", "--steps 7", "takes --epochs, and as many outputs"),
        ("split_cifar", "--method psp", "--method psp is none of a split run's"),
        ("split_cifar", "--epochs 0", "--epochs must be positive, got 0"),
        ("split_cifar", "--scale -1", "--scale must be positive, got -1.0"),
        ("split_cifar", "--method batche --scale 4", "which --method batche does not learn"),
    ],
)
def test_mistakes_end_in_one_line_and_leave_nothing(tmp_path, capsys, name, argv, message):
    new = tmp_path / "new"
    assert message in error_of(
        MODULES[name], [*argv.format(new=new).split(), "--out", str(new)], capsys
    )
    assert not new.exists()


def test_files_of_something_else_are_left_alone(tmp_path, capsys):
    thesis = tmp_path / "thesis.tex"
    thesis.write_text("")
    tiny = ["--tiny", "--out"]
    assert "files of something else" in error_of(permuted, [*tiny, str(tmp_path)], capsys)
    assert "is a file" in error_of(permuted, [*tiny, str(thesis)], capsys)
    assert list(tmp_path.iterdir()) == [thesis]


def test_an_unwritable_folder(tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        raise PermissionError(13, "Permission denied", str(tmp_path / "run"))

    monkeypatch.setattr(run.Path, "mkdir", fail)
    argv = ["--tiny", "--out", str(tmp_path / "run")]
    assert "Permission denied" in error_of(permuted, argv, capsys)


def test_a_damaged_progress_file(tmp_path, capsys):
    (tmp_path / "progress.json").write_text("{")
    argv = ["--tiny", "--out", str(tmp_path), "--resume"]
    assert "is damaged" in error_of(permuted, argv, capsys)


def test_seconds_are_counted_once(tmp_path):
    """Compilation, and a phase inside another, count there alone."""
    one = run.Run(tmp_path, {"seed": 0}, None)
    start = time.perf_counter()
    with one.phase("work"):
        jax.block_until_ready(jax.jit(lambda x: x * 3 + 1.2345)(1.0))
        with one.phase("inner"):
            jax.block_until_ready(jax.jit(lambda x: x * 4 + 1.2345)(1.0))
            time.sleep(0.05)
    spent = time.perf_counter() - start
    assert set(one.seconds) == {"work", "inner", "compile"}
    assert min(one.seconds.values()) >= 0
    assert one.seconds["inner"] >= 0.05
    assert sum(one.seconds.values()) <= spent
    compiling = one.seconds["compile"]
    jax.block_until_ready(jax.jit(lambda x: x * 5 + 1.2345)(1.0))
    assert one.seconds["compile"] == compiling  # outside a phase nothing listens any more
    with pytest.raises(AssertionError):
        jax.monitoring.unregister_event_duration_listener(one._on_event)
