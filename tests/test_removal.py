"""Tasks removed and replaced, and the bytes given back: nothing of them stays, all else does.

Kills of processes, and more power cuts: `tests/stress/stress_store`.
"""

import contextlib
import itertools
import os
import random
import shutil

import pytest

import supsup_jax as ss
from supsup_jax.stores.journal import TaskLog
from supsup_jax.stores.repair import repair
from tests.stress.accidents import Disk, PowerCut, half_written, watching
from tests.stress.operations import FIRST, held_after, operate_all, pieces, read
from tests.test_task_log import MANIFEST, change, cut

DONE = 5  # three tasks appended, one of them replaced, one removed
OPERATIONS = pytest.mark.parametrize("k", range(2, 6), ids=FIRST[2:])


def store(path, done=DONE):
    """A folder after so many operations; its log, open for writing."""
    log = TaskLog.create(path, MANIFEST)
    operate_all(log, 0, done)
    return log


@pytest.fixture
def log(tmp_path):
    with contextlib.closing(store(tmp_path / "log")) as log:
        yield log


def held(log):
    return [read(log, i) for i in range(len(log))]


def left(path, done):
    """The operations of whose tasks, which are gone, something is in the folder's files."""
    data = b"".join(file.read_bytes() for file in path.iterdir())
    gone = set(range(done)) - set(held_after(done))
    return [k for k in gone if any(piece in data for piece in pieces(k))]


def checksums_left(path, k):
    """Of the tasks that operation k changes, the checksums that are found in the folder."""
    pairs = zip(held_after(k), held_after(k + 1)[: len(held_after(k))], strict=True)
    with contextlib.closing(TaskLog.open(path.with_name("whole"))) as log:
        sums = [log.entry(i).sha256 for i, (a, b) in enumerate(pairs) if a != b]
    data = b"".join(file.read_bytes() for file in path.iterdir())
    return [found for found in sums if found in data]


def orderly(disk):
    """`disk.watch`; what is overwritten must not count any more, whatever is lost of the rest."""

    tasks = disk.names["tasks.bin"]

    def watch(number, name, real, arguments):
        if name == "pwrite" and disk.opened[arguments[0]] == tasks:
            written = [offset is None or data.strip(b"\0") for _, offset, data in disk.pending]
            behind = arguments[2] >= len(disk.flushed[tasks])
            assert behind or not any(written), "overwritten before what counts was flushed"
        if name == "unlink" and str(arguments[0]).endswith("index.bin"):
            assert not disk.pending_names, "deleted before what is to take its place has a name"
        return disk.watch(name, real, arguments)

    return watch


def accidents(path, k, half=False):
    """Operation k, cut short at each call of the system in turn, and at the end not at all.

    Yields the disk and whether the operation returned.
    """
    whole = path.with_name("whole")
    store(whole, k).close()
    for point in itertools.count():
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(whole, path)
        disk, log = Disk(path), None
        watch = orderly(disk)

        def before(number, name, real, arguments, point=point, watch=watch):
            if number == point and half and name == "pwrite":
                half_written(real, arguments)
            if number >= point:
                raise PowerCut
            return watch(number, name, real, arguments)

        returned = False
        with contextlib.suppress(PowerCut), watching(before):
            log = TaskLog.open(path, writes=True)
            operate_all(log, k, k + 1)
            returned = True
        if log is not None:
            log.close()
        yield disk, returned
        if returned:
            return


def check(path, k, returned):
    """What a crash in or after operation k has left, to a reader and to a writer."""
    allowed = [held_after(k + 1)] if returned else [held_after(k), held_after(k + 1)]
    reader = TaskLog.open(path)
    seen = held(reader)
    assert seen in allowed
    with watching(orderly(Disk(path))):
        log = TaskLog.open(path, writes=True)
    with contextlib.closing(log):
        assert held(log) == seen
        assert log.verify() == []
        if seen == held_after(k + 1):
            assert left(path, k + 1) == []
        assert {file.name for file in path.iterdir()} == {
            "manifest.json",
            "tasks.bin",
            "index.bin",
        }
        assert log.append({"name": "operation 99"}, [b""]) == len(seen)
    reader.refresh()
    assert len(reader) == len(seen) + 1


