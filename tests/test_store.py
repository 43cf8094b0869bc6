import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import supsup_jax as ss
from supsup_jax.stores import arrays, mask_store
from tests.conftest import filled_store, random_masks, relu_apply, relu_net


def assert_mixture(store, want):
    """Leaf by leaf, float32."""
    for got, leaf in zip(jax.tree.leaves(store), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, leaf, rtol=1e-5, atol=1e-6)
        assert got.dtype == jnp.float32


def assert_holds(store, masks):
    """These masks in this order, and their mean."""
    assert int(store.num_tasks) == len(masks) and store.num_tasks.dtype == jnp.int32
    for i, mask in enumerate(masks):
        chex.assert_trees_all_equal(store.task(i), ss.Task(mask))
    assert_mixture(
        store.mixture(), jax.tree.map(lambda *leaves: np.mean(np.stack(leaves), axis=0), *masks)
    )


@pytest.mark.parametrize(("count", "capacity"), [(1, 1), (33, 2)])
def test_masks_come_back_and_appends_compile_once_a_size(small_net, count, capacity):
    masks, before = random_masks(small_net, count), mask_store._write_in_place._cache_size()
    store = filled_store(small_net, masks, capacity)
    assert_holds(store, masks)
    sizes = [capacity * 2**i for i in range(6) if i == 0 or capacity * 2 ** (i - 1) < count]
    assert store.capacity == sizes[-1]
    assert mask_store._write_in_place._cache_size() - before <= len(sizes)


def test_more_tasks_than_one_tile_holds(small_net, monkeypatch):
    monkeypatch.setattr(arrays, "MAX_LANES", 4)
    masks = random_masks(small_net, 11)
    store = filled_store(small_net, masks, capacity=3)
    assert store.capacity == 12
    assert_holds(store, masks)


def test_append_is_pure(small_net):
    first, second, third = random_masks(small_net, 3)
    one = filled_store(small_net, [first])
    two, other = one.append(second), one.append(third)
    assert int(one.num_tasks) == 1
    chex.assert_trees_all_equal(two.mask(1), second)
    chex.assert_trees_all_equal(other.mask(1), third)


@pytest.mark.parametrize("dtypes", [(np.uint8, np.float32), (jnp.bfloat16, np.int32)])
def test_any_dtype_of_zeros_and_ones(small_net, dtypes):
    (mask,) = random_masks(small_net, 1)
    given = {name: mask[name].astype(dtype) for name, dtype in zip(mask, dtypes, strict=True)}
    assert_holds(filled_store(small_net, [given]), [mask])


def test_bytes_are_one_bit_a_weight_and_the_counts():
    net = relu_net((784, 300, 100, 100))
    store = ss.MaskStore.create(net, capacity=64)
    words = 25 * 300 + 10 * 100 + 313  # a column of 784 weights takes 25 words: 2.5% in all
    assert store.nbytes == 64 * words * 4 + 32 * words + 32 + 4 + 4 + 4


def test_mixture_at_any_coefficients_by_tasks_or_by_slots(small_net):
    masks = random_masks(small_net, 5)
    store = filled_store(small_net, masks, capacity=8)
    alphas = np.random.default_rng(0).random(5).astype(np.float32)
    want = jax.tree.map(lambda *m: np.tensordot(alphas, np.stack(m), 1), *masks)
    # A coefficient of an empty slot changes nothing.
    for given in (alphas, np.concatenate([alphas, np.ones(3, np.float32)])):
        assert_mixture(store.mixture(given), want)
    for i, mask in enumerate(masks):
        got = store.mixture(np.eye(5, dtype=np.float32)[i])
        chex.assert_trees_all_equal(jax.tree.map(lambda m: np.asarray(m) != 0, got), mask)


def test_mixture_is_differentiable_in_the_coefficients(small_net):
    masks = random_masks(small_net, 5)
    store = filled_store(small_net, masks, capacity=8)

    @jax.jit
    @jax.grad
    def gradient(alphas):
        return sum(leaf.sum() for leaf in jax.tree.leaves(store.mixture(alphas)))

    want = [sum(leaf.sum() for leaf in jax.tree.leaves(mask)) for mask in masks]
    np.testing.assert_allclose(gradient(np.full(5, 0.2, np.float32)), want)


