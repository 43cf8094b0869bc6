"""Learning a task from batches as they arrive: data larger than memory, runs longer than a day.

`train_task` holds a task's data on the device and scans over it in one program; here each batch
comes from the host, and between two steps all that training needs to go on is one pytree.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from supsup_jax import network, prng
from supsup_jax.checks import check_type
from supsup_jax.network import Network
from supsup_jax.training.config import TrainConfig
from supsup_jax.training.steps import (
    ScoreMean,
    TrainState,
    check_finite,
    check_start,
    data_step,
    init_train_state,
    learned,
    mask_loss,
    start_scores,
)
from supsup_jax.types import PyTree, TaskData, TrainResult


class TrainProgress(NamedTuple):
    """Training of one task between two steps: arrays only, to be saved and restored.

    step: int32 [], steps taken.
    loss: float32 [steps], NaN for those to come.
    state: scores, optimizer and network behind the last step.
    """

    step: jax.Array
    loss: jax.Array
    state: TrainState


def start_training(
    key: jax.Array,
    net: Network,
    config: TrainConfig,
    init_scores: PyTree | ScoreMean | None = None,
) -> TrainProgress:
    """Progress before the first step, of the shapes and dtypes that it keeps throughout.

    Arguments and errors as in `train_task`, whose scores it draws.
    """
    check_start(key, net, config, init_scores)
    return _start(key, net, init_scores, config)


def train_on_batches(
    key: jax.Array,
    net: Network,
    batches: Iterable[TaskData],
    config: TrainConfig,
    init_scores: PyTree | ScoreMean | None = None,
    *,
    start: TrainProgress | None = None,
    on_step: Callable[[int, TrainProgress], None] | None = None,
) -> TrainResult:
    """Learns one task as `train_task` does, one of `batches` a step.

    batches: each a TaskData of config.batch_size examples, seen as a whole and in its order; of
      one shape, view and transform, so that one program serves all. As many are taken as there
      are steps to go.
    key, init_scores: as in `train_task`.
    start: progress to go on from, with the same key, and `batches` from that step on: then the
      result is what it would have been without the interruption, to the last bit. Not consumed.
    on_step: called with the number of steps taken and the progress after each step. The next
      step consumes that progress: whatever shall outlive the call must be saved or copied in it.
      Reading it waits for the device; the number does not.
    While the device is at a step the host gets the next batch and sends it, and no further: two
    batches are on the device at most.
    Raises as `train_task` does, and ValueError for batches that end early or differ in size.
    Labels are checked in the first batch. A loop of the host, so not for use inside jit.
    """
    if start is None:
        start = start_training(key, net, config, init_scores)
    else:
        check_start(key, net, config, init_scores)
        _check_progress(start, key, net, config)
    done = int(start.step)
    # A copy, as the first step consumes it; the network's own state is among its leaves.
    progress, behind = jax.tree.map(jnp.copy, start), None
    augment_key = prng.purpose_key(key, "augment")
    for i, batch in enumerate(_checked(batches, net, config, done), done + 1):
        progress, loss = _step(augment_key, net, batch, progress, config=config)
        if behind is not None:
            behind.block_until_ready()
        behind = loss
        if on_step is not None:
            on_step(i, progress)
    result = _finish(net, progress, config)
    check_finite(result, config)
    return result


def _checked(batches, net, config, done) -> Iterator[TaskData]:
    """The batches of the steps after `done`."""
    batches = iter(batches)
    for i in range(done, config.steps):
        try:
            batch = next(batches)
        except StopIteration:
            raise ValueError(
                f"batches must hold one for each of the {config.steps - done} steps to go, they "
                f"ended after {i - done}"
            ) from None
        check_type(f"batch {i}", batch, TaskData)
        batch.check()
        if batch.num_examples != config.batch_size:
            raise ValueError(
                f"batch {i} must hold config.batch_size = {config.batch_size} examples, "
                f"got {batch.num_examples}"
            )
        if i == done:
            batch.check_labels(network.num_outputs(net, batch))
        yield batch


def _check_progress(start, key, net, config):
    check_type("start", start, TrainProgress)
    like = jax.eval_shape(functools.partial(_start, config=config), key, net, None)
    kinds = [
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), jax.eval_shape(lambda tree: tree, each))
        for each in (start, like)
    ]
    if kinds[0] != kinds[1]:
        raise ValueError(
            "start must be progress of this network and config: its leaves, shapes or dtypes "
            "differ from those of start_training(key, net, config)"
        )
    if not 0 <= int(start.step) <= config.steps:
        raise ValueError(f"start.step must lie in [0, {config.steps}], got {int(start.step)}")


@functools.partial(jax.jit, static_argnames="config")
def _start(key, net, init_scores, config):
    scores = start_scores(key, net, init_scores)
    state = init_train_state(config, scores, net.state)
    return TrainProgress(jnp.int32(0), jnp.full(config.steps, jnp.nan), state)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="before")
def _step(augment_key, net, batch, before, *, config):
    index = before.step, jnp.arange(batch.num_examples)
    loss = mask_loss(net, config)
    state, value = data_step(augment_key, loss, batch, config, before.state, index)
    return TrainProgress(before.step + 1, before.loss.at[before.step].set(value), state), value


@functools.partial(jax.jit, static_argnames="config")
def _finish(net, progress, config):
    return learned(net, progress.state, progress.loss, config)
