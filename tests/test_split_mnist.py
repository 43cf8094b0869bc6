from typing import ClassVar

import numpy as np
import pytest

import supsup_jax as ss
from experiments import split_mnist
from supsup_jax.stores.records import read_alone
from tests.runs import EveryRun, main

pytestmark = pytest.mark.scripts


class TestSplitMnist(EveryRun):
    module = split_mnist
    learned: ClassVar = [1] * 4 + [2] * 4
    files = "capacity.png distance.png masks.supsup store.supsup traces.npz"
    trains = (ss, "train_task")
    cut, calls = 2, 3
    kept = "store.supsup masks.supsup traces.npz"
    changed = ("--tasks 1", "tasks is 2 there, 1 here")

    def killed(self, out, whole):
        # Between the two stores' files.
        (out / "masks.supsup").write_bytes((whole / "masks.supsup").read_bytes())

    def test_hopfield_rows_say_what_the_traces_say(self, finished):
        result, out = finished
        found = {(row["tasks_learned"], row["protocol"]): row for row in result["rows"]}
        protocols = ["given", "stream", "stream-guided", "stream-best-3"]
        assert list(found) == [(tasks, protocol) for tasks in (1, 2) for protocol in protocols]
        for (tasks, protocol), row in found.items():
            assert row["decisions"] == (0 if protocol == "given" else tasks)
        # With one task the start is its mask, and the energy brings it back.
        assert found[1, "stream"]["bits_off"] == [0]
        assert found[1, "stream"]["accuracy"] == found[1, "given"]["accuracy"]
        row = found[2, "stream"]
        with np.load(out / "traces.npz") as traces:
            for i in range(2):
                total = sum(
                    traces[name] for name in traces.files if name.startswith(f"stream/{i}/")
                )
                assert total[-1] == row["bits_off"][i]
                assert len(total) == row["stream_steps"][i] + 1
                steps = row["recovery_steps"][i]
                assert steps <= row["stream_steps"][i]
                assert (total[steps:] == total[-1]).all()
                assert steps == 0 or total[steps - 1] != total[-1]

    def test_the_papers_rule_alone(self, finished, tmp_path):
        result, _ = finished
        alone = main(split_mnist, tmp_path / "run", attempts=0)
        of_rule = [row for row in result["rows"] if row["protocol"] in ("given", "stream")]
        assert alone["rows"] == of_rule

    def test_hopfield_bytes_and_capacity(self, finished):
        result, out = finished
        _, store = read_alone(out / "store.supsup")
        _, masks = read_alone(out / "masks.supsup")
        assert result["bytes"]["total"] == len(store.body) + 4  # weights, sums; and the seed
        assert result["bytes"]["masks_if_kept"] == len(masks.body)
        assert result["bytes"]["hopfield_weights"] == 2 * 4 * result["config"]["width"] ** 2
        for rule in ("storkey", "hebbian"):
            held = [row for row in result["capacity"] if row["rule"] == rule]
            assert [row["stored"] for row in held] == list(range(1, 13))
            assert held[0]["retrieved"] == 1.0
            assert held[-1]["retrieved"] < 0.9
            assert all(row["retrieved"] <= row["bits_right"] for row in held)

    def test_the_table_puts_the_paper_beside_ours(self, finished, capsys):
        result, _ = finished
        config = {**result["config"], "dataset": "mnist", "tasks": 5}
        last = [row for row in result["rows"] if row["tasks_learned"] == 2]
        last = [{**row, "tasks_learned": 5, "accuracy": 0.98} for row in last]
        split_mnist.print_result({**result, "config": config, "rows": last})
        assert "0.9800  0.9743  +0.0057" in capsys.readouterr().out


def test_the_preset_is_the_papers():
    paper = split_mnist.EXPERIMENT.config(split_mnist.Args(preset="mnist-hopsupsup"))
    assert (paper.width, paper.outputs, paper.tasks, paper.test_batch_size) == (2048, 10, 5, 64)
    assert paper.recovery == ss.hopfield.RecoveryConfig(1.5e-3, 500.0, 0.9, 1e-4)
    train = split_mnist.train_config(paper, 12665)
    assert (train.steps, train.batch_size, train.learning_rate) == (99, 128, 0.1)
    assert (train.optimizer, train.momentum, train.weight_decay) == ("sgd", 0.9, 1e-4)
