"""A MaskStore as one file, format 1: a NumPy .npz archive that is read whole or refused.

    manifest  uint8 [bytes], JSON: format, version, num_tasks, capacity, initializer, seed,
              fingerprint (sha256 of the weights), layout [[name, shape], ...] in order,
              states {name: [dtype, shape]}, sha256 {array: of its bytes}
    masks     uint32 [T, nw], a row a task; weight j of the layout's order is bit j // nw of
              word j % nw
    state.0 ... [T, ...], the tasks' normalisation statistics, in the order of `states`; a dtype
              that NumPy lacks, such as bfloat16, as unsigned integers of its width

Reading needs NumPy only, never pickle. The file is written beside its final name, flushed to
disk, then renamed, so that a reader sees the old store or the new one and nothing between.
`write` and `read` know no masks: a HopfieldStore goes through them in a format of its own.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from supsup_jax.layout import Layout, named_leaves
from supsup_jax.network import Network
from supsup_jax.stores.arrays import Bank, of_tasks, untile_words
from supsup_jax.types import StoreError

FORMAT = "supsup_jax.MaskStore"
VERSION = 1


class Origin(NamedTuple):
    """What the fixed weights of a store were drawn from, and which of them it masks."""

    layout: Layout
    initializer: str | None
    seed: jax.Array | None
    fingerprint: bytes  # sha256 of the weights; zeros where the store was made inside jit


def save(
    path: str | os.PathLike,
    tasks: Bank,
    origin: Origin,
    *,
    capacity: int,
    overwrite: bool,
) -> None:
    """Writes a bank and what its weights were drawn from; errors as `MaskStore.save`."""
    path = target(path, origin, overwrite)
    num_tasks = int(tasks.num_tasks)
    rows = untile_words(tasks.words, capacity)[:num_tasks]
    arrays = {"masks": np.asarray(rows)}
    for i, leaf in enumerate(jax.tree.leaves(tasks.states)):
        arrays[f"state.{i}"] = as_native(np.asarray(leaf[:num_tasks]))
    fields = {
        "num_tasks": num_tasks,
        "capacity": capacity,
        "states": {
            name: [str(leaf.dtype), list(leaf.shape[1:])]
            for name, leaf in named_leaves(tasks.states).items()
        },
    }
    write(path, FORMAT, VERSION, origin, fields, arrays)


def load(path: str | os.PathLike, net: Network) -> tuple[Bank, int]:
    """The bank at `path`, for tasks of `net`, and its capacity; errors as `MaskStore.load`."""
    manifest, arrays = read(path, FORMAT, VERSION, net)
    with sensible(path):
        num_tasks, capacity = int(manifest["num_tasks"]), int(manifest["capacity"])
        if not 0 <= num_tasks <= capacity:
            raise ValueError(f"{num_tasks} tasks in a capacity of {capacity}")
        stored = manifest["states"]
    if stored != (have := state_fields(net)):
        raise StoreError(f"{path} holds statistics {stored}, the network has {have}")
    want = {"masks": ((num_tasks, net.layout.num_words), "uint32")} | {
        f"state.{i}": ((num_tasks, *leaf.shape), str(as_native(np.zeros(0, leaf.dtype)).dtype))
        for i, leaf in enumerate(jax.tree.leaves(net.state))
    }
    check_arrays(path, manifest, arrays, want)
    like = jax.tree.leaves(net.state)
    states = [arrays[f"state.{i}"].view(leaf.dtype) for i, leaf in enumerate(like)]
    tasks = ((words, [leaf[i] for leaf in states]) for i, words in enumerate(arrays["masks"]))
    return of_tasks(net.layout, net.state, capacity, tasks), capacity


def state_fields(net: Network) -> dict[str, list]:
    """What a manifest says of the statistics of `net`'s tasks: {name: [dtype, shape]}."""
    return {
        name: [str(leaf.dtype), list(leaf.shape)] for name, leaf in named_leaves(net.state).items()
    }


def target(path: str | os.PathLike, origin: Origin, overwrite: bool) -> Path:
    """The path to write to, once nothing stands in the way. Errors as `MaskStore.save`."""
    path = Path(path)
    if not any(origin.fingerprint):
        raise StoreError("this store was created inside jit and knows no fingerprint to save")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name the file to save the store to")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; pass overwrite=True to replace it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to save {path.name} in; create it first")
    return path


