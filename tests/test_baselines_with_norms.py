"""Baselines on a convolutional network with batch normalisation."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import supsup_jax as ss
from supsup_jax import baselines
from supsup_jax.layout import named_leaves
from tests.conftest import ConvNet, relu_apply, relu_net
from tests.test_baselines import METHODS

SGD = ss.TrainConfig(optimizer="sgd", learning_rate=0.1, steps=3, batch_size=8, shuffle=False)
MOMENTUM = 0.9
KERNELS = ("block/kernel", "head/kernel", "stem/kernel")
MAKERS = {name: make for name, make in METHODS.items() if name not in ("lower_bound", "psp")}


@pytest.fixture(scope="module")
def net():
    return ss.signed_constant(ss.Network.from_nnx(ConvNet(rngs=nnx.Rngs(0))), 0)


@pytest.fixture(scope="module")
def shared(net):
    return baselines.shared_weights(net, jax.random.key(5))


@pytest.fixture(scope="module")
def tasks():
    rng = np.random.default_rng(0)
    drawn = rng.normal([[[[0]]], [[[1]]]], size=(2, 24, 8, 8)).astype(np.float32)
    return [ss.TaskData(images, rng.integers(0, 5, 24).astype(np.int32)) for images in drawn]


def plain(kernels, x, statistics=None, constant=False):
    """Logits of ConvNet written out, and its statistics: the batch's where none are given."""
    found = {}

    def conv(x, name, stride):
        return jax.lax.conv_general_dilated(
            x,
            kernels[f"{name}/kernel"],
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    def norm(x, name):
        mean, var = (x.mean((0, 1, 2)), x.var((0, 1, 2)))
        if statistics is not None:
            mean, var = statistics[f"{name}/mean"], statistics[f"{name}/var"]
        found[f"{name}/mean"], found[f"{name}/var"] = mean, var
        if constant:
            mean, var = jax.lax.stop_gradient((mean, var))
        return (x - mean[None, None, None]) / jnp.sqrt(var + 1e-5)[None, None, None]

    x = jax.nn.relu(norm(conv(x[..., None], "stem", 2), "stem_norm"))
    x = jax.nn.relu(x + norm(conv(x, "block", 1), "block_norm"))
    return x.mean((1, 2)) @ kernels["head/kernel"], found


def scaled(kernels, own):
    """Every input of a kernel times t, every output times s."""
    return {name: jnp.einsum("...io,i,o->...io", kernels[name], *own[name]) for name in KERNELS}


def learn(baseline, shared, data, first, state=None, seed=1):
    key = jax.random.key(seed)
    return baselines.learn(key, baseline, shared, data, SGD, first=first, state=state)


def assert_close(got, want, rtol=1e-4, atol=1e-5):
    chex.assert_trees_all_close(*map(named_leaves, (got, want)), rtol=rtol, atol=atol)


def differ(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return [not np.array_equal(x, y) for x, y in pairs]


def test_batche_with_norms_is_learned_as_a_plain_loop_learns_it(net, shared, tasks):
    batche = baselines.batche(net)
    learned = learn(batche, shared, tasks[0], first=True)
    trained = named_leaves(shared), baselines.own_weights(batche, jax.random.key(1))
    running = named_leaves(net.state)
    losses = []

    @functools.partial(jax.value_and_grad, has_aux=True)
    def slope(trained, x, y):
        logits, found = plain(scaled(*trained), x)
        return -jax.nn.log_softmax(logits)[jnp.arange(8), y].mean(), found

    @jax.jit
    def step(trained, running, x, y):
        (value, found), gradient = slope(trained, x, y)
        running = {n: MOMENTUM * running[n] + (1 - MOMENTUM) * found[n] for n in running}
        return jax.tree.map(lambda w, g: w - 0.1 * g, trained, gradient), running, value

    images, labels = (np.asarray(each) for each in (tasks[0].inputs, tasks[0].labels))
    for i in range(0, 24, 8):
        trained, running, value = step(trained, running, images[i : i + 8], labels[i : i + 8])
        losses.append(value)
    assert_close((named_leaves(learned.shared), learned.own), trained)
    assert_close(named_leaves(learned.state), running)
    np.testing.assert_allclose(learned.loss, losses, rtol=1e-4)


@pytest.mark.parametrize("name", MAKERS)
def test_a_task_keeps_what_it_computed_when_another_is_learned(net, shared, tasks, name):
    baseline = MAKERS[name](net)
    one = learn(baseline, shared, tasks[0], first=True)
    two = learn(baseline, one.shared, tasks[1], first=False, state=one.state, seed=2)
    x, y = tasks[0].inputs, np.asarray(tasks[0].labels)
    before = baseline.logits(one.shared, one.own, x, one.state)
    np.testing.assert_array_equal(baseline.logits(two.shared, one.own, x, one.state), before)
    # The statistics are the first task's alone: the second's are others, begun at the network's.
    assert all(differ(one.state, two.state))
    assert all(differ(before, baseline.logits(two.shared, one.own, x, two.state)))
    anew = learn(baseline, one.shared, tasks[1], first=False, seed=2)
    assert not any(differ(anew, two))
    right = baselines.is_right(baseline, two.shared, one.own, tasks[0], one.state, batch_size=10)
    np.testing.assert_array_equal(right, before.argmax(-1) == y)


def test_statistics_of_the_lower_bound_go_on(net, shared, tasks):
    bound = baselines.lower_bound(net)
    one = learn(bound, shared, tasks[0], first=True)
    two = learn(bound, one.shared, tasks[1], first=False, state=one.state)
    anew = learn(bound, one.shared, tasks[1], first=False, state=net.state)
    np.testing.assert_array_equal(two.loss, anew.loss)  # training looks at batches only

    # What three steps leave of where the running statistics began.
    def apart(a, b):
        return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), a, b)

    left = jax.tree.map(lambda leaf: MOMENTUM**3 * leaf, apart(one.state, net.state))
    assert_close(apart(two.state, anew.state), left, atol=1e-6)
    assert all(differ(one.state, net.state))
    x = tasks[0].inputs
    before = bound.logits(one.shared, one.own, x, one.state)
    assert all(differ(before, bound.logits(two.shared, two.own, x, two.state)))


