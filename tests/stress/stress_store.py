"""A store on disk, killed, cut, flipped, filled up and read while it is written: what is lost.

Tasks are appended, replaced and removed, and the store compacted, in an order that follows from
the number of each operation: what a store must hold is known from how many were done.

    python -m tests.stress.stress_store

    kills        writers ended by SIGKILL: at random times, and before, within and after each call
                 in turn that opens, writes, flushes, cuts, renames or deletes a file
    power cuts   the files as a disk may hold them when power fails: what was flushed, and of what
                 was not any part, in pieces of 512 bytes
    damage       one bit flipped, or the end cut off, in each of the files in turn
    full disk    a write that fails, or stops half way, at each place in turn
    readers      four processes that read while one writes

After each the store must open, hold what it held after the last operation that had returned, or
after the one that was cut short, and give each task's own bytes or, where they were damaged, an
error that names the file; `verify` must name the damage. A writer must open after a crash, `verify`
find nothing once it has, and no piece of a task that was removed or replaced be left in any file.

Expected: 0 lost, 0 wrong, 0 unnoticed, 0 unopened, 0 remaining. Writes stress_store.json to --out.
4 minutes on 2 CPU cores. Needs a system with fork, and writes some MB to the disk of --out.
"""

import collections
import contextlib
import dataclasses
import errno
import functools
import math
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
from tests.stress.operations import (
    Wrong,
    held_after,
    operate,
    operate_all,
    payload,
    pieces,
    read,
)

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


@dataclasses.dataclass
class Tally:
    """What became of the stores of one kind of accident."""

    accidents: int = 0
    lost: int = 0  # stores that hold what they never should: a task is gone, or back, or older
    wrong: int = 0  # tasks whose bytes are others, unnoticed
    unopened: int = 0  # stores that cannot be read, or not be written after a crash
    unnoticed: int = 0  # damages that neither reading nor `verify` names
    remaining: int = 0  # tasks removed or replaced of which a piece is left
    reads: int = 0

    def check_crash(self, path: Path, done: int) -> int:
        """Reads what a crash has left, and goes on; returns how many operations are done then.

        done: reported as such; one more may be.
        """
        self.accidents += 1
        if (path / journal.MANIFEST).exists():
            self.check(functools.partial(TaskLog.open, path), done)
            opened = functools.partial(TaskLog.open, path, writes=True)
        else:  # killed while it was created: nothing was reported, and another may create it
            opened = functools.partial(TaskLog.create, path, MANIFEST)
        return self.check(opened, done, writes=True)

    def check(self, opened: Callable, done: int, writes: bool = False) -> int:
        """Every task of a store, and whether it can be written; returns as `check_crash`."""
        try:
            with contextlib.closing(opened()) as log:
                done = self.check_held(log, done)
                if writes:
                    self.check_erased(log.path, done)
                    operate_all(log, done, done + 1)
                    self.unopened += bool(log.verify())
                    self.lost += self.held(log) != held_after(done := done + 1)
                    self.check_erased(log.path, done)
        except (StoreError, OSError):
            self.unopened += 1
        return done

    def check_held(self, log: TaskLog, done: int) -> int:
        held = self.held(log)
        if held == held_after(done):
            return done
        self.lost += held != held_after(done + 1)
        return done + 1

    def held(self, log: TaskLog) -> list[int | None]:
        self.reads += len(log)
        try:
            return [read(log, i) for i in range(len(log))]
        except Wrong:
            self.wrong += 1
            return []

    def check_erased(self, path: Path, done: int) -> None:
        data = b"".join(file.read_bytes() for file in path.iterdir())
        gone = set(range(done)) - set(held_after(done))
        self.remaining += sum(any(piece in data for piece in pieces(k)) for k in gone)

    def check_damage(self, path: Path, file: str, held: list[int | None]) -> None:
        """Looks for damage that was done to `file` of a store that held these."""
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
                    self.wrong += [read(log, i)] != held[i : i + 1]
                    self.reads += 1
                except Wrong:
                    self.wrong += 1
                except StoreError as error:
                    noticed |= file in str(error)
            noticed |= any(file == problem.file for problem in log.verify())
        self.unnoticed += not noticed
        self.check_writer(path)

    def check_writer(self, path: Path) -> None:
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


def write_tasks(path: Path, start: int, end: int, writing: int) -> None:
    """Opens or creates the store and operates on it, reporting how often after each."""
    exists = (path / journal.MANIFEST).exists()
    log = TaskLog.open(path, writes=True) if exists else TaskLog.create(path, MANIFEST)
    for k in range(start, end):
        operate_all(log, k, k + 1)
        os.write(writing, struct.pack("<Q", k + 1))


