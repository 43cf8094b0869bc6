"""A folder of checksummed records: what a DiskStore is on disk. Knows bytes, no masks.

`docs/format.md` is the format's page, by which the folder can be read without this library:

    manifest.json   what the store belongs to, under its checksum; written once
    tasks.bin       the records of tasks, one behind another, of each task the last; the truth
    index.bin       64 bytes a task: where its record is, and its checksum; follows from tasks.bin

*Durability.* An append writes the record, flushes it to the device, then enters it in the index. A
task counts from the moment its record is wholly there. What a crash leaves behind the last whole
record was never reported as appended; readers pass over it, and the next writer drops it. The
index lists nothing that is not on the device, and need not be flushed: entries that a crash takes
are made again from the records. It is there so that opening reads 64 bytes a task, and so that
records cut off at the end are missed.

*Removal.* A record of a number that there is takes the former's place: another task, or the news
that it was removed. Once that one and its entry are on the device, the former is overwritten with
zeros. What a crash leaves of it the next writer overwrites.

*Concurrency.* One writer, held off by a lock on tasks.bin that the system releases when the writer
dies (where there is no flock, by a file beside it), and any number of readers, which take no lock:
bytes that count never change. A reader that finds a record overwritten looks for the one in its
place.

Reads copy from the file, never map it: a mapped file that is cut short kills its readers.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from supsup_jax.stores import files, records, system
from supsup_jax.stores.files import INDEX, RECORDS, Files
from supsup_jax.stores.records import ENTRY_BYTES, Entry, Record
from supsup_jax.types import StoreError, TaskIdError

MANIFEST = "manifest.json"

_MAX_MANIFEST_BYTES = 1 << 24
_PARTIAL = MANIFEST + ".partial"


class Problem(NamedTuple):
    """What `verify` found. loses: whether a task cannot be read, which `repair` cannot mend; task:
    which, where that is known.
    """

    file: str
    what: str
    loses: bool
    task: int | None = None

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


class TaskLog(Files):
    """The folder `path` of records 0, 1, ..., open for reading or also for writing.

    manifest: the JSON object that it was created with. timeout: as of `open`.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], writes: bool, timeout: float = 0.0):
        self.manifest = manifest
        self._due = False  # a flush, of what was appended without
        super().__init__(path, writes, timeout)

    @classmethod
    def create(
        cls,
        path: str | os.PathLike,
        manifest: dict[str, Any],
        timeout: float = 0.0,
        found: Iterable[tuple[dict[str, Any], Sequence[Any]] | None] = (),
    ) -> "TaskLog":
        """A new folder, open for appending: a store from the moment it is whole.

        timeout: seconds to wait for another process that creates it.
        found: the records to begin with, metadata and body; None, of one that was removed.
        Raises FileExistsError where a store or anything else is, FileNotFoundError for a missing
        parent, StoreError while another process creates it, OSError for the rest, and what `found`
        raises; then a folder of empty files stays, which is no store.
        """
        path = Path(path)
        # As a creation cut short leaves it: empty files and no manifest.
        _new_folder(path, (RECORDS, INDEX, _PARTIAL, system.LOCK))
        with files.allowed(path, writes=True):
            system.write_file(path / RECORDS, [], os.O_CREAT)
        log = cls(path, manifest, True, timeout)
        try:
            if log._size() or (path / MANIFEST).exists():
                raise FileExistsError(
                    f"{path} holds the records of a store; name a new folder, or delete this one "
                    "if it is a copy that was cut short"
                )
            os.ftruncate(log._index, 0)  # of a copy of which power left this alone
            try:
                for record in found:
                    log.append(*(record or (records.REMOVED, [])), durable=False)
                log.flush()
                system.flush_folder(path)  # no manifest without its files
                text = records.signed_manifest(manifest)
                system.write_file(path / _PARTIAL, [text], os.O_CREAT | os.O_TRUNC)
                os.replace(path / _PARTIAL, path / MANIFEST)
                for folder in (path, path.parent):
                    system.flush_folder(folder)
            except BaseException:
                with contextlib.suppress(OSError):
                    if log._in_place():  # else it is another's
                        os.unlink(path / MANIFEST)
                log._cut_back(0, 0)
                log._forget()
                log._due = False
                raise
        except BaseException:
            log.close()
            raise
        return log

    @classmethod
    def open(cls, path: str | os.PathLike, writes: bool = False, timeout: float = 0.0) -> "TaskLog":
        """The folder at `path`.

        writes: also to write. First drops what a crash left unfinished, and completes the index.
        timeout: seconds to wait for another writer.
        Raises FileNotFoundError where no store is, StoreError for a damaged manifest, another
        writer, or damage at the end where new records would go, OSError for the rest.
        """
        path = Path(path)
        manifest = read_manifest(path)
        if not (path / RECORDS).is_file():
            raise StoreError(
                f"{path} lacks {RECORDS}, the tasks themselves: restore it from a copy"
            )
        log = cls(path, manifest, writes, timeout)
        try:
            log.refresh()
            if writes:
                log._mend()
        except BaseException:
            log.close()
            raise
        return log

    def __len__(self) -> int:
        """Numbers handed out: of records that are there, and of those removed."""
        return len(self._entries)

    @property
    def ids(self) -> list[int]:
        """The numbers of the records that are there, damaged or not."""
        return [i for i in range(len(self._entries)) if i not in self._removed]

    def append(self, metadata: dict[str, Any], body: Sequence[Any], *, durable: bool = True) -> int:
        """Adds one record and returns its number.

        metadata: a JSON object. body: buffers, joined.
        durable: return when the record is on the device; otherwise call `flush` in the end. A power
          cut before may take those of several that others lie behind: `repair` goes on from there.
        Raises StoreError unless open for writing; OSError when the disk is full or fails, and
        then the folder holds what it held.
        """
        self._check_open(writes=True)
        self._write(task := len(self._entries), metadata, body, durable)
        return task

    def replace(
        self, i: int, metadata: dict[str, Any], body: Sequence[Any], *, durable: bool = True
    ) -> None:
        """Puts another record in the place of record i, and overwrites that one with zeros.

        durable: return when the zeros are on the device too; the new record always is.
        Raises as `append` and `read`. Where the disk fails after the new record was written, that
        one counts, and the next writer overwrites the former.
        """
        self._check_open(writes=True)
        former = self.entry(i)
        if former:
            self._mend_head(i, former)
        self._write(i, metadata, body)
        # Else a crash that takes the entry could leave one of a record half overwritten.
        system.flush(self._index)
        if former:
            self._erase([(former.offset, former.length, i)], durable)
        elif None not in self._entries:
            self.compact()  # nobody knows where it is: all goes that is not known

    def remove(self, i: int) -> None:
        """Removes record i for good. Raises as `replace`.

        A damaged one goes too. Where nobody knows its place, its bytes go by `compact`, once no
        other such record is left.
        """
        self.replace(i, records.REMOVED, [])

    def compact(self) -> int:
        """Gives back the bytes of what was removed or replaced; returns how many.

        Writes all records anew, then exchanges the files: needs the room meanwhile. Readers go on.
        Raises StoreError unless open for writing, and where a record is damaged; OSError. Then the
        folder holds what it held; where it was the exchange that failed, the log is closed.
        """
        self._check_open(writes=True)
        former = self._end
        if any(self._gaps()):
            self._pack(self._whole)
        return former - self._end

    def _write(self, task, metadata, body, durable=True):
        """A record at the end, and where it is on the device its entry."""
        data, place = records.record_bytes(task, metadata, body), task * ENTRY_BYTES
        entry = Entry(self._end, len(data), data[-records.SHA_BYTES :])
        held, listed = len(self._entries), self._listed()
        row = system.read_at(self._index, place, ENTRY_BYTES)
        try:
            system.write_at(self._records, data, entry.offset)
            if durable:
                self.flush()  # and with it those before
                system.write_at(self._index, records.entry_bytes(task, entry), place)
        except BaseException as error:  # an interrupt, too: nothing half-written stays
            with contextlib.suppress(OSError):
                if row and row != system.read_at(self._index, place, ENTRY_BYTES):
                    system.write_at(self._index, row, place)
                    system.flush(self._index)
            self._cut_back(listed, entry.offset)
            self._due = listed < held
            if not isinstance(error, OSError):
                raise
            raise OSError(
                error.errno,
                f"{os.strerror(error.errno or 0)}: task {task} was not written, and the store "
                "holds what it held",
                str(self.path),
            ) from error
        self._take(task, entry)
        self._due |= not durable

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Appends within are all there in the end, or where one fails none is."""
        self._check_open(writes=True)
        held, end, listed = len(self._entries), self._end, self._listed()
        try:
            yield
        except BaseException:
            self._cut_back(listed, end)
            del self._entries[held:]
            self._end = end
            raise

    def flush(self) -> None:
        """Returns when every record is on the device, and enters them in the index."""
        self._check_open(writes=True)
        system.flush(self._records)
        listed = self._listed()
        system.write_at(self._index, self._rows_from(listed), listed * ENTRY_BYTES)
        self._due = False

    def close(self) -> None:
        """Closes the files, and lets another write. Further calls do nothing.

        What was appended is flushed before. Raises OSError where the disk fails.
        """
        try:
            if self._index != files.CLOSED and self._due:
                self.flush()
        finally:
            super().close()

    def entry(self, i: int) -> Entry | None:
        """Where record i is; None where nobody knows.

        Raises TaskIdError, an IndexError, unless 0 <= i < len(self), and where it was removed.
        """
        self._check_open()
        if not 0 <= i < len(self._entries):
            raise TaskIdError(f"task {i} is not in {self.path}, which holds {len(self)}")
        if i in self._removed:
            raise TaskIdError(f"task {i} was removed from {self.path}; name one of its ids")
        return self._entries[i]

    def read(self, i: int, use: Callable[[Record], Any] = lambda record: record) -> Any:
        """Record i, once its checksum is seen to be right, or what `use` makes of it.

        use: called again with the record that is there then, where it raises StoreError and a
          writer has exchanged record i meanwhile.
        Raises as `entry`, StoreError when the record is damaged.
        """

        def whole(entry):
            return use(records.parse_record(self._whole(i, entry), i, self._file))

        return self._as_it_is(i, whole)

    def metadata(self, i: int) -> dict[str, Any]:
        """Of record i, without a look at its body or its checksum. Raises as `read`."""

        def head(entry):
            self._check_within(i, entry)
            return records.read_metadata(self._records, entry, i, self._file)

        return self._as_it_is(i, head)

    def _as_it_is(self, i, read):
        """read(the entry of record i), again where a writer exchanged it meanwhile."""
        self._check_open()
        if not self.writes and not os.fstat(self._records).st_nlink:
            self.refresh()  # compacted: what was removed since must not be read
        while True:
            entry = self.entry(i)
            try:
                return read(entry)
            except StoreError:
                if not self.writes:
                    self._forget()  # so that what lies where no entry says is looked for
                self.refresh()
                if self.entry(i) == entry:
                    raise

    def _check_within(self, i, entry):
        if entry is None:
            raise StoreError(
                f"{self._file}: the record of task {i} is damaged, and so is its entry in {INDEX}; "
                "restore the file from a copy"
            )
        if entry.end > (size := self._size()):
            raise StoreError(
                f"{self._file} was cut short: it has {size:,} bytes, and the record of task {i} "
                f"needs those from {entry.offset:,} to {entry.end:,}"
            )

    def _whole(self, i, entry):
        """The bytes of record i."""
        self._check_within(i, entry)
        data = memoryview(system.read_at(self._records, entry.offset, entry.length))
        if records.checksum(data) != entry.sha256:
            raise StoreError(
                f"{self._file}: the record of task {i}, {entry.length:,} bytes at "
                f"{entry.offset:,}, does not match its checksum: it is damaged"
            )
        return data

    def refresh(self) -> int:
        """Takes in what any process wrote since, and returns how many numbers were handed out.

        Raises StoreError where another store is in the place of this one.
        """
        self._check_open()
        self._take_new()
        while not self.writes and self._exchanged():
            if read_manifest(self.folder) != self.manifest:
                raise StoreError(f"{self.path} is another store by now; open it again")
            self.close()
            self._open(0)
            self._take_new()
        return len(self._entries)

    def verify(self) -> list[Problem]:
        """Every byte of the folder against its checksum, and what is wrong with it. Empty: nothing.

        Meant for a folder that nobody writes to meanwhile.
        """
        self.refresh()
        problems = []
        for task, entry in enumerate(self._entries):
            try:
                records.parse_record(self._whole(task, entry), task, self._file)
            except StoreError as error:
                what = str(error).removeprefix(f"{self._file}: ")
                problems.append(Problem(RECORDS, what, loses=True, task=task))
        for offset, length, task in self._remains(thorough=True):
            former = task is not None and self._replaced(task, offset)
            what = f"left of a former task {task}" if former else "no record"
            what = f"{length:,} bytes at {offset:,} are {what}"
            problems.append(Problem(RECORDS, what, loses=False))
        tail = self._size() - self._end
        if tail > 0 and (lost := self._whole_records_behind(self._end)):
            what = f"{len(lost)} whole record(s) lie behind a damaged one at byte {self._end:,}"
            problems.append(Problem(RECORDS, what, loses=True))
        elif tail > 0:
            what = f"{tail:,} bytes of an unfinished record lie behind the last whole task"
            problems.append(Problem(RECORDS, what, loses=False))
        problems += [Problem(INDEX, what, loses=False) for what in self._index_problems()]
        return problems

    def _mend(self):
        """Makes the folder end with its last whole record, and the index say what is there."""
        size = self._size()
        if size < self._end:
            raise StoreError(
                f"{self._file} has {size:,} bytes, and {INDEX} lists records up to "
                f"{self._end:,}: it was cut short; restore it from a copy, or run supsup repair "
                "to go on with the tasks that are left"
            )
        if lost := self._whole_records_behind(self._end):
            raise StoreError(
                f"{self._file} has {len(lost)} whole record(s) behind a damaged one at byte "
                f"{self._end:,}: restore it from a copy, or run supsup repair to set them aside"
            )
        self._drop_partials()
        self._write_ends()

    def _write_ends(self, thorough=False):
        """Drops what lies behind the last record, completes the index, erases what was replaced."""
        if self._size() > self._end:
            os.ftruncate(self._records, self._end)
        if self._index_problems():
            system.flush(self._records)  # which a writer that was killed may not have done
            system.write_at(self._index, self._rows_from(0), 0)
            os.ftruncate(self._index, len(self._entries) * ENTRY_BYTES)
        if spans := self._to_erase(thorough):
            system.flush(self._index)
            self._erase(spans)


def _new_folder(path, may_hold=()):
    """Makes the folder `path`, where nothing is but for what it may hold."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to create {path.name} in")
    with files.allowed(path, writes=True):
        path.mkdir(exist_ok=True)
    if strange := [found.name for found in path.iterdir() if found.name not in may_hold]:
        what = "a store" if MANIFEST in strange else f"other files, such as {strange[0]}"
        raise FileExistsError(f"{path} holds {what}; name a new folder")


def read_manifest(path: str | os.PathLike) -> dict[str, Any]:
    """The manifest of the store in folder `path`. Raises as `TaskLog.open`."""
    file = Path(path) / MANIFEST
    if not Path(path).exists():
        raise FileNotFoundError(f"no store at {path}")
    if Path(path).is_file():
        raise FileNotFoundError(
            f"{path} is a file, and a store is a folder: supsup inspect says what the file is"
        )
    if not file.exists():
        raise FileNotFoundError(f"{path} is no store: the folder lacks {file.name}")
    with open(file, "rb") as stream:
        data = stream.read(_MAX_MANIFEST_BYTES + 1)
    manifest, rest = records.split_manifest(data, file)
    if rest:
        raise StoreError(f"{file} has {len(rest)} bytes too many: it is damaged")
    return manifest
