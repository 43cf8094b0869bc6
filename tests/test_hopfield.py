import warnings

import chex
import jax
import numpy as np
import pytest
from flax import nnx

import supsup_jax as ss
from supsup_jax import devices, models
from supsup_jax.hopfield.store import energy, hebbian, retrieve, storkey
from tests.conftest import golden, random_masks


def scale_net(width=8):
    """Of nothing but scales."""
    params = {f"norm{i}": {"scale": np.ones(width, np.float32)} for i in range(2)}
    return ss.Network(lambda params, x: x, params, masked=lambda name, leaf: True)


def norm_scale_net(width=8, seed=0, outputs=4, inputs=6):
    """As tests of recovery have it."""
    module = models.bnnet(outputs, num_inputs=inputs, width=width, rngs=nnx.Rngs(seed))
    return ss.Network.from_nnx(module, masked=models.is_norm_scale)


def holding(net, tasks, rule="storkey"):
    store = ss.hopfield.HopfieldStore.create(net, rule)
    for mask in tasks:
        store = store.append(mask)
    return store


@pytest.fixture(scope="module")
def net():
    return scale_net()


@pytest.fixture(scope="module")
def store(net):
    return holding(net, random_masks(net, 2))


# The rules.


def test_a_store_learns_what_the_reference_does():
    saved = golden("storkey")
    store = holding(
        scale_net(64),
        [{f"norm{i}": {"scale": scores >= 0} for i in range(2)} for scores in saved["scores"]],
    )
    mean = np.where(saved["scores"] >= 0, 1, -1).mean(axis=0)
    for name in ("norm0", "norm1"):
        weights = store.weights[name]["scale"]
        np.testing.assert_allclose(weights, saved["weights"], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(store.mean[name]["scale"], mean, atol=1e-7)


def test_hebbian_by_hand():
    learn = jax.jit(hebbian)
    weights = learn(np.zeros((3, 3), np.float32), np.float32([1, -1, 1]))
    want = np.asarray([[0, -1, 1], [-1, 0, -1], [1, -1, 0]]) / 3
    np.testing.assert_allclose(weights, want, rtol=1e-6)
    twice = learn(weights, np.ones(3, np.float32))
    np.testing.assert_allclose(twice, want + (np.ones((3, 3)) - np.eye(3)) / 3, atol=1e-7)


def test_energy_by_hand():
    weights = np.float32([[0.0, 2.0], [2.0, 1.0]])
    assert float(energy(weights, np.asarray([1, -1]))) == -0.5 * (0 - 2 - 2 + 1)
    # A pattern stored alone by Hebb's rule is the minimum, -(d - 1) / 2.
    x = np.float32([1, -1, -1, 1])
    grids = np.stack(np.meshgrid(*[np.float32([-1, 1])] * 4), -1).reshape(-1, 4)
    energies = jax.jit(jax.vmap(energy, (None, 0)))((np.outer(x, x) - np.eye(4)) / 4, grids)
    assert float(energies.min()) == pytest.approx(-1.5)
    assert {tuple(grids[i]) for i in np.flatnonzero(energies < -1.4)} == {tuple(x), tuple(-x)}


@pytest.mark.parametrize("rule", [storkey, hebbian])
def test_a_noisy_pattern_is_retrieved(rule):
    rng = np.random.default_rng(0)
    patterns = rng.choice([-1.0, 1.0], (3, 128)).astype(np.float32)
    weights, rule = np.zeros((128, 128), np.float32), jax.jit(rule)
    for pattern in patterns:
        weights = rule(weights, pattern)
    for pattern in patterns:
        noisy = np.where(rng.random(128) < 0.1, -pattern, pattern)
        assert (noisy != pattern).any()
        np.testing.assert_array_equal(retrieve(weights, noisy), pattern)


def test_retrieval_stops_in_a_cycle_of_two():
    swap, start = np.float32([[0, 1], [1, 0]]), np.float32([1, -1])
    np.testing.assert_array_equal(retrieve(swap, start, sweeps=6), start)
    np.testing.assert_array_equal(retrieve(swap, start, sweeps=7), -start)


def test_bad_patterns():
    weights = np.zeros((4, 4), np.float32)
    for rule in (storkey, hebbian, energy, retrieve):
        with pytest.raises(ValueError, match=r"weights must be \[d, d\], got shape \(4, 3\)"):
            rule(np.zeros((4, 3), np.float32), np.ones(4, np.float32))
        with pytest.raises(ValueError, match=r"must be \[4\], as the weights are, got \(3,\)"):
            rule(weights, np.ones(3, np.float32))
        with pytest.raises(
            TypeError, match=r"must hold -1 and 1 \(2 \* mask - 1\), got dtype bool"
        ):
            rule(weights, np.ones(4, bool))


# The store.


def test_a_store_keeps_no_mask_and_its_size(net):
    store = ss.hopfield.HopfieldStore.create(net)
    before = store.nbytes
    one = store.append(random_masks(net, 1)[0])
    assert int(store.num_tasks) == 0  # append is pure
    assert int(one.num_tasks) == 1
    # Two leaves of 8: weights and sums, T, and the fingerprint.
    assert one.nbytes == before == 2 * (8 * 8 * 4 + 8 * 4) + 4 + 32


def test_append_takes_tasks_and_numbers_alike(net, store):
    masks = random_masks(net, 2)
    tasks = [ss.Task(jax.tree.map(lambda leaf: leaf.astype(np.float32), mask)) for mask in masks]
    chex.assert_trees_all_equal(holding(net, tasks), store)


def test_ties_of_the_mean_stay_ties(net):
    """A float running mean of 1, 1, 1, -1, -1, -1 ends a rounding away from 0."""
    masks = [net.layout.tree([np.arange(8) % 2 == b] * 2) for b in (1, 1, 1, 0, 0, 0)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mean = holding(net, masks).mean
    for leaf in jax.tree.leaves(mean):
        np.testing.assert_array_equal(leaf, 0)


def test_remove_wipes_a_mask_out_and_leaves_the_others():
    net = scale_net(64)
    masks = random_masks(net, 3)
    store = holding(net, masks)
    left = store.remove(masks[1])
    assert int(left.num_tasks) == 2
    signs = [[2.0 * bits - 1 for bits in jax.tree.leaves(mask)] for mask in masks]
    for leaf, mean in enumerate(jax.tree.leaves(left.mean)):
        np.testing.assert_array_equal(mean, (signs[0][leaf] + signs[2][leaf]) / 2)
    for leaf, (W, was) in enumerate(
        zip(jax.tree.leaves(left.weights), jax.tree.leaves(store.weights), strict=True)
    ):
        x = signs[1][leaf]
        P = np.eye(64) - np.outer(x, x) / 64
        np.testing.assert_allclose(W, P @ np.asarray(was, np.float64) @ P, atol=1e-5)
        now, then = (-0.5 * x @ np.asarray(each) @ x for each in (W, was))
        assert abs(now) < 1e-3 < -then
    for mask in (masks[0], masks[2]):
        chex.assert_trees_all_equal(left.settle(mask), mask)
    with pytest.raises(ss.StoreError, match="the store is empty"):
        ss.hopfield.HopfieldStore.create(net).remove(masks[0])
    with pytest.raises(ValueError, match="lacks the masked leaf"):
        store.remove({})


def test_settle_is_retrieval_in_each_leaf(net, store):
    (mask,) = random_masks(net, 1, seed=5)
    got = store.settle(mask)
    for W, bits, found in zip(*map(jax.tree.leaves, (store.weights, mask, got)), strict=True):
        np.testing.assert_array_equal(found, retrieve(W, 2.0 * bits - 1) > 0)
        assert found.dtype == bool


def test_append_inside_jit(net, store):
    masks = random_masks(net, 2)

    @jax.jit
    def both(store, one, two):
        return store.append(one).append(two)

    got = both(ss.hopfield.HopfieldStore.create(net), *masks)
    chex.assert_trees_all_close(got, store, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("storkey", r"9 masks .* storkey rule .* d / sqrt\(2 ln d\) = 8\.2 .* d = 20: measure"),
        ("hebbian", r"4 masks .* hebbian rule .* d / \(2 ln d\) = 3\.3 .* d = 20: measure"),
    ],
)
def test_the_capacity_warns_once(rule, message):
    net = scale_net(20)
    store = holding(net, random_masks(net, 8 if rule == "storkey" else 3), rule)
    (mask,) = random_masks(net, 1, seed=9)
    with pytest.warns(UserWarning, match=message) as caught:
        store = store.append(mask)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    store.append(mask)  # a warning is an error here: there is no second one


def test_what_cannot_be_stored(net, norm_net, monkeypatch):
    with pytest.raises(TypeError, match="net must be a Network, got str"):
        ss.hopfield.HopfieldStore.create("net")
    with pytest.raises(ValueError, match=r"rule must be one of \['hebbian', 'storkey'\], got 'x'"):
        ss.hopfield.HopfieldStore.create(net, "x")
    with pytest.raises(ValueError, match="keeps no statistics, but the network has state"):
        ss.hopfield.HopfieldStore.create(norm_net)
    store = ss.hopfield.HopfieldStore.create(net)
    (mask,) = random_masks(net, 1)
    with pytest.raises(ValueError, match=r"must hold only 0 and 1 at 'norm0/scale'"):
        store.append(jax.tree.map(lambda leaf: 2.0 * leaf - 1, mask))
    with pytest.raises(ValueError, match="lacks the masked leaf 'norm0/scale'"):
        store.append({})
    with pytest.raises(ValueError, match="the task brings one"):
        store.append(ss.Task(mask, {"mean": np.zeros(3)}))
    with pytest.raises(TypeError, match=r"append its \.task"):
        store.append(ss.TrainResult(ss.Task(mask), mask, np.zeros(1)))
    monkeypatch.setattr(devices, "device_bytes", lambda: 511)
    with pytest.raises(ss.CapacityError, match=r"take 512 bytes, and there are 511: mask leaves"):
        ss.hopfield.HopfieldStore.create(net)
