"""The table of class_incremental is what the library's own rules give, and its sums are plain."""

import jax
import numpy as np
import pytest

import supsup_jax as ss
from experiments import class_incremental
from experiments.class_incremental import TINY, Args, network, tasks_of
from experiments.frame import judging
from supsup_jax import data

pytestmark = pytest.mark.scripts
VIEWS = ss.LabelledViews(2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return out, class_incremental.main(Args(tiny=True, out=out / "run"))


def rows_of(result, **fields):
    return [
        row for row in result["rows"] if all(row[name] == each for name, each in fields.items())
    ]


def test_rows_are_those_of_the_librarys_rules(run):
    out, result = run
    net, views = network(TINY), TINY.views
    labels = TINY.tasks * TINY.classes
    dataset = data.synthetic(jax.random.key(0), (32, 32, 3), labels, 20 * labels, 20 * labels)
    _, held, test = tasks_of(TINY, dataset)
    with ss.DiskStore.open(out / "run" / "views", net) as disk:
        store = disk.load()
    averaged, raw = views.averaged(net), ss.MaxLogit(TINY.classes)
    right = {"metric": ss.LabelAccuracy(TINY.classes)}
    measured = ss.measure_statistics(averaged, store, held, raw)
    for rule, objective in (("max logit", raw), ("max logit, standardised", ss.Standardised(raw))):
        (row,) = rows_of(result, training="views", network="all views", rule=rule)
        for group, protocol in ((1, "per_example"), (5, "batch-5")):
            how = right | {"objective": objective, "rule": "oracle"}
            found = ss.evaluate(averaged, measured, test, protocol, **how)
            for name, field in ((f"task_{group}", "task_accuracy"), (f"cil_{group}", "accuracy")):
                want = np.mean([getattr(each, field) for each in found])
                # Of 120 images, one may stand between two masks in the last bit.
                assert row[name] == pytest.approx(want, abs=0.04)
        given = np.mean([each.accuracy for each in ss.evaluate(averaged, store, test, **right)])
        assert row["given"] == pytest.approx(given, abs=0.02)


def test_a_finished_run_is_left_alone_and_resumed(run, capsys):
    out, result = run
    with pytest.raises(SystemExit):
        class_incremental.main(Args(tiny=True, out=out / "run"))
    assert "--resume" in capsys.readouterr().err
    again = class_incremental.main(Args(tiny=True, out=out / "run", resume=True))
    assert again["rows"] == result["rows"]
    assert result["bytes_a_task"]["mean and deviation of a rule"] == 8


def test_averages_are_the_networks():
    net, rng = network(TINY), np.random.default_rng(0)
    mask = net.layout.tree([rng.random(shape) < 0.5 for shape in net.layout.shapes.values()])
    x = rng.standard_normal((4, 32, 32, 3), np.float32)
    state = jax.tree.map(lambda leaf: leaf + 0.5, net.state)
    logits = np.stack([net(mask, view(x), state) for view in VIEWS.views])
    want = VIEWS.averaged(net)(mask, x, state)
    np.testing.assert_allclose(judging.averaged(VIEWS, logits), want, rtol=1e-4, atol=1e-5)


def test_own_view_and_groups_by_loops():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((4, 3, 12, 8))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    want = sum(np.log(p[v, ..., 2 * v : 2 * v + 2].sum(-1)) for v in range(4))
    np.testing.assert_allclose(judging.own_view(VIEWS, logits), want, rtol=1e-5, atol=1e-5)
    scores, right = rng.standard_normal((3, 12)), rng.random((3, 12)) < 0.7
    of_task = np.repeat(np.arange(3), 4)
    named, correct = [], []
    for start in range(0, 12, 2):
        task = max(range(3), key=lambda i, s=start: scores[i, s] + scores[i, s + 1])
        named.append(task == of_task[start])
        correct += [named[-1] and right[of_task[start], start + k] for k in range(2)]
    got = judging.judged(scores, right, of_task, 2)
    assert got == pytest.approx((np.mean(named), np.mean(correct)))
    assert judging.judged(scores, right, of_task, 5) == (None, None)


def test_mahalanobis_and_refusals_by_loops():
    rng = np.random.default_rng(0)
    features, own = rng.standard_normal((2, 5, 3)), [rng.standard_normal((20, 3)) for _ in range(2)]
    labels = [np.arange(20) % 2] * 2
    got = judging.mahalanobis(features, own, labels)
    for i in range(2):
        means = [own[i][labels[i] == c].mean(0) for c in range(2)]
        spread = sum(np.outer(f - means[y], f - means[y]) for f, y in zip(own[i], labels[i])) / 20  # noqa: B905
        shrunk = 0.9 * spread + 0.1 * np.trace(spread) / 3 * np.eye(3)
        for n, f in enumerate(features[i]):
            want = -min((f - m) @ np.linalg.solve(shrunk, f - m) for m in means)
            assert got[i, n] == pytest.approx(want)
    known, strangers = np.array([[1.0, 3, 2], [2, 0, 0]]), np.array([[0.0, 2], [1, 1]])
    found = judging.refusals(known, np.array([[1.0, 2, 3, 4]]), strangers, 0.25)
    # Best scores: known 2 3 2, held-out 1 2 3 4 (threshold 1.75), strangers 1 2.
    assert found == {"false_alarms": 0, "misses": 0.5, "auroc": pytest.approx(5 / 6)}
