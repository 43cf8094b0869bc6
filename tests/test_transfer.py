import jax
import jax.numpy as jnp
import numpy as np
import pytest

import supsup_jax as ss

CONFIG = ss.TrainConfig(steps=2, batch_size=4)


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    return ss.TaskData(
        jnp.asarray(rng.integers(0, 256, (12, 6)), jnp.uint8),
        jnp.asarray(rng.integers(0, 5, 12), jnp.int32),
    )


def test_the_mean_of_all_scores_so_far(small_net):
    rng = np.random.default_rng(0)
    shapes = small_net.layout.shapes
    scores = [
        {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
        for _ in range(4)
    ]
    mean = ss.ScoreMean.create(small_net)
    for each in scores:
        mean = mean.include(each)
    assert int(mean.num_tasks) == 4
    for name in shapes:
        want = np.mean([each[name] for each in scores], axis=0)
        np.testing.assert_allclose(mean.mean[name], want, rtol=1e-5, atol=1e-6)


def test_a_task_starts_where_the_mean_is(small_net, data):
    key = jax.random.key(0)
    none = ss.ScoreMean.create(small_net)
    drawn = ss.train_task(key, small_net, data, CONFIG)
    first = ss.train_task(key, small_net, data, CONFIG, init_scores=none)
    mean = none.include(first.scores)
    second = ss.train_task(key, small_net, data, CONFIG, init_scores=mean)
    given = ss.train_task(key, small_net, data, CONFIG, init_scores=first.scores)
    for name in small_net.layout.shapes:
        np.testing.assert_array_equal(first.scores[name], drawn.scores[name])
        np.testing.assert_array_equal(second.scores[name], given.scores[name])
        assert not np.array_equal(second.scores[name], drawn.scores[name])


def test_one_program_with_and_without_earlier_tasks(small_net, data):
    from supsup_jax.training import train

    mean = ss.ScoreMean.create(small_net)
    train._train.clear_cache()
    for i in range(3):
        result = ss.train_task(jax.random.key(i), small_net, data, CONFIG, init_scores=mean)
        mean = mean.include(result.scores)
    assert train._train._cache_size() == 1


def test_mistakes_are_named(small_net, data):
    mean = ss.ScoreMean.create(small_net)
    with pytest.raises(ValueError, match="scores must be a pytree like"):
        mean.include({"kernel0": jnp.ones((6, 6))})
    two = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), mean.mean)
    with pytest.raises(ValueError, match="scores must be of one task"):
        mean.include(two)
    with pytest.raises(TypeError, match="tasks learned at once have no earlier ones"):
        keys = jax.random.split(jax.random.key(0), 2)
        ss.train_tasks(keys, small_net, data, CONFIG, init_scores=mean)
    other = ss.Network(lambda p, x: x @ p["w"], {"w": jnp.ones((6, 5))})
    with pytest.raises(ValueError, match="init_scores lacks the masked leaf"):
        ss.train_task(
            jax.random.key(0), small_net, data, CONFIG, init_scores=ss.ScoreMean.create(other)
        )
