import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import supsup_jax as ss
from supsup_jax.data import PermutedStream, load_dataset
from supsup_jax.training import train
from supsup_jax.training.steps import batch_indices
from tests.conftest import golden, relu_apply, relu_net

FAST = ss.TrainConfig(steps=20, batch_size=8, learning_rate=1e-2)


def toy_data(num=40, pixels=6, labels=5, seed=0, **fields):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (num, pixels)).astype(np.uint8)
    return ss.TaskData(jnp.asarray(images), jnp.asarray(np.arange(num) % labels), **fields)


def test_rmsprop_matches_the_reference():
    z = golden("train_rmsprop")
    net = ss.Network(relu_apply, {f"kernel{i}": z[f"kernel{i}"] for i in range(3)})
    data = ss.TaskData(
        jnp.asarray(z["x"].reshape(960, 784)), jnp.asarray(z["y"].reshape(960), jnp.int32)
    )
    start = {f"kernel{i}": jnp.asarray(z[f"scores_start{i}"]) for i in range(3)}
    config = ss.TrainConfig(steps=30, batch_size=32, shuffle=False)
    result = ss.train_task(jax.random.key(0), net, data, config, init_scores=start)
    np.testing.assert_allclose(result.loss, z["losses"], rtol=1e-4)
    for i in range(3):
        end = z[f"scores_end{i}"]
        np.testing.assert_allclose(result.scores[f"kernel{i}"], end, rtol=1e-4, atol=1e-6)
        mask = np.asarray(result.task.mask[f"kernel{i}"])
        assert mask.dtype == bool
        # A score within rounding of 0 may fall on either side.
        clear = np.abs(end) > 1e-6
        np.testing.assert_array_equal(mask[clear], end[clear] >= 0)


def test_training_learns_and_leaves_the_weights_alone():
    net = relu_net((6, 40, 5))
    before = net.fingerprint
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    lit = np.asarray([[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]])[labels]
    images = (lit * 150 + rng.integers(0, 100, (60, 6))).astype(np.uint8)
    data = ss.TaskData(jnp.asarray(images), jnp.asarray(labels))
    config = dataclasses.replace(FAST, steps=200)
    result = ss.train_task(jax.random.key(0), net, data, config)
    assert float(result.loss[-20:].mean()) < 0.5 * float(result.loss[:5].mean())
    again = ss.Network(net.apply, net.params)
    assert again.fingerprint == before


@pytest.mark.parametrize(("num", "steps", "batch_size"), [(10, 7, 4), (3, 5, 8), (60, 3, 16)])
def test_every_epoch_shows_every_example_once(num, steps, batch_size):
    config = ss.TrainConfig(steps=steps, batch_size=batch_size)
    order = np.asarray(batch_indices(jax.random.key(0), num, config)).reshape(-1)
    assert order.shape == (steps * batch_size,)
    epochs = [order[i : i + num] for i in range(0, len(order) - num + 1, num)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(num))
    if len(epochs) > 1 and num > 3:
        assert not np.array_equal(epochs[0], epochs[1])


def test_same_key_same_task_other_key_other_task(small_net):
    data = toy_data()
    one = ss.train_task(jax.random.key(0), small_net, data, FAST)
    chex.assert_trees_all_equal(one, ss.train_task(jax.random.key(0), small_net, data, FAST))
    other = ss.train_task(jax.random.key(1), small_net, data, FAST)
    assert not np.array_equal(one.scores["kernel0"], other.scores["kernel0"])


def test_a_view_is_the_images_gathered_by_hand(small_net):
    view = np.asarray([5, -1, 0, 2, 4, 1])
    # Off zero: weights of one size and whole pixels cancel in a hidden unit, and rounding decides
    # on which side of the kink it lies.
    normalize = ss.Normalize(0.1307, 0.3081)
    data = dataclasses.replace(toy_data(view=jnp.asarray(view)), transform=normalize)
    images = np.asarray(data.images)
    by_hand = np.where(view >= 0, images[:, view], 0).astype(np.uint8)
    plain = ss.TaskData(jnp.asarray(by_hand), data.labels, transform=normalize)
    # SGD, since RMSprop's first steps turn the rounding of a zero gradient into a whole step.
    config = dataclasses.replace(FAST, optimizer="sgd")
    got, want = (
        ss.train_task(jax.random.key(0), small_net, each, config) for each in (data, plain)
    )
    np.testing.assert_allclose(got.loss, want.loss, rtol=1e-5)
    for name, scores in want.scores.items():
        np.testing.assert_allclose(got.scores[name], scores, rtol=1e-4, atol=1e-6)


