import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import supsup_jax as ss
from supsup_jax.inference import one_shot as infer
from supsup_jax.inference import search
from supsup_jax.kernels import contraction
from tests.conftest import filled_store, golden, random_masks, relu_apply, relu_net

RTOL, ATOL = 1e-4, 1e-6


@pytest.fixture
def problem(small_net):
    """66 weights, five tasks in eight slots, 20 inputs: batches on both sides of the forms."""
    store = filled_store(small_net, random_masks(small_net, 5), capacity=8)
    return small_net, store, jax.random.normal(jax.random.key(0), (20, 6))


@pytest.fixture(scope="module")
def seven():
    """The network of `problem`, seven masks of which 2 and 4 are equal, 20 inputs."""
    net = relu_net((6, 6, 5))
    masks = random_masks(net, 7)
    masks[4] = masks[2]
    return net, masks, jax.random.normal(jax.random.key(0), (20, 6))


# Descent


@pytest.mark.parametrize("per_example", [True, False])
def test_one_small_step_of_descent_ranks_as_one_shot(problem, per_example):
    net, store, x = problem
    belief = ss.descend(net, store, x, optimizer=optax.sgd(1e-3), steps=1, per_example=per_example)
    want = ss.one_shot(net, store, x, per_example=per_example)
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
    for steps in (1, 20):
        alphas = ss.descend(net, store, x, optimizer=optimizer, steps=steps).scores[:, :5]
        np.testing.assert_allclose(alphas.sum(-1), 1, rtol=1e-5)
        assert float(alphas.min()) >= 0
        logits = [net(store.mixture(a), x[i : i + 1])[0] for i, a in enumerate(alphas)]
        entropies.append(float(ss.entropy(jnp.stack(logits)).mean()))
    assert entropies[1] < entropies[0]


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


def test_binary_search_keeps_the_survivors_of_the_reference():
    z = golden("one_shot")
    net = ss.Network(relu_apply, {f"kernel{i}": z[f"kernel{i}"] for i in range(3)})
    masks = [{f"kernel{i}": z[f"scores{i}"][t] >= 0 for i in range(3)} for t in range(7)]
    store = filled_store(net, masks, capacity=8)
    found = ss.binary_search(net, store, jnp.asarray(z["x"]), per_example=False)
    np.testing.assert_array_equal(found.scores[:7], z["binary_alive"].sum(0))
    assert found.scores[7] == -jnp.inf
    assert int(found.task) == int(np.flatnonzero(z["binary_alive"][-1])[0])


@pytest.mark.parametrize("base", [2, 3, 7])
@pytest.mark.parametrize("num_tasks", [1, 2, 5, 7])
def test_binary_search_equals_a_plain_loop(seven, num_tasks, base):
    net, masks, x = seven
    store = filled_store(net, masks[:num_tasks], capacity=8)
    objective = ss.Superfluous(3)
    shared = jitted(net, store, x, objective=objective, per_example=False, base=base)
    want = plain_binary(net, masks[:num_tasks], x, objective, base)
    np.testing.assert_array_equal(shared.scores[:num_tasks], want)
    assert int(shared.task) == want.argmax()
    found = jitted(net, store, x[:6], base=base)
    assert found.scores.shape == (6, 8)
    assert found.scores.dtype == jnp.float32
    for row, task, scores in zip(x, found.task, found.scores, strict=False):
        want = plain_binary(net, masks[:num_tasks], row[None], ss.entropy, base)
        np.testing.assert_array_equal(scores[:num_tasks], want)
        assert (scores[num_tasks:] == -jnp.inf).all()
        assert int(task) == want.argmax() == scores.argmax()
        assert num_tasks == 1 or (want == want.max()).sum() == 1


def test_of_equal_gradients_the_lower_ids_survive(small_net):
    """Also where the zeros of a network that is switched off differ in sign."""
    off = ss.Network(relu_apply, jax.tree.map(jnp.zeros_like, small_net.params))
    store = filled_store(off, random_masks(small_net, 6), capacity=8)
    found = ss.binary_search(off, store, jnp.ones((3, 6)))
    want = [3, 2, 1, 0, 0, 0, -jnp.inf, -jnp.inf]  # 6 -> 3 -> 2 -> 1
    np.testing.assert_array_equal(found.scores, [want] * 3)
    signs = jnp.asarray([0.0, -0.0, 0.0, -0.0])
    field = search._Field(jnp.ones(4, bool), jnp.int32(4), jnp.zeros(4))
    np.testing.assert_array_equal(search._narrow(field, signs, 2).alive, [1, 1, 0, 0])


