import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supsup_jax.kernels import fixed_point, race
from tests.test_contraction import problem, tiled

ENDS = {  # (planes, SHORTLIST) that lead to each way in which a race ends
    "certain": (20, 16),
    "rescored": (3, 64),
    "all exact": (3, 1),
}


def finish(words, v, num_tasks, error=None):
    return race.best_scores(words, v, num_tasks, error)


@pytest.fixture(params=ENDS)
def end(request, monkeypatch):
    planes, shortlist = ENDS[request.param]
    monkeypatch.setattr(race, "CERTAIN_PLANES", planes)
    monkeypatch.setattr(race, "PLANES", min(planes, 12))
    monkeypatch.setattr(race, "SHORTLIST", shortlist)
    return request.param


@pytest.mark.parametrize("error", [None, 1e-6])
def test_names_the_exact_task(end, error):
    best = jax.jit(functools.partial(finish, error=error))
    for seed in range(10):
        words, masks, v, num_tasks = problem(9, 2, 16, 27, seed=seed)
        exact = masks @ v.astype(np.float64)
        found = best(words, v, num_tasks)
        scores = np.asarray(found.scores)
        assert scores.argmax() == exact[:27].argmax()
        assert (scores[27:] == -np.inf).all()
        # Each end is really come to: all is read once, or once again.
        assert found.share == (2 if end == "all exact" else 1)
        np.testing.assert_allclose(
            scores.max(), exact[:27].max(), rtol=1e-4, atol=0.05 if end == "certain" else 1e-4
        )
        if end == "all exact":
            np.testing.assert_allclose(scores[:27], exact[:27], rtol=1e-4, atol=1e-4)


