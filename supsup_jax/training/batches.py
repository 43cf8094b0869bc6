"""Learning a task from batches as they arrive: data larger than memory, runs longer than a day.

`train_task` holds a task's data on the device and scans over it in one program; here each batch
comes from the host, and between two steps all that training needs to go on is one pytree.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from supsup_jax import prng
from supsup_jax.checks import check_type
from supsup_jax.network import Network
from supsup_jax.training.config import TrainConfig
from supsup_jax.training.steps import (
    ScoreMean,
    TrainState,
    check_finite,
    check_labels,
    check_start,
    data_step,
    init_train_state,
    learned,
    mask_loss,
    start_scores,
)
from supsup_jax.types import PyTree, TaskData, TrainResult, as_data


class TrainProgress(NamedTuple):
    """Training of one task between two steps: arrays only, to be saved and restored.

    step: int32 [], steps taken.
    loss: float32 [steps], 0 for those to come.
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
    init_scores = check_start(key, net, config, init_scores)
    if config.balanced:
        raise ValueError("balanced draws from a task's data, and batches are given: balance those")
    return _start(key, net, init_scores, config)


def train_on_batches(
    key: jax.Array,
    net: Network,
    batches: Iterable[Any],
    config: TrainConfig,
    init_scores: PyTree | ScoreMean | None = None,
    *,
    start: TrainProgress | None = None,
    on_step: Callable[[int, TrainProgress], None] | None = None,
) -> TrainResult:
    """Learns one task as `train_task` does, one of `batches` a step.

    batches: each of config.batch_size examples, seen as a whole and in its order: a TaskData, a
      pair (inputs, labels), or a dict of them (`as_data`), of one shape and transform, so that one
      program serves all. Later ones may be shorter, as the last of a loader's pass is; each new
      length compiles anew. As many are taken as there are steps to go; a loader, which can be gone
      through again, is, and what is a list or a generator must not end early.
    key, init_scores: as in `train_task`. config: its shuffle has no part, and balanced is refused.
    start: progress to go on from, with the same key, and `batches` from that step on: then the
      result is what it would have been without the interruption, to the last bit. Not consumed.
    on_step: called with the number of steps taken and the progress after each step. The next
      step consumes that progress: whatever shall outlive the call must be saved or copied in it.
      Reading it waits for the device; the number does not.
    While the device is at a step the host gets the next batch and sends it, and no further: two
    batches are on the device at most.
    Raises as `train_task` does, and ValueError for batches that end early or hold too many. Labels
    are checked in every batch. A loop of the host, so not for use inside jit.
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
    result = finish(net, progress, config)
    check_finite(result, config)
    return result


def _checked(batches, net, config, done) -> Iterator[TaskData]:
    """The batches of the steps after `done`, each a TaskData."""
    known = None
    for i, batch in zip(range(done, config.steps), _endless(batches, config, done), strict=False):
        what = f"batch {i}"
        batch = as_data(batch, what)
        batch.check()
        size = batch.num_examples
        if size > config.batch_size or (i == done == 0 and size < config.batch_size):
            raise ValueError(
                f"{what} must hold config.batch_size = {config.batch_size} examples, got {size}"
            )
        known = check_labels(net, batch, config, known, what)
        yield batch


def _endless(batches, config, done):
    """The batches, again and again where they can be gone through anew."""
    count, source = 0, iter(batches)
    once = source is batches or isinstance(batches, list | tuple)
    while True:
        before = count
        for batch in source:
            yield batch
            count += 1
        if once or count == before:
            raise ValueError(
                f"batches must hold one for each of the {config.steps - done} steps to go, they "
                f"ended after {count}"
            )
        source = iter(batches)


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
    return begin(init_train_state(key, config, scores, net.state), config)


def begin(state: TrainState, config: TrainConfig) -> TrainProgress:
    """Progress at this state, before the first step."""
    return TrainProgress(jnp.int32(0), jnp.zeros(config.steps, jnp.float32), state)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="before")
def _step(augment_key, net, batch, before, *, config):
    index = before.step, jnp.arange(batch.num_examples)
    loss = mask_loss(net, config)
    state, value = data_step(augment_key, loss, batch, config, before.state, index)
    return TrainProgress(before.step + 1, before.loss.at[before.step].set(value), state), value


@functools.partial(jax.jit, static_argnames="config")
def finish(net: Network, progress: TrainProgress, config: TrainConfig) -> TrainResult:
    """What was learned, after the last step."""
    return learned(net, progress.state, progress.loss, config)
