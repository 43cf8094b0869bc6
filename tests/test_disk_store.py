"""Tasks on disk: what comes back is what went in. The bytes underneath: `test_task_log`."""

import chex
import jax
import numpy as np
import pytest

import supsup_jax as ss
from supsup_jax.stores import arrays, base, system
from supsup_jax.stores.coded import CODECS
from supsup_jax.stores.journal import TaskLog, read_manifest
from supsup_jax.stores.records import signed_manifest
from tests.conftest import filled_store, random_masks, relu_net
from tests.test_saved import tasks_with_statistics


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tasks"


def assert_is(store, net, tasks):
    chex.assert_trees_all_equal(store, filled_store(net, tasks, capacity=len(tasks)))


def test_round_trip(small_net, path):
    masks = random_masks(small_net, 3)
    with ss.DiskStore.open(path, small_net, mode="a") as disk:
        for i, mask in enumerate(masks):
            assert disk.append(mask, name=f"task {i}", labels=["yes", "no"]) == i
    with ss.DiskStore.open(path, small_net) as disk:
        assert len(disk) == disk.num_tasks == 3
        assert_is(disk.load(), small_net, masks)
        for i, mask in enumerate(masks):
            chex.assert_trees_all_equal(disk.task(i), ss.Task(mask))
            info = disk.info(i)
            assert (info.name, info.labels, info.codec) == (f"task {i}", ("yes", "no"), "words")
            assert info.kept == {name: np.count_nonzero(leaf) for name, leaf in mask.items()}


def test_statistics_round_trip(path):
    net, tasks = tasks_with_statistics()
    with ss.DiskStore.open(path, net, mode="x") as disk:
        for task in tasks:
            disk.append(task)
        assert_is(disk.load(), net, tasks)
        chex.assert_trees_all_equal(disk.task(2), tasks[2])
        assert disk.info(0).state_bytes == disk.load().state_bytes


@pytest.mark.parametrize("codec", [*CODECS[:-1], "auto"])
@pytest.mark.parametrize("density", [0.02, 0.5])
def test_every_codec_gives_back_the_mask(path, codec, density):
    net = relu_net((40, 30, 20))
    masks = random_masks(net, 3, density=density)
    with ss.DiskStore.open(path, net, mode="a") as disk:
        for mask in masks:
            disk.append(mask, codec=codec)
        assert_is(disk.load(), net, masks)
        chex.assert_trees_all_equal(disk.task(1).mask, masks[1])
        chosen = {0.02: "enumerative", 0.5: "words"}[density] if codec == "auto" else codec
        assert disk.info(0).codec == chosen


def test_deltas_are_coded_against_earlier_tasks(path):
    net = relu_net((40, 30, 20))
    first, second = random_masks(net, 2)
    second = jax.tree.map(
        lambda a, b: a ^ (b & (np.arange(a.size) < 9).reshape(a.shape)), first, second
    )
    with ss.DiskStore.open(path, net, mode="a") as disk:
        disk.append(first)
        disk.append(second, codec="xor-delta", base=0)
        disk.append(first, codec="xor-delta", base=1)
    with ss.DiskStore.open(path, net) as disk:
        assert_is(disk.load(), net, [first, second, first])
        assert disk.info(2).base == 1
        assert disk.info(1).mask_bytes < disk.info(0).mask_bytes / 2


def test_a_mask_is_checked_once_on_its_way(small_net, path, monkeypatch):
    (mask,), checked = random_masks(small_net, 1), []
    monkeypatch.setattr(base, "check_binary", lambda name, leaf: checked.append(name))
    with ss.DiskStore.open(path, small_net, mode="a") as disk:
        for codec in ("words", "enumerative", "auto"):
            disk.append(mask, codec=codec)
    assert checked == 3 * list(small_net.layout.shapes)


def test_slices_and_lists_of_tasks(small_net, path):
    masks = random_masks(small_net, 7)
    with ss.DiskStore.open(path, small_net, mode="a") as disk:
        assert disk.extend(
            filled_store(small_net, masks, capacity=12), names=list("abcdefg")
        ) == range(7)
        for tasks in (slice(2, 5), slice(None, None, 3), slice(-3, None)):
            assert_is(disk.load(tasks), small_net, masks[tasks])
        assert_is(disk.load([6, 0, 6]), small_net, [masks[6], masks[0], masks[6]])
        assert disk.info(6).name == "g"
        with pytest.raises(ValueError, match="leaves none of the 7 tasks"):
            disk.load(slice(9, 10))