def test_views_keep_an_image_shape():
    images = np.random.default_rng(0).integers(0, 256, (3, 2, 4)).astype(np.uint8)
    view = np.arange(8).reshape(4, 2)[::-1].copy()
    data = ss.TaskData(jnp.asarray(images), jnp.zeros(3, jnp.int32), jnp.asarray(view))
    x, _ = data.batch(jnp.asarray([2, 0]))
    want = images.reshape(3, 8)[:, view.reshape(-1)].reshape(3, 4, 2)[[2, 0]] / np.float32(255)
    np.testing.assert_allclose(x, want, rtol=1e-6)


def test_normalisation():
    images = jnp.asarray([[0, 51, 255]], jnp.uint8)
    want = (np.asarray([[0, 0.2, 1.0]]) - 0.1307) / 0.3081
    np.testing.assert_allclose(ss.Normalize(0.1307, 0.3081)(images), want, rtol=1e-5)


def test_one_compilation_serves_every_task():
    train._train.clear_cache()
    for seed in range(3):
        net = relu_net((6, 6, 5), seed)
        view = jnp.asarray(np.random.default_rng(seed).permutation(6))
        ss.train_task(jax.random.key(seed), net, toy_data(view=view, seed=seed), FAST)
    assert train._train._cache_size() == 1


def test_topk_rule_keeps_exactly_its_density(small_net):
    config = dataclasses.replace(FAST, rule="topk", density=0.25)
    result = ss.train_task(jax.random.key(0), small_net, toy_data(), config)
    for mask in jax.tree.leaves(result.task.mask):
        assert int(mask.sum()) == ss.kept_count(0.25, mask.size)


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": "adam"},
        {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 1e-4},
        {"schedule": "cosine", "warmup_steps": 5},
        {"optimizer": "rmsprop", "momentum": 0.5},
    ],
)
def test_other_recipes_learn(small_net, change):
    config = dataclasses.replace(FAST, steps=100, learning_rate=0.05, **change)
    loss = ss.train_task(jax.random.key(0), small_net, toy_data(num=5), config).loss
    assert float(loss[-10:].mean()) < float(loss[:10].mean())


def test_sgd_step_equals_the_formula(small_net):
    """One step of plain SGD, with the mask itself as the variable of the gradient."""
    data = toy_data(num=8)
    config = ss.TrainConfig(
        steps=1, batch_size=8, optimizer="sgd", learning_rate=0.1, shuffle=False
    )
    start = {
        name: jnp.linspace(-1, 1, s[0] * s[1]).reshape(s)
        for name, s in small_net.layout.shapes.items()
    }
    result = ss.train_task(jax.random.key(0), small_net, data, config, init_scores=start)
    x, y = data.batch(jnp.arange(8))

    def loss(mask):
        log_p = jax.nn.log_softmax(small_net(mask, x))
        return -log_p[jnp.arange(8), y].mean()

    grads = jax.grad(loss)({name: (s >= 0).astype(jnp.float32) for name, s in start.items()})
    for name, scores in start.items():
        np.testing.assert_allclose(
            result.scores[name], scores - 0.1 * grads[name], rtol=1e-5, atol=1e-7
        )


def test_augmentation_draws_anew_each_step(small_net):
    seen = []

    def augment(key, x):
        jax.debug.callback(lambda bits: seen.append(int(bits)), jax.random.bits(key))
        return x

    config = dataclasses.replace(FAST, steps=4, augment=augment)
    jax.block_until_ready(ss.train_task(jax.random.key(0), small_net, toy_data(), config))
    jax.effects_barrier()
    assert len(set(seen)) == 4


