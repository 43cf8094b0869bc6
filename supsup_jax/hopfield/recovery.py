"""Finding a task's mask in a Hopfield network from images alone (HopSupSup, section 3.5).

Descent from the mean of all masks makes the output certain first, then the energy low.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.core import Tracer

from supsup_jax import masks
from supsup_jax.checks import check_int, check_type
from supsup_jax.hopfield.store import HopfieldStore, checked_mask, energy
from supsup_jax.inference.arguments import check_objective
from supsup_jax.inference.one_shot import Uncertainty
from supsup_jax.network import Network
from supsup_jax.objectives import entropy
from supsup_jax.training.config import TrainConfig
from supsup_jax.types import Objective, PyTree


@dataclasses.dataclass(frozen=True)
class RecoveryConfig:
    """How a mask is recovered; hashable by value. The defaults are the paper's.

    Raises ValueError on construction for a number out of range.
    """

    gamma: float = 1.5e-3  # of the energy beside the uncertainty
    learning_rate: float = 500.0  # of sgd on the scores, which the mean of masks starts in [-1, 1]
    momentum: float = 0.9
    weight_decay: float = 1e-4  # added to the gradient
    # The uncertainty is that of the real-valued mask (z + 1) / 2 clipped to [0, 1], at first the
    # mixture of all masks, and its gradient passes through the Hopfield weights, which keep the
    # part of it that stored masks explain. Not the paper's; faster and surer, see `recover`.
    guided: bool = False

    def __post_init__(self):
        self.transformation()  # which checks its own numbers
        if not 0 <= self.gamma < math.inf:
            raise ValueError(f"gamma must lie in [0, inf), got {self.gamma!r}")
        if not isinstance(self.guided, bool):
            raise ValueError(f"guided must be True or False, got {self.guided!r}")

    def transformation(self) -> optax.GradientTransformation:
        """The optimizer, as optax builds it."""
        return TrainConfig(
            optimizer="sgd",
            learning_rate=self.learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        ).transformation()


class Recovery(NamedTuple):
    """A mask found again by `recover` in S steps.

    mask: bool pytree like a mask. scores: real-valued scores behind it.
    uncertainty: float32 [S], the mean objective of each step's batch, before its update.
    energy: float32 [S], summed over the leaves, before each update.
    distance: int32 [S + 1] for each leaf, in a pytree like a mask: bits that differ from the
      target at the start and after each step; None without a target.
    """

    mask: PyTree
    scores: PyTree
    uncertainty: jax.Array
    energy: jax.Array
    distance: PyTree = None


def recover(
    net: Network,
    store: HopfieldStore,
    x: jax.Array | Iterable[jax.Array],
    config: RecoveryConfig = RecoveryConfig(),
    *,
    objective: Objective = entropy,
    target: PyTree | None = None,
) -> Recovery:
    """The mask of the task that the batches x come from: one gradient step a batch.

    Step b of S descends (1 - b/S) F + gamma (b/S) E in the scores z, b = 1 ... S: F the mean
    objective of batch b's logits under the mask z >= 0, E the sum of the leaves' energies of the
    +-1 pattern 2 mask - 1. z starts at the mean of the +-1 masks stored. Under differentiation
    the mask is the identity in z, so the pattern's derivative is 2, as in the reference.
    The weight of F is 0 in the last step, so the last batch decides nothing, whatever it holds.

    The paper's rule (the default) can end in another task's mask, or in one task's mask in one
    leaf and another's in the next, without a sign of it. On SplitMNIST (`experiments.split_mnist`)
    it recovered 92 of 100 masks of seeds 6 to 25, the authors' code as many, and 25 of 30 of seeds
    0 to 5; config.guided all of these 30, in 2 to 8 steps in place of 14 to 31, though in three
    other orders of the images 43 of 45 (seeds 0 to 2), of which `recover_best` found all: it tells
    wrong masks by their uncertainty.

    x: [S, B, ...], the task's test stream in batches (`data.one_pass`), or an iterable of S
      batches [B, ...], which is read whole. S is part of what is compiled.
    target: a mask, if known; it is only measured against.
    Raises TypeError or ValueError for arguments that do not fit, and for an empty store.
    """
    check_type("store", store, HopfieldStore)
    check_type("config", config, RecoveryConfig)
    store.check_fits(net)
    store.check_holds_tasks()
    check_objective(objective)
    x = _stacked(x)
    if target is not None:
        leaves = checked_mask(net.layout, target, "target")
        target = net.layout.tree([jnp.asarray(leaf) != 0 for leaf in leaves])
    return _recover(net, store, x, target, config=config, objective=objective)


class BestRecovery(NamedTuple):
    """The best of several recoveries.

    best: the Recovery of the lowest uncertainty. chosen: int32 [], which of the attempts.
    uncertainty: float32 [A], of each attempt's mask over all of x.
    attempts: the A recoveries, masks settled, in the order in which they were found.
    """

    best: Recovery
    chosen: jax.Array
    uncertainty: jax.Array
    attempts: tuple[Recovery, ...]


def recover_best(
    net: Network,
    store: HopfieldStore,
    x: jax.Array | Iterable[jax.Array],
    config: RecoveryConfig = RecoveryConfig(guided=True),
    *,
    attempts: int = 3,
    objective: Objective = entropy,
    target: PyTree | None = None,
) -> BestRecovery:
    """The mask of the lowest uncertainty among `attempts`, each recovered without those before.

    Each attempt is `recover` over the whole of x, settled by sign updates, judged by its mean
    objective over x, and removed from the store that the next one searches. Cost grows with
    `attempts` (outside jit T at most) and not with T. All attempts share one compiled program.
    Arguments and errors as `recover`, and ValueError unless attempts is an int of at least 1.
    """
    check_int("attempts", attempts, 1)
    x, left, found, judged = _stacked(x), store, [], []
    for attempt in range(attempts):
        recovery = recover(net, left, x, config, objective=objective, target=target)
        settled = store.settle(recovery.mask)
        found.append(recovery._replace(mask=settled))
        judged.append(_uncertainty(net, settled, x, objective=objective))
        if not isinstance(store.num_tasks, Tracer) and attempt + 1 == int(store.num_tasks):
            break
        left = left.remove(settled)
    uncertainty = jnp.stack(judged)
    chosen = jnp.argmin(uncertainty).astype(jnp.int32)
    best = jax.tree.map(lambda *leaves: jnp.stack(leaves)[chosen], *found)
    return BestRecovery(best, chosen, uncertainty, tuple(found))


@functools.partial(jax.jit, static_argnames="objective")
def _uncertainty(net, mask, x, *, objective):
    def judge(batch):
        return Uncertainty(net, objective).values(mask, batch).mean()

    return jnp.mean(lax.map(judge, x))


@functools.partial(jax.jit, static_argnames=("config", "objective"))
def _recover(net, store, x, target, *, config, objective):
    optimizer, num_steps = config.transformation(), len(x)
    seen = _relaxed if config.guided else masks.threshold_mask
    distance = functools.partial(_distance, target)

    def uncertainty_of(scores, x):
        return Uncertainty(net, objective).values(jax.tree.map(seen, scores), x).mean()

    def step(before, batch):
        scores, state = before
        progress, x = batch
        uncertainty, towards = jax.value_and_grad(uncertainty_of)(scores, x)
        height, downhill = jax.value_and_grad(_energy)(scores, store.weights)
        if config.guided:
            towards = jax.tree.map(_explained, store.weights, towards)
        grads = jax.tree.map(
            lambda f, e: (1 - progress) * f + config.gamma * progress * e, towards, downhill
        )
        updates, state = optimizer.update(grads, state, scores)
        scores = optax.apply_updates(scores, updates)
        return (scores, state), (uncertainty, height, distance(scores))

    start = store.mean
    progress = jnp.arange(1, num_steps + 1, dtype=jnp.float32) / num_steps
    (scores, _), (uncertainty, energies, distances) = lax.scan(
        step, (start, optimizer.init(start)), (progress, x)
    )
    if target is not None:
        distances = jax.tree.map(
            lambda first, rest: jnp.concatenate([first[None], rest]), distance(start), distances
        )
    return Recovery(_bits(scores), scores, uncertainty, energies, distances)


def _bits(scores):
    return jax.tree.map(lambda z: z >= 0, scores)


def _distance(target, scores):
    """Bits of each leaf that differ from the target's; None without one."""
    if target is not None:
        return jax.tree.map(
            lambda mine, wanted: jnp.sum(mine != wanted, dtype=jnp.int32), _bits(scores), target
        )


