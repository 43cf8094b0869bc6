"""The folder of records: what it holds, refuses and mends. Kills and cuts: `test_stress_store`."""

import contextlib
import errno
import hashlib
import json
import os
import random
import struct

import pytest

import supsup_jax as ss
from supsup_jax.stores import records
from supsup_jax.stores.journal import TaskLog
from supsup_jax.stores.records import sha256
from supsup_jax.stores.repair import repair
from tests.stress.accidents import Disk, PowerCut, watching

MANIFEST = {"format": "test", "answer": 42}
BODIES = [b"first", b"", bytes(range(256)) * 300]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "log"
    with_records(path, BODIES)
    return path


def with_records(path, bodies):
    log = TaskLog.create(path, MANIFEST)
    for i, body in enumerate(bodies):
        assert log.append({"name": f"task {i}"}, [body]) == i
    log.close()


def bodies(path, **options):
    log = TaskLog.open(path, **options)
    try:
        return [bytes(log.read(i).body) for i in range(len(log))]
    finally:
        log.close()


def change(file, at, new):
    """Bytes of a file replaced."""
    data = bytearray(file.read_bytes())
    data[at : at + len(new)] = new
    file.write_bytes(data)


def cut(file, size):
    file.write_bytes(file.read_bytes()[:size])


def test_round_trip(path):
    log = TaskLog.open(path)
    assert (len(log), log.manifest, log.verify()) == (3, MANIFEST, [])
    for i, body in enumerate(BODIES):
        assert (log.read(i).metadata, bytes(log.read(i).body)) == ({"name": f"task {i}"}, body)


def test_the_folder_reads_as_its_page_says(path):
    """`docs/format.md`, followed without the library."""
    text, check = (path / "manifest.json").read_bytes().splitlines()
    assert hashlib.sha256(text).hexdigest() == check.decode()
    assert json.loads(text) == MANIFEST
    data, index = (path / "tasks.bin").read_bytes(), (path / "index.bin").read_bytes()
    offset = 0
    for task, body in enumerate(BODIES):
        magic, text_bytes, body_bytes, number = struct.unpack_from("<4sIQQ", data, offset)
        assert (magic, number, body_bytes) == (b"SSRC", task, len(body))
        assert data[offset + 24 : offset + 32] == sha256(data[offset : offset + 24])[:8]
        start = offset + 32 + text_bytes
        assert (start - offset) % 64 == 0
        assert json.loads(data[offset + 32 : start])["name"] == f"task {task}"
        end = start + body_bytes
        assert data[start:end] == body
        assert data[end : end + 32] == sha256(data[offset:end])
        row = index[64 * task : 64 * task + 64]
        assert struct.unpack_from("<QQQ", row) == (task, offset, end + 32 - offset)
        assert row[24:56] == data[end : end + 32]
        assert row[56:] == sha256(row[:56])[:8]
        offset = end + 32
    assert offset == len(data)
    assert len(index) == 64 * len(BODIES)


def test_an_append_costs_its_own_bytes(path):
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    log = TaskLog.open(path, writes=True)
    log.append({}, [b"more"])
    for name, content in before.items():
        assert (path / name).read_bytes().startswith(content)
    assert (path / "manifest.json").read_bytes() == before["manifest.json"]
    assert (path / "tasks.bin").stat().st_size - len(before["tasks.bin"]) == 64 + 4 + 32


@pytest.mark.parametrize("torn", [1, 24, 31, 32, 70, -1])
def test_an_unfinished_record_is_passed_over_and_dropped(path, torn):
    log = TaskLog.open(path, writes=True)
    log.append({}, [b"unfinished" * 50])
    log.close()
    start, end = log._entries[-1].offset, log._entries[-1].end
    left = torn % (end - start)
    cut(path / "tasks.bin", start + left)
    cut(path / "index.bin", 3 * 64)
    assert bodies(path) == BODIES
    (problem,) = TaskLog.open(path).verify()
    assert str(problem) == (
        f"tasks.bin: {left} bytes of an unfinished record lie behind the last whole task"
    )
    assert not problem.loses
    if torn % 2:  # repaired by a writer, or by name
        (done,), loses = repair(path)
        assert not loses and done.startswith(f"dropped {left} bytes behind task 2")
    assert bodies(path, writes=True) == BODIES
    assert TaskLog.open(path).verify() == []
    assert (path / "tasks.bin").stat().st_size == start


SPOILT = {"lost": lambda file: file.unlink()}
SPOILT |= {f"cut at {n}": lambda file, n=n: cut(file, n) for n in (0, 1, 64, 100, 128, 191)}
SPOILT |= {f"entry {i}": lambda file, i=i: change(file, 64 * i + 9, b"!") for i in range(3)}


