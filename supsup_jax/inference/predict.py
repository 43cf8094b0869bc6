"""Logits under the task that each row belongs to, where ids are known or found."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from supsup_jax.checks import is_traced
from supsup_jax.devices import varying_like
from supsup_jax.inference import arguments, schedule
from supsup_jax.network import Network
from supsup_jax.stores.base import TaskStore
from supsup_jax.types import PyTree, TaskIdError, is_open, num_rows

# The task of rows that `rejection.reject` refuses.
REFUSED = -1
# Rows of one task that go through the network together.
SEGMENT = 32


def predict(
    net: Network, store: TaskStore, x: PyTree, task: jax.Array | np.ndarray | int
) -> jax.Array:
    """Logits [B, C] of x [B, ...] under its task's mask and statistics, in eval mode.

    task: one id, or one for each row, [B], in any mixture: rows are grouped by task, and each
    group goes through the network together, so no network is ever built per example.
    A row of task -1, which `rejection.reject` refused, has NaN for logits. Their argmax is a number
    like any other: a refused row is told by its task.
    Raises TypeError for ids that are not integers, ValueError (TaskIdError) for one out of
    range, where values are known; inside jit an id is clipped to the tasks held, and -1.
    """
    arguments.check_pair(net, store)
    x = arguments.check_input(x)
    told = task if isinstance(task, jax.Array) else np.asarray(task)
    if not jnp.issubdtype(told.dtype, jnp.integer):
        raise TypeError(f"task must hold integer ids, got dtype {told.dtype}")
    task = jnp.asarray(told).astype(jnp.int32)
    if task.shape not in ((), (num_rows(x),)):
        raise ValueError(f"task must be one id or [{num_rows(x)}], got shape {task.shape}")
    num_tasks = store.num_tasks
    if not is_traced((told, num_tasks)):
        ids = np.asarray(told)  # as they are: in 32 bits a large one would be another
        low, high = int(ids.min()), int(ids.max())
        if low < REFUSED or high >= int(num_tasks):
            raise TaskIdError(
                f"task must lie in [0, {int(num_tasks)}), or be {REFUSED} of rows that reject "
                f"refused, got {low} to {high}"
            )
    return _predict(net, store, x, task)


@jax.jit
def _predict(net, store, x, task):
    if task.ndim:
        return schedule.over_rows(_each_under_its_own, store, (x, task), net)
    return schedule.over_rows(_all_under_one, store, x, net, task)


def _all_under_one(store, x, net, task):
    slot = store.slot_of(jnp.clip(task, 0, store.all_tasks - 1))
    return _unless_refused(task, store.devices.total(_logits_under(net, store, x, slot)))


def _each_under_its_own(store, rows, net):
    x, task = rows
    slot = store.slot_of(jnp.clip(task, 0, store.all_tasks - 1))
    index = jnp.arange(task.shape[0], dtype=jnp.int32)
    found = grouped(functools.partial(_logits_under, net, store), x, index, slot)
    return _unless_refused(task, store.devices.total(found))


def _unless_refused(task, logits):
    return jnp.where((task < 0)[..., None], jnp.asarray(jnp.nan, logits.dtype), logits)


def _logits_under(net, store, x, slot):
    return store.under(slot, lambda task: net(task.mask, x, task.state))


def grouped(
    function: Callable[[PyTree, jax.Array], jax.Array],
    x: PyTree,
    rows: jax.Array,
    ids: jax.Array,
) -> jax.Array:
    """function(x[rows], id) [R, ...] of rows [R] of x, each with an id of its own, ids [R].

    function: (part of x [r, ...], one id) -> [r, ...], row for row. Rows of one id go through it
    together, and no more than a segment of x is copied at a time.
    """
    count = rows.shape[0]
    segment = SEGMENT if is_open(count) else min(SEGMENT, count)
    order = jnp.argsort(ids)
    ids, rows = ids[order], rows[order]
    # A segment starts where the id changes, and every `segment` rows within a run of one id.
    place = jnp.arange(count, dtype=jnp.int32)
    changes = jnp.concatenate([jnp.ones(1, bool), ids[1:] != ids[:-1]])
    run_start = lax.cummax(jnp.where(changes, place, 0))
    starts_segment = (place - run_start) % segment == 0
    starts = jnp.nonzero(starts_segment, size=count, fill_value=count)[0].astype(jnp.int32)
    padded = jnp.concatenate([rows, jnp.zeros(segment, rows.dtype)])
    like = jax.eval_shape(function, jax.tree.map(lambda leaf: leaf[:1], x), ids[0])

    # Rows beyond a segment's own come out under the wrong id, and the next segment, which
    # starts there, overwrites them. A scan over cond, not a while loop: it can be differentiated.
    def send(out, start):
        def forward(out):
            index = lax.dynamic_slice_in_dim(padded, start, segment)
            part = function(jax.tree.map(lambda leaf: leaf[index], x), ids[start])
            return lax.dynamic_update_slice_in_dim(out, part, start, 0)

        return lax.cond(start < count, forward, lambda out: out, out), None

    out = jnp.zeros((count + segment, *like.shape[1:]), like.dtype)
    out, _ = lax.scan(send, varying_like(varying_like(out, x), ids), starts)
    return out[jnp.argsort(order)]
