"""What befalls files: calls of the system that fail, processes that die, power that goes."""

import contextlib
import itertools
import os
import random
import struct
import types
from collections.abc import Callable, Iterator

from supsup_jax.stores import files, journal, records

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
    journal.os = files.os = records.os = Watched(before, names)
    try:
        yield
    finally:
        journal.os = files.os = records.os = os


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
    """What a disk is told, so that power may fail: bytes flushed, and writes pending."""

    def __init__(self):
        self.names: dict[int, str] = {}
        self.flushed: dict[str, bytearray] = {}
        self.pending: list[tuple[str, int | None, bytes]] = []  # file, offset (None: cut), data

    def watch(self, name: str, real: Callable, arguments: tuple):
        result = real(*arguments)
        if name == "open":
            self.names[result] = os.path.basename(arguments[0])
        elif name == "pwrite":
            fd, data, offset = arguments
            self.pending.append((self.names[fd], offset, bytes(data[:result])))
        elif name == "ftruncate":
            self.pending.append((self.names[arguments[0]], None, arguments[1]))
        elif name in ("fdatasync", "fsync"):
            file = self.names[arguments[0]]
            for written, offset, data in [p for p in self.pending if p[0] == file]:
                self.apply(self.flushed, written, offset, data)
            self.pending = [p for p in self.pending if p[0] != file]
        return result

    @staticmethod
    def apply(files, name, offset, data):
        content = files.setdefault(name, bytearray())
        if offset is None:
            del content[data:]
            return
        content.extend(bytes(max(0, offset + len(data) - len(content))))
        content[offset : offset + len(data)] = data

    def after_power_cut(self, rng: random.Random) -> dict[str, bytes]:
        """Some of the pending writes, whole or in blocks; where a block is missing, zeros."""
        files = {name: bytearray(content) for name, content in self.flushed.items()}
        for name, offset, data in self.pending:
            if rng.random() < 0.4:
                continue
            if offset is None or rng.random() < 0.3:
                self.apply(files, name, offset, data)
                continue
            # The size may be on disk, and blocks not.
            end = len(data) if rng.random() < 0.5 else rng.randrange(len(data) + 1)
            self.apply(files, name, offset, bytes(end))
            for start in range(0, end, BLOCK):
                if rng.random() < 0.7:
                    self.apply(files, name, offset + start, data[start : min(start + BLOCK, end)])
        return files


class PowerCut(BaseException):
    """Power fails now."""
