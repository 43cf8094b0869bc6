import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import supsup_jax as ss
from supsup_jax.inference import evaluation
from tests.conftest import NormNet, filled_store, random_masks


@pytest.fixture
def problem(small_net):
    """Three random tasks, each with 23 labelled images of its own: two batches of 10 and a rest."""
    store = filled_store(small_net, random_masks(small_net, 3), capacity=4)
    rng = np.random.default_rng(0)
    stream = [
        ss.TaskData(
            jnp.asarray(rng.integers(0, 256, (23, 6)), jnp.uint8),
            jnp.asarray(rng.integers(0, 5, 23), jnp.int32),
            jnp.asarray(rng.permutation(6), jnp.int32),
        )
        for _ in range(3)
    ]
    return small_net, store, stream


def by_hand(net, store, data, true, decide):
    """The same figures from single images and plain loops; decide(x) -> task of each image."""
    x, y = data.batch(jnp.arange(data.num_examples))
    tasks = decide(x)
    right = [
        int(ss.predict(net, store, x[i : i + 1], int(t))[0].argmax()) == int(y[i])
        for i, t in enumerate(tasks)
    ]
    under = [int(t) == true for t in tasks]
    return np.mean(np.logical_and(right, under)), np.mean(right)


def groups(x, size):
    return [x[i : i + size] for i in range(0, len(x), size)]


def deciders(net, store, protocol):
    one = lambda x: int(ss.one_shot(net, store, x, per_example=False).task)  # noqa: E731
    return {
        "per_example": lambda x: [one(row[None]) for row in x],
        "paper": lambda x: [t for g in groups(x, 10) for t in [one(g[:1])] * len(g)],
        "batch-4": lambda x: [t for g in groups(x, 4) for t in [one(g)] * len(g)],
    }[protocol]


@pytest.mark.parametrize(
    ("protocol", "decisions"), [("per_example", 23), ("paper", 3), ("batch-4", 6)]
)
def test_inferred_protocols_equal_plain_loops(problem, protocol, decisions):
    net, store, stream = problem
    rows = ss.evaluate(net, store, stream, protocol, batch_size=10)
    assert [row.task for row in rows] == [0, 1, 2]
    for row, data in zip(rows, stream, strict=True):
        decide = deciders(net, store, protocol)
        accuracy, shared = by_hand(net, store, data, row.task, decide)
        assert row.accuracy == pytest.approx(accuracy)
        assert row.shared_accuracy == pytest.approx(shared)
        assert row.decisions == decisions == len(row.inferred)
        assert row.task_accuracy == pytest.approx(np.mean(row.inferred == row.task))
        assert row.inferred.min() >= 0
        assert row.inferred.max() < 3


def test_given_ids_equal_plain_loops(problem):
    net, store, stream = problem
    for row, data in zip(
        ss.evaluate(net, store, stream, "given", batch_size=10), stream, strict=True
    ):
        accuracy, _ = by_hand(net, store, data, row.task, lambda x, t=row.task: [t] * len(x))
        assert row.accuracy == row.shared_accuracy == pytest.approx(accuracy)
        assert row.task_accuracy is None
        assert row.decisions == 0


def test_a_stateful_network_takes_statistics_from_its_context(norm_net):
    tasks = [ss.Task(mask, norm_net.state) for mask in random_masks(norm_net, 3)]
    store = filled_store(norm_net, tasks)
    rng = np.random.default_rng(0)
    data = ss.TaskData(
        jnp.asarray(rng.integers(0, 256, (12, 6)), jnp.uint8), jnp.zeros(12, jnp.int32)
    )
    x, _ = data.batch(jnp.arange(12))
    for protocol, want in (
        (
            "per_example",
            np.concatenate([ss.one_shot(norm_net, store, g).task for g in groups(x, 8)]),
        ),
        ("paper", [ss.one_shot(norm_net, store, g).task[0] for g in groups(x, 8)]),
        (
            "batch-4",
            [ss.one_shot(norm_net, store, g, per_example=False).task for g in groups(x, 4)],
        ),
    ):
        row = ss.evaluate(norm_net, store, [data] * 3, protocol, batch_size=8)[0]
        np.testing.assert_array_equal(row.inferred, np.asarray(want))


