import dataclasses
import json
from typing import ClassVar

import numpy as np
import pytest

import supsup_jax as ss
from experiments import split_imagenet
from experiments.frame.rows import Row, theirs
from experiments.split_imagenet import Args
from supsup_jax import data
from tests.runs import MATRICES, EveryRun, assert_same_files, main

pytestmark = pytest.mark.scripts


def config_of(**args):
    return split_imagenet.EXPERIMENT.config(Args(**args))


class TestSplitImagenet(EveryRun):
    module = split_imagenet
    learned: ClassVar = [1, 2]
    files = MATRICES
    changed = ("--epochs 3", "epochs is 10 there, 3 here")

    def test_it_keeps_its_share_of_weights_and_statistics(self, finished):
        result, out = finished
        config = config_of(tiny=True)
        assert result["experiment"] == "split"
        assert result["kept"]["head/kernel"] == [8, 16]  # never more than half
        with ss.DiskStore.open(out / "tasks") as disk:
            assert result["bytes"]["masks"] == sum(disk.words(i).nbytes for i in range(2))
        # Running mean and variance, float32, of the stem's norm and of two in each of the two
        # blocks, beside the second's shortcut.
        channels = config.width * np.asarray([1, 1, 1, 2, 2, 2])
        assert result["bytes"]["norm_statistics"] == 2 * 2 * 4 * channels.sum()
        kinds = ("masks", "norm_statistics", "heads", "seed")
        assert result["bytes"]["total"] == sum(result["bytes"][kind] for kind in kinds)
        net = split_imagenet.network(config, None)
        store = ss.DiskStore.open(out / "tasks", net).load()
        for i in range(2):
            kept = [int(leaf.sum()) for leaf in net.layout.leaves(store.mask(i), "the mask")]
            want = [
                round(min(0.5, 8 * sum(shape[-2:]) / np.prod(shape)) * np.prod(shape))
                for shape in net.layout.shapes.values()
            ]
            assert kept == want

    def test_an_interrupted_run_resumes_to_the_same_result(self, finished, tmp_path, monkeypatch):
        """Inside a task, and to the same bits."""
        want, whole = finished
        out, train, shown = tmp_path / "run", data.RecordStream.train, []

        def watched(self, task, steps, start=0):
            for i, batch in enumerate(train(self, task, steps, start), start):
                if (task, i) == (1, 13) and (1, 12) in shown and not (out / "again").exists():
                    (out / "again").touch()
                    raise KeyboardInterrupt
                shown.append((task, i))
                yield batch

        monkeypatch.setattr(data.RecordStream, "train", watched)
        with pytest.raises(KeyboardInterrupt):
            main(split_imagenet, out)
        assert shown == [*((0, i) for i in range(20)), *((1, i) for i in range(13))]
        # As if it had been killed between the store and the progress that counts on it, too.
        progress = json.loads((out / "progress.json").read_text())
        assert len(progress["extra"]["accuracies"]) == 1
        (out / "progress.json").write_text(json.dumps({**progress, "extra": {}}))
        shown.clear()
        got = main(split_imagenet, out, resume=True)
        assert shown == [(1, i) for i in range(8, 20)]
        assert got["rows"] == want["rows"]
        assert not (out / "checkpoints").exists()
        assert_same_files(out, whole, "tasks/tasks.bin tasks/index.bin")


def test_classes_are_dealt_as_in_the_reference():
    few, stream = (
        split_imagenet.load(config_of(tiny=True, tasks=tasks), Args(tiny=True)) for tasks in (1, 2)
    )
    assert np.ravel(stream.classes).tolist() == np.random.RandomState(1).permutation(4).tolist()
    assert few.classes == stream.classes[:1]


def test_the_presets_are_the_paper_s():
    for s in (4, 8, 16):
        config = config_of(preset=f"imagenet-rn50-s{s}")
        assert (config.tasks, config.classes_per_task, config.classes) == (100, 10, 1000)
        assert (config.model, config.width, config.size) == ("resnet50", 64, 224)
        assert config.outputs == 10
        assert config.checkpoints == (10, 20, 30, 40, 50, 60, 70, 80, 90, 100)
        train = config.train
        assert (train.rule, train.density) == ("topk", ss.ErdosRenyi(s))
        assert (train.optimizer, train.learning_rate, train.schedule) == ("adam", 1e-3, "cosine")
        # 1,281,167 training images in 100 tasks are 51 batches a task, the last one not full.
        steps = -(-1281167 // 100 // 256)
        assert (train.batch_size, train.steps, train.warmup_steps) == (256, 100 * steps, 5 * steps)
    short = config_of(epochs=3, tasks=25)
    assert short.checkpoints == (10, 20, 25)
    assert (short.train.steps, short.train.warmup_steps) == (3 * steps, 2 * steps)


def test_the_paper_s_numbers_stand_beside_ours():
    row = Row("supsup", "gg", [0.9] * 100).json()
    for s, paper in ((4, 0.8637), (8, 0.8868), (16, 0.8958)):
        config = dataclasses.asdict(config_of(preset=f"imagenet-rn50-s{s}"))
        assert theirs(config, row) == paper
        assert theirs(config, {**row, "tasks_learned": 50}) is None
