"""Files forged with their checksums: a StoreError, never another error or bits that differ."""

import contextlib
import struct

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import supsup_jax as ss
from supsup_jax import devices
from supsup_jax.stores import arrays
from supsup_jax.stores.journal import TaskLog
from supsup_jax.stores.records import (
    read_alone,
    record_bytes,
    sha256,
    signed_manifest,
    write_alone,
)
from tests.conftest import filled_store, random_masks, relu_net

SETTINGS = settings(
    max_examples=100,
    deadline=None,
    database=None,
    derandomize=True,  # the same examples in every run: what fails here fails again
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["words", "enumerative", "xor-delta", "float32", "object", "O", "V9"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
LACKING = object()
MANIFEST = ("format", "version", "initializer", "seed", "fingerprint", "layout", "states")
TASK = ("name", "labels", "codec", "base", "kept", "mask_bytes", "score_bytes")
METADATA = {
    "mask store": ("num_tasks", "capacity"),
    "hopfield store": ("num_tasks", "rule"),
    "exported task": TASK,
    "folder": TASK,
}
CONTAINERS = pytest.mark.parametrize("name", METADATA)


@pytest.fixture(scope="module")
def net():
    return relu_net((6, 6, 5))


@pytest.fixture(scope="module")
def folder(net, tmp_path_factory):
    """A store, and what is in its files."""
    path = tmp_path_factory.mktemp("forgery") / "store"
    with ss.DiskStore.open(path, net, mode="x") as disk:
        for codec, mask in zip(("words", "enumerative"), random_masks(net, 2), strict=True):
            disk.append(mask, name=codec, labels=["a"], codec=codec)
    return path, {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture(scope="module")
def want(net):
    """The words of its tasks."""
    packed = (arrays.pack_leaves(jax.tree.leaves(m), net.layout) for m in random_masks(net, 2))
    return [np.asarray(words) for words in packed]


@pytest.fixture(scope="module")
def forged(net, tmp_path_factory):
    """forged(container, fields of the manifest, of the metadata, body) is read as one was written
    but for these.
    """
    path, masks = tmp_path_factory.mktemp("forged"), random_masks(net, 2)
    filled_store(net, masks, capacity=4).save(path / "mask store")
    ss.hopfield.HopfieldStore.create(net).append(masks[0]).save(path / "hopfield store")
    other = ss.DiskStore.open(path / "other", net, mode="x")
    other.append(masks[0], name="one", labels=["a"])
    other.export(0, path / "exported task")
    other.remove(0)
    written = {name: read_alone(path / name) for name in METADATA if name != "folder"}
    written["folder"] = written["exported task"]
    written = {
        name: (m, record.metadata, bytes(record.body)) for name, (m, record) in written.items()
    }

    def read_folder(_, manifest, metadata, body):
        (path / "folder").mkdir(exist_ok=True)
        (path / "folder" / "manifest.json").write_bytes(signed_manifest(manifest))
        (path / "folder" / "tasks.bin").write_bytes(record_bytes(0, metadata, [body]))
        with ss.DiskStore.open(path / "folder", net) as disk:
            disk.load(), disk.info(0), disk.verify()

    def read_exported(file, *_):
        i = other.append_file(file)
        try:
            return other.info(i)
        finally:
            other.remove(i)  # so that its name is free again

    readers = {
        "mask store": lambda file, *_: ss.MaskStore.load(file, net),
        "hopfield store": lambda file, *_: ss.hopfield.HopfieldStore.load(file, net),
        "exported task": read_exported,
        "folder": read_folder,
    }

    def forge(name, manifest=(), metadata=(), body=None):
        held_manifest, held_metadata, held_body = written[name]
        parts = (
            changed(held_manifest, manifest),
            changed(held_metadata, metadata),
            held_body if body is None else body,
        )
        write_alone(path / "file", *parts[:2], [parts[2]], overwrite=True)
        return readers[name](path / "file", *parts)

    forge.written = written
    yield forge
    other.close()


def changed(fields, changes):
    fields = fields | dict(changes)
    return {name: value for name, value in fields.items() if value is not LACKING}


@CONTAINERS
@pytest.mark.parametrize(
    "change, message",
    [
        ({"version": 4}, "has format version 4, this release reads 3: upgrade"),
        ({"version": 1}, r"was written by supsup_jax 0\.1\.0 in format 1; this release reads"),
        (
            {"version": 2},
            r"was written by a supsup_jax 0\.2\.0 of before .* in format 2; this release",
        ),
        ({"format": "other"}, "is not a supsup_jax.*: its manifest names 'other'"),
        ({"layout": 7}, "make no sense"),
        ({"layout": []}, "make no sense"),
        ({"layout": [["kernel0", [1 << 80]]]}, "holds masks of"),
        ({"fingerprint": "abc"}, "make no sense"),
        ({"fingerprint": 32 * "ab"}, r"belongs to other weights.*\(sha256 abababababab"),
        ({"seed": "7"}, "make no sense"),
        ({"states": None}, "make no sense"),
        ({"states": {"mean": ["object", [3]]}}, "make no sense"),
        ({"states": {"mean": ["float32", [-3]]}}, "make no sense"),
        ({"states": {"mean": ["float32", [3]]}}, "holds statistics .* the network has {}"),
        *(({field: LACKING}, "make no sense|names None|version None") for field in MANIFEST),
    ],
)
def test_manifests_that_do_not_fit(forged, name, change, message):
    with pytest.raises(ss.StoreError, match=message):
        forged(name, manifest=change)


@pytest.mark.parametrize(
    "name, field, values",
    [
        ("mask store", "capacity", ("many", 0, 1, -1, None, 2.0, True)),
        ("mask store", "num_tasks", (99, -1, "2", None, 2.0)),
        ("hopfield store", "rule", ("x", [], None)),
        ("hopfield store", "num_tasks", (-1, "1", None, 1.5)),
        *(
            (name, field, values)
            for name in ("exported task", "folder")
            for field, values in {
                "codec": ("pickle", ["words"], "xor-delta", "bitpack", "enumerative"),
                "base": (0, True, "x"),
                "mask_bytes": (8, -12, 1 << 60, "12", None),
                "score_bytes": (4, -264, 264, 1 << 60, "0", None, False),
                "name": (7, []),
                "labels": (3, [3]),
                "kept": ([1], [1, "x"], None),
            }.items()
        ),
    ],
)
def test_metadata_that_makes_no_sense(forged, name, field, values):
    for value in (*values, LACKING):
        with pytest.raises(ss.StoreError, match=r"make no sense|not a coded mask"):
            forged(name, metadata={field: value})


def test_a_delta_against_itself_or_a_later_task(forged):
    for base in (0, 1, None, True, "0"):
        with pytest.raises(ss.StoreError, match="make no sense"):
            forged("folder", metadata={"codec": "xor-delta", "base": base})


@CONTAINERS
def test_bodies_of_another_size(forged, name):
    body = forged.written[name][2]
    for wrong in (b"", body[:-4], body + bytes(4)):
        with pytest.raises(ss.StoreError, match="bytes"):
            forged(name, body=wrong)


@CONTAINERS
@SETTINGS
@given(field=st.sampled_from(MANIFEST), value=JSON)
def test_any_manifest(forged, name, field, value):
    try:
        forged(name, manifest={field: value})
    except ss.StoreError:
        return
    # What drew the weights may be said wrongly, or not at all: the fingerprint is compared.
    unchanged = forged.written[name][0][field] == value
    assert unchanged or field == "initializer" or (field == "seed" and value is None)


@CONTAINERS
@SETTINGS
@given(data=st.data(), value=JSON)
def test_any_metadata(forged, name, data, value, monkeypatch):
    monkeypatch.setattr(devices, "device_bytes", lambda: 10**5)  # a capacity may be any that fits
    with contextlib.suppress(ss.StoreError):
        forged(name, metadata={data.draw(st.sampled_from(METADATA[name])): value})


def look(folder, net, **files):
    """The words that come back by number, of a folder with some files exchanged."""
    path, written = folder
    words = []
    try:
        for name, data in (written | files).items():
            (path / name).write_bytes(data)
        for network in (None, net):
            with contextlib.suppress(ss.StoreError), ss.DiskStore.open(path, network) as disk:
                disk.verify()
                for i in range(len(disk)):
                    with contextlib.suppress(ss.StoreError):
                        disk.info(i)
                        words.append((i, disk.words(i)))
        return words
    finally:
        for name, data in written.items():
            (path / name).write_bytes(data)


@SETTINGS
@given(
    magic=st.sampled_from([b"SSRC", b"XXXX"]),
    sizes=st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)),
    task=st.integers(0, 3),
    rest=st.binary(max_size=300),
)
def test_any_head(folder, net, magic, sizes, task, rest):
    """Of a record alone in its folder, with and without an index that lists it."""
    head = struct.pack("<4sIQQ", magic, *sizes, task)
    record = head + sha256(head)[:8] + rest
    record += sha256(record)
    row = struct.pack("<QQQ32s", 0, 0, len(record), record[-32:])
    for index in (row + sha256(row)[:8], b""):
        look(folder, net, **{"tasks.bin": record, "index.bin": index})


@SETTINGS
@given(
    row=st.tuples(st.integers(0, 3), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)),
    digest=st.binary(min_size=32, max_size=32),
    place=st.integers(0, 2),
)
@example(row=(0, 0, 2**63 + 32), digest=bytes(32), place=0)
@example(row=(2, 0, 31), digest=bytes(32), place=2)
def test_any_entry(folder, net, want, row, digest, place):
    entry = struct.pack("<QQQ32s", *row, digest)
    entry += sha256(entry)[:8]
    index = bytearray(folder[1]["index.bin"])
    index[64 * place : 64 * place + 64] = entry
    # Records are not touched, so what comes back is what was written.
    for i, words in look(folder, net, **{"index.bin": index}):
        np.testing.assert_array_equal(words, want[i])


def test_a_forged_layout_takes_no_memory(forged, tmp_path):
    manifest, metadata, body = forged.written["folder"]
    log = TaskLog.create(tmp_path / "store", manifest | {"layout": [["kernel0", [1 << 60]]]})
    log.append(metadata, [body])
    log.close()
    with pytest.raises(ss.StoreError, match="task 0 in 12 bytes"):
        ss.DiskStore.open(tmp_path / "store").words(0)
