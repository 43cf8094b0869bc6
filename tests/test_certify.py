import functools

import jax
import numpy as np
import pytest

from supsup_jax.kernels import certify, contraction
from tests.test_contraction import contract, problem, tiled

BRANCHES = {  # (COARSE_PLANES, SHORTLIST) that lead to each
    "certain": (20, 16),
    "rescore": (3, 64),
    "all exact": (3, 1),
}


@pytest.fixture(params=BRANCHES)
def branch(request, monkeypatch):
    planes, shortlist = BRANCHES[request.param]
    monkeypatch.setattr(certify, "COARSE_PLANES", planes)
    monkeypatch.setattr(certify, "SHORTLIST", shortlist)
    return request.param


def test_names_the_exact_task(branch):
    best = jax.jit(lambda *arrays: certify.best_scores(*arrays))
    three_planes = jax.jit(lambda *arrays: contraction.contract(*arrays, "popcount", 3))
    for seed in range(10):
        words, masks, v, num_tasks = problem(9, 2, 16, 27, seed=seed)
        exact = masks @ v.astype(np.float64)
        scores = np.asarray(best(words, v, num_tasks))
        assert scores.argmax() == exact[:27].argmax()
        assert (scores[27:] == -np.inf).all()
        in_doubt = np.isclose(scores[:27], exact[:27], rtol=1e-4, atol=1e-4)
        # Each branch is really taken: 3 planes leave coarse scores where they are not exact.
        coarse = np.asarray(three_planes(words, v, num_tasks))
        was_close = np.isclose(coarse[:27], exact[:27], rtol=1e-4, atol=1e-4)
        assert in_doubt.all() if branch != "rescore" else in_doubt.sum() > was_close.sum() + 1


@pytest.mark.parametrize("planes", [2, 4, 8, 12])
def test_the_bound_is_met_by_the_worst_pair_and_never_passed(planes):
    _, _, v, _ = problem(9, 1, 2, 2)
    left = np.asarray(certify.fixed_point.residual(v.reshape(32, 9), planes))
    worst = np.stack([left.reshape(-1) > 0, left.reshape(-1) < 0])
    words = tiled(worst, 2)
    coarse = contract(words, v, np.int32(2), "popcount", planes)
    exact = worst @ v.astype(np.float64)
    moved = float((exact - coarse)[0] - (exact - coarse)[1])
    slack = float(jax.jit(lambda *arrays: certify.slack(*arrays, planes))(words, v))
    assert 0.95 * slack < moved + 1e-3 and moved <= slack


def test_ties_go_to_the_lower_task(branch):
    words, masks, _, num_tasks = problem(9, 1, 16, 16)
    words[:, :, 3] = words[:, :, 11]
    v = np.where(masks[11], 1, -1).astype(np.float32)
    best = jax.jit(lambda *arrays: certify.best_scores(*arrays))(words, v, num_tasks)
    assert int(best.argmax()) == 3


@pytest.mark.parametrize("mapped", [jax.vmap, lambda best: functools.partial(jax.lax.map, best)])
def test_inside_jit_with_map_and_vmap(mapped, monkeypatch):
    """With 4 planes decisions take all branches, and vmap computes all of them."""
    monkeypatch.setattr(certify, "COARSE_PLANES", 4)
    monkeypatch.setattr(certify, "SHORTLIST", 3)
    words, masks, v, num_tasks = problem(9, 2, 16, 27, batch=20)
    best = jax.jit(mapped(lambda v: certify.best_scores(words, v, num_tasks)))
    want = (masks @ v.T.astype(np.float64))[:27].argmax(axis=0)
    np.testing.assert_array_equal(np.argmax(best(v), axis=1), want)


def test_a_vector_that_is_not_finite_names_some_task():
    words, _, v, num_tasks = problem(9, 1, 16, 5)
    v[3] = np.nan
    scores = np.asarray(jax.jit(certify.best_scores)(words, v, num_tasks))
    assert 0 <= np.where(np.arange(16) < 5, scores, -np.inf).argmax() < 5