def test_replace_and_remove(small_net):
    masks = random_masks(small_net, 5)
    store = filled_store(small_net, masks[:4])
    replaced = store.replace(1, masks[4])
    kept = [masks[0], masks[4], masks[2], masks[3]]
    assert_holds(replaced, kept)
    removed = replaced.remove(0)
    assert_holds(removed, kept[1:])
    assert_holds(removed.append(masks[0]), [*kept[1:], masks[0]])
    chex.assert_trees_all_equal(store.replace(1, masks[4], donate=True), replaced)
    with pytest.raises(ss.StoreError, match="was consumed"):
        store.mask(0)


def test_donated_store_is_consumed_and_says_so(small_net):
    first, second = random_masks(small_net, 2)
    old = filled_store(small_net, [first], capacity=2)
    new = old.append(second, donate=True)
    for use in (
        lambda: old.num_tasks,
        lambda: old.mask(0),
        lambda: old.mixture(),
        lambda: old.append(first),
        lambda: old.nbytes,
        lambda: old.save("nowhere"),
        lambda: ss.one_shot(small_net, old, np.ones((1, 6), np.float32)),
        lambda: jax.jit(lambda store: store.mixture())(old),
    ):
        with pytest.raises(ValueError, match="consumed by append"):
            use()
    assert "consumed" in repr(old) and int(new.num_tasks) == 2
    # Growth copies, and consumes all the same; weights and the network's seed live on.
    grown = new.append(first, donate=True)
    with pytest.raises(ValueError, match="consumed by append"):
        new.mask(0)
    chex.assert_trees_all_equal(grown.mask(1), second)
    assert int(small_net.seed) == 0
    assert np.isfinite(small_net.params["kernel0"]).all()


def test_append_inside_jit_drops_what_does_not_fit(small_net):
    masks = random_masks(small_net, 3)
    store = filled_store(small_net, masks[:1], capacity=2)
    append = jax.jit(lambda store, mask: store.append(mask))
    full = append(store, masks[1])
    chex.assert_trees_all_equal(full.mask(1), masks[1])
    assert int(full.num_tasks) == 2
    over = append(full, masks[2])
    with pytest.raises(ValueError, match=r"1 write.* beyond the capacity 2"):
        over.mixture()
    # Nothing was written onto another task.
    chex.assert_trees_all_equal(over._bank.words, full._bank.words)
    chex.assert_trees_all_equal(over._bank.counts, full._bank.counts)


def test_ids_inside_jit_never_reach_another_task(small_net):
    """Reads are clipped to the tasks held; writes elsewhere change nothing and are reported."""
    masks = random_masks(small_net, 5)
    store = filled_store(small_net, masks[:4], capacity=8)
    mask = jax.jit(lambda store, i: store.mask(i))
    for i, want in ((9, 3), (6, 3), (-1, 0)):
        chex.assert_trees_all_equal(mask(store, i), masks[want])
    for change in (
        jax.jit(lambda store, i: store.replace(i, masks[4])),
        jax.jit(lambda store, i: store.remove(i)),
    ):
        for i in (4, 9, -1):
            changed = change(store, i)
            with pytest.raises(ValueError, match="a task that does not exist"):
                changed.mixture()
            for name in ("words", "counts", "num_tasks"):
                got, want = getattr(changed._bank, name), getattr(store._bank, name)
                np.testing.assert_array_equal(got, want)
        assert int(change(store, 1)._bank.dropped) == 0


def test_what_the_callers_jit_closes_over_is_still_concrete(small_net):
    masks = random_masks(small_net, 2)
    store = filled_store(small_net, masks, capacity=2)
    chex.assert_trees_all_equal(jax.jit(lambda: store.mask(1))(), masks[1])
    appended = jax.jit(lambda: store.append(masks[0], donate=True))()
    chex.assert_trees_all_equal(appended.mask(2), masks[0])
    chex.assert_trees_all_equal(store.mask(0), masks[0])


def test_the_store_of_another_networks_weights_is_refused(small_net):
    store = filled_store(small_net, random_masks(small_net, 1))
    with pytest.raises(ValueError, match=r"other weights: drawn by .* from seed 0.* from seed 1"):
        ss.one_shot(relu_net((6, 6, 5), seed=1), store, np.ones((2, 6), np.float32))
    given = ss.Network(small_net.apply, jax.tree.map(np.zeros_like, small_net.params))
    ss.MaskStore.create(given)  # from here on its fingerprint is known
    with pytest.raises(ValueError, match="belongs to other weights"):
        ss.one_shot(given, store, np.ones((2, 6), np.float32))
    # One seed, another table that no mask covers.
    first, other = (
        ss.signed_constant(ss.Network(relu_apply, {"kernel": np.zeros((4, 3)), "table": table}), 0)
        for table in (np.zeros(2), np.ones(2))
    )
    store = ss.MaskStore.create(first).append(random_masks(first, 1)[0])
    ss.MaskStore.create(other)
    with pytest.raises(ValueError, match="what is not masked differs: make the module of the same"):
        store.check_fits(other)


