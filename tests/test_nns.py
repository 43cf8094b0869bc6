import dataclasses
import json
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

import supsup_jax as ss
from experiments import nns
from experiments.frame import loop
from experiments.frame.config import dense_network, load
from experiments.nns import Args
from tests.conftest import filled_store, random_masks
from tests.runs import EveryRun, assert_same_files, error_of, interrupt, main
from tests.training.test_stream import toy_data

pytestmark = pytest.mark.scripts


class TestNns(EveryRun):
    module = nns
    learned: ClassVar = [2, 2, 3, 3]
    files = "accuracy.png assignment.png decisions.npz novelty.png store.supsup"
    trains = (ss.stream, "observe")
    cut, calls = 8, 8 + 3
    kept = "store.supsup decisions.npz"
    above = 0.1  # a mask of three tasks, after 20 batches

    def test_the_rows_say_how_many_tasks_were_found(self, finished):
        for row in finished[0]["rows"]:
            assert row["scenario"] == "nns"
            assert 0 < row["found"] <= row["tasks_learned"]

    def test_the_decisions_say_what_the_result_says(self, finished):
        result, out = finished
        with np.load(out / "decisions.npz") as windows:
            task, mask, allocated = windows["task"], windows["mask"], windows["allocated"]
            max_nu, threshold, loss = windows["max_nu"], windows["threshold"], windows["loss"]
        np.testing.assert_array_equal(task, np.repeat(range(3), 3))
        row = result["rows"][-1]
        assert allocated.sum() == mask.max() + 1 == row["masks"]
        pairs = set(zip(task.tolist(), mask.tolist(), strict=True))
        assert row["split"] == sum(len({m for t, m in pairs if t == i}) > 1 for i in range(3))
        assert np.isfinite(loss).all()
        assert np.isnan(max_nu[0])
        # What is not new may be a decoy that won; what is new is allocated.
        assert allocated[1:][max_nu[1:] < threshold[1:]].all()
        height = max_nu * 1.125 / threshold
        assert result["novelty"]["new_highest"] == pytest.approx(np.nanmax(height[::3]))
        config = nns.EXPERIMENT.config(Args(tiny=True))
        net = dense_network(config, nns.load(config, Args()))
        assert int(ss.MaskStore.load(out / "store.supsup", net).num_tasks) == row["masks"]

    @pytest.mark.parametrize("place", ["slot", "store", "progress", "old files"])
    def test_a_save_killed_half_way_leaves_the_one_before(
        self, finished, tmp_path, monkeypatch, place
    ):
        """The second save stops at a place; what is resumed is the last that is whole."""
        want, whole = finished
        out, saves, save = tmp_path / "run", [], nns.Windows.save
        target, name = {
            "slot": (nns, "_save_slot"),
            "store": (ss.MaskStore, "save"),
            "progress": (nns.Run, "write_progress"),
            "old files": (nns.Path, "unlink"),
        }[place]

        unlink = nns.Path.unlink

        def die(*args, **options):
            if place == "old files" and args[0].parent.name != "masks":
                return unlink(*args, **options)  # what a store wrote beside its file
            raise KeyboardInterrupt

        def second_save_dies(learner):
            saves.append(learner.state.windows)
            if len(saves) == 2:
                with monkeypatch.context() as patch:
                    patch.setattr(target, name, die)
                    save(learner)
            else:
                save(learner)

        with monkeypatch.context() as patch:
            patch.setattr(nns.Windows, "save", second_save_dies)
            with pytest.raises(KeyboardInterrupt):
                main(nns, out)
        kept = json.loads((out / "progress.json").read_text())["extra"]
        assert kept["windows"] == (6 if place == "old files" else 3)
        got = main(nns, out, resume=True)
        assert (got["rows"], got["novelty"]) == (want["rows"], want["novelty"])
        assert_same_files(out, whole, self.kept)


def test_only_slots_that_changed_are_written_again(tmp_path, monkeypatch):
    written, save = [], nns._save_slot
    monkeypatch.setattr(
        nns, "_save_slot", lambda path, slot: (written.append(path.name), save(path, slot))
    )
    monkeypatch.setattr(loop, "finish", lambda experiment, run, config, learner: learner)
    learner = main(nns, tmp_path / "run")
    assert written[:5] == [f"{i:05}-000003.npz" for i in range(5)]
    masks = [decision.mask for decision in learner.decisions]
    for task in (1, 2):
        names = {name for name in written if name.endswith(f"{3 * task + 3:06}.npz")}
        learned = {f"{mask:05}-{3 * task + 3:06}.npz" for mask in masks[3 * task : 3 * task + 3]}
        assert learned <= names
        assert len(names) <= len(learned) + 1  # one decoy may have been exchanged
    assert sorted(path.name for path in (tmp_path / "run" / "masks").iterdir()) == learner.files


def test_the_presets_follow_the_reference_rule():
    for config in nns.PRESETS.values():
        assert config.train.steps % config.window == 0
        assert config.rule().budget == config.budget >= config.tasks
    config = nns.PRESETS["mnist-2500"]
    assert config.rule() == ss.stream.StreamConfig(budget=2500)
    known = nns.paper.CURVES["lenet_300_100/500", "nns", "entropy"]
    assert tuple(known) == config.checkpoints


