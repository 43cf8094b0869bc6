"""What a store asks of the operating system, and what it does where a system has no such call.

Windows has no `flock`, no reads and writes at a place, no flush of a folder's names, and exchanges
or deletes no file that is open. On macOS `fsync` leaves bytes in the drive's own cache.
"""

import contextlib
import errno
import os
import threading
from collections.abc import Sequence
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = "writer.lock"  # a file that is there while a writer is, where there is no flock
HAS_FLOCK = fcntl is not None
_BINARY = getattr(os, "O_BINARY", 0)  # Windows would translate ends of lines
_seeking = threading.Lock()


def open_file(path: Path, flags: int, mode: int = 0o666) -> int:
    """As os.open, for bytes; the process's umask counts."""
    return os.open(path, flags | _BINARY, mode)


def read_at(fd: int, offset: int, size: int) -> bytes:
    """Up to `size` bytes, fewer only where the file ends."""
    data = _pread(fd, size, offset)
    if len(data) == size or not data:
        return data
    parts = [data]  # the system returns 2 GiB at most at a time
    while data and (size := size - len(data)):
        offset += len(data)
        data = _pread(fd, size, offset)
        parts.append(data)
    return b"".join(parts)


def write_at(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Writes all of it, which one call to the system need not."""
    left = memoryview(data)
    while left:
        written = _pwrite(fd, left, offset)
        left, offset = left[written:], offset + written


def _pread(fd, size, offset):
    if hasattr(os, "pread"):
        return os.pread(fd, size, offset)
    with _seeking:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.read(fd, size)


def _pwrite(fd, data, offset):
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, data, offset)
    with _seeking:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, data)


def write_file(path: Path, parts: Sequence[bytes], flags: int) -> None:
    """A file of these bytes, joined, flushed to the device."""
    fd = open_file(path, os.O_WRONLY | flags)
    try:
        offset = 0
        for part in parts:
            write_at(fd, part, offset)
            offset += len(part)
        _flush(fd, os.fsync)
    finally:
        os.close(fd)


def flush(fd: int) -> None:
    """Returns when the bytes of a file are on the device."""
    # Linux has the cheaper call, which leaves out what a reader does not need, such as times.
    _flush(fd, getattr(os, "fdatasync", os.fsync))


def _flush(fd, sync):
    if fcntl is not None and (whole := getattr(fcntl, "F_FULLFSYNC", None)):
        try:
            fcntl.fcntl(fd, whole)
            return
        except OSError as error:  # a drive, such as one of the network, that has no such call
            if error.errno not in (errno.ENOTSUP, errno.EINVAL, errno.ENOTTY):
                raise
    sync(fd)


def flush_folder(path: Path) -> None:
    """Returns when the names in a folder are on the device; at once where no call does that."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        _flush(fd, os.fsync)
    finally:
        os.close(fd)


def flocked(fd: int) -> bool:
    """Whether this process now has the lock of the file, which the system releases when it dies."""
    assert fcntl is not None  # HAS_FLOCK
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        return False
    return True


def hold(path: Path) -> int | None:
    """The descriptor of the new file `path`, to be let go by `release`; None where there is one.

    Windows deletes it when the process dies.
    """
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_TEMPORARY", 0)
    try:
        return os.open(path, flags, 0o666)
    except FileExistsError:
        return None
    except PermissionError:  # Windows's answer where it is being deleted
        if os.access(path.parent, os.W_OK):
            return None
        raise


def release(path: Path, fd: int) -> None:
    """Lets go of what `hold` gave."""
    if not hasattr(os, "O_TEMPORARY"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    os.close(fd)
