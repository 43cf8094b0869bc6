"""Who knows the task: the paper's four scenarios, and the learner of NNs, where no one ever does.

Scenario NNs (paper sections 3.4 and 4.3): batches come without a task id, in training as in
testing. At the first batch of every window the learner asks all its masks at once. With scores
-dF/da at equal coefficients and nu = softmax(scores), a mask that knows the batch stands out; where
none does, nu is nearly uniform, and a new mask is allocated. The chosen mask then learns for the
whole window, whatever comes.

Masks that may be trained again need their real-valued scores and their optimizer's state; those
stay on the host, an entry a mask, and only the mask in training visits the device.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from supsup_jax import masks, prng
from supsup_jax.checks import check_int, check_key, check_type
from supsup_jax.inference.arguments import check_objective, check_pair
from supsup_jax.inference.one_shot import one_shot
from supsup_jax.network import Network
from supsup_jax.objectives import entropy
from supsup_jax.stores.mask_store import MaskStore
from supsup_jax.training.config import TrainConfig
from supsup_jax.training.steps import (
    TrainState,
    all_finite,
    batch_indices,
    check_labels,
    data_step,
    diverged,
    init_train_state,
    mask_loss,
    task_of,
)
from supsup_jax.types import Objective, TaskData

BEYOND = ("reuse", "skip")
# Standard deviations of a normal in one median absolute deviation of it: 1 / Phi^-1(3/4).
NORMAL = 1.4826
# Masks of which the deviation is known well enough. Among fewer chance does not pass eps, and of
# masks that lead by 8 deviations one of twenty seems to lead by less than 5 (drawn, 5 to 10 masks).
FEW = 50
# Room of a store without a budget, before it doubles.
CAPACITY = 64


@dataclasses.dataclass(frozen=True)
class StreamConfig:
    """How a stream without task ids is learned; hashable by value.

    The defaults are the reference's: see `observe` for what each field decides.
    Raises TypeError or ValueError on construction for a field out of range.
    """

    window: int = 100  # batches from one decision to the next
    eps: float = 1 / 8  # new where max nu < (1 + eps) / max(T, floor)
    floor: int = 5  # masks asked at least: beside few allocated ones stand random decoys
    budget: int | None = None  # masks allocated at most; None for no end
    beyond: str = "reuse"  # once the budget is spent; or "skip", as the reference does
    objective: Objective = entropy
    # Of each mask: its steps are the windows it is chosen for. `train.steps` is only read by a
    # schedule, and by `draw_windows` as the length of a task's stay in the stream.
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    # For streams of thousands of tasks, where by eps alone some are merged: among FEW masks or more
    # the best score must also lead the others by so many standard deviations, such as 5 (`is_new`).
    deviations: float | None = None

    def __post_init__(self):
        for name, least in (("window", 1), ("floor", 2), ("budget", 1)):
            if (value := getattr(self, name)) is not None or name != "budget":
                check_int(name, value, least)
        if not 0 < self.eps < self.floor - 1:
            raise ValueError(
                f"eps must lie in (0, floor - 1) = (0, {self.floor - 1}), for no nu exceeds 1 and "
                f"every window would be new; got {self.eps!r}"
            )
        if self.deviations is not None and not 0 < self.deviations < math.inf:
            raise ValueError(f"deviations must be positive or None, got {self.deviations!r}")
        if self.beyond not in BEYOND:
            raise ValueError(f"beyond must be one of {BEYOND}, got {self.beyond!r}")
        check_objective(self.objective)
        check_type("train", self.train, TrainConfig)
        if self.train.balanced:
            raise ValueError("balanced has no part in a stream, whose windows are given")

    def threshold(self, allocated: int) -> float:
        """What max nu must reach for T = `allocated` masks to know a batch."""
        return (1 + self.eps) / max(allocated, self.floor)


class StreamState(NamedTuple):
    """What a learner knows between two windows: a pytree.

    store: max(T, floor) masks; the first T are allocated, the others decoys.
    slots: of each mask in the store scores, optimizer state and statistics, in NumPy.
    allocated: T. windows: seen so far. skipped: of these, not learned from (budget, "skip").
    key: draws the scores of every slot, and augments.
    """

    store: MaskStore
    slots: tuple[TrainState, ...]
    allocated: int
    windows: int
    skipped: int
    key: jax.Array

    def __repr__(self) -> str:
        return (
            f"StreamState({self.allocated} masks and {len(self.slots) - self.allocated} decoys "
            f"after {self.windows} windows)"
        )


class Decision(NamedTuple):
    """What happened at one window.

    mask: id of the mask that learned from it, -1 when it was skipped.
    allocated: whether that mask is new.
    max_nu, threshold: new where max_nu < threshold; max_nu is None at the first window, which
      asks no one.
    loss: mean cross-entropy of the window's batches in nats, each before its step; None when it
      was skipped.
    lead: of the best score over the others (`lead`); None where max_nu is.
    """

    mask: int
    allocated: bool
    max_nu: float | None
    threshold: float
    loss: float | None
    lead: float | None = None  # in runs saved before it was told


def novelty(scores: jax.Array) -> jax.Array:
    """max nu [...] of scores -dF/da [..., K], -inf where there is no mask: low is new."""
    return jnp.max(jax.nn.softmax(scores, axis=-1), axis=-1)


def lead(scores: jax.Array) -> jax.Array:
    """How far the best of scores [..., K] stands above the others, [...] in standard deviations.

    Counted from the median of the others, those above -inf, in their median absolute deviation, so
    that a second mask of the same task does not hide the first. Among T masks of other tasks, of
    normal scores, the highest leads by sqrt(2 log T) at most about. 0 where all are equal; inf, or
    near it, where most of the others are, as one other is; nan for a mask alone.
    """
    best = jax.nn.one_hot(jnp.argmax(scores, axis=-1), scores.shape[-1], dtype=bool)
    others = (scores > -jnp.inf) & ~best
    median = _median(scores, others)
    deviation = NORMAL * _median(jnp.abs(scores - median), others)
    ahead = jnp.max(scores, axis=-1, keepdims=True) - median
    return jnp.squeeze(ahead / jnp.maximum(deviation, jnp.finfo(ahead.dtype).tiny), -1)


def _median(values, where):
    """Of those of values [..., K] that count, [..., 1]; without the NaNs of jnp.nanmedian."""
    rising = jnp.sort(jnp.where(where, values, jnp.inf), axis=-1)
    count = jnp.sum(where, axis=-1, keepdims=True)
    low, high = (jnp.take_along_axis(rising, i, -1) for i in ((count - 1) // 2, count // 2))
    return (low + high) / 2


def is_new(
    scores: jax.Array, eps: jax.Array | float = 1 / 8, deviations: jax.Array | float | None = None
) -> jax.Array:
    """Whether no mask stands out, bool [...] of scores [..., K]: max nu < (1 + eps) / T.

    T counts the masks asked, those with scores above -inf (`golden/novelty.npz`).
    deviations: among FEW masks or more also where `lead` is below so many. The highest of T chance
      scores rises with T and with the spread of all, and at thousands passes 1 + eps.
    """
    num_masks = jnp.sum(scores > -jnp.inf, axis=-1)
    highest = novelty(scores)
    new = highest < (1 + eps) / num_masks.astype(highest.dtype)
    if deviations is None:
        return new
    return new | ((num_masks >= FEW) & (lead(scores) < deviations))


def init_stream(key: jax.Array, net: Network, config: StreamConfig = StreamConfig()) -> StreamState:
    """A learner that has seen nothing: `floor` decoys.

    key: draws all that is random; equal keys and streams give equal learners.
    Raises TypeError for the wrong types.
    """
    _check_types(key, net, config)
    slots = [fresh_slot(key, i, net, config) for i in range(config.floor)]
    return restore_stream(key, net, slots, config)


def restore_stream(
    key: jax.Array,
    net: Network,
    slots: list[TrainState],
    config: StreamConfig = StreamConfig(),
    *,
    allocated: int = 0,
    windows: int = 0,
    skipped: int = 0,
) -> StreamState:
    """The learner that had these `slots` and counters; the store follows from the slots.

    Raises TypeError or ValueError for what no learner of this config can have had.
    """
    _check_types(key, net, config)
    _check_counts(allocated, len(slots), config)
    capacity = max(config.budget or CAPACITY, config.floor, len(slots))
    store = MaskStore.create(net, capacity)
    for slot in slots:
        net.layout.leaves(slot.scores, "the scores of a slot")
        store = store.append(_task(net, slot, config=config.train), donate=True)
    return StreamState(store, tuple(slots), allocated, windows, skipped, key)


def fresh_slot(key: jax.Array, i: int, net: Network, config: StreamConfig) -> TrainState:
    """Slot i as it starts, in NumPy: random scores, no steps behind it."""
    return jax.device_get(_fresh(key, np.int32(i), net, config=config.train))


def draw_windows(key: jax.Array, num_examples: int, config: StreamConfig) -> jax.Array:
    """Examples of each window of a task's stay in a stream, int32 [windows, window, batch_size].

    `train.steps` batches, sampled as `train_task` samples them.
    Raises ValueError unless whole windows fit, and for no examples.
    """
    if config.train.steps % config.window:
        raise ValueError(
            f"train.steps must be a multiple of window ({config.window}), so that whole windows "
            f"fit into a task's stay, got {config.train.steps}"
        )
    if num_examples < 1:
        raise ValueError(f"num_examples must be at least 1, got {num_examples}")
    index = _draw(key, num_examples, config.train)
    return index.reshape(-1, config.window, config.train.batch_size)


def observe(
    state: StreamState,
    net: Network,
    data: TaskData,
    index: jax.Array,
    config: StreamConfig = StreamConfig(),
    *,
    donate: bool = False,
) -> tuple[StreamState, Decision]:
    """One window of a stream: which mask it belongs to, and that mask after learning from it.

    data, index [window, B]: the window's batches, data.batch(index[i]); nothing else of `data`
      is looked at. A view gives every part of a stream its own pixels over one copy of images.

    The rule (paper section 3.4; the numbers are the reference's). The first window is mask 0.
    Later ones ask, with their first batch, max(T, floor) masks of equal coefficients: the T
    allocated, and decoys with random scores while T < floor. If max nu is below the threshold,
    or by `deviations` the lead too short, a new mask is allocated (slot T, the decoy there where
    there is one); else argmax nu learns. A decoy that wins is allocated too, exchanged with slot T,
    so that allocated masks are always the first. The reference instead trains such a decoy
    uncounted.

    Once T = budget, a window that wants a new mask is learned by the best allocated one
    ("reuse": under a budget of 1 one mask learns everything), or not at all ("skip"; the
    reference goes on skipping up to the task's end, which it should not know). Decoys are asked
    all the same where floor > budget.

    donate: consume the state's store, as `MaskStore.append` does, where its copy would cost more
      than the window; an error leaves it as it was. Without it `state` is as before.
    Equal shapes compile once, for all masks and windows, and again each time a store without a
    budget doubles.
    Raises TypeError or ValueError before computing for what does not fit, such as a stream of one
    class, and ValueError when training ends with scores or losses that are not finite.
    """
    _check_types(state.key, net, config)
    _check_window(state, net, data, index, config)
    allocated = state.allocated
    slot, winner, max_nu, ahead = _choose(state, net, data, index, config)
    threshold = config.threshold(allocated)
    state = state._replace(windows=state.windows + 1)
    if slot is None or winner is None:
        skipped = state._replace(skipped=state.skipped + 1)
        return skipped, Decision(-1, False, max_nu, threshold, None, ahead)

    store, slots = state.store, list(state.slots)
    if slot == len(slots):
        slots.append(fresh_slot(state.key, slot, net, config))
    if winner != slot:
        slots[slot], slots[winner] = slots[winner], slots[slot]
    first = np.int32((state.windows - 1) * len(index))
    after, task, loss, finite = _learn(
        state.key, net, data, index, slots[slot], first, config=config.train
    )
    after, finite, loss = jax.device_get((after, finite, loss))
    if not (finite and np.isfinite(loss).all()):
        raise diverged(config.train, f" at window {state.windows - 1}")
    # From here on nothing fails, so that an error leaves a donated store as it was.
    if winner != slot:
        store = store.replace(winner, _task(net, slots[winner], config=config.train), donate=donate)
    appended = slot == int(store.num_tasks)
    store = (
        store.append(task, donate=donate) if appended else store.replace(slot, task, donate=donate)
    )
    slots[slot] = after
    state = state._replace(store=store, slots=tuple(slots), allocated=max(allocated, slot + 1))
    return state, Decision(slot, slot == allocated, max_nu, threshold, float(loss.mean()), ahead)


def allocated_store(state: StreamState) -> MaskStore:
    """The T allocated masks, without decoys: what inference and evaluation ask."""
    store = state.store
    for decoy in reversed(range(state.allocated, len(state.slots))):
        store = store.remove(decoy)
    return store


def _choose(state, net, data, index, config):
    """(slot to train, slot whose scores it takes over, max nu, lead); slot None to skip."""
    allocated = state.allocated
    if allocated == 0:
        return 0, 0, None, None
    asked = net, state.store, data, index, np.int32(allocated), config.eps, config.deviations
    found = jax.device_get(_ask(*asked, objective=config.objective))
    best, best_allocated, max_nu, ahead, new = (each.item() for each in found)
    if not new and best < allocated:
        return best, best, max_nu, ahead
    if allocated < (config.budget or math.inf):
        return allocated, allocated if new else best, max_nu, ahead
    if config.beyond == "reuse":
        return best_allocated, best_allocated, max_nu, ahead
    return None, None, max_nu, ahead


@functools.partial(jax.jit, static_argnames="objective")
def _ask(net, store, data, index, allocated, eps, deviations, *, objective):
    x, _ = data.batch(index[0])
    best, scores = one_shot(net, store, x, objective, per_example=False)
    own = jnp.where(jnp.arange(store.capacity) < allocated, scores, -jnp.inf)
    new = is_new(scores, eps, deviations)
    return best, jnp.argmax(own), novelty(scores), lead(scores), new


@functools.partial(jax.jit, static_argnames="config")
def _learn(key, net, data, index, before, first, *, config):
    """The slot after a window's batches, numbered from `first`; its task, the losses, and whether
    the scores are finite.
    """
    augment_key = prng.purpose_key(key, "augment")
    step = functools.partial(data_step, augment_key, mask_loss(net, config), data, config)
    after, loss = lax.scan(step, before, (first + jnp.arange(len(index)), index))
    return after, _task(net, after, config=config), loss, all_finite(after.scores)


@functools.partial(jax.jit, static_argnames="config")
def _fresh(key, i, net, *, config):
    key = jax.random.fold_in(prng.purpose_key(key, "slots"), i)
    scores = masks.draw_scores(key, net.layout)
    return init_train_state(key, config, scores, net.state)


_task = functools.partial(jax.jit, static_argnames="config")(task_of)
_draw = functools.partial(jax.jit, static_argnums=(1, 2))(batch_indices)


def _check_types(key, net, config):
    check_key(key)
    check_type("net", net, Network)
    check_type("config", config, StreamConfig)


def _check_counts(allocated, num_slots, config):
    if num_slots != max(allocated, config.floor):
        raise ValueError(
            f"a learner of {allocated} masks and floor {config.floor} has "
            f"{max(allocated, config.floor)} slots, got {num_slots}; keep one floor"
        )
    if allocated > (config.budget or math.inf):
        raise ValueError(
            f"the learner has {allocated} masks already, more than the budget of {config.budget}"
        )


def _check_window(state, net, data, index, config):
    """Raises unless the window is one of this learner's."""
    check_type("data", data, TaskData)
    check_pair(net, state.store)
    _check_counts(state.allocated, len(state.slots), config)
    data.check()
    check_labels(net, data, config.train)
    want = (config.window, config.train.batch_size)
    if not hasattr(index, "dtype") or not np.issubdtype(index.dtype, np.integer):
        got = getattr(index, "dtype", type(index).__name__)
        raise TypeError(f"index must be an array of integers, got {got}")
    if index.shape != want:
        raise ValueError(
            f"index must be [window, train.batch_size] = [{want[0]}, {want[1]}], "
            f"got shape {index.shape}"
        )
    low, high = int(np.min(index)), int(np.max(index))
    if low < 0 or high >= data.num_examples:
        raise ValueError(f"index must lie in [0, {data.num_examples}), got {low} to {high}")
    labels = np.asarray(data.labels[index])
    if labels.min() == labels.max():
        raise ValueError(
            f"a window must hold labels of at least two classes, got only class {labels.min()}: "
            "there is nothing to tell apart, and any mask would seem to know it"
        )
