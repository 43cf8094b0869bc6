"""Streams: task i's training and test data, made when asked for, over one copy of the images."""

import copy
import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from supsup_jax.data.sources import Dataset
from supsup_jax.data.views import permutation, rotation


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


class ViewStream:
    """Tasks that see the same images in different ways.

    `train[i]` and `test[i]` are task i's TaskData over the images of `dataset`, which all tasks
    share; len() is the number of tasks. Each subclass says what task i sees, `view(i)`.
    """

    def __init__(self, dataset: Dataset, num_tasks: int):
        if num_tasks < 1:
            raise ValueError(f"num_tasks must be at least 1, got {num_tasks}")
        self.dataset, self._num_tasks = dataset, num_tasks
        self.train = _Split(self, dataset.train)
        self.test = _Split(self, dataset.test)

    def __len__(self) -> int:
        return self._num_tasks

    def on(self, dataset: Dataset) -> "ViewStream":
        """The same tasks over other images of the same shape."""
        other = copy.copy(self)
        ViewStream.__init__(other, dataset, self._num_tasks)
        return other

    def view(self, task: int) -> jax.Array:
        """Task `task`'s gather index over the pixels, as TaskData takes it."""
        raise NotImplementedError(f"{type(self).__name__} must say what task {task} sees")


class PermutedStream(ViewStream):
    """Permuted images (paper section 4.2): each task sees the pixels in an order of its own.

    seed, independent: as `views.permutation`.
    """

    def __init__(self, dataset: Dataset, num_tasks: int, seed: int = 0, independent: bool = False):
        super().__init__(dataset, num_tasks)
        self._seed, self._independent = seed, independent

    def view(self, task: int) -> jax.Array:
        return jnp.asarray(
            permutation(task, self.dataset.num_pixels, self._seed, self._independent)
        )


class RotatedStream(ViewStream):
    """Rotated images (paper section 4.2): task i sees them turned by i times 360 / num_tasks.

    As the reference, by whole degrees: 360 // num_tasks apart.
    Raises ValueError for images that are not [H, W], or more than 360 tasks.
    """

    def __init__(self, dataset: Dataset, num_tasks: int = 36):
        super().__init__(dataset, num_tasks)
        shape = dataset.train.images.shape[1:]
        if len(shape) != 2:
            raise ValueError(f"rotation needs images [N, H, W], {dataset.name} has [N, *{shape}]")
        if num_tasks > 360:
            raise ValueError(f"num_tasks must be at most 360, a degree each, got {num_tasks}")

    def view(self, task: int) -> jax.Array:
        shape = self.dataset.train.images.shape[1:]
        return jnp.asarray(rotation(task * (360 // self._num_tasks), shape))
