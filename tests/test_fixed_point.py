import jax.numpy as jnp
import numpy as np
import pytest

from supsup_jax.kernels import fixed_point


def integers(planes):
    """What planes [P, W] say, int64 [32, W]: two's complement, in plain Python's order."""
    bits = np.asarray(planes.bits, np.int64)
    weights = 2 ** np.arange(len(bits))
    weights[-1] *= -1
    return np.stack([weights @ ((bits >> b) & 1) for b in range(32)])


def values(seed=0, num_words=9):
    v = np.random.default_rng(seed).standard_normal((32, num_words)) ** 3
    v[:, 1] = 0  # a word without a gradient
    v[:, 2] = [1.5, -1.5] * 16  # all as large as the largest
    v[0, 3] = 1e6  # one weight beside which the others vanish
    v[:, 4] *= 1e-30
    return v.astype(np.float32)


@pytest.mark.parametrize("planes", range(2, 25))
def test_planes_hold_the_nearest_integers(planes):
    v = np.concatenate([values(seed) for seed in range(3)], axis=1)
    got = fixed_point.bit_planes(jnp.asarray(v), planes)
    assert got.bits.shape == (planes, 27) and got.bits.dtype == jnp.uint32
    step = np.abs(v).max(axis=0).astype(np.float64) / (2 ** (planes - 1) - 1)
    np.testing.assert_allclose(got.step, step, rtol=1e-6)
    error = np.abs(integers(got) * step - v)
    assert (error <= step * (0.5 + 2.0 ** (planes - 23)) + 1e-44).all()


@pytest.mark.parametrize("planes", [2, 8, 20, 24])
def test_word_sums_equal_a_plain_loop(planes):
    v = values()
    parts = fixed_point.bit_planes(jnp.asarray(v), planes)
    q, step = integers(parts), np.asarray(parts.step, np.float64)
    words = np.random.default_rng(3).integers(0, 2**32, (9, 5), dtype=np.uint32)
    words[:, 0] = 2**32 - 1  # all weights of each word: the largest sum there is
    got = fixed_point.word_sums(jnp.asarray(words), parts)
    for w in range(9):
        for lane in range(5):
            kept = [(int(words[w, lane]) >> b) & 1 for b in range(32)]
            np.testing.assert_allclose(got[w, lane], (kept @ q[:, w]) * step[w], rtol=1e-6)


@pytest.mark.parametrize("planes", [4, 9, 16])
def test_the_residual_is_what_the_planes_leave_out(planes):
    v = values()
    parts = fixed_point.bit_planes(jnp.asarray(v), planes)
    want = v - integers(parts) * np.asarray(parts.step, np.float64)
    error = np.abs(fixed_point.residual(jnp.asarray(v), planes) - want)
    assert (error <= 2.0**-22 * np.abs(v)).all()
    assert (np.abs(want) > 2.0**-20 * np.abs(v)).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_never_lost(bad):
    v = values()
    v[7, 5] = bad
    parts = fixed_point.bit_planes(jnp.asarray(v), 8)
    got = fixed_point.word_sums(jnp.full((9, 1), 0xFFFFFFFF, jnp.uint32), parts)
    assert not np.isfinite(got[5, 0]) and np.isfinite(np.delete(np.asarray(got), 5)).all()