def test_one_compilation_serves_every_task_and_number_of_tasks(problem, small_net):
    net, store, stream = problem
    evaluation._inferred.clear_cache()
    evaluation._given.clear_cache()
    for _ in range(2):
        ss.evaluate(net, store, stream, "per_example", batch_size=10)
        ss.evaluate(net, store, stream, "given", batch_size=10)
        store, stream = store.append(random_masks(small_net, 1, seed=9)[0]), [*stream, stream[0]]
    assert evaluation._inferred._cache_size() == 1
    assert evaluation._given._cache_size() == 1


@pytest.mark.parametrize(
    ("rule", "protocol"),
    [
        ("oracle", "per_example"),
        (ss.Rule("rerank", best=2, judge=ss.max_logit), "paper"),
        (ss.Rule("binary_search", base=3), "batch-4"),
    ],
    ids=("oracle", "rerank", "binary_search"),
)
def test_rules_equal_plain_loops(problem, rule, protocol):
    net, store, stream = problem
    decide = ss.Rule(rule) if isinstance(rule, str) else rule
    (row,) = ss.evaluate(net, store, stream, protocol, rule=rule, batch_size=10, tasks=[1])
    x, _ = stream[1].batch(jnp.arange(23))
    if protocol == "per_example":
        want = np.asarray(decide(net, store, x).task)
    elif protocol == "paper":
        want = np.concatenate([decide(net, store, g[:1]).task for g in groups(x, 10)])
    else:
        want = np.stack([decide(net, store, g, per_example=False).task for g in groups(x, 4)])
    np.testing.assert_array_equal(row.inferred, want)
    each = np.repeat(want, {"per_example": 1, "paper": 10, "batch-4": 4}[protocol])[:23]
    accuracy, shared = by_hand(net, store, stream[1], 1, lambda x: each)
    assert row.accuracy == pytest.approx(accuracy)
    assert row.shared_accuracy == pytest.approx(shared)


@pytest.mark.parametrize("protocol", ["per_example", "paper"])
def test_a_rule_sees_the_whole_context_of_a_stateful_network(norm_net, protocol):
    store = filled_store(
        norm_net, [ss.Task(mask, norm_net.state) for mask in random_masks(norm_net, 3)]
    )
    images = jax.random.randint(jax.random.key(0), (12, 6), 0, 256).astype(jnp.uint8)
    data = ss.TaskData(images, jnp.zeros(12, jnp.int32))
    rule = ss.Rule("rerank", best=1)  # names what one_shot does
    row = ss.evaluate(norm_net, store, [data] * 3, protocol, rule=rule, batch_size=8)[0]
    want = [ss.one_shot(norm_net, store, g).task for g in groups(data.batch(jnp.arange(12))[0], 8)]
    want = np.concatenate(want if protocol == "per_example" else [ids[:1] for ids in want])
    np.testing.assert_array_equal(row.inferred, want)


def first_or_nothing(net, store, x, objective, per_example):
    """Task 0 for an input that is bright, none for the others."""
    scores = jnp.where(store.slots, -jnp.arange(store.capacity, dtype=jnp.float32), -jnp.inf)
    bright = x.mean(axis=tuple(range(1 if per_example else 0, x.ndim))) > 0.5
    return ss.TaskBelief(jnp.where(bright, 0, -1), jnp.broadcast_to(scores, (*bright.shape, 4)))


def test_a_function_as_rule_may_refuse(problem):
    net, store, stream = problem
    (row,) = ss.evaluate(net, store, stream, "per_example", rule=first_or_nothing, tasks=[0])
    x, y = stream[0].batch(jnp.arange(23))
    bright = np.asarray(x.mean(1) > 0.5)
    np.testing.assert_array_equal(row.inferred, np.where(bright, 0, -1))
    right = np.asarray(ss.predict(net, store, x, 0).argmax(-1) == y)
    assert 0 < bright.mean() < 1
    assert row.accuracy == row.shared_accuracy == pytest.approx(np.mean(right & bright))
    assert row.task_accuracy == pytest.approx(bright.mean())


