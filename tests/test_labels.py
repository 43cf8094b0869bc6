"""Tasks of unequal numbers of labels: each task's score by its own F, in every form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import supsup_jax as ss
from supsup_jax.inference import schedule
from tests.conftest import random_masks, relu_net

COUNTS = (2, 3, 2, 5, 3)


@pytest.fixture(scope="module")
def problem():
    net = relu_net((6, 12, 9))
    masks = random_masks(net, 5)
    store = ss.MaskStore.create(net, 8)
    for mask, count in zip(masks, COUNTS, strict=True):
        store = store.append(mask, donate=True, num_labels=count)
    x = np.random.default_rng(0).standard_normal((20, 6), np.float32)
    return net, masks, store, x


def by_hand(net, masks, x, counts=COUNTS):
    """Scores [B, T]: -d log G / da, less its mean over the tasks, G of each task's own labels."""
    mix = {name: np.mean([m[name] for m in masks], axis=0, dtype=np.float32) for name in masks[0]}

    @functools.partial(jax.jit, static_argnums=1)
    @functools.partial(jax.grad, argnums=2)
    def slope_of(row, count, mix):
        logits = net(mix, row[None])[0]
        labels = jax.lax.stop_gradient(logits[:count])
        both = jnp.concatenate([labels, logits[count:]])
        g = jax.nn.logsumexp(both) - jax.nn.logsumexp(labels)
        return jnp.log(g + 1e-6)

    def slopes(row, count):
        slope = slope_of(row, count, mix)
        return [-sum(np.vdot(slope[k], np.asarray(m[k], np.float32)) for k in slope) for m in masks]

    rows = []
    for row in x:
        each = {count: np.array(slopes(row, count)) for count in set(counts)}
        rows.append([each[c][i] - each[c].mean() for i, c in enumerate(counts)])
    return np.array(rows)


@pytest.mark.parametrize("form", ["tangents", "gradients", "many"])
def test_one_shot_by_each_tasks_own_labels(problem, form, monkeypatch):
    net, masks, store, x = problem
    # Of other shapes, so that each is traced here.
    x = {"tangents": x[:18], "gradients": x[:4], "many": x[:17]}[form]
    if form == "many":  # as on a GPU
        default = lambda *args, cpu, default: default(*args)  # noqa: E731
        monkeypatch.setattr(jax.lax, "platform_dependent", default)
    decisions = schedule.Decisions(x[:, None])
    assert (decisions.num >= schedule.TANGENTS_FROM) == (form != "gradients")
    found = ss.one_shot(net, store, x, ss.Superfluous(5))
    want = by_hand(net, masks, x)
    np.testing.assert_allclose(found.scores[:, :5], want, rtol=1e-3, atol=1e-4)
    assert (found.scores[:, 5:] == -np.inf).all()


@pytest.mark.parametrize("capacity", [8, 1024])
def test_a_search_compares_its_survivors_alone(problem, capacity):
    """Round by round as one_shot among them would, however large the store is."""
    net, masks, _, x = problem
    store, clear = ss.MaskStore.create(net, capacity), 0
    for mask, count in zip(masks, COUNTS, strict=True):
        store = store.append(mask, donate=True, num_labels=count)
    found = ss.binary_search(net, store, x[:8], ss.Superfluous(5))
    for row, got in zip(x[:8], np.asarray(found.scores), strict=True):
        alive, survived, least = np.arange(5), np.zeros(5), np.inf
        while len(alive) > 1:
            counts = [COUNTS[i] for i in alive]
            (scores,) = by_hand(net, [masks[i] for i in alive], row[None], counts)
            order, kept = np.argsort(-scores, kind="stable"), (len(alive) - 1) // 2 + 1
            least = min(least, scores[order[kept - 1]] - scores[order[kept]])
            alive = alive[np.sort(order[:kept])]
            survived[alive] += 1
        if least > 1e-3:  # else rounding decides
            np.testing.assert_array_equal(got[:5], survived)
            clear += 1
    assert clear > 4


def test_rules_and_evaluate_judge_by_each_tasks_own_labels(problem):
    net, masks, store, x = problem
    forward = jax.jit(lambda mask: net(mask, x))
    logits = [np.asarray(forward(mask)) for mask in masks]
    own = [-ss.Superfluous(c)(each) for c, each in zip(COUNTS, logits, strict=True)]
    scores = np.stack(own, axis=1)
    found = ss.oracle(net, store, x, ss.Superfluous(5))
    np.testing.assert_allclose(found.scores[:, :5], scores, rtol=1e-4, atol=1e-5)
    short = ss.rerank(net, store, x, ss.Superfluous(5), best=5)
    np.testing.assert_allclose(short.scores[:, :5], scores, rtol=1e-4, atol=1e-5)
    top = np.stack([each[:, :c].max(1) for c, each in zip(COUNTS, logits, strict=True)], axis=1)
    judged = ss.oracle(net, store, x, ss.max_logit)
    np.testing.assert_allclose(judged.scores[:, :5], top, rtol=1e-4, atol=1e-5)
    data = ss.TaskData(x, np.zeros(20, int))
    rows = ss.evaluate(net, store, [data] * 5, "per_example", objective=ss.Superfluous(5))
    shot = ss.one_shot(net, store, x, ss.Superfluous(5))
    np.testing.assert_array_equal(rows[0].inferred, shot.task)
    alone = ss.binary_search(net, store, x[:1], ss.Superfluous(5), base=5)  # one round: one_shot
    assert alone.task[0] == shot.task[0]


