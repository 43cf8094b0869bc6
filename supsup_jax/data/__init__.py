"""Real data: images read whole into memory, and streams of tasks made of them."""

from supsup_jax.data.sources import Dataset, MissingDataError, load_dataset, synthetic
from supsup_jax.data.streams import PermutedStream
from supsup_jax.data.views import permutation

__all__ = [
    "Dataset",
    "MissingDataError",
    "PermutedStream",
    "load_dataset",
    "permutation",
    "synthetic",
]
