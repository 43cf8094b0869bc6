"""TFDS datasets of a few random images, which the tests prepare without TensorFlow.

In a module of its own because TFDS looks a builder's class up by its module.
"""

import contextlib
import io

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

SIZES = {"train": 12, "test": 5}


class TinyDigits(tfds.core.GeneratorBasedBuilder):
    """Twelve training and five test images of 4x3 pixels."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(4, 3, 1), encoding_format="png"),
                "label": tfds.features.ClassLabel(num_classes=3),
            }
        )
        return self.dataset_info_from_configs(features=features)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in SIZES}

    def _generate_examples(self, split):
        for i in range(SIZES[split]):
            yield i, {"image": png(split, i), "label": i % 3}


def png(split, i):
    encoded = io.BytesIO()  # encoded here, since TFDS would ask TensorFlow to do it
    PIL.Image.fromarray(image(split, i)[..., 0]).save(encoded, format="PNG")
    encoded.seek(0)
    return encoded


def image(split, i):
    seed = i + (1000 if split == "test" else 0)
    return np.random.default_rng(seed).integers(0, 256, (4, 3, 1)).astype(np.uint8)


# Features beside the image: their kinds, and what image i has.
ODD = {
    "coarse": (tfds.features.ClassLabel(num_classes=2), lambda i: i % 2),
    "fine": (tfds.features.ClassLabel(num_classes=3), lambda i: i % 3),
    "id": (tfds.features.Scalar(np.int64), lambda i: i),
    "below": (tfds.features.Scalar(np.int64), lambda i: i - 1),
}


class TinyOdd(tfds.core.GeneratorBasedBuilder):
    """Twelve images in a training split only, and features of other names and kinds."""

    VERSION = tfds.core.Version("1.0.0")
    FEATURES = ()
    SUPERVISED = None

    def _info(self):
        picture = tfds.features.Image(shape=(4, 3, 1), encoding_format="png")
        features = {"img": picture, **{name: ODD[name][0] for name in self.FEATURES}}
        features = tfds.features.FeaturesDict(features)
        return self.dataset_info_from_configs(features=features, supervised_keys=self.SUPERVISED)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(SIZES["train"]):
            yield i, {"img": png("train", i), **{name: ODD[name][1](i) for name in self.FEATURES}}


class TinyClass(TinyOdd):
    """The only ClassLabel is the label, whatever integers there are."""

    FEATURES = "fine", "id", "below"


class TinyInteger(TinyOdd):
    """The only integer is the label."""

    FEATURES = ("id",)


class TinySupervised(TinyOdd):
    """Two labels, one of which TFDS knows for the label."""

    FEATURES = "coarse", "fine"
    SUPERVISED = "img", "coarse"


class TinyAmbiguous(TinyOdd):
    """Two labels."""

    FEATURES = "coarse", "fine"


def prepare(builder, folder):
    """Writes a dataset to the folder, and returns that of its version."""
    made = builder(data_dir=folder, file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        made.download_and_prepare()
    return folder / made.name / "1.0.0"
