"""Losses, labels, optimizers and draws that are not the default, against plain NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import supsup_jax as ss
from supsup_jax import losses, objectives
from supsup_jax.training import steps, train
from supsup_jax.training.steps import check_labels
from tests.conftest import relu_net
from tests.training.test_train import FAST, toy_data

KEY = jax.random.key(0)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_cross_entropy_with_smoothing_and_weights():
    logits = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    labels, weights = np.array([0, 1, 2, 0, 1, 2]), (1.0, 2.0, 0.5)
    log_p = log_softmax(logits)
    own = -log_p[np.arange(6), labels]
    np.testing.assert_allclose(losses.CrossEntropy()(logits, labels), own, rtol=1e-5)
    even = -log_p[:, :3].mean(1)
    got = losses.CrossEntropy(smoothing=0.1, weights=weights, labels=3)(logits, labels)
    want = (0.9 * own + 0.1 * even) * np.array(weights)[labels]
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert losses.CrossEntropy(weights=[1, 2]) == losses.CrossEntropy(weights=(1.0, 2.0))
    many = losses.CrossEntropy(weights=(1.0,) * 200)
    np.testing.assert_allclose(many(np.zeros((1, 200)), np.int8([7])), np.log(200), rtol=1e-5)
    with pytest.raises(ValueError, match="the loss is of 9 labels, the network has 5 outputs"):
        losses.CrossEntropy(labels=9)(logits, labels)
    for change, message in (
        ({"smoothing": 1}, "smoothing must"),
        ({"weights": (-1,)}, "weights"),
        ({"labels": 0}, "labels must be an int of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            losses.CrossEntropy(**change)


def test_objectives_of_several_labels_and_of_numbers():
    logits = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32) * 3
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    want = -(p * np.log(p) + (1 - p) * np.log(1 - p)).sum(-1)
    np.testing.assert_allclose(objectives.sigmoid_entropy(logits), want, rtol=1e-4)
    assert np.isfinite(jax.grad(objectives.sigmoid_entropy)(jnp.full(3, 1e4))).all()
    np.testing.assert_allclose(objectives.log_variance(logits), logits[:, 2:].mean(1), rtol=1e-6)
    y = np.random.default_rng(1).normal(size=(6, 2))
    got = losses.gaussian(logits, y)
    variance = np.exp(logits[:, 2:].astype(np.float64))
    want = (y - logits[:, :2]) ** 2 / (2 * variance) + 0.5 * np.log(variance)
    np.testing.assert_allclose(got, want, rtol=1e-4)  # but for log(2 pi) / 2
    with pytest.raises(ValueError, match="entropy tells nothing of a single output"):
        ss.entropy(jnp.ones((3, 1)))
    with pytest.raises(ValueError, match="2 outputs for each of the 3 numbers"):
        losses.gaussian(logits, np.ones((6, 3)))
    with pytest.raises(TypeError):
        losses.CrossEntropy()(logits, y[:, 0])


@pytest.mark.parametrize(
    ("loss", "objective", "labels"),
    [
        (optax.sigmoid_binary_cross_entropy, objectives.sigmoid_entropy, "several"),
        (optax.squared_error, objectives.max_confidence, "numbers"),
        (losses.gaussian, objectives.log_variance, "half"),
    ],
)
def test_the_first_loss_is_the_losss_mean_and_metrics_judge(small_net, loss, objective, labels):
    x = np.asarray(toy_data().inputs)
    rng = np.random.default_rng(0)
    net = small_net if labels != "half" else relu_net((6, 6, 4))
    y = {
        "several": (rng.random((40, 5)) < 0.5).astype(np.float32),
        "numbers": rng.normal(size=(40, 5)).astype(np.float32),
        "half": rng.normal(size=(40, 2)).astype(np.float32),
    }[labels]
    config = dataclasses.replace(FAST, loss=loss, shuffle=False, steps=1, batch_size=40)
    result = ss.train_task(KEY, net, ss.TaskData(x, y), config, drawn := scores_of(net))
    mask = {name: leaf >= 0 for name, leaf in drawn.items()}
    np.testing.assert_allclose(result.loss[0], np.mean(loss(net(mask, x), y)), rtol=1e-4)
    store = ss.MaskStore.create(net, 2).append(result.task).append(mask)

    def metric(logits, labels):
        return -jnp.mean(loss(logits, labels), axis=-1)

    test = [ss.TaskData(x, y)] * 2
    given = ss.evaluate(net, store, test, metric=metric)
    want = metric(net(mask, x), y).mean()
    np.testing.assert_allclose(given[1].accuracy, want, rtol=1e-4)
    named = ss.evaluate(net, store, test, "per_example", objective=objective, metric=metric)
    assert all(0 <= row.task_accuracy <= 1 for row in named)
    with pytest.raises(TypeError, match=r"labels must hold integers \[N\].*pass a loss"):
        ss.evaluate(net, store, test)
    with pytest.raises(ValueError, match=r"metric must return \[B\]"):
        ss.evaluate(net, store, test, metric=lambda logits, labels: 0)


def difference(logits, y):
    return (logits - y) ** 2


def mean_difference(logits, y):
    return difference(logits, y).mean()


@pytest.mark.parametrize(
    ("outputs", "loss", "shape", "match"),
    [
        (5, optax.sigmoid_binary_cross_entropy, (8, 3), r"\[B, 5\] and labels float32 \[B, 3\]: "),
        (1, optax.squared_error, (8,), r"the loss fails for .*: ValueError: Shape mismatch"),
        (1, difference, (8,), r"pairs each example with each other, .* \[B, 1\] and .* \[B\]"),
        (1, mean_difference, (8,), "pairs each example with each other"),
        (1, mean_difference, (8, 1), None),
        (5, mean_difference, (8, 5), None),
    ],
)
def test_labels_that_a_loss_would_not_take_as_meant(outputs, loss, shape, match):
    net, config = relu_net((6, 6, outputs)), ss.TrainConfig(loss=loss)
    data = ss.TaskData(np.ones((8, 6), np.float32), np.ones(shape, np.float32))
    if match is None:
        assert check_labels(net, data, config) == outputs
        return
    with jax.numpy_rank_promotion("allow"), pytest.raises(ValueError, match=match):
        ss.train_task(KEY, net, data, config)


@pytest.mark.parametrize("labels", [{"y": np.zeros(8)}, (np.zeros(8), np.zeros(8))])
def test_labels_are_one_array(labels):
    with pytest.raises(TypeError, match=r"labels must be an array, got a (dict|tuple)"):
        ss.TaskData(np.ones((8, 6)), labels)


def test_a_dict_of_lists_is_told_from_one_of_arrays():
    with pytest.raises(TypeError, match="got a dict that holds more than arrays"):
        ss.TaskData({"ids": [[1, 2]] * 8}, np.zeros(8, int))


def scores_of(net):
    rng = np.random.default_rng(5)
    return {name: rng.normal(size=s).astype(np.float32) for name, s in net.layout.shapes.items()}


def test_balanced_draws_every_class_alike():
    labels = np.r_[np.zeros(380, int), np.full(19, 3), [7]]
    np.random.default_rng(0).shuffle(labels)
    config = ss.TrainConfig(steps=300, batch_size=20, balanced=True)
    index = np.asarray(steps.batch_indices(KEY, 400, config, jnp.asarray(labels)))
    drawn = labels[index.reshape(-1)]
    # 6,000 draws of a third each: a standard deviation of 37.
    for label in (0, 3, 7):
        assert abs((drawn == label).sum() - 2000) < 6 * 37
    rare = index[labels[index] == 3]
    assert len(np.unique(rare)) == 19
    # 2,000 draws of 380 leave out 2 in the mean.
    assert len(np.unique(index[labels[index] == 0])) > 360
    with pytest.raises(ValueError, match="balanced draws its own order"):
        ss.TrainConfig(balanced=True, shuffle=False)
    with pytest.raises(ValueError, match="balanced has no part in a stream"):
        ss.stream.StreamConfig(train=config)
    with pytest.raises(ValueError, match="batches are given: balance those"):
        ss.start_training(KEY, relu_net((6, 5)), config)


def test_an_optimizer_of_ones_own_is_the_named_one(small_net):
    data, named = toy_data(), dataclasses.replace(FAST, optimizer="adamw", weight_decay=0.1)
    made = ss.Made(optax.adamw, named.learning_rate, eps=1e-8, weight_decay=0.1)
    want = ss.train_task(KEY, small_net, data, named)
    plain = ss.TrainConfig(steps=FAST.steps, batch_size=FAST.batch_size)
    for optimizer in (made, made.make()):
        config = dataclasses.replace(plain, optimizer=optimizer)
        got = ss.train_task(KEY, small_net, data, config)
        jax.tree.map(np.testing.assert_array_equal, got, want)
    with pytest.raises(ValueError, match="weight_decay is a field of the named optimizers"):
        dataclasses.replace(plain, optimizer=made, weight_decay=0.1)
    for optimizer, error, message in (
        (optax.adamw, ValueError, "a transformation of optax, or Made of one"),
        (ss.Made(optax.constant_schedule, 0.1), TypeError, "must make a transformation"),
    ):
        with pytest.raises(error, match=message):
            ss.TrainConfig(optimizer=optimizer)
    with pytest.raises(TypeError, match="must be hashable"):
        ss.Made(optax.chain, [1])


def test_equal_words_make_equal_optimizers_that_trace_once(small_net):
    def config():
        rate = ss.Made(optax.cosine_decay_schedule, 0.1, 10)
        clip = ss.Made(optax.clip_by_global_norm, 1.0)
        chain = ss.Made(optax.chain, clip, ss.Made(optax.sgd, rate, momentum=0.9))
        return ss.TrainConfig(steps=4, batch_size=8, optimizer=chain)

    ss.train_task(KEY, small_net, toy_data(), config())
    before = train._train._cache_size()
    ss.train_task(KEY, small_net, toy_data(), config())
    assert train._train._cache_size() == before
    assert config() == config()
    assert repr(ss.Made(optax.sgd, 0.1, momentum=0.9)) == "Made(sgd, 0.1, momentum=0.9)"


def test_clipping_and_a_rate_of_the_step():
    """sgd at a norm of 1 moves by the rate exactly, for a gradient above it."""
    rate = optax.linear_schedule(0.5, 0.1, 1)
    config = ss.TrainConfig(optimizer="sgd", clip_norm=1.0, learning_rate=rate)
    optimizer, weights = config.transformation(), jnp.zeros(4)
    state = optimizer.init(weights)
    for want in (0.5, 0.1):
        update, state = optimizer.update(jnp.full(4, 10.0), state, weights)
        np.testing.assert_allclose(np.linalg.norm(update), want, rtol=1e-6)
    with pytest.raises(ValueError, match="name no other"):
        ss.TrainConfig(learning_rate=rate, schedule="cosine")
    with pytest.raises(ValueError, match="clip_norm must be positive"):
        ss.TrainConfig(clip_norm=0)


@pytest.mark.parametrize("rule", ["threshold", "topk"])
def test_starting_from_the_whole_network(rule):
    given = {name: np.asarray(leaf) for name, leaf in scores_of(relu_net((6, 6, 5))).items()}
    net = ss.Network(relu_net((6, 6, 5)).apply, given)
    config = dataclasses.replace(FAST, rule=rule, density=0.5 if rule == "topk" else None)
    start = steps.whole_network(net, config)
    mask = config.mask(net.layout, start)
    for name, leaf in given.items():
        smallest = np.sort(np.abs(leaf).ravel())[leaf.size - round(leaf.size / 2)]
        kept = np.abs(leaf) >= smallest if rule == "topk" else np.ones(leaf.shape)
        np.testing.assert_array_equal(mask[name], kept)
    by_name = ss.train_task(KEY, net, toy_data(), config, "all")
    by_scores = ss.train_task(KEY, net, toy_data(), config, start)
    jax.tree.map(np.testing.assert_array_equal, by_name, by_scores)
    together = ss.train_tasks(KEY[None], net, toy_data(), config, "all")
    np.testing.assert_array_equal(together.loss[0], by_name.loss)
    with pytest.raises(ValueError, match="init_scores must be 'all'"):
        ss.train_task(KEY, net, toy_data(), config, "half")
    if rule == "topk":
        with pytest.raises(ValueError, match="are all as large"):
            ss.train_task(KEY, relu_net((6, 6, 5)), toy_data(), config, "all")


def test_signs_of_life_change_nothing(small_net):
    seen = []
    config = dataclasses.replace(FAST, steps=45)

    def on_step(i, progress):
        seen.append((i, int(progress.step), float(progress.loss[i - 1])))

    got = ss.train_task(KEY, small_net, toy_data(), config, on_step=on_step)
    want = ss.train_task(KEY, small_net, toy_data(), config)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)
    assert [i for i, *_ in seen] == [*range(3, 46, 3)]
    assert all(i == step for i, step, _ in seen)
    np.testing.assert_allclose([loss for *_, loss in seen], want.loss[2::3], rtol=1e-4)
    told = []
    keys = jax.random.split(KEY, 3)
    many = ss.train_tasks(
        keys, small_net, toy_data(), FAST, on_step=lambda i, result: told.append((i, result))
    )
    assert [i for i, _ in told] == [1, 2, 3]
    np.testing.assert_array_equal(many.loss[1:2], told[1][1].loss)
    jax.tree.map(
        np.testing.assert_array_equal, many, ss.train_tasks(keys, small_net, toy_data(), FAST)
    )
    with pytest.raises(ValueError, match="no meaning inside jit"):
        jax.jit(lambda key: ss.train_task(key, small_net, toy_data(), FAST, on_step=on_step))(KEY)
    with pytest.raises(ValueError, match="no meaning inside jit"):
        jax.jit(lambda: ss.train_task(KEY, small_net, toy_data(), FAST, on_step=on_step))()


class Convolves(nnx.Module):
    def __init__(self, *, rngs):
        self.conv = nnx.Conv(1, 3, (3, 3), rngs=rngs)
        self.dropout = nnx.Dropout(0.3)
        self.head = nnx.Linear(3, 4, rngs=rngs)

    def __call__(self, x, *, train, rngs):
        x = jax.nn.relu(self.conv(x)).mean((1, 2))
        return self.head(self.dropout(x, deterministic=not train, rngs=rngs)), {"hidden": x}


def test_a_convolution_and_call_by_call_arguments():
    """One task, many and a caller's own program arrive at the same."""
    net = ss.signed_constant(ss.Network.from_nnx(Convolves(rngs=nnx.Rngs(0))), 0)
    images = np.random.default_rng(0).normal(size=(16, 6, 6, 1)).astype(np.float32)
    data = ss.TaskData(images, np.arange(16) % 4)
    config = ss.TrainConfig(steps=4, batch_size=8, optimizer="sgd", learning_rate=0.1)
    got = ss.train_task(KEY, net, data, config)
    many = ss.train_tasks(KEY[None], net, data, config)
    np.testing.assert_allclose(many.loss[0], got.loss, rtol=1e-5)
    closed_over = jax.jit(lambda: ss.train_task(KEY, net, data, config).loss)()
    np.testing.assert_allclose(closed_over, got.loss, rtol=1e-4)
    # Dropout draws anew at each step, and not at all in prediction.
    start, after = jax.tree.leaves(net.state), jax.tree.leaves(got.task.state)
    assert any((a != b).any() for a, b in zip(start, after, strict=True))
    mask = net.layout.tree([np.ones(shape) for shape in net.layout.shapes.values()])
    first, state = net.train_logits(mask, net.state, images)
    second, _ = net.train_logits(mask, state, images)
    assert not np.allclose(first, second)
    np.testing.assert_array_equal(net(mask, images), net(mask, images, state))
    assert not net.has_statistics


