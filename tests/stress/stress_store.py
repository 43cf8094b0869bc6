"""A store on disk, killed, cut, flipped, filled up and read while it is written: what is lost.

    python -m tests.stress.stress_store

    kills        writers ended by SIGKILL: at random times, and before, within and after each call
                 in turn that opens, writes, flushes, cuts or renames a file
    power cuts   the files as a disk may hold them when power fails: what was flushed, and of what
                 was not any part, in pieces of 512 bytes
    damage       one bit flipped, or the end cut off, in each of the files in turn
    full disk    a write that fails, or stops half way, at each place in turn
    readers      four processes that read while one writes

After each the store must open, hold every task whose `append` had returned, and give each task's
own bytes or, where they were damaged, an error that names the file; `verify` must name the damage.
A writer must open after a crash, and `verify` find nothing once it has.

Expected: 0 lost, 0 wrong, 0 unnoticed, 0 unopened. Writes stress_store.json to --out. 3 minutes on
2 CPU cores. Needs a system with fork, and writes some MB to the disk of --out.
"""

import collections
import contextlib
import dataclasses
import errno
import functools
import os
import random
import shutil
import signal
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import tqdm
import tyro

from experiments.frame.run import usage_errors, writable_folder, write_result
from supsup_jax.stores import journal
from supsup_jax.stores.journal import TaskLog
from supsup_jax.types import StoreError
from tests.stress.accidents import Disk, PowerCut, ended, forked, half_written, watching

MANIFEST = {"format": "stress", "layout": [["kernel", [8, 4]]]}


@dataclasses.dataclass(frozen=True)
class Args:
    """Does to a store what must not harm it, and counts what is lost."""

    kills: int = 400
    """Writers killed at a random time; those killed at each call in turn come on top."""
    power_cuts: int = 500
    flips: int = 2000
    cuts: int = 500
    seconds: float = 60.0
    """How long four processes read while one writes."""
    seed: int = 0
    out: Path = Path("runs/stress_store")
    tiny: bool = False
    """A few of each, in seconds."""


def payload(task: int) -> bytes:
    """What the record of a task must hold: follows from its number."""
    rng = random.Random(task)
    return rng.randbytes(rng.choice((1, 60, 700, 5000, 40000)))


def append_next(log: TaskLog) -> None:
    task = len(log)
    log.append({"name": f"task {task}"}, [payload(task)])


@dataclasses.dataclass
class Tally:
    """What became of the stores of one kind of accident."""

    accidents: int = 0
    lost: int = 0  # tasks that were appended, and are gone
    wrong: int = 0  # tasks whose bytes are others, unnoticed
    unopened: int = 0  # stores that cannot be read, or not be written after a crash
    unnoticed: int = 0  # damages that neither reading nor `verify` names
    reads: int = 0

    def check_crash(self, path: Path, appended: int) -> None:
        """Reads what a crash has left, and goes on writing. appended: tasks reported as such."""
        self.accidents += 1
        if (path / journal.MANIFEST).exists():
            self.check(functools.partial(TaskLog.open, path), appended)
            self.check(functools.partial(TaskLog.open, path, writes=True), appended, writes=True)
        else:  # killed while it was created: nothing was reported, and another may create it
            create = functools.partial(TaskLog.create, path, MANIFEST)
            self.check(create, appended, writes=True)

    def check(self, opened: Callable, appended: int, writes: bool = False) -> None:
        """Every task of a store, and whether another can be written."""
        try:
            with contextlib.closing(opened()) as log:
                self.lost += max(0, appended - len(log))
                if writes:
                    append_next(log)
                    self.unopened += bool(log.verify())
                self.reads += len(log)
                self.wrong += any(log.read(i).body != payload(i) for i in range(len(log)))
        except (StoreError, OSError):
            self.unopened += 1

    def check_damage(self, path: Path, file: str, tasks: int) -> None:
        """Looks for damage that was done to `file` of a store of so many tasks."""
        self.accidents += 1
        noticed = False
        try:
            log = TaskLog.open(path)
        except (StoreError, OSError) as error:
            self.unnoticed += file not in str(error)
            return
        with contextlib.closing(log):
            for i in range(len(log)):
                try:
                    self.wrong += i >= tasks or log.read(i).body != payload(i)
                    self.reads += 1
                except StoreError as error:
                    noticed |= file in str(error)
            noticed |= any(file == problem.file for problem in log.verify())
        self.unnoticed += not noticed
        self.check_writer(path, tasks)

    def check_writer(self, path: Path, tasks: int) -> None:
        """A writer refuses the damaged store, or leaves every whole task in it."""
        before = whole_tasks(path)
        with contextlib.suppress(StoreError, OSError):
            TaskLog.open(path, writes=True).close()
        self.lost += len(before - whole_tasks(path))


