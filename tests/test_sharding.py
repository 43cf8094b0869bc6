"""Every function over a mesh of 8 devices against the same on one."""

import dataclasses
import re

import jax
import numpy as np
import optax
import pytest

import supsup_jax as ss
from supsup_jax.kernels import race
from tests.conftest import filled_store, random_masks, relu_net

NUM_TASKS = 13  # 8 devices have 2 slots each: six are full, one is half full, one is empty
COLLECTIVES = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|broadcast-start"


def mesh_of(**axes):
    """Explicit axes, as jax.make_mesh has them by default."""
    return jax.make_mesh(tuple(axes.values()), tuple(axes))


@pytest.fixture(scope="module")
def net():
    return relu_net((6, 6, 5))


@pytest.fixture(scope="module")
def store(net):
    return filled_store(net, random_masks(net, NUM_TASKS), capacity=16)


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).normal(size=(6, 6)).astype(np.float32)


def assert_same_tasks(got, want):
    assert int(got.num_tasks) == int(want.num_tasks)
    np.testing.assert_array_equal(got.counts(), want.counts())
    for i in range(int(want.num_tasks)):
        jax.tree.map(np.testing.assert_array_equal, got.task(i), want.task(i))


def assert_close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def assert_same_belief(got, want):
    np.testing.assert_array_equal(got.task, want.task)
    assert_close(np.asarray(got.scores)[..., :NUM_TASKS], want.scores[..., :NUM_TASKS])
    assert np.isneginf(np.asarray(got.scores)[..., NUM_TASKS:]).all()


def with_state(net, count):
    rng = np.random.default_rng(0)
    return [
        ss.Task(mask, jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), net.state))
        for mask in random_masks(net, count)
    ]


