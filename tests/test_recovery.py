"""Recovery of masks from a Hopfield network by images."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import supsup_jax as ss
from supsup_jax import models
from tests.conftest import golden, random_masks
from tests.test_hopfield import holding, norm_scale_net


@pytest.fixture(scope="module")
def net():
    return norm_scale_net()


@pytest.fixture(scope="module")
def store(net):
    return holding(net, random_masks(net, 2))


def images(*shape):
    return np.random.default_rng(0).standard_normal(shape, np.float32)


# A learning rate at which the numbers move without a chaos of flips.
SLOW = ss.hopfield.RecoveryConfig(gamma=0.05, learning_rate=2.0, momentum=0.5, weight_decay=0.01)


def numpy_entropy_gradient(params, masks, x):
    """H and dH/dmask of BNNet by finite differences of a NumPy forward pass in double precision."""

    def forward(masks):
        h = x.astype(np.float64)
        for i, mask in enumerate(masks):
            h = h @ params[f"layer{i}"]["kernel"]
            h = (h - h.mean(0)) / np.sqrt(h.var(0) + 1e-5) * mask
            h = h / (1 + np.exp(-h))
        logits = h @ params["layer2"]["kernel"]
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        return -(np.exp(log_p) * log_p).sum(1).mean()

    masks = [mask.copy() for mask in masks]
    grads = [np.zeros_like(mask) for mask in masks]
    for mask, grad in zip(masks, grads, strict=True):
        for i in range(mask.size):
            ends = []
            for step in (1e-5, -1e-5):
                mask[i] += step
                ends.append(forward(masks))
                mask[i] -= step
            grad[i] = (ends[0] - ends[1]) / 2e-5
    return forward(masks), grads


@jax.jit
def mean_of(net, mask, batches):
    """The mean of max_logit over batches [S, B, ...], each under its own statistics."""
    return jax.vmap(lambda x: ss.max_logit(net(mask, x)).mean())(batches).mean()


@pytest.mark.parametrize("guided", [False, True])
def test_recovery_is_the_formula_step_by_step(net, store, guided):
    """PyTorch's SGD, written out: g += decay z; v = momentum v + g; z -= rate v."""
    config = dataclasses.replace(SLOW, guided=guided)
    x = np.asarray(jax.random.normal(jax.random.key(3), (4, 5, 6)))
    (target,) = random_masks(net, 1, seed=7)
    got = ss.hopfield.recover(net, store, jnp.asarray(x), config, target=target)

    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), net.params)
    weights = [np.asarray(W, np.float64) for W in jax.tree.leaves(store.weights)]
    bits = jax.tree.leaves(target)
    patterns = [jax.tree.leaves(mask) for mask in random_masks(net, 2)]
    z = [np.mean([2.0 * p[leaf] - 1 for p in patterns], axis=0) for leaf in range(2)]
    v = [np.zeros(8), np.zeros(8)]
    assert any((leaf == 0).any() for leaf in z)  # ties at the start, which keep
    for b in range(1, 5):
        for leaf, counts in enumerate(jax.tree.leaves(got.distance)):
            assert counts[b - 1] == np.sum((z[leaf] >= 0) != bits[leaf])
        seen = [(leaf >= 0).astype(np.float64) for leaf in z]
        if guided:
            seen = [np.clip((leaf + 1) / 2, 0, 1) for leaf in z]
        value, grads = numpy_entropy_gradient(params, seen, x[b - 1])
        if guided:
            grads = [W @ (grad / 2) for W, grad in zip(weights, grads, strict=True)]
        signs = [np.where(leaf >= 0, 1.0, -1.0) for leaf in z]
        total = sum(-0.5 * s @ W @ s for s, W in zip(signs, weights, strict=True))
        np.testing.assert_allclose(got.uncertainty[b - 1], value, rtol=1e-4)
        np.testing.assert_allclose(got.energy[b - 1], total, rtol=1e-4)
        for leaf in range(2):
            g = (1 - b / 4) * grads[leaf]
            g += 0.05 * (b / 4) * 2 * -(weights[leaf] @ signs[leaf])
            v[leaf] = 0.5 * v[leaf] + g + 0.01 * z[leaf]
            z[leaf] = z[leaf] - 2.0 * v[leaf]
    for leaf, (scores, mask, counts) in enumerate(
        zip(*map(jax.tree.leaves, (got.scores, got.mask, got.distance)), strict=True)
    ):
        np.testing.assert_allclose(scores, z[leaf], rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(mask, z[leaf] >= 0)
        assert counts[4] == np.sum((z[leaf] >= 0) != bits[leaf])
        assert counts.shape == (5,)
    assert sum(int(counts[0] != counts[4]) for counts in jax.tree.leaves(got.distance))


def test_recovery_follows_the_reference():
    """Twelve steps of the authors' code: the last scores, and each distance on the way."""
    saved = golden("recovery")
    module = models.bnnet(10, num_inputs=784, width=128, rngs=nnx.Rngs(0))
    for i, layer in enumerate((module.layer0, module.layer1, module.layer2)):
        layer.kernel[...] = jnp.asarray(saved[f"kernel{i}"])
    net = ss.Network.from_nnx(module, masked=models.is_norm_scale)
    tasks = [
        {f"norm{i}": {"scale": saved[f"masks{i}"][task]} for i in range(2)} for task in range(4)
    ]
    masks = [net.layout.tree(jax.tree.leaves(task)) for task in tasks]
    store = holding(net, masks)
    for i, weights in enumerate(jax.tree.leaves(store.weights)):
        np.testing.assert_allclose(weights, saved[f"W{i}"], rtol=1e-5, atol=1e-7)
    for task, target in enumerate(masks):
        found = ss.hopfield.recover(net, store, saved["x"], target=target)
        leaves = zip(jax.tree.leaves(found.scores), jax.tree.leaves(found.distance), strict=True)
        for i, (scores, distance) in enumerate(leaves):
            trace = saved[f"trace{i}"]
            largest = np.abs(trace).max()
            np.testing.assert_allclose(scores, trace[-1], atol=1e-4 * largest)
            differ = np.sum((trace >= 0) != saved[f"masks{i}"][task], axis=1)
            # Scores so near to 0 that rounding could give them either sign.
            either = np.sum(np.abs(trace) < 1e-4 * largest, axis=1)
            assert np.all(np.abs(distance[1:] - differ) <= either)


def test_a_task_is_recovered_from_its_images():
    """The whole of it in small: three tasks, each surest of its own images.

    An output rises with every feature that a task's mask has and its images show, and falls with
    those that only the images lack: one long step against the uncertainty leaves the sign of the
    images, and orthogonal patterns are fixed points of the energy.
    """
    rng = np.random.default_rng(0)
    signs = np.asarray([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1]], np.float32)
    signs = np.repeat(signs, 8, axis=1)
    net = ss.Network(
        lambda p, x: jnp.stack([p["scale"] @ x.T, 0 * x[:, 0]], axis=1) / 8,
        {"scale": jnp.ones(32)},
        masked=lambda name, leaf: True,
    )
    masks = [{"scale": row > 0} for row in signs]
    store = holding(net, masks)
    config = ss.hopfield.RecoveryConfig(learning_rate=1e4, momentum=0.0, weight_decay=0.0)
    for row, mask in zip(signs, masks, strict=True):
        x = row * rng.uniform(0.9, 1.1, (4, 8, 32)).astype(np.float32)
        found = ss.hopfield.recover(net, store, x, config, target=mask)
        assert int(found.distance["scale"][0]) > 0 == int(found.distance["scale"][-1])
        chex.assert_trees_all_equal(found.mask, mask)
        guided = dataclasses.replace(config, guided=True)
        best = ss.hopfield.recover_best(net, store, x, guided, attempts=2, target=mask)
        chex.assert_trees_all_equal(best.best.mask, mask)
        assert best.uncertainty.shape == (2,)
        first, second = best.attempts
        assert np.any(first.mask["scale"] != second.mask["scale"])


