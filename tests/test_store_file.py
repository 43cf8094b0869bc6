import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import supsup_jax as ss
from supsup_jax.stores import store_file
from tests.conftest import filled_store, random_masks, relu_net


@pytest.fixture
def saved(small_net, tmp_path):
    store = filled_store(small_net, random_masks(small_net, 3), capacity=4)
    path = tmp_path / "store.npz"
    store.save(path)
    return store, path


def test_round_trip(small_net, saved):
    store, path = saved
    loaded = ss.MaskStore.load(path, small_net)
    chex.assert_trees_all_equal(loaded, store)
    assert loaded.capacity == 4


def test_statistics_round_trip(norm_net, tmp_path):
    tasks = [
        ss.Task(mask, jax.tree.map(lambda leaf, i=i: leaf + i, norm_net.state))
        for i, mask in enumerate(random_masks(norm_net, 3))
    ]
    store = filled_store(norm_net, tasks, capacity=2)
    store.save(tmp_path / "s")
    loaded = ss.MaskStore.load(tmp_path / "s", norm_net)
    chex.assert_trees_all_equal(loaded, store)
    chex.assert_trees_all_equal(loaded.task(2).state, tasks[2].state)


def test_statistics_in_bfloat16_round_trip(tmp_path):
    state = {"mean": jnp.asarray([1.5, -2.25], jnp.bfloat16)}
    net = ss.Network(lambda p, s, x, train: (x @ p["k"], s), {"k": jnp.ones((4, 2))}, state=state)
    mask = random_masks(net, 1)[0]
    filled_store(net, [ss.Task(mask, state)]).save(tmp_path / "s")
    chex.assert_trees_all_equal(ss.MaskStore.load(tmp_path / "s", net).task(0).state, state)


def test_an_empty_store_round_trips(small_net, tmp_path):
    ss.MaskStore.create(small_net).save(tmp_path / "s")
    assert int(ss.MaskStore.load(tmp_path / "s", small_net).num_tasks) == 0


