import functools

import jax
import numpy as np
import pytest

from supsup_jax.kernels import fixed_point


@functools.partial(jax.jit, static_argnums=1)
def taken_apart(v, planes):
    """Planes and residual of v."""
    return fixed_point.bit_planes(v, planes), fixed_point.residual(v, planes)


def integers(planes):
    """What planes [P, W] say, int64 [32, W]: two's complement, in plain Python's order."""
    bits = np.asarray(planes.bits, np.int64)
    weights = 2 ** np.arange(len(bits))
    weights[-1] *= -1
    return np.stack([weights @ ((bits >> b) & 1) for b in range(32)])


word_sums = jax.jit(fixed_point.word_sums)


def values(seed=0, num_words=9):
    v = np.random.default_rng(seed).standard_normal((32, num_words)) ** 3
    v[:, 1] = 0  # a word without a gradient
    v[:, 2] = [1.5, -1.5] * 16  # all as large as the largest
    v[0, 3] = 1e6  # one weight beside which the others vanish
    v[:, 4] *= 1e-30
    return v.astype(np.float32)


@pytest.mark.parametrize("planes", [2, 3, 4, 8, 11, 16, 17, 20, 23, 24])
def test_planes_hold_the_nearest_integers(planes):
    v = np.concatenate([values(seed) for seed in range(3)], axis=1)
    got, left = taken_apart(v, planes)
    assert got.bits.shape == (planes, 27) and got.bits.dtype == np.uint32
    step = np.abs(v).max(axis=0).astype(np.float64) / (2 ** (planes - 1) - 1)
    np.testing.assert_allclose(got.step, step, rtol=1e-6)
    error = np.abs(integers(got) * step - v)
    assert (error <= step * (0.5 + 2.0 ** (planes - 23)) + 1e-44).all()
    if planes <= 16:  # the residual is what the planes leave out
        want = v - integers(got) * np.asarray(got.step, np.float64)
        assert (np.abs(left - want) <= 2.0**-22 * np.abs(v)).all()
        assert (np.abs(want) > 2.0**-20 * np.abs(v)).any()


@pytest.mark.parametrize("planes", [2, 8, 20, 24])
def test_word_sums_equal_a_plain_loop(planes):
    v = values()
    parts, _ = taken_apart(v, planes)
    q, step = integers(parts), np.asarray(parts.step, np.float64)
    words = np.random.default_rng(3).integers(0, 2**32, (9, 5), dtype=np.uint32)
    words[:, 0] = 2**32 - 1  # all weights of each word: the largest sum there is
    got = word_sums(words, parts)
    kept = (words >> np.arange(32, dtype=np.uint32)[:, None, None]) & 1  # [32, W, lanes]
    want = np.einsum("bwl,bw->wl", kept.astype(np.int64), q) * step[:, None]
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_never_lost(bad):
    v = values()
    v[7, 5] = bad
    got = np.asarray(word_sums(np.full((9, 5), 0xFFFFFFFF, np.uint32), taken_apart(v, 8)[0]))
    assert not np.isfinite(got[5]).any() and np.isfinite(np.delete(got, 5, axis=0)).all()
