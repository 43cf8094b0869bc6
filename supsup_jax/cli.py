"""The command `supsup`: looks at a store on disk, mends it, moves tasks, and asks it.

    supsup inspect STORE                    what is in it
    supsup verify STORE                     every checksum
    supsup repair STORE                     after a crash, or damage
    supsup export STORE TASK FILE           one task for a colleague
    supsup import STORE FILE                and back into a store of the same network
    supsup remove STORE TASK [TASK ...]     for good: no bit of them remains
    supsup compact STORE                    gives back the bytes that they took
    supsup predict STORE --input x.npy      the task and the label of each row

Exit code 0; 1 where `verify` finds something; 2 for wrong arguments or an unusable store.
"""

import contextlib
import csv
import importlib
import itertools
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from supsup_jax.extras import MissingExtraError, needed
from supsup_jax.kernels.contraction import cpu_form
from supsup_jax.network import SIGNED_CONSTANT, Network, signed_constant
from supsup_jax.stores import codecs, journal
from supsup_jax.stores.coded import CODECS
from supsup_jax.stores.disk import FORMAT, DiskStore
from supsup_jax.stores.origin import read_manifest
from supsup_jax.types import StoreError

# What an overlap picture reads: beyond, it would take minutes and show no more.
_PICTURE_TASKS, _PICTURE_WORDS = 256, 1 << 16
_BATCH = 128


def inspect(store: Path, /, tasks: int = 20, picture: Path | None = None) -> None:
    """What a store holds: network, tasks, densities, bytes by codec.

    Args:
        store: Folder of the store.
        tasks: How many of the last tasks to list.
        picture: File for a picture (.png) of how much any two masks overlap.
    """
    with DiskStore.open(store) as disk:
        manifest = disk.manifest
        sizes = {name: math.prod(shape) for name, shape in manifest["layout"]}
        weights = sum(sizes.values())
        origin = f"{manifest['initializer']}, seed {manifest['seed']}"
        ids = disk.ids.tolist()
        print(f"{store}: {len(ids):,} tasks of one network{_removed(disk)}")
        print(f"weights      {origin if manifest['initializer'] else 'given'}")
        print(f"fingerprint  {manifest['fingerprint']}")
        print(f"made by      {', '.join(f'{k} {v}' for k, v in manifest['versions'].items())}")
        print(f"products     by {cpu_form()} where this machine's CPU decides")
        print(f"masked       {weights:,} weights in {len(sizes)} leaves")
        infos = [disk.info(i) for i in ids]
        for name, size in sizes.items():
            kept = f"{np.mean([info.kept[name] for info in infos]) / size:.4f}" if infos else "-"
            print(f"  {name:30} {size:12,}   mean density {kept}")
        for codec in CODECS:
            if count := sum(info.codec == codec for info in infos):
                total = sum(info.mask_bytes for info in infos if info.codec == codec)
                print(f"{codec:12} {count:,} masks, {total:,} bytes")
        if infos:
            counts = [(n, info.kept[name]) for info in infos for name, n in sizes.items()]
            bound = sum(codecs.bound_of(*count) for count in counts)
            print(f"{'bound':12} {bound:,.0f} bytes, the information in these masks")
            print(f"{'statistics':12} {sum(info.state_bytes for info in infos):,} bytes")
            if scored := [info.score_bytes for info in infos if info.score_bytes]:
                print(f"{'scores':12} {sum(scored):,} bytes, of {len(scored):,} tasks")
            print(f"{'files':12} {sum(f.stat().st_size for f in store.iterdir()):,} bytes")
        first = max(0, len(infos) - tasks)
        if infos[first:]:
            print(f"\n{'task':>6}  {'density':>7}  {'codec':11}  {'bytes':>10}  name")
        for i, info in zip(ids[first:], infos[first:], strict=True):
            density = sum(info.kept.values()) / weights
            print(
                f"{i:6}  {density:7.4f}  {info.codec:11}  {info.mask_bytes:10,}  {info.name or ''}"
            )
        if picture is not None:
            _draw_overlap(disk, picture)


