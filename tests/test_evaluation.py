import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import supsup_jax as ss
from supsup_jax.inference import evaluation
from tests.conftest import NormNet, filled_store, random_masks, relu_net

evaluate = functools.partial(ss.evaluate, batch_size=10)


@pytest.fixture(scope="module")
def problem():
    """Three random tasks, each with 23 labelled images of its own: two batches of 10 and a rest."""
    net = relu_net((6, 6, 5))
    store = filled_store(net, random_masks(net, 3), capacity=4)
    rng = np.random.default_rng(0)
    stream = [
        ss.TaskData(
            rng.integers(0, 256, (23, 6), np.uint8),
            rng.integers(0, 5, 23, np.int32),
            rng.permutation(6).astype(np.int32),
        )
        for _ in range(3)
    ]
    return net, store, stream


def by_hand(net, store, data, true, tasks):
    """(accuracy, shared accuracy) of images judged each under the task of `tasks`."""
    x, y = batch(data)
    answers = np.stack([np.argmax(ss.predict(net, store, x, i), -1) for i in range(3)])
    right = answers[np.asarray(tasks), np.arange(len(x))] == np.asarray(y)
    return np.mean(right & (np.asarray(tasks) == true)), np.mean(right)


def batch(data):
    """All of a TaskData as the network takes it, in NumPy."""
    everything = np.arange(data.num_examples)
    return jax.device_get(jax.jit(lambda data: data.batch(everything))(data))


def first_images(data, num):
    return dataclasses.replace(data, inputs=data.inputs[:num], labels=data.labels[:num])


def groups(x, size):
    return [x[i : i + size] for i in range(0, len(x), size)]


def test_one_compilation_serves_tasks_and_equal_rules(problem):
    net, store, stream = problem
    larger = store.append(random_masks(net, 1, seed=9)[0])
    for program in (evaluation._inferred, evaluation._given):
        program.clear_cache()
    for held, data in ((store, stream), (larger, [*stream, stream[0]])):
        for rule in (None, "one_shot", ss.Rule("one_shot")):
            evaluate(net, held, data, "per_example", rule=rule)
        evaluate(net, held, data, "given")
    assert evaluation._inferred._cache_size() == evaluation._given._cache_size() == 1
    for held, data in ((store, stream), (larger, [*stream, stream[0]])):
        for rule in ("oracle", ss.Rule("oracle")):
            evaluate(net, held, data, "per_example", rule=rule)
    assert evaluation._inferred._cache_size() == 2


