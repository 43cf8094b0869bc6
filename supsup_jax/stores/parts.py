"""Tasks on disk as stores of bounded memory, one at a time."""

from collections.abc import Callable, Iterator

import numpy as np

from supsup_jax.stores.mask_store import MaskStore


class Parts:
    """The tasks of a DiskStore as MaskStores, loaded one at a time, as often as gone through.

    What is held at a time is one part, and while it is loaded two more copies of its masks.
    ids: of the tasks that are there now, in order. load: of some of these, as a store. size: of
    how many at a time.
    """

    def __init__(
        self, ids: Callable[[], np.ndarray], load: Callable[[list[int]], MaskStore], size: int
    ):
        self._ids, self._load, self._size = ids, load, size

    def __len__(self) -> int:
        return -(-len(self._ids()) // self._size)

    def __iter__(self) -> Iterator[MaskStore]:
        ids = self._ids()
        for start in range(0, len(ids), self._size):
            yield self._load(ids[start : start + self._size].tolist())
