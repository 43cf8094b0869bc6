import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import supsup_jax as ss
from supsup_jax.inference import one_shot, predict, schedule
from supsup_jax.inference.arguments import Race
from supsup_jax.kernels import race
from tests.conftest import NormNet, filled_store, random_masks, relu_net

OBJECTIVES = {"entropy": ss.entropy, "superfluous": ss.Superfluous(10)}
RTOL, ATOL = 1e-4, 1e-6


def test_outputs_of_the_mixture_match_the_reference(reference):
    net, store, x, z = reference

    @jax.jit
    def values(net, store, x):
        logits = net(store.mixture(), x)
        found = {name: objective(logits) for name, objective in OBJECTIVES.items()}
        # The paper's G is ours plus logsumexp over the labels.
        found["superfluous"] += jax.nn.logsumexp(logits[:, :10], axis=-1)
        return logits, found

    logits, found = jax.device_get(values(net, store, x))
    np.testing.assert_allclose(logits, z["mixture_logits"], rtol=RTOL, atol=ATOL)
    for name, n in itertools.product(OBJECTIVES, (1, 4, 16)):
        np.testing.assert_allclose(found[name][:n].mean(), z[f"{name}_value_n{n}"], rtol=RTOL)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("n", [1, 4, 16])
def test_batch_gradient_matches_the_reference(reference, name, n):
    net, store, x, z = reference
    got = np.asarray(ss.alpha_gradient(net, store, x[:n], OBJECTIVES[name], per_example=False))
    assert got.shape == (8,)
    np.testing.assert_allclose(got[:7], z[f"{name}_alpha_grad_n{n}"], rtol=RTOL, atol=ATOL)
    assert got[7] == 0


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("form", ["gradients", "tangents"])
def test_per_example_gradient_matches_the_reference(reference, name, form):
    net, store, x, z = reference
    rows = [x] if form == "tangents" else [x[:8], x[8:]]
    assert (len(rows[0]) >= schedule.TANGENTS_FROM) == (form == "tangents")
    got = np.concatenate([ss.alpha_gradient(net, store, part, OBJECTIVES[name]) for part in rows])
    assert got.shape == (16, 8)
    want = z[f"{name}_alpha_grad_per_example"]
    np.testing.assert_allclose(got[:, :7], want, rtol=RTOL, atol=ATOL)
    assert (got[:, 7] == 0).all()


def test_task_logits_match_the_reference(reference):
    net, store, x, z = reference
    for task in range(7):
        got = ss.predict(net, store, x, task)
        np.testing.assert_allclose(got, z["task_logits"][task], rtol=RTOL, atol=ATOL)


def test_mixed_tasks_in_one_batch_match_the_reference(reference):
    net, store, x, z = reference
    for ids in (np.arange(16) % 7, np.zeros(16, int), np.asarray([3] * 9 + [1] * 7)):
        got = ss.predict(net, store, x, ids)
        want = z["task_logits"][ids, np.arange(16)]
        np.testing.assert_allclose(got, want, rtol=RTOL, atol=ATOL)


def test_long_runs_of_one_task_are_cut_into_segments(problem, monkeypatch):
    monkeypatch.setattr(predict, "SEGMENT", 3)
    net, store, _ = problem
    x = np.random.default_rng(1).standard_normal((23, 6), np.float32)
    ids = np.random.default_rng(0).integers(0, 2, 23)
    got = ss.predict(net, store, x, ids)
    want = np.stack([ss.predict(net, store, x, t) for t in range(2)])[ids, np.arange(23)]
    np.testing.assert_allclose(got, want, rtol=RTOL, atol=ATOL)


def test_one_shot_is_the_argmax_over_learned_tasks(reference):
    net, store, x, z = reference
    belief = jax.device_get(ss.one_shot(net, store, x))
    want = -z["entropy_alpha_grad_per_example"]
    np.testing.assert_array_equal(belief.task, want.argmax(-1))
    np.testing.assert_allclose(belief.scores[:, :7], want, rtol=RTOL, atol=ATOL)
    assert (belief.scores[:, 7] == -jnp.inf).all()
    shared = ss.one_shot(net, store, x, per_example=False)
    assert shared.task.shape == ()
    assert int(shared.task) == z["entropy_alpha_grad_n16"].argmin()


