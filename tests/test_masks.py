import json
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import supsup_jax as ss
from supsup_jax import masks, models
from supsup_jax.layout import Layout
from tests.conftest import GOLDEN, golden

REFERENCE = json.loads((GOLDEN / "er_density.json").read_text())
# Kept weights of a ResNet-50 mask (FIELD.md, from the reference's budget).
RESNET50 = {4: 204_596, 8: 402_968, 16: 795_696}


SHAPES = [(7,), (4, 3), (3, 3, 2, 4)]
topk, signed_topk = (
    jax.jit(rule, static_argnums=1) for rule in (ss.topk_mask, ss.signed_topk_mask)
)


def scores_of(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize("density", [0.5, 0.1, 0.03])
def test_topk_matches_the_reference(density):
    z = golden("topk")
    scores = z["scores"]
    k = ss.kept_count(density, scores.size)
    np.testing.assert_array_equal(topk(scores, k), z[f"mask_abs_density{density}"])
    np.testing.assert_array_equal(signed_topk(scores, k), z[f"signed_mask_density{density}"])
    if density == 0.1:
        pull = jax.jit(lambda s, c: jax.vjp(lambda s: ss.topk_mask(s, k), s)[1](c)[0])
        got, want = pull(scores, z["cotangent"]), z["score_grad_density0.1"]
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_topk_equals_a_stable_sort(shape):
    scores = scores_of(shape)
    for k in {0, 1, scores.size // 2, scores.size - 1, scores.size}:
        want = np.zeros(scores.size)
        want[np.argsort(-np.abs(scores.ravel()), kind="stable")[:k]] = 1
        np.testing.assert_array_equal(topk(scores, k), want.reshape(shape))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_topk_settles_ties_by_the_lower_index_and_keeps_exactly_k(dtype):
    if dtype == jnp.float16 and "SSE4_2" in os.environ.get("XLA_FLAGS", ""):
        pytest.skip("XLA has no conversion of float16 in code for SSE4_2")
    scores = np.asarray([1, -2, 2, 0, -1, 2, 0, -0.0]).astype(dtype)
    want = {
        1: [0, 1, 0, 0, 0, 0, 0, 0],
        2: [0, 1, 1, 0, 0, 0, 0, 0],
        4: [1, 1, 1, 0, 0, 1, 0, 0],
        6: [1, 1, 1, 1, 1, 1, 0, 0],
        7: [1, 1, 1, 1, 1, 1, 1, 0],
    }
    for k, mask in want.items():
        got = topk(scores, k)
        assert got.dtype == dtype
        np.testing.assert_array_equal(np.asarray(got, np.float32), mask)


def test_topk_orders_extreme_magnitudes():
    scores = np.asarray([1e-45, 1e-38, 3e38, -np.inf, 0.0], np.float32)
    np.testing.assert_array_equal(topk(scores, 2), [0, 0, 1, 1, 0])
    np.testing.assert_array_equal(topk(scores, 3), [0, 1, 1, 1, 0])


def test_threshold_keeps_zero():
    np.testing.assert_array_equal(
        ss.threshold_mask(jnp.asarray([-1e-9, -0.0, 0.0, 2.0])), [0, 1, 1, 1]
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_straight_through_rules_in_both_modes(shape):
    scores, cotangent = scores_of(shape), scores_of(shape, 1)
    k = max(1, scores.size // 3)
    ones = np.ones(shape)
    rules = (
        (ss.threshold_mask, ones),
        (lambda s: ss.topk_mask(s, k), np.sign(scores)),
        (lambda s: ss.signed_topk_mask(s, k), ones),
    )

    @jax.jit
    def both(s, c):
        return [(jax.vjp(f, s)[1](c)[0], jax.jvp(f, (s,), (c,))[1]) for f, _ in rules]

    for (pulled, pushed), (_, slope) in zip(both(scores, cotangent), rules, strict=True):
        np.testing.assert_array_equal(pulled, cotangent * slope)
        np.testing.assert_array_equal(pushed, cotangent * slope)


def test_vmap_equals_a_loop():
    scores = scores_of((5, 4, 3))
    for rule in (jax.jit(ss.threshold_mask), lambda s: topk(s, 4)):
        np.testing.assert_array_equal(
            jax.vmap(rule)(scores), np.stack([rule(row) for row in scores])
        )


@pytest.mark.parametrize(
    ("density", "n", "kept"),
    [(0.5, 10, 5), (0.1, 5400, 540), (0.03, 5400, 162), (1.0, 7, 7), (0.9, 10, 9), (0.26, 10, 3)],
)
def test_kept_count(density, n, kept):
    assert ss.kept_count(density, n) == kept
    assert type(ss.kept_count(density, n)) is int


def test_bad_arguments():
    with pytest.raises(TypeError, match="scores must be floats"):
        ss.threshold_mask(jnp.arange(3))
    with pytest.raises(TypeError, match="host integer"):
        ss.topk_mask(jnp.ones(3), 1.5)
    with pytest.raises(ValueError, match=r"k must lie in \[0, 3\]"):
        ss.topk_mask(jnp.ones(3), 4)
    with pytest.raises(TypeError, match="host integer"):
        jax.jit(ss.topk_mask)(jnp.ones(3), 2)
    for density in (0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"density must lie in \(0, 1\]"):
            ss.kept_count(density, 10)
    with pytest.raises(ValueError, match="keeps none of 10"):
        ss.kept_count(0.01, 10)


def test_scores_start_uniform_within_the_bound():
    params = {"a": np.zeros((400, 50), np.float32), "b": np.zeros((3, 3, 16, 64), np.float32)}
    layout = Layout.of(params, lambda name, leaf: True)
    first, second = masks.draw_scores(jax.random.key(0), layout).values()
    for scores, fan_in in ((np.asarray(first), 400), (np.asarray(second), 144)):
        bound = fan_in**-0.5
        assert np.abs(scores).max() <= bound
        # A uniform variable on +-b has standard deviation b / sqrt(3).
        np.testing.assert_allclose(scores.std(), bound / 3**0.5, rtol=0.02)
        assert abs(scores.mean()) < bound / 50


# How many are kept.


def as_ours(layer):
    """A kernel's shape [window..., in, out]; the reference's last layer is a 1x1 convolution."""
    num_out, num_in, *window = layer["shape_oihw"]
    return (*window, num_in, num_out)


@pytest.mark.parametrize("name", REFERENCE)
def test_erdos_renyi_matches_the_reference(name):
    for layer in REFERENCE[name]:
        for scale in (1, 2, 4, 8, 16, 32):
            want = layer[f"s{scale}"]
            assert ss.ErdosRenyi(scale)(as_ours(layer)) == pytest.approx(want, rel=1e-12)


def test_a_dense_layer_counts_as_a_window_of_one():
    assert ss.ErdosRenyi(2)((160, 5)) == ss.ErdosRenyi(2)((1, 1, 160, 5)) == 2 * 165 / 800


def test_kept_counts_of_resnet50():
    layout = layout_of(models.resnet50, 10)
    for scale, kept in RESNET50.items():
        counts = ss.kept_counts(layout, ss.ErdosRenyi(scale))
        assert sum(counts.values()) == kept
        assert all(type(count) is int for count in counts.values())


def layout_of(model, num_outputs):
    """The layout of a model whose weights are never made."""

    def params():
        return nnx.to_pure_dict(nnx.state(model(num_outputs, rngs=nnx.Rngs(0)), nnx.Param))

    shapes = jax.eval_shape(params)
    return Layout.of(shapes, lambda name, leaf: leaf.ndim >= 2)


def test_uniform_density_is_each_layers_own():
    net = ss.Network(lambda params, x: x, {"a": np.zeros((10, 3)), "b": np.zeros((4, 5))})
    assert ss.kept_counts(net.layout, 0.25) == {"a": round(7.5), "b": 5}


@pytest.mark.parametrize("density", [0.02, ss.ErdosRenyi(0.01)])
def test_a_density_that_keeps_nothing_names_the_layer(density):
    net = ss.Network(lambda params, x: x, {"a": np.zeros((10, 30)), "b": np.zeros((4, 5))})
    with pytest.raises(ValueError, match=r"layer '[ab]' of shape \(\d+, \d+\): density .* keeps"):
        ss.kept_counts(net.layout, density)


def test_bad_densities():
    for arguments, message in (
        ((0,), "scale must be positive"),
        ((math.inf,), "scale must be positive"),
        ((1, 1.5), "most must be a density"),
    ):
        with pytest.raises(ValueError, match=message):
            ss.ErdosRenyi(*arguments)
    with pytest.raises(ValueError, match=r"needs a kernel \[..., in, out\]"):
        ss.ErdosRenyi(1)((4,))
    with pytest.raises(TypeError, match="hash by value"):
        ss.TrainConfig(rule="topk", density=Unhashable())


class Unhashable:
    __hash__ = None

    def __call__(self, shape):
        return 0.5