def test_loading_in_tiles_equals_appending_one_by_one(path, monkeypatch):
    """More tasks than fill a cache line of lanes, 16, or a tile."""
    monkeypatch.setattr(arrays, "MAX_LANES", 32)
    net = relu_net((5, 5))
    masks = random_masks(net, 40)
    with ss.DiskStore.open(path, net, mode="a") as disk:
        for mask in masks:
            disk.append(mask, durable=False)
        disk.flush()
        store = disk.load()
    assert store.bank.words.shape == (2, 1, 32)
    assert_is(store, net, masks)


def test_decisions_among_streamed_parts(small_net, path):
    store = filled_store(small_net, random_masks(small_net, 6), capacity=6)
    x = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    with ss.DiskStore.open(path, small_net, mode="a") as disk:
        disk.extend(store)
        parts = disk.parts(size=4)
        assert [int(part.num_tasks) for part in parts] == [4, 2] and len(parts) == 2
        belief = ss.one_shot_streamed(small_net, disk.parts(size=3), x)
    expected = ss.one_shot(small_net, store, x)
    np.testing.assert_array_equal(belief.task, expected.task)
    np.testing.assert_allclose(belief.scores, expected.scores, rtol=1e-4, atol=1e-6)


def test_a_reader_beside_the_writer(small_net, path):
    first, second = random_masks(small_net, 2)
    with ss.DiskStore.open(path, small_net, mode="a") as writer:
        writer.append(first)
        reader = ss.DiskStore.open(path, small_net)
        writer.append(second)
        assert len(reader) == 1 and reader.refresh() == 2
        chex.assert_trees_all_equal(reader.task(1).mask, second)
        with pytest.raises(ss.StoreError, match="another writer"):
            ss.DiskStore.open(path, small_net, mode="a")


def test_parts_name_their_own_tasks_whatever_is_written(small_net, path):
    masks = random_masks(small_net, 6)
    x = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    with ss.DiskStore.open(path, small_net, mode="a") as disk:
        disk.extend(filled_store(small_net, masks, capacity=6))
        disk.remove(0)
        want = disk.ids[np.asarray(ss.one_shot(small_net, disk.load(), x).task)]
    with ss.DiskStore.open(path, small_net) as disk:
        parts = disk.parts(2)
        first = ss.one_shot_streamed(small_net, parts, x)
        with ss.DiskStore.open(path, small_net, mode="a") as writer:
            writer.append(masks[0])
            writer.compact()
        again = ss.one_shot_streamed(small_net, parts, x)
        for belief in (first, again):
            np.testing.assert_array_equal(parts.ids[belief.task], want)
        with ss.DiskStore.open(path, small_net, mode="a") as writer:
            writer.remove(1)
            writer.compact()
        with pytest.raises(ss.TaskIdError, match="task 1 was removed"):
            ss.one_shot_streamed(small_net, parts, x)


def test_all_tasks_of_a_store_are_added_or_none(small_net, path, monkeypatch):
    store = filled_store(small_net, random_masks(small_net, 3), capacity=3)
    with ss.DiskStore.open(path, small_net, mode="a") as disk:
        disk.append(store.task(0), name="x")
        before = {file.name: file.read_bytes() for file in path.iterdir()}
        with pytest.raises(ValueError, match=r"task 0 of .* is called 'x'"):
            disk.extend(store, names=["a", "b", "x"])
        with monkeypatch.context() as patch, pytest.raises(OSError, match="the disk is gone"):
            patch.setattr(system, "flush", raiser(OSError("the disk is gone")))
            disk.extend(store, names=["a", "b", "c"])
        assert {file.name: file.read_bytes() for file in path.iterdir()} == before
        assert disk.extend(store, names=["a", "b", "c"]) == range(1, 4)


def raiser(error):
    def raising(*_):
        raise error

    return raising