def test_factors_with_statistics_stand_where_masks_do(net, tasks):
    """Inference over BatchE's tasks against the network written out."""
    batche = baselines.batche(net)
    store = baselines.FactorStore.create(net, 3)
    owns, states = [], []
    for i in range(2):
        own = baselines.own_weights(batche, jax.random.key(i))
        owns.append(jax.tree.map(lambda a, i=i: np.asarray(a) * np.float32(1 + 0.3 * i), own))
        more = np.float32(0.1 + 0.2 * i)
        states.append(jax.tree.map(lambda leaf, more=more: np.asarray(leaf) + more, net.state))
        store = store.append(owns[i], states[i])
    kernels = named_leaves(net.params)
    x, y = tasks[0].inputs, np.asarray(tasks[0].labels)

    @jax.jit
    @jax.grad
    def gradient(alphas):
        networks = [scaled(kernels, own) for own in owns]
        mixed = jax.tree.map(lambda *each: sum(map(jnp.multiply, alphas, each)), *networks)
        p = jax.nn.softmax(plain(mixed, x, constant=True)[0])
        return -(p * jnp.log(p)).sum(-1).mean()

    want = gradient([np.float32(0.5)] * 2)
    found = ss.one_shot(net, store, x, per_example=False)
    np.testing.assert_allclose(found.scores[:2], [-a for a in want], rtol=1e-3, atol=1e-6)
    assert found.scores[2] == -np.inf
    assert int(found.task) == int(np.argmin(want))
    forward = jax.jit(lambda own, state: plain(scaled(kernels, own), x, state)[0])
    logits = [
        np.asarray(forward(own, named_leaves(state)))
        for own, state in zip(owns, states, strict=True)
    ]
    ids = np.arange(24) % 2
    want = np.where((ids == 0)[:, None], *logits)
    np.testing.assert_allclose(ss.predict(net, store, x, ids), want, rtol=1e-4, atol=1e-5)
    for row, each in zip(ss.evaluate(net, store, [tasks[0]] * 2), logits, strict=True):
        # But for one image, which may lie where rounding decides.
        assert abs(row.accuracy - (each.argmax(-1) == y).mean()) < 1.5 / 24
    assert not any(differ(store.task(1).state, states[1]))
    taken = store.taken(np.asarray([1]), np.int32(1))
    assert not any(differ(taken.task(0).state, states[1]))
    with pytest.raises(ValueError, match="state must hold the statistics"):
        store.append(owns[0])


