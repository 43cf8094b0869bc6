"""Each task judged against its own: rules by plain NumPy, and moments that stay with the task."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import supsup_jax as ss
from supsup_jax.inference import diagnosis
from supsup_jax.objectives import OfLabels, energy, name_of
from supsup_jax.stores import coded
from tests.conftest import filled_store, random_masks, relu_net

LABELS = 3
RAW = ss.MaxLogit(LABELS)


@pytest.fixture(scope="module")
def problem():
    """Five tasks in a net of 7 outputs, 3 of them labels; inputs of each, at unequal scales."""
    net = relu_net((6, 12, 7))
    masks = random_masks(net, 5)
    rng = np.random.default_rng(1)
    stream = [
        ss.TaskData((1 + i) * rng.standard_normal((12, 6), np.float32), rng.integers(0, LABELS, 12))
        for i in range(5)
    ]
    return net, masks, filled_store(net, masks, 8), stream


def logits_of(net, mask, x):
    hidden = np.maximum(x @ (np.asarray(net.params["kernel0"]) * mask["kernel0"]), 0)
    return (hidden @ (np.asarray(net.params["kernel1"]) * mask["kernel1"])).astype(np.float64)


BY_HAND = {
    RAW: lambda z: max(z[:LABELS]),
    ss.MaxLogit(LABELS, 1): lambda z: np.log(
        max(np.exp(each) for each in z[:LABELS]) / sum(np.exp(each) for each in z)
    ),
    ss.MaxLogit(LABELS, 0.5): lambda z: (
        max(z[:LABELS]) - 0.5 * np.log(sum(np.exp(each) for each in z))
    ),
    OfLabels(energy, LABELS): lambda z: np.log(sum(np.exp(each) for each in z[:LABELS])),
    OfLabels(ss.max_confidence, LABELS): lambda z: (
        max(np.exp(each) for each in z[:LABELS]) / sum(np.exp(each) for each in z[:LABELS])
    ),
    ss.Superfluous(LABELS): lambda z: np.log(
        sum(np.exp(each) for each in z[:LABELS]) / sum(np.exp(each) for each in z)
    ),
    energy: lambda z: np.log(sum(np.exp(each) for each in z)),
}


def scores_by_hand(net, masks, x, objective, data=None):
    """[B, T] by plain loops; standardised by each task's own data where given."""
    rule, rows = BY_HAND[objective], []
    for i, mask in enumerate(masks):
        scores = [rule(z) for z in logits_of(net, mask, x)]
        if data is not None:
            own = [rule(z) for z in logits_of(net, mask, np.asarray(data[i].inputs))]
            mean = sum(own) / len(own)
            deviation = (sum((each - mean) ** 2 for each in own) / len(own)) ** 0.5
            scores = [(each - mean) / deviation for each in scores]
        rows.append(scores)
    return np.array(rows).T


@pytest.mark.parametrize("objective", BY_HAND, ids=name_of)
@pytest.mark.parametrize("standardised", [False, True])
def test_every_mask_tried_is_a_numpy_loop(problem, objective, standardised):
    net, masks, store, stream = problem
    x = np.concatenate([np.asarray(data.inputs) for data in stream])
    asked, data = objective, None
    if standardised:
        store = ss.measure_statistics(net, store, stream, objective)
        asked, data = ss.objectives.Standardised(objective), stream
    want = scores_by_hand(net, masks, x, objective, data)
    got = ss.oracle(net, store, x, asked)
    np.testing.assert_allclose(got.scores[:, :5], want, rtol=1e-4, atol=1e-4)
    together = ss.oracle(net, store, x[:12], asked, per_example=False)
    np.testing.assert_allclose(together.scores[:5], want[:12].mean(0), rtol=1e-4, atol=1e-4)


def test_rerank_and_evaluate_judge_by_the_same_numbers(problem):
    net, _, store, stream = problem
    store = ss.measure_statistics(net, store, stream, RAW)
    judge, x = ss.Standardised(RAW), np.asarray(stream[2].inputs)
    want = ss.oracle(net, store, x, judge)
    got = ss.rerank(net, store, x, ss.entropy, best=5, judge=judge)
    np.testing.assert_allclose(got.scores, want.scores, rtol=1e-5)
    rows = ss.evaluate(net, store, stream, "per_example", objective=judge, rule="oracle")
    np.testing.assert_array_equal(rows[2].inferred, want.task)
    rule = ss.Rule("rerank", best=5, judge=judge)
    rows = ss.evaluate(net, store, stream, "per_example", rule=rule)
    np.testing.assert_array_equal(rows[2].inferred, want.task)