def test_the_best_is_the_least_uncertain(net, store):
    x = images(3, 4, 6)
    got = ss.hopfield.recover_best(
        net, store, (batch for batch in x), attempts=5, objective=ss.max_logit
    )
    assert len(got.attempts) == 2  # as many as the store holds
    want = [mean_of(net, each.mask, x) for each in got.attempts]
    np.testing.assert_allclose(got.uncertainty, want, rtol=1e-5)
    assert int(got.chosen) == int(np.argmin(want))
    chex.assert_trees_all_equal(got.best, got.attempts[int(got.chosen)])
    assert got.best.distance is None
    inside = jax.jit(
        lambda x: ss.hopfield.recover_best(net, store, x, objective=ss.max_logit).best.mask
    )(x)
    chex.assert_trees_all_equal(inside, got.best.mask)
    for attempts in (0, True, 1.5):
        with pytest.raises(ValueError, match="attempts must be an int of at least 1, got"):
            ss.hopfield.recover_best(net, store, x, attempts=attempts)


def test_batches_come_as_an_array_or_one_by_one(net, store):
    x = images(3, 4, 6)
    want = ss.hopfield.recover(net, store, x, SLOW)
    assert want.distance is None
    chex.assert_trees_all_equal(ss.hopfield.recover(net, store, (batch for batch in x), SLOW), want)