def test_the_file_reads_as_its_page_says(small_net, saved):
    """The format's documentation, followed with NumPy alone."""
    store, path = saved
    with np.load(path, allow_pickle=False) as archive:
        masks = archive["masks"]
        manifest = json.loads(archive["manifest"].tobytes()[:-32])
    assert manifest["seed"] == 0
    assert manifest["fingerprint"] == small_net.fingerprint
    num_words = masks.shape[1]
    for task in range(3):
        flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(store.mask(task))])
        for j, kept in enumerate(flat):
            assert (int(masks[task, j % num_words]) >> (j // num_words)) & 1 == kept


def test_saving_never_overwrites_unasked(small_net, saved):
    store, path = saved
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        store.save(path)
    bigger = store.append(random_masks(small_net, 1, seed=9)[0])
    bigger.save(path, overwrite=True)
    assert int(ss.MaskStore.load(path, small_net).num_tasks) == 4
    assert [p.name for p in path.parent.iterdir()] == ["store.npz"]


def test_a_failed_write_leaves_the_old_store_and_nothing_else(small_net, saved, monkeypatch):
    store, path = saved
    before = path.read_bytes()

    def fail(file, **arrays):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(store_file.np, "savez", fail)
    with pytest.raises(OSError, match="no space"):
        store.save(path, overwrite=True)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["store.npz"]


def test_every_truncation_is_refused(small_net, saved):
    _, path = saved
    whole = path.read_bytes()
    for size in [0, 1, 10, *range(50, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ss.StoreError):
            ss.MaskStore.load(path, small_net)


def test_every_flipped_bit_is_refused_or_harmless(small_net, saved):
    store, path = saved
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.choice(len(whole), 300, replace=False):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            loaded = ss.MaskStore.load(path, small_net)
        except ss.StoreError:
            continue
        # Some bits of a zip archive mean nothing, such as its time stamps.
        chex.assert_trees_all_equal(loaded, store)


def _rewrite(path, change=None, **arrays):
    """The file with its manifest changed and signed anew, or arrays exchanged."""
    with np.load(path, allow_pickle=False) as archive:
        content = {name: archive[name] for name in archive.files}
    if change is not None:
        manifest = json.loads(content["manifest"].tobytes()[:-32])
        change(manifest)
        text = json.dumps(manifest).encode()
        digest = store_file.hashlib.sha256(text).digest()
        content["manifest"] = np.frombuffer(text + digest, np.uint8)
    content |= arrays
    np.savez(path, **{name: array for name, array in content.items() if array is not None})


def test_what_does_not_fit_is_refused_by_name(small_net, saved):
    _, path = saved
    whole = path.read_bytes()
    for change, message in (
        ({"change": lambda m: m.update(version=2)}, "format version 2, this release reads 1"),
        ({"change": lambda m: m.update(format="other")}, "not a store file"),
        ({"change": lambda m: m.pop("capacity")}, "makes no sense"),
        ({"change": lambda m: m.update(capacity="many")}, "makes no sense"),
        ({"change": lambda m: m.update(num_tasks=99)}, "makes no sense"),
        ({"change": lambda m: m.pop("layout")}, "makes no sense"),
        ({"masks": np.zeros((3, 3), np.uint32)}, "'masks' does not match its checksum"),
        ({"masks": np.zeros((2, 3), np.uint32)}, r"'masks' must be uint32 \(3, 3\)"),
        ({"masks": np.zeros((3, 3), np.int64)}, "'masks' must be uint32"),
        ({"masks": None}, "lacks the array 'masks'"),
        ({"manifest": None}, "no manifest"),
    ):
        path.write_bytes(whole)
        _rewrite(path, **change)
        with pytest.raises(ss.StoreError, match=message):
            ss.MaskStore.load(path, small_net)


def test_another_network_is_refused_by_name(saved, norm_net):
    _, path = saved
    with pytest.raises(ss.StoreError, match=r"belongs to other weights.*from seed 0"):
        ss.MaskStore.load(path, relu_net((6, 6, 5), seed=1))
    with pytest.raises(ss.StoreError, match=r"holds masks of .*kernel0.* but the network masks"):
        ss.MaskStore.load(path, relu_net((6, 7, 5)))
    with pytest.raises(ss.StoreError, match="but the network masks"):
        ss.MaskStore.load(path, norm_net)


def test_foreign_files_and_missing_ones(small_net, tmp_path):
    with pytest.raises(FileNotFoundError, match="no store at"):
        ss.MaskStore.load(tmp_path / "none", small_net)
    (tmp_path / "text").write_text("hello")
    np.save(tmp_path / "array.npy", np.arange(3))
    np.savez(tmp_path / "other.npz", a=np.arange(3))
    for name in ("text", "array.npy", "other.npz"):
        with pytest.raises(ss.StoreError):
            ss.MaskStore.load(tmp_path / name, small_net)
    with pytest.raises((ss.StoreError, OSError)):
        ss.MaskStore.load(tmp_path, small_net)


def test_a_pickle_is_never_opened(small_net, tmp_path):
    np.savez(tmp_path / "p.npz", manifest=np.asarray([{"a": 1}], dtype=object))
    with pytest.raises(ss.StoreError):
        ss.MaskStore.load(tmp_path / "p.npz", small_net)


def test_saving_where_nothing_can_be_saved(small_net, saved, tmp_path):
    store, _ = saved
    with pytest.raises(FileNotFoundError, match="no folder"):
        store.save(tmp_path / "missing" / "store")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        store.save(tmp_path, overwrite=True)


def test_a_store_made_inside_jit_cannot_be_saved(small_net, tmp_path):
    store = jax.jit(lambda net: ss.MaskStore.create(net, 4))(small_net)
    with pytest.raises(ss.StoreError, match="created inside jit"):
        store.save(tmp_path / "s")


def test_explicit_weights_are_told_apart(tmp_path):
    net = ss.Network(lambda p, x: x @ p["k"], {"k": jnp.ones((4, 3))})
    filled_store(net, random_masks(net, 1)).save(tmp_path / "s")
    other = ss.Network(net.apply, {"k": jnp.zeros((4, 3))})
    with pytest.raises(ss.StoreError, match="given, not drawn from a seed"):
        ss.MaskStore.load(tmp_path / "s", other)