def test_equal_numbers_and_objectives_that_count_none_change_nothing(problem):
    net, masks, store, x = problem
    plain, alike = (ss.MaskStore.create(net, 8) for _ in range(2))
    for mask in masks:
        plain, alike = plain.append(mask), alike.append(mask, num_labels=4)
    pairs = (store, ss.entropy), (alike, ss.entropy), (alike, ss.Superfluous(4))
    for other, objective in pairs:
        want = ss.one_shot(net, plain, x, objective).scores
        np.testing.assert_array_equal(ss.one_shot(net, other, x, objective).scores, want)


def test_numbers_go_where_the_tasks_go(problem, tmp_path):
    net, masks, store, _ = problem

    def numbers(store):
        return np.asarray(store.num_labels)[: int(store.num_tasks)].tolist()

    assert numbers(store) == list(COUNTS)
    assert store.label_counts == (2, 3, 5)
    store.save(tmp_path / "masks.supsup")
    again = ss.MaskStore.load(tmp_path / "masks.supsup", net)
    assert (numbers(again), again.label_counts) == (list(COUNTS), (2, 3, 5))
    assert numbers(store.remove(1)) == [2, 2, 5, 3]
    assert numbers(store.replace(0, masks[0], num_labels=7)) == [7, 3, 2, 5, 3]
    assert store.remove(3).label_counts == (2, 3)
    assert store.replace(3, masks[0], num_labels=2).label_counts == (2, 3)
    mesh = jax.make_mesh((2,), ("task",))
    shared = ss.shard(store, mesh)
    assert numbers(shared.gathered()) == list(COUNTS)
    x = np.random.default_rng(1).standard_normal((3, 6), np.float32)
    here, there = (ss.one_shot(net, each, x, ss.Superfluous(5)) for each in (store, shared))
    np.testing.assert_array_equal(here.task, there.task)
    here, there = (np.asarray(each.scores)[:, :5] for each in (here, there))
    np.testing.assert_allclose(here, there, rtol=1e-4, atol=1e-5)
    with ss.DiskStore.open(tmp_path / "tasks", net, mode="a") as disk:
        disk.extend(store)
        disk.replace(1, masks[1], num_labels=4)
        assert disk.info(1).num_labels == 4
        want = [2, 4, 2, 5, 3]
        for loaded in (disk.load(), disk.load(mesh=mesh)):
            assert (numbers(loaded), loaded.label_counts) == (want, (2, 3, 4, 5))
            np.testing.assert_array_equal(ss.one_shot(net, loaded, x).task.shape, (3,))
        disk.append(masks[0], labels=["paid", "open"])
        for tasks, on, lacks in (None, None, "lacks"), ([5, 0], None, "has"), (None, mesh, "lacks"):
            with pytest.raises(ss.StoreError, match=f"or of none, and task . {lacks} it"):
                disk.load(tasks, mesh=on)
        assert disk.load([5]).num_labels is None
    grown = ss.MaskStore.create(net, 1).append(masks[0], num_labels=2)
    assert numbers(grown.append(masks[1], num_labels=3)) == [2, 3]


def test_bad_input(problem):
    net, masks, store, x = problem
    with pytest.raises(ValueError, match="pass this one's, too"):
        store.append(masks[0])
    plain = ss.MaskStore.create(net, 8).append(masks[0])
    with pytest.raises(ValueError, match="told of all tasks of a store or of none"):
        plain.append(masks[1], num_labels=3)
    for count in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="num_labels must be an int of at least 1"):
            store.append(masks[0], num_labels=count)
    with pytest.raises(ValueError, match="a certificate is of one gradient"):
        ss.one_shot(net, store, x, ss.Superfluous(5), implementation="certified")
    with pytest.raises(ValueError, match="must have one number of labels"):
        ss.one_shot_streamed(net, [store], x, ss.Superfluous(5))
    alike = ss.MaskStore.create(net, 2).append(masks[0], num_labels=3)
    alike = alike.append(masks[1], num_labels=3)
    np.testing.assert_allclose(
        ss.one_shot_streamed(net, [alike], x, ss.Superfluous(5)).scores,
        ss.one_shot(net, alike, x, ss.Superfluous(5)).scores,
        rtol=1e-4,
        atol=1e-6,
    )
    with pytest.raises(ValueError, match=r"Superfluous\(9\) needs more than 9 outputs"):
        ss.one_shot(net, store.replace(0, masks[0], num_labels=9), x, ss.Superfluous(5))