@pytest.mark.parametrize(
    ("protocol", "rule"),
    [
        ("per_example", None),
        ("paper", None),
        ("batch-4", None),
        ("per_example", "oracle"),
        ("paper", ss.Rule("rerank", best=2, judge=ss.max_logit)),
        ("batch-4", ss.Rule("binary_search", base=3)),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_inferred_protocols_equal_plain_loops(problem, protocol, rule):
    net, store, stream = problem
    name = ss.Rule(rule) if isinstance(rule, str) else rule or ss.one_shot
    num = 20 if rule else 23  # what is left over decides as by any rule
    stream = [first_images(data, num) for data in stream]
    rows = evaluate(net, store, stream, protocol, rule=rule)
    assert [row.task for row in rows] == [0, 1, 2]
    for row, data in zip(rows, stream, strict=True):
        x, _ = batch(data)
        size = {"per_example": 1, "paper": 10, "batch-4": 4}[protocol]
        deciding = [group[:1] if protocol == "paper" else group for group in groups(x, size)]
        named = [int(name(net, store, g, per_example=False).task) for g in deciding]
        np.testing.assert_array_equal(row.inferred, named)
        accuracy, shared = by_hand(net, store, data, row.task, np.repeat(named, size)[:num])
        assert row.accuracy == pytest.approx(accuracy)
        assert row.shared_accuracy == pytest.approx(shared)
        assert row.decisions == len(named) == -(-num // size)
        assert row.task_accuracy == pytest.approx(np.mean(np.asarray(named) == row.task))


def test_given_ids_equal_plain_loops(problem):
    net, store, stream = problem
    for row, data in zip(evaluate(net, store, stream, "given"), stream, strict=True):
        accuracy, _ = by_hand(net, store, data, row.task, [row.task] * 23)
        assert row.accuracy == row.shared_accuracy == pytest.approx(accuracy)
        assert row.task_accuracy is None
        assert row.decisions == 0


@pytest.mark.parametrize(
    ("protocol", "rule"),
    [
        ("per_example", None),
        ("paper", None),
        ("batch-4", None),
        ("per_example", ss.Rule("rerank", best=1)),  # names what one_shot does
        ("paper", ss.Rule("rerank", best=1)),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_stateful_network_takes_statistics_from_its_context(norm_net, protocol, rule):
    tasks = [ss.Task(mask, norm_net.state) for mask in random_masks(norm_net, 3)]
    store = filled_store(norm_net, tasks, capacity=4)
    rng = np.random.default_rng(0)
    num = 8 if rule else 12  # contexts of 8, and one of 4
    data = ss.TaskData(rng.integers(0, 256, (num, 6), np.uint8), np.zeros(num, np.int32))
    x, _ = batch(data)
    if protocol == "batch-4":
        want = [[ss.one_shot(norm_net, store, g, per_example=False).task] for g in groups(x, 4)]
    else:
        want = [np.asarray(ss.one_shot(norm_net, store, g).task) for g in groups(x, 8)]
        want = [ids[:1] for ids in want] if protocol == "paper" else want
    (row,) = ss.evaluate(norm_net, store, [data] * 3, protocol, rule=rule, batch_size=8, tasks=[0])
    np.testing.assert_array_equal(row.inferred, np.concatenate(want))


def first_or_nothing(net, store, x, objective, per_example):
    """Task 0 for an input that is bright, none for the others."""
    scores = jnp.where(store.slots, -jnp.arange(store.capacity, dtype=jnp.float32), -jnp.inf)
    bright = x.mean(axis=tuple(range(1 if per_example else 0, x.ndim))) > 0.5
    return ss.TaskBelief(jnp.where(bright, 0, -1), jnp.broadcast_to(scores, (*bright.shape, 4)))


def test_a_function_as_rule_may_refuse(problem):
    net, store, stream = problem
    (row,) = evaluate(net, store, stream, "per_example", rule=first_or_nothing, tasks=[0])
    x, y = batch(stream[0])
    bright = np.asarray(x.mean(1) > 0.5)
    np.testing.assert_array_equal(row.inferred, np.where(bright, 0, -1))
    right = np.argmax(ss.predict(net, store, x, 0), -1) == y
    assert 0 < bright.mean() < 1
    assert row.accuracy == row.shared_accuracy == pytest.approx(np.mean(right & bright))
    assert row.task_accuracy == pytest.approx(bright.mean())


def test_only_learned_tasks_and_chosen_ones_are_judged(problem):
    net, store, stream = problem
    seen = []

    def progress(tasks):
        for task in tasks:
            seen.append(task)
            yield task

    everything = evaluate(net, store, stream * 2, "per_example", progress=progress)
    assert len(everything) == 3
    assert seen == [0, 1, 2]
    chosen = evaluate(net, store, stream, "per_example", tasks=[2, 0])
    for got, want in zip(chosen, everything[::-2], strict=True):
        assert (got.task, got.accuracy) == (want.task, want.accuracy)


def test_masks_that_were_found_stand_for_other_tasks(problem):
    """Four streams for three masks: two share mask 2, and the last has none."""
    net, store, stream = problem
    shifted = [stream[2], stream[0], stream[2], stream[1]]
    ids = [2, 0, 2, -1]
    want = evaluate(net, store, stream, "per_example")
    rows = evaluate(net, store, shifted, "per_example", ids=ids)
    assert [row.task for row in rows] == [0, 1, 2, 3]
    for row, i in zip(rows, [2, 0, 2], strict=False):
        assert row.accuracy == want[i].accuracy
        assert row.task_accuracy == want[i].task_accuracy
    assert rows[3].accuracy == rows[3].task_accuracy == 0
    assert rows[3].shared_accuracy == want[1].shared_accuracy
    given = evaluate(net, store, shifted, ids=np.asarray(ids), tasks=[0, 1])
    for row, i in zip(given, [2, 0], strict=True):
        assert row.accuracy == evaluate(net, store, stream, tasks=[i])[0].accuracy


def test_a_task_may_come_in_batches(problem):
    net, store, stream = problem

    def batches(data):
        for start in range(0, 23, 9):
            yield dataclasses.replace(
                data, inputs=data.inputs[start : start + 9], labels=data.labels[start : start + 9]
            )

    want = evaluate(net, store, stream)
    got = evaluate(net, store, [batches(stream[0]), stream[1], list(batches(stream[2]))])
    assert [row._replace(inferred=None) for row in got] == [
        row._replace(inferred=None) for row in want
    ]
    for protocol in ("paper", "per_example", "batch-4"):
        want = evaluate(net, store, stream, protocol)
        got = evaluate(net, store, [batches(data) for data in stream], protocol)
        for one, other in zip(got, want, strict=True):
            np.testing.assert_array_equal(one.inferred, other.inferred)
            assert one[:5] == other[:5]
    with pytest.raises(TypeError, match=r"batch 1 of stream\[0\] must be a TaskData, .* got int"):
        evaluate(net, store, [[stream[0], 1]] * 3)
    with pytest.raises(ValueError, match=r"stream\[1\] must hold at least one batch, got none"):
        evaluate(net, store, [stream[0], [], stream[2]])
    x, y = np.ones((3, 6), np.float32), np.zeros(3, int)
    with pytest.raises(ValueError, match=r"got 9 to 9 in batch 1 of stream\[0\]"):
        evaluate(net, store, [[(x, y), (x, y + 9), (x, y)]] * 3, "batch-2")


def test_bad_input(problem):
    net, store, stream = problem
    beyond = dataclasses.replace(stream[0], labels=stream[0].labels + 5)

    def nothing(*_, **__):
        return 0

    for error, message, tests, *protocol, options in (
        (ValueError, "test data of 3 tasks, got 2", stream[:2], {}),
        (TypeError, r"such as a stream's \.test, got object", object(), {}),
        (ValueError, "batch_size must be an int of at least 1", stream, {"batch_size": 0}),
        (TypeError, "objective must be a hashable", stream, "paper", {"objective": "entropy"}),
        (ValueError, r"tasks must lie in \[0, 3\), got 3", stream, {"tasks": [0, 3]}),
        (ValueError, r"\[0, 3\) .* 'given', got -1 for task 1", stream, {"ids": [0, -1, 1]}),
        (ValueError, r"in \[-1, 3\) .* got 3 for task 0", stream, "paper", {"ids": [3]}),
        (ValueError, "test data of 4 tasks, got 3", stream, {"ids": [0, 1, 2, 0]}),
        (ValueError, r"in \[0, 2\), got 2", stream, {"ids": [0, 1], "tasks": [2]}),
        (ValueError, r"labels must lie in \[0, 5\)", [beyond] * 3, {}),
        (TypeError, r"stream\[0\] must be a TaskData, or batches", [1, 2, 3], {}),
        (ValueError, r"one of \['binary_search', .*'best'", stream, "paper", {"rule": "best"}),
        (TypeError, "must be a name, a Rule, or a hash", stream, "paper", {"rule": [ss.oracle]}),
        (TypeError, r"TaskBelief whose task has shape \(1,", stream, "paper", {"rule": nothing}),
        (ValueError, r"'batch-24' needs at least 24 test .* holds 23", stream, "batch-24", {}),
        *[
            (ValueError, "protocol must be one of", stream, protocol, {})
            for protocol in ("oracle", "batch-", "batch-0", "batch-x", None)
        ],
    ):
        with pytest.raises(error, match=message):
            ss.evaluate(net, store, tests, *protocol, **options)
    with pytest.raises(TypeError, match="store must be a MaskStore"):
        ss.evaluate(net, {}, stream)
    with pytest.raises(ValueError, match="the store is empty"):
        ss.evaluate(net, ss.MaskStore.create(net), [])
    assert len(ss.evaluate(net, store, stream, "batch-23", tasks=[0])[0].inferred) == 1
    assert jax.tree.leaves(store)  # and nothing was consumed


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("GG", "gg"), ("gns", "gns"), ("GNu", "gnu"), ("NNS", "nns"),
        ("task-il", "gg"), ("Domain-IL", "gns"), ("CLASS-IL", "gnu"), ("task-free", "nns"),
    ],
)  # fmt: skip
def test_scenarios_by_name(name, want):
    assert ss.parse_scenario(name) == want


@pytest.mark.parametrize("name", ["", "gn", "taskil", None, 3])
def test_unknown_scenarios(name):
    known = r"GG \(task-il\), GNs \(domain-il\), GNu \(class-il\), NNs \(task-free\), got "
    with pytest.raises(ValueError, match=known):
        ss.parse_scenario(name)


def test_statistics_shared_between_tasks_lose_all_but_the_last():
    """The reference's best known bug (its issue 11), and that it is not here.

    The brightest pixel is the label, and the second task's images are so bright that by its
    statistics all of the first's lie below 0: all outputs are 0 there, which names label 0.
    """
    net = ss.Network.from_nnx(NormNet((4, 4, 4), rngs=nnx.Rngs(0)))
    net.params = jax.tree.map(lambda kernel: jnp.eye(4), net.params)
    labels = jnp.arange(40, dtype=jnp.int32) % 4
    images = jax.nn.one_hot(labels, 4)
    tasks = [ss.TaskData(images, labels), ss.TaskData(images + 3, labels)]
    mask = jax.tree.map(jnp.ones_like, net.params)
    states = [net.batch_state(net.params, data.inputs) for data in tasks]
    own = filled_store(net, [ss.Task(mask, state) for state in states], capacity=2)
    shared = filled_store(net, [ss.Task(mask, states[-1])] * 2, capacity=2)
    assert [row.accuracy for row in ss.evaluate(net, own, tasks)] == [1, 1]
    assert [row.accuracy for row in ss.evaluate(net, shared, tasks)] == [0.25, 1]