def test_a_copy_that_fails_leaves_nothing(small_net, path, tmp_path):
    with ss.DiskStore.open(path, small_net, mode="a") as disk:
        disk.extend(filled_store(small_net, random_masks(small_net, 3), capacity=3))
        place = disk._log.entry(2).offset + 50
    data = bytearray((path / "tasks.bin").read_bytes())
    data[place] ^= 1
    (path / "tasks.bin").write_bytes(data)
    with ss.DiskStore.open(path, small_net) as disk:
        with pytest.raises(ss.StoreError, match="task 2"):
            disk.copy(tmp_path / "copy")
        with pytest.raises(FileNotFoundError, match="is no store"):
            ss.DiskStore.open(tmp_path / "copy")
        assert disk.copy(tmp_path / "copy", without=[2]) == [0, 1]


def test_a_damaged_base_is_named_with_what_is_lost_by_it(small_net, path):
    masks = random_masks(small_net, 2)
    with ss.DiskStore.open(path, small_net, mode="a") as disk:
        disk.append(masks[0], name="base")
        disk.append(masks[1], codec="xor-delta", base=0)
    whole = {name: (path / name).read_bytes() for name in ("tasks.bin", "index.bin")}
    for name, place in (("tasks.bin", 40), ("index.bin", 9)):
        damaged = bytearray(whole[name])
        damaged[place] ^= 1
        (path / name).write_bytes(damaged)
        with ss.DiskStore.open(path, small_net, mode="a") as disk:
            with pytest.raises(ss.StoreError, match=r"task 0\W.*damaged"):
                disk.words(1)
            with pytest.raises(ss.StoreError, match="task 1 is coded against task 0 and cannot be"):
                disk.remove(0)
    with ss.DiskStore.open(path, small_net, mode="a") as disk:
        for i in (1, 0):
            disk.remove(i)
        assert (disk.ids.tolist(), disk.names()) == ([], {})


def test_two_that_create_one_store(small_net, path, monkeypatch):
    """The second finds a folder of another's, and appends to it."""
    create = TaskLog.create

    def late(*arguments):
        create(*arguments).close()
        return create(*arguments)

    monkeypatch.setattr(TaskLog, "create", late)
    with ss.DiskStore.open(path, small_net, mode="a") as disk:
        assert disk.append(random_masks(small_net, 1)[0]) == 0
    with pytest.raises(FileExistsError, match="holds a store"):
        ss.DiskStore.open(path, small_net, mode="x")


def test_without_a_network(small_net, path):
    (mask,) = random_masks(small_net, 1)
    with ss.DiskStore.open(path, small_net, mode="a") as disk:
        for codec in ("words", "enumerative"):
            disk.append(mask, name=codec, codec=codec)
        words = disk.words(0)
    with ss.DiskStore.open(path) as disk:
        assert disk.info(0).name == "words" and disk.find("enumerative") == [1]
        assert disk.verify() == []
        for i in range(2):
            np.testing.assert_array_equal(disk.words(i), words)
        with pytest.raises(ss.StoreError, match="without a network"):
            disk.load()
        with pytest.raises(ss.StoreError, match="without a network"):
            disk.task(0)
    with pytest.raises(TypeError, match="net must be a Network"):
        ss.DiskStore.open(path.parent / "new", mode="a")
    with ss.DiskStore.open(path, mode="a") as disk, pytest.raises(ss.StoreError, match="without"):
        disk.append(mask)


def test_another_network_is_refused_and_both_are_named(small_net, norm_net, path):
    with ss.DiskStore.open(path, small_net, mode="a") as disk:
        disk.append(random_masks(small_net, 1)[0])
    other = relu_net((6, 6, 5), seed=1)
    with pytest.raises(
        ss.StoreError, match=f"{small_net.fingerprint[:12]}.*{other.fingerprint[:12]}"
    ):
        ss.DiskStore.open(path, other)
    with pytest.raises(ss.StoreError, match="holds masks of"):
        ss.DiskStore.open(path, norm_net, mode="a")
    with pytest.raises(FileExistsError):
        ss.DiskStore.open(path, small_net, mode="x")
    with pytest.raises(ValueError, match="mode must be one of"):
        ss.DiskStore.open(path, small_net, mode="w")


def test_a_folder_of_a_former_release_says_what_reads_it(small_net, path):
    ss.DiskStore.open(path, small_net, mode="x").close()
    manifest = read_manifest(path) | {"version": 1}
    (path / "manifest.json").write_bytes(signed_manifest(manifest))
    for mode in ("r", "a"):
        with pytest.raises(
            ss.StoreError, match=r"was written by supsup_jax 0\.1\.0 in format 1; this"
        ):
            ss.DiskStore.open(path, small_net, mode=mode)


