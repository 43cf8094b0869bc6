"""Tasks on disk as stores of bounded memory, one at a time."""

from collections.abc import Callable, Iterator

import numpy as np

from supsup_jax.stores.mask_store import MaskStore


class Parts:
    """Tasks of a DiskStore as MaskStores, loaded one at a time, as often as gone through.

    What is held at a time is one part, and while it is loaded two more copies of its masks.
    ids: of the tasks, int [T], in order: `parts.ids[belief.task]` names what inference found, and
    is always of these tasks, whatever another process writes meanwhile; of one that it removes,
    loading raises TaskIdError. load: of some of these, as a store. size: of how many at a time.
    """

    def __init__(self, ids: np.ndarray, load: Callable[[list[int]], MaskStore], size: int):
        self.ids, self._load, self._size = ids, load, size

    def __len__(self) -> int:
        return -(-len(self.ids) // self._size)

    def __iter__(self) -> Iterator[MaskStore]:
        for start in range(0, len(self.ids), self._size):
            yield self._load(self.ids[start : start + self._size].tolist())