def test_a_task_of_fewer_labels_counts_its_own(problem):
    net, masks, _, stream = problem
    store = ss.MaskStore.create(net, 8)
    for i, mask in enumerate(masks):
        store = store.append(mask, num_labels=1 + i % 3)
    x = np.asarray(stream[0].inputs)
    got = ss.oracle(net, store, x, RAW).scores[:, :5]
    for i, mask in enumerate(masks):
        want = logits_of(net, mask, x)[:, : 1 + i % 3].max(1)
        np.testing.assert_allclose(got[:, i], want, rtol=1e-4, atol=1e-5)
    measured = ss.measure_statistics(net, store, stream, RAW)
    own = logits_of(net, masks[1], np.asarray(stream[1].inputs))[:, :2].max(1)
    found = measured.moments[name_of(RAW)][1]
    np.testing.assert_allclose(found, [own.mean(), own.std()], rtol=1e-4)


def moments(store):
    held = int(store.num_tasks)
    return {name: np.asarray(rows)[:held] for name, rows in store.moments.items()}


def same(got, want):
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])


@pytest.mark.parametrize("labelled", [False, True])
def test_moments_stay_with_their_tasks(problem, tmp_path, labelled):
    net, masks, _, stream = problem
    store = ss.MaskStore.create(net, 5)
    for mask in masks:
        store = store.append(mask, num_labels=2 if labelled else None)
    for objective in (RAW, ss.entropy):
        store = ss.measure_statistics(net, store, stream, objective)
    before = moments(store)
    assert before.keys() == {"MaxLogit(num_labels=3, normalised=0.0)", "entropy"}
    assert all((rows[:, 1] > 0).all() for rows in before.values())

    store.save(tmp_path / "all.supsup")
    same(moments(ss.MaskStore.load(tmp_path / "all.supsup", net)), before)
    with ss.DiskStore.open(tmp_path / "tasks", net, "x") as disk:
        disk.extend(store)
        assert disk.info(3).moments["entropy"] == pytest.approx(tuple(before["entropy"][3]))
        same(moments(disk.load()), before)
        same(moments(disk.load([4, 1])), {name: rows[[4, 1]] for name, rows in before.items()})
        mesh = jax.make_mesh((2,), ("task",), devices=jax.devices()[:2])
        spread = disk.load(mesh=mesh)
    same(moments(spread), before)
    same(moments(spread.gathered()), before)
    same(moments(ss.shard(store, mesh)), before)
    x = np.asarray(stream[0].inputs)
    want = ss.oracle(net, store, x, ss.Standardised(RAW)).scores
    got = ss.oracle(net, spread, x, ss.Standardised(RAW)).scores
    np.testing.assert_allclose(np.asarray(got)[:, :5], want[:, :5], rtol=1e-5, atol=1e-6)

    same(moments(store.remove(1)), {name: np.delete(rows, 1, 0) for name, rows in before.items()})
    # Another mask in its place, or one more, has none until it is measured.
    count = 2 if labelled else None
    for changed, i in (
        (store.replace(2, masks[0], num_labels=count), 2),
        (store.append(masks[0], num_labels=count), 5),
    ):
        after = moments(changed)
        for name, rows in after.items():
            assert (rows[i] == 0).all()
            others = np.delete(np.arange(5), i) if i < 5 else np.arange(5)
            np.testing.assert_array_equal(rows[others], before[name][others])
        with pytest.raises(ss.StoreError, match=f"not task {i} has them: store = measure_statist"):
            ss.oracle(net, changed, x, ss.Standardised(RAW))
        more = [*stream, stream[0]]
        mended = ss.measure_statistics(net, changed, more, RAW, tasks=[i])
        want = before[name_of(RAW)][others]
        np.testing.assert_array_equal(moments(mended)[name_of(RAW)][others], want)
        ss.oracle(net, mended, x, ss.Standardised(RAW))


def test_measuring_over_a_mesh(problem):
    net, _, store, stream = problem
    mesh = jax.make_mesh((2,), ("task",), devices=jax.devices()[:2])
    want = moments(ss.measure_statistics(net, store, stream, RAW))
    got = moments(ss.measure_statistics(net, ss.shard(store, mesh), stream, RAW))
    np.testing.assert_allclose(got[name_of(RAW)], want[name_of(RAW)], rtol=1e-5)


