import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import supsup_jax as ss
from supsup_jax import baselines
from supsup_jax.baselines import sharing
from tests.conftest import golden, relu_apply, relu_net

SGD = ss.TrainConfig(optimizer="sgd", learning_rate=0.1, steps=1, batch_size=32, shuffle=False)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(32, 6)).astype(np.float32)
    return ss.TaskData(images, rng.integers(0, 5, 32).astype(np.int32))


@pytest.fixture(scope="module")
def shared():
    return baselines.shared_weights(relu_net((6, 6, 5)), jax.random.key(5))


METHODS = {
    "upper_bound": baselines.upper_bound,
    "lower_bound": baselines.lower_bound,
    "separate_heads": baselines.separate_heads,
    "separate_heads_random": functools.partial(baselines.separate_heads, trained=False),
    "batche": baselines.batche,
    "batche_random": functools.partial(baselines.batche, trained=False),
    "psp": baselines.psp,
}


def written_out(name, kernels, own):
    """The kernels of a task's network."""
    if "batche" in name:
        return {k: kernel * jnp.outer(*own[k]) for k, kernel in kernels.items()}
    if name == "psp":  # (C x)' W is x' (C' W)
        return {f"kernel{i}": c.T @ kernels[f"kernel{i}"] for i, c in enumerate(own)}
    return {**kernels, **own}


@functools.cache
def slope(name):
    """(loss, its gradient by shared and own weights) of a plain network."""

    def loss(trained, x, y):
        logits = relu_apply(written_out(name, *trained), x)
        return -jax.nn.log_softmax(logits)[jnp.arange(len(y)), y].mean()

    return jax.jit(jax.value_and_grad(loss))


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


def test_psp_turns_by_orthogonal_matrices(small_net):
    for rotation in baselines.own_weights(baselines.psp(small_net), jax.random.key(3)):
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(6), atol=1e-5)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_gradient_descent_on_what_is_trained(small_net, data, shared, name, first):
    baseline, key = METHODS[name](small_net), jax.random.key(2)
    own = baselines.own_weights(baseline, key)
    learned = baselines.learn(key, baseline, shared, data, SGD, first=first)
    loss, (by_shared, by_own) = slope(name)((shared, own), data.inputs, data.labels)
    np.testing.assert_allclose(learned.loss, [loss], rtol=1e-5)
    trains = name in ("lower_bound", "psp") or (first and name in ("separate_heads", "batche"))
    for trained, got, start, gradient in (
        (trains, learned.shared, shared, by_shared),
        (name != "psp", learned.own, own, by_own),
    ):
        step = 0.1 if trained else 0
        want = jax.tree.map(lambda w, g, step=step: np.asarray(w) - step * g, start, gradient)
        near = {"rtol": 1e-4, "atol": 1e-5} if trained else {"rtol": 0, "atol": 1e-6}
        chex.assert_trees_all_close(got, want, **near)


@pytest.mark.parametrize("name", ["batche", "psp"])
def test_labels_are_judged_piece_by_piece(small_net, data, shared, name):
    baseline = METHODS[name](small_net)
    own = baselines.own_weights(baseline, jax.random.key(2))
    right = baselines.is_right(baseline, shared, own, data, batch_size=10)
    logits = np.asarray(relu_apply(written_out(name, shared, own), data.inputs))
    second, best = np.sort(logits)[:, -2:].T
    sure = best - second > 1e-3  # rounding decides nothing
    assert right.shape == (32,) and sure.sum() > 16
    np.testing.assert_array_equal(right[sure], (logits.argmax(-1) == data.labels)[sure])


def test_later_tasks_share_one_program(small_net, data, shared):
    sharing._learn.clear_cache()
    for i in range(4):
        baseline = baselines.batche(small_net)  # made anew, equal by value
        learned = baselines.learn(jax.random.key(i), baseline, shared, data, SGD, first=i == 0)
        shared = learned.shared
    assert sharing._learn._cache_size() == 2


def factor_problem(net, count=5, capacity=8):
    store = baselines.FactorStore.create(net, capacity)
    batche = baselines.batche(net)
    owns = []
    for i in range(count):
        own = baselines.own_weights(batche, jax.random.key(i))
        owns.append(jax.tree.map(lambda a, i=i: np.asarray(a) * np.float32(1 + 0.1 * i), own))
        store = store.append(owns[i])
    masks = [
        {name: np.outer(own[name].t, own[name].s) for name in ("kernel0", "kernel1")}
        for own in owns
    ]
    return store, owns, masks


def test_factors_stand_where_masks_do(small_net):
    """Inference over BatchE's factors against autodiff through an explicit sum of masks."""
    store, _, masks = factor_problem(small_net)
    x = np.random.default_rng(9).normal(size=(20, 6)).astype(np.float32)

    def value(alphas, x):
        mixture = jax.tree.map(lambda *each: jnp.tensordot(alphas, jnp.stack(each), 1), *masks)
        kernels = {name: small_net.params[name] * mixture[name] for name in mixture}
        return ss.entropy(relu_apply(kernels, x)).mean()

    want = jax.jit(jax.vmap(jax.grad(value), (None, 0)))(np.full(5, 0.2, np.float32), x[:, None])
    for rows in (x, x[:3]):  # on both sides of the forms
        got = ss.alpha_gradient(small_net, store, rows)
        np.testing.assert_allclose(got[:, :5], want[: len(rows)], rtol=1e-4, atol=1e-6)
        assert (got[:, 5:] == 0).all()
    certified = ss.one_shot(small_net, store, x, implementation="certified")
    for found in (ss.one_shot(small_net, store, x), certified):
        np.testing.assert_array_equal(found.task, want.argmin(1))
    some = np.asarray([0.1, 0.5, 0.2, 0.1, 0.1], np.float32)
    got = ss.alpha_gradient(small_net, store, x, alphas=some, per_example=False)
    np.testing.assert_allclose(got[:5], jax.jit(jax.grad(value))(some, x), rtol=1e-4, atol=1e-6)