@pytest.mark.parametrize(
    ("objective", "uniform"), [(ss.entropy, True), (ss.entropy, False), (ss.max_confidence, False)]
)
def test_gradient_equals_finite_differences(problem, objective, uniform):
    """The derivative is true in the coefficients, so float64 differences are a fair witness."""
    net, store, x = problem
    masks = [
        [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(store.mask(t))] for t in range(5)
    ]
    weights = [np.asarray(net.params[name], np.float64) for name in ("kernel0", "kernel1")]
    rng = np.random.default_rng(0)
    alphas = np.full(5, 0.2) if uniform else rng.dirichlet(np.ones(5))

    def value(alphas, row):
        mixed = [sum(a * m[i] for a, m in zip(alphas, masks, strict=True)) for i in range(2)]
        hidden = np.maximum(np.asarray(row, np.float64) @ (weights[0] * mixed[0]), 0)
        logits = hidden @ (weights[1] * mixed[1])
        p = np.exp(logits - logits.max())
        p /= p.sum()
        return -(p * np.log(p)).sum() if objective is ss.entropy else -p.max()

    eps, want = 1e-6, np.zeros((len(x), 5))
    for i in range(5):
        step = np.eye(5)[i] * eps
        want[:, i] = [(value(alphas + step, r) - value(alphas - step, r)) / (2 * eps) for r in x]
    given = None if uniform else alphas.astype(np.float32)
    got = np.asarray(ss.alpha_gradient(net, store, x, objective, given))
    np.testing.assert_allclose(got[:, :5], want, rtol=1e-3, atol=1e-5)


def test_forms_and_pieces_agree(problem, monkeypatch):
    """Tangents, gradients one by one, and gradients in large pieces."""
    net, store, x = problem
    want = ss.alpha_gradient(net, store, x)
    rows = [ss.alpha_gradient(net, store, x[i : i + 1]) for i in range(len(x))]
    np.testing.assert_allclose(want, np.concatenate(rows), rtol=RTOL, atol=ATOL)
    monkeypatch.setattr(schedule, "TANGENTS_FROM", 10**9)
    monkeypatch.setattr(schedule, "GRADIENT_FLOATS", 7 * net.layout.num_weights)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *a, cpu, default: default(*a))
    pieces = jax.jit(lambda x: ss.alpha_gradient(net, store, x))
    one_shot._alpha_gradient.clear_cache()
    np.testing.assert_allclose(pieces(x), want, rtol=RTOL, atol=ATOL)
    one_shot._alpha_gradient.clear_cache()


@pytest.mark.parametrize(("form", "capacity"), [("select", 400), ("popcount", 401)])
def test_many_decisions_among_many_tasks(problem, monkeypatch, form, capacity):
    """No race, whose answers are exact too, where the CPU does not count the bits of vectors."""
    net, few, x = problem
    store = ss.MaskStore.create(net, capacity)  # of its own, so that each form is traced
    for task in range(5):
        store = store.append(few.task(task))
    want = np.concatenate([ss.one_shot(net, few, x[i : i + 1]).task for i in range(len(x))])
    best_scores, calls = race.best_scores, []
    counted = lambda *args: calls.append(1) or best_scores(*args)  # noqa: E731
    monkeypatch.setattr(race, "best_scores", counted)
    monkeypatch.setenv("SUPSUP_JAX_CPU_FORM", form)
    stream = [ss.TaskData(x, jnp.zeros(len(x), jnp.int32))] * 5
    (row,) = ss.evaluate(net, store, stream, "per_example", tasks=[0])
    np.testing.assert_array_equal(row.inferred, want)
    assert bool(calls) == (form == "popcount")


def test_permuting_tasks_permutes_gradients(problem):
    net, store, x = problem
    order = [3, 1, 4, 0, 2]
    shuffled = filled_store(net, [store.mask(i) for i in order], capacity=8)
    first, second = (np.asarray(ss.alpha_gradient(net, held, x)) for held in (store, shuffled))
    np.testing.assert_allclose(second[:, :5], first[:, order], rtol=RTOL, atol=ATOL)


# Statistics