def whole_tasks(path: Path) -> set[int]:
    found = set()
    with contextlib.closing(TaskLog.open(path)) as log:
        for i in range(len(log)):
            with contextlib.suppress(StoreError):
                log.read(i)
                found.add(i)
    return found


def write_tasks(path: Path, count: int, writing: int) -> None:
    """Opens or creates the store and appends, reporting how many tasks it holds after each."""
    exists = (path / journal.MANIFEST).exists()
    log = TaskLog.open(path, writes=True) if exists else TaskLog.create(path, MANIFEST)
    for _ in range(count):
        append_next(log)
        os.write(writing, struct.pack("<Q", len(log)))


def random_kills(folder: Path, count: int, rng: random.Random, tally: Tally) -> None:
    """Each store is killed ten times over, so that crashes follow on crashes."""
    for i in tqdm.trange(count, desc="kills at random times"):
        path = folder / f"store{i // 10}"
        child, reading = forked(functools.partial(write_tasks, path, 1000))
        time.sleep(rng.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        appended, _ = ended(child, reading)
        tally.check_crash(path, appended)


def killed_at(path: Path, count: int, point: int, when: str, writing: int) -> None:
    """`write_tasks`, killed at the watched call number `point`."""

    def before(number, name, real, arguments):
        if number != point:
            return real(*arguments)
        if when == "within" and name == "pwrite":
            half_written(real, arguments)
        elif when == "after":
            real(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    with watching(before):
        write_tasks(path, count, writing)


def kills_at_each_call(folder: Path, most: int, tally: Tally) -> None:
    """From an empty folder, and from a store with an unfinished record, as a crash leaves it."""
    for started in (False, True):
        for when in ("before", "within", "after"):
            point, killed = 0, True
            while killed and point < most:
                path = folder / f"{when}{started}{point}"
                if started:
                    with contextlib.closing(TaskLog.create(path, MANIFEST)) as log:
                        append_next(log)
                        append_next(log)
                    with open(path / journal.RECORDS, "ab") as file:
                        file.write(payload(0) * 3)
                    (path / journal.INDEX).write_bytes(b"cut short")
                child, reading = forked(functools.partial(killed_at, path, 3, point, when))
                appended, status = ended(child, reading)
                killed = os.WIFSIGNALED(status)
                if killed:
                    tally.check_crash(path, max(appended, 2 * started))
                elif status:
                    tally.unopened += 1
                shutil.rmtree(path, ignore_errors=True)
                point += 1


def written_until_power_cut(path: Path, point: int, disk: Disk) -> int:
    """Appends until the watched call number `point`; returns how many tasks were appended."""
    appended = 0

    def before(number, name, real, arguments):
        if number >= point:
            raise PowerCut
        return disk.watch(name, real, arguments)

    log = None
    with watching(before):
        try:
            log = TaskLog.open(path, writes=True)
            while True:
                appended = len(log)
                append_next(log)
        except PowerCut:
            pass
    if log is not None:
        log.close()
    return appended


def power_cuts(folder: Path, count: int, rng: random.Random, tally: Tally) -> None:
    """Power fails at a random call, after which some writes since the last flush are missing."""
    for i in tqdm.trange(count, desc="power cuts"):
        path, disk = folder / f"power{i}", Disk()
        with contextlib.closing(TaskLog.create(path, MANIFEST)) as log:
            append_next(log)
        for file in path.iterdir():
            disk.flushed[file.name] = bytearray(file.read_bytes())
        appended = max(1, written_until_power_cut(path, rng.randrange(1, 20), disk))
        for name, content in disk.after_power_cut(rng).items():
            (path / name).write_bytes(content)
        tally.check_crash(path, appended)
        shutil.rmtree(path)


def damages(folder: Path, flips: int, cuts: int, rng: random.Random, tally: Tally) -> None:
    """One damage at a time, to a fresh copy of a store of eight tasks."""
    tasks = 8
    whole, path = folder / "whole", folder / "damaged"
    with contextlib.closing(TaskLog.create(whole, MANIFEST)) as log:
        for _ in range(tasks):
            append_next(log)
    contents = {file.name: file.read_bytes() for file in whole.iterdir()}
    # Half of them by file, so that the small ones get their share, half by byte.
    names, sizes = list(contents), list(map(len, contents.values()))
    for i in tqdm.trange(flips + cuts, desc="flips and cuts"):
        (name,) = rng.choices(names) if i % 2 else rng.choices(names, sizes)
        damaged = bytearray(contents[name])
        place = rng.randrange(len(damaged))
        if i < flips:
            damaged[place] ^= 1 << rng.randrange(8)
        else:
            del damaged[place:]
        path.mkdir()
        for other, content in contents.items():
            (path / other).write_bytes(damaged if other == name else content)
        tally.check_damage(path, name, tasks)
        shutil.rmtree(path)


def full_disk(folder: Path, most: int, tally: Tally) -> None:
    """The disk is full at each write in turn, from the start or after half of it."""
    for half in (False, True):
        failed, point = True, 0
        while failed and point < most:
            path, failed = folder / f"full{half}{point}", False

            def before(number, name, real, arguments, point=point, half=half):
                nonlocal failed
                if number < point:
                    return real(*arguments)
                failed = True
                if half and number == point and len(arguments[1]) > 1:
                    return half_written(real, arguments)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            with contextlib.closing(TaskLog.create(path, MANIFEST)) as log:
                append_next(log)
            appended = 1
            log = TaskLog.open(path, writes=True)
            with contextlib.suppress(OSError), watching(before, ("pwrite",)):
                while len(log) < 4:
                    append_next(log)
                    appended = len(log)
            # The same writer goes on, once there is room again.
            append_next(log)
            tally.unopened += bool(log.verify()) or len(log) != appended + 1
            log.close()
            if failed:
                tally.check_crash(path, appended + 1)
            point += 1


def reader(path: Path, seed: int, until: float, writing: int) -> None:
    """Reads until the time is up; reports the reads, or dies of a torn one."""
    rng, reads, known = random.Random(seed), 0, 0
    log = None
    while time.monotonic() < until:
        if log is None or rng.random() < 0.05:
            if log is not None:
                log.close()
            log = TaskLog.open(path)
        tasks = log.refresh()
        assert tasks >= known, (tasks, known)
        known = tasks
        for i in {tasks - 1, rng.randrange(tasks)}:
            assert log.read(i).body == payload(i)
            reads += 1
    os.write(writing, struct.pack("<Q", reads))


def readers(folder: Path, seconds: float, tally: Tally) -> int:
    """Four readers, one writer; returns how many tasks it appended."""
    path = folder / "shared"
    with contextlib.closing(TaskLog.create(path, MANIFEST)) as log:
        append_next(log)
        until = time.monotonic() + seconds
        children = [forked(functools.partial(reader, path, seed, until)) for seed in range(4)]
        while time.monotonic() < until:
            append_next(log)
        for child in children:
            reads, status = ended(*child)
            tally.accidents += 1
            tally.reads += reads
            tally.wrong += status != 0
        return len(log)


def main(args: Args) -> dict:
    with usage_errors():
        writable_folder(args.out)
    most = 1000
    if args.tiny:
        args = dataclasses.replace(args, kills=5, power_cuts=20, flips=40, cuts=20, seconds=1.0)
        most = 4
    rng, tallies = random.Random(args.seed), collections.defaultdict(Tally)
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        folder = Path(folder)
        random_kills(folder, args.kills, rng, tallies["random kills"])
        kills_at_each_call(folder, most, tallies["kills at each call"])
        power_cuts(folder, args.power_cuts, rng, tallies["power cuts"])
        damages(folder, args.flips, args.cuts, rng, tallies["damage"])
        full_disk(folder, most, tallies["full disk"])
        written = readers(folder, args.seconds, tallies["readers"])
    result = write_result(
        args.out / "stress_store.json",
        seed=args.seed,
        written_while_read=written,
        rows=[{"kind": name, **dataclasses.asdict(t)} for name, t in tallies.items()],
    )
    fields = [field.name for field in dataclasses.fields(Tally)]
    print(f"{'':20}" + "".join(f"{name:>11}" for name in fields))
    for name, tally in tallies.items():
        print(f"{name:20}" + "".join(f"{getattr(tally, field):11,}" for field in fields))
    if any(t.lost or t.wrong or t.unopened or t.unnoticed for t in tallies.values()):
        raise SystemExit("error: something was lost, or damaged and not noticed")
    return result


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
