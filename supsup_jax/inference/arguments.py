"""One-shot decisions among more tasks than memory holds, in stores that are read one by one."""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from supsup_jax.inference import one_shot as infer
from supsup_jax.network import Network
from supsup_jax.objectives import entropy
from supsup_jax.stores.mask_store import MaskStore
from supsup_jax.types import Objective, StoreError, TaskBelief


def one_shot_streamed(
    net: Network,
    parts: Iterable[MaskStore],
    x: jax.Array,
    objective: Objective = entropy,
    per_example: bool = True,
    implementation: str | None = None,
) -> TaskBelief:
    """`one_shot` among the tasks of all `parts`, numbered through in order.

    parts: stores of tasks of one network, gone through twice and held one at a time: a list, or an
      object whose __iter__ loads one after another, such as from files. A generator is used up
      after one pass and is refused.
    scores: [B, T] or [T], T the tasks of all parts; capacities leave no gaps.
    implementation: as in `contraction.contract`.
    Holds B weight gradients, [B, n] floats. Raises as `one_shot`.
    """
    infer.check_objective(objective)
    infer.check_implementation(implementation)
    if implementation == infer.CERTIFIED:
        raise ValueError(
            "implementation must be None or a form of contraction here: a certificate among the "
            "tasks of one part says nothing of the others"
        )
    infer.check_input(x)
    if iter(parts) is parts:
        raise TypeError(
            "parts are gone through twice: pass a list, or an object whose __iter__ starts anew, "
            f"not a {type(parts).__name__}"
        )
    counts, num_tasks = 0, 0
    for part in parts:
        infer.check_pair(net, part)
        counts = counts + part.counts().astype(jnp.uint32)
        num_tasks += int(part.num_tasks)
    if not num_tasks:
        raise StoreError("parts hold no store: pass at least one")
    v = _weight_gradients(
        net,
        counts.astype(jnp.float32) / np.float32(num_tasks),
        x,
        objective=objective,
        per_example=per_example,
    )
    scores = jnp.concatenate(
        [_scores(part, v, implementation)[..., : int(part.num_tasks)] for part in parts], axis=-1
    )
    return TaskBelief(jnp.argmax(scores, axis=-1).astype(jnp.int32), scores)


@functools.partial(jax.jit, static_argnames=("objective", "per_example"))
def _weight_gradients(net, mean, x, *, objective, per_example):
    mixture = net.layout.unravel(mean)
    state = infer.frozen_state(net, mixture, x)

    def one(x):
        return infer.weight_gradient(net, mixture, x, state, objective)

    return lax.map(one, x[:, None]) if per_example else one(x)


@functools.partial(jax.jit, static_argnames="implementation")
def _scores(part, v, implementation):
    return -part.contract(v, implementation)
