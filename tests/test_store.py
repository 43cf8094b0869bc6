import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import supsup_jax as ss
from supsup_jax.stores import arrays
from tests.conftest import filled_store, random_masks, relu_net


def mean_of(masks):
    return jax.tree.map(lambda *leaves: np.mean(np.stack(leaves), axis=0), *masks)


@pytest.mark.parametrize(("count", "capacity"), [(1, 1), (2, 1), (5, 8), (9, 2)])
def test_masks_come_back_as_they_went_in(small_net, count, capacity):
    masks = random_masks(small_net, count)
    store = filled_store(small_net, masks, capacity)
    assert int(store.num_tasks) == count
    assert store.num_tasks.dtype == jnp.int32
    for i, mask in enumerate(masks):
        chex.assert_trees_all_equal(store.mask(i), mask)
        assert store.task(i).state is None


def test_more_tasks_than_one_tile_holds(small_net, monkeypatch):
    monkeypatch.setattr(arrays, "MAX_LANES", 4)
    masks = random_masks(small_net, 11)
    store = filled_store(small_net, masks, capacity=3)
    assert store.capacity == 12
    for i, mask in enumerate(masks):
        chex.assert_trees_all_equal(store.mask(i), mask)
    for got, want in zip(
        jax.tree.leaves(store.mixture()), jax.tree.leaves(mean_of(masks)), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_append_is_pure(small_net):
    first, second, third = random_masks(small_net, 3)
    one = filled_store(small_net, [first])
    two, other = one.append(second), one.append(third)
    assert int(one.num_tasks) == 1
    chex.assert_trees_all_equal(two.mask(1), second)
    chex.assert_trees_all_equal(other.mask(1), third)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int32, np.float32])
def test_any_dtype_of_zeros_and_ones(small_net, dtype):
    mask = random_masks(small_net, 1)[0]
    store = filled_store(small_net, [jax.tree.map(lambda m: m.astype(dtype), mask)])
    chex.assert_trees_all_equal(store.mask(0), mask)


def test_capacity_doubles_and_appends_compile_once_a_size(small_net):
    before = arrays.write_in_place._cache_size()
    store = ss.MaskStore.create(small_net, capacity=2)
    for mask in random_masks(small_net, 33):
        store = store.append(mask, donate=True)
    assert store.capacity == 64
    sizes = 6  # 2, 4, 8, 16, 32, 64
    assert arrays.write_in_place._cache_size() - before <= sizes


def test_bytes_are_one_bit_a_weight_and_the_counts():
    net = relu_net((784, 300, 100, 100))
    store = ss.MaskStore.create(net, capacity=64)
    words = 275_200 // 32
    assert store.nbytes == 64 * words * 4 + 275_200 + 32 + 4 + 4 + 4


def test_uniform_mixture_is_the_mean(small_net):
    masks = random_masks(small_net, 5)
    store = filled_store(small_net, masks)
    for got, want in zip(
        jax.tree.leaves(store.mixture()), jax.tree.leaves(mean_of(masks)), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-6)
        assert got.dtype == jnp.float32


def test_mixture_at_any_coefficients_by_tasks_or_by_slots(small_net):
    masks = random_masks(small_net, 5)
    store = filled_store(small_net, masks, capacity=8)
    alphas = np.random.default_rng(0).random(5).astype(np.float32)
    want = jax.tree.map(lambda *m: np.tensordot(alphas, np.stack(m), 1), *masks)
    # A coefficient of an empty slot changes nothing.
    for given in (alphas, np.concatenate([alphas, np.ones(3, np.float32)])):
        got = store.mixture(jnp.asarray(given))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_one_hot_coefficients_give_one_mask(small_net):
    masks = random_masks(small_net, 4)
    store = filled_store(small_net, masks)
    for i, mask in enumerate(masks):
        got = store.mixture(jax.nn.one_hot(i, 4))
        chex.assert_trees_all_equal(jax.tree.map(lambda m: m != 0, got), mask)