def test_statistics_are_trained_with_the_task(norm_net):
    # Whole batches and masks that hardly move, so that the running mean arrives at the mean.
    config = dataclasses.replace(FAST, steps=150, batch_size=64, learning_rate=1e-7)
    data = toy_data(num=64)
    task = ss.train_task(jax.random.key(0), norm_net, data, config).task
    x, _ = data.batch(jnp.arange(64))
    hidden = np.asarray(x) @ np.where(
        task.mask["layer0"]["kernel"], norm_net.params["layer0"]["kernel"], 0
    )
    np.testing.assert_allclose(task.state["norm"]["mean"], hidden.mean(0), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(task.state["norm"]["var"], hidden.var(0), rtol=1e-3, atol=1e-4)


def test_init_scores_are_used_and_not_consumed(small_net):
    start = {name: jnp.full(shape, 0.5) for name, shape in small_net.layout.shapes.items()}
    config = dataclasses.replace(FAST, steps=1, learning_rate=1e-6)
    result = ss.train_task(jax.random.key(0), small_net, toy_data(), config, init_scores=start)
    np.testing.assert_allclose(result.scores["kernel0"], 0.5, atol=1e-4)
    assert float(start["kernel0"].sum()) == 18.0


def test_it_works_under_vmap_and_jit(small_net):
    keys = jax.random.split(jax.random.key(0), 2)
    data = toy_data()
    together = jax.jit(jax.vmap(lambda key: ss.train_task(key, small_net, data, FAST)))(keys)
    for i, key in enumerate(keys):
        alone = ss.train_task(key, small_net, data, FAST)
        np.testing.assert_allclose(together.loss[i], alone.loss, rtol=1e-4)


def test_bad_configs():
    for change, message in (
        ({"rule": "magnitude"}, "rule must be one of"),
        ({"optimizer": "lion"}, "optimizer must be one of"),
        ({"schedule": "step"}, "schedule must be one of"),
        ({"steps": 0}, "steps must be an int of at least 1"),
        ({"batch_size": 1.5}, "batch_size must be an int of at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"learning_rate": float("inf")}, "learning_rate must be positive"),
        ({"momentum": -1.0}, r"momentum must lie in \[0, 1\)"),
        ({"decay": 7.0}, r"decay must lie in \[0, 1\)"),
        ({"weight_decay": float("nan")}, "weight_decay must lie in"),
        ({"warmup_steps": -1}, "warmup_steps must be an int of at least 0"),
        ({"optimizer": "adam", "momentum": 0.9}, "momentum must be 0"),
        ({"rule": "topk"}, "needs a density"),
        ({"rule": "topk", "density": 0.0}, r"density must lie in \(0, 1\]"),
        ({"rule": "topk", "density": 1.5}, r"density must lie in \(0, 1\]"),
        ({"density": 0.5}, "density must be None"),
    ):
        with pytest.raises(ValueError, match=message):
            ss.TrainConfig(**change)


def test_bad_input(small_net):
    key, good = jax.random.key(0), toy_data()
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 5\), .* got 0 to 5"):
        ss.train_task(key, small_net, toy_data(labels=6), FAST)
    with pytest.raises(ValueError, match=r"images must be \[N, ...\] and labels \[N\]"):
        ss.train_task(key, small_net, dataclasses.replace(good, labels=good.labels[:3]), FAST)
    with pytest.raises(ValueError, match="at least one example"):
        ss.train_task(key, small_net, toy_data(num=0), FAST)
    with pytest.raises(ValueError, match="view must index 6 pixels"):
        ss.train_task(key, small_net, toy_data(view=jnp.arange(7)), FAST)
    with pytest.raises(TypeError, match="labels must hold integers"):
        ss.TaskData(good.images, good.labels.astype(jnp.float32))
    with pytest.raises(TypeError, match="images must be an array"):
        ss.TaskData([[1, 2]], good.labels)
    with pytest.raises(TypeError, match="data must be a TaskData"):
        ss.train_task(key, small_net, good.images, FAST)
    with pytest.raises(TypeError, match="net must be a Network"):
        ss.train_task(key, small_net.params, good, FAST)
    scores = {name: jnp.ones(shape) for name, shape in small_net.layout.shapes.items()}
    with pytest.raises(ValueError, match="finite, got NaN or infinity at 'kernel0'"):
        bad = {**scores, "kernel0": scores["kernel0"].at[0, 0].set(jnp.nan)}
        ss.train_task(key, small_net, good, FAST, init_scores=bad)
    with pytest.raises(TypeError, match="init_scores must be floats"):
        bad = {**scores, "kernel0": scores["kernel0"].astype(jnp.int32)}
        ss.train_task(key, small_net, good, FAST, init_scores=bad)
    with pytest.raises(ValueError, match="lacks the masked leaf 'kernel1'"):
        ss.train_task(key, small_net, good, FAST, init_scores={"kernel0": scores["kernel0"]})


def test_divergence_is_reported(small_net):
    images = jnp.full((8, 6), jnp.nan)
    data = ss.TaskData(images, jnp.zeros(8, jnp.int32))
    with pytest.raises(ValueError, match="training diverged"):
        ss.train_task(jax.random.key(0), small_net, data, FAST)


def many_data(num_tasks=5, **fields):
    """Toy data under `num_tasks` views, and the keys to learn them by.

    Of float images: sums of a few bytes under weights of one magnitude may cancel, and rounding
    would then decide on which side of a ReLU's kink they lie.
    """
    rng = np.random.default_rng(1)
    views = np.stack([rng.permutation(6) for _ in range(num_tasks)])
    views[1:, 0] = -1
    data = toy_data(view=jnp.asarray(views), **fields)
    images = jnp.asarray(rng.normal(size=(data.num_examples, 6)), jnp.float32)
    data = dataclasses.replace(data, images=images)
    return jax.random.split(jax.random.key(3), num_tasks), data


def one_by_one(keys, net, data, config=FAST, init_scores=None):
    """What train_tasks promises, by train_task."""
    results = [
        ss.train_task(
            key,
            net,
            data if data.view is None else dataclasses.replace(data, view=data.view[i]),
            config,
            jax.tree.map(lambda leaf, i=i: leaf[i], init_scores),
        )
        for i, key in enumerate(keys)
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)


# The platform's form (on a CPU one by one), and batches: of one, with a remainder, of all.
@pytest.mark.parametrize("together", [None, 1, 2, 8])
@pytest.mark.parametrize(
    "change", [{}, {"rule": "topk", "density": 0.5, "optimizer": "sgd", "shuffle": False}]
)
def test_many_tasks_equal_each_alone(small_net, together, change):
    keys, data = many_data()
    config = dataclasses.replace(FAST, **change)
    got = train._train_tasks(keys, small_net, data, None, config, together=together)
    chex.assert_trees_all_close(
        got, one_by_one(keys, small_net, data, config), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("together", [None, 2])
def test_many_tasks_each_keep_their_own_statistics(norm_net, together):
    keys, data = many_data(3)
    got = train._train_tasks(keys, norm_net, data, None, FAST, together=together)
    want = one_by_one(keys, norm_net, data)
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-6)
    mean = got.task.state["norm"]["mean"]
    assert mean.shape == (3, 8)
    assert not np.allclose(mean[0], mean[1])


@pytest.mark.parametrize("together", [None, 2])
def test_many_tasks_from_given_scores_without_a_view(small_net, together):
    keys, data = many_data(3)
    data = dataclasses.replace(data, view=None)
    start = {
        name: jnp.stack([jnp.linspace(-1, i, s[0] * s[1]).reshape(s) for i in range(3)])
        for name, s in small_net.layout.shapes.items()
    }
    got = train._train_tasks(keys, small_net, data, start, FAST, together=together)
    want = one_by_one(keys, small_net, data, init_scores=start)
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("together", [None, 2])
def test_many_tasks_with_images_of_their_own(small_net, together):
    tasks = [toy_data(num=20, seed=seed) for seed in range(3)]
    many = jax.tree.map(lambda *leaves: jnp.stack(leaves), *tasks)
    keys = jax.random.split(jax.random.key(3), 3)
    got = train._train_tasks(keys, small_net, many, None, FAST, together=together)
    alone = [
        ss.train_task(key, small_net, task, FAST) for key, task in zip(keys, tasks, strict=True)
    ]
    want = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="labels must have a leading axis of 2 tasks"):
        ss.train_tasks(keys[:2], small_net, dataclasses.replace(many, images=many.images[:2]), FAST)
    with pytest.raises(ValueError, match=r"images must be \[T, N, ...\] and labels \[T, N\]"):
        ss.train_tasks(keys, small_net, dataclasses.replace(many, images=many.images[:, 1:]), FAST)
    with pytest.raises(ValueError, match="images of their own take none"):
        view = jnp.zeros((3, 6), jnp.int32)
        ss.train_tasks(keys, small_net, dataclasses.replace(many, view=view), FAST)


