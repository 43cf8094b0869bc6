"""What befalls files: calls of the system that fail, processes that die, power that goes."""

import contextlib
import itertools
import os
import random
import struct
import types
from collections.abc import Callable, Iterator
from pathlib import Path

from supsup_jax.stores import files, journal, records, repair, system

WATCHED = ("open", "pwrite", "fdatasync", "fsync", "ftruncate", "replace", "unlink")
BLOCK = 512


class Watched(types.SimpleNamespace):
    """The module os, each call of some functions routed through `before`."""

    def __init__(self, before: Callable, names: tuple[str, ...]):
        self._before, self._names, self._calls = before, names, itertools.count()

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in self._names:
            return real
        return lambda *arguments: self._before(next(self._calls), name, real, arguments)


@contextlib.contextmanager
def watching(before: Callable, names: tuple[str, ...] = WATCHED) -> Iterator[None]:
    """Routes what the journal asks of the system through `before(number, name, real, arguments)`.

    number: of the call, from 0.
    """
    watched = Watched(before, names)
    for module in (journal, files, records, repair, system):
        module.os = watched
    try:
        yield
    finally:
        for module in (journal, files, records, repair, system):
            module.os = os


def half_written(real: Callable, arguments: tuple) -> int:
    fd, data, offset = arguments
    return real(fd, data[: len(data) // 2], offset)


def forked(work: Callable[[int], None]) -> tuple[int, int]:
    """Runs `work(pipe)` in a child; returns its process number and the pipe to read from."""
    reading, writing = os.pipe()
    if child := os.fork():
        os.close(writing)
        return child, reading
    try:
        os.close(reading)
        work(writing)
    except BaseException:
        os._exit(1)
    os._exit(0)


def ended(child: int, reading: int) -> tuple[int, int]:
    """Waits for a child: the last number that it wrote to its pipe, and its exit status."""
    data = b""
    while chunk := os.read(reading, 1 << 16):
        data += chunk
    os.close(reading)
    _, status = os.waitpid(child, 0)
    whole = len(data) // 8 * 8
    return (struct.unpack_from("<Q", data, whole - 8)[0] if whole else 0), status


class Disk:
    """What a disk is told of a folder, so that power may fail: bytes and names, flushed or pending.

    Files count by number: one keeps its bytes when its name changes.
    """

    def __init__(self, folder: Path):
        self.names = {file.name: i for i, file in enumerate(folder.iterdir())}
        self.flushed_names, self.pending_names = dict(self.names), []  # name, its file or None
        self.flushed = {i: bytearray((folder / n).read_bytes()) for n, i in self.names.items()}
        self.pending: list[tuple[int, int | None, bytes]] = []  # file, offset (None: cut), data
        self.opened: dict[int, int | None] = {}  # None: the folder

    def watch(self, name: str, real: Callable, arguments: tuple):
        result = real(*arguments)
        if name == "open":
            file = Path(arguments[0])
            if not file.is_dir() and file.name not in self.names:
                self.rename(file.name, len(self.flushed))
                self.flushed[len(self.flushed)] = bytearray()
            self.opened[result] = self.names.get(file.name)
        elif name == "pwrite":
            fd, data, offset = arguments
            self.pending.append((self.opened[fd], offset, bytes(data[:result])))
        elif name == "ftruncate":
            self.pending.append((self.opened[arguments[0]], None, arguments[1]))
        elif name == "unlink":
            self.rename(Path(arguments[0]).name, None)
        elif name == "replace":
            old, new = (Path(path).name for path in arguments)
            self.rename(new, self.names[old])
            self.rename(old, None)
        elif name in ("fdatasync", "fsync"):
            self.flush(self.opened[arguments[0]])
        return result

    def rename(self, name: str, file: int | None) -> None:
        self.pending_names.append((name, file))
        self.names[name] = file
        if file is None:
            del self.names[name]

    def flush(self, file: int | None) -> None:
        if file is None:
            self.flushed_names.update(self.pending_names)
            self.pending_names = []
        for written, offset, data in self.pending:
            if written == file:
                self.apply(self.flushed[file], offset, data)
        self.pending = [p for p in self.pending if p[0] != file]

    @staticmethod
    def apply(content, offset, data):
        if offset is None:
            del content[data:]
            return
        content.extend(bytes(max(0, offset + len(data) - len(content))))
        content[offset : offset + len(data)] = data

    def after_power_cut(self, rng: random.Random) -> dict[str, bytes]:
        """Some of the pending names and of the pending writes.

        Those whole or in blocks; where a block is missing, what was there, or zeros.
        """
        kept = [renamed for renamed in self.pending_names if rng.random() < 0.5]
        names = self.flushed_names | dict(kept)
        files = {file: bytearray(content) for file, content in self.flushed.items()}
        for file, offset, data in self.pending:
            content = files[file]
            if rng.random() < 0.4:
                continue
            if offset is None or rng.random() < 0.3:
                self.apply(content, offset, data)
                continue
            # The size may be on disk, and blocks not.
            end = len(data) if rng.random() < 0.5 else rng.randrange(len(data) + 1)
            content.extend(bytes(max(0, offset + end - len(content))))
            for start in range(0, end, BLOCK):
                if rng.random() < 0.7:
                    self.apply(content, offset + start, data[start : min(start + BLOCK, end)])
        return {name: files[file] for name, file in names.items() if file is not None}

    def fail(self, folder: Path, rng: random.Random) -> None:
        """Leaves in the folder what is there after a power cut."""
        for file in folder.iterdir():
            file.unlink()
        for name, content in self.after_power_cut(rng).items():
            (folder / name).write_bytes(content)


class PowerCut(BaseException):
    """Power fails now."""