def test_one_round_is_one_shot(problem):
    net, store, x = problem
    found = ss.binary_search(net, store, x, base=5)
    np.testing.assert_array_equal(found.task, ss.one_shot(net, store, x).task)
    np.testing.assert_array_equal(found.scores.max(-1), 1)


def test_rows_of_binary_search_stand_alone(problem):
    net, store, x = problem
    found = ss.binary_search(net, store, x)
    rows = [ss.binary_search(net, store, row[None]) for row in x]
    np.testing.assert_array_equal(found.task, [int(row.task[0]) for row in rows])
    np.testing.assert_array_equal(found.scores, np.concatenate([row.scores for row in rows]))


def test_survivors_copied_together_search_on(small_net, monkeypatch):
    """Stores larger than SMALL are narrowed to ever smaller ones; here in steps of several."""
    masks, x = random_masks(small_net, 60), jax.random.normal(jax.random.key(0), (2, 6))
    stores = [filled_store(small_net, masks[:num_tasks], capacity=64) for num_tasks in (3, 40, 60)]
    want = [ss.binary_search(small_net, store, x).scores for store in stores]
    monkeypatch.setattr(search, "SMALL", 4)
    monkeypatch.setattr(search, "SHRINK", 3)
    search._binary_search.clear_cache()
    got = [ss.binary_search(small_net, store, x).scores for store in stores]
    search._binary_search.clear_cache()
    np.testing.assert_array_equal(got, want)


def test_the_form_for_accelerators_finds_the_same(problem, monkeypatch):
    """Searches batched, in pieces of several and the rest, as elsewhere than on CPU."""
    net, store, x = problem
    want = ss.binary_search(net, store, x)
    monkeypatch.setattr(infer, "GRADIENT_FLOATS", 7 * net.layout.num_weights)
    monkeypatch.setattr(
        search.lax, "platform_dependent", lambda *args, cpu, default: default(*args)
    )
    search._binary_search.clear_cache()
    got = ss.binary_search(net, store, x)
    search._binary_search.clear_cache()
    np.testing.assert_array_equal(got.scores, want.scores)


def test_statistics_are_those_of_the_whole_batch_under_each_mixture(norm_net):
    masks = random_masks(norm_net, 5)
    store = filled_store(norm_net, [ss.Task(mask, norm_net.state) for mask in masks], capacity=8)
    x = jax.random.normal(jax.random.key(0), (6, 6)) * 2 + 1
    shared = ss.binary_search(norm_net, store, x, per_example=False)
    want = plain_binary(norm_net, masks, x, ss.entropy, 2, norm=True)
    np.testing.assert_array_equal(shared.scores[:5], want)
    for b, scores in enumerate(ss.binary_search(norm_net, store, x).scores):
        want = plain_binary(norm_net, masks, x, ss.entropy, 2, norm=True, rows=[b])
        np.testing.assert_array_equal(scores[:5], want)


@pytest.mark.parametrize("shape", [(1, 3, 16), (2, 5, 48), (2, 7, 1024)])
def test_counts_of_chosen_masks_are_exact(monkeypatch, shape):
    """In one block of word rows, and in several of which the last shares rows."""
    words = jax.random.bits(jax.random.key(0), shape, jnp.uint32).at[:, 0].set(0xFFFFFFFF)
    bits = (np.asarray(words)[:, None] >> np.arange(32)[:, None, None]) & 1  # [tiles, 32, nw, l]
    everything = jnp.ones(shape[0] * shape[2], bool)
    for kept in (everything, jax.random.bernoulli(jax.random.key(1), 0.4, everything.shape)):
        want = (bits * np.asarray(kept).reshape(shape[0], 1, 1, -1)).sum((0, 3)).reshape(-1)
        for rows in (10**6, 2):
            monkeypatch.setattr(contraction, "CPU_BLOCK_FLOATS", rows * 4 * shape[2])
            got = contraction.count(words, kept, jnp.int32(len(kept)))
            np.testing.assert_array_equal(got, want)


# Rerank and oracle


def test_oracle_equals_a_loop_over_tasks(problem):
    net, store, x = problem
    belief = ss.oracle(net, store, x, ss.max_logit)
    want = np.stack([ss.predict(net, store, x, t).max(-1) for t in range(5)], axis=1)
    np.testing.assert_allclose(belief.scores[:, :5], want, rtol=RTOL)
    np.testing.assert_array_equal(belief.task, want.argmax(-1))
    assert (belief.scores[:, 5:] == -jnp.inf).all()
    shared = ss.oracle(net, store, x, ss.max_logit, per_example=False)
    np.testing.assert_allclose(shared.scores[:5], want.mean(0), rtol=RTOL)


