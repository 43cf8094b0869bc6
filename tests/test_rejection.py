import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import supsup_jax as ss
from experiments import none_of_these
from tests.conftest import filled_store, golden, random_masks, relu_net


def belief_of(scores):
    scores = np.asarray(scores, np.float32)
    return ss.TaskBelief(np.argmax(scores, axis=-1).astype(np.int32), scores)


def lost(belief):
    """The belief with a score of input 3 that is not a number."""
    scores = belief.scores.copy()
    scores[3] = np.nan
    return belief._replace(scores=scores)


# Of many operations, each a program of its own outside jit.
confidence, best_score, reject = map(
    jax.jit, (ss.rejection.confidence, ss.rejection.best_score, ss.rejection.reject)
)


@pytest.fixture
def known():
    """200 inputs, seven tasks in eight slots, one task ahead by a random margin."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(200, 8)) * 0.1
    scores[np.arange(200), rng.integers(0, 7, 200)] += rng.random(200) * 3
    scores[:, 7] = -np.inf
    return belief_of(scores)


def test_confidence_is_the_paper_s_statistic():
    z = golden("novelty")
    got = np.asarray(confidence(belief_of(z["neg_alpha_grad"])))
    np.testing.assert_allclose(got, 7 * z["max_softmax"], rtol=1e-5)
    # The paper's rule for a new task is confidence < 1 + 1/8.
    np.testing.assert_array_equal(got < 1.125, z["is_new"])


def test_confidence_runs_from_1_to_the_number_of_tasks():
    for num_tasks in (1, 2, 5):
        scores = np.full((3, 8), -np.inf)
        scores[:, :num_tasks] = -7.5
        scores[1, 0] += 1
        scores[2, 0] += 1000
        by_hand = num_tasks * math.e / (math.e + num_tasks - 1)
        got = confidence(belief_of(scores))
        np.testing.assert_allclose(got, [1, by_hand, num_tasks], rtol=1e-6)
        assert got.dtype == jnp.float32
        assert confidence(belief_of(scores[1])).shape == ()


def test_best_score_is_the_score_of_the_task_named(known):
    want = [known.scores[b, t] for b, t in enumerate(known.task)]
    np.testing.assert_array_equal(best_score(known), want)


@pytest.mark.parametrize("statistic", [ss.rejection.confidence, ss.rejection.best_score])
@pytest.mark.parametrize(("rate", "refused"), [(0.005, 1), (0.01, 2), (0.29, 58), (0.999, 199)])
def test_the_least_sure_of_the_given_inputs_are_refused(known, statistic, rate, refused):
    found = reject(known, ss.rejection.calibrate(known, rate, statistic))
    least = np.argsort(np.asarray(statistic(known)))[:refused]
    want = np.asarray(known.task).copy()
    want[least] = -1
    np.testing.assert_array_equal(found.task, want)
    np.testing.assert_array_equal(found.scores, known.scores)
    assert found.task.dtype == jnp.int32


def test_new_inputs_are_refused_at_the_same_rate():
    def draw(seed):
        rng = np.random.default_rng(seed)
        scores = rng.normal(size=(4000, 6)) * 0.2
        scores[:, 2] += rng.random(4000)
        return belief_of(scores)

    refused = np.asarray(reject(draw(1), ss.rejection.calibrate(draw(0), 0.05)).task) < 0
    assert abs(refused.mean() - 0.05) < 4 * math.sqrt(2 * 0.05 * 0.95 / 4000)


def test_inputs_that_are_equally_unsure_are_all_kept():
    scores = np.zeros((100, 4))
    scores[:90, 1] = 2
    found = reject(belief_of(scores), ss.rejection.calibrate(belief_of(scores), 0.05))
    assert (np.asarray(found.task) >= 0).all()


def test_what_is_not_a_number_is_refused(known):
    rejection = ss.rejection.calibrate(known)
    assert np.asarray(reject(lost(known), rejection).task)[3] == -1


def test_one_decision_of_a_batch(known):
    rejection = ss.rejection.calibrate(known, 0.1)
    rows = jax.device_get(reject(known, rejection))
    for b in (0, 1, int(np.argmin(rows.task))):
        one = reject(jax.tree.map(lambda leaf, b=b: leaf[b], known), rejection)
        assert one.task.shape == ()
        assert int(one.task) == int(rows.task[b])


def test_inside_jit_without_a_trace_per_threshold(known):
    traces = []

    @jax.jit
    def route(belief, rejection):
        traces.append(1)
        return ss.rejection.reject(belief, rejection)

    for rate in (0.01, 0.3):
        rejection = ss.rejection.calibrate(known, rate)
        want = reject(known, rejection)
        np.testing.assert_array_equal(route(known, rejection).task, want.task)
    assert len(traces) == 1
    inside = jax.jit(lambda belief: ss.rejection.calibrate(belief, 0.3).threshold)(known)
    np.testing.assert_allclose(inside, rejection.threshold)
    threshold = jax.vmap(lambda belief: ss.rejection.calibrate(belief, 0.3))(
        jax.tree.map(lambda leaf: np.stack([leaf, leaf]), known)
    ).threshold
    np.testing.assert_allclose(threshold, [rejection.threshold] * 2)


def test_every_rule_s_belief_is_taken():
    net = relu_net((6, 40, 5))  # wide, so that no output is all 0
    store = filled_store(net, random_masks(net, 5), capacity=8)
    x = np.random.default_rng(0).standard_normal((20, 6), np.float32)
    for rule in (ss.Rule("one_shot"), ss.Rule("oracle"), ss.Rule("rerank", best=3)):
        found = rule(net, store, x)
        assert len(np.unique(best_score(found))) == 20
        rejected = reject(found, ss.rejection.calibrate(found, 0.1, ss.rejection.best_score))
        assert (np.asarray(rejected.task) < 0).sum() == 2
    judged = ss.rerank(net, store, x, best=1, judge=ss.Superfluous(3))
    p = np.exp(np.asarray(ss.predict(net, store, x, judged.task), np.float64))
    want = np.log(p[:, :3].sum(1) / p.sum(1))
    np.testing.assert_allclose(best_score(judged), want, rtol=1e-4)


def test_auroc_by_counting_pairs():
    rng = np.random.default_rng(0)
    known, unknown = rng.integers(0, 9, 40), rng.integers(-3, 6, 30)
    pairs = [(k > u) + 0.5 * (k == u) for k in known for u in unknown]
    assert none_of_these.auroc(known, unknown) == pytest.approx(np.mean(pairs))


@pytest.mark.scripts
def test_the_script_runs_without_data(tmp_path, capsys):
    """What it finds is up to a training of seconds: not whether the tasks stand out."""
    result = none_of_these.main(none_of_these.Args(tiny=True, images=60, out=tmp_path))
    assert json.loads((tmp_path / "result.json").read_text())["rows"] == result["rows"]
    kinds = {(row["rule"], row["objective"], row["statistic"]) for row in result["rows"]}
    assert len(kinds) == len(result["rows"]) - 1  # one of them by two judges
    assert {("one_shot", "entropy", "confidence"), ("oracle", "superfluous", "best_score")} < kinds
    for row in result["rows"]:
        assert row["decisions"] == 3 * 30
        measured = [value for name, value in row.items() if name.startswith(("auroc", "refused"))]
        assert len(measured) == 5
        assert all(0 <= value <= 1 for value in (*measured, row["task_accuracy"]))
    assert "one_shot" in capsys.readouterr().out


def test_logits_of_refused_rows_are_not_numbers(problem):
    net, store, x = problem
    belief = ss.one_shot(net, store, x)
    sure = belief._replace(task=belief.task.at[np.array([2, 7])].set(-1))
    want = np.array(ss.predict(net, store, x, belief.task))
    want[[2, 7]] = np.nan
    np.testing.assert_array_equal(ss.predict(net, store, x, sure.task), want)
    compiled = jax.jit(lambda task: ss.predict(net, store, x, task))
    np.testing.assert_array_equal(compiled(sure.task), want)
    assert np.isnan(ss.predict(net, store, x, -1)).all()


def test_bad_input(known):
    alone = np.full((200, 4), -np.inf)
    alone[:, 0] = np.arange(200)
    one = jax.tree.map(lambda leaf: leaf[0], known)
    for error, message, *arguments in (
        *[
            (ValueError, r"rate must lie in \(0, 1\), got", known, rate)
            for rate in (0, 1, -0.1, 1.5, math.nan)
        ],
        *[
            (TypeError, r"rate must be a number in \(0, 1\), got", known, rate)
            for rate in ("1%", True, None)
        ],
        (ValueError, r"rate 0\.001 needs at least 1000 inputs .* got 200", known, 0.001),
        (ValueError, "belief must be of N inputs of learned tasks", one),
        (TypeError, "statistic must be a hashable function of a belief", known, 0.01, "margin"),
        (ValueError, r"one number a decision, \(200,\)", known, 0.01, lambda b: b.scores),
        (ValueError, "statistic is not a number for 1 of the inputs", lost(known)),
        (ValueError, r"all 200 inputs are equally sure \(1\): among one task", belief_of(alone)),
    ):
        with pytest.raises(error, match=message):
            ss.rejection.calibrate(*arguments)
    with pytest.raises(TypeError, match="rejection must come from calibrate, got float"):
        ss.rejection.reject(known, 1.5)
    for call in (
        ss.rejection.confidence,
        ss.rejection.best_score,
        ss.rejection.calibrate,
        lambda b: ss.rejection.reject(b, None),
    ):
        with pytest.raises(TypeError, match="belief must be a TaskBelief, got"):
            call(known.scores)
