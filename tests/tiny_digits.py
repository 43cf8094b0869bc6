"""A TFDS dataset of a few random images, which the tests prepare without TensorFlow.

In a module of its own because TFDS looks a builder's class up by its module.
"""

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
            encoded = io.BytesIO()  # encoded here, since TFDS would ask TensorFlow to do it
            PIL.Image.fromarray(image(split, i)[..., 0]).save(encoded, format="PNG")
            encoded.seek(0)
            yield i, {"image": encoded, "label": i % 3}


def image(split, i):
    seed = i + (1000 if split == "test" else 0)
    return np.random.default_rng(seed).integers(0, 256, (4, 3, 1)).astype(np.uint8)