def test_batches_of_a_task_are_measured_as_one(problem):
    net, _, store, stream = problem
    want = moments(ss.measure_statistics(net, store, stream, RAW))
    parts = [
        [(np.asarray(d.inputs)[:5], d.labels[:5]), (np.asarray(d.inputs)[5:], d.labels[5:])]
        for d in stream
    ]
    got = moments(ss.measure_statistics(net, store, parts, RAW))
    np.testing.assert_allclose(got[name_of(RAW)], want[name_of(RAW)], rtol=1e-5)


def test_without_moments_the_error_says_how_to_get_them(problem):
    net, _, store, stream = problem
    judge, x = ss.Standardised(RAW), np.asarray(stream[0].inputs)
    for call in (
        lambda: ss.oracle(net, store, x, judge),
        lambda: ss.rerank(net, store, x, judge=judge),
        lambda: ss.evaluate(net, store, stream, "per_example", objective=judge, rule="oracle"),
        lambda: ss.evaluate(
            net, store, stream, "per_example", rule=ss.Rule("rerank", best=2, judge=judge)
        ),
    ):
        with pytest.raises(ss.StoreError, match="no task has them: store = measure_statistics"):
            call()
    measured = ss.measure_statistics(net, store, stream, RAW)
    for each in (store, measured):  # to measure would not help
        for rule in (ss.one_shot, ss.alpha_gradient, ss.binary_search, ss.rerank):
            with pytest.raises(ValueError, match="judges masks tried alone: pass it to oracle"):
                rule(net, each, x, judge)
    with pytest.raises(TypeError, match="measure the objective itself"):
        ss.measure_statistics(net, store, stream, judge)
    constant = [ss.TaskData(np.zeros((4, 6), np.float32), np.zeros(4, int))] * 5
    with pytest.raises(ValueError, match="scores of task 0 must differ"):
        ss.measure_statistics(net, store, constant, RAW)

    def own(logits):
        return logits[..., 0]

    for nameless in (lambda logits: logits[..., 0], own):
        with pytest.raises(ValueError, match=r"<(lambda|locals>.own)>? is not its alone"):
            ss.measure_statistics(net, store, stream, nameless)
    with pytest.raises(ValueError, match=r"stream\[0\] holds no batch"):
        ss.measure_statistics(net, store, [[]] * 5, RAW)
    for of in (ss.Superfluous, ss.MaxLogit, lambda count: OfLabels(energy, count)):
        assert name_of(of(np.int64(3))) == name_of(of(3))
        with pytest.raises(TypeError, match=r"num_labels must be an int of at least 1, got 2\.0"):
            of(2.0)
    with pytest.raises(IndexError, match="tasks must lie"):
        ss.measure_statistics(net, store, stream, RAW, tasks=[5])
    with pytest.raises(ValueError, match="needs 9 outputs, got 7"):
        ss.oracle(net, store, x, ss.MaxLogit(9))


def test_inside_jit_a_task_without_moments_is_never_named(problem):
    net, _, store, stream = problem
    measured = ss.measure_statistics(net, store, stream, RAW, tasks=[1, 3])
    x = jnp.asarray(stream[0].inputs)
    named = jax.jit(lambda store, x: ss.oracle(net, store, x, ss.Standardised(RAW)))(measured, x)
    assert set(np.asarray(named.task).tolist()) <= {1, 3}


def test_scores_that_differ_in_rounding_alone_have_no_deviation(problem):
    """The mean of seven equal float32 need not be one of them."""
    net, _, store, stream = problem
    x = np.repeat(np.asarray(stream[0].inputs)[:1], 7, axis=0)
    with pytest.raises(ValueError, match="scores of task 0 must differ"):
        ss.measure_statistics(net, store, [ss.TaskData(x, np.zeros(7, int))] * 5, RAW)


@pytest.mark.parametrize(
    "state",
    [{"num_labels": np.int32(1)}, {"moments": {"x": np.ones(2)}}, np.ones(3)],
    ids=["num_labels", "moments", "bare"],
)
def test_a_networks_own_statistics_may_have_any_name(tmp_path, state):
    def apply(params, state, x, train):
        return x @ params["kernel0"], state

    net = ss.Network(apply, relu_net((6, 4)).params, state=state)
    mask = random_masks(net, 1)[0]
    for i, count in enumerate((None, 2)):
        plain = ss.MaskStore.create(net, 2).append(ss.Task(mask, net.state), num_labels=count)
        for j, store in enumerate((plain, plain.with_moments({"entropy": [[1.5, 2]]}))):
            store.save(tmp_path / f"{i}{j}.supsup")
            with ss.DiskStore.open(tmp_path / f"{i}{j}", net, "x") as disk:
                disk.extend(store)
            with ss.DiskStore.open(tmp_path / f"{i}{j}", net) as disk:
                found = disk.load(), ss.MaskStore.load(tmp_path / f"{i}{j}.supsup", net)
            for other in found:
                assert jax.tree.structure(other.bank) == jax.tree.structure(store.bank)
                for one, want in zip(
                    jax.tree.leaves(other.bank.states),
                    jax.tree.leaves(store.bank.states),
                    strict=True,
                ):
                    np.testing.assert_array_equal(one[0], want[0])


