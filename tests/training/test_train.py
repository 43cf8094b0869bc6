"""Learning one task."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import supsup_jax as ss
from supsup_jax import data, prng
from supsup_jax.training import steps, train
from tests.conftest import golden, relu_apply, relu_net

# Plain SGD wherever two ways to compute one thing are compared: RMSprop's first steps turn the
# rounding of a zero gradient into a whole step.
FAST = ss.TrainConfig(steps=20, batch_size=8, learning_rate=1e-2, optimizer="sgd")


def toy_data(num=40, labels=5, seed=0, **fields):
    """Floats: sums of a few bytes under weights of one magnitude may cancel, and rounding would
    then decide on which side of a ReLU's kink they lie.
    """
    images = np.random.default_rng(seed).normal(size=(num, 6)).astype(np.float32)
    return ss.TaskData(jnp.asarray(images), jnp.asarray(np.arange(num) % labels), **fields)


def test_rmsprop_matches_the_reference():
    z = golden("train_rmsprop")
    net = ss.Network(relu_apply, {f"kernel{i}": z[f"kernel{i}"] for i in range(3)})
    before = net.fingerprint
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
    # Only scores moved, and those that were given stay as they are.
    assert ss.Network(net.apply, net.params).fingerprint == before
    np.testing.assert_array_equal(start["kernel0"], z["scores_start0"])


def stepped(config, gradients):
    """Where the optimizer takes 1.0 by these gradients, step by step."""
    transformation, value = config.transformation(), jnp.float32(1)

    def step(before, gradient):
        state, value = before
        update, state = transformation.update(gradient, state, value)
        return (state, value + update), value + update

    before = transformation.init(value), value
    return jax.jit(lambda *args: jax.lax.scan(step, *args))(before, jnp.float32(gradients))[1]


def by_hand(config, gradients):
    """The same in plain floats, as the papers and PyTorch write the optimizers down."""
    value, found, m, v = 1.0, [], 0.0, 0.0
    for t, gradient in enumerate(gradients):
        rate, rest = config.learning_rate, config.steps - config.warmup_steps
        if t < config.warmup_steps:
            rate *= t / config.warmup_steps
        elif config.schedule == "cosine":
            rate *= (1 + np.cos(np.pi * (t - config.warmup_steps) / rest)) / 2
        g = gradient + config.weight_decay * value
        if config.optimizer == "adam":
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            corrected = np.sqrt(v / (1 - 0.999 ** (t + 1)))
            value -= rate * m / (1 - 0.9 ** (t + 1)) / (corrected + config.eps)
        else:
            if config.optimizer == "rmsprop":
                v = config.decay * v + (1 - config.decay) * g * g
                g /= np.sqrt(v) + config.eps
            m = config.momentum * m + rate * g
            value -= m
        found.append(value)
    return found


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"optimizer": "adam"},
        {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 1e-2},
        {"optimizer": "sgd", "schedule": "cosine", "warmup_steps": 3},
        {"optimizer": "sgd", "warmup_steps": 4},
        {"momentum": 0.5, "decay": 0.9, "eps": 1e-3},
    ],
)
def test_optimizers_are_those_of_the_papers(change):
    config = ss.TrainConfig(steps=10, learning_rate=0.05, **change)
    gradients = np.random.default_rng(0).normal(size=10)
    np.testing.assert_allclose(stepped(config, gradients), by_hand(config, gradients), rtol=1e-4)


def test_a_task_that_can_be_told_apart_is_learned():
    """Labels by which half of the pixels is lit: a mask that keeps all weights already does it."""
    labels = np.arange(40) % 2
    lit = np.asarray([[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]])[labels] * 3.0
    data = dataclasses.replace(toy_data(), labels=jnp.asarray(labels))
    data = dataclasses.replace(data, inputs=jnp.asarray(lit, jnp.float32) + 0.1 * data.inputs)
    config = dataclasses.replace(FAST, steps=100, learning_rate=0.3)
    loss = ss.train_task(jax.random.key(0), relu_net((6, 40, 5)), data, config).loss
    assert float(loss[-20:].mean()) < 0.5 * float(loss[:5].mean())


@pytest.mark.parametrize(("num", "count", "batch_size"), [(10, 7, 4), (3, 5, 8), (60, 3, 16)])
def test_every_epoch_shows_every_example_once(num, count, batch_size):
    config = ss.TrainConfig(steps=count, batch_size=batch_size)
    order = np.asarray(steps.batch_indices(jax.random.key(0), num, config)).reshape(-1)
    assert order.shape == (count * batch_size,)
    epochs = [order[i : i + num] for i in range(0, len(order) - num + 1, num)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(num))
    if len(epochs) > 1 and num > 3:
        assert not np.array_equal(epochs[0], epochs[1])


def test_one_compilation_serves_every_task_with_or_without_earlier_ones():
    train._train.clear_cache()
    mean = ss.ScoreMean.create(relu_net((6, 6, 5)))
    for seed in range(3):
        net = relu_net((6, 6, 5), seed)
        view = jnp.asarray(np.random.default_rng(seed).permutation(6))
        data = toy_data(view=view, seed=seed)
        result = ss.train_task(jax.random.key(seed), net, data, FAST, init_scores=mean)
        mean = mean.include(result.scores)
    assert train._train._cache_size() == 1


def test_every_draw_has_a_key_of_its_own(small_net, monkeypatch):
    purposes, purpose_key = [], prng.purpose_key

    def recorded(key, purpose):
        purposes.append(purpose)
        return purpose_key(key, purpose)

    monkeypatch.setattr(prng, "purpose_key", recorded)
    train._train.clear_cache()
    ss.train_task(jax.random.key(0), small_net, toy_data(), FAST)
    assert len(purposes) == len(set(purposes)) == 3  # scores, batches, augmentation


def test_same_key_same_task_other_key_other_task(small_net):
    data = toy_data()
    one = ss.train_task(jax.random.key(0), small_net, data, FAST)
    chex.assert_trees_all_equal(one, ss.train_task(jax.random.key(0), small_net, data, FAST))
    other = ss.train_task(jax.random.key(1), small_net, data, FAST)
    assert not np.array_equal(one.scores["kernel0"], other.scores["kernel0"])


def test_a_view_is_the_images_gathered_by_hand(small_net):
    view = np.asarray([5, -1, 0, 2, 4, 1])
    images = np.random.default_rng(0).integers(0, 256, (40, 6)).astype(np.uint8)
    gathered = np.where(view >= 0, images[:, view], 0).astype(np.uint8)
    got, want = (
        ss.TaskData(
            jnp.asarray(pixels),
            toy_data().labels,
            jnp.asarray(index),
            transform=ss.Normalize(0.1307, 0.3081),
        )
        for pixels, index in ((images, view), (gathered, np.arange(6)))
    )
    np.testing.assert_array_equal(got.batch(jnp.arange(40))[0], want.batch(jnp.arange(40))[0])
    results = [ss.train_task(jax.random.key(0), small_net, data, FAST) for data in (got, want)]
    chex.assert_trees_all_equal(*results)


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


def test_one_step_equals_the_formula(small_net):
    """One step of plain SGD, with the mask itself as the variable of the gradient."""
    data = toy_data(num=8)
    config = dataclasses.replace(FAST, steps=1, learning_rate=0.1, shuffle=False)
    start = {
        name: np.linspace(-1, 1, s[0] * s[1], dtype=np.float32).reshape(s)
        for name, s in small_net.layout.shapes.items()
    }
    result = ss.train_task(jax.random.key(0), small_net, data, config, init_scores=start)
    x, y = np.asarray(data.inputs), np.asarray(data.labels)

    def loss(mask):
        log_p = jax.nn.log_softmax(small_net(mask, x))
        return -log_p[jnp.arange(8), y].mean()

    mask = {name: (s >= 0).astype(np.float32) for name, s in start.items()}
    grads = jax.jit(jax.grad(loss))(mask)
    for name, scores in start.items():
        np.testing.assert_allclose(
            result.scores[name], scores - 0.1 * grads[name], rtol=1e-5, atol=1e-7
        )


def recorder():
    """An augmentation that changes nothing, and the list of what its keys draw."""
    seen = []

    def augment(key, x):
        jax.debug.callback(lambda bits: seen.append(int(bits)), jax.random.bits(key))
        return x

    return augment, seen


def test_augmentation_draws_anew_each_step(small_net):
    augment, seen = recorder()
    config = dataclasses.replace(FAST, steps=4, augment=augment)
    jax.block_until_ready(ss.train_task(jax.random.key(0), small_net, toy_data(), config))
    jax.effects_barrier()
    assert len(set(seen)) == 4


def test_statistics_are_trained_with_the_task(norm_net):
    # Whole batches and masks that hardly move, so that the running mean arrives at the mean.
    config = dataclasses.replace(FAST, steps=150, batch_size=40, learning_rate=1e-7)
    data = toy_data()
    task = ss.train_task(jax.random.key(0), norm_net, data, config).task
    kernel = norm_net.params["layer0"]["kernel"]
    hidden = np.asarray(data.inputs) @ np.where(task.mask["layer0"]["kernel"], kernel, 0)
    np.testing.assert_allclose(task.state["norm"]["mean"], hidden.mean(0), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(task.state["norm"]["var"], hidden.var(0), rtol=1e-3, atol=1e-4)


def test_it_works_under_vmap_and_jit(small_net):
    keys = jax.random.split(jax.random.key(0), 2)
    data = toy_data()
    together = jax.jit(jax.vmap(lambda key: ss.train_task(key, small_net, data, FAST)))(keys)
    for i, key in enumerate(keys):
        alone = ss.train_task(key, small_net, data, FAST)
        np.testing.assert_allclose(together.loss[i], alone.loss, rtol=1e-4)


# Transfer.


def test_the_mean_of_all_scores_so_far(small_net):
    rng = np.random.default_rng(0)
    shapes = small_net.layout.shapes
    scores = [
        {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
        for _ in range(4)
    ]
    mean = ss.ScoreMean.create(small_net)
    include = jax.jit(ss.ScoreMean.include)
    for each in scores:
        mean = include(mean, each)
    assert int(mean.num_tasks) == 4
    for name in shapes:
        want = np.mean([each[name] for each in scores], axis=0)
        np.testing.assert_allclose(mean.mean[name], want, rtol=1e-5, atol=1e-6)


def test_a_task_starts_where_the_mean_is(small_net):
    key, data, none = jax.random.key(0), toy_data(), ss.ScoreMean.create(small_net)
    drawn = ss.train_task(key, small_net, data, FAST)
    first = ss.train_task(key, small_net, data, FAST, init_scores=none)
    mean = none.include(first.scores)
    second = ss.train_task(key, small_net, data, FAST, init_scores=mean)
    given = ss.train_task(key, small_net, data, FAST, init_scores=first.scores)
    for name in small_net.layout.shapes:
        np.testing.assert_array_equal(first.scores[name], drawn.scores[name])
        np.testing.assert_array_equal(second.scores[name], given.scores[name])
        assert not np.array_equal(second.scores[name], drawn.scores[name])


def test_mistakes_of_transfer(small_net):
    key, data, mean = jax.random.key(0), toy_data(), ss.ScoreMean.create(small_net)
    with pytest.raises(ValueError, match="scores must be a pytree like"):
        mean.include({"kernel0": jnp.ones((6, 6))})
    two = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), mean.mean)
    with pytest.raises(ValueError, match="scores must be of one task"):
        mean.include(two)
    with pytest.raises(TypeError, match="tasks learned at once have no earlier ones"):
        ss.train_tasks(jax.random.split(key, 2), small_net, data, FAST, init_scores=mean)
    other = ss.Network(lambda p, x: x @ p["w"], {"w": jnp.ones((6, 5))})
    with pytest.raises(ValueError, match="init_scores lacks the masked leaf"):
        ss.train_task(key, small_net, data, FAST, init_scores=ss.ScoreMean.create(other))


# Mistakes.


@pytest.mark.parametrize(
    ("change", "message"),
    [
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
    ],
)
def test_bad_configs(change, message):
    with pytest.raises(ValueError, match=message):
        ss.TrainConfig(**change)


def test_a_config_hashes_from_the_start():
    lists = ss.Normalize([0.5, 0.25], np.float32(0.5))
    assert lists == ss.Normalize((0.5, 0.25), 0.5)
    ss.TrainConfig(augment=data.CropAndFlip(1, lists))
    with pytest.raises(TypeError, match="learning_rate must hash by value"):
        ss.TrainConfig(learning_rate=jnp.float32(1e-3))


def test_numbers_are_float32_under_64_bit_types_too(small_net, tmp_path):
    """Of training in one program, in several and from batches, and of a Hopfield network."""
    key, toy = jax.random.key(0), toy_data()
    want = ss.train_task(key, small_net, toy, FAST)
    with jax.enable_x64(True):
        batches = [(toy.inputs[:8], toy.labels[:8])] * FAST.steps
        results = [
            ss.train_task(key, small_net, toy, FAST, on_step=lambda step, progress: None),
            ss.train_on_batches(key, small_net, batches, FAST),
            ss.train_task(key, small_net, toy, FAST, ss.ScoreMean.create(small_net)),
        ]
        for result in results:
            dtypes = {leaf.dtype for leaf in jax.tree.leaves((result.scores, result.loss))}
            assert dtypes == {jnp.dtype(jnp.float32)}
        chex.assert_trees_all_close(results[0].loss, want.loss, rtol=1e-4)
        store = ss.hopfield.HopfieldStore.create(small_net).append(want.task)
        store.save(tmp_path / "store")
        again = ss.hopfield.HopfieldStore.load(tmp_path / "store", small_net)
        chex.assert_trees_all_equal(again.weights, store.weights)
        config = ss.hopfield.RecoveryConfig(guided=True)
        found = ss.hopfield.recover(small_net, again, toy.inputs[None, :8], config)
        assert jax.tree.leaves(found.scores)[0].dtype == jnp.float32


def test_bad_input(small_net):
    key, good = jax.random.key(0), toy_data()

    def refuses(error, match, net=small_net, data=good, **options):
        with pytest.raises(error, match=match):
            ss.train_task(key, net, data, FAST, **options)

    refuses(ValueError, r"labels must lie in \[0, 5\), .* got 0 to 5", data=toy_data(labels=6))
    short = dataclasses.replace(good, labels=good.labels[:3])
    refuses(ValueError, r"inputs must be \[N, ...\] and labels \[N\]", data=short)
    refuses(ValueError, "at least one example", data=toy_data(num=0))
    refuses(ValueError, "view must index 6 pixels", data=toy_data(view=jnp.arange(7)))
    refuses(ValueError, "view must be of pixels", data=toy_data(view=jnp.zeros(0, int)))
    narrow = ss.TaskData(np.ones((3, 200)), np.arange(3), view=np.int8([0, 5, -1]))
    assert narrow.view.dtype == jnp.int32
    tokens = ss.TaskData(np.ones((3, 6), np.int8), np.arange(3), transform=None)
    refuses(TypeError, "cast tokens to int32", data=tokens)
    refuses(TypeError, "data must be a TaskData", data=good.inputs)
    refuses(TypeError, "net must be a Network", net=small_net.params)
    refuses(
        TypeError,
        "labels must hold integers",
        data=dataclasses.replace(good, labels=good.labels.astype(jnp.float32)),
    )
    with pytest.raises(TypeError, match="inputs must be an array"):
        ss.TaskData([[1, 2]], good.labels)
    scores = {name: np.ones(shape, np.float32) for name, shape in small_net.layout.shapes.items()}
    bad = {**scores, "kernel0": scores["kernel0"] * np.nan}
    refuses(ValueError, "finite, got NaN or infinity at 'kernel0'", init_scores=bad)
    bad = {**scores, "kernel0": scores["kernel0"].astype(np.int32)}
    refuses(TypeError, "init_scores must be floats", init_scores=bad)
    only = {"kernel0": scores["kernel0"]}
    refuses(ValueError, "lacks the masked leaf 'kernel1'", init_scores=only)
    nan = dataclasses.replace(good, inputs=np.full((40, 6), np.nan, np.float32))
    refuses(ValueError, "training diverged", data=nan)
