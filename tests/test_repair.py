"""Stores of which something is lost: what is named, and what `repair` makes of them."""

import contextlib

import pytest

import supsup_jax as ss
from supsup_jax.stores.journal import TaskLog
from supsup_jax.stores.repair import repair
from tests.stress.accidents import PowerCut, half_written, watching
from tests.stress.operations import held_after, read
from tests.test_removal import DONE, store
from tests.test_task_log import BODIES, bodies, change, cut, with_records


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "log"
    with_records(path, BODIES)
    return path


@pytest.fixture
def log(tmp_path):
    with contextlib.closing(store(tmp_path / "log")) as log:
        yield log


def test_a_record_and_its_entry_damaged_at_once(path):
    log = TaskLog.open(path)
    change(path / "tasks.bin", log._entries[1].offset + 40, b"\xff")
    change(path / "index.bin", 70, b"!")
    log = TaskLog.open(path)
    assert len(log) == 3
    assert log.read(0).body == BODIES[0] and log.read(2).body == BODIES[2]
    with pytest.raises(ss.StoreError, match="task 1 is damaged, and so is its entry"):
        log.read(1)
    assert {problem.loses for problem in log.verify()} == {True, False}


def test_whole_records_behind_a_damaged_one_are_never_dropped(path):
    """As when a crash takes the index's last entries, and a record they listed is damaged."""
    offset = TaskLog.open(path)._entries[1].offset
    change(path / "tasks.bin", offset + 40, b"\xff")
    cut(path / "index.bin", 64)
    data = (path / "tasks.bin").read_bytes()
    assert bodies(path) == BODIES[:1]
    (problem, *_) = TaskLog.open(path).verify()
    assert problem.loses and "1 whole record" in problem.what
    with pytest.raises(ss.StoreError, match=r"whole record.* behind a damaged one"):
        TaskLog.open(path, writes=True)
    assert (path / "tasks.bin").read_bytes() == data
    (done,), loses = repair(path)
    assert loses and done.startswith(f"set aside in aside-{offset}.bin: ")
    assert (path / f"aside-{offset}.bin").read_bytes() == data[offset:]
    log = TaskLog.open(path, writes=True)
    assert (log.ids, log.read(0).body, log.verify()) == ([0], BODIES[0], [])
    assert log.append({}, [b"new"]) == 3  # no number is given twice


@pytest.mark.parametrize("half", [False, True])
def test_a_repair_that_was_cut_short_is_repeated(tmp_path, half):
    """At each call of the system: what was behind the damage is aside, no number given twice."""
    for point in range(100):
        path = tmp_path / f"{point}"
        with_records(path, BODIES)
        offset = TaskLog.open(path)._entries[1].offset
        change(path / "tasks.bin", offset + 40, b"\xff")
        cut(path / "index.bin", 64)
        behind = (path / "tasks.bin").read_bytes()[offset:]
        done = False

        def before(number, name, real, arguments, point=point):
            if number == point and half and name == "pwrite":
                half_written(real, arguments)
            if number >= point:
                raise PowerCut
            return real(*arguments)

        with contextlib.suppress(PowerCut), watching(before):
            repair(path)
            done = True
        repair(path)
        assert (path / f"aside-{offset}.bin").read_bytes() == behind
        log = TaskLog.open(path, writes=True)
        # Between the two removals task 1, which is damaged, is still said to be, and task 2, no
        # longer behind damage, may be there again.
        assert all("task 1" in str(problem) for problem in log.verify())
        assert all(log.read(i).body == BODIES[i] for i in log.ids if i != 1) and 0 in log.ids
        assert log.append({}, [b"new"]) == 3
        log.close()
        if done:
            return
    raise AssertionError("no end")


def test_what_is_set_aside_has_a_file_of_its_own(path):
    offset = TaskLog.open(path)._entries[1].offset
    (path / f"aside-{offset}.bin").write_bytes(b"of a former repair")
    change(path / "tasks.bin", offset + 40, b"\xff")
    cut(path / "index.bin", 64)
    assert repair(path).done[0].startswith(f"set aside in aside-{offset}-1.bin: ")
    assert (path / f"aside-{offset}.bin").read_bytes() == b"of a former repair"


@pytest.mark.parametrize("boundary", [True, False])
def test_records_cut_off_at_the_end_are_missed(path, boundary):
    offset = TaskLog.open(path)._entries[2].offset
    cut(path / "tasks.bin", offset if boundary else offset + 50)
    log = TaskLog.open(path)
    assert log.read(1).body == BODIES[1]
    with pytest.raises(ss.StoreError, match=r"was cut short.*task 2"):
        log.read(2)
    assert log.verify()[0].loses
    with pytest.raises(ss.StoreError, match="cut short; restore"):
        TaskLog.open(path, writes=True)
    given_up = "gave up task 2: its record was cut off, and no other gets its number"
    done, loses = repair(path)
    assert loses and done[0] == given_up
    log = TaskLog.open(path, writes=True)
    assert (log.ids, log.verify()) == ([0, 1], [])
    assert [log.read(i).body for i in log.ids] == BODIES[:2]
    assert log.append({}, [b"another"]) == 3


def test_a_replaced_record_that_was_cut_off_is_missed(log):
    task = log.ids[0]
    log.replace(task, {}, [b"other"])
    offset = log.entry(task).offset
    log.close()
    cut(log.path / "tasks.bin", offset + 9)
    with pytest.raises(ss.StoreError, match="was cut short"):
        TaskLog.open(log.path).read(task)
    with pytest.raises(ss.StoreError, match="cut short; restore"):
        TaskLog.open(log.path, writes=True)
    given_up = f"gave up task {task}: its record was cut off, and no other gets its number"
    assert given_up in repair(log.path).done
    with contextlib.closing(TaskLog.open(log.path, writes=True)) as again:
        others = [i for i in range(len(again)) if i != task]
        assert [read(again, i) for i in others] == [held_after(DONE)[i] for i in others]


@pytest.mark.parametrize("step", ["_write", "_write_ends"])
def test_a_repair_that_is_killed_gives_no_number_away(log, step, monkeypatch):
    offset = log.entry(last := log.append({}, [b"one more"])).offset
    log.close()
    cut(log.path / "tasks.bin", offset + 9)

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TaskLog, step, killed)
        repair(log.path)
    repair(log.path)
    with contextlib.closing(TaskLog.open(log.path, writes=True)) as again:
        assert last not in again.ids and again.verify() == []
        assert again.append({}, [b"another"]) == last + 1
