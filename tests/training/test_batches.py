import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import supsup_jax as ss
from supsup_jax.training.batches import _step
from supsup_jax.training.steps import batch_indices
from tests.conftest import NormNet

CONFIG = ss.TrainConfig(steps=7, batch_size=8, learning_rate=1e-2, schedule="cosine")
KEY = jax.random.key(3)


@dataclasses.dataclass(frozen=True)
class Noise:
    def __call__(self, key, x):
        return x + 0.1 * jax.random.normal(key, x.shape)


class SmallConv(nnx.Module):
    """Two convolutions with batch norm, and a classifier of what they see on average."""

    def __init__(self, *, rngs):
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), use_bias=False, rngs=rngs)
        self.conv1, self.conv2 = conv(3, 4, strides=2), conv(4, 4)
        self.norm = nnx.BatchNorm(4, use_scale=False, use_bias=False, momentum=0.9, rngs=rngs)
        self.head = nnx.Linear(4, 3, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.relu(self.norm(self.conv1(x)))
        return self.head(jax.nn.relu(self.conv2(x)).mean(axis=(1, 2)))


@pytest.fixture(scope="module")
def conv_net():
    return ss.signed_constant(ss.Network.from_nnx(SmallConv(rngs=nnx.Rngs(0))), 0)


def photographs(num=20, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (num, 6, 6, 3)).astype(np.uint8)
    transform = ss.Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    return ss.TaskData(images, np.arange(num) % 3, transform=transform)


def batches_of(key, data, config):
    """What train_task sees, from the host and a batch at a time."""
    images, labels = np.asarray(data.inputs), np.asarray(data.labels)
    for index in np.asarray(batch_indices(key, data.num_examples, config)):
        yield dataclasses.replace(data, inputs=images[index], labels=labels[index])


def test_one_program_serves_every_step_and_task(conv_net):
    _step.clear_cache()
    for seed in range(2):
        key = jax.random.key(seed)
        ss.train_on_batches(key, conv_net, batches_of(key, photographs(seed=seed), CONFIG), CONFIG)
    assert _step._cache_size() == 1


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        dataclasses.replace(CONFIG, rule="topk", density=0.3, optimizer="adam", augment=Noise()),
    ],
)
def test_it_learns_what_train_task_learns(conv_net, config):
    data = photographs()
    want = ss.train_task(KEY, conv_net, data, config)
    got = ss.train_on_batches(KEY, conv_net, batches_of(KEY, data, config), config)
    chex.assert_trees_all_close(got.scores, want.scores, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(got.task.state, want.task.state, rtol=1e-4)
    np.testing.assert_allclose(got.loss, want.loss, rtol=1e-4)
    same = jax.tree.map(lambda a, b: np.mean(a == b), got.task.mask, want.task.mask)
    assert min(jax.tree.leaves(same)) > 0.98
    assert all(leaf.dtype == bool for leaf in jax.tree.leaves(got.task.mask))


def test_an_interrupted_task_goes_on_to_the_same_bits(conv_net, tmp_path):
    data = photographs()
    config = dataclasses.replace(CONFIG, augment=Noise())
    batches = list(batches_of(KEY, data, config))
    manager = ocp.CheckpointManager(
        tmp_path / "saved", options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    )

    def save(step, progress):
        if step == 4:
            manager.save(step, args=ocp.args.StandardSave(progress))

    want = ss.train_on_batches(KEY, conv_net, batches, config, on_step=save)
    like = ss.start_training(KEY, conv_net, config)
    start = manager.restore(4, args=ocp.args.StandardRestore(like))
    assert int(start.step) == 4
    np.testing.assert_array_equal(np.asarray(start.loss) == 0, [False] * 4 + [True] * 3)
    for _ in range(2):  # a start is not consumed
        got = ss.train_on_batches(KEY, conv_net, batches[4:], config, start=start)
        chex.assert_trees_all_equal(got, want)
    # And where another key's noise, or the noise of another step, is not the same.
    other = ss.train_on_batches(jax.random.key(4), conv_net, batches[4:], config, start=start)
    assert not np.array_equal(other.loss[4:], want.loss[4:])


def test_a_start_at_the_end_only_finishes(conv_net):
    kept = []
    want = ss.train_on_batches(
        KEY,
        conv_net,
        batches_of(KEY, photographs(), CONFIG),
        CONFIG,
        on_step=lambda step, progress: kept.append((step, jax.tree.map(jnp.copy, progress))),
    )
    assert [step for step, _ in kept] == [int(each.step) for _, each in kept] == [*range(1, 8)]
    got = ss.train_on_batches(KEY, conv_net, [], CONFIG, start=kept[-1][1])
    chex.assert_trees_all_equal(got, want)


def test_init_scores_are_where_it_starts_and_stay(conv_net):
    data, shapes = photographs(), conv_net.layout.shapes
    scores = conv_net.layout.tree(
        [jnp.asarray(np.full(shape, 0.01, np.float32)) for shape in shapes.values()]
    )
    want = ss.train_task(KEY, conv_net, data, CONFIG, init_scores=scores)
    for init in (scores, ss.ScoreMean.create(conv_net).include(scores)):
        got = ss.train_on_batches(KEY, conv_net, batches_of(KEY, data, CONFIG), CONFIG, init)
        np.testing.assert_allclose(got.loss, want.loss, rtol=1e-4)
    assert all(not leaf.is_deleted() for leaf in jax.tree.leaves((scores, conv_net)))


def test_dropout_keys_are_state_too():
    net = ss.Network.from_nnx(NormNet(dropout=0.5, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    data = ss.TaskData(rng.integers(0, 256, (20, 6)).astype(np.uint8), np.arange(20) % 5)
    want = ss.train_task(KEY, net, data, CONFIG)
    got = ss.train_on_batches(KEY, net, batches_of(KEY, data, CONFIG), CONFIG)
    np.testing.assert_allclose(got.loss, want.loss, rtol=1e-4)


def test_each_task_drops_by_its_own_key():
    net = ss.Network.from_nnx(NormNet(dropout=0.5, rngs=nnx.Rngs(0)))
    # Rows that differ: a norm makes 0 of equal ones, and drops nothing then.
    x = np.random.default_rng(0).standard_normal((8, 6), np.float32)
    data = ss.TaskData(x, np.arange(8) % 5)
    config = dataclasses.replace(CONFIG, steps=1, shuffle=False)
    scores = jax.tree.map(lambda leaf: leaf + 1, ss.ScoreMean.create(net).mean)
    keys = jax.random.split(KEY, 2)
    one, same, other = (
        ss.train_task(keys[i], net, data, config, scores).loss[0] for i in (0, 0, 1)
    )
    assert one == same != other
    start = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), scores)
    both = ss.train_tasks(keys, net, data, config, start).loss[:, 0]
    np.testing.assert_allclose(both, [one, other], rtol=1e-5)


def test_no_more_batches_are_taken_than_steps_and_none_ahead(conv_net):
    taken, seen = [], []

    def counted():
        for i, batch in enumerate(batches_of(KEY, photographs(), CONFIG)):
            taken.append(i)
            yield batch
        raise AssertionError("one batch too many was asked for")

    ss.train_on_batches(
        KEY, conv_net, counted(), CONFIG, on_step=lambda step, _: seen.append((step, len(taken)))
    )
    assert seen == [(i, i) for i in range(1, 8)]


def test_bad_input(conv_net):
    good = list(batches_of(KEY, photographs(), CONFIG))

    def refuses(error, match, key=KEY, net=conv_net, batches=good, config=CONFIG, **options):
        with pytest.raises(error, match=match):
            ss.train_on_batches(key, net, batches, config, **options)

    refuses(ValueError, "one for each of the 7 steps to go, they ended after 3", batches=good[:3])
    refuses(
        ValueError,
        "batch 0 must hold config.batch_size = 8 examples, got 20",
        batches=[photographs()],
    )
    refuses(
        TypeError, r"batch 1 must be a TaskData, a pair .*, got tuple", batches=[good[0], (1, 2)]
    )
    wrong = dataclasses.replace(good[0], labels=jnp.full(8, 3))
    refuses(ValueError, r"labels must lie in \[0, 3\)", batches=[wrong])
    refuses(TypeError, "key must be a JAX random key", key=0)
    refuses(TypeError, "config must be a TrainConfig", config=None)
    progress = ss.start_training(KEY, conv_net, CONFIG)
    refuses(TypeError, "start must be a TrainProgress, got TrainState", start=progress.state)
    longer = dataclasses.replace(CONFIG, steps=9)
    refuses(
        ValueError,
        "start must be progress of this network and config",
        start=progress,
        config=longer,
    )
    other = progress._replace(step=jnp.int32(8))
    refuses(ValueError, r"start.step must lie in \[0, 7\], got 8", start=other)
    nan = ss.TaskData(jnp.full((8, 6, 6, 3), jnp.nan), good[0].labels)
    refuses(ValueError, "training diverged", batches=[nan] * 7)
