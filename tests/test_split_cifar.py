import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

import supsup_jax as ss
from experiments import split_cifar
from experiments.frame import figures, loop, series
from experiments.frame.run import UsageError
from experiments.split_cifar import Args
from supsup_jax import data
from tests.runs import interrupt

pytestmark = pytest.mark.scripts


class SmallNet(nnx.Module):
    """Stands for a ResNet, which compiles for half a minute."""

    def __init__(self, num_outputs, *, width, rngs):
        self.conv = nnx.Conv(3, width, (3, 3), strides=8, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(width, momentum=0.9, use_bias=False, use_scale=False, rngs=rngs)
        self.head = nnx.Linear(width, num_outputs, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.head(jax.nn.relu(self.norm(self.conv(x))).mean(axis=(1, 2)))


@pytest.fixture(scope="module")
def small():
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setitem(split_cifar.MODELS, "small_resnet", SmallNet)
    preset = dataclasses.replace(split_cifar.PRESETS["tiny"], protocols=("batch-16",))
    monkeypatch.setitem(split_cifar.PRESETS, "tiny", preset)
    yield
    monkeypatch.undo()


@pytest.fixture(scope="module")
def runs(small, tmp_path_factory):
    """The result of a run, made once, by method and scale."""
    folder = tmp_path_factory.mktemp("runs")

    @functools.cache
    def run(method, scale):
        args = Args(method=method, scale=scale, out=folder / f"{method}{scale}")
        return loop.main(split_cifar.EXPERIMENT, args)

    return run


def config_of(**args):
    return split_cifar.EXPERIMENT.config(Args(**args))


def test_the_papers_recipe():
    config = config_of(preset="cifar100")
    assert (config.tasks, config.classes_per_task, config.width) == (20, 5, 20)
    train = config.train
    # 250 epochs of 5 classes x 500 images in batches of 128.
    assert train.steps == -(-250 * 2500 // 128)
    assert (train.optimizer, train.learning_rate, train.schedule) == ("adam", 1e-3, "cosine")
    assert (train.rule, train.density) == ("topk", ss.ErdosRenyi(32))
    assert train.augment == data.CropAndFlip(
        4, ss.Normalize((0.491, 0.482, 0.447), (0.247, 0.243, 0.262))
    )
    assert config_of(preset="cifar100", scale=4).train.density == ss.ErdosRenyi(4)
    assert config_of(preset="cifar100", epochs=2).train.steps == 40


def test_what_is_compared_learns_no_mask():
    upper = config_of(preset="cifar100", method="upper_bound")
    assert (upper.scale, upper.train.rule, upper.later) == (None, "threshold", None)
    assert upper.outputs == 5
    batche = config_of(preset="cifar100", method="batche_random")
    assert (batche.later.learning_rate, batche.later.schedule) == (0.1, "cosine")
    assert config_of(preset="cifar100", method="separate_heads").later.learning_rate == 0.01


def test_tasks_deal_the_classes_in_the_seeds_order(small):
    config = config_of(seed=1)
    stream = split_cifar.classes(config, split_cifar.load(config, Args()))
    assert [c for task in stream.classes for c in task] == data.class_order(4, 1).tolist()
    assert set(np.asarray(stream.train[0].labels).tolist()) == {0, 1}
    few = stream.first_test(3)[1]
    np.testing.assert_array_equal(few.inputs, stream.test[1].inputs[:3])
    many = stream.together(range(2))
    np.testing.assert_array_equal(many.inputs[1], stream.train[1].inputs)
    np.testing.assert_array_equal(many.labels[1], stream.train[1].labels)


@pytest.mark.parametrize("method", ["supsup", "supsup_transfer"])
def test_an_interrupted_run_ends_as_a_whole_one(runs, monkeypatch, tmp_path, method):
    whole = runs(method, 32)
    interrupt(monkeypatch, ss, "train_task" if method == "supsup_transfer" else "train_tasks", 2)
    args = Args(method=method, scale=32, out=tmp_path / "parts", resume=True)
    with pytest.raises(KeyboardInterrupt):
        loop.main(split_cifar.EXPERIMENT, args)
    resumed = loop.main(split_cifar.EXPERIMENT, args)
    for field in ("rows", "metrics", "kept"):
        assert resumed[field] == whole[field]
    (gg,) = [row for row in whole["rows"] if row["scenario"] == "gg"]
    assert gg["method"] == method
    assert {row["protocol"] for row in whole["rows"]} == {"given", "batch-16"}
    # A Task's statistics: mean and variance of 4 channels.
    assert whole["bytes"]["norm_statistics"] == 2 * 2 * 4 * 4
    assert whole["kept"]["head/kernel"] == [4, 8]


def test_pictures_of_split_runs(runs, tmp_path):
    kinds = (("supsup", 4), ("supsup", 32), ("supsup_transfer", 32))
    results = [runs(method, scale) for method, scale in kinds]
    entries = series.means(results)
    made = figures.of_split(tmp_path, entries)
    assert [name.split("_")[0] for name in made] == ["figure", "density", "transfer"]
    assert all((tmp_path / name).stat().st_size > 1000 for name in made)
    ends = {(e.series.method, e.series.field("scale")): e for e in entries if e.split}
    assert set(ends) == set(kinds)
    (gain,) = figures.transfer_gains(list(ends.values())).values()
    per_task = [
        next(m["per_task"] for m in result["metrics"] if m["scenario"] == "gg")
        for result in results
    ]
    np.testing.assert_allclose(gain, np.subtract(per_task[2], per_task[1]))
    coded, _ = figures.bytes_curves([ends["supsup", 4]])
    sizes = results[0]["bytes"]
    want = (sizes["masks_enumerative"] + sizes["norm_statistics"] + sizes["seed"]) / 1e6
    assert coded["points"] == {want: ends["supsup", 4].accuracy}
    (density,) = figures.density_curves([ends["supsup", 4]])
    kept, weights = (sum(layer[i] for layer in results[0]["kept"].values()) for i in (0, 1))
    assert list(density["points"]) == [kept / weights]
    # What is kept as data is drawn again beside a new run, and not where no run adds to it.
    series.save(tmp_path / "results.json", entries)
    before = series.kept(tmp_path / "results.json")
    assert figures.of_split(tmp_path, before) == []
    together = series.means(results[2:], before)
    assert [entry.split for entry in together] == [entry.split for entry in entries]
    assert figures.of_split(tmp_path, together) == made
    # Of a sample of the tasks there is no picture.
    sampled = {**results[0], "rows": [{**row, "judge_every": 2} for row in results[0]["rows"]]}
    assert not any(entry.split for entry in series.means([sampled]))


def test_data_that_does_not_fit(small, monkeypatch):
    with pytest.raises(UsageError, match="3 tasks of 2 classes need 6, synthetic has 4"):
        split_cifar.classes(config_of(tasks=3), split_cifar.load(config_of(), Args()))
    digits = data.load_dataset("digits")
    monkeypatch.setattr(data, "load_dataset", lambda *_: digits)
    with pytest.raises(UsageError, match=r"cifar100 takes images of 32x32x3, digits has \(64,\)"):
        split_cifar.load(config_of(preset="cifar100"), Args(preset="cifar100"))