def test_abatche_tries_each_tasks_factors_alone(small_net):
    store, owns, _ = factor_problem(small_net)
    batche = baselines.batche(small_net)
    x = np.random.default_rng(9).normal(size=(4, 6)).astype(np.float32)
    logits = [batche.logits(small_net.params, own, x) for own in owns]
    got = ss.oracle(small_net, store, x, ss.max_confidence)
    want = [jax.nn.softmax(each).max(-1) for each in logits]
    np.testing.assert_allclose(got.scores[:, :5], np.stack(want, 1), rtol=1e-5)
    found = ss.binary_search(small_net, store, x)
    assert found.scores.shape == (4, 8)
    assert (found.scores.max(1) == 3).all()  # of five, three, two and one remain


def test_factors_of_a_convolution_are_the_same_at_every_position():
    def apply(params, x):
        y = jax.lax.conv_general_dilated(
            x, params["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y.mean((1, 2))

    rng = np.random.default_rng(0)
    net = ss.Network(apply, {"k": rng.normal(size=(3, 3, 2, 4)).astype(np.float32)})
    own = {"k": baselines.Factors(jnp.asarray([2.0, -1.0]), jnp.asarray([1.0, -1.0, 3.0, 0.5]))}
    x = rng.normal(size=(2, 5, 5, 2)).astype(np.float32)
    got = baselines.batche(net).logits(net.params, own, x)
    want = apply(net.params, x * np.asarray(own["k"].t)) * own["k"].s[None]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    store = baselines.FactorStore.create(net, 2).append(own)
    v = rng.normal(size=(3, 3, 3, 2, 4)).astype(np.float32)
    want = (v * np.outer(*own["k"])).sum((1, 2, 3, 4))
    flat = [net.layout.ravel({"k": row}, "v") for row in v]
    np.testing.assert_allclose(store.contract(jnp.stack(flat))[:, 0], want, rtol=1e-4, atol=1e-5)


def test_mistakes_are_named(small_net, norm_net, data):
    batche, lower = baselines.batche(small_net), baselines.lower_bound(small_net)
    idle = dataclasses.replace(baselines.psp(small_net), shared_learns="never")
    loose = ss.Network(relu_apply, {"kernel0": np.ones((6, 4)), "kernel1": np.ones((3, 5))})
    beyond = dataclasses.replace(data, labels=np.full(32, 5))
    wild = dataclasses.replace(SGD, learning_rate=1e30, steps=10)
    empty = baselines.FactorStore.create(small_net, 2)
    full, (own, _), _ = factor_problem(small_net, count=2, capacity=2)
    one = np.ones((1, 6), np.float32)
    biased = ss.Network(relu_apply, dict(small_net.params) | {"bias": np.ones(5)})
    weighted = dataclasses.replace(SGD, loss=ss.losses.CrossEntropy(weights=(1, 1)))
    flat = baselines.Factors(own["kernel0"].t[:1], own["kernel0"].s)

    def learn(baseline, data=data, config=SGD):
        key = jax.random.key(0)
        return baselines.learn(key, baseline, small_net.params, data, config, first=True)

    for error, message, call, *arguments in (
        (ValueError, "shared_learns must be one of", baselines.Baseline, "some", True, small_net),
        (ValueError, "without normalisation statistics", baselines.psp, norm_net),
        (TypeError, "net must be a Network, got dict", baselines.upper_bound, {}),
        (ValueError, "a kernel beside the head", baselines.separate_heads, relu_net((6, 5))),
        (ValueError, "form a chain", baselines.psp, loose),
        (ValueError, r"kernels alone, got \['bias'\]", baselines.psp, biased),
        (ValueError, "weights of 2 classes, got a label of 4", learn, batche, data, weighted),
        (ValueError, "own must be factors of shapes", empty.append, own | {"kernel0": flat}),
        (TypeError, "data must be a TaskData", learn, batche, None),
        (ValueError, r"labels must lie in \[0, 5\)", learn, batche, beyond),
        (ValueError, "nothing is trained", learn, idle),
        (ValueError, "training diverged", learn, lower, data, wild),
        (ValueError, "capacity must be .* at least 1", baselines.FactorStore.create, small_net, 0),
        (ss.StoreError, "its capacity is 2", full.append, own),
        (ss.StoreError, "the store is empty", ss.one_shot, small_net, empty, one),
        (ss.StoreError, "but the network masks", ss.one_shot, relu_net((6, 5)), full, one),
    ):
        with pytest.raises(error, match=message):
            call(*arguments)