def long_problem(unit, seed=0, rows=900):
    """40 masks, a third of whose words have v = 0; the score of mask `unit` stands out."""
    _, masks, v, num_tasks = problem(rows, 1, 48, 40, seed=seed)
    values = v.reshape(32, rows)
    values[:, rows * 2 // 3 :] = 0
    masks[unit] = np.where(np.random.default_rng(seed).random(v.size) < 0.2, v > 0, masks[unit])
    return tiled(masks, 48), masks, values.reshape(-1), num_tasks


def test_words_of_zeros_are_never_read_and_a_likely_answer_costs_less(monkeypatch):
    """Of 900 words, 4 rounds, 600 are not 0: 3 rounds are read for certainty."""
    monkeypatch.setattr(race, "MAX_RUNS", 16)
    assert 3 < 900 / (race.RUN_ROWS * 16) < 4
    certain, likely = (jax.jit(functools.partial(finish, error=error)) for error in (None, 1e-6))
    for unit in range(5):
        words, masks, v, num_tasks = long_problem(unit, seed=unit)
        exact = (masks @ v.astype(np.float64))[:40]
        assert exact.argmax() == unit
        for best, most in ((certain, 3 / 4), (likely, 2 / 4)):
            found = best(words, v, num_tasks)
            assert int(found.scores.argmax()) == unit and found.share <= most


@pytest.mark.parametrize("error", [None, 1e-3])
def test_scores_and_slack_after_each_round_are_those_of_a_plain_loop(error, monkeypatch):
    """The sums are of the words read, and no two masks' differ from what they are for v itself by
    more than is held against them; what is held against unread words is the closed form.
    """
    monkeypatch.setattr(race, "MAX_RUNS", 16)
    words, masks, v, num_tasks = long_problem(3)
    rounds, values = race._course(words, v, error).runs, v.reshape(32, -1).astype(np.float64)
    energy = np.pad((values**2).sum(0), (0, -900 % race.RUN_ROWS)).reshape(-1, race.RUN_ROWS).sum(1)
    order = np.asarray(rounds).reshape(-1)
    assert sorted(order) == list(range(len(order)))
    energy = np.pad(energy, (0, len(order) - len(energy)))
    assert (np.diff(energy[order]) <= 1e-3).all()

    @jax.jit
    def after(words, v, num_tasks, count):
        course = race._course(words, v, error)
        slack = race._slack(v, course, error, num_tasks)
        start = jnp.zeros((1, 16, 48), jnp.float32)
        standing = race.Standing(jnp.int32(0), start, jnp.float32(0), num_tasks)
        read = functools.partial(race._add_round, words, v, course)
        standing = jax.lax.fori_loop(0, count, lambda _, s: read(s, error, num_tasks), standing)
        return standing.sums.sum(1)[0] / course.scale, slack(standing) / course.scale

    planes = race.PLANES if error else race.CERTAIN_PLANES
    step = np.abs(values).max(0) / (2 ** (planes - 1) - 1)
    log = np.log(2 * 40 * len(rounds)) - np.log(error or 1)
    for count in range(4):
        scores, slack = map(np.asarray, after(words, v, num_tasks, count))
        read = np.repeat(np.isin(np.arange(len(order)), order[: count * 16]), 16)[:900]
        left = values[:, ~read]
        if error:
            dither = np.sqrt(log / 2 * (step**2 * (values != 0).sum(0))[read].sum())
            want = dither + np.sqrt(log * (left**2).sum())
        else:
            rounded = np.round(values / np.where(step > 0, step, 1)) * step
            want = np.abs(values - rounded)[:, read].sum() + np.abs(left).sum()
        assert want <= slack <= want + 1e-3 * np.abs(v).sum()
        exact = masks @ np.where(read, values, 0).reshape(-1)
        off = (scores - exact)[:40]
        assert np.ptp(off) <= (dither if error else slack)
    assert not left.any()


def test_the_dither_is_uniform_and_of_mean_zero_in_what_it_rounds():
    u = np.asarray(fixed_point.dither(np.arange(32 * 4096, dtype=np.uint32)))
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 1 / 2) < 5 / np.sqrt(12 * u.size)  # five deviations of a uniform's mean
    assert abs((u[1:] * u[:-1]).mean() - 1 / 4) < 5 / np.sqrt(20 * u.size)
    assert abs((u[32:] * u[:-32]).mean() - 1 / 4) < 5 / np.sqrt(20 * u.size)
    values = np.random.default_rng(0).standard_normal((32, 4096)).astype(np.float32)
    values[3] = 0
    planes = fixed_point.bit_planes(values, 5, u.reshape(32, 4096))
    ones = np.full((4096, 1), 2**32 - 1, np.uint32)
    off = np.asarray(fixed_point.word_sums(ones, planes))[:, 0] - values.sum(0, dtype=np.float64)
    spread = np.sqrt(32 * np.asarray(planes.step) ** 2 / 6)  # a dithered value's mean variance
    assert abs((off / spread).mean()) < 5 / np.sqrt(4096)
    assert 0.9 < (off / spread).std() < 1.1
    bits = np.asarray(planes.bits)
    assert not (bits >> 3 & 1).any()  # 0 stays 0


def test_ties_go_to_the_lower_task(end):
    words, masks, _, num_tasks = problem(9, 1, 16, 16)
    words[:, :, 3] = words[:, :, 11]
    v = np.where(masks[11], 1, -1).astype(np.float32)
    assert int(jax.jit(finish)(words, v, num_tasks).scores.argmax()) == 3


@pytest.mark.parametrize("error", [None, 1e-6])
def test_stores_made_to_mislead(error):
    """Equal masks, masks that differ in one bit, equal scores of all; stores of few tasks."""
    best = jax.jit(functools.partial(finish, error=error))
    _, masks, v, _ = long_problem(0, seed=3)
    masks = masks.astype(bool)
    # The least weight that float32 sums of these scores tell from none.
    big_enough = np.abs(v) > 1e-5 * np.abs(masks @ v).max()
    nearest = np.argmin(np.where(big_enough, np.abs(v), np.inf))
    for num_tasks in (1, 2, 17, 40):
        twins = masks.copy()
        twins[num_tasks - 1] = twins[0]
        almost = twins.copy()
        almost[num_tasks - 1, nearest] ^= True
        for held, vector in (
            (twins, v),
            (almost, v),
            (almost, np.zeros_like(v)),
            (np.ones_like(masks), v),
        ):
            exact = (held @ vector.astype(np.float64))[:num_tasks]
            task = int(best(tiled(held, 48), vector, np.int32(num_tasks)).scores.argmax())
            assert task == exact.argmax()  # of equal ones the lower


