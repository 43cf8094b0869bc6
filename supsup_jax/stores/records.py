"""A record, an entry of the index and a manifest as bytes, and a file of one record.

Knows bytes and JSON, no masks; `docs/format.md` is the page. `journal` keeps many in a folder.
"""

import hashlib
import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from supsup_jax.stores import system
from supsup_jax.types import StoreError

MAGIC = b"SSRC"
_HEAD = struct.Struct("<4sIQQ")  # magic, bytes of the metadata, bytes of the body, task
_ENTRY = struct.Struct("<QQQ32s")  # task, offset, bytes of the record, its sha256
_CHECK_BYTES = 8
SHA_BYTES = 32
HEAD_BYTES = _HEAD.size + _CHECK_BYTES
ENTRY_BYTES = _ENTRY.size + _CHECK_BYTES
LEAST_BYTES = HEAD_BYTES + SHA_BYTES  # of a record
_ALIGN = 64  # where a body starts in its record
ERASED = bytes(SHA_BYTES)  # in place of its checksum: the record does not count any more
REMOVED = {"removed": True}  # the metadata of a task that was removed; it has no body
_FIRST_BYTES = 4096  # most metadata is shorter


class Record(NamedTuple):
    """One task's record, unharmed. body: the buffers it was written from, joined."""

    metadata: dict[str, Any]
    body: memoryview


class Entry(NamedTuple):
    """Where a record lies, and its checksum."""

    offset: int
    length: int
    sha256: bytes

    @property
    def end(self) -> int:
        """Of the record: where the next may begin."""
        return self.offset + self.length


class Head(NamedTuple):
    """Of a record: the task's number, the bytes of the metadata and those of the whole record."""

    task: int
    text_bytes: int
    length: int


def record_bytes(task: int, metadata: dict[str, Any], body: Sequence[Any]) -> bytes:
    """The record of `task`. metadata: a JSON object. body: buffers, to be joined."""
    text = json.dumps(metadata, separators=(",", ":")).encode()
    text += b" " * (-(HEAD_BYTES + len(text)) % _ALIGN)
    body = [memoryview(part).cast("B") for part in body]
    parts = [_head_bytes(task, len(text), sum(map(len, body))), text, *body]
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    return b"".join([*parts, whole.digest()])


def blank_head(task: int, length: int) -> bytes:
    """The head of a record of `length` bytes that says no more than the number."""
    return _head_bytes(task, 0, length - LEAST_BYTES)


def _head_bytes(task, text_bytes, body_bytes):
    head = _HEAD.pack(MAGIC, text_bytes, body_bytes, task)
    return head + sha256(head)[:_CHECK_BYTES]


def checksum(record: memoryview) -> bytes | None:
    """The sha256 at the end of a record, where it is that of the bytes before."""
    end = bytes(record[-SHA_BYTES:])
    return end if sha256(record[:-SHA_BYTES]) == end else None


def removal(task: int) -> bytes:
    """The record of a task that was removed: follows from its number."""
    return record_bytes(task, REMOVED, [])


def is_removal(task: int, entry: Entry) -> bool:
    """Whether the entry is that of `removal(task)`."""
    record = removal(task) if entry.length <= 2 * _ALIGN else b""
    return (entry.length, entry.sha256) == (len(record), record[-SHA_BYTES:])


def parse_head(head: bytes | memoryview) -> Head | None:
    """What the first bytes of a record say; None where they are none of a record."""
    head = head[:HEAD_BYTES]
    if len(head) != HEAD_BYTES or sha256(head[: _HEAD.size])[:_CHECK_BYTES] != head[_HEAD.size :]:
        return None
    magic, text_bytes, body_bytes, task = _HEAD.unpack_from(head)
    if magic != MAGIC:
        return None
    return Head(task, text_bytes, HEAD_BYTES + text_bytes + body_bytes + SHA_BYTES)


def parse_record(data: memoryview, task: int, file: Path) -> Record:
    """The record of `task` in `data`, whose checksum is right: what fails here was forged."""
    head = parse_head(data)
    if head is None or (head.task, head.length) != (task, len(data)):
        raise StoreError(f"{file}: the record of task {task} has a head that makes no sense")
    body = HEAD_BYTES + head.text_bytes
    return Record(_parse_metadata(data[HEAD_BYTES:body], task, file), data[body:-SHA_BYTES])


