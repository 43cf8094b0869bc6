"""Folders of records as they come to be: whole, or no store."""

import contextlib
import itertools
import os
import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import supsup_jax as ss
from supsup_jax.stores import system
from supsup_jax.stores.journal import TaskLog
from tests.stress.accidents import Disk, PowerCut, watching
from tests.test_task_log import BODIES, MANIFEST, bodies, with_records


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "log"
    with_records(path, BODIES)
    return path


def test_a_new_folder_of_records_is_whole_or_no_store(path, tmp_path):
    def found():
        yield {}, [b"first"]
        raise ss.StoreError("damaged")

    empty, link = tmp_path / "empty", tmp_path / "link"
    empty.mkdir()
    link.symlink_to(empty)
    for new in (tmp_path / "new", empty, link):
        with pytest.raises(ss.StoreError, match="damaged"):
            TaskLog.create(new, MANIFEST, found=found())
        assert {(file.name, file.stat().st_size) for file in new.iterdir()} == {
            ("tasks.bin", 0),
            ("index.bin", 0),
        }
        with pytest.raises(FileNotFoundError, match="is no store"):
            TaskLog.open(new)
    TaskLog.create(link, MANIFEST, found=[({}, [b"first"]), None]).close()
    log = TaskLog.open(empty)
    assert (log.ids, len(log), log.verify()) == ([0], 2, [])
    with pytest.raises(FileExistsError, match="holds a store; name a new folder"):
        TaskLog.create(path, MANIFEST)


def test_a_copy_that_fails_takes_nothing_of_anothers(path, tmp_path):
    """Of one who made a store in the folder's place meanwhile."""
    new = tmp_path / "new"

    def found():
        yield {}, [b"first"]
        shutil.rmtree(new)
        shutil.copytree(path, new)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TaskLog.create(new, MANIFEST, found=found())
    assert bodies(new) == BODIES


@pytest.mark.parametrize("power", [False, True])
def test_a_copy_that_is_cut_short_is_no_store_or_whole(tmp_path, power):
    """At each call of the system, by a kill or a power cut; and what is created there again is."""
    for point in itertools.count():
        for seed in range(10 if power else 1):
            path, done = tmp_path / f"{point} {seed}", False
            path.mkdir()
            disk = Disk(path)

            def before(number, *call, point=point, disk=disk):
                if number >= point:
                    raise PowerCut
                return disk.watch(*call)

            with contextlib.suppress(PowerCut), watching(before):
                TaskLog.create(path, MANIFEST, found=[({}, [body]) for body in BODIES]).close()
                done = True
            if power:
                disk.fail(path, random.Random(seed))
            try:
                assert bodies(path) == BODIES
                continue
            except FileNotFoundError as error:
                assert not done and "is no store" in str(error)
            try:
                TaskLog.create(path, MANIFEST, found=[({}, [b"again"])]).close()
                assert bodies(path) == [b"again"] and TaskLog.open(path).verify() == []
            except FileExistsError as error:
                assert "delete this one if it is a copy that was cut short" in str(error)
        if done:
            return


def test_one_who_creates_a_store_is_waited_for(tmp_path, monkeypatch):
    path = tmp_path / "log"
    path.mkdir()
    (path / "tasks.bin").touch()
    slept, first = [], system.open_file(path / "tasks.bin", os.O_RDWR)
    assert system.flocked(first)

    def sleep(_):
        slept.append(os.close(first))

    monkeypatch.setattr("time.sleep", sleep)
    TaskLog.create(path, MANIFEST, timeout=5).close()
    assert slept


def test_a_creation_cut_short_can_be_repeated(tmp_path):
    path = tmp_path / "log"
    path.mkdir()
    for name in ("tasks.bin", "index.bin", "manifest.json.partial"):
        (path / name).touch()
    TaskLog.create(path, MANIFEST).close()
    assert sorted(file.name for file in path.iterdir()) == [
        "index.bin",
        "manifest.json",
        "tasks.bin",
    ]


def test_what_a_folder_may_not_be(tmp_path, path):
    with pytest.raises(FileNotFoundError, match="no store at"):
        TaskLog.open(tmp_path / "nothing")
    with pytest.raises(FileExistsError, match="holds a store"):
        TaskLog.create(path, MANIFEST)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("hello")
    with pytest.raises(FileExistsError, match=r"letter.txt"):
        TaskLog.create(tmp_path / "other", MANIFEST)
    with pytest.raises(FileNotFoundError, match="no folder"):
        TaskLog.create(tmp_path / "a" / "b", MANIFEST)
    (path / "tasks.bin").unlink()
    with pytest.raises(ss.StoreError, match=r"lacks tasks.bin"):
        TaskLog.open(path)


def test_rows_of_a_lost_creation_are_of_nothing(path):
    """As power may leave them, the index alone having its name."""
    for name in ("manifest.json", "tasks.bin"):
        (path / name).unlink()
    with contextlib.closing(TaskLog.create(path, MANIFEST)) as log:
        log.append({}, [b"new"])
    assert (bodies(path), TaskLog.open(path).verify()) == ([b"new"], [])


def test_one_who_waits_for_another_that_fails_creates_the_store(tmp_path, monkeypatch):
    path, waits = tmp_path / "log", threading.Event()

    def found():
        yield {}, [b"first"]
        begun.set()
        assert waits.wait(60)
        raise ss.StoreError("damaged")

    with ThreadPoolExecutor(1) as pool:
        begun = threading.Event()
        first = pool.submit(TaskLog.create, path, MANIFEST, found=found())
        assert begun.wait(60)
        monkeypatch.setattr("time.sleep", lambda _: waits.set())
        TaskLog.create(path, MANIFEST, timeout=60).close()
        with pytest.raises(ss.StoreError, match="damaged"):
            first.result()
    assert bodies(path) == []