def test_bytes_a_task_adds_with_its_statistics(net, small_net):
    block, head, stem, statistics = 3 * 3 * 4 * 4, 4 * 5, 3 * 3 * 4, 2 * 2 * 4
    factors = (4 + 4) + (4 + 5) + (1 + 4)
    want = {
        "upper_bound": block + head + stem + statistics,
        "separate_heads": head + statistics,
        "separate_heads_random": head + statistics,
        "batche": factors + statistics,
        "batche_random": factors + statistics,
    }
    got = {name: baselines.own_bytes(make(net)) for name, make in MAKERS.items()}
    assert got == {name: 4 * floats for name, floats in want.items()}
    assert baselines.own_bytes(baselines.lower_bound(net)) == 0  # its statistics are no task's
    assert baselines.own_bytes(baselines.psp(small_net)) == 0
    assert baselines.own_bytes(baselines.batche(small_net)) == 4 * (6 + 6 + 6 + 5)


def test_the_head_is_found_wherever_its_name_sorts(net):
    def head(net, **named):
        (name,) = baselines.separate_heads(net, **named).names
        return name

    def dense(apply=relu_apply, **shapes):
        return ss.Network(apply, {name: np.ones(shape) for name, shape in shapes.items()})

    assert list(net.layout.shapes) == [*KERNELS]
    assert head(net) == "head/kernel"
    assert head(net, head="stem/kernel") == "stem/kernel"
    assert head(dense(a=(6, 4), b=(4, 4))) == "b"  # as wide as what it takes
    backwards = dense(
        lambda params, x: relu_apply({"a": params["b"], "b": params["a"]}, x), a=(4, 3), b=(6, 4)
    )
    assert head(backwards) == "a"
    with pytest.raises(ValueError, match="the head must be named"):
        head(dense(a=(6, 6), b=(6, 6)))
    with pytest.raises(ValueError, match=r"head must be one of the kernels .*got 'classifier'"):
        baselines.separate_heads(net, head="classifier")


def test_a_network_a_task_has_its_own_biases_too(tasks):
    def apply(params, x):
        return x.reshape(len(x), -1) @ params["kernel"] + params["bias"][None]

    net = ss.Network(apply, {"kernel": np.ones((64, 5)), "bias": np.arange(5.0)})
    bound = baselines.upper_bound(net)
    start = baselines.own_weights(bound, jax.random.key(1))
    np.testing.assert_array_equal(start["bias"], np.arange(5.0))
    assert differ(start["kernel"], net.params["kernel"]) == [True]
    learned = learn(bound, net.params, tasks[0], first=True)
    assert not any(differ(learned.shared, net.params))
    assert all(differ(learned.own, start))
    assert learned.state is None
    assert baselines.own_bytes(bound) == 4 * (64 * 5 + 5)


def test_missing_statistics_are_named(net, shared, tasks):
    bound = baselines.lower_bound(net)
    missing = r"state must hold the statistics \['block_norm/mean'.* got \[\]"
    with pytest.raises(ValueError, match=missing):
        learn(bound, shared, tasks[1], first=False)
    with pytest.raises(ValueError, match=missing):
        baselines.is_right(bound, shared, {}, tasks[0])
    with pytest.raises(ValueError, match=missing):
        bound.logits(shared, {}, np.ones((2, 8, 8)))
    stateless = baselines.lower_bound(relu_net((6, 5)))
    with pytest.raises(ValueError, match=r"statistics \[\] of the network"):
        stateless.logits(stateless.net.params, {}, np.ones((2, 6)), net.state)
