"""Which tasks of a store a command means, and which of them damage has taken."""

from collections.abc import Iterable
from pathlib import Path

from supsup_jax.stores import journal
from supsup_jax.stores.disk import DiskStore
from supsup_jax.stores.journal import Problem
from supsup_jax.types import StoreError


def to_write(store: Path) -> DiskStore:
    """The store, open to be changed. Raises FileNotFoundError where none is: none is created."""
    journal.read_manifest(store)  # else `open` would create one
    return DiskStore.open(store, mode="a")


def id_of(disk: DiskStore, told: str) -> int:
    """The task that is told by its number, or by its name. Raises ValueError for no or several."""
    found = disk.find(told)
    if told.isascii() and told.isdigit() and found != [int(told)]:
        if not found:
            return int(told)
        if int(told) < len(disk):  # one that was removed, too: it names no other
            raise ValueError(
                f"{told} is a task's number and the name of task {listed(found)}: write 0{told} "
                "for the number, or the number of the other"
            )
    if len(found) > 1:
        raise ValueError(f"tasks {listed(found)} are called {told!r}: tell the number of one")
    if not found:
        raise ValueError(
            f"no task of {disk.path} is called {told!r}: supsup find {disk.path} '*' lists names"
        )
    return found[0]


def lost(disk: DiskStore, problems: Iterable[Problem] | None = None) -> list[int]:
    """Ids of the tasks that cannot be read, being damaged, or coded against one that is.

    problems: of `disk.verify()`, where that was called.
    """
    problems = disk.verify() if problems is None else problems
    held = disk.ids.tolist()
    # The record that says that a task was removed may be damaged, and nobody's loss.
    named = {problem.task for problem in problems if problem.task is not None}
    found = named & set(held)
    for i in held if found else ():  # in order: a base comes before
        try:
            if disk.info(i).base in found:
                found.add(i)
        except StoreError:
            found.add(i)
    return sorted(found)


def advice(disk: DiskStore, lost: list[int]) -> str:
    """What there is to do where these tasks are lost."""
    without = " ".join(map(str, lost))
    return (
        f"lost: task {listed(lost)}; the other {len(disk.ids) - len(lost):,} are whole. Answer by "
        f"them with supsup predict --without {without}, copy them with supsup export {disk.path} "
        f"all FOLDER --without {without}; or restore the store from a copy"
    )


def listed(ids: list[int]) -> str:
    """The ids in words, with commas."""
    return ", ".join(map(str, ids))
