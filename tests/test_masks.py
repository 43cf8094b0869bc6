import jax
import jax.numpy as jnp
import numpy as np
import pytest

import supsup_jax as ss
from supsup_jax import masks
from tests.conftest import golden

SHAPES = [(7,), (4, 3), (2, 3, 5), (3, 3, 2, 4)]


def scores_of(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("density", [0.5, 0.1, 0.03])
def test_topk_matches_the_reference(density):
    z = golden("topk")
    scores = jnp.asarray(z["scores"])
    k = ss.kept_count(density, scores.size)
    np.testing.assert_array_equal(ss.topk_mask(scores, k), z[f"mask_abs_density{density}"])
    np.testing.assert_array_equal(
        ss.signed_topk_mask(scores, k), z[f"signed_mask_density{density}"]
    )


def test_topk_gradient_matches_the_reference():
    z = golden("topk")
    scores = jnp.asarray(z["scores"])
    _, pull = jax.vjp(lambda s: ss.topk_mask(s, ss.kept_count(0.1, s.size)), scores)
    np.testing.assert_allclose(
        pull(jnp.asarray(z["cotangent"]))[0], z["score_grad_density0.1"], rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_topk_equals_a_stable_sort(shape):
    scores = np.asarray(scores_of(shape))
    for k in {0, 1, scores.size // 2, scores.size - 1, scores.size}:
        want = np.zeros(scores.size)
        want[np.argsort(-np.abs(scores.ravel()), kind="stable")[:k]] = 1
        np.testing.assert_array_equal(ss.topk_mask(scores, k), want.reshape(shape))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_topk_settles_ties_by_the_lower_index_and_keeps_exactly_k(dtype):
    scores = jnp.asarray([1, -2, 2, 0, -1, 2, 0, -0.0], dtype)
    want = {
        1: [0, 1, 0, 0, 0, 0, 0, 0],
        2: [0, 1, 1, 0, 0, 0, 0, 0],
        4: [1, 1, 1, 0, 0, 1, 0, 0],
        6: [1, 1, 1, 1, 1, 1, 0, 0],
        7: [1, 1, 1, 1, 1, 1, 1, 0],
    }
    for k, mask in want.items():
        np.testing.assert_array_equal(ss.topk_mask(scores, k).astype(jnp.float32), mask)
        assert ss.topk_mask(scores, k).dtype == dtype


def test_topk_orders_extreme_magnitudes():
    scores = jnp.asarray([1e-45, 1e-38, 3e38, -jnp.inf, 0.0])
    np.testing.assert_array_equal(ss.topk_mask(scores, 2), [0, 0, 1, 1, 0])
    np.testing.assert_array_equal(ss.topk_mask(scores, 3), [0, 1, 1, 1, 0])


def test_threshold_keeps_zero():
    np.testing.assert_array_equal(
        ss.threshold_mask(jnp.asarray([-1e-9, -0.0, 0.0, 2.0])), [0, 1, 1, 1]
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_straight_through_rules_in_both_modes(shape):
    scores, cotangent = scores_of(shape), scores_of(shape, 1)
    k = max(1, scores.size // 3)
    for rule, slope in (
        (ss.threshold_mask, jnp.ones(shape)),
        (lambda s: ss.topk_mask(s, k), jnp.sign(scores)),
        (lambda s: ss.signed_topk_mask(s, k), jnp.ones(shape)),
    ):
        _, pull = jax.vjp(jax.jit(rule), scores)
        np.testing.assert_array_equal(pull(cotangent)[0], cotangent * slope)
        _, pushed = jax.jvp(rule, (scores,), (cotangent,))
        np.testing.assert_array_equal(pushed, cotangent * slope)


def test_vmap_equals_a_loop():
    scores = scores_of((5, 4, 3))
    for rule in (ss.threshold_mask, lambda s: ss.topk_mask(s, 4)):
        np.testing.assert_array_equal(
            jax.vmap(rule)(scores), np.stack([rule(row) for row in scores])
        )


def test_one_compilation_serves_every_score():
    traces = []

    @jax.jit
    def stack(scores):
        traces.append(scores.shape)
        return jax.vmap(lambda s: ss.topk_mask(s, 4))(scores)

    for seed in range(3):
        stack(scores_of((5, 8), seed))
    assert traces == [(5, 8)]


@pytest.mark.parametrize(
    ("density", "n", "kept"),
    [(0.5, 10, 5), (0.1, 5400, 540), (0.03, 5400, 162), (1.0, 7, 7), (0.9, 10, 9), (0.26, 10, 3)],
)
def test_kept_count(density, n, kept):
    assert ss.kept_count(density, n) == kept
    assert type(ss.kept_count(density, n)) is int


@pytest.mark.parametrize("density", [0, 0.0, -0.1, 1.1, float("nan")])
def test_kept_count_refuses_densities_outside_the_unit_interval(density):
    with pytest.raises(ValueError, match=r"density must lie in \(0, 1\]"):
        ss.kept_count(density, 10)


def test_kept_count_refuses_to_keep_nothing():
    with pytest.raises(ValueError, match="keeps none of 10"):
        ss.kept_count(0.01, 10)


def test_bad_arguments():
    with pytest.raises(TypeError, match="scores must be floats"):
        ss.threshold_mask(jnp.arange(3))
    with pytest.raises(TypeError, match="host integer"):
        ss.topk_mask(jnp.ones(3), 1.5)
    with pytest.raises(ValueError, match=r"k must lie in \[0, 3\]"):
        ss.topk_mask(jnp.ones(3), 4)
    with pytest.raises(TypeError, match="host integer"):
        jax.jit(ss.topk_mask)(jnp.ones(3), 2)


def test_scores_start_uniform_within_the_bound():
    shapes = {"a": (400, 50), "b": (3, 3, 16, 64)}
    first, second = masks.draw_scores(jax.random.key(0), shapes)
    for scores, fan_in in ((first, 400), (second, 144)):
        bound = fan_in**-0.5
        assert float(jnp.abs(scores).max()) <= bound
        # A uniform variable on +-b has standard deviation b / sqrt(3).
        np.testing.assert_allclose(float(scores.std()), bound / 3**0.5, rtol=0.02)
        assert abs(float(scores.mean())) < bound / 50
