"""How a task lies in its record: mask, statistics and scores as bytes, and what people call it."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from supsup_jax.checks import check_int
from supsup_jax.layout import Layout, dense_widths
from supsup_jax.stores import arrays, codecs
from supsup_jax.stores.base import as_index
from supsup_jax.stores.codecs import Leaves
from supsup_jax.stores.origin import arrays_in, as_bytes, sensible
from supsup_jax.stores.records import Record
from supsup_jax.types import PyTree, StoreError

WORDS = "words"  # the packed masks of a MaskStore as they are: nothing to decode
CODECS = (WORDS, *codecs.CODECS)

Moments = Mapping[str, tuple[float, float]]  # mean and deviation by an objective's name


class TaskInfo(NamedTuple):
    """What a DiskStore says of a task, beside its mask and statistics.

    name, labels: as they were given to `append`, None where they were not.
    codec: one of CODECS. base: the earlier task that the mask is coded against, or None.
    kept: how many weights the mask keeps, by leaf.
    mask_bytes, state_bytes, score_bytes: on disk, of the coded mask, of the statistics, and of the
      scores, 0 where they were not kept.
    num_labels: how many of the outputs are its labels, None where that was not told.
    moments: by objectives' names the mean and deviation of its scores, as far as measured.
    """

    name: str | None
    labels: tuple[str, ...] | None
    codec: str
    base: int | None
    kept: dict[str, int]
    mask_bytes: int
    state_bytes: int
    score_bytes: int
    num_labels: int | None = None
    moments: Moments = MappingProxyType({})


class Coded(NamedTuple):
    """Task i as it lies in its record, mask, statistics and scores apart."""

    i: int
    metadata: dict[str, Any]
    codec: str
    base: int | None
    mask: memoryview
    state: memoryview
    scores: memoryview
    num_labels: int | None
    moments: Moments


class Form:
    """Of all tasks of a store.

    states: (dtype, shape) of each leaf of the statistics. path: the store's, for messages.
    leaves_of: the mask, by id, of a task that others are coded against.
    """

    def __init__(
        self,
        layout: Layout,
        states: list[tuple[np.dtype, tuple[int, ...]]],
        path: Path,
        leaves_of: Callable[[int], Leaves],
    ):
        self.layout, self.states, self.path, self.leaves_of = layout, states, path, leaves_of
        self.state_bytes = sum(dtype.itemsize * math.prod(shape) for dtype, shape in states)

    def record(
        self,
        i: int,
        task: tuple[Leaves, PyTree],
        scores: PyTree,
        name: str | None,
        labels: Sequence[str] | None,
        codec: str,
        base: int | None,
        num_labels: int | None,
        moments: Moments | None,
    ) -> tuple[dict[str, Any], list[Any]]:
        """Metadata and body of a task, of `checked_task`, that becomes task i.

        The rest, and what is raised, as of `DiskStore.append`.
        """
        leaves, state = task
        scores = [] if scores is None else _checked_scores(self.layout, scores)
        check_names(name, labels)
        if num_labels is not None:
            check_int("num_labels", num_labels, 1)
        self._check_labels(list(labels or ()), num_labels or 0)
        leaves = [np.asarray(leaf).astype(bool, copy=False) for leaf in leaves]
        base = None if base is None else as_index(base)
        codec, mask = self._encoded(leaves, codec, base)
        if base is not None and base >= i:
            raise ValueError(f"base must be a task before {i}, got {base}")
        metadata = {
            "name": name,
            "labels": None if labels is None else list(labels),
            "codec": codec,
            "base": base,
            "kept": [int(np.count_nonzero(leaf)) for leaf in leaves],
            "mask_bytes": len(mask),
            "score_bytes": sum(leaf.nbytes for leaf in scores),
        }
        if num_labels is not None:
            metadata["num_labels"] = int(num_labels)
        if moments:
            if not isinstance(moments, Mapping):
                raise TypeError(f"moments must be a dict, got {type(moments).__name__}")
            # Of arrays their numbers; what is none is refused as it came.
            pairs = {name: np.asarray(pair).tolist() for name, pair in moments.items()}
            metadata["moments"] = moments_in({"moments": pairs})
        return metadata, [mask, *map(as_bytes, [*jax.tree.leaves(state), *scores])]

    def alone(self, coded: Coded) -> tuple[dict[str, Any], list[Any]]:
        """As of `record`, the mask coded against no other."""
        metadata, mask = coded.metadata, coded.mask
        if coded.base is not None:
            codec, mask = self._encoded(self.leaves(coded), codecs.AUTO, None)
            metadata = metadata | {"codec": codec, "base": None, "mask_bytes": len(mask)}
        return metadata, [mask, coded.state, coded.scores]

    def read(self, record: Record, i: int) -> Coded:
        """Task i as a record holds it, once that is seen to fit the network."""
        with sensible(self.path):
            fields = ("codec", "base", "mask_bytes", "score_bytes")
            codec, base, size, scored = (record.metadata[name] for name in fields)
            if codec not in CODECS or (codec == codecs.DELTA) != (base is not None):
                raise ValueError(f"task {i} in codec {codec!r} with base {base!r}")
            if base is not None and not (type(base) is int and 0 <= base < i):
                raise ValueError(f"the base {base!r}, no task before {i}")
            if (count := record.metadata.get("num_labels")) is not None and not (
                type(count) is int and 0 < count < 2**31
            ):
                raise ValueError(f"task {i} of {count!r} labels")
            moments = moments_in(record.metadata)
            if type(scored) is not int or scored not in (0, 4 * self.layout.num_weights):
                raise ValueError(f"task {i} with scores of {scored!r} bytes")
            if type(size) is not int or size != len(record.body) - self.state_bytes - scored:
                raise ValueError(
                    f"task {i} with a mask of {size!r} bytes in {len(record.body):,}, of which "
                    f"{self.state_bytes:,} are statistics and {scored:,} scores"
                )
            if codec == WORDS and size != 4 * self.layout.num_words:
                raise ValueError(f"task {i} in {size:,} bytes, not {self.layout.num_words} words")
        end = size + self.state_bytes
        parts = record.body[:size], record.body[size:end], record.body[end:]
        return Coded(i, record.metadata, codec, base, *parts, count, moments)

    def taken(
        self,
        record: Record,
        manifest: dict[str, Any],
        path: str | os.PathLike,
        own: dict[str, Any],
        name: str | None,
    ) -> Record:
        """The record in the file `path` of a task, under its manifest, once that is seen to fit.

        own: the manifest of the store that shall have it, by this name where one is told. Raises
        StoreError for a task of another network, and for one that makes no sense.
        """
        for field in ("layout", "states", "fingerprint"):
            if manifest[field] != own[field]:
                raise StoreError(
                    f"{path} holds a task of another network: its {field} is {manifest[field]}, "
                    f"that of {self.path} is {own[field]}"
                )
        file = Form(self.layout, self.states, Path(path), self.leaves_of)  # which errors name
        coded = file.read(record, 0)
        file.words(coded)  # against no other, being the first of its file
        file.info(coded)
        if name is None:
            return record
        check_names(name, None)
        return record._replace(metadata=record.metadata | {"name": name})

    def shared(
        self, ids: Sequence[int], metadata: Sequence[dict[str, Any]]
    ) -> tuple[list[int], list[str]]:
        """What tasks that are loaded together tell: their num_labels, none where they do not, and
        the names of their moments.
        """
        counts = [each.get("num_labels") for each in metadata]
        for i, count in zip(ids, counts, strict=True):
            check_told(counts[0] is not None, i, count)
        with sensible(self.path):
            names = sorted({name for each in metadata for name in moments_in(each)})
        return [count for count in counts if count is not None], names

    def info(self, coded: Coded) -> TaskInfo:
        """What its metadata say."""
        with sensible(self.path):
            name, labels, kept = (coded.metadata[name] for name in ("name", "labels", "kept"))
            check_names(name, labels)
            return TaskInfo(
                name,
                None if labels is None else tuple(labels),
                coded.codec,
                coded.base,
                dict(zip(self.layout.shapes, map(int, kept), strict=True)),
                len(coded.mask),
                len(coded.state),
                len(coded.scores),
                coded.num_labels,
                coded.moments,
            )

    def state(self, coded: Coded) -> list[np.ndarray]:
        """The leaves of the statistics."""
        return arrays_in(coded.state, self.states, self.path)

    def scores(self, coded: Coded) -> list[np.ndarray]:
        """The leaves of the scores, none where none were kept."""
        shapes = self.layout.shapes.values() if coded.scores else ()
        return arrays_in(coded.scores, [("<f4", shape) for shape in shapes], self.path)

    def words(self, coded: Coded) -> np.ndarray:
        """The mask packed, uint32 [nw]."""
        if coded.codec == WORDS:
            return np.frombuffer(coded.mask, "<u4")
        return np.asarray(arrays.pack_leaves(self.leaves(coded), self.layout))

    def leaves(self, coded: Coded) -> Leaves:
        """The mask of a task, bool leaves in the layout's order."""
        if coded.codec == WORDS:
            planes = np.frombuffer(coded.mask, "u1").reshape(-1, 4)
            bits = np.unpackbits(planes, axis=1, bitorder="little").T.reshape(-1).view(bool)
            return jax.tree.leaves(self.layout.unravel(bits))
        against = None if coded.base is None else self.leaves_of(coded.base)
        try:
            return codecs.decode_leaves(coded.mask, self.layout, against)
        except StoreError as error:
            raise StoreError(f"{self.path}: the mask of task {coded.i}: {error}") from error

    def _check_labels(self, labels, num_labels):
        if twice := [name for name in dict.fromkeys(labels) if name and labels.count(name) > 1]:
            raise ValueError(f"labels must differ, got {twice[0]!r} more than once")
        widths = dense_widths(self.layout.named_shapes)
        # Of other networks it shows when they are asked.
        if widths and max(len(labels), num_labels) > widths[-1]:
            raise ValueError(
                f"labels must be at most {widths[-1]}, the network's outputs, got "
                f"{max(len(labels), num_labels)}"
            )

    def _encoded(self, leaves, codec, base):
        """The codec of a mask, chosen where it is "auto", and the mask in it."""
        codecs.check_codec(codec, base, CODECS)
        if base is not None:
            return codec, codecs.encode_leaves(self.layout, leaves, codec, self.leaves_of(base))
        most = 0.9 * 4 * self.layout.num_words
        bound = sum(codecs.bound_of(leaf.size, int(np.count_nonzero(leaf))) for leaf in leaves)
        if codec == codecs.AUTO and bound < most:  # else no codec can save a tenth
            coded = codecs.encode_leaves(self.layout, leaves, "enumerative")
            if len(coded) < most:
                return "enumerative", coded
        if codec in (codecs.AUTO, WORDS):
            return WORDS, as_bytes(arrays.pack_leaves(leaves, self.layout))
        return codec, codecs.encode_leaves(self.layout, leaves, codec)


