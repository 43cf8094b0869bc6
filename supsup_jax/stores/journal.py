"""An append-only folder of checksummed records: what a DiskStore is on disk. Knows bytes, no masks.

`docs/format.md` is the format's page, by which the folder can be read without this library:

    manifest.json   what the store belongs to, under its checksum; written once
    tasks.bin       the records of task 0, 1, ..., one behind another; the truth
    index.bin       64 bytes a record: where it is, and its checksum; follows from tasks.bin

*Durability.* An append writes the record, flushes it to the device, then enters it in the index. A
task counts from the moment its record is wholly there. What a crash leaves behind the last whole
record was never reported as appended; readers pass over it, and the next writer drops it. The
index need not be flushed: entries that a crash takes are made again from the records. It is there
so that opening reads 64 bytes a task, and so that records cut off at the end are missed.

*Concurrency.* One writer, held off by a lock on tasks.bin that the system releases when the writer
dies, and any number of readers, which take no lock: bytes that count never change.

Reads copy from the file, never map it: a mapped file that is cut short kills its readers.
"""

import contextlib
import errno
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from supsup_jax.stores import records
from supsup_jax.stores.records import ENTRY_BYTES, Entry, Record
from supsup_jax.types import StoreError, TaskIdError

MANIFEST, RECORDS, INDEX = "manifest.json", "tasks.bin", "index.bin"

_MAX_MANIFEST_BYTES = 1 << 24
_PARTIAL = MANIFEST + ".partial"

# Linux has the cheaper call, which leaves out what a reader does not need, such as times.
_flush = getattr(os, "fdatasync", os.fsync)


class Problem(NamedTuple):
    """What `verify` found. loses: whether a task cannot be read, which `repair` cannot mend."""

    file: str
    what: str
    loses: bool

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


