import dataclasses
import json

import numpy as np
import pytest

import supsup_jax as ss
from experiments import split_imagenet
from experiments.frame import rows as reports
from experiments.frame import tiny_imagenet
from experiments.split_imagenet import Args
from supsup_jax import data


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "tiny"
    return split_imagenet.main(Args(tiny=True, out=out)), out


def test_a_run_writes_what_it_promises(finished):
    result, out = finished
    assert json.loads((out / "result.json").read_text()) == result
    assert {path.name for path in out.iterdir()} == {
        "accuracy.csv",
        "accuracy.png",
        "matrix.png",
        "progress.json",
        "result.json",
        "tasks",
    }
    assert [row["tasks_learned"] for row in result["rows"]] == [1, 2]
    for row in result["rows"]:
        assert (row["method"], row["scenario"], row["protocol"]) == ("supsup", "gg", "given")
        assert row["accuracy"] > 0.8
    config = Args(tiny=True).config()
    assert result["experiment"] == "split"
    assert result["kept"]["head/kernel"] == [8, 16]  # never more than half
    with ss.DiskStore.open(out / "tasks") as disk:
        assert result["bytes"]["masks"] == sum(disk.words(i).nbytes for i in range(2))
    # Running mean and variance, float32, of the stem's norm and of two in each of the two blocks,
    # beside the second's shortcut.
    channels = config.width * np.asarray([1, 1, 1, 2, 2, 2])
    assert result["bytes"]["norm_statistics"] == 2 * 2 * 4 * channels.sum()
    assert result["bytes"]["total"] == sum(
        result["bytes"][kind] for kind in ("masks", "norm_statistics", "heads", "seed")
    )


def test_each_task_keeps_its_own_share_of_weights(finished, tmp_path):
    _, out = finished
    config = Args(tiny=True).config()
    net = split_imagenet.build(config)
    store = ss.DiskStore.open(out / "tasks", net).load()
    for i in range(2):
        kept = [int(leaf.sum()) for leaf in net.layout.leaves(store.mask(i), "the mask")]
        want = [
            round(min(0.5, 8 * sum(shape[-2:]) / np.prod(shape)) * np.prod(shape))
            for shape in net.layout.shapes.values()
        ]
        assert kept == want


def test_an_interrupted_run_resumes_inside_a_task_to_the_same_bits(finished, tmp_path, monkeypatch):
    want, finished_out = finished
    args, train, shown = Args(tiny=True, out=tmp_path / "run"), data.RecordStream.train, []

    def watched(self, task, steps, start=0):
        for i, batch in enumerate(train(self, task, steps, start), start):
            if (task, i) == (1, 13) and (1, 12) in shown and not (args.out / "again").exists():
                (args.out / "again").touch()
                raise KeyboardInterrupt
            shown.append((task, i))
            yield batch

    monkeypatch.setattr(data.RecordStream, "train", watched)
    with pytest.raises(KeyboardInterrupt):
        split_imagenet.main(args)
    assert shown == [*((0, i) for i in range(20)), *((1, i) for i in range(13))]
    # As if it had been killed between the store and the progress that counts on it, too.
    progress = json.loads((args.out / "progress.json").read_text())
    assert len(progress["extra"]["accuracies"]) == 1
    (args.out / "progress.json").write_text(json.dumps({**progress, "extra": {}}))
    shown.clear()
    got = split_imagenet.main(dataclasses.replace(args, resume=True))
    assert shown == [(1, i) for i in range(8, 20)]
    assert got["rows"] == want["rows"]
    assert not (args.out / "checkpoints").exists()
    for name in ("tasks.bin", "index.bin"):
        assert (args.out / "tasks" / name).read_bytes() == (
            finished_out / "tasks" / name
        ).read_bytes()


def test_a_finished_run_is_shown_and_not_repeated(finished, capsys, monkeypatch):
    want, out = finished
    monkeypatch.setattr(split_imagenet.ss, "train_on_batches", None)
    assert split_imagenet.main(Args(tiny=True, out=out, resume=True)) == want
    assert "is finished" in capsys.readouterr().out


def test_classes_are_dealt_as_in_the_reference(tmp_path):
    tiny_imagenet.prepare(tmp_path)
    stream = split_imagenet.make_stream(Args(tiny=True).config(), tmp_path, 0)
    assert np.ravel(stream.classes).tolist() == np.random.RandomState(1).permutation(4).tolist()
    few = split_imagenet.make_stream(Args(tiny=True, tasks=1).config(), tmp_path, 0)
    assert few.classes == stream.classes[:1]


def test_the_presets_are_the_paper_s():
    for s in (4, 8, 16):
        config = Args(preset=f"imagenet-rn50-s{s}").config()
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
    short = Args(epochs=3, tasks=25).config()
    assert short.checkpoints == (10, 20, 25)
    assert (short.train.steps, short.train.warmup_steps) == (3 * steps, 2 * steps)


def test_the_paper_s_numbers_stand_beside_ours():
    row = {**reports.given_row("supsup", [0.9] * 100), "tasks_learned": 100}
    for s, paper in ((4, 0.8637), (8, 0.8868), (16, 0.8958)):
        config = dataclasses.asdict(Args(preset=f"imagenet-rn50-s{s}").config())
        assert reports.theirs(config, row) == paper
        assert reports.theirs(config, {**row, "tasks_learned": 50}) is None


def test_mistakes_end_in_one_line_and_exit_code_2(finished, tmp_path, capsys):
    _, out = finished
    new = str(tmp_path / "new")
    for argv, message in (
        (["--out", new], "imagenet2012 needs --data-dir"),
        (["--out", new, "--data-dir", str(tmp_path)], "tfds build imagenet2012 --data_dir="),
        (["--tasks", "101", "--out", new], "--tasks must lie in [1, 100], got 101"),
        (["--epochs", "0", "--out", new], "--epochs must be at least 1, got 0"),
        (["--seed", "-1", "--out", new], "--seed must not be negative"),
        (["--workers", "-1", "--out", new], "--workers must not be negative"),
        (["--tiny", "--out", str(out)], "pass --resume to continue it"),
        (["--tiny", "--out", str(out), "--epochs", "3", "--resume"], "epochs is 10 there, 3 here"),
    ):
        with pytest.raises(SystemExit) as exit_:
            split_imagenet.cli(argv)
        assert exit_.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert message in error
    assert not (tmp_path / "new").exists()