FORGED = [
    [],
    None,
    "entropy",
    [["entropy"]],
    {"entropy": 1},
    {"entropy": [1]},
    {"entropy": [1, 2, 3]},
    {"entropy": ["1", "2"]},
    {"entropy": [float("nan"), 1]},
    {"entropy": [0, -1]},
    {"entropy": [0, 1e-60]},
    {"entropy": [10**400, 1]},
]


@pytest.mark.parametrize("forged", FORGED, ids=repr)
def test_forged_moments_are_refused(problem, tmp_path, monkeypatch, forged):
    net, masks, _, _ = problem
    with ss.DiskStore.open(tmp_path / "tasks", net, "x") as disk:
        if forged:
            with pytest.raises((ValueError, TypeError, OverflowError)):
                disk.append(masks[0], moments=forged)
        monkeypatch.setattr(coded, "moments_in", lambda metadata: forged)
        disk.append(masks[0], moments={"entropy": (1, 2)})
        monkeypatch.undo()
        for call in (disk.load, lambda: disk.info(0), lambda: disk.task(0)):
            with pytest.raises(ss.StoreError, match="no sense"):
                call()


def test_names_of_equals_are_equal():
    assert name_of(ss.MaxLogit(np.int64(2), 1)) == name_of(ss.MaxLogit(2, 1.0))
    with pytest.raises(TypeError):
        ss.MaxLogit(2.5)


def test_objectives_are_equal_by_value_and_compile_once(problem):
    net, _, store, stream = problem
    assert ss.MaxLogit(3) == ss.MaxLogit(3) != ss.MaxLogit(2)
    traces = []

    def counted(logits):
        traces.append(logits.shape)
        return ss.max_logit(logits)

    x = np.asarray(stream[0].inputs)
    first = ss.oracle(net, store, x, OfLabels(counted, 3))
    again = ss.oracle(net, store, x, OfLabels(counted, 3))
    np.testing.assert_array_equal(first.scores, again.scores)
    seen = len(traces)
    ss.oracle(net, store, x, OfLabels(counted, 3))
    assert len(traces) == seen


def test_diagnose_is_evaluate_by_every_rule(problem):
    net, _, store, stream = problem
    found = ss.diagnose(net, store, stream)
    assert found.chance == 0.2
    single = [each.task_accuracy for each in found.findings if each.together == 1]
    assert found.best.task_accuracy == max(single)
    first, second = (
        [ss.TaskData(np.asarray(d.inputs)[n::2], np.asarray(d.labels)[n::2]) for d in stream]
        for n in (0, 1)
    )
    measured = ss.measure_statistics(net, store, first, RAW)
    tried = {(each.rule, each.objective, each.together): each for each in found.findings}
    objectives = [ss.entropy, ss.Superfluous(3), RAW, ss.Standardised(RAW)]
    objectives.append(ss.MaxLogit(3, normalised=0.8))
    assert tried.keys() == {
        *(("one_shot", objective, size) for objective in objectives[:2] for size in (1, 6)),
        *(("oracle", objective, size) for objective in objectives for size in (1, 6)),
    }
    metric = ss.LabelAccuracy(3)
    for (rule, objective, size), each in tried.items():
        protocol = "per_example" if size == 1 else f"batch-{size}"
        options = {"objective": objective, "rule": rule, "metric": metric}
        rows = ss.evaluate(net, measured, second, protocol, **options)
        assert each.task_accuracy == pytest.approx(np.mean([row.task_accuracy for row in rows]))
        assert each.accuracy == pytest.approx(np.mean([row.accuracy for row in rows]))
        assert each.decisions == sum(row.decisions for row in rows)
    rows = ss.evaluate(net, store, second, metric=metric)
    assert found.given == pytest.approx(np.mean([row.accuracy for row in rows]))
    assert "Told the task" in str(found)
    assert store.moments == {}
    with pytest.raises(ValueError, match="at least 3 examples"):
        ss.diagnose(net, store, [ss.TaskData(np.ones((2, 6), np.float32), np.zeros(2, int))] * 5)


