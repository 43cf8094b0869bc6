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
from supsup_jax.hopfield.store import HopfieldStore
from supsup_jax.layout import Layout
from supsup_jax.network import Network
from supsup_jax.stores import arrays, codecs, sharded, store_file
from supsup_jax.stores.journal import (
    MANIFEST,
    Problem,
    TaskLog,
    read_alone,
    read_manifest,
    write_alone,
)
from supsup_jax.stores.mask_store import MaskStore, checked_task
from supsup_jax.stores.sharded import ShardedStore
from supsup_jax.types import PyTree, StoreError, Task
from supsup_jax.version import __version__

FORMAT = "supsup_jax.DiskStore"
VERSION = 1
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
        self._shapes, self._states = _leaves_of(log.manifest)
        # Without a network, masks are lists of their leaves.
        self._layout = (
            net.layout if net else Layout(jax.tree.structure([0] * len(self._shapes)), self._shapes)
        )
        self._state_bytes = sum(
            dtype.itemsize * math.prod(shape) for dtype, shape in self._states.values()
        )
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
            return cls(TaskLog.create(path, manifest_of(net)), net)
        check_manifest(read_manifest(path), path, net)
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
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), self._state)
        leaves, state = checked_task(task, self._layout, like)
        return self._append(leaves, jax.tree.leaves(state), name, labels, codec, base, durable)

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
        record = self._log.read(self._index(i))
        coding = self._coding(record, i)
        metadata, body = record.metadata, [record.body]
        if coding.base is not None:  # which the other store need not hold
            mask = self._layout.tree(self._read_leaves(coding, i))
            coded = codecs.encode(mask)
            metadata |= {"codec": codecs.codec_of(coded), "base": None, "mask_bytes": len(coded)}
            body = [coded, record.body[len(coding.mask) :]]
        write_alone(path, self.manifest, metadata, body)

    def append_file(self, path: str | os.PathLike) -> int:
        """Adds the task in a file of `export`, and returns its number.

        Raises FileNotFoundError, StoreError where it is damaged or of another network, and as
        `append`.
        """
        manifest, record = read_alone(path)
        check_manifest(manifest, Path(path), self._net)
        for field in ("layout", "states", "fingerprint"):
            if manifest.get(field) != self.manifest[field]:
                raise StoreError(
                    f"{path} holds a task of another network: its {field} is "
                    f"{manifest.get(field)}, that of {self.path} is {self.manifest[field]}"
                )
        with store_file.sensible(path):
            if record.metadata["base"] is not None:
                raise ValueError("a mask coded against another task")
        self._read_words(self._coding(record, 0), 0)
        return self._log.append(record.metadata, [record.body])

    def save_reservoir(self, store: HopfieldStore) -> None:
        """Keeps the Hopfield networks of HopSupSup in the folder, in place of those before.

        Raises StoreError unless they are of this network and the folder is open for appending.
        """
        store.check_fits(self._network())
        self._log.check_writable()
        metadata = {"rule": store.rule, "num_tasks": int(store.num_tasks)}
        arrays = jax.tree.leaves((store.weights, store.total))
        body = [
            np.asarray(array).astype(array.dtype.newbyteorder("<")).tobytes() for array in arrays
        ]
        write_alone(self.path / RESERVOIR, self.manifest, metadata, body, overwrite=True)

    def load_reservoir(self) -> HopfieldStore:
        """What `save_reservoir` keeps.

        Raises FileNotFoundError where nothing is kept, StoreError where it is damaged.
        """
        net, path = self._network(), self.path / RESERVOIR
        manifest, record = read_alone(path)
        check_manifest(manifest, path, net)
        sizes = [math.prod(shape) for _, shape in self._shapes]
        kinds = [("<f4", (d, d)) for d in sizes] + [("<i4", (d,)) for d in sizes]
        arrays, data = [], record.body
        with store_file.sensible(path):
            for dtype, shape in kinds:
                size = 4 * math.prod(shape)
                arrays.append(np.frombuffer(data[:size], dtype).reshape(shape))
                data = data[size:]
            rule, num_tasks = record.metadata["rule"], record.metadata["num_tasks"]
            if data or type(num_tasks) is not int or num_tasks < 0:
                raise ValueError(f"{num_tasks!r} tasks, and {len(data):,} bytes too many")
            half = len(sizes)
            return HopfieldStore.of_arrays(net, rule, num_tasks, arrays[:half], arrays[half:])

    def flush(self) -> None:
        """Returns when all tasks are on the device: for `append(durable=False)`."""
        self._log.flush()

    def info(self, i: int) -> TaskInfo:
        """What is known of task i. Raises as `task`."""
        record = self._log.read(self._index(i))
        coding, fields = self._coding(record, i), record.metadata
        with store_file.sensible(self.path):
            name, labels, kept = (fields[name] for name in ("name", "labels", "kept"))
            if not (name is None or isinstance(name, str)):
                raise ValueError(f"the name {name!r}")
            if not (labels is None or all(isinstance(label, str) for label in labels)):
                raise ValueError(f"the labels {labels!r}")
            return TaskInfo(
                name,
                None if labels is None else tuple(labels),
                coding.codec,
                coding.base,
                dict(zip((leaf for leaf, _ in self._shapes), map(int, kept), strict=True)),
                len(coding.mask),
                self._state_bytes,
            )

    def task(self, i: int) -> Task:
        """Task i: its mask NumPy bools, None where not masked, and its statistics.

        Raises IndexError, a StoreError too, where there is none, StoreError where it is damaged.
        """
        net, i = self._network(), self._index(i)
        record = self._log.read(i)
        mask = self._layout.tree(self._read_leaves(self._coding(record, i), i))
        state = jax.tree.structure(net.state).unflatten(self._read_state(record))
        return Task(mask, state)

    def words(self, i: int) -> np.ndarray:
        """The packed mask of task i, uint32 [nw]. Raises as `task`; needs no network."""
        return self._fields(self._index(i))[0]

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
        ids = range(len(self)) if ids is None else [self._index(i) for i in ids]
        if not len(ids):
            raise ValueError(f"{tasks} leaves none of the {len(self)} tasks to load")
        if mesh is not None:
            return sharded.of_tasks(
                net, len(ids), lambda slots: (self._fields(ids[slot]) for slot in slots), mesh
            )
        tasks = arrays.of_tasks(net.layout, net.state, len(ids), map(self._fields, ids))
        return MaskStore.of_bank(net, tasks, len(ids))

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
            read_alone(self.path / RESERVOIR)
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

    @property
    def _state(self):
        return self._network().state

    def _network(self):
        if self._net is None:
            raise StoreError(f"{self.path} was opened without a network: pass net to open")
        return self._net

    def _index(self, i):
        if isinstance(i, bool) or not hasattr(i, "__index__"):
            raise TypeError(f"a task's number must be an integer, got {i!r}")
        return i.__index__()

    def _append(self, leaves, state, name, labels, codec, base, durable):
        if not (name is None or isinstance(name, str)):
            raise TypeError(f"name must be a str, got {name!r}")
        if isinstance(labels, str) or not all(isinstance(label, str) for label in labels or ()):
            raise TypeError(f"labels must be a list of str, got {labels!r}")
        if codec not in (codecs.AUTO, *CODECS):
            raise ValueError(
                f"codec must be {codecs.AUTO!r} or one of {list(CODECS)}, got {codec!r}"
            )
        if (codec == codecs.DELTA) != (base is not None):
            raise ValueError(
                f"codec {codecs.DELTA!r} takes base=, the number of an earlier task; "
                f"got codec {codec!r} and base {base!r}"
            )
        mask, against = self._layout.tree(leaves), None
        if base is not None:
            against = self._layout.tree(self._leaves(self._index(base)))
        if codec == codecs.AUTO:
            codec = self._densest(mask)
        coded = (
            np.asarray(arrays.pack_leaves(leaves, self._layout)).astype("<u4").tobytes()
            if codec == WORDS
            else codecs.encode(mask, codec, against)
        )
        metadata = {
            "name": name,
            "labels": None if labels is None else list(labels),
            "codec": codec,
            "base": base,
            "kept": [int(np.count_nonzero(leaf)) for leaf in leaves],
            "mask_bytes": len(coded),
        }
        state = [store_file.as_native(np.ascontiguousarray(leaf)) for leaf in state]
        body = [coded, *(leaf.tobytes() for leaf in state)]
        return self._log.append(metadata, body, durable=durable)

    def _densest(self, mask):
        sizes = codecs.coded_bytes(mask)
        few = {"csc16": sizes.csc16, "enumerative": sizes.enumerative}
        best = min((size, name) for name, size in few.items() if size is not None)
        return best[1] if best[0] < 0.9 * 4 * self._layout.num_words else WORDS

    def _fields(self, i):
        """The words and the leaves of the statistics of task i."""
        record = self._log.read(i)
        return self._read_words(self._coding(record, i), i), self._read_state(record)

    def _coding(self, record, i):
        """How the mask of a record is coded, once that is seen to fit this store's network."""
        with store_file.sensible(self.path):
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
        return _Coding(codec, base, record.body[:size])

    def _read_words(self, coding, i):
        if coding.codec == WORDS:
            return np.frombuffer(coding.mask, "<u4")
        return np.asarray(arrays.pack_leaves(self._read_leaves(coding, i), self._layout))

    def _read_leaves(self, coding, i):
        if coding.codec == WORDS:
            return self._unpack(np.frombuffer(coding.mask, "<u4"))
        against = None if coding.base is None else self._layout.tree(self._leaves(coding.base))
        try:
            return jax.tree.leaves(codecs.decode(coding.mask, self._layout, against))
        except StoreError as error:
            raise StoreError(f"{self.path}: the mask of task {i}: {error}") from error

    def _leaves(self, i):
        """The mask of a base, which several deltas are likely to share."""
        if self._base[0] != i:
            self._base = i, self._read_leaves(self._coding(self._log.read(i), i), i)
        return self._base[1]

    def _unpack(self, words):
        planes = np.unpackbits(words.view("u1").reshape(-1, 4), axis=1, bitorder="little")
        flat = np.ascontiguousarray(planes.T).reshape(-1).view(bool)
        return jax.tree.leaves(self._layout.unravel(flat))

    def _read_state(self, record):
        data, leaves = record.body[len(record.body) - self._state_bytes :], []
        for dtype, shape in self._states.values():
            size = dtype.itemsize * math.prod(shape)
            leaves.append(np.frombuffer(data[:size], dtype).reshape(shape))
            data = data[size:]
        return leaves


