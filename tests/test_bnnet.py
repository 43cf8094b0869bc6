import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import supsup_jax as ss
from supsup_jax import models


def network(**sizes):
    module = models.bnnet(5, rngs=nnx.Rngs(0), **{"num_inputs": 12, "width": 16, **sizes})
    return ss.Network.from_nnx(module, masked=models.is_norm_scale)


@pytest.fixture(scope="module")
def net():
    return network()


def test_the_norms_scales_are_the_masked_leaves(net):
    assert net.layout.shapes == {"norm0/scale": (16,), "norm1/scale": (16,)}
    assert net.state is None
    for name in ("norm0", "norm1"):
        np.testing.assert_array_equal(net.params[name]["scale"], 1)
    assert sorted(net.params) == ["layer0", "layer1", "layer2", "norm0", "norm1"]


def test_kernels_are_signed_kaiming_constants(net):
    for name, fan_in in (("layer0", 12), ("layer1", 16), ("layer2", 16)):
        (leaf,) = net.params[name].values()
        np.testing.assert_allclose(np.abs(leaf), np.sqrt(2 / fan_in), rtol=1e-6)
        assert 0 < np.mean(np.asarray(leaf) > 0) < 1
    again, other = network(), models.bnnet(5, num_inputs=12, width=16, rngs=nnx.Rngs(1))
    assert again.fingerprint == net.fingerprint
    assert ss.Network.from_nnx(other, models.is_norm_scale).fingerprint != net.fingerprint


def test_the_paper_s_sizes():
    shapes = nnx.state(nnx.eval_shape(lambda: models.bnnet(10, rngs=nnx.Rngs(0))))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 784 * 2048 + 2048**2 + 20480 + 4096


def test_statistics_are_the_batch_s_own_and_biased(net):
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, (7, 4, 3)).astype(np.float32)
    masks = [rng.random(16) < 0.5 for _ in range(2)]
    h = x.reshape(7, 12).astype(np.float64)
    for i, mask in enumerate(masks):
        h = h @ np.asarray(net.params[f"layer{i}"]["kernel"], np.float64)
        mean = h.sum(axis=0) / 7
        variance = ((h - mean) ** 2).sum(axis=0) / 7
        h = (h - mean) / np.sqrt(variance + 1e-5) * mask
        h = h / (1 + np.exp(-h))
    want = h @ np.asarray(net.params["layer2"]["kernel"], np.float64)
    got = jax.jit(ss.Network.__call__)(net, net.layout.tree(masks), x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_task_goes_all_the_way_from_scores_at_zero(net):
    """One-axis leaves through a step of training, written out, the store and evaluation."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(128, 12)).astype(np.float32)
    data = ss.TaskData(images, rng.integers(0, 5, 128))
    zeros, ones = (net.layout.tree([np.full(16, value, np.float32)] * 2) for value in (0, 1))
    config = ss.TrainConfig(
        steps=1, batch_size=32, optimizer="sgd", learning_rate=0.1, shuffle=False
    )
    forward = jax.jit(ss.Network.__call__)

    @jax.jit
    @jax.grad
    def gradient(mask):
        return -jax.nn.log_softmax(net(mask, images[:32]))[jnp.arange(32), data.labels[:32]].mean()

    result = ss.train_task(jax.random.key(3), net, data, config, init_scores=zeros)
    kept = []
    for mask, scores, slope in zip(
        *map(jax.tree.leaves, (result.task.mask, result.scores, gradient(ones))), strict=True
    ):
        np.testing.assert_allclose(scores, -0.1 * slope, rtol=1e-3, atol=1e-6)
        np.testing.assert_array_equal(mask, np.asarray(scores) >= 0)
        kept.append(int(mask.sum()))
    assert 0 < sum(kept) < 32
    store = ss.MaskStore.create(net, 4).append(result.task)
    (row,) = ss.evaluate(net, store, [data], batch_size=64)
    logits = [forward(net, result.task.mask, images[i : i + 64]) for i in (0, 64)]
    right = np.concatenate(logits).argmax(axis=1) == data.labels
    assert abs(row.accuracy - right.mean()) < 1.5 / 128  # one may lie where rounding decides


def test_drawn_scores_and_signed_constants_of_one_axis(net):
    """A norm's scale sums over no inputs: its scores start in +-1, its weights stay as given."""
    with pytest.raises(ValueError, match=r"no masked leaf has a fan-in, of \['norm0/scale'"):
        ss.signed_constant(net, 3)
    data = ss.TaskData(np.ones((8, 12)) * np.arange(8.0)[:, None], np.zeros(8, int))
    result = ss.train_task(jax.random.key(0), net, data, ss.TrainConfig(steps=1, batch_size=4))
    for leaf in jax.tree.leaves(result.scores):
        assert np.abs(leaf).max() <= 1.01
        assert np.ptp(leaf) > 0.5


def test_bad_input(net):
    with pytest.raises(
        ValueError, match=r"needs two images or more at once, got x of shape \(1, 16"
    ):
        net(net.layout.tree([np.ones(16)] * 2), np.zeros((1, 12)))
    with pytest.raises(ValueError, match=r"must be positive, got \(784, 0, 10\)"):
        models.bnnet(10, width=0, rngs=nnx.Rngs(0))
