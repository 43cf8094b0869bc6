"""Datasets, read whole: scikit-learn's digits, embedded, and what TFDS has prepared.

Nothing is ever downloaded here. TFDS prepares a dataset on request (its own command, which needs
TensorFlow and the internet); this module looks for the result and says what to run without it.
"""

import hashlib
import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote_plus

import jax
import numpy as np

from supsup_jax.checks import check_int
from supsup_jax.data.keys import check_keys, find_keys, library
from supsup_jax.extras import needed
from supsup_jax.types import Integers, Normalize, TaskData

# Mean and standard deviation of the pixels in [0, 1], as the reference normalises them, and as
# measured on tiny_imagenet32's training split; of other datasets they are measured when read.
_CIFAR = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)
NORMALIZATION = {
    "mnist": (0.1307, 0.3081),
    "cifar10": _CIFAR,
    "cifar10_jpeg": _CIFAR,
    "cifar100": _CIFAR,
    "tiny_imagenet32": ((0.475, 0.446, 0.392), (0.245, 0.237, 0.248)),
    "imagenet2012": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}

# Of the examples of a dataset without a split for testing, one in so many is set apart for it.
TEST_SHARE = 5

# Of a split, as they are cached.
_ARRAYS = "images", "labels"


class MissingDataError(FileNotFoundError):
    """A dataset that is not where it was looked for; the message holds the command to make it."""


class Dataset(NamedTuple):
    """A dataset on the device, without a view: images uint8 [N, P] or [N, H, W, C]."""

    name: str
    train: TaskData
    test: TaskData
    num_labels: int

    @property
    def num_pixels(self) -> int:
        """Of an image, with its channels: what a dense network takes."""
        return math.prod(self.train.inputs.shape[1:])


def load_dataset(
    name: str,
    data_dir: str | os.PathLike | None = None,
    seed: int = 0,
    *,
    keys: Sequence[str] | None = None,
    channels: int | None = None,
) -> Dataset:
    """The dataset `name`: "digits", or one that TFDS has prepared in `data_dir`.

    Tested by its split "test", else "validation", else a fifth that is drawn from "train".
    seed: of that draw.
    keys: which features are the image and its label, such as ("image", "fine_label"), where TFDS
      does not say or others are meant.
    channels: grey images get as many, all the same, as networks of RGB images take them: [N, H, W]
      becomes [N, H, W, channels]. None: images as they are, a single channel no axis.
    Raises MissingDataError, before anything slow, when it is not there; ValueError for keys that
    are no image and label, and for channels that the images do not have and are not to repeat.
    """
    check_int("seed", seed, 0)
    check_keys(keys)
    if channels is not None:
        check_int("channels", channels, 1)
    if name != "digits":
        return _tfds(name, data_dir, seed, keys, channels)
    if keys is not None:
        raise ValueError(f"keys are of datasets of TFDS, digits has none, got {keys}")
    return _digits(seed, channels)


def _digits(seed, channels):
    """1,797 real 8x8 digits, pixels 0..16."""
    with needed("data"):
        from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    order, num_train = set_apart("digits", len(labels), seed)
    images = values.astype(np.uint8)[order]
    # Centred, at less than unit variance (std would be .376): networks that see less contrast
    # are less sure under a wrong mask. One-shot task accuracy .987 -> .999, GG unchanged.
    normalize = Normalize(float(np.mean(images[:num_train] / 16)), 0.5, scale=16.0)
    if channels is not None:
        images = _repeated("digits", images.reshape(-1, 8, 8), channels)
    return _cut("digits", images, labels[order], num_train, normalize)


def set_apart(name: str, num: int, seed: int) -> tuple[np.ndarray, int]:
    """A shuffle of `num` examples, and how many of the first are for training.

    The others, one in TEST_SHARE, are for testing.
    """
    if num < TEST_SHARE:
        raise ValueError(f"{name} has {num} examples, too few to set any apart for testing")
    return np.random.default_rng(seed).permutation(num), num - num // TEST_SHARE