def read_metadata(fd: int, entry: Entry, task: int, file: Path) -> dict[str, Any]:
    """The metadata of the record of `task` at `entry`, without a look at its body or checksum."""
    data = system.read_at(fd, entry.offset, min(entry.length, _FIRST_BYTES))
    head = parse_head(data)
    if head is None or (head.task, head.length) != (task, entry.length):
        raise StoreError(f"{file}: the record of task {task} has a head that makes no sense")
    text = data[HEAD_BYTES : HEAD_BYTES + head.text_bytes]
    if len(text) < head.text_bytes:
        text = system.read_at(fd, entry.offset + HEAD_BYTES, head.text_bytes)
    return _parse_metadata(text, task, file)


def _parse_metadata(text, task, file):
    try:
        metadata = json.loads(bytes(text))
        if not isinstance(metadata, dict):
            raise ValueError(f"it is a {type(metadata).__name__}")
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{file}: the metadata of task {task} makes no sense: {error}") from error
    return metadata


def entry_bytes(task: int, entry: Entry) -> bytes:
    """The entry of `task` in the index."""
    row = _ENTRY.pack(task, *entry)
    return row + sha256(row)[:_CHECK_BYTES]


def parse_entry(row: bytes, task: int) -> Entry | None:
    """The entry in 64 bytes of the index; None unless it is that of `task`, unharmed."""
    if len(row) != ENTRY_BYTES or sha256(row[: _ENTRY.size])[:_CHECK_BYTES] != row[_ENTRY.size :]:
        return None
    number, *fields = _ENTRY.unpack_from(row)
    return Entry(*fields) if number == task else None


def signed_manifest(manifest: dict[str, Any]) -> bytes:
    """A manifest's line, and that of its checksum."""
    text = json.dumps(manifest).encode()
    return text + b"\n" + sha256(text).hex().encode() + b"\n"


def sha256(data: bytes | memoryview) -> bytes:
    """The 32 bytes of its digest."""
    return hashlib.sha256(data).digest()


def split_manifest(data: bytes, file: Path) -> tuple[dict[str, Any], memoryview]:
    """A manifest, and what follows it in `data`. Raises StoreError, naming `file`."""
    text = data[: data.find(b"\n")]
    check, rest = data[len(text) + 1 : len(text) + 66], memoryview(data)[len(text) + 66 :]
    if check != sha256(text).hex().encode() + b"\n":
        raise StoreError(
            f"{file} does not match its checksum: it is damaged, or of something else; restore it "
            "from a copy"
        )
    try:
        manifest = json.loads(text)
        if not isinstance(manifest, dict):
            raise ValueError(f"it is a {type(manifest).__name__}")
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{file} makes no sense: {error}") from error
    return manifest, rest


def write_alone(
    path: str | os.PathLike,
    manifest: dict[str, Any],
    metadata: dict[str, Any],
    body: Sequence[Any],
    overwrite: bool = False,
) -> None:
    """One record as a file of its own, under its manifest: what `read_alone` takes back.

    Written beside its final name, flushed to disk, then renamed: whatever happens, `path` holds
    what it held or the whole new file, and nothing half-written stays.
    Raises FileExistsError where something is, unless it is to be overwritten, FileNotFoundError for
    a missing folder, OSError for the rest.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name the file to write")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; pass overwrite=True to replace it, or name another")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to save {path.name} in; create it first")
    # Of this process alone: two that save to one path shall not write one file.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        whole = [signed_manifest(manifest), record_bytes(0, metadata, body)]
        system.write_file(partial, whole, os.O_CREAT | os.O_TRUNC)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    system.flush_folder(path.parent)


def read_alone(path: str | os.PathLike) -> tuple[dict[str, Any], Record]:
    """The manifest and the record of a file of `write_alone`.

    Raises FileNotFoundError, and StoreError when it is damaged or something else.
    """
    path = Path(path)
    manifest, data = split_manifest(path.read_bytes(), path)
    if len(data) < LEAST_BYTES or checksum(data) is None:
        raise StoreError(
            f"{path}: the record in it does not match its checksum: it is damaged or cut short; "
            "restore it from a copy"
        )
    return manifest, parse_record(data, 0, path)