class _Coding(NamedTuple):
    codec: str
    base: int | None
    mask: memoryview


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


def check_manifest(manifest: dict[str, Any], path: Path, net: Network | None) -> None:
    """Raises StoreError unless a DiskStore's manifest makes sense and belongs to `net`."""
    if manifest.get("format") != FORMAT:
        raise StoreError(f"{path} is not a {FORMAT}: its manifest names {manifest.get('format')!r}")
    if manifest.get("version") != VERSION:
        raise StoreError(
            f"{path} has format version {manifest.get('version')}, this release reads {VERSION}: "
            "upgrade supsup_jax to read it"
        )
    with store_file.sensible(path):
        _leaves_of(manifest)
        if net is not None:
            store_file.check_network(path, manifest, net)
            if manifest["states"] != (have := store_file.state_fields(net)):
                raise StoreError(
                    f"{path} holds statistics {manifest['states']}, the network has {have}"
                )


def _leaves_of(manifest):
    """((name, shape), ...) of the masked leaves, and {name: (dtype, shape)} of the statistics.

    Raises KeyError, TypeError or ValueError for a manifest that makes no sense.
    """
    shapes = tuple((name, tuple(shape)) for name, shape in manifest["layout"])
    if not isinstance(manifest["states"], dict):
        raise TypeError(f"the statistics {manifest['states']!r}")
    states = {
        name: (np.dtype(dtype), tuple(shape)) for name, (dtype, shape) in manifest["states"].items()
    }
    if any(dtype.hasobject or not isinstance(name, str) for name, (dtype, _) in states.items()):
        raise ValueError(f"the statistics {states!r}")
    if not (shapes and all(isinstance(name, str) for name, _ in shapes)):
        raise ValueError(f"the leaves {shapes!r}")
    sizes = [size for _, shape in (*shapes, *states.values()) for size in shape]
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError(f"the shapes {shapes!r} and {states!r}")
    return shapes, states


def manifest_of(net: Network) -> dict[str, Any]:
    """The manifest of a store of `net`'s tasks; `docs/format.md` says what stands in it."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "initializer": net.initializer,
        "seed": None if net.seed is None else int(net.seed),
        "fingerprint": net.fingerprint,
        "layout": [[name, list(shape)] for name, shape in net.layout.named_shapes],
        "states": store_file.state_fields(net),
        "versions": {"supsup_jax": __version__, "jax": jax.__version__, "numpy": np.__version__},
    }
