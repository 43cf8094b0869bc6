import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import supsup_jax as ss
from supsup_jax.inference import schedule, search
from supsup_jax.kernels import contraction
from tests.conftest import filled_store, random_masks

RTOL, ATOL = 1e-4, 1e-6


@pytest.fixture(scope="module")
def seven(problem):
    """The network of `problem`, seven masks of which 2 and 4 are equal, 20 inputs."""
    net, _, x = problem
    masks = random_masks(net, 7)
    masks[4] = masks[2]
    return net, masks, x


# Descent


@pytest.mark.parametrize("per_example", [True, False])
def test_one_small_step_of_descent_ranks_as_one_shot(problem, per_example):
    net, store, x = problem
    belief = jax.device_get(
        ss.descend(net, store, x, optimizer=optax.sgd(1e-3), steps=1, per_example=per_example)
    )
    want = jax.device_get(ss.one_shot(net, store, x, per_example=per_example))
    np.testing.assert_array_equal(belief.task, want.task)
    np.testing.assert_allclose(belief.scores[..., :5].sum(-1), 1, rtol=1e-5)
    # On the simplex, a projected step moves each coefficient by -rate * (gradient - mean).
    gradient = -want.scores[..., :5]
    step = 0.2 - 1e-3 * (gradient - gradient.mean(-1, keepdims=True))
    np.testing.assert_allclose(belief.scores[..., :5], step, rtol=1e-4)


def test_descent_stays_on_the_simplex_and_lowers_the_objective(problem):
    net, store, x = problem
    optimizer = optax.sgd(0.05)
    entropies = []
    mixed = jax.jit(jax.vmap(lambda a, x: ss.entropy(net(store.mixture(a), x))))
    for steps in (1, 20):
        alphas = ss.descend(net, store, x, optimizer=optimizer, steps=steps).scores
        alphas = np.asarray(alphas)[:, :5]
        np.testing.assert_allclose(alphas.sum(-1), 1, rtol=1e-5)
        assert float(alphas.min()) >= 0
        entropies.append(float(mixed(alphas, x[:, None]).mean()))
    assert entropies[1] < entropies[0]


def test_a_step_of_adam_is_one_of_the_gradient_along_the_simplex(problem):
    """Its first step has one size for all: up for what lies above the mean, down for the rest."""
    net, store, x = problem
    found = ss.descend(net, store, x, optimizer=optax.adam(0.01), steps=1).scores[:, :5]
    slopes = np.asarray(ss.one_shot(net, store, x).scores, np.float64)[:, :5]
    slopes -= slopes.mean(1, keepdims=True)
    clear = np.abs(slopes).min(1) > 1e-4
    moves = 0.01 * np.sign(slopes)
    want = 0.2 + moves - moves.mean(1, keepdims=True)
    assert clear.sum() > 10
    np.testing.assert_allclose(found[clear], want[clear], rtol=1e-3)


@pytest.mark.parametrize("rate", [1e3, 1e7, 1e12])
def test_a_step_of_any_length_ends_on_the_simplex(problem, rate):
    net, store, x = problem
    alphas = ss.descend(net, store, x, optimizer=optax.sgd(rate), steps=1).scores[:, :5]
    np.testing.assert_allclose(np.sum(alphas, axis=1), 1, rtol=1e-5)
    assert np.min(alphas) >= 0
    best = np.asarray(ss.one_shot(net, store, x).task)
    np.testing.assert_array_equal(np.argmax(alphas, axis=1), best)


# Binary search

# Inside jit, since a base larger than T is refused outside.
jitted = jax.jit(ss.binary_search, static_argnames=("objective", "per_example", "base"))


def plain_gradient(weights, masks, x, alive, objective, rows=slice(None), norm=False):
    """dF/da [T] of the mean objective of `rows` of x at 1/m each, by hand in float64.

    weights, masks: of two layers, [I, H] and [H, C], and [T, I, H] and [T, H, C].
    norm: hidden units normalised by the statistics of the whole x, held constant.
    """
    (w0, w1), (m0, m1) = weights, masks
    mixed0, mixed1 = w0 * m0[alive].mean(0), w1 * m1[alive].mean(0)
    hidden = x @ mixed0
    mean, std = (hidden.mean(0), np.sqrt(hidden.var(0) + 1e-5)) if norm else (0, 1)
    units, x = ((hidden - mean) / std)[rows], x[rows]
    logits = np.maximum(units, 0) @ mixed1
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    if objective is ss.entropy:
        d_logits = -p * (np.log(p) - (p * np.log(p)).sum(-1, keepdims=True))
    else:  # the superfluous logits alone carry a gradient
        d_logits = p * (np.arange(p.shape[1]) >= objective.num_labels)
    d_logits = d_logits / len(x)
    d_hidden = (d_logits @ mixed1.T) * (units > 0) / std
    d0, d1 = x.T @ d_hidden * w0, np.maximum(units, 0).T @ d_logits * w1
    return (d0 * m0).sum((1, 2)) + (d1 * m1).sum((1, 2))