def test_bad_input(small_net, norm_net, path):
    (mask,) = random_masks(small_net, 1)
    one = filled_store(small_net, [mask], capacity=3)
    with ss.DiskStore.open(path, small_net, mode="a") as disk:
        for error, message, call, argument, options in (
            (ValueError, "lacks the masked leaf", disk.append, {"kernel0": mask["kernel0"]}, {}),
            (ValueError, "only 0 and 1", disk.append, mask | {"kernel0": 2 * np.eye(6)}, {}),
            (ValueError, "no state", disk.append, ss.Task(mask, {"mean": np.zeros(3)}), {}),
            (TypeError, "name must be a str", disk.append, mask, {"name": 3}),
            (TypeError, "labels must be a list of str", disk.append, mask, {"labels": "yes"}),
            (
                ValueError,
                r"codec must be .*'words', .* got 'zip'",
                disk.append,
                mask,
                {"codec": "zip"},
            ),
            (ValueError, "takes base=", disk.append, mask, {"codec": "xor-delta"}),
            (ValueError, "takes base=", disk.append, mask, {"base": 0}),
            (IndexError, "task 0 is not in", disk.append, mask, {"codec": "xor-delta", "base": 0}),
            (ss.StoreError, "the network masks", disk.extend, ss.MaskStore.create(norm_net), {}),
            (ValueError, "names must be 1", disk.extend, one, {"names": ["a", "b"]}),
            (TypeError, "must be an integer", disk.task, "0", {}),
            (ValueError, "size must be an int of at least 1", disk.parts, 0, {}),
        ):
            with pytest.raises(error, match=message):
                call(argument, **options)
        assert len(disk) == 0
        disk.append(mask)
        for i in (1, -1):
            with pytest.raises(IndexError):
                disk.task(i)
    with pytest.raises(ss.StoreError, match="closed"):
        disk.task(0)
    with ss.DiskStore.open(path, small_net) as disk, pytest.raises(ss.StoreError, match="reading"):
        disk.append(mask)


def test_a_task_travels_as_a_file(small_net, norm_net, path, tmp_path):
    masks = random_masks(small_net, 3)
    with ss.DiskStore.open(path, small_net, mode="a") as disk:
        disk.append(masks[0], name="zero")
        disk.append(masks[1], name="one", labels=["a", "b"], codec="enumerative")
        disk.append(masks[2], name="two", codec="xor-delta", base=0)
        for i in range(3):
            disk.export(i, tmp_path / f"{i}.task")
        with pytest.raises(FileExistsError):
            disk.export(0, tmp_path / "0.task")
    with ss.DiskStore.open(tmp_path / "other", small_net, mode="a") as other:
        for i in (2, 1, 0):
            other.append_file(tmp_path / f"{i}.task")
        assert [other.info(i).name for i in range(3)] == ["two", "one", "zero"]
        assert other.info(1).labels == ("a", "b")
        assert_is(other.load(), small_net, masks[::-1])
    with ss.DiskStore.open(tmp_path / "stranger", relu_net((6, 6, 5), seed=3), "x") as stranger:
        with pytest.raises(ss.StoreError, match="other weights"):
            stranger.append_file(tmp_path / "0.task")
        assert len(stranger) == 0
    # Nor where no network is at hand to compare with.
    stranger = ss.DiskStore.open(tmp_path / "stranger", mode="a")
    with stranger, pytest.raises(ss.StoreError, match="of another network: its fingerprint is"):
        stranger.append_file(tmp_path / "0.task")


def test_a_damaged_mask_is_named_and_never_returned(small_net, path):
    masks = random_masks(small_net, 3)
    with ss.DiskStore.open(path, small_net, mode="a") as disk:
        disk.extend(filled_store(small_net, masks, capacity=3))
    data = bytearray((path / "tasks.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "tasks.bin").write_bytes(data)
    with ss.DiskStore.open(path, small_net) as disk:
        with pytest.raises(ss.StoreError, match=r"tasks.bin: the (record|metadata) of task 1"):
            disk.load()
        assert_is(disk.load([0, 2, 0]), small_net, [masks[0], masks[2], masks[0]])
        assert "task 1" in str(disk.verify()[0])
