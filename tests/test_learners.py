"""What runs learn with: the baselines, resumed and counted; and SupSup by the Binary rule."""

import shutil
import types
from typing import ClassVar

import chex
import jax
import numpy as np
import pytest
from flax import nnx

import supsup_jax as ss
from experiments import permuted, rotated
from experiments.frame import learners, plots, rows
from supsup_jax import data
from tests.conftest import ConvNet
from tests.runs import MATRICES, EveryRun, assert_same_files, interrupt, main

pytestmark = pytest.mark.scripts


@pytest.mark.parametrize("method", ["psp", "abatche"])
def test_an_interrupted_baseline_resumes_to_the_same_result(tmp_path, monkeypatch, method):
    want = main(permuted, tmp_path / "whole", method=method)
    found = {(row["method"], row["scenario"], row["objective"]) for row in want["rows"]}
    inferred = {
        (name, scenario, objective)
        for name, _, objective in learners.INFERENCES
        for scenario in ("gns", "gnu")
    }
    assert found == {(method, "gg", None), *(inferred if method == "abatche" else ())}
    assert set(plots.METHODS) >= {name for name, _, _ in found}
    assert max(row["accuracy"] for row in want["rows"]) > 0.2  # chance is a tenth
    calls = interrupt(monkeypatch, learners.baselines, "learn", 3)
    with pytest.raises(KeyboardInterrupt):
        main(permuted, tmp_path / "cut", method=method)
    got = main(permuted, tmp_path / "cut", method=method, resume=True)
    assert len(calls) == 4  # the two tasks saved were not learned again
    assert got["rows"] == want["rows"]


def test_a_run_whose_save_was_interrupted_resumes(tmp_path, monkeypatch):
    """The mean of scores is kept before the tasks, of which only the first is in time."""
    want = main(permuted, tmp_path / "whole", method="supsup_transfer")
    with monkeypatch.context() as patch:
        interrupt(patch, ss.DiskStore, "append", 2)
        with pytest.raises(KeyboardInterrupt):
            main(permuted, tmp_path / "cut", method="supsup_transfer")
    with ss.DiskStore.open(tmp_path / "cut" / "tasks") as disk:
        assert len(disk) == 1
    got = main(permuted, tmp_path / "cut", method="supsup_transfer", resume=True)
    assert got["rows"] == want["rows"]
    assert_same_files(tmp_path / "cut" / "tasks", tmp_path / "whole" / "tasks", "tasks.bin")


def test_a_damaged_checkpoint_stops_a_resumed_run_and_says_what_to_do(
    tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    interrupt(monkeypatch, ss, "train_task", 3)
    with pytest.raises(KeyboardInterrupt):
        main(permuted, run, method="supsup_transfer")
    # Not a part of its arrays: reads of the others, under way, would fail in tests to come.
    shutil.rmtree(run / "checkpoints" / "2" / "default")
    with pytest.raises(SystemExit):
        main(permuted, run, method="supsup_transfer", resume=True)
    told = capsys.readouterr().err
    assert f"{run / 'checkpoints' / '2'} is damaged" in told
    assert f"delete {run / 'checkpoints'}, and the run learns its tasks anew" in told


def test_a_default_folder_names_what_is_not_the_presets():
    def name(**given):
        return str(permuted.EXPERIMENT.folder(permuted.Args(preset="mnist-10", **given)))

    assert name(data_dir="data", num_processes=2) == "runs/permuted/mnist-10-seed0"
    assert name(tasks=5, judge_most=3, independent_seeds=True, outputs=25) == (
        "runs/permuted/mnist-10-s25-seed0-tasks5-judge_most3-independent_seeds"
    )
    assert name(tasks=1_000_001).endswith("-tasks1000001")


@pytest.mark.parametrize("method", ["lower_bound", "abatche"])
def test_statistics_of_norms_are_saved_restored_and_counted(tmp_path, method):
    config = permuted.EXPERIMENT.config(permuted.Args(tiny=True, method=method, steps=3))
    net = ss.signed_constant(ss.Network.from_nnx(ConvNet(10, rngs=nnx.Rngs(0))), 0)
    stream = data.PermutedStream(data.synthetic(jax.random.key(0), (8, 8), 10, 128, 40), 3)
    run = types.SimpleNamespace(out=tmp_path)
    whole, cut = (learners.Compared(config, net, stream, run) for _ in range(2))
    for i in range(2):
        whole.learn(range(i, i + 1))
    whole.save()
    cut.restore()
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
    counted = cut.bytes()
    assert counted["norm_statistics"] == statistics
    kernels = (3 * 3 * 4) + (3 * 3 * 4 * 4) + (4 * 10)
    factors = 3 * ((1 + 4) + (4 + 4) + (4 + 10)) if method == "abatche" else 0
    assert counted["total"] == 4 * (kernels + factors) + statistics + 4


class TestRotated(EveryRun):
    module = rotated
    learned: ClassVar = [2] * 4 + [3] * 4
    files = f"{MATRICES} inferred.npz inferred.png"
    test_an_interrupted_run_resumes_to_the_same_result = None  # by permuted's

    def test_it_runs_by_the_binary_rule(self, finished):
        result, _ = finished
        assert result["config"]["rule"] == "binary_search"
        assert result["experiment"] == "rotated"
        (gnu,) = rows.find(result["rows"], scenario="gnu", tasks_learned=3)
        assert (gnu["protocol"], gnu["decisions"]) == ("batch-128", 3)
