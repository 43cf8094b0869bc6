"""Tasks on disk, appended one by one and loaded by the slice: a store that outlives its process."""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from supsup_jax.checks import check_int
from supsup_jax.layout import Layout
from supsup_jax.network import Network
from supsup_jax.stores import arrays, codecs, journal, records, sharded
from supsup_jax.stores.base import as_index, checked_task
from supsup_jax.stores.journal import MANIFEST, Problem, TaskLog
from supsup_jax.stores.mask_store import MaskStore
from supsup_jax.stores.origin import (
    Origin,
    arrays_in,
    as_bytes,
    manifest_of,
    read_manifest,
    sensible,
)
from supsup_jax.stores.records import Record
from supsup_jax.stores.sharded import ShardedStore
from supsup_jax.types import PyTree, StoreError, Task

FORMAT = "supsup_jax.DiskStore"
WORDS = "words"  # the packed masks of a MaskStore as they are: nothing to decode
CODECS = (WORDS, *codecs.CODECS)
MODES = ("r", "a", "x")
RESERVOIR = "reservoir.bin"


class TaskInfo(NamedTuple):
    """What a DiskStore says of a task, beside its mask and statistics.

    name, labels: as they were given to `append`, None where they were not.
    codec: one of CODECS. base: the earlier task that the mask is coded against, or None.
    kept: how many weights the mask keeps, by leaf.
    mask_bytes, state_bytes: on disk, of the coded mask and of the statistics.
    """

    name: str | None
    labels: tuple[str, ...] | None
    codec: str
    base: int | None
    kept: dict[str, int]
    mask_bytes: int
    state_bytes: int