@OPERATIONS
@pytest.mark.parametrize("half", [False, True])
def test_a_kill_at_each_call_leaves_the_former_or_the_new_one(tmp_path, k, half):
    path = tmp_path / "log"
    for _, returned in accidents(path, k, half):
        check(path, k, returned)


@OPERATIONS
def test_a_power_cut_at_each_call_leaves_the_former_or_the_new_one(tmp_path, k):
    path, rng = tmp_path / "log", random.Random(0)
    for disk, returned in accidents(path, k):
        for _ in range(20 if disk.pending or disk.pending_names else 1):
            disk.fail(path, rng)
            if returned:  # it is on the device, before any other writer
                assert left(path, k + 1) == []
                assert checksums_left(path, k) == []
            check(path, k, returned)


@OPERATIONS
def test_a_full_disk_leaves_what_was_there(tmp_path, k):
    path = tmp_path / "log"
    for point in itertools.count():
        shutil.rmtree(path, ignore_errors=True)
        with contextlib.closing(store(path, k)) as log:

            def full(number, name, real, arguments, point=point):
                if number >= point:
                    raise OSError(28, "No space left on device")
                return real(*arguments)

            before = {file.name: file.read_bytes() for file in path.iterdir()}
            try:
                with watching(full, ("pwrite",)):
                    operate_all(log, k, k + 1)
                failed = False
            except OSError:
                failed = True
            if held(log) != held_after(k + 1):
                assert before == {file.name: file.read_bytes() for file in path.iterdir()}
            assert held(log) in (
                [held_after(k), held_after(k + 1)] if failed else [held_after(k + 1)]
            )
        check(path, k, returned=not failed)
        if not failed:
            return


def test_the_ids_of_others_stay_and_none_is_given_twice(log):
    assert (len(log), log.ids) == (3, [i for i, k in enumerate(held_after(DONE)) if k is not None])
    (gone,) = set(range(3)) - set(log.ids)
    for call in (log.read, log.remove, log.metadata, lambda i: log.replace(i, {}, [])):
        with pytest.raises(ss.types.TaskIdError, match=f"task {gone} was removed from"):
            call(gone)
        with pytest.raises(IndexError, match="task 7 is not in"):
            call(7)
    assert log.append({}, [b"new"]) == 3
    log.remove(3)
    assert log.append({}, [b"newer"]) == 4
    assert log.compact() and not log.compact()
    with contextlib.closing(TaskLog.open(log.path)) as reader:
        assert (len(reader), reader.ids) == (5, log.ids)
        for call in (lambda: reader.remove(4), reader.compact):
            with pytest.raises(ss.StoreError, match="reading only"):
                call()


def test_a_store_without_its_index_says_the_same(log):
    """Among records that were erased, replaced and removed."""
    whole = (log.path / "index.bin").read_bytes()
    log.close()
    spoilt = [b"", whole[:64], whole[:-9], bytes(len(whole))]
    spoilt += [bytes(whole[:at] + b"!" + whole[at + 1 :]) for at in range(9, len(whole), 64)]
    for index in spoilt:
        (log.path / "index.bin").write_bytes(index)
        with contextlib.closing(TaskLog.open(log.path)) as reader:
            assert held(reader) == held_after(DONE)
            assert reader.verify() and not any(problem.loses for problem in reader.verify())
        with contextlib.closing(TaskLog.open(log.path, writes=True)) as writer:
            assert held(writer) == held_after(DONE)
        assert (log.path / "index.bin").read_bytes() == whole