def test_many_tasks_in_a_store(small_net):
    keys, data = many_data(3)
    result = ss.train_tasks(keys, small_net, data, FAST)
    store = ss.MaskStore.create(small_net, capacity=3)
    for i in range(3):
        store = store.append(jax.tree.map(lambda leaf, i=i: leaf[i], result.task))
    np.testing.assert_array_equal(store.mask(2)["kernel0"], result.task.mask["kernel0"][2])
    assert result.loss.shape == (3, FAST.steps)


def test_many_tasks_trace_once(small_net):
    train._train_tasks.clear_cache()
    train._train.clear_cache()
    for seed in range(3):
        keys, data = many_data(3, seed=seed)
        ss.train_tasks(keys, relu_net((6, 6, 5), seed), data, FAST)
    assert train._train_tasks._cache_size() == 1
    assert train._train._cache_size() <= 1


def test_many_tasks_under_jit_and_by_raw_keys(small_net):
    keys, data = many_data(3)
    raw = jax.random.key_data(keys)
    got = jax.jit(lambda keys, data: ss.train_tasks(keys, small_net, data, FAST))(raw, data)
    chex.assert_trees_all_close(got, one_by_one(keys, small_net, data), rtol=1e-4, atol=1e-6)


def test_many_tasks_are_batched_where_there_is_no_cpu(small_net, monkeypatch):
    """On a GPU a chunk is one batch: the loops are those of one task and one over the chunks."""
    keys, data = many_data(5)
    one = train._one_task(data)
    monkeypatch.setattr(train, "CHUNK_BYTES", 2 * train.working_bytes(small_net, one, FAST))

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
    bound = train.working_bytes(net, train._one_task(data), config)
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
    refuses(TypeError, "data must be a TaskData", data=good.images)
    scores = {name: jnp.ones(shape) for name, shape in small_net.layout.shapes.items()}
    refuses(ValueError, r"shape \(3, 6, 6\) at 'kernel0', got \(6, 6\)", init_scores=scores)
    scores = {
        name: jnp.full((3, *shape), jnp.nan) for name, shape in small_net.layout.shapes.items()
    }
    refuses(ValueError, "finite, got NaN or infinity at 'kernel0'", init_scores=scores)


