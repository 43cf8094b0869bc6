import io
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from array_record.python.array_record_module import ArrayRecordWriter

import supsup_jax as ss
from experiments.frame import tiny_imagenet
from supsup_jax import data
from supsup_jax.data import crops, records
from supsup_jax.data.records import ImageRecords

SIZE = 16


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The folder of the prepared dataset."""
    folder = tmp_path_factory.mktemp("tfds")
    tiny_imagenet.prepare(folder)
    return folder


def stream_of(folder, *args, order=None, **options):
    options = {"size": SIZE, "batch_size": 5, "relabel": True, **options}
    return data.RecordStream(tiny_imagenet.NAME, folder, *args or (2,), order, **options)


def version(folder):
    return folder / "tiny_imagenet" / "1.0.0"


def copied(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "copy")
    return tmp_path / "copy"


def assert_same(got, want):
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one.inputs, other.inputs)
        np.testing.assert_array_equal(one.labels, other.labels)


def joined(batches, what="inputs"):
    return np.concatenate([np.asarray(getattr(batch, what)) for batch in batches])


def numbered(monkeypatch, stream, split):
    """Crops become the record's number, known by its pixels."""
    some = stream._records[split]
    number = {some.image(i).tobytes(): i for i in range(len(some))}
    assert len(number) == tiny_imagenet.IMAGES

    def constant(image, size, rng=None):
        return np.full((size, size, 3), number[image.tobytes()], np.uint8)

    monkeypatch.setattr(crops, "random_crop", constant)
    monkeypatch.setattr(crops, "centre_crop", constant)


def test_records_are_the_images_that_were_written(prepared):
    train = ImageRecords(version(prepared), "train")
    assert len(train) == len(train.labels) == tiny_imagenet.IMAGES
    assert train.num_labels == 4
    sizes = []
    for i, label in enumerate(train.labels):
        image = np.asarray(train.image(i))
        colour = np.argmin(np.abs(tiny_imagenet.COLOURS - image.mean(axis=(0, 1))).sum(axis=1))
        assert colour == label
        sizes.append(image.shape[:2])
    want = [tiny_imagenet.image("train", i).shape[:2] for i in range(tiny_imagenet.IMAGES)]
    assert sorted(sizes) == sorted(want)


def test_every_epoch_shows_each_of_a_task_s_images_once_in_a_new_order(prepared, monkeypatch):
    stream = stream_of(prepared, order=[3, 0, 2, 1])
    assert stream.classes == [(3, 0), (2, 1)]
    assert stream.num_train == [12, 12]
    numbered(monkeypatch, stream, "training")
    batches = list(stream.train(1, steps=5))
    assert [batch.inputs.shape for batch in batches] == [(5, SIZE, SIZE, 3)] * 5
    shown = joined(batches)[:, 0, 0, 0]
    true = np.asarray(stream._records["training"].labels)
    own = [i for i in range(24) if true[i] in (2, 1)]
    assert sorted(shown[:12]) == sorted(shown[12:24]) == own
    assert (shown[:12] != shown[12:24]).any()
    np.testing.assert_array_equal(joined(batches, "labels"), [(2, 1).index(true[i]) for i in shown])
    for other in (stream_of(prepared, order=[3, 0, 2, 1], seed=1), stream):
        task = 0 if other is stream else 1
        assert (joined(other.train(task, steps=2))[:, 0, 0, 0] != shown[:10]).any()