@pytest.mark.parametrize("num_tasks", [1, 8, 13])
def test_contiguous_blocks_of_tasks_there_and_back(net, num_tasks):
    masks = random_masks(net, num_tasks)
    store = filled_store(net, masks, capacity=16)
    sharded = ss.shard(store, mesh_of(task=8))
    assert sharded.capacity == 8 * -(-num_tasks // 8)
    each, flat = sharded.capacity // 8, np.zeros((sharded.capacity, 32 * net.layout.num_words))
    for task, mask in enumerate(masks):
        flat[task] = net.layout.ravel(mask, "it")
    for s, part in enumerate(sharded.bank.words.addressable_shards):
        rows = np.moveaxis(np.asarray(part.data), 1, 2).reshape(-1, net.layout.num_words)[:each]
        bits = rows[:, None] >> np.arange(32, dtype=np.uint32)[:, None] & 1
        np.testing.assert_array_equal(bits.reshape(each, -1), flat[s * each : (s + 1) * each])
    assert_same_tasks(sharded.gathered(), store)


@pytest.mark.parametrize("per_example", [True, False])
def test_alpha_gradient_and_one_shot(net, store, x, per_example):
    sharded = ss.shard(store, mesh_of(task=8))
    belief = ss.one_shot(net, sharded, x, per_example=per_example)
    assert_same_belief(belief, ss.one_shot(net, store, x, per_example=per_example))
    gradient = ss.alpha_gradient(net, sharded, x, per_example=per_example)
    assert belief.scores.sharding.spec[-1] == gradient.sharding.spec[-1] == "task"
    gradient, scores = np.asarray(gradient), np.asarray(belief.scores)
    assert_close(gradient[..., :NUM_TASKS], -scores[..., :NUM_TASKS])
    assert not gradient[..., NUM_TASKS:].any()


RULES = {
    "certified": ss.Rule("one_shot", implementation="certified"),
    "oracle": ss.oracle,
    "binary_search": ss.binary_search,
    "rerank": ss.Rule("rerank", best=3),
    "descend": ss.Rule("descend", optimizer=optax.sgd(0.5), steps=2),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_over_tasks_and_rows(net, store, x, name):
    sharded = ss.shard(store, mesh_of(task=4, data=2))
    per_example = name != "oracle"
    arguments = {"objective": ss.entropy, "per_example": per_example}
    got = RULES[name](net, sharded, x, **arguments)
    want = RULES[name](net, store, x, **arguments)
    if name == "certified":  # scores of what cannot win are coarse
        np.testing.assert_array_equal(got.task, want.task)
    elif name == "descend":  # coefficients, of which empty slots have none
        np.testing.assert_array_equal(got.task, want.task)
        assert_close(np.asarray(got.scores)[:, :NUM_TASKS], want.scores[:, :NUM_TASKS])
    else:
        assert_same_belief(got, want)
    assert tuple(got.scores.sharding.spec) == (("data", "task") if per_example else ("task",))


def test_scores_read_like_those_of_one_device(net, store, x):
    sharded = ss.shard(store, mesh_of(task=4, data=2))
    want = ss.one_shot(net, store, x).scores[:, :NUM_TASKS]
    scores = ss.one_shot(net, sharded, x).scores
    assert_close(scores[:, :NUM_TASKS], want)
    assert_close(scores[2, :5] - want[2, :5], np.zeros(5))  # beside an array of one device
    rows = jax.device_put(x, jax.NamedSharding(mesh_of(task=4, data=2), jax.P("data")))
    sliced = jax.jit(lambda store, x: ss.one_shot(net, store, x).scores[:, :NUM_TASKS])
    assert_close(sliced(sharded, x), want)
    assert_close(sliced(sharded, rows), want)
    with jax.set_mesh(mesh_of(task=4, data=2)):  # axes stay explicit for who asks for that
        belief = ss.one_shot(net, sharded, rows)
        assert jax.typeof(belief.scores).sharding.spec == jax.P("data", "task")
        refused = ss.predict(net, sharded, rows, np.array([0, -1, 12, -1, 3, 0]))
    assert_close(np.asarray(belief.scores)[:, :NUM_TASKS], want)
    np.testing.assert_array_equal(np.isnan(refused).all(1), [0, 1, 0, 1, 0, 0])


def test_of_equal_tasks_on_several_devices_the_lowest_wins(net, store, x):
    same = filled_store(net, random_masks(net, 1) * NUM_TASKS, capacity=16)
    found = ss.one_shot(net, ss.shard(same, mesh_of(task=8)), x)
    np.testing.assert_array_equal(found.task, np.zeros(len(x)))


def test_rows_that_do_not_divide_are_on_every_device(net, store, x):
    sharded = ss.shard(store, mesh_of(task=4, data=2))
    want = ss.one_shot(net, store, x)  # each row for itself
    assert_same_belief(
        ss.one_shot(net, sharded, x[:5]),
        ss.TaskBelief(np.asarray(want.task)[:5], np.asarray(want.scores)[:5]),
    )


def test_statistics_are_those_of_all_rows(norm_net, x):
    tasks = with_state(norm_net, NUM_TASKS)
    store = filled_store(norm_net, tasks, capacity=16)
    sharded = ss.shard(store, mesh_of(task=4, data=2))
    assert_same_belief(ss.one_shot(norm_net, sharded, x), ss.one_shot(norm_net, store, x))
    ids = np.array([0, 12, 3, 3, 7, 1])
    assert_close(ss.predict(norm_net, sharded, x, ids), ss.predict(norm_net, store, x, ids))


def collectives(function, *args):
    """The lines of the compiled program that send something to another device."""
    text = jax.jit(function).lower(*args).compile().as_text()
    return [line for line in text.splitlines() if re.search(rf"\s({COLLECTIVES})[\w.-]*\(", line)]


def test_only_the_best_of_each_device_crosses(net, store, x):
    sharded = ss.shard(store, mesh_of(task=8))
    # The uniform mixture and products with masks need no other device.
    assert collectives(lambda store, x: ss.alpha_gradient(net, store, x), sharded, x) == []
    # That they would be seen:
    alphas = np.full(NUM_TASKS, 1 / NUM_TASKS, np.float32)
    assert collectives(lambda store, alphas: store.mixture(alphas), sharded, alphas) != []
    # Of one_shot every array that crosses has 6 numbers, or 6 of each of 8 devices.
    lines = collectives(lambda store, x: ss.one_shot(net, store, x), sharded, x)
    assert lines
    for line in lines:
        result = re.split(rf"\s(?:{COLLECTIVES})", line.partition("=")[2])[0]
        for shape in re.findall(r"[a-z]+\d+\[([\d,]*)\]", result):
            assert np.prod([int(d) for d in shape.split(",") if d]) in (6, 48), line


def test_append_replace_and_remove(norm_net):
    tasks = with_state(norm_net, 6)
    before = ss.shard(filled_store(norm_net, tasks[:4], capacity=8), mesh_of(task=2), capacity=4)
    full = before.append(tasks[4], donate=True)  # full: it grows
    assert full.capacity == 8
    sharded = full.append(tasks[5], donate=True).replace(1, tasks[5])
    for leaf in (sharded.bank.words, *jax.tree.leaves(sharded.bank.states)):
        assert leaf.sharding.spec[0] == "task"  # each device has its own, and no more
    kept = [tasks[0], tasks[5], *tasks[2:]]
    want = filled_store(norm_net, kept, capacity=8)
    assert_same_tasks(sharded, want)
    for consumed in (before, full):
        with pytest.raises(ss.StoreError, match="consumed"):
            consumed.append(tasks[5])
    assert_same_tasks(ss.shard(sharded, mesh_of(task=8)), want)
    assert_same_tasks(sharded.remove(0), filled_store(norm_net, kept[1:], capacity=8))


def test_saved_and_loaded(net, store, tmp_path):
    ss.shard(store, mesh_of(task=8)).save(tmp_path / "masks.supsup")
    assert_same_tasks(ss.MaskStore.load(tmp_path / "masks.supsup", net), store)


@pytest.mark.parametrize("protocol", ["given", "per_example"])
def test_evaluate(net, store, x, protocol):
    images = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    stream = [ss.TaskData(images, np.arange(8) % 5)] * NUM_TASKS
    sharded = ss.shard(store, mesh_of(task=4, data=2))
    options = {"tasks": [0, 12], "batch_size": 4}
    got = ss.evaluate(net, sharded, stream, protocol, **options)
    for row, other in zip(got, ss.evaluate(net, store, stream, protocol, **options), strict=True):
        np.testing.assert_array_equal(row.inferred, other.inferred)
        assert row[:5] == other[:5]


def learning(batch_size=8):
    images = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    config = ss.TrainConfig(steps=3, batch_size=batch_size, learning_rate=1e-2)
    return ss.TaskData(images, np.arange(40) % 5), config


def test_tasks_learned_on_many_devices(net):
    data, config = learning()
    views = np.stack([np.random.default_rng(i).permutation(6) for i in range(5)])
    data = ss.TaskData(data.inputs, data.labels, views)
    keys = jax.random.split(jax.random.key(1), 5)
    # Two each on four devices: the last task is learned again where there is none.
    got = ss.train_tasks(keys, net, data, config, mesh=mesh_of(task=2, data=2))
    want = ss.train_tasks(keys, net, data, config)
    jax.tree.map(np.testing.assert_array_equal, got.task, want.task)
    jax.tree.map(assert_close, got.scores, want.scores)
    assert_close(got.loss, want.loss)


def test_a_task_learned_from_batches_split_over_devices(norm_net):
    data, config = learning()
    # In proportion to the gradient: RMSprop makes a step of the rounding of a gradient of 0.
    config = dataclasses.replace(config, optimizer="sgd", learning_rate=0.1)
    key, mesh = jax.random.key(1), mesh_of(task=2, data=4)
    got = ss.train_task(key, norm_net, data, config, mesh=mesh)
    want = ss.train_task(key, norm_net, data, config)
    jax.tree.map(np.testing.assert_array_equal, got.task.mask, want.task.mask)
    for mine, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-3, atol=1e-4)


def test_bad_input(net, store, x):
    data, config = learning(batch_size=6)
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"mesh must have an axis named 'task', got .*'data'"):
        ss.shard(store, mesh_of(data=2))
    with pytest.raises(ValueError, match=r"axes of mesh must be 'task' and 'data' .* got 'model'"):
        ss.shard(store, mesh_of(task=2, model=2))
    with pytest.raises(TypeError, match=r"mesh must be a jax.sharding.Mesh, got tuple"):
        ss.shard(store, (8,))
    with pytest.raises(TypeError, match="store must be a MaskStore, got Network"):
        ss.shard(net, mesh_of(task=2))
    with pytest.raises(ValueError, match="capacity must be an int of at least 13, got 12"):
        ss.shard(store, mesh_of(task=2), capacity=12)
    with pytest.raises(
        ValueError, match=r"batch_size must be a multiple of the 4 .*'data'.* got 6"
    ):
        ss.train_task(key, net, data, config, mesh=mesh_of(data=4))
    with pytest.raises(ValueError, match="must have an axis named 'task'"):
        ss.train_tasks(key[None], net, data, config, mesh=mesh_of(data=4))
    with pytest.raises(ss.StoreError, match="empty"):
        ss.one_shot(net, ss.shard(ss.MaskStore.create(net), mesh_of(task=2)), x)
    with pytest.raises(IndexError, match="task 13 is not in the store"):
        ss.shard(store, mesh_of(task=2)).mask(13)


@pytest.mark.parametrize("error", [None, 1e-6])
def test_a_race_over_a_mesh_is_that_of_one_device(error, monkeypatch):
    """Of several rounds, after each of which devices compare: as many are run, and alike."""
    monkeypatch.setattr(race, "MIN_RUNS", 1)
    monkeypatch.setattr(race, "MAX_RUNS", 1)
    net = relu_net((96, 64, 20))
    store = filled_store(net, random_masks(net, 13), capacity=16)
    sharded = ss.shard(store, mesh_of(task=8))
    rng = np.random.default_rng(0)
    for task in (0, 7, 12):
        v = rng.standard_normal(32 * net.layout.num_words).astype(np.float32)
        v += 0.7 * np.asarray(net.layout.ravel(store.mask(task), "it"))
        one, many = store.best_scores(v, error), sharded.best_scores(v, error)
        assert int(many.scores.argmax()) == int(one.scores.argmax()) == task
        assert one.share < 1
        np.testing.assert_allclose(many.share, one.share, rtol=1e-5)
        np.testing.assert_array_equal(np.isfinite(many.scores)[:13], True)
