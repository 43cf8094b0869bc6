"""Tasks on disk, appended one by one and loaded by the slice: a store that outlives its process."""

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from supsup_jax.checks import check_int
from supsup_jax.layout import Layout
from supsup_jax.network import Network
from supsup_jax.stores import codecs, journal, records, sharded
from supsup_jax.stores.base import as_index, checked_task
from supsup_jax.stores.codecs import Leaves
from supsup_jax.stores.coded import Form, Moments, TaskInfo, check_told
from supsup_jax.stores.journal import MANIFEST, Problem, TaskLog
from supsup_jax.stores.mask_store import MaskStore
from supsup_jax.stores.names import Names
from supsup_jax.stores.origin import Origin, like_state, manifest_of, read_manifest
from supsup_jax.stores.parts import Parts
from supsup_jax.stores.records import Entry
from supsup_jax.stores.sharded import ShardedStore
from supsup_jax.types import Integers, PyTree, StoreError, Task

FORMAT = "supsup_jax.DiskStore"
MODES = ("r", "a", "x")
RESERVOIR = "reservoir.bin"


class DiskStore:
    """The tasks of one network in a folder, in the format of `docs/format.md`.

    A task is there once `append` has returned, whatever happens to the process or the power, and
    costs its own bytes only. One process may write; any number may read meanwhile, each seeing
    whole tasks only. Not a pytree: `load` gives a MaskStore for inference.

    A task's id is its for ever: `remove` and `replace` change no other's, and no id is given twice.

        with ss.DiskStore.open("tasks", net, mode="a") as disk:
            disk.append(result.task, name="invoices", labels=["paid", "open"])
            store = disk.load()
    """

    def __init__(self, log: TaskLog, net: Network | None):
        # Made by `open` alone, which checks that log and network belong together.
        self._log, self._net = log, net
        origin, states = read_manifest(log.manifest, FORMAT, log.path, net)
        self._layout: Layout = net.layout if net else origin.layout
        self._form = Form(self._layout, list(states.values()), log.path, self._leaves_of)
        # The last base of an xor-delta, and its leaves.
        self._base: tuple[Entry | None, Leaves] = None, []
        self._names = Names(log)

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
            assert net is not None  # as is checked
            manifest = manifest_of(FORMAT, Origin.of(net), net.state)
            try:
                return cls(TaskLog.create(path, manifest, timeout), net)
            except FileExistsError:
                if mode == "x" or not (path / MANIFEST).exists():
                    raise  # else another process has created it meanwhile
        read_manifest(journal.read_manifest(path), FORMAT, path, net)  # before a writer mends it
        return cls(TaskLog.open(path, writes=mode == "a", timeout=timeout), net)

    def __len__(self) -> int:
        """Ids handed out, those of removed tasks too, as far as this object knows: see `refresh`.

        The next `append` gets this id.
        """
        return len(self._log)

    @property
    def num_tasks(self) -> int:
        """As `len`: of removed tasks too. Those that are there: `len(disk.ids)`."""
        return len(self._log)

    @property
    def ids(self) -> np.ndarray:
        """int [T], the ids of the tasks that are there, in the order in which `load` gives them.

        `ids[belief.task]` names what inference found in `load(ids)`. Take them once, before:
        where another process writes meanwhile, a read may bring other ids.
        """
        return np.array(self._log.ids, int)

    def places(self, ids: Integers | int) -> np.ndarray:
        """int, shaped like `ids`: where `load` puts the tasks of these ids, as `predict` asks.

        The way back from `ids`; after a removal a task's place is no longer its id.
        Raises TypeError for what are no integers, TaskIdError for an id that is not there.
        """
        held, ids = self.ids, np.asarray(ids)
        if ids.size and ids.dtype.kind not in "iu":
            raise TypeError(f"ids must be integers, got dtype {ids.dtype}")
        for outside in np.setdiff1d(ids, held):
            self._log.entry(int(outside))  # raises
        return np.searchsorted(held, ids)  # which rise

    @property
    def path(self) -> Path:
        """The folder."""
        return self._log.path

    @property
    def manifest(self) -> dict[str, Any]:
        """Of the format's page: network, layout, statistics, versions."""
        return self._log.manifest

    def append(
        self,
        task: Task | PyTree,
        scores: PyTree = None,
        *,
        name: str | None = None,
        labels: Sequence[str] | None = None,
        num_labels: int | None = None,
        moments: Moments | None = None,
        codec: str = codecs.AUTO,
        base: int | None = None,
        durable: bool = True,
    ) -> int:
        """Adds a task and returns its id.

        task: a Task, or a bare mask where the network has no state.
        scores: a TrainResult's, float32 pytree like the mask, kept so that training can go on; 32
          times the bytes of packed masks, which loading reads past.
        name, labels: what people call the task and its outputs, each by a name of its own.
        num_labels: as of `MaskStore.append`, and told of all tasks that are loaded together or of
          none; `labels` do not tell it.
        moments: of `MaskStore.moments`, the mean and deviation of the task's scores by the names of
          objectives.
        codec: one of CODECS. "auto" is "words", which loads fastest, unless another saves a tenth.
        base: for "xor-delta", the id of an earlier task to code the mask against.
        durable: return when the task is on the device, which takes the disk milliseconds. Where
          many are appended, pass False and call `flush` once: a crash before may take the last.
        Raises TypeError or ValueError for a task of another network, what is no name or is taken,
        and more labels than a dense net has outputs; StoreError unless the store is open for
        appending; OSError where the disk is full, and then the store holds what it held.
        """
        task = self._checked(task)
        told = name, labels, codec, base, num_labels, moments
        record = self._form.record(len(self), task, scores, *told)
        with self._names.giving([name]):
            return self._log.append(*record, durable=durable)

    def replace(
        self,
        i: int,
        task: Task | PyTree,
        scores: PyTree = None,
        *,
        name: str | None = None,
        labels: Sequence[str] | None = None,
        num_labels: int | None = None,
        moments: Moments | None = None,
        codec: str = codecs.AUTO,
        base: int | None = None,
        durable: bool = True,
    ) -> None:
        """Makes task i another; of the former, its scores, name and labels, no bit remains.

        After a crash task i is the former or the new one, whole. All as in `append`, but that
        flushes are needed in any case: durable=False saves the last of four.
        Raises as `append` and `task`.
        """
        self._log.entry(i := as_index(i))
        task = self._checked(task)
        told = name, labels, codec, base, num_labels, moments
        record = self._form.record(i, task, scores, *told)
        with self._names.giving([name], i):
            self._recode(i)
            self._log.replace(i, *record, durable=durable)

    def remove(self, i: int) -> None:
        """Removes task i, which may be damaged; the ids of others stay.

        When it returns, no bit of its mask, statistics, scores, name or labels is left in the
        folder, nor a checksum of them: they are overwritten, and that is on the device. How many
        bytes they took is seen until `compact`. What the folder's copies hold, and what a
        file system or device keeps of overwritten bytes, is beyond this library; so are files
        that `repair` set aside. Tasks coded against it are coded anew first.
        A crash leaves the task whole, or removed from the next `open` on; of a damaged one whose
        place nobody knows the bytes may be left then, until `compact`.
        Raises as `task`, StoreError unless the store is open for appending, and where a later
        task is damaged, which may be coded against it; OSError where the disk is full or fails.
        """
        self._log.entry(i := as_index(i))
        with self._names.giving([None], i):
            self._recode(i)
            self._log.remove(i)

    def compact(self) -> int:
        """Gives back the bytes of what was removed or replaced; returns how many.

        Writes all tasks anew beside the old file, which needs the room, and exchanges the two: a
        crash leaves either. Open readers go on. A removed task keeps 160 bytes, for its id.
        Raises StoreError unless the store is open for appending, or where a task is damaged, and
        OSError; then the store holds what it held.
        """
        return self._log.compact()

    def extend(self, store: MaskStore, names: Sequence[str] | None = None) -> range:
        """Adds all tasks of a MaskStore, flushed to the device once, and returns their numbers.

        names: one a task; numbers of labels and moments as the store has them. Raises as `append`,
        and then none of them is added; of a kill meanwhile some may be, and after a power cut it
        may need `supsup repair` to go on with those.
        """
        store.check_fits(self._network())
        held = int(store.num_tasks)
        told_names = [None] * held if names is None else list(names)
        if len(told_names) != held:
            raise ValueError(f"names must be {held}, one a task, got {len(told_names)}")
        first = len(self)
        told, moments = jax.device_get((store.num_labels, store.moments))
        with self._names.giving(told_names), self._log.together():
            for i, name in enumerate(told_names):
                count = None if told is None else int(told[i])
                own = {each: row[i].tolist() for each, row in moments.items() if row[i, 1] > 0}
                facts = name, None, codecs.AUTO, None, count, own
                task = self._checked(store.task(i))
                record = self._form.record(len(self), task, None, *facts)
                self._log.append(*record, durable=False)
            self.flush()
        return range(first, len(self))

    def export(self, i: int, path: str | os.PathLike) -> None:
        """Writes task i to the file `path`, which `append_file` takes into a store like this one.

        Raises as `task`, FileExistsError where something is, OSError for the rest.
        """
        if Path(path).exists():
            raise FileExistsError(f"{path} exists; name a new file")
        # Against no other task, which the other store need not hold.
        records.write_alone(path, self.manifest, *self._read(i, self._form.alone))

    def append_file(self, path: str | os.PathLike, name: str | None = None) -> int:
        """Adds the task in a file of `export`, by its own name or this one; returns its number.

        Raises as `append`, FileNotFoundError, StoreError where it is damaged or another network's.
        """
        record = self._of_file(path, name)
        with self._names.giving([record.metadata["name"]]):
            return self._log.append(record.metadata, [record.body])

    def replace_by_file(self, i: int, path: str | os.PathLike, name: str | None = None) -> None:
        """Makes task i that in a file, all as in `append_file`. Raises so, and as `replace`."""
        self._log.entry(i := as_index(i))
        record = self._of_file(path, name)
        with self._names.giving([record.metadata["name"]], i):
            self._recode(i)
            self._log.replace(i, record.metadata, [record.body])

    def _of_file(self, path, name):
        manifest, record = records.read_alone(path)
        read_manifest(manifest, FORMAT, path, self._net)
        return self._form.taken(record, manifest, path, self.manifest, name)

    def copy(self, path: str | os.PathLike, without: Integers = ()) -> list[int]:
        """Writes a new store of the tasks but for those `without`; returns their ids, which stay.

        All of them, or no store. Raises FileExistsError where anything is, as `task` for damage
        among them, OSError; then the files in the folder are empty.
        """
        held = dict.fromkeys(self._log.ids)
        for i in without:
            self._log.entry(i := as_index(i))
            held.pop(i, None)
        found = (self._read(i, self._form.alone) if i in held else None for i in range(len(self)))
        TaskLog.create(path, self.manifest, found=found).close()
        return list(held)

    def find(self, name: str) -> list[int]:
        """Ids of the tasks of that name, as far as they can be read."""
        return [i for i, called in self.names().items() if called == name]

    def names(self) -> dict[int, str]:
        """Of the tasks that have one, by their ids, as far as they can be read."""
        return dict(self._names.called())

    def flush(self) -> None:
        """Returns when all tasks are on the device: for `append(durable=False)`."""
        self._log.flush()

    def info(self, i: int) -> TaskInfo:
        """What is known of task i. Raises as `task`."""
        return self._read(i, self._form.info)

    def task(self, i: int) -> Task:
        """Task i: its mask NumPy bools, None where not masked, and its statistics.

        Raises IndexError, a StoreError too, where there is none, StoreError where it is damaged.
        """
        like, form = jax.tree.structure(self._network().state), self._form
        leaves, state = self._read(i, lambda coded: (form.leaves(coded), form.state(coded)))
        return Task(self._layout.tree(leaves), like.unflatten(state))

    def scores(self, i: int) -> PyTree | None:
        """The scores kept with task i: float32 pytree like its mask; None where none were.

        Training goes on with `train_task(key, net, data, config, init_scores=disk.scores(i))`.
        Raises as `task`.
        """
        self._network()
        scores = self._read(i, self._form.scores)
        return self._layout.tree(scores) if scores else None

    def words(self, i: int) -> np.ndarray:
        """The packed mask of task i, uint32 [nw]. Raises as `task`; needs no network."""
        return self._read(i, self._form.words)

    def load(
        self, tasks: slice | Integers | None = None, *, mesh: Mesh | None = None
    ) -> MaskStore | ShardedStore:
        """The tasks, those of a slice of `ids`, or of a list of ids, as a MaskStore of that many.

        mesh: spreads them over the devices along its axis `task`, as `shard` does; each process
          reads only what its own devices hold, and all of them must make the call.
        Every checksum is compared. Raises as `task`, ValueError where no task is left, StoreError
        where some tell their num_labels and others do not, and as `shard` for the mesh.
        """
        net = self._network()
        held = self._log.ids
        ids = held[tasks or slice(None)] if isinstance(tasks, slice | None) else tasks
        if not (ids := list(map(as_index, ids))):
            raise ValueError(f"{tasks} leaves none of the {len(held)} tasks to load")
        told = [self._log.metadata(i) for i in ids]  # on each host alike
        counts, measured = self._form.shared(ids, told)
        labelled = bool(counts)
        state = like_state(net, labelled, measured)
        fields = functools.partial(self._fields, labelled, measured)
        if mesh is None:
            return MaskStore.of_tasks(net, len(ids), map(fields, ids), state)
        return sharded.of_tasks(
            net, len(ids), lambda slots: (fields(ids[slot]) for slot in slots), mesh, state, counts
        )

    def parts(self, size: int = 1024) -> Parts:
        """The tasks as MaskStores of `size` each, for `one_shot_streamed`: of bounded memory.

        `parts.ids[belief.task]` names what was found: of those that are there now.
        """
        self._network()
        check_int("size", size, 1)
        return Parts(self.ids, self.load, size)

    def refresh(self) -> int:
        """Takes in what was appended, removed and replaced since, and returns `len`.

        Raises StoreError where another store is in the place of this one.
        """
        return self._log.refresh()

    def verify(self) -> list[Problem]:
        """Every byte of the folder against its checksums: what is wrong with it, or nothing."""
        problems = self._log.verify()
        try:
            records.read_alone(self._log.folder / RESERVOIR)
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
        return f"DiskStore({str(self.path)!r}, {len(self._log.ids):,} tasks)"

    def _network(self):
        if self._net is None:
            raise StoreError(f"{self.path} was opened without a network: pass net to open")
        return self._net

    def _checked(self, task) -> Any:
        """A task as leaves in the layout's order, and its statistics."""
        return checked_task(task, self._layout, self._network().state)

    def _recode(self, i):
        """Codes what is coded against task i without it."""
        for j in self._log.ids:
            if j > i and self._log.metadata(j).get("base") == i:
                try:
                    alone = self._read(j, self._form.alone)
                except StoreError as error:
                    raise StoreError(
                        f"task {j} is coded against task {i} and cannot be read ({error}): remove "
                        f"task {j} first"
                    ) from error
                self._log.replace(j, *alone)

    def _fields(self, labelled, measured, i):
        """The words of task i, and the leaves of its facts in the order of `like_state`."""

        def fields(coded):
            check_told(labelled, i, coded.num_labels)
            count = [] if coded.num_labels is None else [np.int32(coded.num_labels)]
            pairs = [np.float32(coded.moments.get(name, (0, 0))) for name in measured]
            return self._form.words(coded), [*self._form.state(coded), *count, *pairs]

        return self._read(i, fields)

    def _read(self, i, use=lambda coded: coded):
        """Task i, or what `use` makes of it: again where a writer exchanges it or its base."""
        return self._log.read(as_index(i), lambda record: use(self._form.read(record, i)))

    def _leaves_of(self, i):
        """The mask of a base, which several deltas are likely to share."""
        entry = self._log.entry(as_index(i))
        if entry is None or self._base[0] != entry:  # of None the read raises
            self._base = entry, self._read(i, self._form.leaves)
        return self._base[1]