@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_index_is_made_again_from_the_records(path, how):
    whole = (path / "index.bin").read_bytes()
    SPOILT[how](path / "index.bin")
    assert bodies(path) == BODIES
    problems = TaskLog.open(path).verify()
    assert problems and all(p.file == "index.bin" and not p.loses for p in problems)
    assert bodies(path, writes=True) == BODIES
    assert (path / "index.bin").read_bytes() == whole
    assert TaskLog.open(path).verify() == []


@pytest.mark.parametrize("task", range(3))
def test_a_damaged_record_is_named_and_the_others_read(path, task):
    log = TaskLog.open(path)
    change(path / "tasks.bin", log._entries[task].offset + 40, b"\xff")
    for i in range(3):
        if i != task:
            assert log.read(i).body == BODIES[i]
    with pytest.raises(ss.StoreError, match=rf"tasks.bin: the record of task {task}.*damaged"):
        log.read(task)
    (problem,) = log.verify()
    assert problem.loses and f"task {task}" in problem.what
    # A writer may go on behind it, and drops nothing.
    log = TaskLog.open(path, writes=True)
    assert log.append({}, [b"new"]) == 3
    assert log.read(3).body == b"new"


def test_appends_together_are_all_there_or_none(path):
    log, reader = TaskLog.open(path, writes=True), TaskLog.open(path)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    for error in (OSError, KeyboardInterrupt):
        with pytest.raises(error), log.together():
            for _ in range(2):
                log.append({}, [b"a task that is withdrawn"], durable=False)
            assert reader.refresh() == 5
            raise error
        assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    with pytest.raises(ss.types.TaskIdError, match="task 3 is not in"):
        reader.read(3)
    reader = TaskLog.open(path)
    another = TaskLog.open(path)
    with pytest.raises(KeyboardInterrupt), log.together():
        for _ in range(4):
            log.append({}, [b"a task that is withdrawn"], durable=False)
        assert reader.refresh() == another.refresh() == 7
        raise KeyboardInterrupt
    with log.together():
        assert [log.append({}, [b"%d" % i * 999], durable=False) for i in range(3, 6)] == [3, 4, 5]
    assert TaskLog.open(path).ids == list(range(6))
    assert another.refresh() == 6 and len(another.ids) == 6  # though the file is longer again
    assert [bytes(reader.read(i).body) for i in range(3, 6)] == [b"%d" % i * 999 for i in (3, 4, 5)]
    assert reader.verify() != []  # before the flush that is due
    log.flush()
    assert reader.verify() == log.verify() == []


