"""Records and errors that cross module borders, and the axis letters that every docstring uses.

T  tasks learned            K  capacity of a store (K >= T)      B  batch
C  outputs of the network   n  maskable weights                  N  examples of a dataset
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

PyTree = Any
Integers = Sequence[int] | np.ndarray  # ids, labels, counts
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


class Facts(NamedTuple):
    """What a store keeps of a task beside its mask, where that is more than its state.

    num_labels: int32 [], how many of the outputs are its labels; None where tasks do not tell.
    moments: by an objective's name, float32 [2]: mean and deviation of the task's own scores by it
      (`measure_statistics`), zeros where they were not measured; None where none are kept.
    """

    state: PyTree
    num_labels: Any = None
    moments: dict[str, Any] | None = None


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
    loss: float32 [steps], the mean loss of each step's batch, before its update.
    """

    task: Task
    scores: PyTree
    loss: jax.Array


def unit_range(inputs: PyTree) -> PyTree:
    """Bytes to float32 in [0, 1]; floats and bools pass unchanged. The default transform.

    Raises TypeError for other integers, whose range nobody can know: tokens, or pixels of 16 bits.
    """

    for leaf in jax.tree.leaves(inputs):
        if leaf.dtype != jnp.uint8 and jnp.issubdtype(leaf.dtype, jnp.integer):
            raise TypeError(
                f"inputs of dtype {leaf.dtype} need a rule: transform=None where the network takes "
                "them as they are, such as tokens, Normalize(mean, std, scale) for pixels, or a "
                "function of your own"
            )
    return bytes_scaled(inputs)


def bytes_scaled(inputs: PyTree) -> PyTree:
    """Bytes to float32 in [0, 1]; all others pass, integers as the tokens that they are.

    The transform of batches that come without one (`as_data`).
    """

    def scaled(leaf):
        return leaf.astype(jnp.float32) / 255 if leaf.dtype == jnp.uint8 else leaf

    return jax.tree.map(scaled, inputs)


