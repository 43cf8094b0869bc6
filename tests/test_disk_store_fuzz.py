"""Folders that somebody forged, checksums and all: a StoreError, never another error or a mask."""

import hashlib
import json
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import supsup_jax as ss
from supsup_jax.stores.disk import bank, manifest_of
from tests.conftest import random_masks, relu_net

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


@pytest.fixture(scope="module")
def net():
    return relu_net((6, 6, 5))


@pytest.fixture(scope="module")
def store(net, tmp_path_factory):
    """Its folder, and what is in its files."""
    path = tmp_path_factory.mktemp("fuzz") / "store"
    with ss.DiskStore.open(path, net, mode="x") as disk:
        for codec, mask in zip(("words", "enumerative"), random_masks(net, 2), strict=True):
            disk.append(mask, name="one", labels=["a"], codec=codec)
    return path, {file.name: file.read_bytes() for file in path.iterdir()}


def sha256(data):
    return hashlib.sha256(data).digest()


def signed(record):
    head = record[:24] + sha256(record[:24])[:8]
    record = head + record[32:-32]
    return record + sha256(record)


def ask(path, net):
    """Everything that reads, without a network and with it. Returns the words that came back."""
    words = []
    for network in (None, net):
        try:
            with ss.DiskStore.open(path, network) as disk:
                disk.verify()
                for i in range(len(disk)):
                    try:
                        disk.info(i)
                        words.append((i, disk.words(i)))
                    except ss.StoreError:
                        pass
                if network is not None and len(disk):
                    disk.load()
        except ss.StoreError:
            pass
    return words


@SETTINGS
@given(field=st.sampled_from(sorted(manifest_of(relu_net((2, 2))))), value=JSON)
def test_any_manifest(store, net, field, value):
    path, files = store
    manifest = json.loads(files["manifest.json"].splitlines()[0]) | {field: value}
    text = json.dumps(manifest).encode()
    (path / "manifest.json").write_bytes(text + b"\n" + sha256(text).hex().encode() + b"\n")
    try:
        ask(path, net)
    finally:
        (path / "manifest.json").write_bytes(files["manifest.json"])


@SETTINGS
@given(field=st.sampled_from(["name", "labels", "codec", "base", "kept", "mask_bytes"]), value=JSON)
def test_any_metadata(store, net, field, value):
    path, files = store
    data = files["tasks.bin"]
    m, b = struct.unpack_from("<IQ", data, 4)
    text = json.dumps(json.loads(data[32 : 32 + m]) | {field: value}).encode()
    head = struct.pack("<4sIQQ", b"SSRC", len(text), b, 0)
    forge(path, files, signed(head + bytes(8) + text + data[32 + m : 64 + m + b]), net)


@SETTINGS
@given(
    magic=st.sampled_from([b"SSRC", b"XXXX"]),
    sizes=st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)),
    task=st.integers(0, 3),
    rest=st.binary(max_size=300),
)
def test_any_head(store, net, magic, sizes, task, rest):
    path, files = store
    head = struct.pack("<4sIQQ", magic, *sizes, task)
    forge(path, files, signed(head + bytes(8) + rest + bytes(32)), net)


@SETTINGS
@given(
    row=st.tuples(st.integers(0, 3), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)),
    digest=st.binary(min_size=32, max_size=32),
    place=st.integers(0, 2),
)
def test_any_entry(store, net, row, digest, place):
    path, files = store
    entry = struct.pack("<QQQ32s", *row, digest)
    entry += sha256(entry)[:8]
    index = bytearray(files["index.bin"])
    index[64 * place : 64 * place + 64] = entry
    (path / "index.bin").write_bytes(index)
    try:
        # Records are not touched, so what comes back is what was written.
        for i, words in ask(path, net):
            np.testing.assert_array_equal(words, original(store, net, i))
    finally:
        (path / "index.bin").write_bytes(files["index.bin"])


def original(store, net, i):
    mask = random_masks(net, 2)[i]
    return np.asarray(bank.pack_leaves(net.layout.leaves(mask, "mask"), net.layout))


def forge(path, files, record, net):
    """Asks a store of this record alone, with and without an index that lists it."""
    row = struct.pack("<QQQ32s", 0, 0, len(record), record[-32:])
    try:
        (path / "tasks.bin").write_bytes(record)
        for index in (row + sha256(row)[:8], b""):
            (path / "index.bin").write_bytes(index)
            ask(path, net)
    finally:
        for name in ("tasks.bin", "index.bin"):
            (path / name).write_bytes(files[name])