def _repeated(name, images, channels):
    """Images [N, H, W] or [N, H, W, C] as [N, H, W, channels]; None as they are."""
    if channels is None or images.shape[3:] == (channels,):
        return images
    if images.ndim == 4:
        raise ValueError(
            f"{name} has images of {images.shape[-1]} channels, which channels={channels} does not "
            "change: only a single channel is repeated"
        )
    return np.repeat(images[..., None], channels, axis=-1)


def synthetic(
    key: jax.Array, shape: tuple[int, ...], num_labels: int, num_train: int, num_test: int
) -> Dataset:
    """Bytes drawn from `key` around one random image a label: for smoke tests, and only those."""
    mean_key, noise_key = jax.random.split(key)
    num = num_train + num_test
    # In turn, so that every split of classes has as many images of each.
    labels = np.concatenate([np.arange(count) % num_labels for count in (num_train, num_test)])
    means = jax.random.uniform(mean_key, (num_labels, *shape), maxval=200.0)
    noise = jax.random.uniform(noise_key, (num, *shape), maxval=55.0)
    images = np.asarray(means[labels] + noise).astype(np.uint8)
    return _cut("synthetic", images, labels, num_train, Normalize(0.5, 0.25))


def _cut(name, images, labels, num_train, transform):
    """The dataset whose first `num_train` examples are for training."""
    train, test = (
        {"images": images[part], "labels": labels[part].astype(np.int32)}
        for part in (slice(num_train), slice(num_train, None))
    )
    return _dataset(name, train, test, transform)


def _dataset(name, train, test, transform):
    put = (TaskData(*map(split.get, _ARRAYS), transform=transform) for split in (train, test))
    num_labels = max(int(split["labels"].max()) for split in (train, test)) + 1
    return Dataset(name, *put, num_labels=num_labels)


def _tfds(name, data_dir, seed, keys, channels):
    folder = prepared_folder(name, data_dir)
    info = json.loads((folder / "dataset_info.json").read_bytes())
    splits = [split["name"] for split in info.get("splits", [])]
    if "train" not in splits:
        raise MissingDataError(f"{folder} has no split 'train', only {splits}")
    held_out = [split for split in ("test", "validation") if split in splits]
    train, *test = (
        cached(name, folder, split, lambda split=split: _decode(folder, split, keys), keys)
        for split in ("train", *held_out[:1])
    )
    if not test:
        order, num_train = set_apart(name, len(train["labels"]), seed)
        parts = order[:num_train], order[num_train:]
        train, *test = ({what: train[what][part] for what in _ARRAYS} for part in parts)
    mean, std = NORMALIZATION.get(name) or _statistics(train["images"])
    splits = [
        {**split, "images": _repeated(name, split["images"], channels)} for split in (train, *test)
    ]
    return _dataset(name, *splits, Normalize(mean, std))


def _statistics(images):
    """Mean and deviation of pixels in [0, 1], by channel where images have channels."""
    channels = np.moveaxis(images, -1, 0) if images.ndim == 4 else images[None]
    # Counts of each byte say it all, and no copy of the images in floats is made.
    counts = np.stack([np.bincount(channel.ravel(), minlength=256) for channel in channels])
    shares, values = counts / counts.sum(axis=1, keepdims=True), np.arange(256) / 255
    mean = shares @ values
    std = np.sqrt(shares @ values**2 - mean**2)
    if images.ndim == 4:
        return tuple(mean.tolist()), tuple(std.tolist())
    return mean.item(), std.item()