def plain_binary(net, masks, x, objective, base, **how):
    """Rounds survived [T], by the words of the paper and of the docstring."""
    weights = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(net.params)]
    stacked = [np.stack(leaves) for leaves in zip(*map(jax.tree.leaves, masks), strict=True)]
    x = np.asarray(x, np.float64)
    alive, survived = np.ones(len(masks), bool), np.zeros(len(masks))
    while (m := alive.sum()) > 1:
        gradient = plain_gradient(weights, stacked, x, alive, objective, **how)
        ranked = sorted(np.flatnonzero(alive), key=lambda i: (gradient[i], i))
        alive = np.isin(np.arange(len(masks)), ranked[: (m - 1) // base + 1])
        survived += alive
    return survived


def test_binary_search_keeps_the_survivors_of_the_reference(reference):
    net, store, x, z = reference
    found = jax.device_get(ss.binary_search(net, store, x, per_example=False))
    np.testing.assert_array_equal(found.scores[:7], z["binary_alive"].sum(0))
    assert found.scores[7] == -jnp.inf
    assert int(found.task) == int(np.flatnonzero(z["binary_alive"][-1])[0])


@pytest.mark.parametrize("base", [2, 3, 7])
def test_binary_search_equals_a_plain_loop(seven, base):
    """Row for row; with base = T there is one round, that of one_shot."""
    net, masks, x = seven
    objective = ss.Superfluous(3)
    for num_tasks in (1, 2, 5, 7):
        store = filled_store(net, masks[:num_tasks], capacity=8)
        shared = jitted(net, store, x, objective=objective, per_example=False, base=base)
        shared = jax.device_get(shared)
        want = plain_binary(net, masks[:num_tasks], x, objective, base)
        np.testing.assert_array_equal(shared.scores[:num_tasks], want)
        assert int(shared.task) == want.argmax()
        found = jax.device_get(jitted(net, store, x[:6], base=base))
        assert found.scores.shape == (6, 8)
        assert found.scores.dtype == jnp.float32
        for row, task, scores in zip(x, found.task, found.scores, strict=False):
            want = plain_binary(net, masks[:num_tasks], row[None], ss.entropy, base)
            np.testing.assert_array_equal(scores[:num_tasks], want)
            assert (scores[num_tasks:] == -jnp.inf).all()
            assert int(task) == want.argmax() == scores.argmax()
            assert num_tasks == 1 or (want == want.max()).sum() == 1


def test_of_equal_gradients_the_lower_ids_come_first(problem):
    """Also where the zeros of a network that is switched off differ in sign, which top_k sees."""
    net, _, x = problem
    off = ss.Network(net.apply, jax.tree.map(jnp.zeros_like, net.params))
    store = filled_store(off, random_masks(net, 6), capacity=8)
    found = ss.binary_search(off, store, x)
    want = [3, 2, 1, 0, 0, 0, -jnp.inf, -jnp.inf]  # 6 -> 3 -> 2 -> 1
    np.testing.assert_array_equal(found.scores, [want] * 20)
    signs = jnp.asarray([0.0, -0.0, 0.0, -0.0])
    field = search._Field(jnp.ones(4, bool), jnp.int32(4), jnp.zeros(4))
    np.testing.assert_array_equal(search._narrow(field, signs, 2).alive, [1, 1, 0, 0])
    listed = jnp.isfinite(ss.rerank(off, store, x, best=2).scores)
    np.testing.assert_array_equal(listed, [[1, 1, 0, 0, 0, 0, 0, 0]] * 20)


@pytest.fixture
def fresh_program():
    """What a test exchanges stays in no compiled program."""
    search._binary_search.clear_cache()
    yield
    search._binary_search.clear_cache()


def test_survivors_copied_together_search_on(problem, monkeypatch, fresh_program):
    """Stores larger than SMALL are narrowed to ever smaller ones; here in steps of several."""
    net, _, x = problem
    masks = random_masks(net, 30)
    stores = [filled_store(net, masks[:num_tasks], capacity=32) for num_tasks in (3, 20, 30)]
    want = [ss.binary_search(net, store, x[:2]).scores for store in stores]
    monkeypatch.setattr(search, "SMALL", 4)
    monkeypatch.setattr(search, "SHRINK", 3)
    search._binary_search.clear_cache()
    got = [ss.binary_search(net, store, x[:2]).scores for store in stores]
    np.testing.assert_array_equal(got, want)


def test_the_form_for_accelerators_finds_the_same(problem, monkeypatch, fresh_program):
    """Searches batched, in pieces of several and the rest, as elsewhere than on CPU."""
    net, store, x = problem
    want = ss.binary_search(net, store, x)
    monkeypatch.setattr(schedule, "GRADIENT_FLOATS", 7 * net.layout.num_weights)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args))
    search._binary_search.clear_cache()
    np.testing.assert_array_equal(ss.binary_search(net, store, x).scores, want.scores)


