"""Tasks removed from a store on disk and replaced, and scores kept. The bytes: `test_removal`."""

import contextlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import supsup_jax as ss
from supsup_jax.types import TaskIdError
from tests.conftest import filled_store, random_masks, relu_net
from tests.stress.accidents import PowerCut, watching


@pytest.fixture
def net():
    return relu_net((40, 30, 20))


@pytest.fixture
def masks(net):
    return random_masks(net, 5)


@pytest.fixture
def disk(tmp_path, net):
    with ss.DiskStore.open(tmp_path / "tasks", net, mode="x") as disk:
        yield disk


def scores_like(mask, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), mask)


def stored(path):
    return b"".join(file.read_bytes() for file in path.iterdir())


def windows(data, size=8):
    """All runs of so many bytes that are not the same byte again and again."""
    runs = (bytes(data[at : at + size]) for at in range(len(data) - size + 1))
    return {run for run in runs if len(set(run)) > 3}


@pytest.mark.parametrize("how", ["remove", "replace"])
@pytest.mark.parametrize("codec", ["words", "enumerative", "xor-delta"])
def test_no_run_of_what_was_stored_remains(disk, masks, codec, how):
    disk.append(masks[0], name="first")
    disk.append(
        masks[1],
        scores_like(masks[1]),
        name="Müller & Sons",
        labels=["their secret", "another"],
        codec=codec,
        base=0 if codec == "xor-delta" else None,
    )
    disk.append(masks[2], name="last", codec="xor-delta", base=1)
    entry = disk._log.entry(1)
    record = (disk.path / "tasks.bin").read_bytes()[entry.offset : entry.end]
    delta = disk._log.entry(2)
    recoded = (disk.path / "tasks.bin").read_bytes()[delta.offset : delta.end]
    words = disk.words(1).tobytes()
    assert windows(record[32:]) & windows(stored(disk.path))
    if how == "remove":
        disk.remove(1)
    else:
        disk.replace(1, masks[3], codec="enumerative")
    kept = windows(stored(disk.path))
    for gone in (words, b"M\\u00fcller & Sons", b"their secret", record[-32:], entry.sha256):
        assert not windows(gone) & kept
    # Metadata have words in common, and coded masks their first 24 bytes; the rest has nothing.
    for former in (record, recoded):
        start = 32 + int.from_bytes(former[4:8], "little")
        assert not windows(former[start + 24 :]) & kept
    assert recoded[start + 16 : start + 24] not in kept  # the digest of its base
    chex.assert_trees_all_equal(disk.task(2).mask, masks[2])
    assert (disk.info(2).codec, disk.info(2).name, disk.verify()) == ("words", "last", [])


def test_what_a_removed_task_is_to_everybody(disk, net, masks, tmp_path):
    disk.extend(filled_store(net, masks[:4], capacity=4), names=list("abcd"))
    reader = ss.DiskStore.open(disk.path, net)
    disk.remove(1)
    for store in (disk, reader):
        for call in (store.task, store.words, store.info, store.scores):
            with pytest.raises(TaskIdError, match=r"task 1 was removed from .*; name one of its"):
                call(1)
        with pytest.raises(TaskIdError, match="task 1 was removed"):
            store.export(1, tmp_path / "file")
        with pytest.raises(TaskIdError, match="task 1 was removed"):
            store.load([0, 1])
        assert (len(store), store.num_tasks, store.ids.tolist()) == (4, 4, [0, 2, 3])
        there = [masks[i] for i in (0, 2, 3)]
        chex.assert_trees_all_equal(store.load(), filled_store(net, there, capacity=3))
        chex.assert_trees_all_equal(store.load(slice(1, 2)), filled_store(net, there[1:2], 1))
        assert [int(part.num_tasks) for part in store.parts(2)] == [2, 1]
        assert len(store.parts(2)) == 2 and "3 tasks" in repr(store)
    x = np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32)
    names = disk.ids[ss.one_shot_streamed(net, disk.parts(2), x).task]
    places = np.asarray(ss.one_shot(net, disk.load(), x).task)
    np.testing.assert_array_equal(names, disk.ids[places])
    np.testing.assert_array_equal(disk.places(names), places)
    assert disk.places(3) == 2
    with pytest.raises(ss.TaskIdError, match="task 1 was removed from"):
        disk.places([0, 1])
    with pytest.raises(TypeError, match="ids must be integers, got dtype float64"):
        disk.places(1.5)
    assert disk.append(masks[4]) == 4
    for i in disk.ids:
        disk.remove(i)
    with pytest.raises(ValueError, match="leaves none of the 0 tasks"):
        disk.load()


def test_replaced_under_the_same_id_and_compacted(disk, net, masks):
    disk.append(masks[0], name="a", labels=["x"])
    disk.append(masks[1], name="b")
    disk.append(masks[2], codec="xor-delta", base=1)
    reader = ss.DiskStore.open(disk.path, net)
    chex.assert_trees_all_equal(reader.task(2).mask, masks[2])
    disk.replace(1, masks[3], name="c")
    disk.replace(2, masks[4], codec="xor-delta", base=1)
    size = (disk.path / "tasks.bin").stat().st_size
    for reclaimed in (True, False):
        for store in (disk, reader):
            chex.assert_trees_all_equal(store.task(2).mask, masks[4])
            chex.assert_trees_all_equal(store.task(1).mask, masks[3])
            assert (store.info(1).name, store.info(0).labels, len(store)) == ("c", ("x",), 3)
        gave = disk.compact()
        assert bool(gave) == reclaimed
        size -= gave
        assert (disk.path / "tasks.bin").stat().st_size == size


