import jax
import jax.numpy as jnp
import numpy as np
import pytest

import supsup_jax as ss
from supsup_jax import devices
from tests.conftest import filled_store, random_masks, relu_net


class Loads:
    """Parts that are made anew on each pass, as from files."""

    def __init__(self, net, masks):
        self.net, self.masks, self.passes = net, masks, 0

    def __iter__(self):
        self.passes += 1
        for first, stop in ((0, 4), (4, 5), (5, 9)):
            yield filled_store(self.net, self.masks[first:stop], capacity=4)


@pytest.mark.parametrize(
    ("per_example", "objective", "implementation"),
    [
        (True, ss.entropy, None),
        (False, ss.entropy, "matrix"),
        (True, ss.Superfluous(3), "matrix"),
        (False, ss.Superfluous(3), None),
    ],
)
def test_equals_one_store_of_all_tasks(per_example, objective, implementation):
    net = relu_net((6, 8, 5))
    masks = random_masks(net, 9)
    parts = Loads(net, masks)
    x = jax.random.normal(jax.random.key(0), (7, 6))
    got = ss.one_shot_streamed(net, parts, x, objective, per_example, implementation)
    want = ss.one_shot(net, filled_store(net, masks, capacity=9), x, objective, per_example)
    np.testing.assert_array_equal(got.task, want.task)
    np.testing.assert_allclose(got.scores, want.scores, rtol=1e-4, atol=1e-6)
    assert parts.passes == 2 and got.scores.shape[-1] == 9


def test_statistics_of_the_batch(norm_net):
    masks = [ss.Task(mask, norm_net.state) for mask in random_masks(norm_net, 5)]
    x = jax.random.normal(jax.random.key(0), (16, 6))
    parts = [filled_store(norm_net, masks[:3]), filled_store(norm_net, masks[3:])]
    got = ss.one_shot_streamed(norm_net, parts, x)
    want = ss.one_shot(norm_net, filled_store(norm_net, masks, capacity=5), x)
    np.testing.assert_allclose(got.scores, want.scores, rtol=1e-4, atol=1e-6)


def test_bad_input():
    net = relu_net((6, 8, 5))
    store = filled_store(net, random_masks(net, 2))
    x = jnp.ones((2, 6))
    for error, message, *arguments in (
        (TypeError, "gone through twice", net, (part for part in [store]), x),
        (ValueError, "pass at least one", net, [], x),
        (ValueError, "store belongs to other weights", relu_net((6, 8, 5), seed=1), [store], x),
        (ValueError, "nothing of the others", net, [store], x, ss.entropy, True, "certified"),
        (TypeError, "x must be a float array", net, [store], np.ones((2, 6), np.uint8)),
    ):
        with pytest.raises(error, match=message):
            ss.one_shot_streamed(*arguments)


def test_more_than_memory_says_how_much_and_what_to_do(monkeypatch):
    net = relu_net((784, 300, 100, 100))
    with pytest.raises(ss.CapacityError, match=r"capacity 1,000,000,000 takes 35,\d+,\d+,\d+,\d+ "):
        ss.MaskStore.create(net, capacity=1_000_000_000)
    with pytest.raises(MemoryError, match="one_shot_streamed"):
        ss.MaskStore.create(net, capacity=1_000_000_000)
    small = relu_net((6, 8, 5))
    full = filled_store(small, random_masks(small, 4), capacity=4)
    monkeypatch.setattr(devices, "device_bytes", lambda: full.nbytes + 100)
    with pytest.raises(ss.CapacityError, match="a store of capacity 8 takes"):
        full.append(random_masks(small, 1)[0])
    assert int(full.num_tasks) == 4  # and nothing is lost
