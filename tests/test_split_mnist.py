import dataclasses
import json

import numpy as np
import pytest

import supsup_jax as ss
from experiments import split_mnist
from experiments.split_mnist import Args


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "tiny"
    return split_mnist.main(Args(tiny=True, out=out)), out


def test_a_run_writes_what_it_promises(finished):
    result, out = finished
    assert json.loads((out / "result.json").read_text()) == result
    assert {path.name for path in out.iterdir()} == {
        "accuracy.csv",
        "capacity.png",
        "distance.png",
        "masks.npz",
        "progress.json",
        "result.json",
        "store.npz",
        "traces.npz",
    }
    assert [row["tasks_learned"] for row in result["rows"]] == [1, 1, 1, 1, 2, 2, 2, 2]
    for row in result["rows"]:
        assert row["method"] == "hopsupsup"
        assert 0 <= row["accuracy"] <= 1
        given = row["scenario"] == "gg"
        assert (row["task_accuracy"] is None) == given == (row["protocol"] == "given")
        assert row["decisions"] == (0 if given else row["tasks_learned"])
    stream = [row for row in result["rows"] if row["protocol"] == "stream"]
    assert [row["objective"] for row in stream] == ["entropy", "entropy"]
    assert all(map(np.less_equal, stream[1]["recovery_steps"], stream[1]["stream_steps"]))
    assert {row["protocol"] for row in result["rows"]} == {
        "given",
        "stream",
        "stream-guided",
        "stream-best-3",
    }
    # With one task the start is its mask, and the energy brings it back.
    assert stream[0]["bits_off"] == [0]
    assert stream[0]["accuracy"] == result["rows"][0]["accuracy"] > 0.8


def test_bytes_are_those_of_the_store(finished):
    result, out = finished
    config = Args(tiny=True).config()
    with np.load(out / "store.npz") as store, np.load(out / "masks.npz") as masks:
        kept = sum(store[name].nbytes for name in store.files if name != "manifest")
        assert result["bytes"]["total"] == kept + 4
        assert result["bytes"]["masks_if_kept"] == masks["masks"].nbytes
    assert result["bytes"]["hopfield_weights"] == 2 * 4 * config.width**2


def test_traces_end_where_the_rows_say(finished):
    result, out = finished
    (row,) = [r for r in result["rows"] if (r["tasks_learned"], r["protocol"]) == (2, "stream")]
    with np.load(out / "traces.npz") as traces:
        for i in range(2):
            total = sum(traces[name] for name in traces.files if name.startswith(f"stream/{i}/"))
            assert total[-1] == row["bits_off"][i]
            assert len(total) == row["stream_steps"][i] + 1
            steps = row["recovery_steps"][i]
            assert (total[steps:] == total[-1]).all()
            assert steps == 0 or total[steps - 1] != total[-1]


def test_an_interrupted_run_resumes_to_the_same_result(finished, tmp_path, monkeypatch):
    want, finished_out = finished
    args = Args(tiny=True, out=tmp_path / "run")
    train_task, calls = ss.train_task, []

    def interrupted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train_task(*arguments, **options)

    monkeypatch.setattr(split_mnist.ss, "train_task", interrupted)
    with pytest.raises(KeyboardInterrupt):
        split_mnist.main(args)
    # As if it had also been killed between the two stores' files.
    (args.out / "masks.npz").write_bytes((finished_out / "masks.npz").read_bytes())
    got = split_mnist.main(dataclasses.replace(args, resume=True))
    assert len(calls) == 3  # the task saved was not learned again
    assert got["rows"] == want["rows"]


def test_a_finished_run_is_shown_and_not_repeated(finished, capsys, monkeypatch):
    want, out = finished
    monkeypatch.setattr(split_mnist.ss, "train_task", None)
    assert split_mnist.main(Args(tiny=True, out=out, resume=True)) == want
    shown = capsys.readouterr().out
    assert "is finished" in shown
    assert "stream-best-3" in shown


def test_the_table_puts_the_paper_beside_ours(finished, capsys):
    result, _ = finished
    config = {**result["config"], "dataset": "mnist", "tasks": 5}
    rows = [
        {**row, "tasks_learned": 5, "accuracy": 0.98}
        for row in result["rows"]
        if row["tasks_learned"] == 2
    ]
    split_mnist.print_table({**result, "config": config, "rows": rows})
    assert "0.9800  0.9743  +0.0057" in capsys.readouterr().out


def test_capacity_rows_are_monotone_enough_to_mean_something(finished):
    result, _ = finished
    for rule in ("storkey", "hebbian"):
        rows = [row for row in result["capacity"] if row["rule"] == rule]
        assert [row["stored"] for row in rows] == list(range(1, 13))
        assert rows[0]["retrieved"] == 1.0
        assert rows[-1]["retrieved"] < 0.9
        assert all(row["retrieved"] <= row["bits_right"] for row in rows)


def test_the_presets():
    for preset in split_mnist.PRESETS:
        config = Args(preset=preset, tiny=True).config()
        assert config.dataset in ("digits", "synthetic")
    paper = Args(preset="mnist-hopsupsup").config()
    assert (paper.width, paper.outputs, paper.tasks, paper.test_batch_size) == (2048, 10, 5, 64)
    assert paper.recovery == ss.hopfield.RecoveryConfig(1.5e-3, 500.0, 0.9, 1e-4)
    train = split_mnist.train_config(paper, 12665)
    assert (train.steps, train.batch_size, train.learning_rate) == (99, 128, 0.1)
    assert (train.optimizer, train.momentum, train.weight_decay) == ("sgd", 0.9, 1e-4)


def test_mistakes_end_in_one_line_and_exit_code_2(finished, tmp_path, capsys):
    _, out = finished
    new = str(tmp_path / "new")
    for argv, message in (
        (["--preset", "mnist-hopsupsup", "--out", new], "mnist needs --data-dir"),
        (["--tasks", "6", "--out", new], r"--tasks must lie in [1, 5], got 6"),
        (["--seed", "-1", "--out", new], "--seed must not be negative"),
        (["--tiny", "--out", str(out)], "pass --resume to continue it"),
        (["--tiny", "--out", str(out), "--tasks", "1", "--resume"], "tasks is 2 there, 1 here"),
    ):
        with pytest.raises(SystemExit) as exit_:
            split_mnist.cli(argv)
        assert exit_.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert message in error
    assert not (tmp_path / "new").exists()
