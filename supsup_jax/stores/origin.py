"""Whose masks a store holds, and what every file of masks begins with: a manifest that says so.

`docs/format.md` is the page of the files' format.
"""

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from supsup_jax.checks import check_type, is_traced
from supsup_jax.layout import Layout, named_leaves
from supsup_jax.network import Network
from supsup_jax.stores import records
from supsup_jax.types import Facts, PyTree, StoreError
from supsup_jax.version import __version__

VERSION = 3  # of all that is written: folders, files, coded masks
# Format 1 was framed otherwise; in 2 a word held weights from all over the network.
_FORMER = {1: "supsup_jax 0.1.0", 2: "a supsup_jax 0.2.0 of before 27 November 2026"}

# Of one task's statistics, by name.
States = dict[str, tuple[np.dtype, tuple[int, ...]]]


def check_layout(layout: Layout, net: Network, what: Any = "the store") -> None:
    """Raises TypeError or StoreError unless `net` masks the leaves of this layout."""
    check_type("net", net, Network)
    if layout.named_shapes != net.layout.named_shapes:
        raise StoreError(
            f"{what} holds masks of {layout.shapes}, but the network masks {net.layout.shapes}"
        )
    if layout.treedef not in (net.layout.treedef, _as_list(layout.named_shapes)):
        raise StoreError(
            f"{what} holds masks of the structure {layout.treedef}, "
            f"but the network's is {net.layout.treedef}"
        )


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("seed", "fingerprint"),
    meta_fields=("layout", "initializer"),
)
@dataclasses.dataclass(frozen=True)
class Origin:
    """Whose masks a store holds: which leaves of a network, and the weights that they belong to.

    layout: of the masked leaves; a list of them where it was read from a file.
    initializer: what drew the weights; None where they were given.
    seed: that they were drawn from, uint32 []; None where they were given.
    fingerprint: sha256 of all weights, uint8 [32]; zeros where it was made inside jit, None for a
      store inside a program, which nobody asks whose it is.
    """

    layout: Layout
    initializer: str | None = None
    seed: Any = None
    fingerprint: Any = None

    @classmethod
    def of(cls, net: Network) -> "Origin":
        """What tells `net` from others. Raises TypeError for what is no Network."""
        check_type("net", net, Network)
        digest = bytes(32) if is_traced(net.params) else bytes.fromhex(net.fingerprint)
        return cls(
            net.layout,
            net.initializer,
            # A copy: donating a store must never consume what the network holds.
            seed=None if net.seed is None else jnp.array(net.seed, copy=True),
            fingerprint=jax.device_put(np.frombuffer(digest, np.uint8)),
        )

    @classmethod
    def read(cls, manifest: dict[str, Any]) -> "Origin":
        """Of `fields`. Raises KeyError, TypeError or ValueError for what makes no sense."""
        shapes = tuple((name, tuple(shape)) for name, shape in manifest["layout"])
        if not (shapes and all(isinstance(name, str) for name, _ in shapes)):
            raise ValueError(f"the leaves {shapes!r}")
        _check_sizes(shape for _, shape in shapes)
        initializer, seed = manifest["initializer"], manifest["seed"]
        if not (isinstance(initializer, str | None) and type(seed) in (int, type(None))):
            raise ValueError(f"weights drawn by {initializer!r} from seed {seed!r}")
        digest = np.frombuffer(bytes.fromhex(manifest["fingerprint"]), np.uint8)
        if len(digest) != 32:
            raise ValueError(f"the fingerprint {manifest['fingerprint']!r}")
        return cls(Layout(_as_list(shapes), shapes), initializer, seed, digest)

    @property
    def fields(self) -> dict[str, Any]:
        """As it stands in a manifest. Outside jit."""
        return {
            "initializer": self.initializer,
            "seed": None if self.seed is None else int(self.seed),
            "fingerprint": self.sha256,
            "layout": [[name, list(shape)] for name, shape in self.layout.named_shapes],
        }

    @property
    def sha256(self) -> str | None:
        """The fingerprint in hexadecimal; None where it has no value."""
        if self.fingerprint is None or is_traced(self.fingerprint):
            return None
        digest = np.asarray(self.fingerprint).tobytes()
        return digest.hex() if any(digest) else None

    def check(self, net: Network, what: Any = "the store") -> None:
        """Raises TypeError or StoreError, naming both, unless these are `net`'s leaves and weights.

        Weights are compared by seed, where both were drawn, and by fingerprint where both are at
        hand: a network's is computed when a store is created or loaded for it. Neither inside jit.
        what: `net` is compared with, for the message.
        """
        check_layout(self.layout, net, what)
        pairs = (_value(self.seed), _value(net.seed)), (self.sha256, net._fingerprint)
        if any(None not in pair and pair[0] != pair[1] for pair in pairs):
            (seed, other_seed), (sha256, other_sha256) = pairs
            alike = seed is not None and (self.initializer, seed) == (net.initializer, other_seed)
            why = "; what is not masked differs: make the module of the same rngs" if alike else ""
            raise StoreError(
                f"{what} belongs to other weights: "
                f"{_told(self.initializer, seed, sha256)}, this network's "
                f"{_told(net.initializer, other_seed, other_sha256)}{why}"
            )


