"""Under settings of JAX's that refuse what it would do unasked: promotions and transfers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import supsup_jax as ss
from supsup_jax import data
from tests.conftest import random_masks, relu_net

CONFIG = ss.TrainConfig(steps=2, batch_size=4)


@pytest.fixture(scope="module")
def net():
    return relu_net((6, 6, 5))


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).standard_normal((20, 6), np.float32)


def test_dtypes_are_promoted_nowhere_unasked(net, x, tmp_path):
    """But where optax does: in adam, and in the projection of `descend`."""
    labels = np.arange(20, dtype=np.int32) % 5
    stream = [ss.TaskData(x + i, labels) for i in range(3)]
    with jax.numpy_dtype_promotion("strict"):
        store = ss.MaskStore.create(net, 2)
        for mask in random_masks(net, 4):
            store = store.append(mask)
        store = store.replace(1, random_masks(net, 1)[0]).remove(0)
        store.save(tmp_path / "store")
        store = ss.MaskStore.load(tmp_path / "store", net)
        store = ss.measure_statistics(net, store, stream, ss.max_logit)
        for objective in (ss.entropy, ss.Superfluous(3)):
            belief = ss.one_shot(net, store, x, objective)
        for rule in (ss.binary_search, ss.oracle, ss.rerank):
            rule(net, store, x)
        ss.oracle(net, store, x, ss.Standardised(ss.max_logit))
        for options in ({"implementation": "certified"}, {"error": 1e-6}):
            ss.one_shot(net, store, x, **options)
        ss.rejection.reject(belief, ss.rejection.calibrate(belief, 0.1))
        ss.predict(net, store, x, belief.task)
        for protocol in ("given", "paper", "per_example", "batch-4"):
            ss.evaluate(net, store, stream, protocol)
        unequal = ss.MaskStore.create(net, 2)
        for count in (3, 2):
            unequal = unequal.append(random_masks(net, 1)[0], num_labels=count)
        ss.one_shot(net, unequal, x, ss.Superfluous(3))
        ss.train_task(jax.random.key(0), net, stream[0], CONFIG)
        config = ss.stream.StreamConfig(window=2, train=CONFIG, deviations=5.0)
        state = ss.stream.init_stream(jax.random.key(0), net, config)
        for i in range(2):
            windows = ss.stream.draw_windows(jax.random.key(i), 20, config)
            state, _ = ss.stream.observe(state, net, stream[i], windows[0], config)
        ss.shard(store, jax.make_mesh((4,), ("task",))).append(random_masks(net, 1)[0])
        with pytest.raises(Exception, match="strict"):
            jnp.ones(2) + jnp.arange(2)


def test_transfers_are_asked_for(net, x):
    """Data is put on the device by name; decisions and training move nothing."""
    images, labels = np.arange(60).reshape(10, 6).astype(np.uint8), np.arange(10) % 5
    here, key = jnp.asarray(x), jax.random.key(0)
    masks = jax.tree.map(jnp.asarray, random_masks(net, 2))
    with jax.transfer_guard("disallow"):
        dataset = data.load_dataset("digits")
        assert data.PermutedStream(dataset, 2).train[1].num_examples
        task = ss.TaskData(images, labels)
        store = ss.MaskStore.create(net, 2)
        for mask in masks:
            store = store.append(mask)
        for rule in (ss.one_shot, ss.binary_search, ss.oracle):
            belief = rule(net, store, here)
        ss.predict(net, store, here, belief.task)
        ss.train_task(key, net, task, CONFIG)
        with pytest.raises(Exception, match="Disallowed host-to-device"):
            jnp.asarray(x) + 1
