"""What is to be done by name about a store that no writer opens: some of it is lost."""

import itertools
import os
from pathlib import Path
from typing import NamedTuple

from supsup_jax.stores import records, system
from supsup_jax.stores.files import INDEX
from supsup_jax.stores.journal import TaskLog, read_manifest


class Repaired(NamedTuple):
    """What `repair` did, in words. loses: whether something was given up or set aside."""

    done: list[str]
    loses: bool


def repair(path: str | os.PathLike, timeout: float = 0.0) -> Repaired:
    """Makes the store at `path` one that can be appended to, and says what was done.

    Drops an unfinished record at the end; makes the index again from the records; gives up tasks
    whose records were cut off, which are gone; sets aside, in a file beside the others, what lies
    behind a damaged record whose length nobody knows. A whole task is never dropped, a damaged one
    in the midst keeps its number, and that of one given up or set aside no other gets. One that was
    cut short can be repeated. Raises as `TaskLog.open`.
    """
    done = []
    log = TaskLog(Path(path), read_manifest(path), True, timeout)
    try:
        log.refresh()
        size = log._size()
        cut = [task for task, entry in enumerate(log._entries) if entry and entry.end > size]
        removed = set(log._removed)
        for task in cut:
            log._entries[task] = None
        log._end = max((entry.end for entry in log._entries if entry), default=0)
        for span in [*log._gaps(), (log._end, size)]:  # an entry may have been wrong
            log._take_all(log._whole_records(*span))
        gone = [task for task in cut if log._entries[task] is None]
        done += [
            f"gave up task {task}: its record was cut off, and no other gets its number"
            for task in gone
            if task not in removed
        ]
        loses = bool(done)
        if size > log._end:
            tail = f"{size - log._end:,} bytes behind task {len(log) - 1}"
            if behind := log._whole_records_behind(log._end):
                aside = _set_aside(log, system.read_at(log._records, log._end, size - log._end))
                loses = True
                done.append(f"set aside in {aside}: {tail}, with whole records among them")
                # As many as there is room for: a number may be forged.
                most = len(log) + (size - log._end) // records.LEAST_BYTES
                gone += range(len(log), max((i + 1 for i in behind if i < most), default=0))
            else:
                done.append(f"dropped {tail}, of an unfinished record")
        done += [f"mended {INDEX}: {what}" for what in log._index_problems()]
        done += [
            f"erased {length:,} bytes of a former task at {at:,}"
            for at, length, _ in log._to_erase(thorough=True)
        ]
        log._drop_partials()
        # Before the index is made again, which a kill must not find without them, and the highest
        # first: they take the place of the bytes that told it.
        for task in reversed(gone):
            log._write(task, records.REMOVED, [])
        log._write_ends(thorough=True)
    finally:
        log.close()
    return Repaired(done, loses)


def _set_aside(log, data):
    """Writes a file of its own beside the others; returns its name."""
    for number in itertools.count():
        name = f"aside-{log._end}{f'-{number}' * (number > 0)}.bin"
        aside = log.folder / name
        if aside.exists():
            if aside.read_bytes() == data:  # of a repair that was cut short
                return name
            continue
        partial = log.folder / f"{name}.partial"
        system.write_file(partial, [data], os.O_CREAT | os.O_TRUNC)
        os.replace(partial, aside)
        system.flush_folder(log.folder)
        return name