@pytest.mark.parametrize("judge", [None, ss.max_logit])
@pytest.mark.parametrize("per_example", [True, False])
def test_rerank_judges_the_best_of_one_shot_alone(problem, per_example, judge):
    net, store, x = problem
    found = ss.rerank(net, store, x, per_example=per_example, best=3, judge=judge)
    firsts = np.atleast_2d(ss.one_shot(net, store, x, per_example=per_example).scores)
    logits = np.stack([ss.predict(net, store, x, t) for t in range(5)])  # [5, B, C]
    judged = -np.asarray((judge or ss.entropy)(jnp.asarray(logits))).T  # [B, 5]
    judged = judged if per_example else judged.mean(0, keepdims=True)
    for scores, first, alone in zip(np.atleast_2d(found.scores), firsts, judged, strict=True):
        listed = np.argsort(-first[:5])[:3]
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
    for best in (5, 1000):  # no more than there are
        got, want = ss.rerank(*arguments, best=best), ss.oracle(*arguments)
        np.testing.assert_array_equal(got.task, want.task)
        np.testing.assert_allclose(got.scores, want.scores, rtol=RTOL, atol=ATOL)


def test_rerank_of_a_network_switched_off_names_the_first_task(small_net):
    """All gradients are 0 or -0, between which one_shot sees no difference."""
    off = ss.Network(relu_apply, jax.tree.map(jnp.zeros_like, small_net.params))
    store = filled_store(off, random_masks(small_net, 6), capacity=8)
    found = ss.rerank(off, store, jnp.ones((3, 6)), best=2)
    np.testing.assert_array_equal(jnp.isfinite(found.scores), [[1, 1, 0, 0, 0, 0, 0, 0]] * 3)


def test_rerank_with_statistics_of_the_tasks(norm_net):
    tasks = [
        ss.Task(mask, jax.tree.map(lambda leaf, s=s: leaf + s, norm_net.state))
        for s, mask in enumerate(random_masks(norm_net, 4))
    ]
    store = filled_store(norm_net, tasks)
    x = jax.random.normal(jax.random.key(0), (6, 6))
    got, want = ss.rerank(norm_net, store, x, best=4), ss.oracle(norm_net, store, x)
    np.testing.assert_allclose(got.scores, want.scores, rtol=RTOL, atol=ATOL)


# Inside the caller's own transformations

RULES = {
    "binary_search": ss.binary_search,
    "rerank": ss.Rule("rerank", best=2, judge=ss.max_logit),
    "oracle": ss.oracle,
    "descend": ss.Rule("descend", optimizer=optax.sgd(0.05), steps=2),
}


@pytest.mark.parametrize("name", RULES)
def test_inside_jit_and_vmap(problem, name):
    net, store, x = problem
    rule = RULES[name]
    plain = rule(net, store, x)
    one = lambda row: jax.tree.map(lambda leaf: leaf[0], rule(net, store, row[None]))  # noqa: E731
    got = jax.jit(jax.vmap(one))(x)
    np.testing.assert_array_equal(got.task, plain.task)
    np.testing.assert_allclose(got.scores, plain.scores, rtol=RTOL, atol=ATOL)


def test_gradients_pass_what_a_decision_holds_constant(problem):
    net, store, x = problem

    def confidence(x):
        return ss.max_logit(ss.predict(net, store, x, ss.binary_search(net, store, x).task)).sum()

    tasks = ss.binary_search(net, store, x).task
    want = jax.grad(lambda x: ss.max_logit(ss.predict(net, store, x, tasks)).sum())(x)
    np.testing.assert_allclose(jax.grad(confidence)(x), want, rtol=RTOL, atol=ATOL)
    best = jax.grad(lambda x: ss.rerank(net, store, x, best=2).scores.max(-1).sum())(x)
    tasks = ss.rerank(net, store, x, best=2).task
    want = jax.grad(lambda x: -ss.entropy(ss.predict(net, store, x, tasks)).sum())(x)
    np.testing.assert_allclose(best, want, rtol=RTOL, atol=ATOL)


def test_inside_shard_map(problem):
    net, store, x = problem
    x = jnp.concatenate([x, x[:20]])
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.PartitionSpec("data")
    momentum = ss.Rule("descend", optimizer=optax.sgd(0.05, momentum=0.9), steps=2)
    for function in (
        lambda x: ss.binary_search(net, store, x).scores,
        lambda x: ss.binary_search(net, store, x, per_example=False).scores[None],
        lambda x: ss.rerank(net, store, x, best=2).scores,
        lambda x: ss.rerank(net, store, x, best=2, per_example=False).scores[None],
        lambda x: momentum(net, store, x).scores,
    ):
        want = jnp.concatenate([function(x[:20]), function(x[20:])])
        got = jax.shard_map(function, mesh=mesh, in_specs=split, out_specs=split)(x)
        np.testing.assert_allclose(got, want, rtol=RTOL, atol=ATOL)


