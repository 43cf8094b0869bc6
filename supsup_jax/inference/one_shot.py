"""Finding the task of an input: one forward and backward pass, whatever the number of tasks.

With all masks superposed at coefficients a, the output's uncertainty F has the gradient
dF/da_i = <dF/dW_eff * W, M_i>: one backward pass to the effective weights, then one product of
that vector with the packed masks (paper section 3.3). Every function returns scores in which
higher is better and -inf marks an empty slot.

Called on concrete arrays each function checks its arguments, then runs one jitted program; inside
the caller's own jit the same code becomes part of the caller's program. With a store over a mesh
each device runs that program on its own tasks and rows: `store.spread` sees to it.
"""

import functools
from collections.abc import Callable, Hashable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from supsup_jax.checks import is_traced
from supsup_jax.devices import ROWS, ROWS_OF_SLOTS, SLOTS, WHOLE, in_pieces, varying_like
from supsup_jax.kernels import contraction
from supsup_jax.network import Network
from supsup_jax.objectives import entropy
from supsup_jax.stores.base import TaskStore
from supsup_jax.stores.mask_store import MaskStore
from supsup_jax.types import Objective, PyTree, TaskBelief, TaskIdError

# Weight gradients held at once on a GPU or TPU: 512 MiB of float32. On CPU one at a time, which
# stays in the cache.
GRADIENT_FLOATS = 128 * 1024 * 1024
# On CPU a dense network is probed mask by mask for at least so many decisions among at most so many
# (tasks times deciding examples): 128 decisions take 11 against 105 ms among 10 tasks, and meet
# near 250 tasks.
TANGENTS_FROM = 16
TANGENTS_UPTO = 256
# Examples whose activations are held at once while masks are probed.
TANGENT_EXAMPLES = 16 * 1024
# Rows of one task that `predict` sends through the network together.
SEGMENT = 32
CERTIFIED = "certified"


def alpha_gradient(
    net: Network,
    store: MaskStore,
    x: jax.Array,
    objective: Objective = entropy,
    alphas: jax.Array | None = None,
    per_example: bool = True,
) -> jax.Array:
    """dF/da at coefficients `alphas` ([K] or [T]; None is 1/T each), 0 in empty slots.

    x: [B, ...]. per_example: [B, K], row b the gradient of objective(logits[b]); otherwise [K],
    the gradient of the batch's mean objective (`golden/one_shot.npz`).
    A stateful network uses the statistics of the whole x under the mixture, held constant.
    Raises TypeError or ValueError for arguments that do not fit, and for an empty store.
    """
    check_pair(net, store)
    check_objective(objective)
    check_input(x)
    if alphas is not None:
        alphas = store.per_slot(alphas)
        if alphas.ndim != 1:
            raise ValueError(f"alphas must be [{store.capacity}], got shape {alphas.shape}")
    return _alpha_gradient(net, store, x, alphas, objective=objective, per_example=per_example)


def one_shot(
    net: Network,
    store: MaskStore,
    x: jax.Array,
    objective: Objective = entropy,
    per_example: bool = True,
    implementation: str | None = None,
) -> TaskBelief:
    """The task whose coefficient most lowers the uncertainty: argmax_i -dF/da_i at a = 1/T.

    per_example: task [B], scores [B, K], each row of x for itself; otherwise one decision of the
    whole batch, task [] and scores [K]. Statistics and errors as `alpha_gradient`.
    implementation: how the gradient meets the masks. None: exact (float32), by whatever is fast
      for the device and the sizes. "certified": twice as fast on CPU; the same task, found from
      coarse scores with a proven bound on their error (see `certify`), which come back coarse but
      for those in doubt. Any name of `contraction.contract` forces that form.
    """
    check_pair(net, store)
    check_objective(objective)
    check_implementation(implementation)
    check_input(x)
    return _one_shot(
        net,
        store,
        x,
        objective=objective,
        per_example=per_example,
        implementation=implementation,
    )