def write(
    path: Path,
    format: str,
    version: int,
    origin: Origin,
    fields: dict[str, Any],
    arrays: dict[str, np.ndarray],
) -> None:
    """A store's file: arrays of NumPy's own dtypes under a manifest of `fields` and the origin.

    Whatever happens, `path` holds what it held or the whole new file.
    """
    manifest = {
        "format": format,
        "version": version,
        "initializer": origin.initializer,
        "seed": None if origin.seed is None else int(origin.seed),
        "fingerprint": origin.fingerprint.hex(),
        "layout": [[name, list(shape)] for name, shape in origin.layout.named_shapes],
        **fields,
        "sha256": {name: _digest(array) for name, array in arrays.items()},
    }
    text = json.dumps(manifest).encode()
    head = np.frombuffer(text + hashlib.sha256(text).digest(), np.uint8)
    _write_then_rename(path, {"manifest": head, **arrays})


def read(
    path: str | os.PathLike, format: str, version: int, net: Network
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The manifest and the arrays, unchecked as yet, of a store file of `net`'s weights.

    Errors as `MaskStore.load`.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no store at {path}")
    with open(path, "rb") as file:
        arrays = _read(path, file)
    manifest = _manifest(path, arrays, format, version)
    with sensible(path):
        check_network(path, manifest, net)
    return manifest, arrays


@contextlib.contextmanager
def sensible(path: str | os.PathLike) -> Iterator[None]:
    """Turns what goes wrong while a manifest's fields are read into a StoreError."""
    try:
        yield
    except StoreError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{path} has a manifest that makes no sense: {error!r}") from error


def check_arrays(
    path: str | os.PathLike,
    manifest: dict[str, Any],
    arrays: dict[str, np.ndarray],
    want: dict[str, tuple[tuple[int, ...], str]],
) -> None:
    """Raises StoreError unless the arrays of `want`, (shape, dtype) by name, are there unharmed."""
    with sensible(path):
        sums = dict(manifest["sha256"])
    for name, (shape, dtype) in want.items():
        if name not in arrays:
            raise StoreError(f"{path} lacks the array {name!r} that its manifest lists")
        array = arrays[name]
        if array.shape != shape or str(array.dtype) != dtype:
            raise StoreError(
                f"{path}: {name!r} must be {dtype} {shape}, got {array.dtype} {array.shape}"
            )
        if _digest(array) != sums.get(name):
            raise StoreError(f"{path}: {name!r} does not match its checksum; the file is damaged")


def _read(path, file):
    try:
        archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array")
        with archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # a damaged archive fails in a dozen ways, all of one meaning
        raise StoreError(f"{path} is not a whole store file: {error!r}") from error


def _manifest(path, arrays, format, version):
    head = arrays.get("manifest")
    if head is None or head.dtype != np.uint8 or head.ndim != 1:
        raise StoreError(f"{path} is not a store file: it has no manifest")
    text, digest = head.tobytes()[:-32], head.tobytes()[-32:]
    if hashlib.sha256(text).digest() != digest:
        raise StoreError(f"{path}: the manifest does not match its checksum; the file is damaged")
    manifest = json.loads(text)
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != format:
        raise StoreError(f"{path} is not a store file of {format}: its manifest names {found!r}")
    if manifest.get("version") != version:
        raise StoreError(
            f"{path} has format version {manifest.get('version')}, this release reads {version}: "
            "upgrade supsup_jax to read it"
        )
    return manifest


def check_network(path: str | os.PathLike, manifest: dict[str, Any], net: Network) -> None:
    """Raises StoreError, naming both, unless a store's layout and fingerprint are those of `net`.

    KeyError, TypeError or ValueError for a manifest that makes no sense: see `sensible`.
    """
    stored = {name: tuple(shape) for name, shape in manifest["layout"]}
    if list(stored.items()) != list(net.layout.shapes.items()):
        raise StoreError(
            f"{path} holds masks of {stored}, but the network masks {net.layout.shapes}"
        )
    if manifest["fingerprint"] != net.fingerprint:
        origin = (
            f"drawn by {manifest['initializer']} from seed {manifest['seed']}"
            if manifest["initializer"]
            else "given, not drawn from a seed"
        )
        raise StoreError(
            f"{path} belongs to other weights: its were {origin} (sha256 "
            f"{manifest['fingerprint'][:12]}...), this network's have {net.fingerprint[:12]}..."
        )


def as_native(array: np.ndarray) -> np.ndarray:
    """`array`; as unsigned integers where its dtype, such as bfloat16, is none of NumPy's own."""
    native = array.dtype.kind in "biufc"
    return array if native else array.view(f"u{array.dtype.itemsize}")


def _digest(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _write_then_rename(path, arrays):
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; a store is as readable as any other file of its owner.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(partial, 0o666 & ~umask)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