def test_under_64_bit_types(problem):
    net, store, x = problem
    wants = [rule(net, store, x) for rule in RULES.values()]
    with jax.enable_x64(True):
        again = filled_store(net, [store.mask(i) for i in range(5)], capacity=8)
        for rule, want in zip(RULES.values(), wants, strict=True):
            got = rule(net, again, x)
            np.testing.assert_array_equal(got.task, want.task)
            assert got.scores.dtype == jnp.float32


def test_one_compilation_serves_any_number_of_tasks_within_capacity(small_net):
    masks = random_masks(small_net, 6)
    x = jax.random.normal(jax.random.key(0), (3, 6))
    store = filled_store(small_net, masks[:2], capacity=8)
    programs = (search._binary_search, search._rerank, search._oracle)
    rules = (ss.Rule("binary_search"), ss.Rule("rerank", best=3), ss.Rule("oracle"))
    for rule in rules:
        rule(small_net, store, x)
    before = [program._cache_size() for program in programs]
    for mask in masks[2:]:
        store = store.append(mask)
        net = relu_net((6, 6, 5))  # nor does the same network, made anew
        for rule in (ss.Rule("binary_search"), ss.Rule("rerank", best=3), ss.Rule("oracle")):
            rule(net, store, x)
    assert [program._cache_size() for program in programs] == before


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
        (ss.Rule("rerank", best=2), functools.partial(ss.rerank, best=2)),
    ):
        for per_example in (True, False):
            got = rule(net, store, x, ss.Superfluous(3), per_example)
            want = function(net, store, x, ss.Superfluous(3), per_example)
            np.testing.assert_array_equal(got.scores, want.scores)


def test_bad_input(problem, norm_net):
    net, store, x = problem
    empty = ss.MaskStore.create(net)
    for call in (ss.oracle, ss.binary_search, ss.rerank, RULES["descend"]):
        with pytest.raises(ValueError, match="the store is empty"):
            call(net, empty, x)
        with pytest.raises(ValueError, match="the store holds masks of"):
            call(norm_net, store, x)
        with pytest.raises(TypeError, match="x must be a float array"):
            call(net, store, jnp.ones((2, 6), jnp.uint8))
        with pytest.raises(TypeError, match="objective must be a hashable function"):
            call(net, store, x, "entropy")
        with pytest.raises(ValueError, match=r"objective must map logits \[B, C\] to \[B\]"):
            call(net, store, x, jax.nn.softmax)
    with pytest.raises(ValueError, match="steps must be a positive int"):
        ss.descend(net, store, x, optimizer=optax.sgd(0.1), steps=0)
    with pytest.raises(TypeError, match="optimizer must come from optax"):
        ss.descend(net, store, x, optimizer="sgd", steps=1)
    for base in (2.0, True, "2", None):
        with pytest.raises(TypeError, match="base must be an int of at least 2, got"):
            ss.binary_search(net, store, x, base=base)
    for base in (1, 0, -2):
        with pytest.raises(ValueError, match=f"base must be an int of at least 2, got {base}"):
            ss.binary_search(net, store, x, base=base)
    with pytest.raises(ValueError, match=r"at most T, .* got base 6 for 5 tasks"):
        ss.binary_search(net, store, x, base=6)
    with pytest.raises(ValueError, match="best must be an int of at least 1, got 0"):
        ss.rerank(net, store, x, best=0)
    with pytest.raises(TypeError, match=r"best must be an int of at least 1, got 2\.5"):
        ss.rerank(net, store, x, best=2.5)
    with pytest.raises(TypeError, match="judge must be a hashable function"):
        ss.rerank(net, store, x, judge="entropy")
    with pytest.raises(ValueError, match=r"objective must map logits \[B, C\] to \[B\]"):
        ss.rerank(net, store, x, judge=jax.nn.softmax)
    with pytest.raises(ValueError, match=r"rule must be one of \['binary_search', .*got 'best'"):
        ss.Rule("best")
    with pytest.raises(ValueError, match=r"'binary_search' takes the options \('base',\), not"):
        ss.Rule("binary_search", best=3)
    with pytest.raises(ValueError, match="best must be an int of at least 1, got 0"):
        ss.Rule("rerank", best=0)
