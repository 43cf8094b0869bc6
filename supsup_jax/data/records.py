"""Labelled images that TFDS has prepared, left on disk: labels at once, an image by its number.

Read through TFDS's data source, so without TensorFlow and in any order. TFDS's own decoder is left
out: finding which images belong to a class decodes none of them.
"""

import functools
import importlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from supsup_jax.data.keys import find_keys, library
from supsup_jax.data.sources import MissingDataError, as_labels, cached
from supsup_jax.extras import needed

if TYPE_CHECKING:
    from PIL import Image

# Records read at once when labels are looked up: some 100 MB of ImageNet.
LABELS_AT_ONCE = 1024


class ImageRecords:
    """One split of the dataset that TFDS has prepared in `folder`, a version's folder.

    keys: which features are the image and its label, as in `load_dataset`.
    num_labels, splits: of the dataset. Can be pickled, and read by several threads.
    Raises MissingDataError for a split that is not there or whose files are not all there and
    whole, naming them; ValueError for features that are not an image and its label.
    """

    def __init__(self, folder: Path, split: str, keys: Sequence[str] | None = None):
        with needed("data"):
            import PIL.Image  # noqa: F401  what `image` needs, missed before anything slow
        tfds = library()
        builder = tfds.builder_from_directory(str(folder))
        info = builder.info
        self.name, self.split, self.splits = info.name, split, list(info.splits)
        self._keys, (self._image, self._label) = keys, find_keys(folder, info, keys)
        if split not in info.splits:
            raise MissingDataError(f"{folder} has no split {split!r}, only {self.splits}")
        # Before the files are named: of several formats it chooses the one that can be read.
        encoded = {self._image: tfds.decode.SkipDecoding()}
        self._source = builder.as_data_source(split, decoders=encoded)
        self._files = [folder / name for name in sorted(info.splits[split].filenames)]
        self._sizes = list(info.splits[split].shard_lengths)
        self._check_files(folder)
        self._num_classes = getattr(info.features[self._label], "num_classes", None)
        self._folder = folder

    def __len__(self) -> int:
        return len(self._source)

    @property
    def num_labels(self) -> int:
        """How many classes the dataset says it has; else one more than the largest label."""
        return self._num_classes or int(self.labels.max()) + 1  # integers do not say

    def image(self, i: int) -> "Image.Image":
        """Image i, decoded to RGB. Raises ValueError, naming the record, when it cannot be."""
        from PIL import Image

        try:
            return Image.open(io.BytesIO(self._source[i][self._image])).convert("RGB")
        except Exception as error:  # damaged bytes fail in a dozen ways, each with its own class
            shard = int(np.searchsorted(np.cumsum(self._sizes), i, side="right"))
            place = i - sum(self._sizes[:shard])
            raise ValueError(
                f"image {i} of {self.name} {self.split} (record {place} of "
                f"{self._files[shard]}) cannot be decoded: {error}"
            ) from error

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """int32 [N]. Reads the whole split, once: those of a large one are in the user's cache."""
        if len(self) <= LABELS_AT_ONCE:
            return self._read_labels()["labels"]
        part, read = f"{self.split}-labels", self._read_labels
        return cached(self.name, self._folder, part, read, self._keys)["labels"]

    def _read_labels(self):
        parts = []
        for start in range(0, len(self), LABELS_AT_ONCE):
            some = range(start, min(start + LABELS_AT_ONCE, len(self)))
            try:
                parts += [example[self._label] for example in self._source.__getitems__(list(some))]
            except Exception as error:  # as in `image`
                raise ValueError(
                    f"labels {some[0]} to {some[-1]} of {self.name} {self.split} in "
                    f"{self._folder} cannot be read: {error}"
                ) from error
        return {"labels": as_labels(self._folder, self.split, parts)}

    def _check_files(self, folder):
        with needed("data"):  # it has no annotations
            reader = importlib.import_module("array_record.python.array_record_module")

        def holds(path, size):
            if not path.is_file():
                return False
            # The count is at the end of the file: whatever cuts it short loses it.
            return reader.ArrayRecordReader(str(path)).num_records() == size

        pairs = zip(self._files, self._sizes, strict=True)
        if bad := [path.name for path, size in pairs if not holds(path, size)]:
            some = ", ".join(bad[:8]) + (", ..." if len(bad) > 8 else "")
            raise MissingDataError(
                f"{folder} is prepared only in part: of the {len(self._files)} files of split "
                f"{self.split!r} {len(bad)} are missing or cut short ({some}); copy or build them "
                f"again: tfds build {self.name} --data_dir={folder.parent.parent} "
                "--file_format=array_record"
            )
