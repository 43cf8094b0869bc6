import dataclasses
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import supsup_jax as ss
from supsup_jax import data
from tests.conftest import golden


@pytest.fixture(scope="module")
def digits():
    return data.load_dataset("digits")


def test_orders_match_the_reference():
    want = golden("orders")
    got = [data.permutation(task, 784, seed=1) for task in range(5)]
    np.testing.assert_array_equal(got, want["permutations"])
    np.testing.assert_array_equal(data.class_order(100, seed=1), want["cifar100_classes"])
    with pytest.raises(ValueError, match="num_classes must be positive"):
        data.class_order(0, seed=1)


def test_independent_seeds_share_no_task():
    one = [data.permutation(t, 784, seed=0, independent=True) for t in range(5)]
    two = [data.permutation(t, 784, seed=1, independent=True) for t in range(5)]
    assert not any(np.array_equal(a, b) for a in one for b in two)
    np.testing.assert_array_equal(np.sort(one[3]), np.arange(784))


def test_rotations_match_the_reference_inside_jit():
    images = golden("rotated")["images"]  # [4, 36, 28, 28], 10 degrees apart
    put = ss.TaskData(images[:, 0], np.zeros(4, int), transform=as_they_are)
    dataset = data.Dataset("digits", put, put, 10)
    stream = data.RotatedStream(dataset, 36)
    turn = jax.jit(lambda task: task.batch(np.arange(4))[0])
    for i in range(36):
        np.testing.assert_array_equal(turn(stream.test[i]), images[:, i])
    assert turn._cache_size() == 1


def as_they_are(images):
    return images


