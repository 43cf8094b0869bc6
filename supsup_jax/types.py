"""Records and errors that cross module borders, and the axis letters that every docstring uses.

T  tasks learned            K  capacity of a store (K >= T)      B  batch
C  outputs of the network   n  maskable weights                  N  examples of a dataset
"""

import dataclasses
import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
Objective = Callable[[jax.Array], jax.Array]  # logits [..., C] -> [...], lower is more certain


class StoreError(ValueError):
    """A store that cannot be used as asked; the message says what to do."""


class CapacityError(StoreError, MemoryError):
    """A store larger than memory."""


class TaskIdError(StoreError, IndexError):
    """No task of that number."""


class Task(NamedTuple):
    """What one task adds to the fixed network.

    mask: pytree like the network's params, None where a leaf is not masked; bool, or any
      dtype that holds only 0 and 1.
    state: the task's own normalisation statistics, like the network's state; None for a
      network without state.
    """

    mask: PyTree
    state: PyTree = None


class TaskBelief(NamedTuple):
    """Which task an input belongs to.

    task: int32 [B], or [] for one decision of the whole batch; the argmax of scores.
    scores: float32 [B, K] or [K]; higher is better, -inf where the store holds no task.
    """

    task: jax.Array
    scores: jax.Array


class TrainResult(NamedTuple):
    """A learned task.

    task: the Task to append to a store.
    scores: real-valued scores behind the mask, pytree like the mask.
    loss: float32 [steps], mean cross-entropy in nats of each step's batch, before its update.
    """

    task: Task
    scores: PyTree
    loss: jax.Array


def unit_range(images: jax.Array) -> jax.Array:
    """Bytes to float32 in [0, 1]; floats pass unchanged."""
    if jnp.issubdtype(images.dtype, jnp.integer):
        return images.astype(jnp.float32) / 255
    return images


@dataclasses.dataclass(frozen=True)
class Normalize:
    """Pixels to (pixels / scale - mean) / std, as float32; equal by value, so it never retraces.

    mean, std: one number, or a tuple with one for each channel of images [..., channels].
    """

    mean: float | tuple[float, ...]
    std: float | tuple[float, ...]
    scale: float = 255.0

    def __call__(self, images: jax.Array) -> jax.Array:
        def broad(numbers):  # to the rank of the images, which NumPy would do unasked
            numbers = jnp.asarray(numbers, jnp.float32)
            return numbers.reshape((1,) * (images.ndim - numbers.ndim) + numbers.shape)

        return (images.astype(jnp.float32) / self.scale - broad(self.mean)) / broad(self.std)

    @property
    def black(self) -> jax.Array:
        """What a pixel of 0 becomes: float32 [], or [channels]."""
        return -jnp.asarray(self.mean, jnp.float32) / jnp.asarray(self.std, jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TaskData:
    """A task's labelled images, kept on the device as they are stored and read inside jit.

    images: [N, ...], uint8 (floats are taken as normalised already).
    labels: integer [N].
    view: integer gather index over an image's pixels (of any shape, which becomes the image's
      shape), -1 reads black: a permutation and a rotation are the same thing. Tasks that
      differ in their view only share one copy of the images.
    transform: images [B, ...] of `images.dtype` -> float network input, traced inside jit;
      must hash by value (a frozen dataclass or a module-level function).

    Raises TypeError on construction for the wrong type or dtype.
    """

    images: jax.Array
    labels: jax.Array
    view: jax.Array | None = None
    transform: Callable[[jax.Array], jax.Array] = dataclasses.field(
        default=unit_range, metadata={"static": True}
    )

    def __post_init__(self):
        # Transformations rebuild the record around placeholders of their own, which have no dtype;
        # lengths are checked by `check`, since a vmapped record carries an extra axis.
        for name in ("images", "labels", "view"):
            field = getattr(self, name)
            if isinstance(field, list | tuple | str):
                raise TypeError(f"{name} must be an array, got a {type(field).__name__}")
            if isinstance(field, np.ndarray):  # to the device now, not again at each call
                object.__setattr__(self, name, jnp.asarray(field))
        for name in ("labels", "view"):
            dtype = getattr(getattr(self, name), "dtype", None)
            if dtype is not None and not jnp.issubdtype(dtype, jnp.integer):
                raise TypeError(f"{name} must hold integers, got dtype {dtype}")
        if not isinstance(self.transform, Hashable):
            raise TypeError(f"transform must hash by value, got {self.transform!r}")

    @property
    def num_examples(self) -> int:
        return self.images.shape[0]

    def check(self) -> None:
        """Raises ValueError unless lengths agree and the view, if concrete, is in range."""
        if self.images.ndim < 2 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                "images must be [N, ...] and labels [N], got "
                f"{self.images.shape} and {self.labels.shape}"
            )
        if not self.num_examples:
            raise ValueError("a task needs at least one example, got 0")
        if self.view is not None and not isinstance(self.view, jax.core.Tracer):
            num_pixels = math.prod(self.images.shape[1:])
            low, high = _host_range(self.view)
            if low < -1 or high >= num_pixels:
                raise ValueError(
                    f"view must index {num_pixels} pixels (-1 reads black), got {low} to {high}"
                )

    def check_labels(self, num_outputs: int) -> None:
        """Raises ValueError unless the labels, if concrete, are among the network's outputs."""
        if not isinstance(self.labels, jax.core.Tracer):
            low, high = _host_range(self.labels)
            if low < 0 or high >= num_outputs:
                raise ValueError(
                    f"labels must lie in [0, {num_outputs}), the network's outputs, "
                    f"got {low} to {high}"
                )

    def batch(self, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Network input and labels of the examples `index` [B]; call it inside jit."""
        images = self.images[index]
        if self.view is not None:
            pixels = images.reshape(images.shape[0], -1)
            seen = pixels[:, self.view.reshape(-1)]
            seen = jnp.where((self.view.reshape(-1) >= 0)[None], seen, 0)
            images = seen.reshape(images.shape[0], *self.view.shape)
        return self.transform(images), self.labels[index]


def _host_range(array: jax.Array) -> tuple[int, int]:
    # In NumPy: under the caller's jit, jnp would trace even what is concrete.
    values = np.asarray(array)
    return int(values.min()), int(values.max())