def test_mixture_is_differentiable_in_the_coefficients(small_net):
    masks = random_masks(small_net, 3)
    store = filled_store(small_net, masks)

    def total(alphas):
        return sum(leaf.sum() for leaf in jax.tree.leaves(store.mixture(alphas)))

    want = [sum(leaf.sum() for leaf in jax.tree.leaves(mask)) for mask in masks]
    np.testing.assert_allclose(jax.grad(total)(jnp.ones(3) / 3), want)


def test_replace_and_remove(small_net):
    masks = random_masks(small_net, 5)
    store = filled_store(small_net, masks[:4])
    replaced = store.replace(1, masks[4])
    kept = [masks[0], masks[4], masks[2], masks[3]]
    for i, mask in enumerate(kept):
        chex.assert_trees_all_equal(replaced.mask(i), mask)
    removed = replaced.remove(0)
    assert int(removed.num_tasks) == 3
    for i, mask in enumerate(kept[1:]):
        chex.assert_trees_all_equal(removed.mask(i), mask)
    for got, want in zip(
        jax.tree.leaves(removed.mixture()), jax.tree.leaves(mean_of(kept[1:])), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-6)
    again = removed.append(masks[0])
    chex.assert_trees_all_equal(again.mask(3), masks[0])


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
        lambda: ss.one_shot(small_net, old, jnp.ones((1, 6))),
    ):
        with pytest.raises(ValueError, match="consumed by append"):
            use()
    assert int(new.num_tasks) == 2
    # Growth copies, and consumes all the same; weights and the network's seed live on.
    grown = new.append(first, donate=True)
    with pytest.raises(ValueError, match="consumed by append"):
        new.mask(0)
    chex.assert_trees_all_equal(grown.mask(1), second)
    assert int(small_net.seed) == 0
    assert jnp.isfinite(small_net.params["kernel0"]).all()


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
    x = jnp.ones((2, 6))
    np.testing.assert_array_equal(
        jax.jit(lambda x: small_net(store.mask(1), x))(x), small_net(store.mask(1), x)
    )
    floats = jax.tree.map(lambda m: jnp.asarray(m, jnp.float32), masks[0])
    appended = jax.jit(lambda: store.append(floats, donate=True))()
    chex.assert_trees_all_equal(appended.mask(2), masks[0])
    chex.assert_trees_all_equal(store.mask(0), masks[0])


def test_a_consumed_store_says_so_to_any_jit_and_when_printed(small_net):
    mask = random_masks(small_net, 1)[0]
    old = ss.MaskStore.create(small_net)
    old.append(mask, donate=True)
    with pytest.raises(ValueError, match="consumed by append"):
        jax.jit(lambda store: store.mixture())(old)
    assert "consumed" in repr(old)


def test_the_store_of_another_networks_weights_is_refused(small_net):
    store = filled_store(small_net, random_masks(small_net, 1))
    with pytest.raises(ValueError, match=r"other weights: drawn by .* from seed 0.* from seed 1"):
        ss.one_shot(relu_net((6, 6, 5), seed=1), store, jnp.ones((2, 6)))
    given = ss.Network(small_net.apply, jax.tree.map(jnp.zeros_like, small_net.params))
    ss.MaskStore.create(given)  # from here on its fingerprint is known
    with pytest.raises(ValueError, match="belongs to other weights"):
        ss.one_shot(given, store, jnp.ones((2, 6)))


def test_a_train_result_is_not_a_task(small_net):
    mask = random_masks(small_net, 1)[0]
    with pytest.raises(TypeError, match=r"append its \.task"):
        ss.MaskStore.create(small_net).append(ss.TrainResult(ss.Task(mask), mask, jnp.ones(1)))


def test_a_store_goes_through_jit_and_scan(small_net):
    masks = random_masks(small_net, 4)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *masks)
    store, _ = jax.jit(
        lambda store, masks: jax.lax.scan(lambda s, m: (s.append(m), None), store, masks)
    )(ss.MaskStore.create(small_net, 4), stacked)
    for i, mask in enumerate(masks):
        chex.assert_trees_all_equal(store.mask(i), mask)