def test_rules_that_are_equal_share_one_compilation(problem, small_net):
    net, store, stream = problem
    evaluation._inferred.clear_cache()
    for seed in range(3):
        for rule in ("rerank", ss.Rule("rerank")):
            ss.evaluate(net, store, stream, "per_example", rule=rule, batch_size=10)
        if seed:
            continue
        store, stream = store.append(random_masks(small_net, 1, seed=9)[0]), [*stream, stream[0]]
    assert evaluation._inferred._cache_size() == 1
    for rule in (None, "one_shot", ss.Rule("one_shot")):
        ss.evaluate(net, store, stream, "per_example", rule=rule, batch_size=10)
    assert evaluation._inferred._cache_size() == 2


def test_only_learned_tasks_are_judged(problem):
    net, store, stream = problem
    assert len(ss.evaluate(net, store, stream * 2)) == 3


def test_chosen_tasks_only(problem):
    net, store, stream = problem
    everything = ss.evaluate(net, store, stream, "per_example")
    for got, want in zip(
        ss.evaluate(net, store, stream, "per_example", tasks=[2, 0]), everything[::-2], strict=True
    ):
        assert (got.task, got.accuracy) == (want.task, want.accuracy)


def test_masks_that_were_found_stand_for_other_tasks(problem):
    """Four streams for three masks: two share mask 2, and the last has none."""
    net, store, stream = problem
    shifted = [stream[2], stream[0], stream[2], stream[1]]
    ids = [2, 0, 2, -1]
    want = ss.evaluate(net, store, stream, "per_example")
    rows = ss.evaluate(net, store, shifted, "per_example", ids=ids)
    assert [row.task for row in rows] == [0, 1, 2, 3]
    for row, i in zip(rows, [2, 0, 2], strict=False):
        assert row.accuracy == want[i].accuracy
        assert row.task_accuracy == want[i].task_accuracy
    assert rows[3].accuracy == rows[3].task_accuracy == 0
    assert rows[3].shared_accuracy == want[1].shared_accuracy
    given = ss.evaluate(net, store, shifted, ids=np.asarray(ids), tasks=[0, 1])
    for row, i in zip(given, [2, 0], strict=True):
        assert row.accuracy == ss.evaluate(net, store, stream, tasks=[i])[0].accuracy


def test_progress_wraps_the_loop(problem):
    net, store, stream = problem
    seen = []

    def progress(tasks):
        for task in tasks:
            seen.append(task)
            yield task

    ss.evaluate(net, store, stream, progress=progress)
    assert seen == [0, 1, 2]


def test_a_task_may_come_in_batches(problem):
    net, store, stream = problem

    def batches(data):
        for start in range(0, 23, 9):
            yield dataclasses.replace(
                data, images=data.images[start : start + 9], labels=data.labels[start : start + 9]
            )

    want = ss.evaluate(net, store, stream)
    got = ss.evaluate(net, store, [batches(stream[0]), stream[1], list(batches(stream[2]))])
    assert [row._replace(inferred=None) for row in got] == [
        row._replace(inferred=None) for row in want
    ]
    with pytest.raises(TypeError, match=r"stream\[0\] must be a TaskData unless ids are given"):
        ss.evaluate(net, store, [[stream[0]]] * 3, "paper")
    with pytest.raises(TypeError, match=r"batch 1 of stream\[0\] must be a TaskData, got int"):
        ss.evaluate(net, store, [[stream[0], 1]] * 3)
    with pytest.raises(ValueError, match=r"stream\[1\] must hold at least one batch, got none"):
        ss.evaluate(net, store, [stream[0], [], stream[2]])