class LinenDropout(linen.Module):
    norm: bool = False

    @linen.compact
    def __call__(self, x, train: bool):
        x = linen.Dense(8)(x)
        if self.norm:
            x = linen.BatchNorm(use_running_average=not train)(x)
        return linen.Dense(5)(linen.Dropout(0.5, deterministic=not train)(x))


@pytest.mark.parametrize("norm", [False, True])
def test_linen_dropout_draws_in_training(norm):
    module, x = LinenDropout(norm), toy_data().inputs.astype(jnp.float32)
    net = ss.Network.from_linen(module, module.init(KEY, x, train=False))
    assert net.has_statistics == norm
    mask = net.layout.tree([np.ones(shape) for shape in net.layout.shapes.values()])
    first, state = net.train_logits(mask, net.state, x)
    second, _ = net.train_logits(mask, state, x)
    assert not np.allclose(first, second)
    quiet = module.apply({"params": net.params, **variables(net)}, x, train=False)
    np.testing.assert_allclose(net(mask, x, net.state), quiet, rtol=1e-5, atol=1e-6)
    result = ss.train_task(KEY, net, toy_data(), FAST)
    store = ss.MaskStore.create(net, 2).append(result.task)
    assert ss.one_shot(net, store, x).task.shape == (40,)


class LinenField(linen.Module):
    train: bool = True

    @linen.compact
    def __call__(self, x):
        return linen.Dense(5)(linen.Dropout(0.5, deterministic=not self.train)(x))


