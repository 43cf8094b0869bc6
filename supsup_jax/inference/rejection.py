"""None of these: inputs of no learned task, told by how little one task stands out.

A rule always names one of the tasks it has. How sure it was is read off its scores, and a threshold
found on inputs of the learned tasks says from where on to believe it:

    rejection = calibrate(one_shot(net, store, known), rate=0.01)
    belief = reject(one_shot(net, store, x), rejection)      # task -1: none of these

The inputs to calibrate on should be new to their masks, as test images are: of those a task was
trained on it is surer. Measured by experiments.none_of_these.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from supsup_jax.checks import check_type
from supsup_jax.types import TaskBelief

Confidence = Callable[[TaskBelief], jax.Array]  # [B] or [], higher is surer


def confidence(belief: TaskBelief) -> jax.Array:
    """T max_i softmax(scores)_i, float32 [B] or []: 1 where no task stands out, T where one does.

    The statistic by which the paper (section 3.4) tells a new task, over the T finite scores. Made
    for scores of `one_shot`. Those of `oracle` and `rerank` say more on their own (`best_score`),
    the coefficients of `descend` and the rounds of `binary_search` little.
    """
    check_type("belief", belief, TaskBelief)
    scores = belief.scores
    num_tasks = jnp.sum(jnp.isfinite(scores), axis=-1, dtype=jnp.float32)
    return num_tasks * jnp.max(jax.nn.softmax(scores, axis=-1), axis=-1)


def best_score(belief: TaskBelief) -> jax.Array:
    """The score of the task named, float32 [B] or [].

    For `rerank` and `oracle`, where it is -judge of the output under that task's mask alone. With
    judge = Superfluous it is log P(labels), which separates best of all that was measured.
    """
    check_type("belief", belief, TaskBelief)
    return jnp.max(belief.scores, axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rejection:
    """A threshold on a belief's confidence: a pytree, which goes into jit as an argument.

    threshold: float32 [], below which an input is refused.
    statistic: what is compared with it; static, so it must hash by value.
    """

    threshold: jax.Array
    statistic: Confidence = dataclasses.field(default=confidence, metadata={"static": True})


def calibrate(
    belief: TaskBelief, rate: float = 0.01, statistic: Confidence = confidence
) -> Rejection:
    """The threshold that refuses a fraction `rate` of inputs known to be of learned tasks.

    belief: of N such inputs, [N], by the rule, objective and number of deciding images to be used
      later. floor(rate N) of them are refused, fewer only where several are equally unsure.
    statistic: belief -> float32 [B] or [], higher is surer.
    Raises ValueError unless 0 < rate < 1 and N >= 1 / rate, and, where values are known, when all
    are equally sure (as among one task), or one is not a number; TypeError for other arguments.
    """
    check_type("belief", belief, TaskBelief)
    if not callable(statistic) or not isinstance(statistic, Hashable):
        raise TypeError(f"statistic must be a hashable function of a belief, got {statistic!r}")
    if isinstance(rate, bool) or not isinstance(rate, float | int | np.floating):
        raise TypeError(f"rate must be a number in (0, 1), got {rate!r}")
    if not 0 < rate < 1:
        raise ValueError(f"rate must lie in (0, 1), got {rate!r}")
    if belief.task.ndim != 1:
        raise ValueError(
            "belief must be of N inputs of learned tasks, task [N] (per_example, or many decisions "
            f"stacked), got task of shape {belief.task.shape}"
        )
    num_inputs = len(belief.task)
    # Rounded up by what float arithmetic may have lost: .29 * 100 is below 29.
    refused = math.floor(rate * num_inputs * (1 + 1e-9))
    if not refused:
        raise ValueError(
            f"rate {rate:g} needs at least {math.ceil(1 / rate)} inputs to be calibrated on, "
            f"got {num_inputs}"
        )
    values = statistic(belief)
    if jnp.shape(values) != belief.task.shape:
        raise ValueError(
            f"statistic must return one number a decision, {belief.task.shape}, "
            f"got shape {jnp.shape(values)}"
        )
    if not isinstance(values, Tracer):
        known = np.asarray(values)
        if np.isnan(known).any():
            raise ValueError(f"statistic is not a number for {np.isnan(known).sum()} of the inputs")
        if (known == known[0]).all():
            raise ValueError(
                f"all {num_inputs} inputs are equally sure ({known[0]:g}): among one task there is "
                "nothing to tell, and the scores of some rules do not measure certainty"
            )
    return Rejection(jnp.sort(values)[refused].astype(jnp.float32), statistic)


def reject(belief: TaskBelief, rejection: Rejection) -> TaskBelief:
    """The belief with task -1 where its confidence lies below the threshold; scores as they are.

    What is not a number is refused. `predict` gives rows of task -1 logits of NaN.
    Raises TypeError unless given a TaskBelief and a Rejection.
    """
    check_type("belief", belief, TaskBelief)
    if not isinstance(rejection, Rejection):
        raise TypeError(f"rejection must come from calibrate, got {type(rejection).__name__}")
    sure = rejection.statistic(belief) >= rejection.threshold
    return belief._replace(task=jnp.where(sure, belief.task, -1).astype(jnp.int32))
