"""A store as one file, of masks or of Hopfield networks. See also `test_damage`, `test_forgery`."""

import json
import os

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import supsup_jax as ss
from supsup_jax.stores import records, system
from tests.conftest import filled_store, random_masks, relu_net

KINDS = {"MaskStore": ss.MaskStore, "HopfieldStore": ss.hopfield.HopfieldStore}


@pytest.fixture(scope="module")
def net():
    return relu_net((6, 6, 5))


@pytest.fixture(scope="module")
def stores(net):
    masks = random_masks(net, 3)
    reservoir = ss.hopfield.HopfieldStore.create(net, "hebbian")
    for mask in masks:
        reservoir = reservoir.append(mask)
    return {"MaskStore": filled_store(net, masks, capacity=4), "HopfieldStore": reservoir}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def saved(stores, kind, tmp_path):
    stores[kind].save(tmp_path / "store")
    return tmp_path / "store"


def tasks_with_statistics():
    """A network, and three tasks whose statistics, of several dtypes, are its own plus a number."""
    state = {
        "mean": np.float32([1.5, -2.25]),
        "half": jnp.bfloat16([[1.5], [-2.25]]),
        "count": np.int32(7),
    }
    net = ss.Network(
        lambda p, s, x, train: (x @ p["k"], s), {"k": np.ones((4, 2), np.float32)}, state=state
    )
    return net, [
        ss.Task(mask, {name: (leaf + i).astype(leaf.dtype) for name, leaf in state.items()})
        for i, mask in enumerate(random_masks(net, 3))
    ]


def test_round_trip(net, stores, kind, saved):
    loaded = KINDS[kind].load(saved, net)
    chex.assert_trees_all_equal(loaded, stores[kind])
    assert jax.tree.structure(loaded) == jax.tree.structure(stores[kind])  # capacity, rule


def test_an_empty_store_round_trips(net, kind, tmp_path):
    empty = KINDS[kind].create(net)
    empty.save(tmp_path / "s")
    chex.assert_trees_all_equal(KINDS[kind].load(tmp_path / "s", net), empty)


def test_statistics_round_trip(tmp_path):
    net, tasks = tasks_with_statistics()
    store = filled_store(net, tasks, capacity=3)
    store.save(tmp_path / "s")
    loaded = ss.MaskStore.load(tmp_path / "s", net)
    chex.assert_trees_all_equal(loaded, store)
    chex.assert_trees_all_equal(loaded.task(2).state, tasks[2].state)


