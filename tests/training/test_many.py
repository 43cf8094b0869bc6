"""Learning many tasks in one program."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import supsup_jax as ss
from supsup_jax.training import train
from tests.conftest import relu_net
from tests.training.test_train import FAST, toy_data


def many_data(num_tasks=5, **fields):
    """Toy data under `num_tasks` views, and the keys to learn them by."""
    rng = np.random.default_rng(1)
    views = np.stack([rng.permutation(6) for _ in range(num_tasks)])
    views[1:, 0] = -1
    data = toy_data(view=views, **fields)
    return jax.random.split(jax.random.key(3), num_tasks), data


def without_view(num_tasks):
    keys, data = many_data(num_tasks)
    return keys, dataclasses.replace(data, view=None)


def own_images(num_tasks):
    tasks = [toy_data(num=40, seed=seed) for seed in range(num_tasks)]
    many = jax.tree.map(lambda *leaves: np.stack(leaves), *tasks)
    return jax.random.split(jax.random.key(3), num_tasks), many


def task_of(data, i):
    """Task i's own data of many tasks'."""
    if data.labels.ndim == 2:
        return dataclasses.replace(data, inputs=data.inputs[i], labels=data.labels[i])
    return data if data.view is None else dataclasses.replace(data, view=data.view[i])


def one_by_one(keys, net, data, config=FAST, init_scores=None):
    """What train_tasks promises, by train_task."""
    starts = [jax.tree.map(lambda leaf, i=i: leaf[i], init_scores) for i in range(len(keys))]
    results = [
        ss.train_task(key, net, task_of(data, i), config, starts[i]) for i, key in enumerate(keys)
    ]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *results)


def assert_same(got, want):
    """Scores to rounding; and masks, which no score is near enough to 0 to doubt."""
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-6)
    least = min(np.abs(leaf).min() for leaf in jax.tree.leaves(want.scores))
    assert least > 1e-5  # else rounding might choose, and the test would hang on luck


def test_many_tasks_trace_once():
    train._train_tasks.clear_cache()
    train._train.clear_cache()
    for seed in range(3):
        keys, data = many_data(seed=seed)
        ss.train_tasks(keys, relu_net((6, 6, 5), seed), data, FAST)
    assert train._train_tasks._cache_size() == 1
    assert train._train._cache_size() <= 1


# The platform's form (on a CPU one by one), and batches: with a remainder, of all.
@pytest.mark.parametrize("together", [None, 2, 8])
def test_many_tasks_equal_each_alone(small_net, together):
    keys, data = many_data()
    got = train._train_tasks(keys, small_net, data, None, FAST, together=together)
    assert_same(got, one_by_one(keys, small_net, data))


def test_many_tasks_by_topk_keep_their_density(small_net):
    keys, data = many_data()
    config = dataclasses.replace(FAST, rule="topk", density=0.25, shuffle=False)
    got = train._train_tasks(keys, small_net, data, None, config, together=2)
    want = one_by_one(keys, small_net, data, config)
    chex.assert_trees_all_close(got.scores, want.scores, rtol=1e-4, atol=1e-6)
    for masks in jax.tree.leaves(jax.device_get(got.task.mask)):
        kept = masks.reshape(5, -1).sum(axis=1)
        np.testing.assert_array_equal(kept, ss.kept_count(0.25, masks[0].size))


def test_many_tasks_each_keep_their_own_statistics(norm_net):
    keys, data = many_data(3)
    got = train._train_tasks(keys, norm_net, data, None, FAST, together=2)
    assert_same(got, one_by_one(keys, norm_net, data))
    mean = got.task.state["norm"]["mean"]
    assert mean.shape == (3, 8)
    assert not np.allclose(mean[0], mean[1])


@pytest.mark.parametrize("make", [without_view, own_images])
@pytest.mark.parametrize("together", [None, 2])
def test_many_tasks_from_given_scores(small_net, make, together):
    keys, data = make(3)
    start = {
        name: np.stack(
            [np.linspace(-1.01, i, s[0] * s[1], dtype=np.float32).reshape(s) for i in range(3)]
        )
        for name, s in small_net.layout.shapes.items()
    }
    got = train._train_tasks(keys, small_net, data, start, FAST, together=together)
    want = one_by_one(keys, small_net, data, init_scores=start)
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-6)


def test_many_tasks_in_a_store(small_net):
    keys, data = many_data()
    result = ss.train_tasks(keys, small_net, data, FAST)
    store = ss.MaskStore.create(small_net, capacity=5)
    for i in range(5):
        store = store.append(jax.tree.map(lambda leaf, i=i: leaf[i], result.task))
    np.testing.assert_array_equal(store.mask(2)["kernel0"], result.task.mask["kernel0"][2])
    assert result.loss.shape == (5, FAST.steps)


def test_many_tasks_under_jit_and_by_raw_keys(small_net):
    keys, data = many_data()
    raw = jax.random.key_data(keys)
    got = jax.jit(lambda keys, data: ss.train_tasks(keys, small_net, data, FAST))(raw, data)
    assert_same(got, one_by_one(keys, small_net, data))


def test_many_tasks_are_batched_where_there_is_no_cpu(small_net, monkeypatch):
    """On a GPU a chunk is one batch: the loops are those of one task and one over the chunks."""
    keys, data = many_data()
    one = train._one_task(data, 5, FAST)
    monkeypatch.setattr(train, "CHUNK_BYTES", 2 * train.working_bytes(small_net, one, FAST))
    train._train_tasks.clear_cache()  # traced before, with the other size of a chunk

    def lowered(platform, function, key, data):
        exported = jax.export.export(jax.jit(function), platforms=[platform])
        return exported(jax.random.key_data(key), data).mlir_module()

    def train_all(keys, data):
        return ss.train_tasks(keys, small_net, data, FAST)

    cuda = lowered("cuda", train_all, keys, data)
    alone = lowered(
        "cuda", lambda key, data: ss.train_task(key, small_net, data, FAST), *(keys[0], one)
    )
    assert cuda.count("stablehlo.while") == alone.count("stablehlo.while") + 1
    # Five tasks, two at once: three chunks of two.
    assert "tensor<2x8x6xf32>, tensor<2x6x5xf32>" in cuda
    assert "tensor<3x2x6x6xf32>" in cuda
    cpu = lowered("cpu", train_all, keys, data)
    assert "tensor<8x6xf32>, tensor<6x5xf32>" in cpu
    assert "tensor<2x8x6xf32>" not in cpu


def test_working_bytes_bound_what_a_task_takes():
    net = relu_net((6, 300, 200, 5))
    keys, data = many_data(8)
    config = ss.TrainConfig(steps=40, batch_size=64)

    def temporaries(together):
        program = train._train_tasks.lower(keys, net, data, None, config, together=together)
        return program.compile().memory_analysis().temp_size_in_bytes

    each = (temporaries(8) - temporaries(2)) / 6
    bound = train.working_bytes(net, train._one_task(data, 8, config), config)
    assert bound / 20 < each < bound


def test_bad_input_of_many_tasks(small_net):
    keys, good = many_data(3)

    def refuses(error, match, keys=keys, data=good, **options):
        with pytest.raises(error, match=match):
            ss.train_tasks(keys, small_net, data, FAST, **options)

    refuses(TypeError, "keys must be an array", keys=list(keys))
    refuses(TypeError, "keys must be JAX random keys, got dtype float32", keys=jnp.ones((3, 2)))
    refuses(ValueError, r"keys must be random keys \[T\], .* got shape \(\)", keys=keys[0])
    refuses(ValueError, r"keys must be random keys .* got shape \(2,\)", keys=jax.random.PRNGKey(0))
    refuses(ValueError, "keys must hold at least one key", keys=keys[:0])
    refuses(ValueError, r"view .* of 2 tasks, .* got shape \(3, 6\)", keys=keys[:2])
    flat = dataclasses.replace(good, view=good.view[0])
    refuses(ValueError, r"view .* of 3 tasks, .* got shape \(6,\)", data=flat)
    refuses(ValueError, "view must index 6 pixels", data=toy_data(view=good.view + 1))
    refuses(ValueError, r"labels must lie in \[0, 5\)", data=toy_data(labels=6, view=good.view))
    labels = jnp.broadcast_to(good.labels, (3, 40))
    refuses(ValueError, r"labels \[N\]", data=dataclasses.replace(good, labels=labels))
    refuses(TypeError, "data must be a TaskData", data=good.inputs)
    shapes = small_net.layout.shapes
    scores = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    refuses(ValueError, r"shape \(3, 6, 6\) at 'kernel0', got \(6, 6\)", init_scores=scores)
    scores = {name: np.full((3, *shape), np.nan, np.float32) for name, shape in shapes.items()}
    refuses(ValueError, "finite, got NaN or infinity at 'kernel0'", init_scores=scores)
    _, own = own_images(3)
    fewer, cut = (
        dataclasses.replace(own, inputs=images) for images in (own.inputs[:2], own.inputs[:, 1:])
    )
    refuses(ValueError, "labels must have a leading axis of 2 tasks", keys=keys[:2], data=fewer)
    refuses(ValueError, r"inputs must be \[T, N, ...\] and labels \[T, N\]", data=cut)
    for i, wrong in ((1, -1), (2, 7)):
        labels = np.asarray(own.labels).copy()
        labels[i, 3] = wrong
        bad = dataclasses.replace(own, labels=labels)
        refuses(ValueError, rf"labels must lie in \[0, 5\).*{wrong}", data=bad)
    viewed = dataclasses.replace(own, view=jnp.zeros((3, 6), jnp.int32))
    refuses(ValueError, "inputs of their own take none", data=viewed)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (slice(3, 4), r"diverged in 1 of 12 tasks \(3\): scores or losses"),
        (slice(2, 12), r"in 10 of 12 tasks \(2, 3, 4, 5, 6, 7, 8, 9, ...\)"),
    ],
)
def test_the_tasks_that_diverged_are_named(small_net, bad, message):
    keys = jax.random.split(jax.random.key(3), 12)
    images, view = np.ones((8, 6), np.float32), np.ones((12, 6), np.int32)
    images[:, 0] = np.nan
    view[bad] = 0  # where the pixel is not a number
    with pytest.raises(ValueError, match=message):
        ss.train_tasks(keys, small_net, ss.TaskData(images, np.zeros(8, np.int32), view), FAST)


@pytest.mark.slow
def test_a_thousand_steps_at_once_learn_as_well_as_alone():
    """Rounding moves scores near 0 to either side; what was learned stays the same."""
    from supsup_jax.data import load_dataset

    dataset = load_dataset("digits", None, 0)
    views = jnp.stack([jnp.asarray(np.random.default_rng(i).permutation(64)) for i in range(4)])
    net, config = relu_net((64, 300, 100, 100)), ss.TrainConfig()
    keys = jax.random.split(jax.random.key(0), 4)
    data = dataclasses.replace(dataset.train, view=views)
    together = train._train_tasks(keys, net, data, None, config, together=4)
    alone = one_by_one(keys, net, data, config)
    pairs = zip(jax.tree.leaves(alone.task), jax.tree.leaves(together.task), strict=True)
    agree, weights = np.sum([(int((a == b).sum()), a.size) for a, b in pairs], axis=0)
    assert agree / weights > 0.98  # two tasks agree on half
