"""Real data: images read whole into memory, or left on disk, and streams of tasks made of them."""

from supsup_jax.data.augment import CropAndFlip
from supsup_jax.data.record_stream import RecordStream
from supsup_jax.data.sources import Dataset, MissingDataError, load_dataset, synthetic
from supsup_jax.data.streams import (
    PermutedStream,
    RotatedStream,
    SplitStream,
    ViewStream,
    one_pass,
)
from supsup_jax.data.views import class_order, permutation, rotation

__all__ = [
    "CropAndFlip",
    "Dataset",
    "MissingDataError",
    "PermutedStream",
    "RecordStream",
    "RotatedStream",
    "SplitStream",
    "ViewStream",
    "class_order",
    "load_dataset",
    "one_pass",
    "permutation",
    "rotation",
    "synthetic",
]