def verify(store: Path, /) -> None:
    """Reads every byte of a store against its checksums; exit code 1 where something is wrong.

    Args:
        store: Folder of the store.
    """
    with DiskStore.open(store) as disk:
        problems = disk.verify()
        for problem in problems:
            print(problem)
        lost = sum(problem.loses for problem in problems)
        told = f"{len(problems)} problems, {lost} of which lose data"
        print(f"{len(disk.ids):,} tasks, {told}{_removed(disk)}")
        if problems and not lost:
            print("supsup repair, or the next writer, mends them; supsup compact what is no record")
    if problems:
        raise SystemExit(1)


def repair(store: Path, /) -> None:
    """Makes a store one that can be appended to; says what it did, and drops no whole task.

    Args:
        store: Folder of the store.
    """
    read_manifest(journal.read_manifest(store), FORMAT, store)
    done = journal.repair(store)
    print("\n".join(done) if done else "nothing to mend")


def export(store: Path, task: int, file: Path, /) -> None:
    """Writes one task to a file.

    Args:
        store: Folder of the store.
        task: The task's number.
        file: File to write.
    """
    with DiskStore.open(store) as disk:
        disk.export(task, file)


def import_(store: Path, file: Path, /) -> None:
    """Adds a task from a file of `supsup export` to a store of the same network.

    Args:
        store: Folder of the store.
        file: File to read.
    """
    with _to_write(store) as disk:
        print(f"task {disk.append_file(file)}")


def remove(store: Path, tasks: list[int], /) -> None:
    """Removes tasks for good: no bit of them remains in the store. Others keep their numbers.

    Args:
        store: Folder of the store.
        tasks: The tasks' numbers.
    """
    if not tasks:
        raise ValueError("name the tasks to remove, by their numbers; got none")
    with _to_write(store) as disk:
        for task in tasks:
            disk.remove(task)
            print(f"removed task {task}")
    for aside in sorted(store.glob("aside-*.bin")):
        print(f"not looked at: {aside}, which a repair set aside; delete it if it is of no use")


def compact(store: Path, /) -> None:
    """Gives back the bytes of tasks that were removed or replaced; needs a copy's room meanwhile.

    Args:
        store: Folder of the store.
    """
    with _to_write(store) as disk:
        print(f"gave back {disk.compact():,} bytes")