def test_a_reader_finds_a_record_whose_entry_is_damaged(path):
    reader = TaskLog.open(path)
    with contextlib.closing(TaskLog.open(path, writes=True)) as log:
        for body in (b"one", b"two"):
            log.append({}, [body])
    change(path / "index.bin", 3 * 64 + 9, b"!")
    assert reader.refresh() == 5
    assert [reader.read(i).body for i in (3, 4)] == [b"one", b"two"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_is_appended_after_others_were_withdrawn_survives_a_power_cut(tmp_path, error):
    """The index lists at no time what is not on the device, whatever of it the device has."""
    for seed in range(60):
        path, rng = tmp_path / f"{seed}", random.Random(seed)
        with_records(path, BODIES)
        disk = Disk(path)
        with watching(lambda _, *call, disk=disk: disk.watch(*call)):
            log = TaskLog.open(path, writes=True)
            with contextlib.suppress(error), log.together():
                for _ in range(3):
                    log.append({}, [b"withdrawn" * 70], durable=False)
                if rng.random() < 0.5:
                    log.flush()
                raise error
            for i in range(3):
                log.append({}, [b"%d" % i * 300])
        disk.fail(path, rng)
        with contextlib.closing(TaskLog.open(path, writes=True)) as again:
            assert [again.read(3 + i).body for i in range(3)] == [b"%d" % i * 300 for i in range(3)]


def test_closing_flushes_what_is_due(path):
    with contextlib.closing(TaskLog.open(path, writes=True)) as log:
        log.append({}, [b"one"], durable=False)
    assert TaskLog.open(path).verify() == []


def test_what_a_killed_writer_has_not_flushed_is_before_it_is_listed(tmp_path):
    for seed in range(40):
        path = tmp_path / f"{seed}"
        with_records(path, BODIES)
        disk = Disk(path)

        log, calls = TaskLog.open(path, writes=True), []

        def until_the_flush(_, name, real, arguments, disk=disk, calls=calls):
            calls.append(name)
            if "fdatasync" in calls:
                raise PowerCut
            return disk.watch(name, real, arguments)

        disk.opened |= {log._records: disk.names["tasks.bin"], log._index: disk.names["index.bin"]}
        with contextlib.suppress(PowerCut), watching(until_the_flush):
            log.append({}, [b"last" * 200])
        log.close()
        with watching(lambda _, *call, disk=disk: disk.watch(*call)):
            TaskLog.open(path, writes=True).close()
        assert "fdatasync" in calls
        disk.fail(path, random.Random(seed))
        assert bodies(path, writes=True)[:3] == BODIES


def test_one_writer_at_a_time(path):
    first = TaskLog.open(path, writes=True)
    with pytest.raises(ss.StoreError, match=r"another writer has .* open"):
        TaskLog.open(path, writes=True)
    assert bodies(path) == BODIES
    first.close()
    assert bodies(path, writes=True, timeout=1.0) == BODIES


def test_readers_see_what_is_appended(path):
    reader, writer = TaskLog.open(path), TaskLog.open(path, writes=True)
    for i in range(3, 6):
        writer.append({}, [b"more"], durable=False)
        assert len(reader) == i
        assert reader.refresh() == i + 1
        assert reader.read(i).body == b"more"


def test_a_manifest_that_was_lost_is_not_made_anew(path):
    (path / "manifest.json").unlink()
    with pytest.raises(FileExistsError, match="holds the records of a store"):
        TaskLog.create(path, MANIFEST)


def test_a_closed_log_says_so(path):
    log = TaskLog.open(path)
    log.close()
    log.close()
    with pytest.raises(ss.StoreError, match="closed"):
        log.read(0)
    log = TaskLog.open(path)
    with pytest.raises(ss.StoreError, match="reading only"):
        log.append({}, [b""])
    with pytest.raises(IndexError, match="task 3 is not in"):
        log.read(3)


def test_forged_lengths_are_not_believed(path):
    """A head that claims 2**60 bytes, and is signed, asks for no memory."""
    offset = TaskLog.open(path)._entries[2].offset
    head = struct.pack("<4sIQQ", b"SSRC", 32, 1 << 60, 2)
    change(path / "tasks.bin", offset, head + sha256(head)[:8])
    cut(path / "index.bin", 128)
    assert bodies(path) == BODIES[:2]
    row = struct.pack("<QQQ32s", 2, offset, 1 << 60, bytes(32))
    with open(path / "index.bin", "ab") as file:
        file.write(row + sha256(row)[:8])
    log = TaskLog.open(path)
    with pytest.raises(ss.StoreError, match="cut short"):
        log.read(2)


@pytest.mark.parametrize("text", [b"[]", b"nonsense", b"[" * 100_000, b'"text"', b"\xff\xfe"])
def test_forged_json_is_refused(path, text):
    (path / "manifest.json").write_bytes(text + b"\n" + sha256(text).hex().encode() + b"\n")
    with pytest.raises(ss.StoreError, match="makes no sense"):
        TaskLog.open(path)


def test_a_record_alone_in_a_file(tmp_path):
    alone = tmp_path / "task.ssrc"
    records.write_alone(alone, MANIFEST, {"name": "alone"}, [b"bo", b"dy"])
    manifest, record = records.read_alone(alone)
    assert (manifest, record.metadata, bytes(record.body)) == (MANIFEST, {"name": "alone"}, b"body")
    with pytest.raises(FileExistsError):
        records.write_alone(alone, MANIFEST, {}, [])
    assert [file.name for file in tmp_path.iterdir()] == ["task.ssrc"]


@pytest.fixture
def as_a_stranger(path):
    """As a user who may read the folder, but not write to it."""
    for file in (path, *path.iterdir()):
        file.chmod(0o555 if file.is_dir() else 0o444)
    if os.geteuid():  # not root, who may do everything
        yield
        path.chmod(0o755)
        return
    parents = [parent for parent in path.parents if not parent.stat().st_uid]
    modes = [parent.stat().st_mode for parent in parents]
    for parent, mode in zip(parents, modes, strict=True):
        parent.chmod(mode | 0o055)
    os.seteuid(65534)
    yield
    os.seteuid(0)
    for parent, mode in zip(parents, modes, strict=True):
        parent.chmod(mode)


@pytest.mark.usefixtures("as_a_stranger")
def test_without_permission_to_write(path):
    assert bodies(path) == BODIES
    with pytest.raises(PermissionError, match=r"not allowed to append there; open .* mode 'r'"):
        TaskLog.open(path, writes=True)
    with pytest.raises(PermissionError, match="not allowed to append there"):
        TaskLog.create(path / "new", MANIFEST)


def test_a_disk_that_is_read_only(path, monkeypatch):
    opened = os.open

    def read_only(file, flags, *mode):
        if flags & (os.O_RDWR | os.O_WRONLY):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(file))
        return opened(file, flags, *mode)

    monkeypatch.setattr(os, "open", read_only)
    assert bodies(path) == BODIES
    with pytest.raises(OSError, match="Read-only file system: not allowed to append there"):
        TaskLog.open(path, writes=True)