def test_a_reader_follows_and_never_sees_what_is_gone(log):
    a, b = log.ids
    reader = TaskLog.open(log.path)
    log.replace(a, {"name": "operation 99"}, [b"other"])
    assert reader.read(a).body == b"other"  # where the record it knew was overwritten
    log.remove(b)
    with pytest.raises(ss.types.TaskIdError, match="was removed"):
        reader.read(b)
    reader, another = TaskLog.open(log.path), TaskLog.open(log.path)
    log.compact()
    log.append({}, [bytes(9999)])
    assert another.verify() == []  # of the files that are in place, which are as long again
    log.remove(a)
    with pytest.raises(ss.types.TaskIdError, match="was removed"):
        reader.read(a)  # and not what the file that it has open still holds
    shutil.rmtree(log.path)
    TaskLog.create(log.path, {"format": "other"}).close()
    with pytest.raises(ss.StoreError, match="is another store by now; open it again"):
        reader.refresh()


def test_a_writer_that_waited_writes_to_the_compacted_file(log, monkeypatch):
    """It waits for the lock of a file that is another by the time it has it."""
    slept = []

    def sleep(_):
        if not slept:
            log.compact()
            log.close()
        slept.append(1)

    monkeypatch.setattr("time.sleep", sleep)
    with contextlib.closing(TaskLog.open(log.path, writes=True, timeout=5)) as second:
        second.append({"name": "operation 99"}, [b""])
    assert slept and len(TaskLog.open(log.path)) == 4


def test_a_writer_that_waited_has_the_lock_of_the_folders_own_file(log, monkeypatch):
    """Not of one that was compacted away: there another may be amid an exchange of its own."""
    waiting, go_on = [], TaskLog._cut_short

    def sleep(_):
        if not waiting:
            log.compact()
        waiting.append(1)
        if len(waiting) == 3:
            log.close()

    def in_place(waiter):
        assert os.path.samestat(os.fstat(waiter._records), os.stat(log.path / "tasks.bin"))
        return go_on(waiter)

    monkeypatch.setattr("time.sleep", sleep)
    monkeypatch.setattr(TaskLog, "_cut_short", in_place)
    with contextlib.closing(TaskLog.open(log.path, writes=True, timeout=5)) as second:
        assert second.verify() == []
    assert len(waiting) == 3


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("short", [None, "tasks.bin.partial", "index.bin.partial"])
def test_an_exchange_that_was_cut_short_is_ended_with_whole_files_alone(log, short, by_name):
    def before(number, name, real, arguments):
        if name == "replace":
            raise PowerCut
        return real(*arguments)

    packed = log.path.with_name("packed")
    shutil.copytree(log.path, packed)
    with contextlib.closing(TaskLog.open(packed, writes=True)) as other:
        other.compact()
    with pytest.raises(PowerCut), watching(before):
        log.compact()
    size = (log.path / "tasks.bin").stat().st_size
    assert not (log.path / "index.bin").exists()
    if short:
        cut(log.path / short, 64)
    if by_name:
        assert not repair(log.path).loses
        assert not list(log.path.glob("*.partial"))
    with contextlib.closing(TaskLog.open(log.path, writes=True)) as again:
        assert held(again) == held_after(DONE) and again.verify() == []
    whole = size if short else (packed / "tasks.bin").stat().st_size
    assert (log.path / "tasks.bin").stat().st_size == whole
    assert not list(log.path.glob("*.partial"))


def test_damage_among_what_was_erased_is_named_and_mended(log):
    log.close()
    start, end = next(log._gaps())
    for at, mends in ((start + 40, True), (end - 1, True), (start + 9, False)):
        change(log.path / "tasks.bin", at, b"\xff")
        reader = TaskLog.open(log.path)
        assert held(reader) == held_after(DONE)
        (problem,) = reader.verify()
        assert problem.file == "tasks.bin" and not problem.loses
        done, loses = repair(log.path)
        assert not loses and bool(done) == mends == (reader.verify() == [])
    with contextlib.closing(TaskLog.open(log.path, writes=True)) as writer:
        writer.compact()  # which drops what is no record
        assert held(writer) == held_after(DONE) and writer.verify() == []