def sequential(train):
    dropout = linen.Dropout(0.5, deterministic=not train)
    return linen.Sequential(
        [linen.Dense(8), linen.BatchNorm(use_running_average=not train), dropout, linen.Dense(5)]
    )


@pytest.mark.parametrize("make", [LinenField, sequential])
def test_linen_modes_that_are_fields(make):
    x = np.random.default_rng(0).standard_normal((40, 6), np.float32)
    given = make(True).init({"params": KEY, "dropout": KEY}, x)
    net = ss.Network.from_linen(make(True), given)
    mask = net.layout.tree([np.ones(shape) for shape in net.layout.shapes.values()])
    first, state = net.train_logits(mask, net.state, x)
    second, _ = net.train_logits(mask, state, x)
    assert not np.allclose(first, second)
    quiet = make(False).apply(given, x)
    np.testing.assert_allclose(net(mask, x, net.state), quiet, rtol=1e-5, atol=1e-6)


class Flagged(nnx.Module):
    def __init__(self, *, rngs):
        self.training = False
        self.dropout = nnx.Dropout(0.0, rngs=rngs)
        self.head = nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(x)) * (2 if self.training else 1)


def test_flags_that_nnx_modules_hold():
    net = ss.Network.from_nnx(Flagged(rngs=nnx.Rngs(0)))
    x, mask = np.ones((2, 6), np.float32), net.layout.tree([np.ones((6, 5))])
    quiet = net(mask, x, net.state)
    np.testing.assert_allclose(net.train_logits(mask, net.state, x)[0], 2 * quiet, rtol=1e-6)


