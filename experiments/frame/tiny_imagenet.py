"""A dataset with ImageNet's features, small enough to make in a second: for smoke tests and tests.

In a module of its own because TFDS looks a builder's class up by its module.
"""

import contextlib
import io
from pathlib import Path

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

NAME = "tiny_imagenet"
COLOURS = (200, 60, 60), (60, 200, 60), (60, 60, 200), (200, 200, 60)  # one a class
IMAGES = 24  # of each split


class TinyImagenet(tfds.core.GeneratorBasedBuilder):
    """JPEGs of odd sizes in four classes, a colour each."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(num_classes=len(COLOURS)),
                "file_name": tfds.features.Text(),
            }
        )
        return self.dataset_info_from_configs(features=features)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in ("train", "validation")}

    def _generate_examples(self, split):
        for i in range(IMAGES):
            name = f"{split}_{i}.JPEG"
            encoded = io.BytesIO()  # encoded here, since TFDS would ask TensorFlow to do it
            PIL.Image.fromarray(image(split, i)).save(encoded, format="JPEG")
            encoded.seek(0)
            yield name, {"image": encoded, "label": i % len(COLOURS), "file_name": name}


def image(split: str, i: int) -> np.ndarray:
    """Image i of a split before JPEG, uint8 [H, W, 3], 30 to 60 pixels a side: colour and noise."""
    rng = np.random.default_rng([i, split == "train"])
    height, width = rng.integers(30, 61, 2)
    noise = rng.integers(-40, 41, (height, width, 3))
    return (np.asarray(COLOURS[i % len(COLOURS)]) + noise).astype(np.uint8)


def prepare(data_dir: Path) -> None:
    """Writes the dataset to `data_dir`, as TFDS prepares it: in ArrayRecord, without TensorFlow."""
    builder = TinyImagenet(data_dir=data_dir, file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        builder.download_and_prepare()