class Owned:
    """A store of one network's masks: its `origin` says whose."""

    origin: "Origin"

    @property
    def layout(self) -> Layout:
        """Which leaves are masked, and their order."""
        return self.origin.layout

    def check_fits(self, net: Network) -> None:
        """Raises StoreError unless the masks have the network's leaves, shapes and weights.

        What can be compared when: see `Origin.check`.
        """
        self.origin.check(net)


def _as_list(shapes):
    return jax.tree.structure([0] * len(shapes))


def _value(seed):
    return None if seed is None or is_traced(seed) else int(seed)


def _told(initializer, seed, sha256):
    told = f"drawn by {initializer} from seed {seed}"
    if seed is None:
        told = "given, not drawn from a seed"
    return f"{told} (sha256 {sha256[:12]}...)" if sha256 else told


def manifest_of(kind: str, origin: Origin, state: PyTree = None) -> dict[str, Any]:
    """What a file of a store of this kind begins with.

    state: one task's statistics, or their shapes and dtypes; None where there are none.
    """
    return {
        "format": kind,
        "version": VERSION,
        **origin.fields,
        "states": _state_fields(state),
        "versions": {"supsup_jax": __version__, "jax": jax.__version__, "numpy": np.__version__},
    }


def read_manifest(
    manifest: dict[str, Any], kind: str, path: str | os.PathLike, net: Network | None = None
) -> tuple[Origin, States]:
    """Whose masks a file of this kind holds, and what statistics come with each.

    Raises StoreError, naming what differs, unless the manifest makes sense, is of this kind and
    version, and belongs to `net`, where one is given.
    """
    if manifest.get("format") != kind:
        raise StoreError(f"{path} is not a {kind}: its manifest names {manifest.get('format')!r}")
    check_version(path, manifest.get("version"))
    with sensible(path):
        origin, states = Origin.read(manifest), _read_states(manifest["states"])
    if net is not None:
        Origin.of(net)  # from here on its fingerprint is at hand
        origin.check(net, path)
        if manifest["states"] != (have := _state_fields(state_in(states, net))):
            raise StoreError(
                f"{path} holds statistics {manifest['states']}, the network has {have}"
            )
    return origin, states


def check_version(what: Any, version: Any) -> None:
    """Raises StoreError, saying what reads it, unless `what` is of the version read here."""
    if type(version) is int and version in _FORMER:
        writer = _FORMER[version]
        raise StoreError(
            f"{what} was written by {writer} in format {version}; this release reads "
            f"format {VERSION}: load it with {writer}"
        )
    if version != VERSION:
        raise StoreError(
            f"{what} has format version {version}, this release reads {VERSION}: "
            "upgrade supsup_jax to read it"
        )


def save_arrays(
    path: str | os.PathLike,
    manifest: dict[str, Any],
    metadata: dict[str, Any],
    arrays: Iterable[jax.Array],
    overwrite: bool,
) -> None:
    """Writes a store as one file, wholly or not at all.

    Raises StoreError for a store made inside jit, and as `records.write_alone`.
    """
    if manifest["fingerprint"] is None:
        raise StoreError("this store was created inside jit and knows no fingerprint to save")
    records.write_alone(path, manifest, metadata, list(map(as_bytes, arrays)), overwrite)