@pytest.fixture
def norm_problem(norm_net):
    rng = np.random.default_rng(0)
    tasks = [
        ss.Task(
            mask,
            jax.tree.map(
                lambda leaf: (rng.random(leaf.shape) + 0.5).astype(leaf.dtype), norm_net.state
            ),
        )
        for mask in random_masks(norm_net, 4)
    ]
    x = rng.standard_normal((20, 6), np.float32) * 2 + 1
    return norm_net, filled_store(norm_net, tasks), tasks, x


@jax.jit
def plain_norm_logits(net, mask, x, mean, var):
    hidden = x @ (net.params["layer0"]["kernel"] * mask["layer0"]["kernel"])
    hidden = jax.nn.relu((hidden - mean[None]) / jnp.sqrt(var[None] + 1e-5))
    return hidden @ (net.params["layer1"]["kernel"] * mask["layer1"]["kernel"])


@pytest.mark.parametrize("rows", [4, 20])
def test_per_example_gradients_hold_the_batch_statistics(norm_problem, rows):
    """Row b differentiates objective(logits[b]) alone, under the statistics of the whole batch."""
    net, store, tasks, x = norm_problem
    x = x[:rows]
    mixture = np.mean([task.mask["layer0"]["kernel"] for task in tasks], axis=0)
    hidden = x @ (np.asarray(net.params["layer0"]["kernel"]) * mixture.astype(np.float32))
    mean, var = hidden.mean(0), hidden.var(0)

    def value(alphas, row):
        mixed = jax.tree.map(
            lambda *m: sum(a * leaf for a, leaf in zip(alphas, m, strict=True)),
            *[task.mask for task in tasks],
        )
        return ss.entropy(plain_norm_logits(net, mixed, row[None], mean, var))[0]

    gradient = jax.jit(jax.grad(value))
    want = np.stack([gradient(np.full(4, 0.25, np.float32), row) for row in x])
    got = np.asarray(ss.alpha_gradient(net, store, x))
    np.testing.assert_allclose(got[:, :4], want, rtol=2e-3, atol=1e-5)
    shared = ss.alpha_gradient(net, store, x, per_example=False)
    np.testing.assert_allclose(np.asarray(shared)[:4], want.mean(0), rtol=2e-3, atol=1e-5)


def test_predict_uses_the_statistics_of_the_task(norm_problem):
    net, store, tasks, x = norm_problem
    ids = np.arange(20) % 4
    want = []
    for mask, state in tasks:
        mean, var = state["norm"]["mean"], state["norm"]["var"]
        want.append(plain_norm_logits(net, mask, x, mean, var))
    want = np.stack(want)[ids, np.arange(20)]
    np.testing.assert_allclose(ss.predict(net, store, x, ids), want, rtol=1e-3, atol=1e-4)


def test_dropout_does_not_disturb_inference():
    net = ss.Network.from_nnx(NormNet((6, 8, 5), dropout=0.5, rngs=nnx.Rngs(0)))
    store = filled_store(net, [ss.Task(mask, net.state) for mask in random_masks(net, 3)])
    x = np.random.default_rng(0).standard_normal((4, 6), np.float32)
    np.testing.assert_array_equal(ss.predict(net, store, x, 1), ss.predict(net, store, x, 1))
    assert np.isfinite(np.asarray(ss.one_shot(net, store, x).scores)[:, :3]).all()


# Inside the caller's own transformations


def test_gradients_of_gradients_and_logits(problem):
    net, store, x = problem
    for rows in (2, 20):  # both forms can be differentiated further
        squares = jax.grad(lambda x: (ss.alpha_gradient(net, store, x) ** 2).sum())
        grad = np.asarray(jax.jit(squares)(x[:rows]))
        assert np.isfinite(grad).all()
        assert np.abs(grad).max() > 0
    slopes = jax.jit(jax.grad(lambda x, ids: ss.predict(net, store, x, ids).sum()))
    logits, alone = slopes(x, np.arange(20) % 5), slopes(x[:1], 0)
    np.testing.assert_allclose(logits[0], alone[0], rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint32, np.int64])
def test_task_ids_of_any_integer_type(problem, dtype):
    net, store, x = problem
    ids = np.arange(20) % 5
    want = ss.predict(net, store, x, ids.astype(np.int32))
    np.testing.assert_array_equal(ss.predict(net, store, x, ids.astype(dtype)), want)


