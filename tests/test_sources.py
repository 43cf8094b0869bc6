"""Datasets of TFDS that are not the usual pair of splits of an image and its label."""

import json
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from supsup_jax import data
from supsup_jax.data import crops
from supsup_jax.data.records import ImageRecords

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # TFDS's own, none of our business
    from tests import tiny_digits
    from tests.tiny_digits import TinyAmbiguous, TinyClass, TinyDigits, TinyInteger, TinySupervised


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the datasets are prepared."""
    folder = tmp_path_factory.mktemp("tfds")
    for builder in (TinyAmbiguous, TinyClass, TinyDigits, TinyInteger, TinySupervised):
        tiny_digits.prepare(builder, folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def numbers(task):
    """Which of the images that were written a split holds, in its order."""
    number = {tiny_digits.image("train", i).tobytes(): i for i in range(12)}
    return np.array([number[np.asarray(each).tobytes()] for each in task.inputs])


@pytest.mark.parametrize(
    ("name", "keys", "label"),
    [
        ("tiny_class", None, "fine"),
        ("tiny_class", ("img", "id"), "id"),
        ("tiny_integer", None, "id"),
        ("tiny_supervised", None, "coarse"),
        ("tiny_supervised", ["img", "fine"], "fine"),
        ("tiny_ambiguous", ("img", "coarse"), "coarse"),
        ("tiny_ambiguous", ("img", "fine"), "fine"),
    ],
)
def test_the_label_is_the_one_that_is_said_or_the_only_one(folder, name, keys, label):
    for _ in range(2):  # read, then from the cache
        dataset = data.load_dataset(name, folder, keys=keys)
        for split in (dataset.train, dataset.test):
            want = [tiny_digits.ODD[label][1](i) for i in numbers(split)]
            np.testing.assert_array_equal(split.labels, want)
        assert dataset.num_labels == {"coarse": 2, "fine": 3, "id": 12}[label]


def test_a_fifth_is_set_apart_where_there_is_no_test_split(folder):
    first, again = (data.load_dataset("tiny_class", folder, seed=0) for _ in range(2))
    order = np.concatenate([numbers(first.train), numbers(first.test)])
    np.testing.assert_array_equal(np.sort(order), np.arange(12))
    assert first.test.num_examples == 2
    np.testing.assert_array_equal(numbers(again.test), numbers(first.test))
    others = [data.load_dataset("tiny_class", folder, seed) for seed in range(1, 9)]
    assert len({frozenset(numbers(other.test)) for other in others}) > 1
    with pytest.raises(ValueError, match="few has 4 examples, too few to set any apart"):
        data.sources.set_apart("few", 4, 0)


def test_a_stream_of_records_takes_keys_and_sets_a_fifth_apart(folder, monkeypatch):
    version = folder / "tiny_ambiguous" / "1.0.0"
    records = ImageRecords(version, "train", ("img", "coarse"))
    # A draw that leaves both classes for testing.
    for seed in range(100):
        drawn, num_train = data.sources.set_apart("", 12, seed)
        if len(set(records.labels[drawn[num_train:]])) == 2:
            break
    stream = data.RecordStream(
        "tiny_ambiguous", folder, (1, 1), size=4, seed=seed, keys=("img", "coarse")
    )
    numbered = np.arange(12, dtype=np.uint8)[:, None, None, None] * np.ones((4, 4, 3), np.uint8)
    number = {records.image(i).tobytes(): i for i in range(12)}
    for crop in ("random_crop", "centre_crop"):
        monkeypatch.setattr(crops, crop, lambda image, *_: numbered[number[image.tobytes()]])
    assert stream.num_train == [5, 5]
    for task in range(2):
        train, test = next(stream.train(task, steps=1)), next(stream.test[task])
        parts = [set(np.asarray(each.inputs)[:, 0, 0, 0].tolist()) for each in (train, test)]
        for part, indices in zip(parts, (drawn[:num_train], drawn[num_train:]), strict=True):
            assert part == {i for i in indices.tolist() if records.labels[i] == task}


def test_a_validation_split_is_for_testing_where_there_is_no_test_split(folder, tmp_path):
    version = tiny_digits.prepare(TinyDigits, tmp_path)
    want = data.load_dataset("tiny_digits", tmp_path)
    rename(version, "test", "validation", '"name": "test"', '"name": "validation"')
    got = data.load_dataset("tiny_digits", tmp_path)
    np.testing.assert_array_equal(got.test.inputs, want.test.inputs)
    rename(version, "train", "dev", '"name": "train"', '"name": "dev"')
    with pytest.raises(data.MissingDataError, match=r"no split 'train', only \['dev', 'valid"):
        data.load_dataset("tiny_digits", tmp_path)


def rename(version, old, new, *info):
    """Renames files of a version, and rewrites its info."""
    for path in version.glob(f"*{old}*"):
        path.rename(path.with_name(path.name.replace(old, new)))
    path = version / "dataset_info.json"
    path.write_text(path.read_text().replace(*info))


def test_tfrecord_is_refused_with_what_converts_it_and_read_once_converted(tmp_path):
    version = tiny_digits.prepare(TinyDigits, tmp_path)
    rename(version, ".array_record", ".tfrecord", "array_record", "tfrecord")
    load = (
        lambda: data.load_dataset("tiny_digits", tmp_path),
        lambda: data.RecordStream("tiny_digits", tmp_path, 3, size=4),
    )
    for each in load:
        with pytest.raises(data.MissingDataError, match="is in TFRecord") as error:
            each()
        command = f"--dataset_version_dir={version} --out_file_format=array_record"
        assert f"tfds convert_format {command}" in str(error.value)
        assert "tfds build tiny_digits --data_dir=DIR" in str(error.value)
    # What the conversion leaves: the info names both formats, the first that of before.
    rename(version, ".tfrecord", ".array_record", '"name"', '"name"')
    info = json.loads((version / "dataset_info.json").read_text())
    info["alternativeFileFormats"] = ["array_record"]
    (version / "dataset_info.json").write_text(json.dumps(info))
    assert load[0]().train.num_examples == 12
    assert load[1]().num_train == [12]


def test_grey_images_become_rgb_and_others_stay(folder, tmp_path):
    grey = data.load_dataset("tiny_digits", folder)
    rgb = data.load_dataset("tiny_digits", folder, channels=3)
    for one, other in ((grey.train, rgb.train), (grey.test, rgb.test)):
        assert other.inputs.dtype == jnp.uint8
        for channel in range(3):
            np.testing.assert_array_equal(other.inputs[..., channel], one.inputs)
        np.testing.assert_array_equal(other.labels, one.labels)
    assert rgb.train.transform == grey.train.transform
    np.testing.assert_allclose(
        rgb.train.batch(jnp.arange(4))[0][..., 1], grey.train.batch(jnp.arange(4))[0], rtol=1e-6
    )
    assert data.load_dataset("tiny_digits", folder, channels=1).test.inputs.shape == (5, 4, 3, 1)
    flat = data.load_dataset("digits").test.inputs
    digits = data.load_dataset("digits", channels=3).test.inputs
    np.testing.assert_array_equal(digits[..., 2].reshape(-1, 64), flat)


def test_bad_input(folder):
    for error, message, name, options in (
        (
            ValueError,
            "keys must say .* coarse: ClassLabel, fine: ClassLabel, img: Im",
            "ambiguous",
            {},
        ),
        (ValueError, r"keys \('fine', 'img'\) must be an", "class", {"keys": ("fine", "img")}),
        (ValueError, r"keys \('img', 'no'\) must be an", "class", {"keys": ("img", "no")}),
        (TypeError, "keys must be the names of the image", "class", {"keys": "img"}),
        (TypeError, "keys must be the names of the image", "class", {"keys": ("img",)}),
        (TypeError, "keys must be the names of the image", "class", {"keys": ("img", 1)}),
        (ValueError, "labels of 0 and more .* got -1 to 10", "class", {"keys": ("img", "below")}),
    ):
        with pytest.raises(error, match=message):
            data.load_dataset(f"tiny_{name}", folder, **options)
        with pytest.raises(error, match=message):
            data.RecordStream(f"tiny_{name}", folder, 2, size=4, **options)
    for error, message, options in (
        (ValueError, "keys are of datasets of TFDS, digits has none", {"keys": ("img", "y")}),
        (ValueError, "channels must be an int of at least 1, got 0", {"channels": 0}),
        (TypeError, "channels must be an int of at least 1, got 3.0", {"channels": 3.0}),
        (ValueError, "seed must be an int of at least 0, got -1", {"seed": -1}),
    ):
        with pytest.raises(error, match=message):
            data.load_dataset("digits", **options)