def predict(net: Network, store: MaskStore, x: jax.Array, task: jax.Array | int) -> jax.Array:
    """Logits [B, C] of x [B, ...] under its task's mask and statistics, in eval mode.

    task: one id, or one for each row, [B], in any mixture: rows are grouped by task, and each
    group goes through the network together, so no network is ever built per example.
    Raises TypeError for ids that are not integers, ValueError (TaskIdError) for one out of
    range, where values are known; inside jit an id is clipped to the tasks held.
    """
    check_pair(net, store)
    check_input(x)
    task = jnp.asarray(task)
    if not jnp.issubdtype(task.dtype, jnp.integer):
        raise TypeError(f"task must hold integer ids, got dtype {task.dtype}")
    task = task.astype(jnp.int32)
    if task.shape not in ((), (x.shape[0],)):
        raise ValueError(f"task must be one id or [{x.shape[0]}], got shape {task.shape}")
    num_tasks = store.num_tasks
    if not is_traced((task, num_tasks)):
        ids = np.asarray(task)
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= int(num_tasks):
            raise TaskIdError(f"task must lie in [0, {int(num_tasks)}), got {low} to {high}")
    return _predict(net, store, x, task)


def check_pair(net: Network, store: MaskStore) -> None:
    """Raises TypeError or ValueError unless the store holds tasks of this network."""
    if not isinstance(store, TaskStore):
        raise TypeError(f"store must be a MaskStore, got {type(store).__name__}")
    store.check_fits(net)
    store.check_holds_tasks()


def check_objective(objective: Objective, name: str = "objective") -> None:
    if not isinstance(objective, Callable) or not isinstance(objective, Hashable):
        raise TypeError(f"{name} must be a hashable function of logits, got {objective!r}")


def check_implementation(implementation: str | None) -> None:
    names = (CERTIFIED, *contraction.IMPLEMENTATIONS)
    if implementation not in (None, *names):
        raise ValueError(
            f"implementation must be None or one of {sorted(names)}, which run on every device, "
            f"got {implementation!r}"
        )


def check_input(x):
    if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            "x must be a float array as the network takes it (a TaskData's batch(index)[0] applies "
            f"its view and transform), got {getattr(x, 'dtype', type(x).__name__)}"
        )
    if x.ndim < 2 or x.shape[0] == 0:
        raise ValueError(f"x must be [B, ...] with B >= 1, got shape {x.shape}")


def weight_gradient(
    net: Network, mixture: PyTree, x: jax.Array, state: PyTree, objective: Objective
) -> jax.Array:
    """dF/dW_eff * W as one vector [n], F the mean objective of x [B, ...] under `mixture`."""

    def value(mixture):
        return uncertainty(net, mixture, x, state, objective).mean()

    # Inside shard_map the gradient in what all devices share would be summed over them.
    mixture = jax.tree.map(lambda leaf: varying_like(leaf, x), mixture)
    return net.layout.ravel(jax.grad(value)(mixture), "the mixture")


def uncertainty(
    net: Network, mask: PyTree, x: jax.Array, state: PyTree, objective: Objective
) -> jax.Array:
    """The objective, float32 [B], of each row's logits, once it is seen to have that shape."""
    values = objective(net(mask, x, state))
    if values.shape != x.shape[:1]:
        raise ValueError(
            f"objective must map logits [B, C] to [B], here [{x.shape[0]}], "
            f"got shape {values.shape}"
        )
    return values.astype(jnp.float32)


def decide_tasks(
    net: Network,
    store: MaskStore,
    mixture: PyTree,
    x: jax.Array,
    state: PyTree,
    objective: Objective,
) -> jax.Array:
    """Ids int32 [D] of D one-shot decisions, x [D, m, ...], by the fastest form for the device.

    Never holds the scores of more than a piece of the decisions.
    """

    def decide(store, net, mixture, x, state):
        def best(x, implementation):
            return gradient_scores(
                net,
                store,
                mixture,
                x,
                state,
                objective,
                implementation,
                finish=lambda gradient: _best(store, _live(store, -gradient)),
            )

        exact = functools.partial(best, implementation=None)
        if _few_tasks(store, x):
            return store.devices.best(*exact(x))
        certified = functools.partial(best, implementation=CERTIFIED)
        return store.devices.best(*lax.platform_dependent(x, cpu=certified, default=exact))

    args = ((net, WHOLE), (mixture, WHOLE), (x, ROWS), (state, WHOLE))
    return store.spread(decide, *args, out=ROWS)