@dataclasses.dataclass(frozen=True)
class Normalize:
    """Pixels to (pixels / scale - mean) / std, as float32; equal by value, so it never retraces.

    mean, std: one number, or a tuple with one for each channel of images [..., channels].
    scale: what white is. None: 255 of bytes, 1 of floats; other integers need one.
    """

    mean: float | tuple[float, ...]
    std: float | tuple[float, ...]
    scale: float | None = None

    def __post_init__(self):
        for name in ("mean", "std"):  # of a list or array, which does not hash
            if not isinstance(value := getattr(self, name), float | int | tuple | Tracer):
                object.__setattr__(self, name, _numbers(value))

    def __call__(self, images: jax.Array) -> jax.Array:
        def broad(numbers):  # to the rank of the images, which NumPy would do unasked
            numbers = jnp.asarray(numbers, jnp.float32)
            return numbers.reshape((1,) * (images.ndim - numbers.ndim) + numbers.shape)

        if not hasattr(images, "dtype"):
            raise TypeError(f"Normalize is of one array of images, got {shapes_of(images)}")
        known = images.dtype == jnp.uint8 or jnp.issubdtype(images.dtype, jnp.floating)
        if self.scale is None and not known:
            raise TypeError(f"Normalize needs scale= for pixels of {images.dtype}: their white")
        scale = self.scale or (255 if images.dtype == jnp.uint8 else 1)
        return (images.astype(jnp.float32) / scale - broad(self.mean)) / broad(self.std)

    @property
    def black(self) -> jax.Array:
        """What a pixel of 0 becomes: float32 [], or [channels]."""
        return -jnp.asarray(self.mean, jnp.float32) / jnp.asarray(self.std, jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TaskData:
    """A task's labelled examples, kept on the device as they are stored and read inside jit.

    inputs: [N, ...], bytes, floats or tokens, or a pytree of such arrays. Whatever NumPy takes for
      an array, such as a torch tensor, is taken.
    labels: [N], integers, or [N, ...] as the loss takes them.
    view: integer gather index over an image's pixels (of any shape, which becomes the image's
      shape), -1 reads black: a permutation and a rotation are the same thing. Tasks that
      differ in their view only share one copy of the images.
    transform: inputs [B, ...] as stored -> what the network takes, traced inside jit; must hash by
      value (a frozen dataclass or a module-level function). None: they pass as they are.

    Raises TypeError on construction for the wrong type or dtype, and ValueError for integers that
    do not fit into 32 bits where JAX has no more.
    """

    inputs: PyTree
    labels: Any  # any array's; once constructed, jax.Arrays
    view: Any = None
    transform: Callable[[PyTree], PyTree] | None = dataclasses.field(
        default=unit_range, metadata={"static": True}
    )

    def __post_init__(self):
        # Transformations rebuild the record around placeholders of their own, which have no dtype;
        # lengths are checked by `check`, since a vmapped record carries an extra axis.
        for name in ("inputs", "labels", "view"):
            field = getattr(self, name)
            several = isinstance(field, list | tuple | str | Mapping)
            if several and (name != "inputs" or not _holds_arrays(field)):
                inside = " that holds more than arrays" if isinstance(field, Mapping) else ""
                raise TypeError(f"{name} must be an array, got a {type(field).__name__}{inside}")
            put = jax.tree.map(functools.partial(_on_device, name), field)
            object.__setattr__(self, name, put)
        dtype = getattr(self.view, "dtype", None)
        if dtype is not None and not jnp.issubdtype(dtype, jnp.integer):
            raise TypeError(f"view must hold integers, got dtype {dtype}")
        # JAX counts what is indexed by fewer bits in them, too.
        if isinstance(self.view, jax.Array) and self.view.dtype.itemsize < 4:
            object.__setattr__(self, "view", self.view.astype(jnp.int32))
        if not isinstance(self.transform, Hashable):
            raise TypeError(f"transform must hash by value, got {self.transform!r}")

    @property
    def num_examples(self) -> int:
        """N."""
        return num_rows(self.inputs)

    def check(self) -> None:
        """Raises ValueError unless lengths agree and the view, if concrete, is in range."""
        inputs, bare = jax.tree.leaves(self.inputs), isinstance(self.inputs, jax.Array)
        shapes = [jnp.shape(leaf) for leaf in (*inputs, self.labels)]
        if not (inputs and all(shapes) and len({shape[0] for shape in shapes}) == 1) or (
            bare and self.inputs.ndim < 2
        ):
            raise ValueError(
                "inputs must be [N, ...] and labels [N] or [N, ...], got "
                f"{shapes_of(self.inputs)} and {jnp.shape(self.labels)}"
            )
        if self.transform is None and any(leaf.dtype in (jnp.uint8, jnp.int8) for leaf in inputs):
            raise TypeError(
                "bytes want a transform, and transform=None passes them as they are: cast tokens "
                "to int32, or leave the default, which scales pixels to [0, 1]"
            )
        if not self.num_examples:
            raise ValueError("a task needs at least one example, got 0")
        if self.view is None:
            return
        if not bare:
            raise ValueError(
                f"a view is of the pixels of one array of images, got {shapes_of(self.inputs)}"
            )
        if not isinstance(self.view, Tracer):
            num_pixels = math.prod(self.inputs.shape[1:])
            if not num_pixels * self.view.size:
                raise ValueError(f"view must be of pixels, got shape {self.view.shape}")
            low, high = _host_range(self.view)
            if low < -1 or high >= num_pixels:
                raise ValueError(
                    f"view must index {num_pixels} pixels (-1 reads black), got {low} to {high}"
                )

    def check_classes(self, num_outputs: int, where: str = "") -> None:
        """Raises TypeError or ValueError unless the labels are classes: integers [N], if concrete
        among the network's outputs.
        """
        where = where and f" in {where}"
        if self.labels.ndim != 1 or not jnp.issubdtype(self.labels.dtype, jnp.integer):
            raise TypeError(
                f"labels must hold integers [N], a class each, got {self.labels.dtype} "
                f"{self.labels.shape}{where}: pass a loss (TrainConfig) or metric (evaluate) that "
                "takes them"
            )
        if not isinstance(self.labels, Tracer):
            low, high = _host_range(self.labels)
            if low < 0 or high >= num_outputs:
                raise ValueError(
                    f"labels must lie in [0, {num_outputs}), the network's outputs, "
                    f"got {low} to {high}{where}"
                )

    def batch(self, index: jax.Array) -> tuple[PyTree, jax.Array]:
        """Network input and labels of the examples `index` [B]; call it inside jit."""
        inputs = jax.tree.map(lambda leaf: leaf[index], self.inputs)
        if self.view is not None:
            pixels = inputs.reshape(inputs.shape[0], -1)
            seen = pixels[:, self.view.reshape(-1)]
            seen = jnp.where((self.view.reshape(-1) >= 0)[None], seen, 0)
            inputs = seen.reshape(inputs.shape[0], *self.view.shape)
        x = inputs if self.transform is None else self.transform(inputs)
        return x, self.labels[index]


# What people call the labels of a batch that is a dict.
_LABELS = "labels", "label", "targets", "target", "y"


def as_data(batch: Any, what: str) -> TaskData:
    """A batch as a TaskData: one as it is, a pair (inputs, labels), or a dict with labels in it.

    A dict, such as datasets of Hugging Face or TFDS give, has one entry of `_LABELS`; the others
    are the inputs, as a dict where they are several. Bytes are scaled to [0, 1], tokens pass.
    Raises TypeError for what is none of these.
    """
    if isinstance(batch, TaskData):
        return batch
    arrays = all(hasattr(leaf, "__array__") for leaf in jax.tree.leaves(batch))
    if isinstance(batch, tuple | list) and len(batch) == 2 and arrays:
        return TaskData(*batch, transform=bytes_scaled)
    if (
        isinstance(batch, Mapping)
        and len(names := [name for name in _LABELS if name in batch]) == 1
    ):
        inputs = {name: value for name, value in batch.items() if name != names[0]}
        inputs = next(iter(inputs.values())) if len(inputs) == 1 else inputs
        return TaskData(inputs, batch[names[0]], transform=bytes_scaled)
    got = f"a dict of {list(batch)}" if isinstance(batch, Mapping) else type(batch).__name__
    raise TypeError(
        f"{what} must be a TaskData, a pair (inputs, labels), or a dict with one of {_LABELS}, "
        f"got {got}"
    )


def num_rows(tree: PyTree) -> int:
    """The length of the leading axis that all leaves share."""
    return jax.tree.leaves(tree)[0].shape[0]


def is_open(length: Any) -> bool:
    """Whether a length is one that an export leaves open, a `jax.export.symbolic_shape`'s."""
    return not isinstance(length, int)


def shapes_of(tree: PyTree) -> PyTree:
    """The shapes of the arrays in a tree, for messages."""
    shapes = jax.tree.map(lambda leaf: tuple(getattr(leaf, "shape", ())), tree)
    return shapes if jax.tree.leaves(tree) else "no array"


def kinds_of(tree: PyTree) -> str:
    """dtype and [B, ...] of each array in a tree of batches, for messages."""

    if not all(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(tree)):
        return f"of {type(tree).__name__}, no array"

    def kind(leaf):
        return f"{leaf.dtype} [{', '.join(map(str, ('B', *leaf.shape[1:])))}]"

    return kind(tree) if hasattr(tree, "dtype") else str(jax.tree.map(kind, tree)).replace("'", "")


def _numbers(value):
    """A number, or a tuple of numbers, of what NumPy takes for such."""
    array = np.asarray(value, float)
    return tuple(array.tolist()) if array.ndim else float(array)


def _holds_arrays(field):
    return not any(isinstance(leaf, str | int | float) for leaf in jax.tree.leaves(field))


def _on_device(name, leaf):
    """An array to the device now, not again at each call; placeholders as they are."""
    if isinstance(leaf, jax.Array) or not hasattr(leaf, "__array__"):
        return leaf
    array = np.asarray(leaf)
    if not (
        np.issubdtype(array.dtype, np.number) or array.dtype == bool or array.dtype.kind == "V"
    ):
        raise TypeError(f"{name} must hold numbers, got dtype {array.dtype}")
    put = jax.device_put(array)
    if put.dtype != array.dtype and array.size and jnp.issubdtype(put.dtype, jnp.integer):
        info, (low, high) = jnp.iinfo(put.dtype), _host_range(array)
        if low < info.min or high > info.max:
            raise ValueError(f"{name} must fit into {put.dtype}, got {low} to {high}")
    return put


def _host_range(array: jax.Array | np.ndarray) -> tuple[int, int]:
    # In NumPy: under the caller's jit, jnp would trace even what is concrete.
    values = np.asarray(array)
    return int(values.min()), int(values.max())
