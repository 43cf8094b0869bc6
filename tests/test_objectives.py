import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import supsup_jax as ss

LOGITS = np.random.default_rng(0).normal(scale=3, size=(3, 7)).astype(np.float32)


def softmax(logits):
    p = np.exp(np.asarray(logits, np.float64))
    return p / p.sum(-1, keepdims=True)


def test_entropy_and_its_gradient_have_the_closed_forms():
    p = softmax(LOGITS)
    h = -(p * np.log(p)).sum(-1)
    np.testing.assert_allclose(ss.entropy(LOGITS), h, rtol=1e-5)
    got = jax.jit(jax.grad(lambda x: ss.entropy(x).sum()))(LOGITS)
    np.testing.assert_allclose(got, -p * (np.log(p) + h[:, None]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("objective", [ss.entropy, ss.max_confidence, ss.max_logit])
def test_true_derivatives(objective):
    check_grads(jax.jit(objective), (LOGITS,), order=1, modes=("fwd", "rev"), rtol=1e-2)


def test_entropy_second_derivative():
    check_grads(jax.jit(ss.entropy), (LOGITS,), order=2, modes=("rev",), rtol=2e-2)


def test_entropy_is_finite_at_extreme_logits():
    extreme = [[1e4, 0, -1e4], [-np.inf, 0, 1], [3e38, -3e38, 0], [88, -88, 0], [0, 0, 0]]

    def twice(logits):
        return jax.grad(lambda x: jax.grad(ss.entropy)(x).sum())(logits)

    everything = jax.jit(jax.vmap(lambda x: (*jax.value_and_grad(ss.entropy)(x), twice(x))))
    value, *gradients = everything(np.asarray(extreme, np.float32))
    assert ((value >= 0) & (value <= np.log(3) + 1e-6)).all()
    for gradient in gradients:
        assert np.isfinite(gradient).all()


def test_superfluous_is_minus_log_probability_of_the_labels():
    p = softmax(LOGITS)
    judge = ss.Superfluous(3)
    np.testing.assert_allclose(judge(LOGITS), -np.log(p[:, :3].sum(-1)), rtol=1e-4)
    # d logsumexp / d logit = softmax, and nothing for labels.
    got = jax.jit(jax.grad(lambda x: judge(x).sum()))(LOGITS)
    np.testing.assert_allclose(got[:, 3:], p[:, 3:], rtol=1e-5)
    assert (got[:, :3] == 0).all()


def test_judges_are_negated():
    np.testing.assert_allclose(ss.max_logit(LOGITS), -LOGITS.max(-1))
    np.testing.assert_allclose(ss.max_confidence(LOGITS), -softmax(LOGITS).max(-1), rtol=1e-5)


def test_half_precision_logits_are_judged_in_float32():
    assert jax.eval_shape(ss.entropy, LOGITS.astype(jnp.bfloat16)).dtype == jnp.float32


def test_superfluous_is_equal_by_value_and_needs_more_outputs_than_labels():
    assert ss.Superfluous(3) == ss.Superfluous(3) != ss.Superfluous(4)
    assert hash(ss.Superfluous(3)) == hash(ss.Superfluous(3))
    with pytest.raises(ValueError, match="needs more than 7 outputs, got 7"):
        ss.Superfluous(7)(LOGITS)
    with pytest.raises(ValueError, match="at least 1"):
        ss.Superfluous(0)