def test_statistics_are_those_of_the_whole_batch_under_each_mixture(norm_net):
    masks = random_masks(norm_net, 5)
    store = filled_store(norm_net, [ss.Task(mask, norm_net.state) for mask in masks], capacity=8)
    x = np.random.default_rng(0).standard_normal((6, 6), np.float32) * 2 + 1
    shared = jax.device_get(ss.binary_search(norm_net, store, x, per_example=False))
    want = plain_binary(norm_net, masks, x, ss.entropy, 2, norm=True)
    np.testing.assert_array_equal(shared.scores[:5], want)
    for b, scores in enumerate(np.asarray(ss.binary_search(norm_net, store, x).scores)):
        want = plain_binary(norm_net, masks, x, ss.entropy, 2, norm=True, rows=[b])
        np.testing.assert_array_equal(scores[:5], want)


@pytest.mark.parametrize("shape", [(2, 5, 48), (1, 7, 1024)])
def test_counts_of_chosen_masks_are_exact(monkeypatch, shape):
    """In one block of word rows, and in several of which the last shares rows."""
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**32, shape, np.uint32)
    words[:, 0] = 0xFFFFFFFF
    bits = (words[:, None] >> np.arange(32)[:, None, None]) & 1  # [tiles, 32, nw, l]
    everything = np.ones(shape[0] * shape[2], bool)
    for kept in (everything, rng.random(everything.shape) < 0.4):
        want = (bits * kept.reshape(shape[0], 1, 1, -1)).sum((0, 3)).reshape(-1)
        for rows in (10**6, 2):
            monkeypatch.setattr(contraction, "CPU_BLOCK_FLOATS", rows * 4 * shape[2])
            count = jax.jit(lambda *arrays: contraction.count(*arrays))
            got = count(words, kept, np.int32(len(kept)))
            np.testing.assert_array_equal(got, want)


# Rerank and oracle


def test_oracle_equals_a_loop_over_tasks(problem):
    net, store, x = problem
    belief = jax.device_get(ss.oracle(net, store, x, ss.max_logit))
    want = np.stack([np.max(ss.predict(net, store, x, t), -1) for t in range(5)], axis=1)
    np.testing.assert_allclose(belief.scores[:, :5], want, rtol=RTOL)
    np.testing.assert_array_equal(belief.task, want.argmax(-1))
    assert (belief.scores[:, 5:] == -jnp.inf).all()
    shared = ss.oracle(net, store, x, ss.max_logit, per_example=False)
    np.testing.assert_allclose(np.asarray(shared.scores)[:5], want.mean(0), rtol=RTOL)


@pytest.mark.parametrize(("per_example", "judge"), [(True, None), (False, ss.max_logit)])
def test_rerank_judges_the_best_of_one_shot_alone(problem, per_example, judge):
    net, store, x = problem
    found = ss.rerank(net, store, x, per_example=per_example, best=3, judge=judge)
    found = jax.device_get(found)
    firsts = np.atleast_2d(ss.one_shot(net, store, x, per_example=per_example).scores)
    logits = np.stack([ss.predict(net, store, x, t) for t in range(5)])  # [5, B, C]
    judged = -np.asarray(jax.jit(judge or ss.entropy)(logits)).T  # [B, 5]
    judged = judged if per_example else judged.mean(0, keepdims=True)
    for scores, first, alone in zip(np.atleast_2d(found.scores), firsts, judged, strict=True):
        listed = np.argsort(-first[:5], kind="stable")[:3]
        want = np.full(8, -np.inf)
        want[listed] = alone[listed]
        np.testing.assert_allclose(scores, want, rtol=RTOL, atol=ATOL)
    np.testing.assert_array_equal(found.task, found.scores.argmax(-1))
    assert found.task.shape == ((20,) if per_example else ())


@pytest.mark.parametrize("per_example", [True, False])
def test_rerank_lies_between_one_shot_and_the_oracle(problem, per_example):
    net, store, x = problem
    arguments = net, store, x, ss.Superfluous(3), per_example
    np.testing.assert_array_equal(ss.rerank(*arguments, best=1).task, ss.one_shot(*arguments).task)
    # No more than there are.
    got, want = ss.rerank(*arguments, best=1000), ss.oracle(*arguments)
    np.testing.assert_array_equal(got.task, want.task)
    np.testing.assert_allclose(got.scores, want.scores, rtol=RTOL, atol=ATOL)