def test_deviations_go_from_the_command_line_into_the_rule(tmp_path, capsys):
    assert nns.EXPERIMENT.config(Args(deviations=5.0)).rule().deviations == 5
    assert nns.EXPERIMENT.config(Args()).rule().deviations is None
    argv = ["--tiny", "--deviations", "-1", "--out", str(tmp_path / "run")]
    assert "deviations must be positive" in error_of(nns, argv, capsys)


def test_margins_are_of_max_nu_and_with_deviations_of_the_lead():
    config = nns.EXPERIMENT.config(Args(deviations=5.0))
    masks, lead = np.array([5, 5, 60, 60, 61, 61]), np.array([np.nan, 3, 4, 9, 2, 8])
    windows = {"task": np.repeat(range(3), 2), "threshold": 1.125 / masks, "lead": lead}
    windows["max_nu"] = np.array([np.nan, 1.5, 1.0, 1.2, 1.1, 1.3]) / masks
    found = nns.margins(config, windows)
    assert found.pop("new_highest") == pytest.approx(1.1)
    assert found.pop("known_lowest") == pytest.approx(1.2)
    # Of 5 masks the lead was not asked for.
    assert found == {"threshold": 1.125, "lead_new_highest": 4, "lead_known_lowest": 8}
    assert set(nns.margins(nns.EXPERIMENT.config(Args()), windows)) == {
        "threshold",
        "new_highest",
        "known_lowest",
    }


def test_digits_are_enlarged():
    config = nns.EXPERIMENT.config(Args(tiny=True))
    images = np.asarray(nns.load(config, Args()).test.inputs)
    small = np.asarray(load(config, Args()).test.inputs).reshape(-1, 8, 8)
    assert images.shape == (len(small), 24, 24)
    for row, column in ((0, 0), (5, 2), (23, 23)):
        np.testing.assert_array_equal(images[:, row, column], small[:, row // 3, column // 3])


def test_a_task_that_no_mask_learned_counts_as_wrong(small_net):
    store = filled_store(small_net, random_masks(small_net, 2), capacity=4)

    class Stream:
        test = [toy_data(seed=i) for i in range(3)]  # noqa: RUF012

    counts = np.array([[3, 0], [0, 0], [1, 2]])
    given = nns.judged(small_net, store, Stream, "given", counts, range(3))
    inferred = nns.judged(small_net, store, Stream, "paper", counts, range(3))
    by_id = ss.evaluate(small_net, store, Stream.test, ids=[0, 0, 1])
    assert given.per_task == [by_id[0].accuracy, 0.0, by_id[2].accuracy]
    rows = ss.evaluate(small_net, store, Stream.test, "paper", ids=[0, -1, 1])
    assert inferred.per_task == [row.shared_accuracy for row in rows]
    right = [row.task == {0: 0, 1: 2}[mask] for row in rows for mask in row.inferred.tolist()]
    assert inferred.task_accuracy == np.mean(right)
    assert inferred.decisions == 3
    for row in (given, inferred):
        sample = nns.judged(small_net, store, Stream, row.protocol, counts, range(0, 3, 2))
        assert sample.per_task == row.per_task[::2]
        assert (sample.tasks_learned, sample.judge_every, sample.more) == (3, 2, row.more)


def test_damaged_slots_stop_a_resume(tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    interrupt(monkeypatch, ss.stream, "observe", 5)  # with one task saved, and none judged
    with pytest.raises(KeyboardInterrupt):
        main(nns, out)
    resume = ["--tiny", "--out", str(out), "--resume"]
    first, *_ = sorted((out / "masks").iterdir())
    whole = first.read_bytes()
    first.write_bytes(whole[:-100])
    capsys.readouterr()
    assert "cannot be read" in error_of(nns, resume, capsys)
    np.savez(first, other=np.ones(3))
    assert "not the" in error_of(nns, resume, capsys)
    first.unlink()
    assert "cannot be read" in error_of(nns, resume, capsys)
    first.write_bytes(whole)
    assert main(nns, out, resume=True)["rows"]


def test_the_papers_curve_stands_beside_that_of_a_run_on_mnist(tmp_path, monkeypatch):
    config = nns.PRESETS["mnist-2500"]
    rows = [
        {"protocol": name, "tasks_learned": 10, "accuracy": 0.9}
        | {"method": "supsup", "scenario": "nns", "objective": "entropy"}
        for name in ("paper", "given")
    ]
    run = SimpleNamespace(out=tmp_path, rows=rows, config=dataclasses.asdict(config))
    windows = {"task": np.array([0, 1]), "max_nu": np.ones(2), "threshold": np.ones(2)}
    drawn = []
    monkeypatch.setattr(nns.plots, "accuracy_against_tasks", lambda *args: drawn.extend(args[2]))
    nns.draw(run, config, windows, np.eye(2, dtype=int))
    theirs = next(curve for curve in drawn if curve["label"].startswith("paper"))
    assert theirs["points"][2000] == 0.9345
    assert len(drawn) == 3