def test_bad_input(problem):
    net, store, stream = problem
    for protocol in ("oracle", "batch-", "batch-0", "batch-x", None):
        with pytest.raises(ValueError, match="protocol must be one of"):
            ss.evaluate(net, store, stream, protocol)
    with pytest.raises(ValueError, match="test data of 3 tasks, got 2"):
        ss.evaluate(net, store, stream[:2])
    with pytest.raises(TypeError, match=r"such as a stream's \.test, got object"):
        ss.evaluate(net, store, object())
    with pytest.raises(ValueError, match="batch_size must be an int of at least 1"):
        ss.evaluate(net, store, stream, batch_size=0)
    with pytest.raises(TypeError, match="objective must be a hashable function"):
        ss.evaluate(net, store, stream, "paper", objective="entropy")
    with pytest.raises(TypeError, match="store must be a MaskStore"):
        ss.evaluate(net, {}, stream)
    with pytest.raises(ValueError, match=r"tasks must lie in \[0, 3\), got 3"):
        ss.evaluate(net, store, stream, tasks=[0, 3])
    with pytest.raises(
        ValueError, match=r"lie in \[0, 3\) under protocol 'given', got -1 for task 1"
    ):
        ss.evaluate(net, store, stream, ids=[0, -1, 1])
    with pytest.raises(ValueError, match=r"ids must lie in \[-1, 3\) .* got 3 for task 0"):
        ss.evaluate(net, store, stream, "paper", ids=[3])
    with pytest.raises(ValueError, match="test data of 4 tasks, got 3"):
        ss.evaluate(net, store, stream, ids=[0, 1, 2, 0])
    with pytest.raises(ValueError, match=r"tasks must lie in \[0, 2\), got 2"):
        ss.evaluate(net, store, stream, ids=[0, 1], tasks=[2])
    beyond = dataclasses.replace(stream[0], labels=stream[0].labels + 5)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 5\)"):
        ss.evaluate(net, store, [beyond] * 3)
    with pytest.raises(TypeError, match=r"stream\[0\] must be a TaskData"):
        ss.evaluate(net, store, [1, 2, 3])
    with pytest.raises(ValueError, match="the store is empty"):
        ss.evaluate(net, ss.MaskStore.create(net), [])
    with pytest.raises(ValueError, match=r"rule must be one of \['binary_search', .*got 'best'"):
        ss.evaluate(net, store, stream, "paper", rule="best")
    with pytest.raises(TypeError, match="rule must be a name, a Rule, or a hashable function"):
        ss.evaluate(net, store, stream, "paper", rule=[ss.oracle])
    with pytest.raises(TypeError, match=r"rule must return a TaskBelief whose task has shape \(1,"):
        ss.evaluate(net, store, stream, "paper", rule=lambda *_, **__: 0)
    with pytest.raises(ValueError, match=r"'batch-24' needs at least 24 test .* holds 23"):
        ss.evaluate(net, store, stream, "batch-24")
    assert len(ss.evaluate(net, store, stream, "batch-23", tasks=[0])[0].inferred) == 1
    assert jax.tree.leaves(store)  # and nothing was consumed


def test_statistics_shared_between_tasks_lose_all_but_the_last():
    """The reference's best known bug (its issue 11), and that it is not here."""
    net = ss.signed_constant(ss.Network.from_nnx(NormNet((16, 64, 4), rngs=nnx.Rngs(0))), 0)
    rng = np.random.default_rng(0)
    labels = np.arange(400) % 4
    means = rng.integers(0, 80, (4, 16))
    images = (means[labels] + rng.integers(0, 30, (400, 16))).astype(np.uint8)
    config = ss.TrainConfig(steps=150, batch_size=50, optimizer="adam", learning_rate=0.02)
    # The second task's images are negatives: bright where the first's are dark.
    tasks = [ss.TaskData(jnp.asarray(x), jnp.asarray(labels)) for x in (images, 255 - images)]
    learned = [ss.train_task(jax.random.key(i), net, t, config).task for i, t in enumerate(tasks)]
    own, shared = ss.MaskStore.create(net, 2), ss.MaskStore.create(net, 2)
    for task in learned:
        own = own.append(task)
        shared = shared.append(task._replace(state=learned[-1].state))
    kept = [row.accuracy for row in ss.evaluate(net, own, tasks)]
    lost = [row.accuracy for row in ss.evaluate(net, shared, tasks)]
    assert min(kept) > 0.9
    assert lost[1] == kept[1]
    assert lost[0] < 0.5  # chance is 0.25
