"""Streams: task i's training and test data, made when asked for, over one copy of the images."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from supsup_jax import prng
from supsup_jax.checks import check_int
from supsup_jax.data.sources import Dataset
from supsup_jax.data.views import permutation, rotation
from supsup_jax.types import Integers, Normalize, PyTree, TaskData


class Split(Sequence):
    """One split of a stream as a sequence of TaskData, one a task, or of iterables of them."""

    def __init__(self, num_tasks: int, data_of: Callable[[int], Any]):
        self._num_tasks, self._data_of = num_tasks, data_of

    def __len__(self):
        return self._num_tasks

    def __getitem__(self, task) -> Any:
        if isinstance(task, slice):
            return [self[i] for i in range(*task.indices(len(self)))]
        task = task + len(self) if task < 0 else task
        if not 0 <= task < len(self):
            raise IndexError(f"task {task} is not in the stream of {len(self)}")
        return self._data_of(task)


class Stream:
    """Tasks made of one dataset: `train[i]` and `test[i]` are task i's TaskData, len() how many.

    A subclass says what a split's images become for a task, `_data_of(split, task)`.
    """

    def __init__(self, dataset: Dataset, num_tasks: int):
        check_int("num_tasks", num_tasks, 1)
        self.dataset = dataset
        self.train, self.test = (
            Split(num_tasks, functools.partial(self._data_of, split))
            for split in (dataset.train, dataset.test)
        )

    def _data_of(self, split: TaskData, task: int) -> TaskData:
        raise NotImplementedError(f"{type(self).__name__} must say what task {task} is made of")

    def __len__(self) -> int:
        return len(self.train)

    def first_test(self, count: int) -> Sequence[TaskData]:
        """The test data of each task, its first `count` images only."""

        def few(task):
            data = self.test[task]
            inputs = jax.tree.map(lambda leaf: leaf[:count], data.inputs)
            return dataclasses.replace(data, inputs=inputs, labels=data.labels[:count])

        return Split(len(self), few)


class ViewStream(Stream):
    """Tasks that see the same images, which all share, in different ways.

    Each subclass says what task i sees, `view(i)`.
    """

    def view(self, task: int) -> jax.Array:
        """Task `task`'s gather index over the pixels, as TaskData takes it."""
        raise NotImplementedError(f"{type(self).__name__} must say what task {task} sees")

    def together(self, tasks: Integers) -> TaskData:
        """The training data of several tasks, as `train_tasks` takes it: one copy of the images."""
        views = jnp.stack([self.view(i) for i in tasks])
        return dataclasses.replace(self.dataset.train, view=views)

    def _data_of(self, split, task):
        return dataclasses.replace(split, view=self.view(task))


class PermutedStream(ViewStream):
    """Permuted images (paper section 4.2): each task sees the pixels in an order of its own.

    seed, independent: as `views.permutation`.
    Raises ValueError for images whose channels are normalised each by numbers of its own.
    """

    def __init__(self, dataset: Dataset, num_tasks: int, seed: int = 0, independent: bool = False):
        super().__init__(dataset, num_tasks)
        self._seed, self._independent = seed, independent
        pixel = dataset.train.transform
        if isinstance(pixel, Normalize) and any(
            isinstance(n, tuple) and len(n) > 1 for n in (pixel.mean, pixel.std)
        ):
            raise ValueError(
                "permuted pixels have no channels, and the dataset's Normalize has numbers for "
                "each: give its splits one of one mean and one std, by dataclasses.replace"
            )

    def view(self, task: int) -> jax.Array:
        return jax.device_put(
            permutation(task, self.dataset.num_pixels, self._seed, self._independent)
        )


class RotatedStream(ViewStream):
    """Rotated images (paper section 4.2): task i sees them turned by i times `degrees`.

    Raises ValueError for images that are not [H, W], or tasks that come round to the first again.
    """

    def __init__(self, dataset: Dataset, num_tasks: int = 36, degrees: float = 10):
        super().__init__(dataset, num_tasks)
        shape = dataset.train.inputs.shape[1:]
        if len(shape) != 2:
            raise ValueError(f"rotation needs images [N, H, W], {dataset.name} has [N, *{shape}]")
        if not 0 < degrees * (num_tasks - 1) < 360 and num_tasks > 1:
            raise ValueError(
                f"{num_tasks} tasks of {degrees} degrees each must turn by more than 0 and less "
                "than 360, where the first comes again"
            )
        self._degrees = degrees

    def view(self, task: int) -> jax.Array:
        shape = self.dataset.train.inputs.shape[1:]
        return jax.device_put(rotation(task * self._degrees, shape))