def test_rerank_with_statistics_of_the_tasks(norm_net):
    tasks = [
        ss.Task(mask, jax.tree.map(lambda leaf, s=s: np.asarray(leaf) + s, norm_net.state))
        for s, mask in enumerate(random_masks(norm_net, 4))
    ]
    store = filled_store(norm_net, tasks)
    x = np.random.default_rng(0).standard_normal((6, 6), np.float32)
    got, want = ss.rerank(norm_net, store, x, best=4), ss.oracle(norm_net, store, x)
    np.testing.assert_allclose(got.scores, want.scores, rtol=RTOL, atol=ATOL)


def test_gradients_pass_what_a_decision_holds_constant(problem):
    net, store, x = problem

    def confidence(x):
        return ss.max_logit(ss.predict(net, store, x, ss.binary_search(net, store, x).task)).sum()

    tasks = ss.binary_search(net, store, x).task
    listed = ss.rerank(net, store, x, best=2).task
    for function, known in (
        (confidence, lambda x: ss.max_logit(ss.predict(net, store, x, tasks)).sum()),
        (
            lambda x: ss.rerank(net, store, x, best=2).scores.max(-1).sum(),
            lambda x: -ss.entropy(ss.predict(net, store, x, listed)).sum(),
        ),
    ):
        got, want = (jax.jit(jax.grad(each))(x) for each in (function, known))
        np.testing.assert_allclose(got, want, rtol=RTOL, atol=ATOL)


# Rules by name


def test_rules_are_equal_by_value():
    assert ss.Rule("rerank", best=3) == ss.Rule("rerank", best=3)
    assert hash(ss.Rule("rerank", judge=ss.Superfluous(3))) == hash(
        ss.Rule("rerank", judge=ss.Superfluous(3))
    )
    assert ss.Rule("binary_search") != ss.Rule("binary_search", base=3)


def test_a_rule_is_the_function_it_names(problem):
    net, store, x = problem
    for rule, function in (
        (ss.Rule("one_shot"), ss.one_shot),
        (ss.Rule("one_shot", error=1e-6), functools.partial(ss.one_shot, error=1e-6)),
        (ss.Rule("rerank", best=1), functools.partial(ss.rerank, best=1)),
    ):
        for per_example in (True, False):
            got = rule(net, store, x, ss.Superfluous(3), per_example)
            want = function(net, store, x, ss.Superfluous(3), per_example)
            np.testing.assert_array_equal(got.scores, want.scores)


def test_bad_input(problem):
    net, store, x = problem
    sgd = optax.sgd(0.1)
    for rule, error, message, options in (
        (ss.descend, ValueError, "steps must .* at least 1, got 0", {"optimizer": sgd, "steps": 0}),
        (ss.descend, TypeError, "must come from optax, got str", {"optimizer": "sgd", "steps": 1}),
        (ss.binary_search, TypeError, "base must be an int of at least 2, got 2.0", {"base": 2.0}),
        (ss.binary_search, TypeError, "base must .* at least 2, got True", {"base": True}),
        (ss.binary_search, TypeError, "base must .* at least 2, got '2'", {"base": "2"}),
        (ss.binary_search, TypeError, "base must .* at least 2, got None", {"base": None}),
        (ss.binary_search, ValueError, "base must be an int of at least 2, got 1", {"base": 1}),
        (ss.binary_search, ValueError, "base must .* at least 2, got -2", {"base": -2}),
        (ss.binary_search, ValueError, "at most T, .* got base 6 for 5 tasks", {"base": 6}),
        (ss.rerank, ValueError, "best must be an int of at least 1, got 0", {"best": 0}),
        (ss.rerank, TypeError, r"best must .* at least 1, got 2\.5", {"best": 2.5}),
        (ss.rerank, TypeError, "judge must be a hashable function", {"judge": "entropy"}),
        (ss.rerank, ValueError, r"must map logits \[B, C\] to \[B\]", {"judge": jax.nn.softmax}),
    ):
        with pytest.raises(error, match=message):
            rule(net, store, x, **options)
    for message, name, options in (
        (r"rule must be one of \['binary_search', .*got 'best'", "best", {}),
        (r"'binary_search' takes the options \('base',\), not", "binary_search", {"best": 3}),
        ("best must be an int of at least 1, got 0", "rerank", {"best": 0}),
        ("rule 'descend' needs an optimizer and steps", "descend", {"steps": 1}),
        ("error must lie between 0 and 1", "one_shot", {"error": 2.0}),
    ):
        with pytest.raises(ValueError, match=message):
            ss.Rule(name, **options)
