"""Mending a store, and moving tasks in, out and away."""

from pathlib import Path

from supsup_jax.command import tasks as told
from supsup_jax.command.networks import network_of
from supsup_jax.stores import journal, mask_store, records
from supsup_jax.stores import repair as repairing
from supsup_jax.stores.disk import FORMAT, DiskStore
from supsup_jax.stores.mask_store import MaskStore
from supsup_jax.stores.origin import read_manifest

ALL = "all"


def repair(store: Path, /) -> None:
    """Makes a store one that can be appended to; says what it did, and drops no whole task.

    Exit code 1 where tasks are lost or set aside, which only a copy brings back.

    Args:
        store: Folder of the store.
    """
    read_manifest(journal.read_manifest(store), FORMAT, store)
    done, loses = repairing.repair(store)
    with DiskStore.open(store) as disk:
        if lost := told.lost(disk):
            done.append(told.advice(disk, lost))
    print("\n".join(done) if done else "nothing to mend")
    if lost or loses:
        raise SystemExit(1)


def export(store: Path, task: str, file: Path, /, without: tuple[int, ...] = ()) -> None:
    """Writes one task to a file; or all, but for some, to a new store, where they keep numbers.

    Args:
        store: Folder of the store.
        task: The task's number or name; or the word all.
        file: File to write; of all tasks, the folder of the new store.
        without: With all, the numbers of tasks to leave out, such as damaged ones.
    """
    with DiskStore.open(store) as disk:
        if task == ALL:
            kept = disk.copy(file, without)
            print(f"{len(kept):,} tasks in {file}")
        elif without:
            raise ValueError(f"--without is for the export of all tasks, got it with task {task}")
        else:
            disk.export(told.id_of(disk, task), file)


def import_(store: Path, file: Path, /, net: str | None = None, name: str | None = None) -> None:
    """Adds a task from a file of `supsup export` to a store of the same network.

    Or all tasks of a file of `MaskStore.save`, to a store that is created where none is.

    Args:
        store: Folder of the store.
        file: File to read.
        net: For a file of MaskStore.save, MODULE:FUNCTION as of supsup predict.
        name: Of the task, instead of the one in its file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no file at {file}")
    manifest, _ = records.read_alone(file)
    if manifest.get("format") == mask_store.FORMAT:
        if name is not None:
            raise ValueError(f"--name is for a file of one task, and {file} holds a store")
        network = network_of(manifest, file, net, mask_store.FORMAT)
        masks = MaskStore.load(file, network)
        with DiskStore.open(store, network, mode="a") as disk:
            ids = disk.extend(masks)
        print(f"tasks {ids.start} to {ids.stop - 1}" if ids else f"{file} holds no task")
        return
    with told.to_write(store) as disk:
        print(f"task {disk.append_file(file, name)}")


def replace(store: Path, task: str, file: Path, /, name: str | None = None) -> None:
    """Puts the task in a file of `supsup export` in the place of another, of which no bit remains.

    Args:
        store: Folder of the store.
        task: The number or name of the task to be replaced; its number stays.
        file: File to read.
        name: Of the task from now on, instead of the one in the file.
    """
    with told.to_write(store) as disk:
        i = told.id_of(disk, task)
        disk.replace_by_file(i, file, name)
        print(f"replaced task {i}")


def remove(store: Path, tasks: list[str], /) -> None:
    """Removes tasks for good: no bit of them remains in the store. Others keep their numbers.

    Args:
        store: Folder of the store.
        tasks: The tasks' numbers or names.
    """
    if not tasks:
        raise ValueError("name the tasks to remove, by their numbers; got none")
    with told.to_write(store) as disk:
        ids = {told.id_of(disk, task) for task in tasks}
        missing = ids - set(disk.ids.tolist())  # which raises before the first goes
        for i in [*missing, *sorted(ids, reverse=True)]:  # those coded against others first
            disk.remove(i)
            print(f"removed task {i}")
    for aside in sorted(store.glob("aside-*.bin")):
        print(f"not looked at: {aside}, which a repair set aside; delete it if it is of no use")


def compact(store: Path, /) -> None:
    """Gives back the bytes of tasks that were removed or replaced; needs a copy's room meanwhile.

    Args:
        store: Folder of the store.
    """
    with told.to_write(store) as disk:
        print(f"gave back {disk.compact():,} bytes")
