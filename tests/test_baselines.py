import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import supsup_jax as ss
from supsup_jax import baselines
from supsup_jax.baselines import sharing
from tests.conftest import golden, relu_apply, relu_net

SGD = ss.TrainConfig(optimizer="sgd", learning_rate=0.1, steps=3, batch_size=8)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(32, 6)).astype(np.float32)
    return ss.TaskData(jnp.asarray(images), jnp.asarray(rng.integers(0, 5, 32), jnp.int32))


def methods(net):
    return {
        "upper_bound": baselines.upper_bound(net),
        "lower_bound": baselines.lower_bound(net),
        "separate_heads": baselines.separate_heads(net),
        "separate_heads_random": baselines.separate_heads(net, trained=False),
        "batche": baselines.batche(net),
        "batche_random": baselines.batche(net, trained=False),
        "psp": baselines.psp(net),
    }


def test_batche_layer_matches_the_reference():
    z = golden("baselines")
    kernel = jnp.asarray(z["batche_kernel"])
    net = ss.Network(lambda params, x: x @ params["k"], {"k": kernel})
    for t, s, want in zip(z["batche_t"], z["batche_s"], z["batche_out"], strict=True):
        own = {"k": baselines.Factors(jnp.asarray(t), jnp.asarray(s))}
        got = baselines.batche(net).logits(net.params, own, jnp.asarray(z["x"]))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_psp_layer_matches_the_reference():
    z = golden("baselines")
    x, kernel = jnp.asarray(z["x"]), jnp.asarray(z["psp_kernel"])
    net = ss.Network(lambda params, x: x @ params["k"], {"k": kernel})
    for rotation, want in zip(z["psp_contexts"], z["psp_out"], strict=True):
        rotation = jnp.asarray(rotation)
        np.testing.assert_allclose(
            baselines.rotate_dense(x, kernel, rotation), want, rtol=1e-4, atol=1e-6
        )
        got = baselines.psp(net).logits(net.params, [rotation], x)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_psp_turns_by_orthogonal_matrices_and_has_relus_between(small_net):
    psp = baselines.psp(small_net)
    own = baselines.own_weights(psp, jax.random.key(3))
    for rotation, width in zip(own, (6, 6), strict=True):
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(width), atol=1e-5)
    x = np.random.default_rng(0).normal(size=(4, 6))
    first, second = (np.asarray(small_net.params[f"kernel{i}"]) for i in range(2))
    hidden = np.maximum(x @ np.asarray(own[0]).T @ first, 0)
    want = hidden @ np.asarray(own[1]).T @ second
    got = psp.logits(small_net.params, own, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_one_step_of_the_upper_bound_is_softmax_regression_by_hand(data):
    net = relu_net((6, 5))
    config = dataclasses.replace(SGD, steps=1, batch_size=32, shuffle=False)
    bound = baselines.upper_bound(net)
    key = jax.random.key(1)
    start = np.asarray(baselines.own_weights(bound, key)["kernel0"], np.float64)
    learned = baselines.learn(key, bound, net.params, data, config, first=True)
    x, y = np.asarray(data.images, np.float64), np.asarray(data.labels)
    logits = x @ start
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    gradient = x.T @ (p - np.eye(5)[y]) / 32
    np.testing.assert_allclose(learned.own["kernel0"], start - 0.1 * gradient, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(learned.loss, [-np.log(p[np.arange(32), y]).mean()], rtol=1e-5)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", methods(relu_net((6, 6, 5))))
def test_only_what_should_be_trained_moves(small_net, data, name, first):
    baseline = methods(small_net)[name]
    key = jax.random.key(2)
    shared = baselines.shared_weights(small_net, jax.random.key(5))
    if name == "lower_bound" or first or baseline.own_learns or baseline.forgets:
        learned = baselines.learn(key, baseline, shared, data, SGD, first=first)
    moved = {
        leaf: not np.array_equal(shared[leaf], learned.shared[leaf])
        for leaf in ("kernel0", "kernel1")
    }
    trains = baseline.shared_learns == "always" or (first and baseline.shared_learns == "first")
    # A head of a task's own leaves the shared last kernel without a use.
    assert moved == {"kernel0": trains, "kernel1": trains and "heads" not in name}
    before = jax.tree.leaves(baselines.own_weights(baseline, key))
    after = jax.tree.leaves(learned.own)
    changed = [not np.array_equal(a, b) for a, b in zip(before, after, strict=True)]
    assert all(changed) == (baseline.own_learns or not before)
    assert any(changed) == (baseline.own_learns and bool(before))


def test_losses_fall_and_labels_are_learned(small_net, data):
    config = ss.TrainConfig(optimizer="adam", learning_rate=3e-2, steps=300, batch_size=32)
    for name in ("batche", "psp"):
        baseline = methods(small_net)[name]
        shared = baselines.shared_weights(small_net, jax.random.key(5))
        learned = baselines.learn(jax.random.key(2), baseline, shared, data, config, first=True)
        right = baselines.is_right(baseline, learned.shared, learned.own, data, batch_size=10)
        assert right.shape == (32,)
        assert float(right.mean()) > 0.8, name
        x, y = data.batch(jnp.arange(32))
        want = baseline.logits(learned.shared, learned.own, x).argmax(-1) == y
        np.testing.assert_array_equal(right, want)


def test_later_tasks_share_one_program(small_net, data):
    shared = baselines.shared_weights(small_net, jax.random.key(5))
    sharing._learn.clear_cache()
    for i in range(4):
        baseline = baselines.batche(small_net)  # made anew, equal by value
        learned = baselines.learn(jax.random.key(i), baseline, shared, data, SGD, first=i == 0)
        shared = learned.shared
    assert sharing._learn._cache_size() == 2


def test_bytes_a_task_adds(small_net):
    want = {
        "upper_bound": 66 * 4,
        "lower_bound": 0,
        "separate_heads": 30 * 4,
        "separate_heads_random": 30 * 4,
        "batche": (6 + 6 + 6 + 5) * 4,
        "batche_random": (6 + 6 + 6 + 5) * 4,
        "psp": 0,
    }
    got = {name: baselines.own_bytes(baseline) for name, baseline in methods(small_net).items()}
    assert got == want


def factor_problem(net, count=5, capacity=8):
    store = baselines.FactorStore.create(net, capacity)
    batche = baselines.batche(net)
    owns = []
    for i in range(count):
        own = baselines.own_weights(batche, jax.random.key(i))
        own = jax.tree.map(lambda a, i=i: a * (1 + 0.1 * i), own)
        owns.append(own)
        store = store.append(own)
    masks = [
        {name: np.outer(own[name].t, own[name].s) for name in ("kernel0", "kernel1")}
        for own in owns
    ]
    return store, owns, masks


def test_factors_stand_where_masks_do(small_net):
    """Inference over BatchE's factors against autodiff through an explicit sum of masks."""
    store, _, masks = factor_problem(small_net)
    x = jax.random.normal(jax.random.key(9), (20, 6))

    def value(alphas, x):
        mixture = {
            name: sum(a * m[name] for a, m in zip(alphas, masks, strict=True)) for name in masks[0]
        }
        kernels = {name: small_net.params[name] * mixture[name] for name in mixture}
        return ss.entropy(relu_apply(kernels, x)).mean()

    alphas = jnp.full(5, 0.2)
    want = jax.vmap(jax.grad(value), (None, 0))(alphas, x[:, None])
    for rows in (x, x[:3]):  # on both sides of the forms
        got = ss.alpha_gradient(small_net, store, rows)
        np.testing.assert_allclose(got[:, :5], want[: len(rows)], rtol=1e-4, atol=1e-6)
        assert (got[:, 5:] == 0).all()
    np.testing.assert_array_equal(ss.one_shot(small_net, store, x).task, want.argmin(1))
    np.testing.assert_array_equal(
        ss.one_shot(small_net, store, x, implementation="certified").task, want.argmin(1)
    )
    some = jnp.asarray([0.1, 0.5, 0.2, 0.1, 0.1])
    got = ss.alpha_gradient(small_net, store, x, alphas=some, per_example=False)
    np.testing.assert_allclose(got[:5], jax.grad(value)(some, x), rtol=1e-4, atol=1e-6)


def test_abatche_tries_each_tasks_factors_alone(small_net):
    store, owns, _ = factor_problem(small_net)
    batche = baselines.batche(small_net)
    x = jax.random.normal(jax.random.key(9), (4, 6))
    logits = [batche.logits(small_net.params, own, x) for own in owns]
    got = ss.oracle(small_net, store, x, ss.max_confidence)
    want = [jax.nn.softmax(each).max(-1) for each in logits]
    np.testing.assert_allclose(got.scores[:, :5], np.stack(want, 1), rtol=1e-5)
    found = ss.binary_search(small_net, store, x)
    assert found.scores.shape == (4, 8)
    assert (found.scores.max(1) == 3).all()  # of five, three, two and one remain
    tasks = jnp.asarray([3, 0, 4, 1])
    got = ss.predict(small_net, store, x, tasks)
    want = [logits[t][i] for i, t in enumerate(tasks)]
    np.testing.assert_allclose(got, np.stack(want), rtol=1e-4, atol=1e-6)


def test_factors_of_a_convolution_are_the_same_at_every_position():
    def apply(params, x):
        y = jax.lax.conv_general_dilated(
            x, params["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y.mean((1, 2))

    net = ss.Network(apply, {"k": jax.random.normal(jax.random.key(0), (3, 3, 2, 4))})
    own = {"k": baselines.Factors(jnp.asarray([2.0, -1.0]), jnp.asarray([1.0, -1.0, 3.0, 0.5]))}
    x = jax.random.normal(jax.random.key(1), (2, 5, 5, 2))
    got = baselines.batche(net).logits(net.params, own, x)
    want = apply(net.params, jnp.asarray(np.asarray(x) * np.asarray(own["k"].t)))
    np.testing.assert_allclose(got, np.asarray(want) * np.asarray(own["k"].s), rtol=1e-4)
    store = baselines.FactorStore.create(net, 2).append(own)
    v = jax.random.normal(jax.random.key(2), (3, 72))
    want = (np.asarray(v).reshape(3, 3, 3, 2, 4) * np.outer(*own["k"])).sum((1, 2, 3, 4))
    np.testing.assert_allclose(store.contract(v)[:, 0], want, rtol=1e-4, atol=1e-5)


def test_mistakes_are_named(small_net, norm_net, data):
    with pytest.raises(ValueError, match="shared_learns must be one of"):
        baselines.Baseline("sometimes", True, small_net)
    with pytest.raises(ValueError, match="without normalisation statistics"):
        baselines.psp(norm_net)
    with pytest.raises(TypeError, match="net must be a Network, got dict"):
        baselines.upper_bound({})
    with pytest.raises(ValueError, match="a kernel beside the head"):
        baselines.separate_heads(relu_net((6, 5)))
    loose = ss.Network(relu_apply, {"kernel0": jnp.ones((6, 4)), "kernel1": jnp.ones((3, 5))})
    with pytest.raises(ValueError, match="form a chain"):
        baselines.psp(loose)
    shared, key = small_net.params, jax.random.key(0)
    with pytest.raises(TypeError, match="data must be a TaskData"):
        baselines.learn(key, baselines.batche(small_net), shared, None, SGD, first=True)
    beyond = dataclasses.replace(data, labels=data.labels + 1)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 5\)"):
        baselines.learn(key, baselines.batche(small_net), shared, beyond, SGD, first=True)
    idle = dataclasses.replace(baselines.psp(small_net), shared_learns="never")
    with pytest.raises(ValueError, match="nothing is trained"):
        baselines.learn(key, idle, shared, data, SGD, first=True)
    wild = dataclasses.replace(SGD, learning_rate=1e30, steps=10)
    with pytest.raises(ValueError, match="training diverged"):
        baselines.learn(key, baselines.lower_bound(small_net), shared, data, wild, first=True)
    with pytest.raises(ValueError, match="capacity must be at least 1"):
        baselines.FactorStore.create(small_net, 0)
    full, owns, _ = factor_problem(small_net, count=2, capacity=2)
    with pytest.raises(ss.StoreError, match="its capacity is 2"):
        full.append(owns[0])
    with pytest.raises(ss.StoreError, match="the store is empty"):
        ss.one_shot(small_net, baselines.FactorStore.create(small_net, 2), jnp.ones((1, 6)))
    with pytest.raises(ss.StoreError, match="but the network masks"):
        ss.one_shot(relu_net((6, 5)), full, jnp.ones((1, 6)))