class SplitStream(Stream):
    """Classes dealt to tasks (SplitMNIST, SplitCIFAR): each task has the images of its own.

    `classes[i]` are task i's labels in the dataset: the next `classes_per_task` of `order`, by
    default 0, 1, 2, ..., the last task has what is left; or the next `classes_per_task[i]`, such as
    (4, 3, 3). Labels stay the dataset's, or with `relabel` are 0, 1, ... within each task, in that
    order. A task of one class, a count of 1, has nothing to tell apart (relabelled, its labels are
    all 0): superfluous outputs alone give it something to learn, and to be known by.

    Tasks hold as many images as their classes have, so whatever is compiled for one is compiled
    anew for another: equal numbers would need images left out or shown twice. A TaskData is
    gathered from the dataset when asked for, in the dataset's order; no task holds another's.
    Raises TypeError or ValueError for one class that is left over, counts that do not add up to the
    classes, and classes that repeat or that the dataset lacks.
    """

    def __init__(
        self,
        dataset: Dataset,
        classes_per_task: int | Integers,
        order: Integers | None = None,
        relabel: bool = False,
    ):
        self.classes = deal_classes(classes_per_task, dataset.num_labels, order)
        for split, data in (("training", dataset.train), ("test", dataset.test)):
            check_present(self.classes, data.labels, f"{dataset.name} has no {split} images")
        self._relabel = relabel
        super().__init__(dataset, len(self.classes))

    def together(self, tasks: Integers) -> TaskData:
        """The training data of several tasks, as `train_tasks` takes it: images [T, N, ...].

        Raises ValueError unless they hold equally many images.
        """
        each = [self.train[i] for i in tasks]
        sizes = [one.num_examples for one in each]
        if len(set(sizes)) > 1:
            raise ValueError(
                f"tasks learned at once must hold equally many images, got {sizes}: learn them "
                "one by one"
            )
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)

    def _data_of(self, split, task):
        # Picked on the host, where an index of any length costs no compilation; JAX keeps its copy.
        own, labels = examples_of(self.classes[task], np.asarray(split.labels), self._relabel)
        inputs = jax.tree.map(lambda leaf: np.asarray(leaf)[own], split.inputs)
        return dataclasses.replace(split, inputs=inputs, labels=labels)


def deal_classes(
    classes_per_task: int | Integers, num_labels: int, order: Integers | None
) -> list[tuple[int, ...]]:
    """Each task's classes, as `SplitStream` says and refuses."""
    dealt = np.asarray(range(num_labels) if order is None else order)
    if dealt.ndim != 1 or (dealt.size and not np.issubdtype(dealt.dtype, np.integer)):
        raise TypeError(f"order must be a sequence of labels, got {dealt.tolist()!r}")
    if len(set(dealt.tolist())) != len(dealt):
        raise ValueError(f"order must name each class once, got {dealt.tolist()}")
    ends = np.cumsum(_counts(classes_per_task, len(dealt)))
    return [tuple(part.tolist()) for part in np.split(dealt, ends[:-1])]


def _counts(wanted, total):
    """How many of `total` classes each task has."""
    if total == 0:
        raise ValueError("order must name at least one class, got none")
    if isinstance(wanted, Sequence | np.ndarray) and not isinstance(wanted, str):
        for i, count in enumerate(wanted):
            check_int(f"classes_per_task[{i}]", count, 1)
        counts = [int(count) for count in wanted]
        if sum(counts) != total:
            raise ValueError(
                f"classes_per_task must add up to the {total} classes, got {counts}: change the "
                "counts, or pass an order of as many"
            )
        return counts
    check_int("classes_per_task", wanted, 2)
    wanted = int(wanted)
    whole, left = divmod(total, wanted)
    if left == 1:
        counts = (wanted + 1,) + (whole - 1) * (wanted,) if whole else (1,)
        raise ValueError(
            f"{total} classes in tasks of {wanted} leave one class, with nothing to tell apart, to "
            f"the last task; pass the counts, such as classes_per_task={counts}"
        )
    return [wanted] * whole + [left] * (left > 0)


def check_present(
    classes: list[tuple[int, ...]], labels: jax.Array | np.ndarray, absent: str
) -> None:
    """Raises ValueError, `absent` with the class, unless every class is among the labels."""
    if missing := sorted({label for task in classes for label in task} - set(np.unique(labels))):
        raise ValueError(f"{absent} of class {missing[0]}")


def examples_of(
    classes: tuple[int, ...], labels: np.ndarray, relabel: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Which of labels [N] are a task's, [n] in their order, and its labels [n] of those."""
    own = np.flatnonzero(np.isin(labels, classes))
    mine = labels[own]
    if relabel:
        mine = np.argmax(mine[:, None] == np.asarray(classes), axis=1).astype(labels.dtype)
    return own, mine


def one_pass(data: TaskData, batch_size: int, key: jax.Array | None = None) -> PyTree:
    """Network inputs [S, batch_size, ...] that show every example of `data` once, for `recover`.

    key: draws their order; None keeps the data's. S = ceil(N / batch_size): what the last batch
    lacks is filled from the front of the order.
    Raises ValueError for a batch_size that is not a positive int.
    """
    check_int("batch_size", batch_size, 1)
    data.check()
    return _one_pass(data, key, batch_size=batch_size)


@functools.partial(jax.jit, static_argnames="batch_size")
def _one_pass(data, key, *, batch_size):
    order = jnp.arange(data.num_examples)
    if key is not None:
        order = jax.random.permutation(prng.purpose_key(key, "one_pass"), order)
    index = jnp.resize(order, (-(-data.num_examples // batch_size), batch_size))
    x, _ = data.batch(index.reshape(-1))
    return jax.tree.map(lambda leaf: leaf.reshape(*index.shape, *leaf.shape[1:]), x)