def test_the_tasks_that_diverged_are_named(small_net):
    keys, _ = many_data(12)
    images = jnp.ones((8, 6)).at[:, 0].set(jnp.nan)
    data = ss.TaskData(images, jnp.zeros(8, jnp.int32), jnp.ones((12, 6), jnp.int32))
    one = dataclasses.replace(data, view=data.view.at[3].set(0))
    with pytest.raises(ValueError, match=r"diverged in 1 of 12 tasks \(3\): scores or losses"):
        ss.train_tasks(keys, small_net, one, FAST)
    most = dataclasses.replace(data, view=data.view.at[2:].set(0))
    with pytest.raises(ValueError, match=r"in 10 of 12 tasks \(2, 3, 4, 5, 6, 7, 8, 9, ...\)"):
        ss.train_tasks(keys, small_net, most, FAST)


@pytest.mark.slow
def test_a_thousand_steps_at_once_learn_as_well_as_alone():
    """Rounding moves scores near 0 to either side; what was learned stays the same."""
    dataset = load_dataset("digits", None, 0)
    stream = PermutedStream(dataset, 16)
    net = relu_net((64, 300, 100, 100))
    config = ss.TrainConfig()
    keys = jax.random.split(jax.random.key(0), 16)
    views = jnp.stack([stream.view(i) for i in range(16)])
    data = dataclasses.replace(dataset.train, view=views)
    together = train._train_tasks(keys, net, data, None, config, together=16)
    alone = one_by_one(keys, net, data, config)
    agree, weights = 0, 0
    for name, mask in alone.task.mask.items():
        agree += int((mask == together.task.mask[name]).sum())
        weights += mask.size
    assert agree / weights > 0.995

    def accuracy(tasks):
        store = ss.MaskStore.create(net, capacity=16)
        for i in range(16):
            store = store.append(jax.tree.map(lambda leaf, i=i: leaf[i], tasks))
        return np.mean([row.accuracy for row in ss.evaluate(net, store, stream.test)])

    assert accuracy(together.task) == pytest.approx(accuracy(alone.task), abs=0.002)
