"""Streams: task i's training and test data, made when asked for, over one copy of the images."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp

from supsup_jax.data.sources import Dataset
from supsup_jax.data.views import permutation


class _Split(Sequence):
    """One split of a stream as a sequence of TaskData, one a task."""

    def __init__(self, stream, base):
        self._stream, self._base = stream, base

    def __len__(self):
        return len(self._stream)

    def __getitem__(self, task):
        if isinstance(task, slice):
            return [self[i] for i in range(*task.indices(len(self)))]
        task = task + len(self) if task < 0 else task
        if not 0 <= task < len(self):
            raise IndexError(f"task {task} is not in the stream of {len(self)}")
        return dataclasses.replace(self._base, view=self._stream.view(task))


class PermutedStream:
    """Permuted images (paper section 4.2): each task sees the pixels in an order of its own.

    `train[i]` and `test[i]` are task i's TaskData over the images of `dataset`, which all tasks
    share; len() is the number of tasks.
    """

    def __init__(self, dataset: Dataset, num_tasks: int, seed: int = 0, independent: bool = False):
        if num_tasks < 1:
            raise ValueError(f"num_tasks must be at least 1, got {num_tasks}")
        self.dataset, self._num_tasks = dataset, num_tasks
        self._seed, self._independent = seed, independent
        self.train = _Split(self, dataset.train)
        self.test = _Split(self, dataset.test)

    def __len__(self) -> int:
        return self._num_tasks

    def on(self, dataset: Dataset) -> "PermutedStream":
        """The same tasks over other images of the same shape."""
        return PermutedStream(dataset, self._num_tasks, self._seed, self._independent)

    def view(self, task: int):
        return jnp.asarray(
            permutation(task, self.dataset.num_pixels, self._seed, self._independent)
        )