def test_the_file_reads_as_its_page_says(net, stores, tmp_path):
    """`docs/format.md`, followed without the library."""
    stores["MaskStore"].save(tmp_path / "s")
    text, _, rest = (tmp_path / "s").read_bytes().split(b"\n", 2)
    manifest = json.loads(text)
    assert (manifest["format"], manifest["version"]) == ("supsup_jax.MaskStore", 3)
    assert (manifest["seed"], manifest["fingerprint"]) == (0, net.fingerprint)
    assert manifest["initializer"] == "signed_constant"
    assert manifest["layout"] == [["kernel0", [6, 6]], ["kernel1", [6, 5]]]
    assert manifest["versions"]["supsup_jax"] == ss.__version__
    m = int.from_bytes(rest[4:8], "little")
    assert json.loads(rest[32 : 32 + m]) == {"num_tasks": 3, "capacity": 4}
    masks = np.frombuffer(rest[32 + m : -32], "<u4").reshape(3, -1)
    for task, words in enumerate(masks):
        first, second = map(np.ravel, jax.tree.leaves(stores["MaskStore"].mask(task)))
        for j, kept in enumerate(first):  # 36 weights in two words, and 30 in one
            assert (int(words[j % 2]) >> (j // 2)) & 1 == kept
        assert [int(words[2]) >> j & 1 for j in range(32)] == [*second, 0, 0]


def test_saving_never_overwrites_unasked(net, stores, kind, saved):
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        stores[kind].save(saved)
    KINDS[kind].create(net).save(saved, overwrite=True)
    assert int(KINDS[kind].load(saved, net).num_tasks) == 0
    assert [path.name for path in saved.parent.iterdir()] == ["store"]


def test_a_failed_write_leaves_the_old_store_and_nothing_else(stores, kind, saved, monkeypatch):
    before, write = saved.read_bytes(), system.write_at

    def fail(fd, data, offset):
        write(fd, data[: len(data) // 2], offset)
        raise OSError("no space left on device")

    monkeypatch.setattr(system, "write_at", fail)
    with pytest.raises(OSError, match="no space"):
        stores[kind].save(saved, overwrite=True)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["store"]


def test_what_is_renamed_is_on_the_device(stores, kind, tmp_path, monkeypatch):
    """File, then name, then folder."""
    calls = []

    class Watched:
        def __getattr__(self, name):
            real = getattr(os, name)
            if name not in ("fsync", "replace"):
                return real
            return lambda *args: calls.append(name) or real(*args)

    for module in (records, system):
        monkeypatch.setattr(module, "os", Watched())
    stores[kind].save(tmp_path / "s")
    assert calls == ["fsync", "replace", "fsync"]


def test_another_network_is_refused_by_name(net, kind, saved):
    with pytest.raises(ss.StoreError, match=r"belongs to other weights.*from seed 0.*from seed 1"):
        KINDS[kind].load(saved, relu_net((6, 6, 5), seed=1))
    with pytest.raises(ss.StoreError, match=r"holds masks of .*kernel0.* but the network masks"):
        KINDS[kind].load(saved, relu_net((6, 7, 5)))
    state = ss.Network(
        lambda p, s, x, train: (x, s), net.params, state={"mean": np.ones(3, np.float32)}
    )
    with pytest.raises(ss.StoreError, match=r"holds statistics {}, the network has {'mean'"):
        KINDS[kind].load(saved, ss.signed_constant(state, 0))
    with pytest.raises(TypeError, match="net must be a Network, got str"):
        KINDS[kind].load(saved, "net")


def test_explicit_weights_are_told_apart(kind, tmp_path):
    net = ss.Network(lambda p, x: x @ p["k"], {"k": np.ones((4, 3), np.float32)})
    KINDS[kind].create(net).save(tmp_path / "s")
    other = ss.Network(net.apply, {"k": np.zeros((4, 3), np.float32)})
    with pytest.raises(ss.StoreError, match="given, not drawn from a seed"):
        KINDS[kind].load(tmp_path / "s", other)


def test_foreign_files_and_missing_ones(net, stores, kind, tmp_path):
    load = KINDS[kind].load
    with pytest.raises(FileNotFoundError, match="no store at"):
        load(tmp_path / "none", net)
    other = "MaskStore" if kind == "HopfieldStore" else "HopfieldStore"
    stores[other].save(tmp_path / "other")
    with pytest.raises(ss.StoreError, match=rf"names 'supsup_jax\.{other}'"):
        load(tmp_path / "other", net)
    (tmp_path / "text").write_text("hello")
    np.save(tmp_path / "array.npy", np.arange(3))
    np.savez(tmp_path / "other.npz", a=np.arange(3))
    pickled = np.asarray([{"a": 1}], dtype=object)
    np.savez(tmp_path / "pickle.npz", manifest=pickled)
    for name in ("text", "array.npy", "other.npz", "pickle.npz"):
        with pytest.raises(ss.StoreError, match=f"{name} does not match its checksum"):
            load(tmp_path / name, net)
    with pytest.raises((ss.StoreError, OSError)):
        load(tmp_path, net)


def test_a_file_of_the_former_format_says_what_reads_it(net, kind, tmp_path):
    """As supsup_jax 0.1.0 wrote them: NumPy archives whose first array is the manifest."""
    text = json.dumps({"format": f"supsup_jax.{kind}", "version": 1}).encode()
    np.savez(tmp_path / "s.npz", manifest=np.frombuffer(text + bytes(32), np.uint8), a=np.ones(3))
    with pytest.raises(
        ss.StoreError,
        match=r"s\.npz was written by supsup_jax 0\.1\.0 in format 1; this release reads format 3: "
        r"load it with supsup_jax 0\.1\.0",
    ):
        KINDS[kind].load(tmp_path / "s.npz", net)


def test_saving_where_nothing_can_be_saved(net, stores, kind, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        stores[kind].save(tmp_path / "missing" / "store")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        stores[kind].save(tmp_path, overwrite=True)
    with pytest.raises(IsADirectoryError, match=r"DiskStore\.open reads it"):
        KINDS[kind].load(tmp_path, net)
    traced = jax.jit(KINDS[kind].create)(net)
    with pytest.raises(ss.StoreError, match="created inside jit"):
        traced.save(tmp_path / "s")
    assert not list(tmp_path.iterdir())