def test_another_objective(net, store):
    x = images(3, 4, 6)
    got = ss.hopfield.recover(net, store, x, SLOW, objective=ss.max_logit)
    start = jax.tree.map(lambda z: np.asarray(z) >= 0, store.mean)
    np.testing.assert_allclose(got.uncertainty[0], mean_of(net, start, x[:1]), rtol=1e-5)


def test_one_compilation_serves_every_number_of_tasks(net):
    traces, first = [], None

    def counting(logits):
        traces.append(logits.shape)
        return ss.entropy(logits)

    x = images(3, 4, 6)
    store = ss.hopfield.HopfieldStore.create(net)
    for i, mask in enumerate(random_masks(net, 3)):
        store = store.append(mask)
        ss.hopfield.recover(
            net, store, x + i, ss.hopfield.RecoveryConfig(gamma=1e-3), objective=counting
        )
        first = first if i else len(traces)
    assert len(traces) == first > 0


def test_recovery_inside_jit_and_vmap(net, store):
    x = images(2, 3, 4, 6)
    got = jax.jit(jax.vmap(lambda x: ss.hopfield.recover(net, store, x, SLOW).scores))(x)
    want = [ss.hopfield.recover(net, store, each, SLOW).scores for each in x]
    want = jax.tree.map(lambda *leaves: jnp.stack(leaves), *want)
    chex.assert_trees_all_close(got, want, rtol=1e-3, atol=1e-4)


def test_bad_configs():
    for change, message in (
        ({"learning_rate": 0}, "learning_rate must be positive, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive, got nan"),
        ({"gamma": -1.0}, r"gamma must lie in \[0, inf\), got -1.0"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\), got 1.0"),
        ({"guided": 1}, "guided must be True or False, got 1"),
        ({"weight_decay": float("inf")}, r"weight_decay must lie in \[0, inf\), got inf"),
    ):
        with pytest.raises(ValueError, match=message):
            ss.hopfield.RecoveryConfig(**change)
    assert hash(ss.hopfield.RecoveryConfig()) == hash(ss.hopfield.RecoveryConfig(gamma=1.5e-3))


def test_bad_input(net, store):
    x = np.zeros((3, 4, 6), np.float32)
    (mask,) = random_masks(net, 1)
    bare, integers = ss.MaskStore.create(net), np.zeros((3, 4, 6), int)
    for error, message, arguments in (
        (TypeError, "store must be a HopfieldStore, got MaskStore", (net, bare, x)),
        (TypeError, "config must be a RecoveryConfig, got float", (net, store, x, 0.1)),
        (TypeError, "net must be a Network, got str", ("net", store, x)),
        (ss.StoreError, "but the network masks", (norm_scale_net(width=9), store, x)),
        (ss.StoreError, "the store is empty", (net, ss.hopfield.HopfieldStore.create(net), x)),
        (TypeError, "x must hold floats .* got dtype int64", (net, store, integers)),
        (ValueError, r"be \[S, B, ...\] with S, B >= 1, got shape \(4, 6\)", (net, store, x[0])),
        (ValueError, r"got shape \(0, 4, 6\)", (net, store, x[:0])),
        (ValueError, r"shape, got \[\(3, 6\), \(4, 6\)\]: fill", (net, store, [x[0], x[0, :3]])),
        (ValueError, "at least one batch, got none", (net, store, [])),
        (TypeError, "x must be an array or an iterable of batches.* got int", (net, store, 3)),
        (TypeError, "x must be an array or an iterable.* got dict", (net, store, {"u": 3})),
    ):
        with pytest.raises(error, match=message):
            ss.hopfield.recover(*arguments)
    with pytest.raises(TypeError, match="objective must be a hashable function"):
        ss.hopfield.recover(net, store, x, objective="entropy")
    with pytest.raises(ValueError, match="target lacks the masked leaf 'norm0/scale'"):
        ss.hopfield.recover(net, store, x, target={})
    with pytest.raises(ValueError, match="must hold only 0 and 1"):
        ss.hopfield.recover(net, store, x, target=jax.tree.map(lambda leaf: 2.0 * leaf, mask))