class DiskStore:
    """The tasks of one network in a folder, in the format of `docs/format.md`.

    A task is there once `append` has returned, whatever happens to the process or the power, and
    costs its own bytes only. One process may write; any number may read meanwhile, each seeing
    whole tasks only. Not a pytree: `load` gives a MaskStore for inference.

        with ss.DiskStore.open("tasks", net, mode="a") as disk:
            disk.append(result.task, name="invoices", labels=["paid", "open"])
            store = disk.load()
    """

    def __init__(self, log: TaskLog, net: Network | None):
        # Made by `open` alone, which checks that log and network belong together.
        self._log, self._net = log, net
        origin, states = read_manifest(log.manifest, FORMAT, log.path, net)
        self._layout: Layout = net.layout if net else origin.layout
        self._states = list(states.values())
        self._state_bytes = sum(dtype.itemsize * math.prod(shape) for dtype, shape in self._states)
        self._base = None, None  # the last base of an xor-delta, and its leaves

    @classmethod
    def open(
        cls,
        path: str | os.PathLike,
        net: Network | None = None,
        mode: str = "r",
        *,
        timeout: float = 0.0,
    ) -> "DiskStore":
        """The store in the folder `path`.

        net: the network whose tasks it holds. Without one, a store that is there can be looked at,
          verified and copied from, but there is nothing to make pytrees like.
        mode: "r" to read; "a" to append, to a new store where there is none; "x" to create one.
        timeout: seconds to wait while another process has the store open for appending.
        Raises FileNotFoundError where no store is (mode "r"), FileExistsError where one is (mode
        "x"), StoreError for a damaged store, one of another network or of a newer version, and
        while another writes; OSError for the rest.
        """
        if mode not in MODES:
            raise ValueError(f"mode must be one of {list(MODES)}, got {mode!r}")
        path = Path(path)
        new = mode == "x" or (mode == "a" and not (path / MANIFEST).exists())
        if not isinstance(net, Network) and (new or net is not None):
            raise TypeError(f"net must be a Network, got {type(net).__name__}")
        if new:
            manifest = manifest_of(FORMAT, Origin.of(net), net.state)
            return cls(TaskLog.create(path, manifest), net)
        read_manifest(journal.read_manifest(path), FORMAT, path, net)  # before a writer mends it
        return cls(TaskLog.open(path, writes=mode == "a", timeout=timeout), net)

    def __len__(self) -> int:
        """T, as far as this object knows: see `refresh`."""
        return len(self._log)

    @property
    def num_tasks(self) -> int:
        """T, as `len`."""
        return len(self._log)

    @property
    def path(self) -> Path:
        return self._log.path

    @property
    def manifest(self) -> dict[str, Any]:
        """Of the format's page: network, layout, statistics, versions."""
        return self._log.manifest

    def append(
        self,
        task: Task | PyTree,
        *,
        name: str | None = None,
        labels: Sequence[str] | None = None,
        codec: str = codecs.AUTO,
        base: int | None = None,
        durable: bool = True,
    ) -> int:
        """Adds a task and returns its number.

        task: a Task, or a bare mask where the network has no state.
        name, labels: what people call the task and its outputs.
        codec: one of CODECS. "auto" is "words", which loads fastest, unless another saves a tenth.
        base: for "xor-delta", the number of an earlier task to code the mask against.
        durable: return when the task is on the device, which takes the disk milliseconds. Where
          many are appended, pass False and call `flush` once: a crash before may take the last.
        Raises TypeError or ValueError for a task of another network, or what is no name; StoreError
        unless the store is open for appending; OSError where the disk is full, and then the store
        holds what it held.
        """
        leaves, state = checked_task(task, self._layout, self._network().state)
        _check_names(name, labels)
        leaves = [np.asarray(leaf).astype(bool, copy=False) for leaf in leaves]
        codec, mask = self._encoded(leaves, codec, base)
        metadata = {
            "name": name,
            "labels": None if labels is None else list(labels),
            "codec": codec,
            "base": base,
            "kept": [int(np.count_nonzero(leaf)) for leaf in leaves],
            "mask_bytes": len(mask),
        }
        body = [mask, *map(as_bytes, jax.tree.leaves(state))]
        return self._log.append(metadata, body, durable=durable)

    def extend(self, store: MaskStore, names: Sequence[str] | None = None) -> range:
        """Adds all tasks of a MaskStore, flushed to the device once, and returns their numbers.

        names: one a task. Raises as `append`.
        """
        store.check_fits(self._network())
        names = [None] * int(store.num_tasks) if names is None else names
        if len(names) != int(store.num_tasks):
            raise ValueError(f"names must be {int(store.num_tasks)}, one a task, got {len(names)}")
        first = len(self)
        for i, name in enumerate(names):
            self.append(store.task(i), name=name, durable=False)
        self.flush()
        return range(first, len(self))

    def export(self, i: int, path: str | os.PathLike) -> None:
        """Writes task i to the file `path`, which `append_file` takes into a store like this one.

        Raises as `task`, FileExistsError where something is, OSError for the rest.
        """
        if Path(path).exists():
            raise FileExistsError(f"{path} exists; name a new file")
        coded = self._read(i)
        metadata, mask = coded.metadata, coded.mask
        if coded.base is not None:  # which the other store need not hold
            mask = codecs.encode_leaves(self._layout, self._leaves(coded))
            codec = codecs.codec_of(mask)
            metadata = metadata | {"codec": codec, "base": None, "mask_bytes": len(mask)}
        records.write_alone(path, self.manifest, metadata, [mask, coded.state])

    def append_file(self, path: str | os.PathLike) -> int:
        """Adds the task in a file of `export`, and returns its number.

        Raises FileNotFoundError, StoreError where it is damaged or of another network, and as
        `append`.
        """
        manifest, record = records.read_alone(path)
        read_manifest(manifest, FORMAT, path, self._net)
        for field in ("layout", "states", "fingerprint"):
            if manifest[field] != self.manifest[field]:
                raise StoreError(
                    f"{path} holds a task of another network: its {field} is "
                    f"{manifest[field]}, that of {self.path} is {self.manifest[field]}"
                )
        self._words(self._coded_in(record, 0))  # against no other, being the first of its file
        return self._log.append(record.metadata, [record.body])

    def flush(self) -> None:
        """Returns when all tasks are on the device: for `append(durable=False)`."""
        self._log.flush()

    def info(self, i: int) -> TaskInfo:
        """What is known of task i. Raises as `task`."""
        coded = self._read(i)
        with sensible(self.path):
            name, labels, kept = (coded.metadata[name] for name in ("name", "labels", "kept"))
            _check_names(name, labels)
            return TaskInfo(
                name,
                None if labels is None else tuple(labels),
                coded.codec,
                coded.base,
                dict(zip(self._layout.shapes, map(int, kept), strict=True)),
                len(coded.mask),
                len(coded.state),
            )

    def task(self, i: int) -> Task:
        """Task i: its mask NumPy bools, None where not masked, and its statistics.

        Raises IndexError, a StoreError too, where there is none, StoreError where it is damaged.
        """
        like, coded = jax.tree.structure(self._network().state), self._read(i)
        mask = self._layout.tree(self._leaves(coded))
        return Task(mask, like.unflatten(arrays_in(coded.state, self._states, self.path)))

    def words(self, i: int) -> np.ndarray:
        """The packed mask of task i, uint32 [nw]. Raises as `task`; needs no network."""
        return self._words(self._read(i))

    def load(
        self, tasks: slice | Sequence[int] | None = None, *, mesh: Mesh | None = None
    ) -> MaskStore | ShardedStore:
        """The tasks, or those of a slice or of a list of numbers, as a MaskStore of that capacity.

        mesh: spreads them over the devices along its axis `task`, as `shard` does; each process
          reads only what its own devices hold, and all of them must make the call.
        Every checksum is compared. Raises as `task`, ValueError where no task is left, and as
        `shard` for the mesh.
        """
        net = self._network()
        ids = range(len(self))[tasks] if isinstance(tasks, slice) else tasks
        ids = range(len(self)) if ids is None else list(map(as_index, ids))
        if not len(ids):
            raise ValueError(f"{tasks} leaves none of the {len(self)} tasks to load")
        if mesh is not None:
            return sharded.of_tasks(
                net, len(ids), lambda slots: (self._fields(ids[slot]) for slot in slots), mesh
            )
        return MaskStore.of_tasks(net, len(ids), map(self._fields, ids))

    def parts(self, size: int = 1024) -> "Parts":
        """The tasks as MaskStores of `size` each, for `one_shot_streamed`: of bounded memory."""
        self._network()
        check_int("size", size, 1)
        return Parts(self, size)

    def refresh(self) -> int:
        """Takes in the tasks that were appended since, and returns T."""
        return self._log.refresh()

    def verify(self) -> list[Problem]:
        """Every byte of the folder against its checksums: what is wrong with it, or nothing."""
        problems = self._log.verify()
        try:
            records.read_alone(self.path / RESERVOIR)
        except FileNotFoundError:
            pass
        except StoreError as error:
            problems.append(Problem(RESERVOIR, str(error), loses=True))
        return problems

    def close(self) -> None:
        """Closes the files and lets others append. Later calls raise StoreError."""
        self._log.close()

    def __enter__(self) -> "DiskStore":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"DiskStore({str(self.path)!r}, {len(self):,} tasks)"

    def _network(self):
        if self._net is None:
            raise StoreError(f"{self.path} was opened without a network: pass net to open")
        return self._net

    def _encoded(self, leaves, codec, base):
        """The codec of a mask, chosen where it is "auto", and the mask in it."""
        codecs.check_codec(codec, base, CODECS)
        if base is not None:
            return codec, codecs.encode_leaves(self._layout, leaves, codec, self._leaves_of(base))
        most = 0.9 * 4 * self._layout.num_words
        bound = sum(codecs.bound_of(leaf.size, np.count_nonzero(leaf)) for leaf in leaves)
        if codec == codecs.AUTO and bound < most:  # else no codec can save a tenth
            coded = codecs.encode_leaves(self._layout, leaves, "enumerative")
            if len(coded) < most:
                return "enumerative", coded
        if codec in (codecs.AUTO, WORDS):
            return WORDS, as_bytes(arrays.pack_leaves(leaves, self._layout))
        return codec, codecs.encode_leaves(self._layout, leaves, codec)

    def _fields(self, i):
        """The words and the leaves of the statistics of task i."""
        coded = self._read(i)
        return self._words(coded), arrays_in(coded.state, self._states, self.path)

    def _read(self, i):
        return self._coded_in(self._log.read(as_index(i)), i)

    def _coded_in(self, record: Record, i: int) -> "_Coded":
        """Task i as a record holds it, once that is seen to fit this store's network."""
        with sensible(self.path):
            codec, base, size = (record.metadata[name] for name in ("codec", "base", "mask_bytes"))
            if codec not in CODECS or (codec == codecs.DELTA) != (base is not None):
                raise ValueError(f"task {i} in codec {codec!r} with base {base!r}")
            if base is not None and not (type(base) is int and 0 <= base < i):
                raise ValueError(f"the base {base!r}, no task before {i}")
            if type(size) is not int or size != len(record.body) - self._state_bytes:
                raise ValueError(
                    f"task {i} with a mask of {size!r} bytes in {len(record.body):,}, of which "
                    f"{self._state_bytes:,} are statistics"
                )
            if codec == WORDS and size != 4 * self._layout.num_words:
                raise ValueError(f"task {i} in {size:,} bytes, not {self._layout.num_words} words")
        return _Coded(i, record.metadata, codec, base, record.body[:size], record.body[size:])

    def _words(self, coded):
        if coded.codec == WORDS:
            return np.frombuffer(coded.mask, "<u4")
        return np.asarray(arrays.pack_leaves(self._leaves(coded), self._layout))

    def _leaves(self, coded):
        """The mask of a task, bool leaves in the layout's order."""
        if coded.codec == WORDS:
            planes = np.frombuffer(coded.mask, "u1").reshape(-1, 4)
            bits = np.unpackbits(planes, axis=1, bitorder="little").T.reshape(-1).view(bool)
            return jax.tree.leaves(self._layout.unravel(bits))
        against = None if coded.base is None else self._leaves_of(coded.base)
        try:
            return codecs.decode_leaves(coded.mask, self._layout, against)
        except StoreError as error:
            raise StoreError(f"{self.path}: the mask of task {coded.i}: {error}") from error

    def _leaves_of(self, i):
        """The mask of a base, which several deltas are likely to share."""
        if self._base[0] != i:
            self._base = i, self._leaves(self._read(i))
        return self._base[1]


class _Coded(NamedTuple):
    """Task i as it lies in its record, mask and statistics apart."""

    i: int
    metadata: dict[str, Any]
    codec: str
    base: int | None
    mask: memoryview
    state: memoryview


class Parts:
    """The tasks of a DiskStore as MaskStores, loaded one at a time, as often as gone through.

    What is held at a time is one part, and while it is loaded two more copies of its masks.
    """

    def __init__(self, disk: DiskStore, size: int):
        self._disk, self._size = disk, size

    def __len__(self) -> int:
        return -(-len(self._disk) // self._size)

    def __iter__(self) -> Iterator[MaskStore]:
        for start in range(0, len(self._disk), self._size):
            yield self._disk.load(slice(start, start + self._size))


def _check_names(name, labels):
    if not (name is None or isinstance(name, str)):
        raise TypeError(f"name must be a str, got {name!r}")
    if isinstance(labels, str) or not all(isinstance(label, str) for label in labels or ()):
        raise TypeError(f"labels must be a list of str, got {labels!r}")