def test_a_store_goes_through_jit_and_scan(small_net):
    masks = random_masks(small_net, 4)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *masks)
    store, _ = jax.jit(
        lambda store, masks: jax.lax.scan(lambda s, m: (s.append(m), None), store, masks)
    )(ss.MaskStore.create(small_net, 4), stacked)
    assert_holds(store, masks)


def test_statistics_belong_to_the_task(norm_net):
    masks = random_masks(norm_net, 5)
    tasks = [
        ss.Task(mask, jax.tree.map(lambda leaf, i=i: np.full_like(leaf, i + 1), norm_net.state))
        for i, mask in enumerate(masks)
    ]
    store = filled_store(norm_net, tasks, capacity=4)
    for i, task in enumerate(tasks):
        chex.assert_trees_all_equal(store.task(i), task)
    chex.assert_trees_all_equal(store.remove(1).task(1), tasks[2])


def test_bad_input(small_net, norm_net):
    mask, norm_mask = random_masks(small_net, 1)[0], random_masks(norm_net, 1)[0]
    store, empty = filled_store(small_net, [mask]), ss.MaskStore.create(norm_net)
    wrong = jax.tree.map(lambda leaf: leaf[:3], norm_net.state)
    result = ss.TrainResult(ss.Task(mask), mask, np.ones(1))
    for error, message, call, *arguments in (
        (ValueError, "lacks the masked leaf", store.append, {"kernel0": mask["kernel0"]}),
        (ValueError, "does not mask", store.append, mask | {"extra": mask["kernel0"]}),
        (
            ValueError,
            r"must have shape \(6, 5\) at 'kernel1'",
            store.append,
            mask | {"kernel1": mask["kernel1"].T},
        ),
        (ValueError, "only 0 and 1 at 'kernel0'", store.append, mask | {"kernel0": -np.eye(6)}),
        (ValueError, "only 0 and 1", store.append, mask | {"kernel0": np.full((6, 6), np.nan)}),
        (ValueError, "no state, but the task brings one", store.append, ss.Task(mask, {"m": 1.0})),
        (TypeError, r"append its \.task", store.append, result),
        (ValueError, "task 1 is not in the store, which holds 1", store.mask, 1),
        (ValueError, "task -1 is not in the store, which holds 1", store.mask, -1),
        (IndexError, "task 1 is not in", store.task, 1),
        (TypeError, "task id must be an integer", store.mask, 0.0),
        (ValueError, "the store is empty", empty.mixture),
        (ValueError, "alphas must end in 64", store.mixture, np.ones(3, np.float32)),
        (ValueError, "capacity must be an int of at least 1", ss.MaskStore.create, small_net, 0),
        (ValueError, "capacity must be an int of at least 1", ss.MaskStore.create, small_net, -1),
        (TypeError, "net must be .*: Network.from_nnx and", ss.MaskStore.create, small_net.params),
        (ValueError, "the network has state", empty.append, norm_mask),
        (
            ValueError,
            r"state must be float32 \(8,\) at 'norm/mean'",
            empty.append,
            ss.Task(norm_mask, wrong),
        ),
    ):
        with pytest.raises(error, match=message):
            call(*arguments)


def test_changes_in_place_copy_no_masks(monkeypatch):
    net = relu_net((50, 40, 10))
    masks = random_masks(net, 2)
    store = filled_store(net, masks[:1], capacity=2048)
    calls, write = [], mask_store._write_in_place
    monkeypatch.setattr(
        mask_store,
        "_write_in_place",
        lambda *args, **static: (
            calls.append(write.lower(*args, **static)) or write(*args, **static)
        ),
    )
    size = store.bank.words.nbytes
    store.append(masks[1], donate=True).replace(0, masks[1], donate=True)
    assert len(calls) == 2
    for lowered in calls:
        used = lowered.compile().memory_analysis()
        assert used.alias_size_in_bytes >= size  # written where it was
        assert used.temp_size_in_bytes < size / 4