@pytest.mark.parametrize("error", [None, 1e-6])
def test_weights_a_million_times_as_large_as_others_hide_none(error):
    """One large weight in each word, of which all tasks keep the same, must not decide."""
    best = jax.jit(functools.partial(finish, error=error))
    for seed in range(5):
        _, masks, v, num_tasks = problem(16, 1, 48, 40, seed=seed)
        values = v.reshape(32, 16) * 1e-3
        values[0] = 1000 * np.sign(values[0])
        masks[:, :16] = masks[0, :16]
        exact = (masks[:, 16:] @ values[1:].reshape(-1).astype(np.float64))[:40]
        order = np.argsort(exact)
        if exact[order[-1]] - exact[order[-2]] < 16 * 1000 * 2.0**-23 * 4:
            continue  # float32 cannot tell them apart
        assert (
            int(best(tiled(masks, 48), values.reshape(-1), num_tasks).scores.argmax()) == order[-1]
        )


@pytest.mark.parametrize("error", [None, 1e-6])
def test_no_scale_of_the_gradient_changes_a_race(error, monkeypatch):
    monkeypatch.setattr(race, "MAX_RUNS", 16)
    best = jax.jit(functools.partial(finish, error=error))
    words, _, v, num_tasks = long_problem(7)
    one = best(words, v, num_tasks)
    assert one.share < 1
    for power in (-100, -62, 50, 90):
        scaled = best(words, v * np.float32(2.0**power), num_tasks)
        assert int(scaled.scores.argmax()) == 7 and scaled.share <= one.share + 0.3
        best_one = float(scaled.scores.max())
        np.testing.assert_allclose(best_one, float(one.scores.max()) * 2.0**power, rtol=0.05)


@pytest.mark.parametrize("mapped", [jax.vmap, lambda best: functools.partial(jax.lax.map, best)])
def test_inside_jit_with_map_and_vmap(mapped, monkeypatch):
    """With 6 planes races end in several ways, and vmap computes all of them."""
    monkeypatch.setattr(race, "CERTAIN_PLANES", 6)
    monkeypatch.setattr(race, "SHORTLIST", 5)
    words, masks, v, num_tasks = problem(9, 2, 16, 27, batch=20)
    best = jax.jit(mapped(lambda v: finish(words, v, num_tasks)))
    want = (masks @ v.T.astype(np.float64))[:27].argmax(axis=0)
    found = best(v)
    np.testing.assert_array_equal(np.argmax(found.scores, axis=1), want)
    assert {1, 2} == set(np.asarray(found.share).tolist())


def test_a_vector_that_is_not_finite_names_some_task():
    words, _, v, num_tasks = problem(9, 1, 16, 5)
    for value in (np.nan, np.inf):
        v[3] = value
        scores = np.asarray(jax.jit(finish)(words, v, num_tasks).scores)
        assert (scores[5:] == -np.inf).all()


def test_off_the_cpu_there_is_no_loop_and_no_unpacked_mask():
    """Lowered for a GPU: exact scores from one reduction, whatever the error."""
    words, _, v, num_tasks = problem(64, 2, 16, 27)
    program = jax.jit(functools.partial(finish, error=1e-6)).trace(words, v, num_tasks)
    text = program.lower(lowering_platforms=("cuda",)).as_text()
    assert "while" not in text and "tensor<32x64x16x" not in text


def test_tiles_follow_the_tasks():
    words, masks, v, _ = problem(40, 3, 16, 48)
    best = jax.jit(finish)
    for num_tasks in (1, 16, 17, 48):
        scores = np.asarray(best(words, v, np.int32(num_tasks)).scores)
        exact = (masks @ v.astype(np.float64))[:num_tasks]
        assert scores.shape == (48,) and scores.argmax() == exact.argmax()


@pytest.mark.parametrize("error", [0, 1, -0.1, True, "1e-6"])
def test_an_error_is_a_probability(error):
    words, _, v, num_tasks = problem(9, 1, 16, 5)
    with pytest.raises((TypeError, ValueError), match=r"between 0 and 1.* got"):
        finish(words, v, num_tasks, error)
