"""The two files of a store's folder: opened, locked, exchanged, and which records count in them."""

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from supsup_jax.stores import records, system
from supsup_jax.stores.records import ENTRY_BYTES, HEAD_BYTES, SHA_BYTES, Entry
from supsup_jax.types import StoreError

RECORDS, INDEX = "tasks.bin", "index.bin"
CLOSED = -1  # of a descriptor


@contextlib.contextmanager
def allowed(path: Path, writes: bool) -> Iterator[None]:
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
            error.errno, f"{os.strerror(error.errno or 0)}: not allowed to {wanted}", str(path)
        ) from error


class Files:
    """`tasks.bin` and `index.bin` of the folder `path`, open to read or, locked, also to write.

    folder: where that is, whatever the process's own folder becomes.
    timeout: seconds to wait for another writer. Raises StoreError while there is one, OSError.
    """

    def __init__(self, path: Path, writes: bool, timeout: float = 0.0):
        self.path, self.writes = path, writes
        self.folder = path.absolute()
        self._file = self.folder / RECORDS
        self._records = self._index = self._held = CLOSED
        self._entries = []
        self._open(timeout)

    def close(self) -> None:
        """Closes the files, and lets another write. Further calls do nothing."""
        for fd in (self._records, self._index):
            if fd != CLOSED:
                os.close(fd)
        if self._held != CLOSED:
            system.release(self._file.with_name(system.LOCK), self._held)
        self._records = self._index = self._held = CLOSED

    def _open(self, timeout):
        flags = os.O_RDWR if self.writes else os.O_RDONLY
        deadline = time.monotonic() + timeout
        try:
            with allowed(self.path, self.writes):
                while self._records == CLOSED or self._exchanged():
                    self.close()
                    self._records = system.open_file(self._file, flags)
                    if self.writes:
                        self._lock(deadline)
                        if not self._in_place():  # the lock of a file that others do not lock
                            self.close()
                            continue
                        if self._cut_short():
                            self._end_exchange()
                            continue
                    # A lost index is made again, but only by one who may write.
                    with contextlib.suppress(FileNotFoundError):
                        index, create = self._file.with_name(INDEX), os.O_CREAT * self.writes
                        self._index = system.open_file(index, flags | create)
        except BaseException:
            self.close()
            raise
        self._forget()

    def _forget(self):
        """Knows nothing of what the files hold."""
        self._entries: list[Entry | None] = []  # None where a damaged record must lie
        self._removed: set[int] = set()
        self._last: Entry | None = None  # of all places
        self._end = 0  # of that record
        self._rows: bytes | None = None  # the index as it was last read

    def _exchanged(self):
        """Whether compaction has put other files in the place of those that are open.

        It removes the index before and puts another there after: two that were opened before this
        is found false belong together.
        """
        if self._index == CLOSED and self._file.with_name(INDEX).exists():
            return True
        return self._in_place() is False  # of a folder moved or deleted: as it was

    def _in_place(self):
        """Whether the records that are open are the folder's; None where it has none."""
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._records), os.stat(self._file))
        return None

    def _lock(self, deadline):
        while not self._locked():
            if time.monotonic() >= deadline:
                left = ""
                if not system.HAS_FLOCK:
                    left = f"; if it died, delete {self.path / system.LOCK}"
                raise StoreError(
                    f"another writer has {self.path} open, and there can be one: wait for it, "
                    f"with timeout=SECONDS if you like, or open with mode='r'{left}"
                )
            time.sleep(0.02)

    def _locked(self):
        if system.HAS_FLOCK:
            return system.flocked(self._records)
        held = system.hold(self._file.with_name(system.LOCK))
        self._held = CLOSED if held is None else held
        return held is not None

    def _check_open(self, writes=False):
        if self._records == CLOSED:
            raise StoreError(f"{self.path} was closed; open it again")
        if writes and not self.writes:
            raise StoreError(f"{self.path} is open for reading only; open it with mode='a'")

    def _take_new(self):
        """Takes in what was written since the files were last looked at."""
        if not self.writes and self._withdrawn():
            self._forget()
        former, self._rows = self._rows, self._index_bytes()
        if self._rows != former:
            self._take_rows(self._rows, former or b"")
            # Of a record whose entry was lost, the place is between others, or at the end.
            if former is None or not self._rows.startswith(former):
                for gap in self._gaps():
                    self._take_all(self._whole_records(*gap))
        self._take_all(self._whole_records(self._end, self._size()))

    def _withdrawn(self):
        """Whether the last record is not there any more, as when appends together have failed."""
        if self._last is None:
            return False
        if not SHA_BYTES <= (end := self._last.end) <= self._size():  # or its entry is forged
            return True
        found = system.read_at(self._records, end - SHA_BYTES, SHA_BYTES)
        return found not in (self._last.sha256, records.ERASED)

    def _take_rows(self, rows, former):
        """Takes in the entries of the index, but for what is in `former` at the same place."""
        first = len(former) // ENTRY_BYTES if rows.startswith(former) else 0
        for place in range(first * ENTRY_BYTES, len(rows), ENTRY_BYTES):
            row, task = rows[place : place + ENTRY_BYTES], place // ENTRY_BYTES
            if row != former[place : place + ENTRY_BYTES]:
                entry = records.parse_entry(row, task)
                if entry and self._fits(task, entry):
                    self._take(task, entry)

    def _fits(self, task, entry):
        """Whether the record of `task` may be at `entry`: its head is, or nothing any more."""
        before = self._entries[task - 1] if 0 < task <= len(self._entries) else None
        if entry.offset == (before.end if before else 0) or entry.end > self._size():
            return True
        head = records.parse_head(system.read_at(self._records, entry.offset, HEAD_BYTES))
        return head is not None and (head.task, head.length) == (task, entry.length)

    def _take_all(self, found: Iterable[tuple[int, Entry]]):
        for task, entry in found:
            if entry.sha256 != records.ERASED:
                self._take(task, entry)

    def _take(self, task, entry):
        """Makes it that of `task`, unless a later one is known."""
        known = self._entries[task] if task < len(self._entries) else None
        if known and known.offset > entry.offset:
            return
        self._entries += [None] * (task + 1 - len(self._entries))
        self._entries[task] = entry
        if entry.end > self._end:
            self._end, self._last = entry.end, entry
        (self._removed.add if records.is_removal(task, entry) else self._removed.discard)(task)

    def _size(self):
        return os.fstat(self._records).st_size

    def _index_bytes(self):
        if self._index == CLOSED:
            return b""
        return system.read_at(self._index, 0, os.fstat(self._index).st_size)

    def _whole_record(self, offset):
        """Number and entry of the record at `offset`; None unless a whole or an erased one is."""
        # Places, lengths and numbers may be forged: the file's size bounds what is read and held.
        if offset >= (size := self._size()):
            return None
        head = records.parse_head(system.read_at(self._records, offset, HEAD_BYTES))
        if not head or offset + head.length > size or head.task > size // HEAD_BYTES:
            return None
        end = system.read_at(self._records, offset + head.length - SHA_BYTES, SHA_BYTES)
        if end != records.ERASED:
            data = system.read_at(self._records, offset, head.length)
            if records.checksum(memoryview(data)) is None:
                return None
        return head.task, Entry(offset, head.length, end)

    def _whole_records(self, offset, end):
        """As `_whole_record`, one behind another, as far as they go."""
        while offset < end and (found := self._whole_record(offset)):
            yield found
            offset = found[1].end

    def _whole_records_behind(self, offset):
        """Numbers of the whole records behind `offset`, where none is: what must not be dropped."""
        size = self._size()
        found, step = [], 1 << 24
        for start in range(offset, size, step):
            # Chunks overlap by what a magic spans.
            chunk = system.read_at(self._records, start, step + len(records.MAGIC) - 1)
            at = chunk.find(records.MAGIC)
            while at >= 0:
                whole = self._whole_record(start + at)
                if whole is not None and whole[1].sha256 != records.ERASED:
                    found.append(whole[0])
                at = chunk.find(records.MAGIC, at + 1)
        return found

    def _gaps(self):
        """(start, end) of the bytes between the records that count, before the last."""
        at = 0
        for entry in sorted(filter(None, self._entries)):
            if entry.offset > at:
                yield at, entry.offset
            at = max(at, entry.end)

    def _remains(self, thorough=False):
        """(offset, bytes, number) of what does not count and is not erased.

        number: of the task it was; None for what is no record. thorough: reads what was erased.
        """
        for start, end in self._gaps():
            while start < end:
                head = records.parse_head(system.read_at(self._records, start, HEAD_BYTES))
                if not head or start + head.length > end:
                    yield start, end - start, None
                    break
                behind = HEAD_BYTES if thorough else head.length - SHA_BYTES
                rest = system.read_at(self._records, start + behind, head.length - behind)
                if any(rest):
                    yield start, head.length, head.task
                start += head.length

    def _to_erase(self, thorough=False):
        """As `_remains`, of the records that others took the places of, and that can be read."""
        return [
            (at, length, task)
            for at, length, task in self._remains(thorough)
            if task is not None and self._replaced(task, at)
        ]

    def _replaced(self, task, offset):
        """Whether a whole record of that number lies behind the one at `offset`."""
        entry = self._entries[task] if task < len(self._entries) else None
        if entry is None or entry.offset <= offset:
            return False
        return self._whole_record(entry.offset) == (task, entry)

    def _listed(self):
        """How many entries the index has."""
        return os.fstat(self._index).st_size // ENTRY_BYTES

    def _rows_from(self, first):
        """The index from the entry of task `first` on, as it is to be."""
        known = enumerate(self._entries[first:], first)
        return b"".join(
            records.entry_bytes(task, entry) if entry else bytes(ENTRY_BYTES)
            for task, entry in known
        )

    def _index_problems(self):
        data = self._index_bytes()
        rows = [data[at : at + ENTRY_BYTES] for at in range(0, len(data), ENTRY_BYTES)]
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

    def _mend_head(self, task, entry):
        """Makes a damaged head anew, of a record that is damaged and shall go.

        Who goes without the index must find what lies behind it, and who comes after a crash what
        is to be erased.
        """
        head = records.parse_head(system.read_at(self._records, entry.offset, HEAD_BYTES))
        if head is None or (head.task, head.length) != (task, entry.length):
            system.write_at(self._records, records.blank_head(task, entry.length), entry.offset)
            system.flush(self._records)

    def _erase(self, spans: Sequence[tuple[int, int, int]], durable=True):
        """Overwrites records, by offset, length and number, with zeros, all but their heads.

        The checksum goes last: where it is zero, so is on the device what was before it.
        """
        for offset, length, _ in spans:
            rest = bytes(length - HEAD_BYTES - SHA_BYTES)
            system.write_at(self._records, rest, offset + HEAD_BYTES)
        system.flush(self._records)
        for offset, length, _ in spans:
            system.write_at(self._records, records.ERASED, offset + length - SHA_BYTES)
        if durable:
            system.flush(self._records)

    def _cut_back(self, listed, end):
        """Withdraws what lies behind, as far as the disk does it: of the index, then of records.

        In turn on the device: the index must not list what is not there.
        """
        for fd, size in ((self._index, listed * ENTRY_BYTES), (self._records, end)):
            with contextlib.suppress(OSError):
                if os.fstat(fd).st_size > size:
                    os.ftruncate(fd, size)
                    system.flush(fd)

    def _drop_partials(self):
        """Removes what a compaction that was cut short has left: tasks, and for good."""
        left = [self._partial(name) for name in (RECORDS, INDEX)]
        for file in (left := [file for file in left if file.exists()]):
            os.unlink(file)
        if left:
            system.flush_folder(self.folder)

    def _exchange(self):
        """Puts the files that a compaction has made in the places of the two."""
        tasks, index = (self._file.with_name(name) for name in (RECORDS, INDEX))
        # Never an index beside records that it does not list: a lost one is made again, from what
        # is beside it under another name.
        system.flush_folder(self.folder)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(index)
        system.flush_folder(self.folder)
        for file in (tasks, index):
            os.replace(self._partial(file.name), file)
            system.flush_folder(self.folder)

    def _cut_short(self):
        """Whether an exchange was, between its first step and its second: both files are made.

        The index is gone then, and without it what lies behind a damaged record is not found.
        """
        if self._file.with_name(INDEX).exists():
            return False
        try:
            tasks, index = (self._partial(name) for name in (RECORDS, INDEX))
            rows, size = index.read_bytes(), tasks.stat().st_size
        except FileNotFoundError:
            return False
        places = range(0, len(rows), ENTRY_BYTES)
        listed = [
            records.parse_entry(rows[at : at + ENTRY_BYTES], at // ENTRY_BYTES) for at in places
        ]
        last = listed[-1] if listed and None not in listed else None
        return last is not None and last.end == size

    def _end_exchange(self):
        if not system.HAS_FLOCK:  # no file that is open can be exchanged
            os.close(self._records)
            self._records = CLOSED
        self._exchange()

    def _partial(self, name):
        return self._file.with_name(f"{name}.partial")

    def _pack(self, read: Callable[[int, Entry | None], bytes | memoryview]):
        """Exchanges both files for ones of the records that count alone: all or nothing.

        read: number and entry -> the record's bytes.
        """
        tasks, index = (self._partial(name) for name in (RECORDS, INDEX))
        fd, packed, end = system.open_file(tasks, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), [], 0
        try:
            if system.HAS_FLOCK:
                system.flocked(fd)  # from the moment it is in place
            for task, entry in enumerate(self._entries):
                system.write_at(fd, read(task, entry), end)
                assert entry is not None  # else `read` has failed
                packed.append(entry._replace(offset=end))
                end += entry.length
            system.flush(fd)
            rows = b"".join(map(records.entry_bytes, range(len(packed)), packed))
            system.write_file(index, [rows], os.O_CREAT | os.O_TRUNC)
            for file, before in ((tasks, self._records), (index, self._index)):
                os.chmod(file, os.fstat(before).st_mode & 0o777)
        except BaseException:
            os.close(fd)
            self._drop_partials()
            raise
        former = [self._records, self._index]
        if not system.HAS_FLOCK:  # the other lock stays; no file that is open can be exchanged
            for each in (fd, *former):
                os.close(each)
            fd, former = None, []
            self._records = self._index = CLOSED
        try:
            self._exchange()
            index = system.open_file(self._file.with_name(INDEX), os.O_RDWR)
            if fd is None:
                fd = system.open_file(self._file, os.O_RDWR)
        except BaseException as error:
            if fd is not None:
                os.close(fd)
            self.close()  # to be opened again, which finds what there is
            if isinstance(error, PermissionError) and not system.HAS_FLOCK:
                raise OSError(
                    error.errno,
                    f"{os.strerror(error.errno or 0)}: a reader has the store open, and this "
                    "system exchanges no file that is: close it, and compact again",
                    str(self.path),
                ) from error
            raise
        for each in former:
            os.close(each)
        self._records, self._index = fd, index
        self._entries, self._end = packed, end