def _energy(scores, weights):
    patterns = jax.tree.map(lambda z: 2 * masks.threshold_mask(z).reshape(-1) - 1, scores)
    return jnp.sum(jnp.stack(jax.tree.leaves(jax.tree.map(energy, weights, patterns))))


def _explained(weights, grad):
    return jnp.matmul(weights, grad.reshape(-1)).reshape(grad.shape)


def _relaxed(scores):
    """(z + 1) / 2 clipped to [0, 1]; under differentiation not clipped: the derivative is 1/2."""
    half = scores / 2
    return half + lax.stop_gradient(jnp.clip(half + 0.5, 0, 1) - half)


def _stacked(x: Any) -> jax.Array:
    """x [S, B, ...] of an array, or of an iterable of batches."""
    if not hasattr(x, "dtype"):
        if not isinstance(x, Iterable) or isinstance(x, Mapping):
            raise TypeError(
                "x must be an array or an iterable of batches, each one array, got "
                f"{type(x).__name__}"
            )
        batches = list(x)
        if len(shapes := {np.shape(batch) for batch in batches}) > 1:
            raise ValueError(
                f"the batches of x must have one shape, got {sorted(shapes)}: fill the last one "
                "up (data.one_pass does), it decides nothing"
            )
        if not batches:
            raise ValueError("x must hold at least one batch, got none")
        x = jnp.stack([jnp.asarray(batch) for batch in batches])
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            "x must hold floats as the network takes them (data.one_pass applies a TaskData's "
            f"view and transform), got dtype {x.dtype}"
        )
    if x.ndim < 3 or 0 in x.shape[:2]:
        raise ValueError(f"x must be [S, B, ...] with S, B >= 1, got shape {x.shape}")
    return x