def test_diagnose_counts_each_tasks_own_labels_and_short_groups():
    """As `evaluate` has it."""
    net = relu_net((5, 16, 5))
    store = ss.MaskStore.create(net, 2)
    for mask, labels in zip(random_masks(net, 2), (2, 4), strict=True):
        store = store.append(mask, num_labels=labels)
    x = np.random.default_rng(0).standard_normal((90, 5), np.float32)
    stream = [ss.TaskData(x[:74], np.arange(74) % 2), ss.TaskData(x, np.arange(90) % 2)]
    found = ss.diagnose(net, store, stream, num_labels=4)
    stream[1] = stream[0]  # as many of each as the smallest has
    second = [ss.TaskData(each.inputs[1::2], each.labels[1::2]) for each in stream]
    for each in found.findings:
        if not isinstance(each.objective, ss.Standardised):
            protocol = "per_example" if each.together == 1 else "batch-16"
            options = {"objective": each.objective, "rule": each.rule}
            rows = ss.evaluate(net, store, second, protocol, **options)
            assert each.task_accuracy == pytest.approx(np.mean([r.task_accuracy for r in rows]))
            assert each.decisions == sum(row.decisions for row in rows)


def of(rule, objective, together, accuracy, decisions=10_000):
    return diagnosis.Finding(rule, objective, together, accuracy, accuracy, decisions)


def said(*findings, advice=("Try views.",)):
    return str(diagnosis.Diagnosis(0.9, 0.2, findings, advice))


def test_words_of_a_diagnosis():
    """One gradient of several inputs is no rival of the best rule of one; chance is no rule."""
    tried, gradient = of("oracle", RAW, 1, 0.5), of("one_shot", ss.entropy, 1, 0.3)
    together = of("oracle", ss.entropy, 16, 0.9), of("one_shot", ss.entropy, 16, 0.91)
    words = said(tried, gradient, *together)
    best = f"rule='oracle', objective={name_of(RAW)}"
    assert f"By one input try each mask: {best}; one gradient names 0.300." in words
    assert "By 16 inputs together one gradient names tasks as well as any other rule" in words
    assert "10,000 decisions, standard error up to 0.005" in words
    assert "Try views." in words
    assert "Try views." not in said(of("oracle", RAW, 1, 0.9), of("one_shot", ss.entropy, 1, 0.3))
    few = of("oracle", RAW, 1, 0.23, 100), of("one_shot", ss.entropy, 1, 0.2, 100)
    assert "no rule names tasks better than chance" in said(*few)


def test_misfit_is_a_loop_over_statistics(norm_net):
    masks = random_masks(norm_net, 3)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((16, 6), np.float32)
    states = [jax.tree.map(lambda s, i=i: s + 0.3 * i + 0.1, norm_net.state) for i in range(3)]
    store = ss.MaskStore.create(norm_net, 4)
    for mask, state in zip(masks, states, strict=True):
        store = store.append(ss.Task(mask, state))
    want = []
    for mask, state in zip(masks, states, strict=True):
        hidden = x @ (np.asarray(norm_net.params["layer0"]["kernel"]) * mask["layer0"]["kernel"])
        batch = {"mean": hidden.mean(0), "var": hidden.var(0)}
        each = []
        for name, own in batch.items():
            task = np.asarray(state["norm"][name])
            each.append(((own - task) ** 2).sum() / ((own**2).sum() + (task**2).sum()))
        want.append(-np.mean(each))
    got = ss.misfit(norm_net, store, x)
    np.testing.assert_allclose(got.scores[:3], want, rtol=1e-4)
    assert got.task == np.argmax(want)
    mesh = jax.make_mesh((2, 2), ("task", "data"), devices=jax.devices()[:4])
    spread = ss.misfit(norm_net, ss.shard(store, mesh), x)
    np.testing.assert_allclose(np.asarray(spread.scores)[:3], want, rtol=1e-4)
    data = [ss.TaskData(x, np.zeros(16, int))] * 3
    rows = ss.evaluate(norm_net, store, data, "batch-16", rule="misfit")
    assert [int(row.inferred[0]) for row in rows] == [np.argmax(want)] * 3
    with pytest.raises(ValueError, match="several inputs that decide together"):
        ss.misfit(norm_net, store, x, per_example=True)


def test_misfit_wants_statistics(problem):
    net, _, store, stream = problem
    with pytest.raises(ValueError, match="this network keeps none"):
        ss.misfit(net, store, np.asarray(stream[0].inputs))