def test_a_linen_module_that_always_drops_is_refused():
    class Hard(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(5)(linen.Dropout(0.5, deterministic=False)(x))

    x = np.ones((4, 6), np.float32)
    net = ss.Network.from_linen(Hard(), Hard().init({"params": KEY, "dropout": KEY}, x))
    with pytest.raises(ValueError, match="Hard draws, and nothing tells it training from pred"):
        ss.train_task(KEY, net, ss.TaskData(x, np.zeros(4, int)))


def variables(net):
    return {"batch_stats": net.state["batch_stats"]} if "batch_stats" in net.state else {}


def test_half_precision_and_remat():
    class Net(nnx.Module):
        def __init__(self, *, rngs):
            half = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16, "rngs": rngs}
            self.a, self.b = nnx.Linear(6, 16, **half), nnx.Linear(16, 5, **half)

        def __call__(self, x):
            return self.b(jax.nn.relu(jax.checkpoint(lambda a, x: a(x))(self.a, x)))

    net = ss.signed_constant(ss.Network.from_nnx(Net(rngs=nnx.Rngs(0))), 0)
    assert {leaf.dtype for leaf in jax.tree.leaves(net.params)} == {jnp.dtype(jnp.bfloat16)}
    result = ss.train_task(KEY, net, toy_data(), FAST)
    assert {leaf.dtype for leaf in jax.tree.leaves(result.scores)} == {jnp.dtype(jnp.float32)}
    store = ss.MaskStore.create(net, 4).append(result.task)
    belief = ss.one_shot(net, store, toy_data().inputs.astype(jnp.float32))
    assert belief.scores.dtype == jnp.float32
    assert np.isfinite(belief.scores[:, 0]).all()


@pytest.mark.parametrize(
    ("flag", "capacity", "rules"),
    [
        ("jax_debug_nans", 4, (ss.one_shot, ss.oracle, ss.binary_search, ss.rerank)),
        # Which stops at the -inf of an empty slot, or of a task that a rule did not look at.
        ("jax_debug_infs", 2, (ss.one_shot, ss.oracle)),
    ],
)
def test_healthy_code_stops_at_no_flag(flag, capacity, rules):
    # Of shapes of its own: programs that were traced before are not looked at again.
    net, data = relu_net((6, 7 + capacity, 5)), toy_data()
    jax.config.update(flag, True)
    try:
        ss.train_on_batches(KEY, net, iter([data] * 4), whole := batches_of(data))
        result = ss.train_task(KEY, net, data, whole)
        store = ss.MaskStore.create(net, capacity)
        store = store.append(result.task).append(result.task)
        x = data.inputs.astype(jnp.float32)
        for rule in rules:
            rule(net, store, x)
        ss.evaluate(net, store, [data] * 2, "per_example")
    finally:
        jax.config.update(flag, False)


def batches_of(data):
    return dataclasses.replace(FAST, steps=4, batch_size=data.num_examples)
