"""Which task's statistics a batch fits: for networks with BatchNorm, and several inputs together.

Under a wrong mask a batch's own mean and variance lie elsewhere than those that the mask was
learned with. No output is looked at; nothing of the kind has been published, and what it reached is
in docs/natural_images.md.
"""

import jax
import jax.numpy as jnp

from supsup_jax.inference import schedule
from supsup_jax.inference.arguments import check_call
from supsup_jax.inference.one_shot import belief
from supsup_jax.network import Network
from supsup_jax.objectives import entropy
from supsup_jax.stores.base import TaskStore
from supsup_jax.types import Objective, PyTree, TaskBelief


def misfit(
    net: Network,
    store: TaskStore,
    x: PyTree,
    objective: Objective = entropy,
    per_example: bool = False,
) -> TaskBelief:
    """Every mask tried alone: scores[i] = minus how far x's own statistics lie from the task's.

    The distance between the statistics of x [B, ...] under mask i and the task's is, for each leaf
    of the state, |batch - task|^2 / (|batch|^2 + |task|^2), in [0, 2]; the score is minus its mean
    over the leaves. Of T forward passes; over a mesh each device sees all rows.
    objective: no part of it; there because rules are called alike.
    Raises as `one_shot`, and ValueError for a network without statistics or per_example, where
    one input has none of its own.
    """
    x = check_call(net, store, x, objective, gradient=False)
    if not net.has_statistics:
        raise ValueError(
            "misfit compares statistics, and this network keeps none (norms by the example): use "
            "oracle"
        )
    if per_example:
        raise ValueError(
            "misfit is of several inputs that decide together (per_example=False, or the protocol "
            "batch-m), not of one"
        )
    return _misfit(net, store, x, objective, per_example)


@schedule.compiled()
def _misfit(net, store, decisions, objective):
    del objective
    rows = decisions.everything  # of all devices: their statistics are of one batch

    def judge(slot):
        def fits(task):
            batch = net.batch_state(net.superpose(task.mask), rows)
            pairs = zip(jax.tree.leaves(batch), jax.tree.leaves(task.state), strict=True)
            each = [
                _distance(*pair) for pair in pairs if jnp.issubdtype(pair[0].dtype, jnp.floating)
            ]
            return -jnp.mean(jnp.stack(each))[None]

        return store.under(slot, fits)

    decision = jax.tree.map(lambda leaf: leaf[:1], rows)
    return belief(store, schedule.over_tasks(store, judge, -jnp.inf, decision))


def _distance(batch, task):
    batch, task = batch.astype(jnp.float32), task.astype(jnp.float32)
    total = jnp.sum(batch**2) + jnp.sum(task**2)
    return jnp.sum((batch - task) ** 2) / jnp.where(total > 0, total, 1)