def random_kills(folder: Path, count: int, rng: random.Random, tally: Tally) -> None:
    """Each store is killed ten times over, so that crashes follow on crashes."""
    done = 0
    for i in tqdm.trange(count, desc="kills at random times"):
        path, done = folder / f"store{i // 10}", done if i % 10 else 0
        child, reading = forked(functools.partial(write_tasks, path, done, done + 1000))
        time.sleep(rng.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        reported, _ = ended(child, reading)
        done = tally.check_crash(path, max(done, reported))


def killed_at(path: Path, start: int, end: int, point: int, when: str, writing: int) -> None:
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
        write_tasks(path, start, end, writing)


def kills_at_each_call(folder: Path, step: int, tally: Tally) -> None:
    """From an empty folder, and from a store with an unfinished record, as a crash leaves it."""
    for start in (0, 5):
        for when in ("before", "within", "after"):
            point, killed = 0, True
            while killed:
                path = folder / f"{when}{start}{point}"
                if start:
                    with contextlib.closing(TaskLog.create(path, MANIFEST)) as log:
                        operate_all(log, 0, start)
                    with open(path / journal.RECORDS, "ab") as file:
                        file.write(payload(0) * 3)
                    (path / journal.INDEX).write_bytes(b"cut short")
                work = functools.partial(killed_at, path, start, start + 6, point, when)
                done, status = ended(*forked(work))
                killed = os.WIFSIGNALED(status)
                if killed:
                    tally.check_crash(path, max(done, start))
                elif status:
                    tally.unopened += 1
                shutil.rmtree(path, ignore_errors=True)
                point += step


def written_until_power_cut(path: Path, done: int, point: int, disk: Disk) -> int:
    """Operates until the watched call number `point`; returns how many operations were done."""

    def before(number, name, real, arguments):
        if number >= point:
            raise PowerCut
        return disk.watch(name, real, arguments)

    log = None
    with watching(before), contextlib.suppress(PowerCut):
        log = TaskLog.open(path, writes=True)
        while True:
            operate_all(log, done, done + 1)
            done += 1
    if log is not None:
        log.close()
    return done


def power_cuts(folder: Path, count: int, rng: random.Random, tally: Tally) -> None:
    """Power fails at a random call, after which some writes since the last flush are missing."""
    for i in tqdm.trange(count, desc="power cuts"):
        path, done = folder / f"power{i}", rng.randrange(1, 8)
        with contextlib.closing(TaskLog.create(path, MANIFEST)) as log:
            operate_all(log, 0, done)
        disk = Disk(path)
        done = written_until_power_cut(path, done, rng.randrange(1, 40), disk)
        disk.fail(path, rng)
        tally.check_crash(path, done)
        shutil.rmtree(path)


def damages(folder: Path, flips: int, cuts: int, rng: random.Random, tally: Tally) -> None:
    """One damage at a time, to a fresh copy of a store, some of whose tasks were removed."""
    done = 12
    whole, path = folder / "whole", folder / "damaged"
    with contextlib.closing(TaskLog.create(whole, MANIFEST)) as log:
        operate_all(log, 0, done)
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
        tally.check_damage(path, name, held_after(done))
        shutil.rmtree(path)


def full_disk(folder: Path, step: int, tally: Tally) -> None:
    """The disk is full at each write in turn, from the start or after half of it."""
    for half in (False, True):
        failed, point = True, 0
        while failed:
            path, failed = folder / f"full{half}{point}", False

            def before(number, name, real, arguments, point=point, half=half):
                nonlocal failed
                if number < point:
                    return real(*arguments)
                failed = True
                if half and number == point and len(arguments[1]) > 1:
                    return half_written(real, arguments)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            done = 0
            with contextlib.closing(TaskLog.create(path, MANIFEST)) as log:
                with contextlib.suppress(OSError), watching(before, ("pwrite",)):
                    for k in range(8):
                        operate_all(log, k, k + 1)
                        done = k + 1
                # The same writer goes on, once there is room again.
                done = tally.check_held(log, done)
                operate_all(log, done, done + 1)
            if failed:
                tally.check_crash(path, done + 1)
            point += step


def reader(path: Path, seed: int, until: float, writing: int) -> None:
    """Reads until the time is up; reports the reads, or dies of a torn or an older one."""
    rng, reads, known = random.Random(seed), 0, []
    log = None
    while time.monotonic() < until:
        if log is None or rng.random() < 0.05:
            if log is not None:
                log.close()
            log = TaskLog.open(path)
        tasks = log.refresh() if rng.random() < 0.5 or not known else len(log)
        assert tasks >= len(known) or not reads, (tasks, known)
        known += [-1] * (tasks - len(known))
        for i in {tasks - 1, rng.randrange(tasks)}:
            operation = read(log, i)
            operation = math.inf if operation is None else operation
            assert operation >= known[i], (i, operation, known[i])
            known[i] = operation
            reads += 1
    os.write(writing, struct.pack("<Q", reads))


def readers(folder: Path, seconds: float, tally: Tally) -> int:
    """Four readers, one writer; returns how many operations it did."""
    path, held, k = folder / "shared", held_after(6), 6
    with contextlib.closing(TaskLog.create(path, MANIFEST)) as log:
        operate_all(log, 0, k)
        until = time.monotonic() + seconds
        children = [forked(functools.partial(reader, path, seed, until)) for seed in range(4)]
        while time.monotonic() < until:
            held, k = operate(k, held, log), k + 1
        for child in children:
            reads, status = ended(*child)
            tally.accidents += 1
            tally.reads += reads
            tally.wrong += status != 0
        return k


def main(args: Args) -> dict:
    with usage_errors():
        writable_folder(args.out)
    step = 1
    if args.tiny:
        args = dataclasses.replace(args, kills=5, power_cuts=20, flips=40, cuts=20, seconds=1.0)
        step = 11
    rng, tallies = random.Random(args.seed), collections.defaultdict(Tally)
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        folder = Path(folder)
        random_kills(folder, args.kills, rng, tallies["random kills"])
        kills_at_each_call(folder, step, tallies["kills at each call"])
        power_cuts(folder, args.power_cuts, rng, tallies["power cuts"])
        damages(folder, args.flips, args.cuts, rng, tallies["damage"])
        full_disk(folder, step, tallies["full disk"])
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
    if any(t.lost or t.wrong or t.unopened or t.unnoticed or t.remaining for t in tallies.values()):
        raise SystemExit("error: something was lost, or damaged and not noticed, or remained")
    return result


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
