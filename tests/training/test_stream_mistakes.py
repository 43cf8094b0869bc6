"""What a learner of a stream refuses."""

import dataclasses

import jax.numpy as jnp
import pytest

import supsup_jax as ss
from supsup_jax.training.stream import draw_windows, fresh_slot, restore_stream
from tests.conftest import relu_net
from tests.training.test_stream import CONFIG, KEY, stream_of, toy_data, toy_window


def test_bad_configs():
    for change, message in (
        ({"window": 0}, "window must be an int of at least 1, got 0"),
        ({"window": 1.5}, "window must be an int"),
        ({"floor": 1}, "floor must be an int of at least 2"),
        ({"budget": 0}, "budget must be an int of at least 1, got 0"),
        ({"budget": True}, "budget must be an int"),
        ({"eps": 0.0}, r"eps must lie in \(0, floor - 1\)"),
        ({"eps": float("nan")}, "eps must lie in"),
        ({"eps": 1.0, "floor": 2}, r"= \(0, 1\), for no nu exceeds 1 .* got 1.0"),
        ({"deviations": 0.0}, "deviations must be positive or None, got 0.0"),
        ({"deviations": float("inf")}, "deviations must be positive or None, got inf"),
        ({"deviations": float("nan")}, "deviations must be positive or None, got nan"),
        ({"beyond": "grow"}, r"beyond must be one of \('reuse', 'skip'\), got 'grow'"),
    ):
        with pytest.raises(ValueError, match=message):
            ss.stream.StreamConfig(**change)
    with pytest.raises(TypeError, match="objective must be a hashable function"):
        ss.stream.StreamConfig(objective="entropy")
    with pytest.raises(TypeError, match="train must be a TrainConfig, got dict"):
        ss.stream.StreamConfig(train={})
    assert hash(ss.stream.StreamConfig()) == hash(ss.stream.StreamConfig())


def test_bad_windows(small_net):
    state = ss.stream.init_stream(KEY, small_net, CONFIG)
    good, index = toy_data(), toy_window()

    def refuses(error, match, data=good, index=index, config=CONFIG, net=small_net, state=state):
        with pytest.raises(error, match=match):
            ss.stream.observe(state, net, data, index, config)

    refuses(TypeError, "net must be a Network", net=small_net.params)
    refuses(TypeError, "config must be a StreamConfig", config=CONFIG.train)
    refuses(TypeError, "data must be a TaskData", data=good.inputs)
    refuses(ValueError, "other weights", net=relu_net((6, 6, 5), 1))
    one_class = dataclasses.replace(good, labels=jnp.full(40, 3))
    refuses(ValueError, "at least two classes, got only class 3", data=one_class)
    nothing = ss.TaskData(jnp.zeros((0, 6), jnp.uint8), jnp.zeros(0, jnp.int32))
    refuses(ValueError, "at least one example, got 0", data=nothing)
    refuses(ValueError, r"labels must lie in \[0, 5\)", data=toy_data(labels=6))
    refuses(ValueError, "view must index 6 pixels", data=toy_data(view=jnp.arange(7)))
    refuses(
        ValueError, r"\[window, train.batch_size\] = \[3, 8\], got shape \(2, 8\)", index=index[:2]
    )
    refuses(ValueError, r"got shape \(3, 4\)", index=index[:, :4])
    refuses(ValueError, r"got shape \(24,\)", index=index.reshape(-1))
    refuses(ValueError, r"index must lie in \[0, 40\), got -1 to", index=index - index.min() - 1)
    refuses(ValueError, r"index must lie in \[0, 40\), got .* to 40", index=index * 0 + 40)
    refuses(TypeError, "index must be an array of integers, got float64", index=index / 2)
    refuses(TypeError, "index must be an array of integers, got list", index=index.tolist())
    refuses(ValueError, "floor 6 has 6 slots, got 5", config=dataclasses.replace(CONFIG, floor=6))
    two = stream_of(small_net, dataclasses.replace(CONFIG, floor=5, eps=3.9), 2)[0][-1]
    small = dataclasses.replace(CONFIG, budget=1)
    refuses(ValueError, "2 masks already, more than the budget of 1", state=two, config=small)
    assert state.windows == 0


def test_bad_starts(small_net):
    with pytest.raises(TypeError, match="key must be a JAX random key, got 0"):
        ss.stream.init_stream(0, small_net, CONFIG)
    with pytest.raises(TypeError, match="net must be a Network"):
        ss.stream.init_stream(KEY, {}, CONFIG)
    with pytest.raises(ValueError, match=r"multiple of window \(4\), .* got 6"):
        draw_windows(KEY, 40, dataclasses.replace(CONFIG, window=4))
    with pytest.raises(ValueError, match="num_examples must be at least 1, got 0"):
        draw_windows(KEY, 0, CONFIG)
    slots = [fresh_slot(KEY, i, small_net, CONFIG) for i in range(4)]
    with pytest.raises(ValueError, match="has 5 slots, got 4"):
        restore_stream(KEY, small_net, slots, CONFIG)
    with pytest.raises(ValueError, match="the scores of a slot must have shape"):
        restore_stream(KEY, relu_net((6, 7, 5)), [*slots, slots[0]], CONFIG)


def test_divergence_is_reported(small_net):
    images = jnp.full((40, 6), jnp.nan)
    data = ss.TaskData(images, jnp.arange(40) % 5)
    state = ss.stream.init_stream(KEY, small_net, CONFIG)
    with pytest.raises(ValueError, match="training diverged at window 0"):
        ss.stream.observe(state, small_net, data, toy_window(), CONFIG, donate=True)
    assert int(state.store.num_tasks) == 5  # an error leaves a store that was to be donated
    with pytest.raises(ValueError, match="training diverged at window 0"):
        ss.stream.observe(state, small_net, data, toy_window(), CONFIG)
