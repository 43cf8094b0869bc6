"""Which features of a dataset of TFDS are its images and their labels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from supsup_jax.checks import WrongTypeError
from supsup_jax.extras import needed


def library() -> Any:
    """TFDS, imported where it is needed. Its own annotations say less than it does."""
    with needed("data"):
        import tensorflow_datasets

    return tensorflow_datasets


def check_keys(keys: Sequence[str] | None) -> None:
    """Raises TypeError unless `keys` is None, or a pair of names."""
    pair = isinstance(keys, tuple | list) and list(map(type, keys)) == [str, str]
    if not (keys is None or pair):
        raise WrongTypeError(
            f'keys must be the names of the image and the label, such as ("image", "label"), '
            f"got {keys!r}"
        )


def find_keys(folder: Path, info: Any, keys: Sequence[str] | None = None) -> tuple[str, str]:
    """The names of the image and its label in the dataset that TFDS describes by `info`.

    They are `keys`; without, the supervised keys, or "image" and "label", or the only image and the
    only ClassLabel, or the only integer. Raises ValueError, naming the features found, unless they
    are an image of bytes and an integer.
    """
    tfds = library()
    features = dict(sorted(info.features.items()))  # TFDS gives them in any order
    images = [
        name
        for name, each in features.items()
        if isinstance(each, tfds.features.Image) and each.np_dtype == np.uint8
    ]
    integers = [
        name
        for name, each in features.items()
        if isinstance(each, tfds.features.Tensor)
        and not each.shape
        and np.issubdtype(each.np_dtype, np.integer)
    ]
    classes = [name for name in integers if isinstance(features[name], tfds.features.ClassLabel)]
    only = (*images, *(classes if len(classes) == 1 else integers))
    for pair in [info.supervised_keys, ("image", "label"), only] if keys is None else [keys]:
        if pair and len(pair) == 2 and pair[0] in images and pair[1] in integers:
            return pair[0], pair[1]
    found = ", ".join(f"{name}: {type(each).__name__}" for name, each in features.items())
    raise ValueError(
        f"keys {'must say which are' if keys is None else f'{tuple(keys)} must be'} an image of "
        f"bytes and its integer label in {folder}, whose features are {found}"
    )