def test_an_objective_with_a_reverse_rule_only(problem):
    """Large batches are probed in forward mode, where that is possible."""
    net, store, x = problem

    @jax.custom_vjp
    def objective(logits):
        return ss.entropy(logits)

    objective.defvjp(
        lambda logits: (ss.entropy(logits), logits),
        lambda logits, bar: (jax.vjp(ss.entropy, logits)[1](bar)[0],),
    )
    want = ss.alpha_gradient(net, store, x)
    np.testing.assert_allclose(
        ss.alpha_gradient(net, store, x, objective), want, rtol=RTOL, atol=ATOL
    )


def test_an_objective_in_half_precision(problem):
    net, store, x = problem
    # Not float16, which XLA cannot compile for every CPU.
    half = lambda logits: ss.entropy(logits).astype(jnp.bfloat16)  # noqa: E731
    for rows in (3, 20):
        assert ss.one_shot(net, store, x[:rows], half).scores.dtype == jnp.float32
    assert ss.oracle(net, store, x, half).scores.dtype == jnp.float32


@pytest.mark.parametrize(
    "batch, per_example, implementation",
    [(1, True, None), (128, True, None), (128, True, Race()), (128, True, Race(1e-6))],
)
def test_no_buffer_of_unpacked_masks(batch, per_example, implementation):
    net = relu_net((784, 300, 100, 100))
    store = jax.eval_shape(lambda net: ss.MaskStore.create(net, 2500), net)
    x = jax.ShapeDtypeStruct((batch, 784), jnp.float32)
    lowered = one_shot._one_shot.lower(net, store, x, ss.entropy, per_example, implementation)
    temporary = lowered.compile().memory_analysis().temp_size_in_bytes
    # The accumulators of a block, some vectors of n floats, and the scores: nothing that n K
    # masks at a bit each would fit in.
    assert temporary < 20 * 2**20


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("per_example", [True, False])
def test_no_loop_over_words_on_an_accelerator(platform, per_example):
    """A shared decision has no loop at all; many have those over tiles and blocks of masks."""
    net = relu_net((784, 300, 100, 100))
    store = jax.eval_shape(lambda net: ss.MaskStore.create(net, 2500), net)
    x = jax.ShapeDtypeStruct((128, 784), jnp.float32)
    export = jax.export.export(one_shot._one_shot, platforms=[platform])
    exported = export(net, store, x, ss.entropy, per_example, None)
    assert exported.mlir_module().count("stablehlo.while") == (2 if per_example else 0)


@pytest.mark.parametrize("per_example", [True, False])
@pytest.mark.parametrize(
    ("implementation", "objective"),
    [  # all but the first take their vectors alike, whatever these are the gradients of
        *(("certified", objective) for objective in (ss.entropy, ss.Superfluous(3))),
        *((name, ss.Superfluous(3)) for name in ("popcount", "select", "matrix", "reference")),
    ],
)
def test_every_implementation_names_the_same_task(problem, implementation, objective, per_example):
    net, store, x = problem
    want = ss.one_shot(net, store, x, objective, per_example)
    got = ss.one_shot(net, store, x, objective, per_example, implementation)
    np.testing.assert_array_equal(got.task, want.task)
    if implementation != "certified":
        np.testing.assert_allclose(got.scores, want.scores, rtol=RTOL, atol=ATOL)


def test_bad_input(problem):
    net, store, x = problem
    for error, message, task in (
        (ValueError, r"task must lie in \[0, 5\)", 5),
        (ValueError, r"task must lie in \[0, 5\), or be -1 .* got -2 to -2", -2),
        (ValueError, r"task must lie in \[0, 5\)", jnp.asarray([0] * 19 + [7])),
        (ValueError, r"task must be one id or \[20\]", jnp.zeros(3, jnp.int32)),
        (TypeError, "task must hold integer ids", 0.5),
        (TypeError, "task must hold integer ids", "invoices"),
    ):
        with pytest.raises(error, match=message):
            ss.predict(net, store, x, task)
    with pytest.raises(ValueError, match=r"Superfluous.*needs more than 5 outputs"):
        ss.one_shot(net, store, x, ss.Superfluous(5))
    with pytest.raises(ValueError, match="implementation must be None or one of"):
        ss.one_shot(net, store, x, implementation="pallas")
    with pytest.raises(ValueError, match="alphas must end in 8"):
        ss.alpha_gradient(net, store, x, alphas=jnp.ones(6))