def predict(
    store: Path,
    /,
    input: Path,
    net: str | None = None,
    together: bool = False,
    format: Literal["csv", "jsonl"] = "csv",
) -> None:
    """The task that each row belongs to, by one gradient, and its label under that task's mask.

    Args:
        store: Folder of the store.
        input: A .npy file of inputs [B, ...] as the network takes them.
        net: MODULE:FUNCTION, which returns the Network or the Flax NNX module; its masked weights
            are drawn anew where the store's were drawn from a seed. A chain of dense layers such
            as this library's MLP needs none.
        together: One task for all rows.
        format: csv, or one JSON object a line.
    """
    import supsup_jax as ss

    x = _read_input(input)
    network = _network(store, net)
    with DiskStore.open(store, network) as disk:
        if not len(disk.ids):
            raise StoreError(f"{store} holds no task to choose")
        held, tasks = disk.ids, disk.load()
        infos = {i: disk.info(i) for i in held.tolist()}
    if together:
        chosen = ss.one_shot(network, tasks, x, per_example=False).task
    rows = []
    for start in range(0, len(x), _BATCH):
        # The last batch is filled up, so that it needs no program of its own.
        batch = np.resize(x[start : start + _BATCH], (min(_BATCH, len(x)), *x.shape[1:]))
        ids = np.asarray(chosen if together else ss.one_shot(network, tasks, batch).task)
        ids = np.broadcast_to(ids, len(batch))
        labels = ss.predict(network, tasks, batch, ids).argmax(-1)
        rows += zip(held[ids].tolist(), labels.tolist(), strict=True)
    named = [
        {
            "row": row,
            "task": task,
            "task_name": infos[task].name,
            "label": label,
            "label_name": dict(enumerate(infos[task].labels or ())).get(label),
        }
        for row, (task, label) in enumerate(rows[: len(x)])
    ]
    if format == "jsonl":
        for row in named:
            print(json.dumps(row))
        return
    writer = csv.DictWriter(sys.stdout, list(named[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(named)


def main(argv: list[str] | None = None) -> None:
    """The console script."""
    with _one_line_errors():
        with needed("command"):
            import tyro
        app = tyro.extras.SubcommandApp()
        for command in (inspect, verify, repair, export, remove, compact, predict):
            app.command(command)
        app.command(name="import")(import_)
        app.cli(prog="supsup", description=__doc__, args=argv)


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:  # such as `supsup inspect STORE | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, TypeError, MissingExtraError) as error:
        print(f"error: {error}".replace("\n", " "), file=sys.stderr)
        raise SystemExit(2) from error


def _to_write(store):
    if not store.is_dir():  # which would be created
        raise FileNotFoundError(f"no store at {store}")
    return DiskStore.open(store, mode="a")


def _removed(disk):
    removed = len(disk) - len(disk.ids)
    return f"; {removed:,} more were removed" if removed else ""


def _read_input(path):
    try:
        x = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"--input {path} is no .npy file of an array: {error}") from error
    if not isinstance(x, np.ndarray) or x.ndim < 2 or not len(x):
        raise ValueError(f"--input must hold rows [B, ...], got {getattr(x, 'shape', type(x))}")
    return x


def _network(store, named):
    """The network of the store's masks."""
    from flax import nnx

    manifest = journal.read_manifest(store)
    read_manifest(manifest, FORMAT, store)
    found = _named_network(named) if named else _dense_network(manifest["layout"], store)
    if isinstance(found, nnx.Module):
        found = Network.from_nnx(found)
    if not isinstance(found, Network):
        raise TypeError(
            f"--net {named} must return a Network or module, got {type(found).__name__}"
        )
    if manifest["initializer"] == SIGNED_CONSTANT:
        found = signed_constant(found, manifest["seed"])
    return found


def _named_network(named):
    module, _, function = named.partition(":")
    if not function:
        raise ValueError(f"--net must be MODULE:FUNCTION, got {named!r}")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--net {named} cannot be had: {error}") from error


def _dense_network(layout, store):
    """An MLP of these kernels, if that is what they are of."""
    from flax import nnx

    from supsup_jax import models

    names, shapes = zip(*layout, strict=True)
    chain = all(len(shape) == 2 for shape in shapes) and all(
        a[1] == b[0] for a, b in itertools.pairwise(shapes)
    )
    if not chain or any(name != f"layer{i}/kernel" for i, name in enumerate(names)):
        raise ValueError(
            f"{store} holds masks of {list(names)}, which is no MLP of this library: name the "
            "network with --net MODULE:FUNCTION"
        )
    return models.MLP([shapes[0][0], *(shape[1] for shape in shapes)], rngs=nnx.Rngs(0))


def _draw_overlap(disk, path):
    """The part of the weights that either of two masks keeps which both keep."""
    with needed("experiments"):
        import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    held = disk.ids
    if not len(held):
        raise StoreError(f"{disk.path} holds no task to draw")
    ids = np.unique(held[:: -(-len(held) // _PICTURE_TASKS)])
    rows = [disk.words(i) for i in ids]
    step = -(-len(rows[0]) // _PICTURE_WORDS)
    words = np.stack([row[::step] for row in rows])
    overlap = np.empty((len(ids), len(ids)))
    for i, row in enumerate(words):
        both = np.bitwise_count(words & row).sum(1, dtype=np.int64)
        either = np.bitwise_count(words | row).sum(1, dtype=np.int64)
        overlap[i] = both / np.maximum(1, either)
    figure, axes = pyplot.subplots(figsize=(5, 4), layout="constrained")
    off = overlap[~np.eye(len(ids), dtype=bool)]
    shown = axes.imshow(overlap, vmin=off.min(initial=1), vmax=off.max(initial=0) or 1)
    figure.colorbar(shown, label="kept by both / kept by either")
    some = "" if len(ids) == len(held) else f", {len(ids)} of {len(held):,}"
    axes.set(xlabel="task", ylabel="task", title=f"overlap of masks{some}")
    if len(ids) < len(held):
        axes.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
