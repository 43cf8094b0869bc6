import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import supsup_jax as ss

LOGITS = jax.random.normal(jax.random.key(0), (3, 7)) * 3


def softmax(logits):
    p = np.exp(np.asarray(logits, np.float64))
    return p / p.sum(-1, keepdims=True)


def test_entropy_is_the_sum_of_minus_p_log_p():
    p = softmax(LOGITS)
    np.testing.assert_allclose(ss.entropy(LOGITS), -(p * np.log(p)).sum(-1), rtol=1e-5)


def test_entropy_gradient_has_the_closed_form():
    p = softmax(LOGITS)
    h = -(p * np.log(p)).sum(-1, keepdims=True)
    got = jax.grad(lambda x: ss.entropy(x).sum())(LOGITS)
    np.testing.assert_allclose(got, -p * (np.log(p) + h), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("objective", [ss.entropy, ss.max_confidence, ss.max_logit])
def test_true_derivatives(objective):
    check_grads(objective, (LOGITS,), order=1, modes=("fwd", "rev"), rtol=1e-2)


def test_entropy_second_derivative():
    check_grads(ss.entropy, (LOGITS,), order=2, modes=("rev",), rtol=2e-2)


@pytest.mark.parametrize(
    "logits",
    [[1e4, 0.0, -1e4], [-jnp.inf, 0.0, 1.0], [3e38, -3e38, 0.0], [88.0, -88.0, 0.0], [0.0] * 3],
)
def test_entropy_is_finite_at_extreme_logits(logits):
    logits = jnp.asarray(logits)
    value, grad = jax.value_and_grad(ss.entropy)(logits)
    assert jnp.isfinite(value)
    assert jnp.isfinite(grad).all()
    assert 0 <= float(value) <= np.log(3) + 1e-6
    grad_of_grad = jax.grad(lambda x: jax.grad(ss.entropy)(x).sum())(logits)
    assert jnp.isfinite(grad_of_grad).all()


def test_superfluous_is_minus_log_probability_of_the_labels():
    want = -np.log(softmax(LOGITS)[:, :3].sum(-1))
    np.testing.assert_allclose(ss.Superfluous(3)(LOGITS), want, rtol=1e-4)


def test_superfluous_gradient_flows_through_superfluous_logits_only():
    got = jax.grad(lambda x: ss.Superfluous(3)(x).sum())(LOGITS)
    # d logsumexp / d logit = softmax, and nothing for labels.
    want = softmax(LOGITS)
    want[:, :3] = 0
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert (got[:, :3] == 0).all()


def test_judges_are_negated():
    np.testing.assert_allclose(ss.max_logit(LOGITS), -np.asarray(LOGITS).max(-1))
    np.testing.assert_allclose(ss.max_confidence(LOGITS), -softmax(LOGITS).max(-1), rtol=1e-5)


def test_objectives_are_equal_by_value():
    assert ss.Superfluous(3) == ss.Superfluous(3)
    assert hash(ss.Superfluous(3)) == hash(ss.Superfluous(3))
    assert ss.Superfluous(3) != ss.Superfluous(4)


def test_half_precision_logits_are_judged_in_float32():
    assert ss.entropy(LOGITS.astype(jnp.bfloat16)).dtype == jnp.float32


def test_superfluous_needs_more_outputs_than_labels():
    with pytest.raises(ValueError, match="needs more than 7 outputs, got 7"):
        ss.Superfluous(7)(LOGITS)
    with pytest.raises(ValueError, match="at least 1"):
        ss.Superfluous(0)