def like_state(net: Network, labelled: bool = False, moments: Iterable[str] = ()) -> PyTree:
    """One task's statistics, with its number of labels where tasks tell it, and the moments of its
    scores by the objectives of these names.
    """
    if not (labelled or (moments := sorted(moments))):
        return net.state
    count = jax.ShapeDtypeStruct((), jnp.int32) if labelled else None
    pair = jax.ShapeDtypeStruct((2,), jnp.float32)
    return Facts(net.state, count, dict.fromkeys(moments, pair) or None)


def state_in(states: Iterable[str], net: Network) -> PyTree:
    """What one task's statistics are like, of the names of their leaves in a file."""
    if {*states} == {*named_leaves(net.state)}:  # whatever a network calls its own
        return net.state
    named = [name.removeprefix("moments/") for name in states if name.startswith("moments/")]
    return like_state(net, "num_labels" in states, named)


def load_record(path: str | os.PathLike, kind: str, net: Network) -> tuple[records.Record, PyTree]:
    """The record of a file of `save_arrays`, once it is seen to belong to `net`; and what one
    task's statistics in it are like.

    Raises FileNotFoundError when nothing is there, IsADirectoryError for a folder, and StoreError,
    naming what differs, for a file that is damaged, of something else, of another version, or of
    another network.
    """
    check_type("net", net, Network)
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no store at {path}")
    if path.is_dir():
        raise IsADirectoryError(
            f"{path} is a folder, and this reads a file: DiskStore.open reads it"
        )
    with open(path, "rb") as file:
        start = file.read(1024)
    if start.startswith(b"PK\3\4") and b'"supsup_jax.' in start:  # a NumPy archive of ours
        check_version(path, 1)
    manifest, record = records.read_alone(path)
    _, states = read_manifest(manifest, kind, path, net)
    return record, state_in(states, net)


def as_bytes(array: jax.Array | np.ndarray) -> memoryview:
    """The bytes of an array in C order; any dtype, also such as NumPy lends no buffer of."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def arrays_in(
    body: memoryview, kinds: Iterable[tuple[Any, tuple[int, ...]]], path: str | os.PathLike
) -> list[np.ndarray]:
    """The arrays, of these (dtype, shape), that lie one behind another in a record's body.

    Raises StoreError unless they fill it. Copies nothing.
    """
    kinds = [(np.dtype(dtype), shape) for dtype, shape in kinds]
    sizes = [dtype.itemsize * math.prod(shape) for dtype, shape in kinds]
    if sum(sizes) != len(body):
        raise StoreError(f"{path} has a body of {len(body):,} bytes for arrays of {sum(sizes):,}")
    arrays, start = [], 0
    for (dtype, shape), size in zip(kinds, sizes, strict=True):
        arrays.append(np.frombuffer(body[start : start + size], dtype).reshape(shape))
        start += size
    return arrays


@contextlib.contextmanager
def sensible(path: str | os.PathLike) -> Iterator[None]:
    """Turns what goes wrong while fields of a file are read into a StoreError."""
    try:
        yield
    except StoreError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise StoreError(f"{path} has fields that make no sense: {error!r}") from error


def _state_fields(state):
    """{name: [dtype, shape]} of one task's statistics."""
    return {name: [str(leaf.dtype), list(leaf.shape)] for name, leaf in named_leaves(state).items()}


def _read_states(fields):
    if not isinstance(fields, dict):
        raise TypeError(f"the statistics {fields!r}")
    states = {name: (np.dtype(dtype), tuple(shape)) for name, (dtype, shape) in fields.items()}
    if any(dtype.hasobject for dtype, _ in states.values()):
        raise ValueError(f"the statistics {states!r}")
    _check_sizes(shape for _, shape in states.values())
    return states


def _check_sizes(shapes):
    if not all(type(size) is int and size >= 0 for shape in shapes for size in shape):
        raise ValueError("the shapes of leaves are no sizes")
