"""Looking at a store: what is in it, whether it is whole, and who is called what."""

import fnmatch
import math
from pathlib import Path

import numpy as np

from supsup_jax.command import tasks as told
from supsup_jax.extras import needed
from supsup_jax.kernels.contraction import cpu_form
from supsup_jax.stores import codecs, mask_store, records
from supsup_jax.stores import disk as disks
from supsup_jax.stores.coded import CODECS
from supsup_jax.stores.disk import DiskStore
from supsup_jax.types import StoreError

# What an overlap picture reads: beyond, it would take minutes and show no more.
_PICTURE_TASKS, _PICTURE_WORDS = 256, 1 << 16


def inspect(store: Path, /, tasks: int = 20, picture: Path | None = None) -> None:
    """What a store holds: network, tasks, densities, bytes by codec.

    Args:
        store: Folder of the store; or a file of `MaskStore.save` or `supsup export`.
        tasks: How many of the last tasks to list.
        picture: File for a picture (.png) of how much any two masks overlap.
    """
    if store.is_file():
        _inspect_file(store)
        return
    with DiskStore.open(store) as disk:
        manifest = disk.manifest
        sizes = {name: math.prod(shape) for name, shape in manifest["layout"]}
        weights = sum(sizes.values())
        ids = disk.ids.tolist()
        print(f"{store}: {len(ids):,} tasks of one network{_removed(disk)}")
        _print_origin(manifest)
        print(f"products     by {cpu_form()} where this machine's CPU decides")
        print(f"masked       {weights:,} weights in {len(sizes)} leaves")
        try:
            infos = [disk.info(i) for i in ids]
        except StoreError as error:
            raise StoreError(f"{error}; supsup verify tells all that is lost") from error
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


def find(store: Path, name: str, /) -> None:
    """The numbers, names and labels of the tasks of a name; exit code 1 where there is none.

    As far as they can be read: supsup verify tells what is damaged.

    Args:
        store: Folder of the store.
        name: The name, or a pattern of it, such as 'inv*'.
    """
    with DiskStore.open(store) as disk:
        found = 0
        for i, called in disk.names().items():
            if called == name or fnmatch.fnmatchcase(called, name):
                found += 1
                try:
                    labels = ", ".join(disk.info(i).labels or ())
                except StoreError:
                    labels = "(damaged)"
                print(f"{i:6}  {called}  {labels}".rstrip())
    if not found:
        raise SystemExit(1)


def verify(store: Path, /) -> None:
    """Reads every byte of a store against its checksums; exit code 1 where something is wrong.

    Args:
        store: Folder of the store.
    """
    with DiskStore.open(store) as disk:
        problems = disk.verify()
        for problem in problems:
            print(problem)
        losing = sum(problem.loses for problem in problems)
        summary = f"{len(problems)} problems, {losing} of which lose data"
        print(f"{len(disk.ids):,} tasks, {summary}{_removed(disk)}")
        if problems and not losing:
            print("supsup repair, or the next writer, mends them; supsup compact what is no record")
        if lost := told.lost(disk, problems):
            print(told.advice(disk, lost))
    if problems:
        raise SystemExit(1)


def _inspect_file(path):
    manifest, record = records.read_alone(path)
    kind = manifest.get("format")
    if kind == mask_store.FORMAT:
        held = record.metadata.get("num_tasks")
        print(f"{path}: {held} tasks of one network in one file, of MaskStore.save")
        _print_origin(manifest)
        print(f"To a folder, to which tasks can be added: supsup import FOLDER {path}")
    elif kind == disks.FORMAT:
        labels = ", ".join(record.metadata.get("labels") or ()) or "no names"
        print(f"{path}: one task, {record.metadata.get('name')!r}, labels: {labels}")
        _print_origin(manifest)
        print(f"Into a store of this network: supsup import STORE {path}")
    else:
        print(f"{path}: a {kind}, which only the library reads")


def _print_origin(manifest):
    origin = f"{manifest['initializer']}, seed {manifest['seed']}"
    print(f"weights      {origin if manifest['initializer'] else 'given'}")
    print(f"fingerprint  {manifest['fingerprint']}")
    print(f"made by      {', '.join(f'{k} {v}' for k, v in manifest['versions'].items())}")


def _removed(disk):
    removed = len(disk) - len(disk.ids)
    return f"; {removed:,} more were removed" if removed else ""


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