def prepared_folder(name: str, data_dir: str | os.PathLike | None) -> Path:
    """The newest prepared version of `name` in data_dir. Raises MissingDataError without one."""
    if data_dir is None:
        raise MissingDataError(
            f"{name} needs --data-dir, a folder that holds {name}/ as tensorflow-datasets prepares "
            f"it: tfds build {name} --data_dir=DIR --file_format=array_record"
        )
    root = Path(data_dir).expanduser().resolve()
    build = f"tfds build {name} --data_dir={root} --file_format=array_record"
    if not root.is_dir():
        raise MissingDataError(f"no folder {root}; to prepare {name} there: {build}")
    versions = [info.parent for info in (root / name).glob("*/dataset_info.json")]
    versions = [folder for folder in versions if any(folder.glob("*.array_record*"))]
    if unread := [] if versions else sorted((root / name).glob("*/*.tfrecord*")):
        raise MissingDataError(
            f"{unread[-1].parent} is in TFRecord, which TFDS reads by TensorFlow only: convert it, "
            "where TensorFlow and apache-beam are installed, by tfds convert_format "
            f"--dataset_version_dir={unread[-1].parent} --out_file_format=array_record, or prepare "
            f"{name} in another folder: tfds build {name} --data_dir=DIR --file_format=array_record"
        )
    if not versions:
        raise MissingDataError(
            f"no prepared {name} in {root / name} (a version folder with dataset_info.json and "
            f"array_record files); to prepare it: {build}"
        )
    return max(versions, key=_version)


def _version(folder):
    return tuple(int(part) if part.isdecimal() else -1 for part in folder.name.split("."))


def cached(
    name: str,
    folder: Path,
    part: str,
    read: Callable[[], dict[str, np.ndarray]],
    keys: Sequence[str] | None = None,
) -> dict[str, np.ndarray]:
    """What `read` returns for a part of the dataset in `folder`, by the `keys` asked for; read
    once, then from the user's cache.
    """
    digest = hashlib.sha256((folder / "dataset_info.json").read_bytes())
    digest.update(str(folder.resolve()).encode())
    if keys:  # "Label" and "label" are one name to some disks
        digest.update(repr(tuple(keys)).encode())
        part = ",".join([part, *map(quote_plus, keys)])
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = base / "supsup_jax" / f"{name}-{folder.name}-{part}-{digest.hexdigest()[:16]}.npz"
    if path.exists():
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
        except Exception as error:  # a damaged archive fails in a dozen ways, all of one cure
            warnings.warn(f"{path} is damaged, reading {name} again: {error!r}", stacklevel=2)
    arrays: dict[str, Any] = read()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as partial:
            np.savez(Path(partial) / "arrays.npz", **arrays)
            os.replace(Path(partial) / "arrays.npz", path)
    except OSError as error:
        warnings.warn(f"{name} is not cached and will be read again: {error}", stacklevel=2)
    return arrays


def _decode(folder, split, keys):
    """Images and labels of a split."""
    builder = library().builder_from_directory(str(folder))
    image, label = find_keys(folder, builder.info, keys)
    source = builder.as_data_source(split)
    examples = [source[i] for i in range(len(source))]
    if len(shapes := {example[image].shape for example in examples}) != 1:
        raise ValueError(
            f"{folder} has images of {len(shapes)} shapes in {split!r}, such as "
            f"{sorted(shapes)[:3]}; datasets read whole need one shape"
        )
    images = np.stack([example[image] for example in examples])
    labels = as_labels(folder, split, [example[label] for example in examples])
    # A single channel is no axis to a dense network, and a view indexes pixels.
    return {"images": images[..., 0] if images.shape[-1] == 1 else images, "labels": labels}


def as_labels(folder: Path, split: str, found: Integers) -> np.ndarray:
    """int32 [N]. Raises ValueError for numbers that are no classes, such as -1 for unknown."""
    labels = np.asarray(found)
    if labels.size and not 0 <= labels.min() <= labels.max() <= np.iinfo(np.int32).max:
        raise ValueError(
            f"{folder} must have labels of 0 and more in {split!r}, got {labels.min()} to "
            f"{labels.max()}"
        )
    return labels.astype(np.int32)