@contextlib.contextmanager
def _allowed(path: Path, writes: bool) -> Iterator[None]:
    """Has an error of the system's say what it kept from happening, and what there is to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        wanted = "read the store there"
        if writes:
            wanted = "append there; open the store with mode 'r', or one where you may write"
        raise OSError(
            error.errno, f"{os.strerror(error.errno)}: not allowed to {wanted}", str(path)
        ) from error


class TaskLog:
    """The folder `path` of records 0, 1, ..., open for reading or also for appending.

    manifest: the JSON object that it was created with.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], writes: bool):
        self.path, self.manifest, self.writes = path, manifest, writes
        self._file = path / RECORDS
        self._entries: list[Entry | None] = []  # None where a damaged record must lie
        self._end = 0  # of the last record
        flags = os.O_RDWR if writes else os.O_RDONLY
        with _allowed(path, writes):
            self._records = os.open(path / RECORDS, flags)
            try:
                # A lost index is made again, but only by one who may write.
                self._index = os.open(path / INDEX, flags | (os.O_CREAT if writes else 0), 0o666)
            except FileNotFoundError:
                self._index = None
            except BaseException:
                os.close(self._records)
                raise

    @classmethod
    def create(cls, path: str | os.PathLike, manifest: dict[str, Any]) -> "TaskLog":
        """A new, empty folder, open for appending.

        Raises FileExistsError where a store or anything else is, FileNotFoundError for a missing
        parent, StoreError while another process creates it, OSError for the rest.
        """
        path = Path(path)
        if not path.parent.is_dir():
            raise FileNotFoundError(f"no folder {path.parent} to create {path.name} in")
        with _allowed(path, writes=True):
            path.mkdir(exist_ok=True)
        # A creation cut short leaves empty files and no manifest: a store that never was.
        unborn = {RECORDS, INDEX, _PARTIAL}
        if strange := [found.name for found in path.iterdir() if found.name not in unborn]:
            what = "a store" if MANIFEST in strange else f"other files, such as {strange[0]}"
            raise FileExistsError(f"{path} holds {what}; name a new folder")
        with _allowed(path, writes=True):
            records.write_file(path / RECORDS, [], os.O_CREAT)
        log = cls(path, manifest, writes=True)
        try:
            log._lock(0)
            if os.fstat(log._records).st_size or (path / MANIFEST).exists():
                raise FileExistsError(f"{path} holds the records of a store; name a new folder")
            text = records.signed_manifest(manifest)
            records.write_file(path / _PARTIAL, [text], os.O_CREAT | os.O_TRUNC)
            os.replace(path / _PARTIAL, path / MANIFEST)
            for folder in (path, path.parent):
                records.flush_folder(folder)
        except BaseException:
            log.close()
            raise
        return log

    @classmethod
    def open(cls, path: str | os.PathLike, writes: bool = False, timeout: float = 0.0) -> "TaskLog":
        """The folder at `path`.

        writes: also to append. First drops what a crash left unfinished, and completes the index.
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
        log = cls(path, manifest, writes)
        try:
            if writes:
                log._lock(timeout)
            log.refresh()
            if writes:
                log._mend()
        except BaseException:
            log.close()
            raise
        return log

    def __len__(self) -> int:
        return len(self._entries)

    def append(self, metadata: dict[str, Any], body: Sequence[Any], *, durable: bool = True) -> int:
        """Adds one record and returns its number.

        metadata: a JSON object. body: buffers, joined.
        durable: return when the record is on the device; otherwise call `flush` in the end.
        Raises StoreError unless open for appending; OSError when the disk is full or fails, and
        then the folder holds what it held.
        """
        self._check_open(writes=True)
        task = len(self._entries)
        data = records.record_bytes(task, metadata, body)
        entry = Entry(self._end, len(data), data[-records.SHA_BYTES :])
        try:
            records.write_at(self._records, data, entry.offset)
            if durable:
                _flush(self._records)
            records.write_at(self._index, records.entry_bytes(task, entry), task * ENTRY_BYTES)
        except BaseException as error:  # an interrupt, too: nothing half-written stays
            with contextlib.suppress(OSError):
                os.ftruncate(self._records, entry.offset)
                os.ftruncate(self._index, task * ENTRY_BYTES)
            if not isinstance(error, OSError):
                raise
            raise OSError(
                error.errno,
                f"{os.strerror(error.errno)}: task {task} was not appended, the store holds the "
                f"{task} tasks it held",
                str(self.path),
            ) from error
        self._take(entry)
        return task

    def flush(self) -> None:
        """Returns when every record is on the device."""
        self._check_open(writes=True)
        _flush(self._records)

    def read(self, i: int) -> Record:
        """Record i, once its checksum is seen to be right.

        Raises TaskIdError, an IndexError, unless 0 <= i < len(self), StoreError when it is damaged.
        """
        self._check_open()
        if not 0 <= i < len(self._entries):
            raise TaskIdError(f"task {i} is not in {self.path}, which holds {len(self)}")
        entry, file = self._entries[i], self._file
        if entry is None:
            raise StoreError(
                f"{file}: the record of task {i} is damaged, and so is its entry in {INDEX}; "
                "restore the file from a copy"
            )
        if entry.end > (size := os.fstat(self._records).st_size):
            raise StoreError(
                f"{file} was cut short: it has {size:,} bytes, and the record of task {i} needs "
                f"those from {entry.offset:,} to {entry.end:,}"
            )
        data = memoryview(records.read_at(self._records, entry.offset, entry.length))
        if records.checksum(data) != entry.sha256:
            raise StoreError(
                f"{file}: the record of task {i}, {entry.length:,} bytes at {entry.offset:,}, "
                "does not match its checksum: it is damaged"
            )
        return records.parse_record(data, i, file)

    def refresh(self) -> int:
        """Takes in what was appended since, by any process, and returns how many records there are.

        Records that count now count for ever: this only adds.
        """
        self._check_open()
        start = len(self._entries)
        rows = [
            records.parse_entry(row, start + i) for i, row in enumerate(self._index_rows(start))
        ]
        while rows and rows[-1] is None:  # nothing is known of the last ones
            rows.pop()
        for row in rows:
            after_gap = bool(self._entries) and self._entries[-1] is None
            if row is None or not (row.offset == self._end or after_gap):
                row = self._whole_record(self._end, len(self._entries))
            self._take(row)
        while found := self._whole_record(self._end, len(self._entries)):
            self._take(found)
        return len(self._entries)

    def _take(self, entry):
        self._entries.append(entry)
        self._end = entry.end if entry else self._end

    def verify(self) -> list[Problem]:
        """Every byte of the folder against its checksum, and what is wrong with it. Empty: nothing.

        Meant for a folder that nobody writes to meanwhile.
        """
        self.refresh()
        problems = []
        for task in range(len(self)):
            try:
                self.read(task)
            except StoreError as error:
                what = str(error).removeprefix(f"{self._file}: ")
                problems.append(Problem(RECORDS, what, loses=True))
        tail = os.fstat(self._records).st_size - self._end
        if tail > 0 and (lost := self._whole_records_behind(self._end)):
            what = f"{lost} whole record(s) lie behind a damaged one at byte {self._end:,}"
            problems.append(Problem(RECORDS, what, loses=True))
        elif tail > 0:
            what = f"{tail:,} bytes of an unfinished record lie behind the last whole task"
            problems.append(Problem(RECORDS, what, loses=False))
        problems += [Problem(INDEX, what, loses=False) for what in self._index_problems()]
        return problems

    def close(self) -> None:
        """Closes the files, and lets another write. Further calls do nothing."""
        for fd in (self._records, self._index):
            if fd is not None:
                os.close(fd)
        self._records = self._index = None

    def _check_open(self, writes=False):
        if self._records is None:
            raise StoreError(f"{self.path} was closed; open it again")
        if writes and not self.writes:
            raise StoreError(f"{self.path} is open for reading only; open it with mode='a'")

    def _lock(self, timeout):
        import fcntl  # POSIX only; reading needs no lock

        deadline = time.monotonic() + timeout
        while True:
            try:
                return fcntl.flock(self._records, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                if time.monotonic() >= deadline:
                    raise StoreError(
                        f"another writer has {self.path} open, and there can be one: wait for it, "
                        "with timeout=SECONDS if you like, or open with mode='r'"
                    ) from None
            time.sleep(0.02)

    def _mend(self):
        """Makes the folder end with its last whole record, and the index say what is there."""
        size = os.fstat(self._records).st_size
        if size < self._end:
            raise StoreError(
                f"{self._file} has {size:,} bytes, and {INDEX} lists records up to "
                f"{self._end:,}: it was cut short; restore it from a copy, or run supsup repair "
                "to go on with the tasks that are left"
            )
        if lost := self._whole_records_behind(self._end):
            raise StoreError(
                f"{self._file} has {lost} whole record(s) behind a damaged one at byte "
                f"{self._end:,}: restore it from a copy, or run supsup repair to set them aside"
            )
        self._write_ends()

    def _write_ends(self):
        """Drops what lies behind the last record, and completes the index."""
        if os.fstat(self._records).st_size > self._end:
            os.ftruncate(self._records, self._end)
        if self._index_problems():
            rows = [
                records.entry_bytes(task, entry)
                if entry
                else records.read_at(self._index, task * ENTRY_BYTES, ENTRY_BYTES)
                for task, entry in enumerate(self._entries)
            ]
            records.write_at(self._index, b"".join(rows), 0)
            os.ftruncate(self._index, len(rows) * ENTRY_BYTES)

    def _index_rows(self, start):
        """The whole and the last, cut-off entry of the index, from number `start` on."""
        if self._index is None:
            return []
        size = max(0, os.fstat(self._index).st_size - start * ENTRY_BYTES)
        data = records.read_at(self._index, start * ENTRY_BYTES, size)
        return [data[i : i + ENTRY_BYTES] for i in range(0, len(data), ENTRY_BYTES)]

    def _index_problems(self):
        rows = self._index_rows(0)
        found = []
        for task, entry in enumerate(self._entries):
            if task >= len(rows):
                missing = len(self._entries) - task
                found.append(f"lacks the entries of the last {missing} task(s), from {task} on")
                break
            if entry is None or rows[task] != records.entry_bytes(task, entry):
                found.append(f"the entry of task {task} is damaged")
        if len(rows) > len(self._entries):
            found.append(f"has {len(rows) - len(self._entries)} entries of no whole record")
        return found

    def _whole_record(self, offset, task=None):
        """The entry of the record of `task`, or of any, at `offset`; None unless a whole one is."""
        head = records.read_at(self._records, offset, records.HEAD_BYTES)
        length = records.record_length(head, task)
        # The length may be forged, so the file's own bounds what is read.
        if length is None or offset + length > os.fstat(self._records).st_size:
            return None
        data = memoryview(records.read_at(self._records, offset, length))
        sha256 = records.checksum(data)
        return Entry(offset, length, sha256) if sha256 else None

    def _whole_records_behind(self, offset):
        """How many whole records lie behind `offset`, where none is: what must not be dropped."""
        size = os.fstat(self._records).st_size
        found, step = 0, 1 << 24
        for start in range(offset, size, step):
            # Chunks overlap by what a magic spans.
            chunk = records.read_at(self._records, start, step + len(records.MAGIC) - 1)
            at = chunk.find(records.MAGIC)
            while at >= 0:
                found += self._whole_record(start + at) is not None
                at = chunk.find(records.MAGIC, at + 1)
        return found


def repair(path: str | os.PathLike, timeout: float = 0.0) -> list[str]:
    """Makes the store at `path` one that can be appended to, and says what was done.

    Drops an unfinished record at the end; makes the index again from the records; forgets tasks
    whose records were cut off, which are gone; sets aside, in a file beside the others, what lies
    behind a damaged record whose length nobody knows. A whole task is never dropped, and a damaged
    one in the midst keeps its number. Raises as `TaskLog.open`.
    """
    done = []
    log = TaskLog(Path(path), read_manifest(path), writes=True)
    try:
        log._lock(timeout)
        log.refresh()
        size, listed = os.fstat(log._records).st_size, len(log)
        while log._end > size:
            log._entries.pop()
            log._end = max((entry.end for entry in log._entries if entry), default=0)
        if len(log) < listed:
            done.append(f"forgot tasks {len(log)} to {listed - 1}: {RECORDS} was cut off there")
        if size > log._end:
            tail = f"{size - log._end:,} bytes behind task {len(log) - 1}"
            if log._whole_records_behind(log._end):
                aside = log.path / f"aside-{log._end}.bin"
                data = records.read_at(log._records, log._end, size - log._end)
                records.write_file(aside, [data], os.O_CREAT | os.O_EXCL)
                done.append(f"set aside in {aside.name}: {tail}, with whole records among them")
            else:
                done.append(f"dropped {tail}, of an unfinished record")
        done += [f"mended {INDEX}: {what}" for what in log._index_problems()]
        log._write_ends()
    finally:
        log.close()
    return done


def read_manifest(path: str | os.PathLike) -> dict[str, Any]:
    """The manifest of the store in folder `path`. Raises as `TaskLog.open`."""
    file = Path(path) / MANIFEST
    if not file.exists():
        kind = "is a file, not" if Path(path).is_file() else "holds no"
        raise FileNotFoundError(f"{path} {kind} a store's folder: there is no {file.name} in it")
    with open(file, "rb") as stream:
        data = stream.read(_MAX_MANIFEST_BYTES + 1)
    manifest, rest = records.split_manifest(data, file)
    if rest:
        raise StoreError(f"{file} has {len(rest)} bytes too many: it is damaged")
    return manifest