def test_statistics_belong_to_the_task(norm_net):
    masks = random_masks(norm_net, 5)
    states = [
        jax.tree.map(lambda leaf, i=i: jnp.full_like(leaf, i + 1), norm_net.state) for i in range(5)
    ]
    store = filled_store(
        norm_net, [ss.Task(m, s) for m, s in zip(masks, states, strict=True)], capacity=2
    )
    for i in range(5):
        chex.assert_trees_all_equal(store.task(i).state, states[i])
    removed = store.remove(1)
    chex.assert_trees_all_equal(removed.task(1).state, states[2])


def test_bad_input(small_net, norm_net):
    mask = random_masks(small_net, 1)[0]
    store = filled_store(small_net, [mask])
    with pytest.raises(ValueError, match="lacks the masked leaf"):
        store.append({"kernel0": mask["kernel0"]})
    with pytest.raises(ValueError, match="does not mask"):
        store.append({**mask, "extra": mask["kernel0"]})
    with pytest.raises(ValueError, match=r"must have shape \(6, 5\) at 'kernel1'"):
        store.append({**mask, "kernel1": mask["kernel1"].T})
    with pytest.raises(ValueError, match="only 0 and 1 at 'kernel0'"):
        store.append({**mask, "kernel0": np.where(mask["kernel0"], 1, -1)})
    with pytest.raises(ValueError, match="only 0 and 1 at 'kernel0'"):
        store.append({**mask, "kernel0": np.full((6, 6), np.nan)})
    with pytest.raises(ValueError, match="no state, but the task brings one"):
        store.append(ss.Task(mask, {"mean": jnp.ones(3)}))
    for i in (-1, 1):
        with pytest.raises(ValueError, match=f"task {i} is not in the store, which holds 1"):
            store.mask(i)
        with pytest.raises(IndexError):
            store.task(i)
    with pytest.raises(TypeError, match="task id must be an integer"):
        store.mask(0.0)
    with pytest.raises(ValueError, match="the store is empty"):
        ss.MaskStore.create(small_net).mixture()
    with pytest.raises(ValueError, match="alphas must end in 64"):
        store.mixture(jnp.ones(3))
    for capacity in (0, -1):
        with pytest.raises(ValueError, match="capacity must be an int of at least 1"):
            ss.MaskStore.create(small_net, capacity)
    with pytest.raises(TypeError, match="net must be a Network"):
        ss.MaskStore.create(small_net.params)
    norm_mask = random_masks(norm_net, 1)[0]
    with pytest.raises(ValueError, match="the network has state"):
        ss.MaskStore.create(norm_net).append(norm_mask)
    wrong = jax.tree.map(lambda leaf: leaf[:3], norm_net.state)
    with pytest.raises(ValueError, match=r"state must be float32 \(8,\) at 'norm/mean'"):
        ss.MaskStore.create(norm_net).append(ss.Task(norm_mask, wrong))


def test_a_donated_replacement_is_the_same_and_consumes(small_net):
    masks = random_masks(small_net, 4)
    store = filled_store(small_net, masks[:3])
    want = store.replace(1, masks[3])
    got = store.replace(1, masks[3], donate=True)
    chex.assert_trees_all_equal(got, want)
    with pytest.raises(ss.StoreError, match="was consumed"):
        store.mask(0)


def test_changes_in_place_copy_no_masks():
    net = relu_net((50, 40, 10))
    store = filled_store(net, random_masks(net, 1), capacity=2048)
    bank, i = store.bank, jnp.int32(1)
    task = ss.Task(net.layout.leaves(random_masks(net, 1, seed=1)[0], "mask"))
    for append in (True, False):
        static = {"layout": net.layout, "capacity": 2048, "append": append}
        slot = arrays.Slot(i, arrays.held(bank, i))
        program = arrays.write_in_place.lower(bank[:3], bank[3:], slot, task, **static)
        used = program.compile().memory_analysis()
        assert used.alias_size_in_bytes >= bank.words.nbytes  # written where it was
        assert used.temp_size_in_bytes < bank.words.nbytes / 4