def test_damaged_tasks_can_be_removed_and_stop_a_compaction(log):
    a, b = log.ids
    for i in (a, b):
        change(log.path / "tasks.bin", log.entry(i).offset + 40, b"\xff")
    files = {file.name: file.read_bytes() for file in log.path.iterdir()}
    with pytest.raises(ss.StoreError, match=f"the record of task {a}.*damaged"):
        log.compact()
    assert files == {file.name: file.read_bytes() for file in log.path.iterdir()}
    log.remove(a)
    log.close()
    change(log.path / "index.bin", 64 * b + 9, b"!")  # nobody knows where it is
    with contextlib.closing(TaskLog.open(log.path, writes=True)) as log:
        with pytest.raises(ss.StoreError, match=f"task {b} is damaged, and so is its entry"):
            log.compact()
        log.remove(b)
        assert (log.ids, log.verify(), len(log)) == ([], [], 3)
        assert (log.path / "tasks.bin").stat().st_size == 3 * 96
    assert left(log.path, 4) == []


@pytest.mark.parametrize("known", [True, False])
def test_no_task_is_lost_behind_a_damaged_one_that_was_removed(tmp_path, known):
    """Nor by a compaction that is cut short, at each call of the system, or by a lost index.

    known: whether the index still says where the damaged one is.
    """
    for point in range(100):
        path = tmp_path / f"{point}"
        with contextlib.closing(TaskLog.create(path, {})) as log:
            for i in range(4):
                log.append({}, [bytes([i]) * 100])
            place = log.entry(1).offset
        change(path / "tasks.bin", place + 5, b"\xff")
        if not known:
            change(path / "index.bin", 64 + 9, b"!")
        done = False

        def before(number, name, real, arguments, point=point):
            if number >= point:
                raise PowerCut
            return real(*arguments)

        with (
            contextlib.suppress(PowerCut),
            contextlib.closing(TaskLog.open(path, writes=True)) as log,
            watching(before),
        ):
            log.remove(1)
            if known:
                (path / "index.bin").unlink()  # it follows from the records, here too
                assert TaskLog.open(path).ids == [0, 2, 3]
            log.compact()
            done = True
        with contextlib.closing(TaskLog.open(path, writes=True)) as log:
            assert [bytes(log.read(i).body)[:1] for i in (0, 2, 3)] == [b"\0", b"\2", b"\3"]
            assert log.ids in ([[0, 2, 3]] if done else [[0, 2, 3], [0, 1, 2, 3]])
            # Once it is removed nothing of it is left, where anyone knew where it was.
            assert not known or 1 in log.ids or b"\1" * 100 not in (path / "tasks.bin").read_bytes()
            assert not list(path.glob("*.partial"))
        if done:
            return
    raise AssertionError("no end")


def test_a_former_record_that_a_crash_left_is_erased_and_never_read(log):
    task = log.ids[0]
    former = log.entry(task)
    data = (log.path / "tasks.bin").read_bytes()[former.offset : former.end]
    log.replace(task, {}, [b"other"])
    log.append({}, [b"one more"])
    log.close()
    for index in ((log.path / "index.bin").read_bytes(), b""):
        (log.path / "index.bin").write_bytes(index)
        change(log.path / "tasks.bin", former.offset, data)
        reader = TaskLog.open(log.path)
        assert reader.read(task).body == b"other"
        assert any(f"of a former task {task}" in str(problem) for problem in reader.verify())
        with contextlib.closing(TaskLog.open(log.path, writes=True)) as writer:
            assert (writer.read(task).body, writer.verify()) == (b"other", [])
        assert data[32:] not in (log.path / "tasks.bin").read_bytes()
