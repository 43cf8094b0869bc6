import csv
import dataclasses
import json

import numpy as np
import pytest

import supsup_jax as ss
from experiments import nns
from experiments.nns import Args


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "tiny"
    return nns.main(Args(tiny=True, out=out)), out


def test_a_run_writes_what_it_promises(finished):
    result, out = finished
    assert json.loads((out / "result.json").read_text()) == result
    assert {path.name for path in out.iterdir()} == {
        "accuracy.csv",
        "accuracy.png",
        "assignment.png",
        "decisions.npz",
        "novelty.png",
        "progress.json",
        "result.json",
        "store.npz",
    }
    assert [row["tasks_learned"] for row in result["rows"]] == [2, 2, 3, 3]
    for row in result["rows"]:
        assert (row["method"], row["scenario"]) == ("supsup", "nns")
        assert (row["task_accuracy"] is None) == (row["protocol"] == "given")
        assert row["objective"] == (None if row["protocol"] == "given" else "entropy")
        assert 0.1 < row["accuracy"] <= 1
        assert 0 < row["found"] <= row["tasks_learned"]
    with open(out / "accuracy.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == sum(row["tasks_learned"] for row in result["rows"])


def test_the_decisions_say_what_the_result_says(finished):
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
    config = Args(tiny=True).config()
    net = nns.continual.build(config, nns.load(config, None))
    assert int(ss.MaskStore.load(out / "store.npz", net).num_tasks) == row["masks"]


def interrupted_at(monkeypatch, number, function, error=KeyboardInterrupt):
    """nns's `function` fails at its `number`th call."""
    original, calls = getattr(nns.ss, function), []

    def wrapped(*args, **options):
        calls.append(args)
        if len(calls) == number:
            raise error
        return original(*args, **options)

    monkeypatch.setattr(nns.ss, function, wrapped)
    return calls


def same(got, want, out, want_out):
    assert got["rows"] == want["rows"]
    assert got["novelty"] == want["novelty"]
    for name in ("store.npz", "decisions.npz"):
        with np.load(out / name) as a, np.load(want_out / name) as b:
            for field in set(a.files) - {"manifest"}:
                np.testing.assert_array_equal(a[field], b[field])


def test_an_interrupted_run_resumes_to_the_same_result(finished, tmp_path, monkeypatch):
    want, finished_out = finished
    args = Args(tiny=True, out=tmp_path / "run")
    calls = interrupted_at(monkeypatch, 8, "observe")
    with pytest.raises(KeyboardInterrupt):
        nns.main(args)
    assert not (args.out / "result.json").exists()
    got = nns.main(dataclasses.replace(args, resume=True))
    assert len(calls) == 8 + 3  # the windows of the tasks saved were not learned again
    same(got, want, args.out, finished_out)
    assert not (args.out / "masks").exists()


@pytest.mark.parametrize("place", ["slot", "store", "progress", "old files"])
def test_a_save_killed_half_way_leaves_the_one_before(finished, tmp_path, monkeypatch, place):
    """The second save stops at a place; what is resumed is the first, or the second if whole."""
    want, finished_out = finished
    args = Args(tiny=True, out=tmp_path / "run")
    saves, save = [], nns.Progress.save
    target, name = {
        "slot": (nns, "_save_slot"),
        "store": (nns.Run, "save"),
        "progress": (nns.Run, "write_progress"),
        "old files": (nns.Path, "unlink"),
    }[place]

    def die(*_, **__):
        raise KeyboardInterrupt

    def second_save_dies(progress):
        saves.append(progress.state.windows)
        if len(saves) == 2:
            with monkeypatch.context() as patch:
                patch.setattr(target, name, die)
                save(progress)
        else:
            save(progress)

    with monkeypatch.context() as patch:
        patch.setattr(nns.Progress, "save", second_save_dies)
        with pytest.raises(KeyboardInterrupt):
            nns.main(args)
    kept = json.loads((args.out / "progress.json").read_text())["extra"]
    assert kept["windows"] == (6 if place == "old files" else 3)
    got = nns.main(dataclasses.replace(args, resume=True))
    same(got, want, args.out, finished_out)


def test_only_slots_that_changed_are_written_again(tmp_path, monkeypatch):
    written, save = [], nns._save_slot
    monkeypatch.setattr(
        nns, "_save_slot", lambda path, slot: (written.append(path.name), save(path, slot))
    )
    monkeypatch.setattr(nns, "finish", lambda run, config, progress: progress)
    progress = nns.main(Args(tiny=True, out=tmp_path / "run"))
    assert written[:5] == [f"{i:05}-000003.npz" for i in range(5)]
    masks = [decision.mask for decision in progress.decisions]
    for task in (1, 2):
        names = {name for name in written if name.endswith(f"{3 * task + 3:06}.npz")}
        learned = {f"{mask:05}-{3 * task + 3:06}.npz" for mask in masks[3 * task : 3 * task + 3]}
        assert learned <= names
        assert len(names) <= len(learned) + 1  # one decoy may have been exchanged
    assert sorted(path.name for path in (tmp_path / "run" / "masks").iterdir()) == progress.files


def test_a_finished_run_is_shown_and_not_repeated(finished, capsys, monkeypatch):
    want, out = finished
    monkeypatch.setattr(nns.ss, "observe", None)
    assert nns.main(Args(tiny=True, out=out, resume=True)) == want
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize("preset", nns.PRESETS)
def test_presets_are_consistent(preset):
    config = nns.PRESETS[preset]
    assert config.checkpoints[-1] == config.tasks
    assert list(config.checkpoints) == sorted(set(config.checkpoints))
    assert config.train.steps % config.window == 0
    assert config.learner().budget == config.budget >= config.tasks
    tiny = Args(preset=preset, tiny=True).config()
    assert tiny.dataset in ("digits", "synthetic")
    few = Args(preset=preset, tasks=7).config()
    assert (few.tasks, few.checkpoints[-1]) == (7, 7)


def test_the_paper_preset_is_the_reference_rule():
    config = nns.PRESETS["mnist-2500"]
    assert config.learner() == ss.stream.StreamConfig(budget=2500)
    known = nns.paper.CURVES["lenet_300_100/500", "nns", "entropy"]
    assert tuple(known) == config.checkpoints


def test_digits_are_enlarged():
    config = Args(tiny=True).config()
    images = np.asarray(nns.load(config, None).test.images)
    small = np.asarray(nns.continual.load(config, None).test.images).reshape(-1, 8, 8)
    assert images.shape == (len(small), 24, 24)
    for row, column in ((0, 0), (5, 2), (23, 23)):
        np.testing.assert_array_equal(images[:, row, column], small[:, row // 3, column // 3])


def test_a_task_that_no_mask_learned_counts_as_wrong(small_net):
    from tests.conftest import filled_store, random_masks
    from tests.test_scenarios import toy_data

    store = filled_store(small_net, random_masks(small_net, 2), capacity=4)

    class Stream:
        test = [toy_data(seed=i) for i in range(3)]  # noqa: RUF012

    counts = np.array([[3, 0], [0, 0], [1, 2]])
    given = nns.row_of(small_net, store, Stream, "given", counts)
    inferred = nns.row_of(small_net, store, Stream, "paper", counts)
    by_id = ss.evaluate(small_net, store, Stream.test, ids=[0, 0, 1])
    assert given["per_task"] == [by_id[0].accuracy, 0.0, by_id[2].accuracy]
    rows = ss.evaluate(small_net, store, Stream.test, "paper", ids=[0, -1, 1])
    assert inferred["per_task"] == [row.shared_accuracy for row in rows]
    right = [row.task == {0: 0, 1: 2}[mask] for row in rows for mask in row.inferred.tolist()]
    assert inferred["task_accuracy"] == np.mean(right)
    assert inferred["decisions"] == 3


def error_of(argv, capsys):
    with pytest.raises(SystemExit) as exit_:
        nns.cli(argv)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_mistakes_end_in_one_line_and_exit_code_2(finished, tmp_path, capsys):
    _, out = finished
    new = tmp_path / "new"
    mnist = ["--preset", "mnist-100", "--out", str(new)]
    assert "mnist needs --data-dir" in error_of(mnist, capsys)
    assert "pass --resume to continue it" in error_of(["--tiny", "--out", str(out)], capsys)
    changed = error_of(["--tiny", "--out", str(out), "--seed", "1", "--resume"], capsys)
    assert "seed is 0 there, 1 here" in changed
    assert "--tasks must be at least 1" in error_of(["--tasks", "0", "--out", str(new)], capsys)
    assert "--seed must not be negative" in error_of(["--seed", "-1", "--out", str(new)], capsys)
    assert not new.exists()


def test_damaged_slots_stop_a_resume(tmp_path, capsys, monkeypatch):
    args = Args(tiny=True, tasks=1, out=tmp_path / "run")
    monkeypatch.setattr(nns, "finish", lambda *_: {})
    nns.main(args)
    resume = ["--tiny", "--tasks", "1", "--out", str(args.out), "--resume"]
    first, *_ = sorted((args.out / "masks").iterdir())
    whole = first.read_bytes()
    first.write_bytes(whole[:-100])
    capsys.readouterr()
    assert "cannot be read" in error_of(resume, capsys)
    np.savez(first, other=np.ones(3))
    assert "not the" in error_of(resume, capsys)
    first.unlink()
    assert "cannot be read" in error_of(resume, capsys)
    first.write_bytes(whole)
    nns.cli(resume)