def check_told(labelled: bool, i: int, num_labels: int | None) -> None:
    """Raises StoreError unless task i tells its num_labels as those do that it is loaded with."""
    if (num_labels is not None) != labelled:
        raise StoreError(
            f"num_labels must be told of all tasks that are loaded or of none, and task {i} "
            f"{'lacks' if labelled else 'has'} it: load others, or replace it"
        )


def check_names(name: str | None, labels: Sequence[str] | None) -> None:
    """Raises TypeError for what are no names of a task and its outputs."""
    if not (name is None or isinstance(name, str)):
        raise TypeError(f"name must be a str, got {name!r}")
    if isinstance(labels, str) or not all(isinstance(label, str) for label in labels or ()):
        raise TypeError(f"labels must be a list of str, got {labels!r}")


def moments_in(metadata: Mapping[str, Any]) -> Moments:
    """The moments in a task's metadata. Raises ValueError for what is none, as of a forged file."""
    moments = metadata.get("moments", {})
    if not isinstance(moments, dict):
        raise ValueError(f"moments {moments!r}, which are no dict")
    for name, pair in moments.items():
        numbers = isinstance(pair, list) and all(type(each) in (int, float) for each in pair)
        if not (isinstance(name, str) and numbers and len(pair) == 2 and _are_moments(*pair)):
            raise ValueError(
                "moments must be a finite mean and a positive deviation, in float32, by an "
                f"objective's name, got {pair!r} of {name!r}"
            )
    return moments


def _are_moments(mean, deviation):
    with np.errstate(over="ignore"):
        mean, deviation = np.float32(float(mean)), np.float32(float(deviation))
    return abs(mean) < math.inf and 0 < deviation < math.inf


def _checked_scores(layout, scores):
    leaves = [np.asarray(leaf) for leaf in layout.leaves(scores, "scores")]
    for name, leaf in zip(layout.shapes, leaves, strict=True):
        if leaf.dtype != np.float32:
            raise TypeError(f"scores must be float32, got {leaf.dtype} at {name!r}")
        if not np.isfinite(leaf).all():
            raise ValueError(f"scores must be finite, got NaN or infinity at {name!r}")
    return leaves