def test_a_rotation_of_an_even_and_an_odd_image_by_hand():
    np.testing.assert_array_equal(data.rotation(90, (2, 2)), [[1, 3], [0, 2]])
    np.testing.assert_array_equal(data.rotation(0, (2, 3)), [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(data.rotation(180, (1, 3)), [[2, 1, 0]])


def test_rotated_streams_of_drawn_images_and_those_that_cannot_be(digits):
    with pytest.raises(ValueError, match=r"rotation needs images \[N, H, W\]"):
        data.RotatedStream(digits, 4)
    dataset = data.synthetic(jax.random.key(0), (4, 4), 3, 6, 3)
    again = data.synthetic(jax.random.key(0), (4, 4), 3, 6, 3)
    np.testing.assert_array_equal(dataset.train.inputs, again.train.inputs)
    assert dataset.train.inputs.shape == (6, 4, 4)
    np.testing.assert_array_equal(dataset.test.labels, [0, 1, 2])
    with pytest.raises(ValueError, match="where the first comes again"):
        data.RotatedStream(dataset, 37)
    assert len(data.RotatedStream(dataset)) == 36
    few = data.RotatedStream(dataset, 3)  # as far apart as many
    np.testing.assert_array_equal(few.view(2), data.rotation(20, (4, 4)))


def test_digits_are_the_real_ones_split_once(digits):
    assert digits.train.inputs.shape == (1438, 64)
    assert digits.test.inputs.shape == (359, 64)
    assert digits.num_labels == 10
    assert digits.train.inputs.dtype == jnp.uint8
    assert int(digits.train.inputs.max()) == 16
    from sklearn.datasets import load_digits

    def in_order(images):
        return images[np.lexsort(images.T)]

    everything = np.concatenate([digits.train.inputs, digits.test.inputs])
    np.testing.assert_array_equal(in_order(everything), in_order(load_digits().data))
    other = data.load_dataset("digits", seed=1)
    assert not np.array_equal(other.test.inputs, digits.test.inputs)


def test_a_stream_shares_its_images_and_permutes_them(digits):
    stream = data.PermutedStream(digits, num_tasks=3, seed=5)
    assert len(stream) == len(stream.train) == 3
    assert stream.train[2].inputs is digits.train.inputs
    batch = jax.jit(ss.TaskData.batch)
    x, y = batch(stream.test[2], np.arange(4))
    order = np.random.RandomState(7).permutation(64)
    plain, labels = batch(digits.test, np.arange(4))
    np.testing.assert_allclose(x, plain[:, order], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(y, labels)
    with pytest.raises(IndexError):
        stream.train[3]
    with pytest.raises(ValueError, match="num_tasks must be an int of at least 1, got 0"):
        data.PermutedStream(digits, 0)
    colours = dataclasses.replace(digits.train, transform=ss.Normalize((0.5,) * 3, 0.5))
    with pytest.raises(ValueError, match="permuted pixels have no channels"):
        data.PermutedStream(digits._replace(train=colours), 2)
    grey = dataclasses.replace(digits.train, transform=ss.Normalize((0.5,), [0.5]))
    data.PermutedStream(digits._replace(train=grey), 2)


def test_a_split_stream_deals_every_image_to_the_task_of_its_class(digits):
    stream = data.SplitStream(digits, 2)
    assert len(stream) == len(stream.test) == 5
    assert stream.classes == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    for split, whole in ((stream.train, digits.train), (stream.test, digits.test)):
        images, labels = np.asarray(whole.inputs), np.asarray(whole.labels)
        for i, task in enumerate(split):
            own = [j for j in range(len(labels)) if labels[j] in (2 * i, 2 * i + 1)]
            np.testing.assert_array_equal(task.inputs, images[own])
            np.testing.assert_array_equal(task.labels, labels[own])
            assert task.labels.dtype == whole.labels.dtype
            assert task.transform == whole.transform
        assert sum(task.num_examples for task in split) == len(labels)


def test_a_split_stream_in_an_order_of_its_own_relabelled(digits):
    stream = data.SplitStream(digits, 3, order=[9, 0, 4, 7, 1, 8], relabel=True)
    assert stream.classes == [(9, 0, 4), (7, 1, 8)]
    plain = data.SplitStream(digits, 3, order=[9, 0, 4, 7, 1, 8])
    for i, names in enumerate(stream.classes):
        np.testing.assert_array_equal(stream.test[i].inputs, plain.test[i].inputs)
        want = [names.index(label) for label in np.asarray(plain.test[i].labels)]
        np.testing.assert_array_equal(stream.test[i].labels, want)
    few = stream.first_test(7)[1]
    np.testing.assert_array_equal(few.inputs, stream.test[1].inputs[:7])
    np.testing.assert_array_equal(few.labels, stream.test[1].labels[:7])


def test_tasks_of_unequal_numbers_of_classes(digits):
    want = [(0, 1, 2, 3), (4, 5, 6), (7, 8, 9)]
    for counts in ((4, 3, 3), np.array([4, 3, 3])):
        assert data.SplitStream(digits, counts).classes == want
    assert data.SplitStream(digits, 4).classes == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    assert data.SplitStream(digits, 20).classes == [tuple(range(10))]
    stream = data.SplitStream(digits, (1, 3), order=[7, 2, 9, 0], relabel=True)
    assert stream.classes == [(7,), (2, 9, 0)]
    seven, rest = stream.train
    own = np.asarray(digits.train.labels) == 7
    np.testing.assert_array_equal(seven.inputs, np.asarray(digits.train.inputs)[own])
    assert not np.asarray(seven.labels).any()
    np.testing.assert_array_equal(np.unique(rest.labels), [0, 1, 2])
    with pytest.raises(ValueError, match="must hold equally many images"):
        stream.together([0, 1])


def test_classes_that_make_no_tasks(digits):
    for error, message, arguments in (
        (ValueError, "classes_per_task must be an int of at least 2, got 1", (1,)),
        (TypeError, "classes_per_task must be an int of at least 2, got 2.0", (2.0,)),
        (TypeError, "classes_per_task must be an int of at least 2, got '55'", ("55",)),
        (ValueError, r"10 classes in tasks of 3 leave one class.*=\(4, 3, 3\)$", (3,)),
        (ValueError, r"1 classes in tasks of 3 leave one class.*=\(1,\)$", (3, [4])),
        (ValueError, r"must add up to the 10 classes, got \[4, 3\]", ((4, 3),)),
        (ValueError, r"must add up to the 10 classes, got \[\]", ([],)),
        (ValueError, r"classes_per_task\[1\] must be an int of at least 1, got 0", ((10, 0),)),
        (TypeError, r"classes_per_task\[0\] must be an int of at least 1, got 5.0", ((5.0, 5),)),
        (ValueError, "order must name at least one class, got none", (2, [])),
        (ValueError, r"name each class once, got \[1, 2, 1, 3\]", (2, [1, 2, 1, 3])),
        (ValueError, "digits has no training images of class 10", (2, [9, 10])),
        (TypeError, r"order must be a sequence of labels, got \[0.5, 1.0\]", (2, [0.5, 1.0])),
    ):
        with pytest.raises(error, match=message):
            data.SplitStream(digits, *arguments)
    with pytest.raises(ValueError, match="digits has no test images of class"):
        data.SplitStream(digits._replace(test=data.SplitStream(digits, 2).test[0]), 2)


def test_a_split_stream_of_inputs_that_are_a_tree():
    tokens, lengths = np.arange(24).reshape(8, 3), np.arange(8)
    put = ss.TaskData({"tokens": tokens, "lengths": lengths}, np.arange(8) % 4, transform=None)
    stream = data.SplitStream(data.Dataset("texts", put, put, 4), 2)
    np.testing.assert_array_equal(stream.train[1].inputs["lengths"], [2, 3, 6, 7])
    np.testing.assert_array_equal(stream.train[1].inputs["tokens"], tokens[[2, 3, 6, 7]])
    np.testing.assert_array_equal(stream.first_test(1)[1].inputs["tokens"], tokens[[2]])
    assert stream.together([0, 1]).inputs["tokens"].shape == (2, 4, 3)
    shown = data.one_pass(put, 3)
    np.testing.assert_array_equal(shown["lengths"], [[0, 1, 2], [3, 4, 5], [6, 7, 0]])
    assert shown["tokens"].shape == (3, 3, 3)


def test_one_pass_shows_every_example_once_and_fills_the_last_batch():
    images = np.arange(14, dtype=np.float32).reshape(7, 2)
    task = ss.TaskData(images, np.zeros(7, int))
    np.testing.assert_array_equal(
        np.asarray(data.one_pass(task, 3))[..., 0] / 2, [[0, 1, 2], [3, 4, 5], [6, 0, 1]]
    )
    drawn = np.asarray(data.one_pass(task, 3, jax.random.key(0)))[..., 0].reshape(-1) / 2
    np.testing.assert_array_equal(np.sort(drawn[:7]), np.arange(7))
    np.testing.assert_array_equal(drawn[7:], drawn[:2])
    assert (drawn[:7] != np.arange(7)).any()
    assert data.one_pass(task, 7).shape == (1, 7, 2)
    assert data.one_pass(task, 10).shape == (1, 10, 2)
    view = dataclasses.replace(task, view=jnp.asarray([1, -1]))
    np.testing.assert_array_equal(data.one_pass(view, 2)[0], [[1, 0], [3, 0]])
    with pytest.raises(ValueError, match="batch_size must be an int of at least 1, got 0"):
        data.one_pass(task, 0)


def test_missing_data_says_where_and_what_to_do_at_once(tmp_path):
    nothing, empty, unprepared = (tmp_path / name for name in ("nothing", "empty", "unprepared"))
    empty.mkdir()
    (unprepared / "mnist" / "3.0.1").mkdir(parents=True)
    (unprepared / "mnist" / "3.0.1" / "dataset_info.json").write_text("{}")
    for folder in (nothing, empty, unprepared):
        start = time.perf_counter()
        with pytest.raises(FileNotFoundError) as error:
            data.load_dataset("mnist", folder)
        assert str(folder) in str(error.value)
        assert f"tfds build mnist --data_dir={folder}" in str(error.value)
        assert time.perf_counter() - start < 20  # a download attempt hangs for minutes
    with pytest.raises(FileNotFoundError, match="mnist needs --data-dir"):
        data.load_dataset("mnist")


def test_prepared_data_is_read_without_tensorflow_and_cached(tmp_path, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TFDS's own, none of our business
        from tests.tiny_digits import TinyDigits, image

        builder = TinyDigits(data_dir=tmp_path / "tfds", file_format="array_record")
        builder.download_and_prepare()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        first = data.load_dataset("tiny_digits", tmp_path / "tfds")
    assert first.train.inputs.shape == (12, 4, 3)
    assert first.num_labels == 3
    found = {np.asarray(i).tobytes() for i in first.train.inputs}
    assert found == {image("train", i).tobytes() for i in range(12)}
    # The second time nothing is decoded.
    monkeypatch.setattr(data.sources, "_decode", None)
    second = data.load_dataset("tiny_digits", tmp_path / "tfds")
    np.testing.assert_array_equal(second.test.inputs, first.test.inputs)


def test_importing_the_package_imports_neither_tfds_nor_matplotlib():
    import subprocess
    import sys

    code = (
        "import sys, supsup_jax, supsup_jax.data, supsup_jax.models;"
        "print([m for m in ('tensorflow_datasets', 'matplotlib', 'sklearn', 'tensorflow') "
        "if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# --- augmentation


def padded_crops(image, padding, black):
    """Every image that CropAndFlip may make of one, by NumPy."""
    height, width, _ = image.shape
    padded = np.full((height + 2 * padding, width + 2 * padding, image.shape[2]), black, np.float32)
    padded[padding : padding + height, padding : padding + width] = image
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            crop = padded[top : top + height, left : left + width]
            yield crop
            yield crop[:, ::-1]


def test_crops_and_flips_are_those_of_the_padded_image_normalised_by_channel():
    image = np.random.default_rng(0).integers(0, 256, (3, 4, 2)).astype(np.uint8)
    normalize = ss.Normalize((0.2, 0.3), (0.5, 0.25))
    x = np.tile(normalize(image), (200, 1, 1, 1))
    shifted = jax.jit(lambda mean: ss.Normalize(mean, (0.5, 0.25))(image))(np.float32([0.2, 0.3]))
    np.testing.assert_allclose(shifted, x[0], atol=1e-6)
    np.testing.assert_allclose(x[0, ..., 0], (image[..., 0] / 255 - 0.2) / 0.5, atol=1e-5)
    np.testing.assert_allclose(x[0, ..., 1], (image[..., 1] / 255 - 0.3) / 0.25, atol=1e-5)
    made = np.asarray(jax.jit(data.CropAndFlip(1, normalize))(jax.random.key(1), x))
    possible = list(padded_crops(x[0], 1, np.array([-0.4, -1.2], np.float32)))
    which = [[np.allclose(each, one, atol=1e-6) for one in possible].index(True) for each in made]
    counts = np.bincount(which, minlength=len(possible))
    assert len(possible) == 18
    # 200 draws of 18: all occur, none much more often than another.
    assert counts.min() >= 1
    assert counts.max() <= 30


def test_augmentation_hashes_by_value_and_wants_channels():
    one = data.CropAndFlip(4, ss.Normalize((0.5,), (0.2,)))
    assert one == data.CropAndFlip(4, ss.Normalize((0.5,), (0.2,)))
    assert hash(one) == hash(data.CropAndFlip(4, ss.Normalize((0.5,), (0.2,))))
    with pytest.raises(ValueError, match=r"takes images \[B, H, W, channels\], got shape \(2, 3\)"):
        one(jax.random.key(0), jnp.zeros((2, 3)))