def gradient_scores(
    net: Network,
    store: MaskStore,
    mixture: PyTree,
    x: jax.Array,
    state: PyTree,
    objective: Objective,
    implementation: str | None = None,
    finish: Callable[[jax.Array], PyTree] = lambda gradient: gradient,
    together: bool = False,
) -> PyTree:
    """dF/da [D, K] of D decisions, each by the mean objective of m examples, x [D, m, ...].

    Two forms, equal up to rounding. "Gradients": the weight gradient of each decision against all
    masks, one decision after another on CPU, in large pieces elsewhere. "Tangents", on CPU for few
    tasks: for one mask after another, the derivative of all D outputs along it, about a forward
    pass each.
    finish: what to keep of gradients [d, K], with a leading d, before the next piece is computed.
    together: the examples here and those of the other devices make one decision, D = 1.
    """
    num_decisions, num_deciders = x.shape[:2]
    mean = store.devices.mean if together else _unchanged

    def contract(v):
        if implementation == CERTIFIED:
            return -store.certified_scores(-v)
        return store.contract(v, implementation)

    def one(x):
        gradient = contract(mean(weight_gradient(net, mixture, x, state, objective)))
        return jax.tree.map(lambda row: row[0], finish(gradient[None]))

    def many(x):
        v = jax.vmap(weight_gradient, (None, None, 0, None, None))(
            net, mixture, x, state, objective
        )
        return finish(lax.map(contract, v) if implementation == CERTIFIED else contract(v))

    def values(mixture, x):
        flat = x.reshape(-1, *x.shape[2:])
        return uncertainty(net, mixture, flat, state, objective).reshape(x.shape[:2]).mean(axis=1)

    def tangents(x):
        return finish(_tangent_scores(store, values, mixture, x))

    if num_decisions == 1:
        return jax.tree.map(lambda row: row[None], one(x[0]))
    on_cpu = functools.partial(lax.map, one)
    if (
        implementation is None
        and _few_tasks(store, x)
        and _is_dense(net)
        and _has_tangents(values, mixture, x)
    ):
        size = max(1, TANGENT_EXAMPLES // num_deciders)
        on_cpu = functools.partial(in_pieces, tangents, size=size)
    floats = max(net.layout.num_weights, store.capacity)
    elsewhere = functools.partial(in_pieces, many, size=max(1, GRADIENT_FLOATS // floats))
    return lax.platform_dependent(x, cpu=on_cpu, default=elsewhere)


def _few_tasks(store, x):
    """Whether probing mask by mask is cheaper on CPU than a gradient a decision."""
    num_decisions, num_deciders = x.shape[:2]
    return num_decisions >= TANGENTS_FROM and store.capacity * num_deciders <= TANGENTS_UPTO


def _tangent_scores(store, values, mixture, x):
    _, along = jax.linearize(lambda mixture: values(mixture, x), mixture)

    def derivative(i):
        return along(jax.tree.map(lambda mask: mask.astype(jnp.float32), store.mask(i)))

    return over_tasks(store, derivative, 0.0, x)


def over_tasks(
    store: MaskStore, function: Callable[[jax.Array], jax.Array], empty: float, x: jax.Array
) -> jax.Array:
    """function(i) [len(x)] of each task as columns, [len(x), K]; `empty` where there is no task.

    A scan over cond rather than a loop of T rounds: empty slots cost next to nothing, and the
    result can be differentiated.
    """
    nothing = varying_like(jnp.full(len(x), empty, jnp.float32), x)

    def one(i):
        return lax.cond(i < store.num_tasks, function, lambda _: nothing, i)

    return lax.map(one, jnp.arange(store.capacity, dtype=jnp.int32)).T


def _has_tangents(function, *args):
    """Whether forward mode works: a custom_vjp, in the network or the objective, forbids it."""

    def primitives(jaxpr):
        for equation in jaxpr.eqns:
            yield equation.primitive.name
            for param in jax.tree.leaves(equation.params):
                inner = getattr(param, "jaxpr", param)
                if hasattr(inner, "eqns"):
                    yield from primitives(inner)

    names = primitives(jax.make_jaxpr(function)(*args).jaxpr)
    return not any(name.startswith("custom_vjp") for name in names)


def _is_dense(net):
    """Whether a forward pass costs about 2 n operations an example: dense layers only."""
    return all(len(shape) == 2 for shape in net.layout.shapes.values())


def frozen_state(net: Network, mixture: PyTree, x: jax.Array) -> PyTree:
    """The state under which x [B, ...] is judged without an id: its own statistics, constant."""
    return None if net.state is None else net.batch_state(net.superpose(mixture), x)


@functools.partial(jax.jit, static_argnames=("objective", "per_example"))
def _alpha_gradient(net, store, x, alphas, *, objective, per_example):
    def gradient(store, net, x, alphas):
        mixture = store.mixture(alphas)
        state = frozen_state(net, mixture, store.devices.all_rows(x))
        decisions = x[:, None] if per_example else x[None]
        gradient = gradient_scores(
            net, store, mixture, decisions, state, objective, together=not per_example
        )
        return gradient if per_example else gradient[0]

    out = ROWS_OF_SLOTS if per_example else SLOTS
    return store.spread(gradient, (net, WHOLE), (x, ROWS), (alphas, SLOTS), out=out)


@functools.partial(jax.jit, static_argnames=("objective", "per_example", "implementation"))
def _one_shot(net, store, x, *, objective, per_example, implementation):
    def decide(store, net, x):
        mixture = store.mixture()
        state = frozen_state(net, mixture, store.devices.all_rows(x))
        decisions = x[:, None] if per_example else x[None]
        gradient = gradient_scores(
            net,
            store,
            mixture,
            decisions,
            state,
            objective,
            implementation,
            together=not per_example,
        )
        return belief(store, -gradient if per_example else -gradient[0])

    return store.spread(decide, (net, WHOLE), (x, ROWS), out=belief_spec(per_example))


def belief_spec(per_example: bool) -> TaskBelief:
    """Where a belief lies over a mesh."""
    return TaskBelief(ROWS, ROWS_OF_SLOTS) if per_example else TaskBelief(WHOLE, SLOTS)


def belief(store: MaskStore, scores: jax.Array) -> TaskBelief:
    """The belief of scores [..., K], empty slots ruled out; task is the best on all devices."""
    scores = _live(store, scores)
    return TaskBelief(store.devices.best(*_best(store, scores)), scores)


def _live(store, scores):
    """The scores [..., K], -inf in empty slots."""
    live = store.slots.reshape(*[1] * (scores.ndim - 1), store.capacity)
    return jnp.where(live, scores, -jnp.inf)


def _best(store, scores):
    """The best of scores [..., K], and its task."""
    slot = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    score = jnp.take_along_axis(scores, slot[..., None], axis=-1)[..., 0]
    return score, store.devices.first(store.capacity) + slot


def _unchanged(value):
    return value


def _logits_under(net, store, x, slot):
    return store.under(slot, lambda task: net(task.mask, x, task.state))


@jax.jit
def _predict(net, store, x, task):
    def logits(store, net, x, task):
        slot = store.slot_of(jnp.clip(task, 0, store.all_tasks - 1))
        if task.ndim == 0:
            return store.devices.total(_logits_under(net, store, x, slot))
        rows = jnp.arange(len(task), dtype=jnp.int32)
        found = grouped(functools.partial(_logits_under, net, store), x, rows, slot)
        return store.devices.total(found)

    where = ROWS if task.ndim else WHOLE
    return store.spread(logits, (net, WHOLE), (x, ROWS), (task, where), out=ROWS)


def grouped(
    function: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    rows: jax.Array,
    ids: jax.Array,
) -> jax.Array:
    """function(x[rows], id) [R, ...] of rows [R] of x, each with an id of its own, ids [R].

    function: (part of x [r, ...], one id) -> [r, ...], row for row. Rows of one id go through it
    together, and no more than a segment of x is copied at a time.
    """
    num_rows = len(rows)
    segment = min(SEGMENT, num_rows)
    order = jnp.argsort(ids)
    ids, rows = ids[order], rows[order]
    # A segment starts where the id changes, and every `segment` rows within a run of one id.
    place = jnp.arange(num_rows, dtype=jnp.int32)
    changes = jnp.concatenate([jnp.ones(1, bool), ids[1:] != ids[:-1]])
    run_start = lax.cummax(jnp.where(changes, place, 0))
    starts_segment = (place - run_start) % segment == 0
    starts = jnp.nonzero(starts_segment, size=num_rows, fill_value=num_rows)[0].astype(jnp.int32)
    padded = jnp.concatenate([rows, jnp.zeros(segment, rows.dtype)])
    like = jax.eval_shape(function, x[:1], ids[0])

    # Rows beyond a segment's own come out under the wrong id, and the next segment, which
    # starts there, overwrites them. A scan over cond, not a while loop: it can be differentiated.
    def send(out, start):
        def forward(out):
            part = function(x[lax.dynamic_slice_in_dim(padded, start, segment)], ids[start])
            return lax.dynamic_update_slice_in_dim(out, part, start, 0)

        return lax.cond(start < num_rows, forward, lambda out: out, out), None

    out = jnp.zeros((num_rows + segment, *like.shape[1:]), like.dtype)
    out, _ = lax.scan(send, varying_like(varying_like(out, x), ids), starts)
    return out[jnp.argsort(order)]