def test_a_crash_while_deltas_are_coded_anew_loses_none(tmp_path, net, masks):
    for point in range(100):
        path = tmp_path / f"{point}"

        def before(number, name, real, arguments, point=point):
            if number >= point:
                raise PowerCut
            return real(*arguments)

        done = False
        with ss.DiskStore.open(path, net, mode="x") as disk:
            disk.append(masks[0])
            for i in (1, 2):
                disk.append(masks[i], codec="xor-delta", base=0)
            with contextlib.suppress(PowerCut), watching(before):
                disk.remove(0)
                done = True
        with ss.DiskStore.open(path, net, mode="a") as disk:
            for i in disk.ids:
                chex.assert_trees_all_equal(disk.task(i).mask, masks[i])
            assert disk.ids.tolist() in ([[1, 2]] if done else [[0, 1, 2], [1, 2]])
            assert disk.verify() == []
        if done:
            return
    raise AssertionError("no end")


def test_scores_come_back_travel_and_train_on(tmp_path, net, masks):
    scores = scores_like(masks[0])
    with ss.DiskStore.open(tmp_path / "tasks", net, mode="x") as disk:
        disk.append(masks[0], scores)
        disk.append(masks[1])
        disk.export(0, tmp_path / "file")
        disk.append_file(tmp_path / "file")
        disk.replace(1, masks[2], scores_like(masks[2], 1), codec="enumerative")
        chex.assert_trees_all_equal(disk.load([0]), filled_store(net, masks[:1], capacity=1))
        disk.replace(0, masks[0])
    with ss.DiskStore.open(tmp_path / "tasks", net) as disk:
        assert disk.scores(0) is None and disk.info(0).score_bytes == 0
        chex.assert_trees_all_equal(disk.scores(2), scores)
        chex.assert_trees_all_equal(disk.scores(1), scores_like(masks[2], 1))
        assert disk.info(2).score_bytes == 4 * net.layout.num_weights
        data = ss.TaskData(jnp.ones((8, 40)), jnp.arange(8) % 5)
        config = ss.TrainConfig(steps=1, batch_size=4)
        key = jax.random.key(0)
        result = ss.train_task(key, net, data, config, init_scores=disk.scores(2))
        expected = ss.train_task(key, net, data, config, init_scores=scores)
        chex.assert_trees_all_equal(result.scores, expected.scores)


def test_statistics_and_scores_lie_side_by_side(tmp_path, norm_net):
    (mask,) = random_masks(norm_net, 1)
    state = jax.tree.map(np.asarray, norm_net.state)
    scores = scores_like(mask)
    with ss.DiskStore.open(tmp_path / "tasks", norm_net, mode="x") as disk:
        disk.append(ss.Task(mask, state), scores)
        chex.assert_trees_all_equal(disk.task(0), ss.Task(mask, state))
        chex.assert_trees_all_equal(disk.scores(0), scores)


def test_bad_input(disk, net, masks):
    scores = scores_like(masks[0])
    disk.append(masks[0])
    disk.append(masks[1], codec="xor-delta", base=0)
    disk.remove(0)
    before = stored(disk.path)
    wrong = {name: leaf[1:] for name, leaf in scores.items()}
    wide = {name: leaf.astype(np.float64) for name, leaf in scores.items()}
    broken = {name: leaf * np.nan for name, leaf in scores.items()}
    for error, message, call in (
        (TaskIdError, "task 0 was removed", lambda: disk.remove(0)),
        (TaskIdError, "task 0 was removed", lambda: disk.replace(0, masks[0])),
        (TaskIdError, "task 2 is not in", lambda: disk.remove(2)),
        (IndexError, "task -1 is not in", lambda: disk.replace(-1, masks[0])),
        (TypeError, "must be an integer", lambda: disk.remove("1")),
        (ValueError, "only 0 and 1", lambda: disk.replace(1, scores)),
        (ValueError, "scores must have shape", lambda: disk.replace(1, masks[0], wrong)),
        (ValueError, "scores lacks the masked", lambda: disk.append(masks[0], {})),
        (TypeError, "scores must be float32, got float64", lambda: disk.append(masks[0], wide)),
        (ValueError, "scores must be finite", lambda: disk.append(masks[0], broken)),
        (
            ValueError,
            "base must be a task before 1, got 1",
            lambda: disk.replace(1, masks[2], codec="xor-delta", base=1),
        ),
        (
            TaskIdError,
            "task 0 was removed",
            lambda: disk.replace(1, masks[2], codec="xor-delta", base=0),
        ),
    ):
        with pytest.raises(error, match=message):
            call()
    assert stored(disk.path) == before
    with ss.DiskStore.open(disk.path, net) as reader:
        for call in (lambda: reader.remove(1), lambda: reader.replace(1, masks[0]), reader.compact):
            with pytest.raises(ss.StoreError, match="open for reading only"):
                call()