def test_tests_show_each_image_once_in_the_dataset_s_order(prepared, monkeypatch):
    stream = stream_of(prepared, relabel=False)
    batches = list(stream.test[1])
    assert [batch.num_examples for batch in batches] == [5, 5, 2]
    test = stream._records["test"]
    own = [i for i in range(24) if test.labels[i] in (2, 3)]
    np.testing.assert_array_equal(joined(batches, "labels"), test.labels[own])
    want = [crops.centre_crop(test.image(i), SIZE) for i in own]
    np.testing.assert_array_equal(joined(batches), want)
    assert batches[0].transform == ss.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    x, _ = batches[0].batch(jnp.arange(5))
    by_hand = (np.asarray(want[:5]) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(x, by_hand, rtol=1e-4, atol=1e-5)
    assert len(stream.test) == len(stream) == 2


def test_tasks_of_unequal_numbers_of_classes(prepared):
    stream = stream_of(prepared, (3, 1), order=[3, 0, 2, 1])
    assert stream.classes == [(3, 0, 2), (1,)]
    assert stream.num_train == [18, 6]
    assert not joined(stream.test[1], "labels").any()


def test_batches_are_the_same_from_any_start_and_by_any_number_of_workers(prepared):
    stream = stream_of(prepared)
    whole = list(stream.train(1, steps=8))
    for start in (0, 3, 8):
        assert_same(stream.train(1, steps=8, start=start), whole[start:])
    assert_same(stream.train(1, steps=4), whole[:4])
    again = joined(whole)
    assert len(np.unique(again.reshape(len(again), -1), axis=0)) == len(again)  # a crop each
    assert_same(stream_of(prepared, num_workers=2).train(1, steps=8, start=3), whole[3:])
    assert (joined(stream_of(prepared, seed=1).train(1, steps=8)) != again).any()
    assert not flags.FLAGS.is_parsed()  # the program's own are left to it


def test_labels_are_found_without_decoding_and_read_once(prepared, tmp_path, monkeypatch):
    want = ImageRecords(version(prepared), "train").labels
    monkeypatch.setattr(records, "LABELS_AT_ONCE", 7)  # so that 24 are many
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("PIL.Image.open", None)
    np.testing.assert_array_equal(ImageRecords(version(prepared), "train").labels, want)
    monkeypatch.setattr(ImageRecords, "_read_labels", None)
    np.testing.assert_array_equal(ImageRecords(version(prepared), "train").labels, want)


def test_a_dataset_prepared_in_part_names_what_is_missing(prepared, tmp_path):
    folder = copied(prepared, tmp_path)
    (file,) = version(folder).glob("*-train.*")
    content = file.read_bytes()
    for damaged in (content[:-1], b"", None):
        file.unlink()
        if damaged is not None:
            file.write_bytes(damaged)
        with pytest.raises(data.MissingDataError) as error:
            stream_of(folder)
        message = str(error.value)
        assert "prepared only in part: of the 1 files of split 'train' 1 are missing" in message
        assert f"({file.name})" in message
        assert f"tfds build tiny_imagenet --data_dir={folder}" in message
    # Shards that the info counts are looked for.
    file.write_bytes(content)
    path = version(folder) / "dataset_info.json"
    info = json.loads(path.read_text())
    (train,) = (split for split in info["splits"] if split["name"] == "train")
    train["shardLengths"] = ["24", "24", "24"]
    path.write_text(json.dumps(info))
    name = file.name.removesuffix("00000-of-00001")
    file.rename(file.with_name(f"{name}00001-of-00003"))
    with pytest.raises(data.MissingDataError) as error:
        stream_of(folder)
    assert f"({name}00000-of-00003, {name}00002-of-00003)" in str(error.value)
    assert "of the 3 files of split 'train' 2 are missing" in str(error.value)


def test_a_record_that_cannot_be_decoded_is_named(prepared, tmp_path):
    import tensorflow_datasets as tfds

    folder = copied(prepared, tmp_path)
    features = tfds.builder_from_directory(str(version(folder))).info.features
    (file,) = version(folder).glob("*-train.*")
    writer = ArrayRecordWriter(str(file), "group_size:1")
    for i in range(24):
        example = {"image": io.BytesIO(b"no image"), "label": i % 4, "file_name": "name"}
        writer.write(features.serialize_example(example))
    writer.close()
    with pytest.raises(ValueError, match="image 1 of tiny_imagenet train") as error:
        ImageRecords(version(folder), "train").image(1)
    assert f"(record 1 of {file})" in str(error.value)
    stream = stream_of(folder)
    with pytest.raises(ValueError, match=r"image \d+ of tiny_imagenet train .* cannot be decoded"):
        list(stream.train(0, steps=1))
    # Bytes changed on the disk: the file's own checksum fails.
    (file,) = version(folder).glob("*-validation.*")
    content = bytearray(file.read_bytes())
    content[5000] ^= 255
    file.write_bytes(content)
    damaged = ImageRecords(version(folder), "validation")
    with pytest.raises(ValueError, match=r"tiny_imagenet validation .* cannot be decoded"):
        [damaged.image(i) for i in range(24)]
    with pytest.raises(ValueError, match=r"labels 0 to 23 of tiny_imagenet validation in .* read"):
        _ = damaged.labels


def test_bad_input(prepared, tmp_path):
    for error, message, arguments, options in (
        (ValueError, "classes_per_task must be an int of at least 2, got 1", (1,), {}),
        (ValueError, r"4 classes in tasks of 3 leave one class.*=\(4,\)$", (3,), {}),
        (ValueError, r"must add up to the 4 classes, got \[3\]", ([3],), {}),
        (ValueError, "tiny_imagenet has no training images of class 9", (2,), {"order": [0, 9]}),
        (ValueError, "size must be an int of at least 1, got 0", (2,), {"size": 0}),
        (ValueError, "batch_size must be an int of at least 1", (2,), {"batch_size": 1.5}),
        (ValueError, "num_workers must be an int of at least 0", (2,), {"num_workers": -1}),
        (ValueError, "seed must be an int of at least 0", (2,), {"seed": -1}),
        (ValueError, "must be .* file_name: Text", (2,), {"keys": ("image", "file_name")}),
    ):
        with pytest.raises(error, match=message):
            stream_of(prepared, *arguments, **options)
    with pytest.raises(data.MissingDataError, match="tiny_imagenet needs --data-dir"):
        stream_of(None)
    with pytest.raises(data.MissingDataError, match="no prepared tiny_imagenet in"):
        stream_of(tmp_path)
    with pytest.raises(data.MissingDataError, match="has no split 'dev', only"):
        ImageRecords(version(prepared), "dev")
    stream = stream_of(prepared)
    with pytest.raises(ValueError, match=r"start must lie in \[0, 8\], .* got 9"):
        stream.train(0, steps=8, start=9)
    for split in (lambda i: stream.train(i, steps=1), stream.test.__getitem__):
        with pytest.raises(IndexError, match="task 2 is not in the stream of 2"):
            split(2)
