"""Rules that look at the masks more than once: slower than `one_shot`, and for some inputs surer.

    descend         gradient descent on the coefficients, of which one_shot is the first step
    binary_search   the surest half of the masks again and again, until one is left
    oracle          every mask tried alone
    rerank          the best few of one_shot tried alone

Arguments, beliefs and errors are those of `one_shot`, where the one gradient is.
"""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.core import Tracer

from supsup_jax.checks import check_int
from supsup_jax.devices import ONE_DEVICE, in_pieces, varying_like
from supsup_jax.inference import schedule
from supsup_jax.inference.arguments import check_call, check_measured, check_objective
from supsup_jax.inference.misfit import misfit
from supsup_jax.inference.one_shot import (
    Uncertainty,
    belief,
    live,
    one_shot,
    scores_of,
    task_scores,
)
from supsup_jax.inference.predict import grouped
from supsup_jax.kernels.race import check_error
from supsup_jax.network import Network
from supsup_jax.objectives import Standardised, entropy, of_labels
from supsup_jax.stores.base import TaskStore
from supsup_jax.types import Objective, PyTree, TaskBelief, num_rows

# On CPU the survivors of a binary search are copied together whenever they are a fourth of the
# masks that every round reads, down to stores so small that the network takes as long as they do.
SHRINK = 4
SMALL = 256


def descend(
    net: Network,
    store: TaskStore,
    x: PyTree,
    objective: Objective = entropy,
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    per_example: bool = True,
) -> TaskBelief:
    """Gradient descent on the coefficients over the simplex, from 1/T each.

    Gradients are those along the simplex, and each of the `steps` updates is projected back onto
    it. scores are the final coefficients; of equal ones, as in the corner a large step lands in,
    the lower id wins. One step of small sgd ranks tasks as `one_shot` does.
    optimizer: from optax; keep and reuse one object, as a new one compiles anew.
    per_example needs a mixture per row: [B, n] floats.
    Raises as `one_shot`, and ValueError unless steps is a positive int.
    """
    x = check_call(net, store, x, objective)
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(f"optimizer must come from optax, got {type(optimizer).__name__}")
    check_int("steps", steps, 1)
    return _descend(net, store, x, objective, per_example, optimizer, steps)


def binary_search(
    net: Network,
    store: TaskStore,
    x: PyTree,
    objective: Objective = entropy,
    per_example: bool = True,
    *,
    base: int = 2,
) -> TaskBelief:
    """The paper's Binary (section 3.3): the less promising tasks go out, round after round.

    A round lays the m survivors over each other at 1/m each and keeps the (m - 1) // base + 1 with
    the smallest dF/da, of equal ones the lower ids, until one is left (`golden/one_shot.npz`).
    scores: rounds survived, a whole number. The task survives one more than any other; tasks that
    went out together are equal. Piecewise constant, so its gradient in everything is 0.
    base: 2 halves the survivors. From base = T on there is one round, which is `one_shot`.
    A stateful network uses the statistics of the whole x under each mixture; per_example, then,
    that is B forward passes of the whole x a round.
    Raises as `one_shot`, TypeError or ValueError unless base is an int of at least 2, and
    ValueError where base > T is known, but for T = 1, in which there is nothing to search.
    """
    x = check_call(net, store, x, objective)
    check_int("base", base, 2)
    num_tasks = store.num_tasks
    if not isinstance(num_tasks, Tracer):
        _check_base(base, int(num_tasks))
    return _binary_search(net, store, x, objective, per_example, int(base))


def oracle(
    net: Network,
    store: TaskStore,
    x: PyTree,
    objective: Objective = entropy,
    per_example: bool = True,
) -> TaskBelief:
    """Every mask tried alone: scores[b, i] = -F(logits of x_b under mask i), T forward passes.

    An exhaustive rule, not the truth: judged by entropy it can be worse than `one_shot`.
    per_example False judges the batch's mean. Raises as `one_shot`.
    """
    x = check_call(net, store, x, objective, gradient=False)
    return _oracle(net, store, x, objective, per_example)


def rerank(
    net: Network,
    store: TaskStore,
    x: PyTree,
    objective: Objective = entropy,
    per_example: bool = True,
    *,
    best: int = 5,
    judge: Objective | None = None,
) -> TaskBelief:
    """`one_shot`, and then each of its `best` masks tried alone: the oracle of a short list.

    scores: -judge(logits of x_b under mask i), as `oracle` scores them, for the tasks on the
    list; -inf for the others. best = 1 names the task of `one_shot`, best >= T that of `oracle`.
    best: how long the list is, at most T long.
    judge: what the masks on the list are judged by; None is `objective`.
    Raises as `one_shot`, and TypeError or ValueError unless best is an int of at least 1.
    """
    x = check_call(net, store, x, objective)
    check_int("best", best, 1)
    judge = objective if judge is None else judge
    check_objective(judge, "judge")
    check_measured(judge, store)
    best = min(int(best), store.capacity)
    return _rerank(net, store, x, objective, per_example, best, judge)


def _check_base(base, num_tasks):
    if base > max(2, num_tasks):
        raise ValueError(
            f"base must be at most T, the number of tasks: got base {base} for {num_tasks} tasks; "
            "one_shot names the task in a single round"
        )


@schedule.compiled(num_options=2)
def _descend(net, store, decisions, objective, optimizer, steps):
    x, each = decisions.x, _convolved if store.layout.has_windows else _batched
    uncertainty = Uncertainty.among(net, objective, store.mixture(), decisions.everything)
    # The coefficients are those of all tasks, of other devices too, so that the simplex is one.
    held = store.devices.all_slots(store.slots)
    num_tasks = store.all_tasks.astype(jnp.float32)
    start = held.astype(jnp.float32) / num_tasks
    start = jnp.broadcast_to(start[None], (decisions.num, len(held)))

    def gradient(alphas):
        # One mixture a decision: alphas are batched, so the masks are read once for all.
        mixtures = jax.vmap(store.mixture)(store.devices.own_slots(alphas))

        def slopes(objective):
            own = dataclasses.replace(uncertainty, objective=objective)
            return store.contract(decisions.over_devices(each(own.gradient, mixtures, x)))

        # Along the simplex: what all share, which the projection takes away, is all that is left of
        # a step by an optimizer that divides each slope by its size.
        found = store.devices.all_slots(schedule.by_labels(slopes, objective, store))
        mean = jnp.where(held, found, 0).sum(-1, keepdims=True) / num_tasks
        return jnp.where(held, found - mean, 0)

    def step(carry, _):
        alphas, moments = carry
        updates, moments = optimizer.update(gradient(alphas), moments, alphas)
        moved = _onto_simplex(held, optax.apply_updates(alphas, updates))
        return (moved.astype(jnp.float32), moments), None

    start = varying_like((start, optimizer.init(start)), x)
    (alphas, _), _ = lax.scan(step, start, None, length=steps)
    return belief(store, store.devices.own_slots(alphas))


def _batched(gradient, mixtures, x):
    """The gradients [D, 32 nw] of decisions [D, ...], each under its own mixture."""
    return jax.vmap(gradient)(mixtures, x)


def _convolved(gradient, mixtures, x):
    """As `_batched`. On CPU one by one: convolved together, kernels that differ are slow groups."""
    one_by_one = functools.partial(lax.map, lambda each: gradient(*each))
    return lax.platform_dependent(
        (mixtures, x), cpu=one_by_one, default=lambda each: _batched(gradient, *each)
    )


def _onto_simplex(held, alphas):
    """The nearest coefficients [D, K] on the simplex, 0 in slots that hold no task."""
    # More than 1 below the largest lies outside the simplex.
    top = jnp.max(jnp.where(held[None], alphas, -jnp.inf), axis=-1, keepdims=True)
    # What all have in common decides nothing, and where it is large rounding would.
    return jax.vmap(optax.projections.projection_simplex)(jnp.where(held[None], alphas - top, -2))


class _Field(NamedTuple):
    """Where one search stands among the K slots of a store."""

    alive: jax.Array  # bool [K]
    num_alive: jax.Array  # int32 []; follows from T, so all searches of a batch share it
    survived: jax.Array  # float32 [K], rounds


def _narrow(field, scores, base, devices=ONE_DEVICE):
    """The field after a round in which -dF/da was `scores` [K]; of one survivor, as it is."""
    keep = (field.num_alive - 1) // base + 1

    def best(scores, alive):
        # The sort is stable and takes -0 for 0: of equals the lower id stays. The dead come last.
        order = jnp.lexsort((-scores, ~alive))
        return jnp.zeros_like(alive).at[order].set(jnp.arange(len(order)) < keep)

    alive = devices.across_slots(best, scores, field.alive)
    lived = (alive & (field.num_alive > 1)).astype(jnp.float32)
    return _Field(alive, keep, field.survived + lived)


@schedule.compiled(num_options=1)
def _binary_search(net, store, decisions, objective, base):
    # Loops as long as T asks for cannot be differentiated, and here nothing depends on anything.
    net, x, everything = lax.stop_gradient((net, decisions.x, decisions.everything))
    decisions = decisions._replace(x=x, everything=everything)
    # The first round is one_shot: all decisions share its mixture, which the counts hold ready.
    first = scores_of(net, store, decisions, objective)
    play = functools.partial(_play, net, objective, base, decisions)

    # Over a mesh the survivors stay where they are: some devices may hold many, others none.
    alone = store.devices is ONE_DEVICE
    sizes = _sizes(store.capacity) if alone else [1]
    one_by_one = functools.partial(lax.map, functools.partial(_search, store, play, base, sizes))
    search = functools.partial(_search, store, play, base, [1])
    if not net.has_statistics:
        many = functools.partial(in_pieces, jax.vmap(search), size=schedule.piece_size(store))
    else:  # each has the whole x to itself
        many = functools.partial(lax.map, search)
    survived = lax.platform_dependent((first, x), cpu=one_by_one, default=many)
    return belief(store, survived)


def _sizes(capacity):
    """How many survivors each stage of a search ends with, until 1 is left."""
    sizes = []
    while capacity > SMALL:
        capacity //= SHRINK
        sizes.append(capacity)
    return [*sizes, 1]


def _search(store, play, base, sizes, decision):
    """Rounds survived [K]; survivors of each stage are copied into a store of their own."""
    scores, x = decision
    field = _Field(store.slots, store.all_tasks, jnp.zeros(store.capacity, jnp.float32))
    field = play(store, _narrow(field, scores, base, store.devices), x, sizes[0])
    survived, ids = field.survived, jnp.arange(store.capacity, dtype=jnp.int32)
    for size, until in itertools.pairwise(sizes):
        kept = jnp.nonzero(field.alive, size=size, fill_value=0)[0].astype(jnp.int32)
        store, ids = store.taken(kept, field.num_alive), ids[kept]
        field = field._replace(alive=store.slots, survived=field.survived[kept])
        field = play(store, field, x, until)
        places = jnp.where(store.slots, ids, len(survived))
        survived = survived.at[places].set(field.survived, mode="drop")
    return survived


def _play(net, objective, base, decisions, store, field, x, until):
    """The field once at most `until` tasks of the store are alive, round after round."""

    def contract(v):
        return store.contract(decisions.over_devices(v))

    def play_round(field):
        mixture = store.mixture_of(field.alive)
        state = Uncertainty.among(net, objective, mixture, decisions.everything).state
        alive = field.alive, field.num_alive
        scores = task_scores(net, store, x, objective, state, mixture, contract, alive)
        return _narrow(field, scores, base, store.devices)

    return lax.while_loop(lambda field: field.num_alive > until, play_round, field)


@schedule.compiled()
def _oracle(net, store, decisions, objective):
    rows = decisions.rows
    judge = functools.partial(_judge, net, store, objective, rows)
    scores = schedule.over_tasks(store, judge, -jnp.inf, rows)  # [D m, K]
    scores = scores.reshape(decisions.num, decisions.deciders, store.capacity).mean(axis=1)
    return belief(store, decisions.over_devices(scores))


@schedule.compiled(num_options=2)
def _rerank(net, store, decisions, objective, best, judge):
    slots = store.slot_of(_shortlist(net, store, decisions, objective, best))  # [D, best]
    judge, rows = functools.partial(_judge, net, store, judge), decisions.rows
    if num_rows(rows) == slots.shape[0]:  # each row has a list of its own
        each = jnp.repeat(jnp.arange(slots.shape[0], dtype=jnp.int32), best)
        judged = grouped(judge, rows, each, slots.reshape(-1)).reshape(slots.shape)
    else:
        judged = lax.map(lambda slot: judge(rows, slot).mean(), slots[0])[None]
    # Each device has judged its own, and puts them where its own are.
    scores = jnp.full((slots.shape[0], store.capacity), -jnp.inf, jnp.float32)
    put = jax.vmap(lambda row, slot, new: row.at[slot].set(new, mode="drop"))
    return belief(store, put(scores, slots, decisions.over_devices(judged)))


def _shortlist(net, store, decisions, objective, best):
    """Ids [D, best] of the best of one_shot; beyond the tasks there are, of empty slots."""

    def few(scores):
        # Where argmax, and so one_shot, sees no difference between 0 and -0, top_k does.
        scores = live(store, jnp.where(scores == 0, 0, scores))
        return store.devices.few_here(scores, best)

    found = scores_of(net, store, decisions, objective, finish=few)
    return store.devices.best_few(*found, best)


def _judge(net, store, objective, x, slot):
    """-F [B] of x under the mask in `slot` alone, with the task's own statistics."""
    if isinstance(objective, Standardised):
        scores = _judge(net, store, objective.objective, x, slot)
        place = jnp.minimum(slot, store.capacity - 1)
        mean, deviation = store.moments[objective.name][place]
        known = deviation > 0
        return jnp.where(known, (scores - mean) / jnp.where(known, deviation, 1), -jnp.inf)

    def judged(task):
        counts = store.label_counts or (None,)
        each = [of_labels(objective, count) for count in counts]
        values = [-Uncertainty(net, one, task.state).values(task.mask, x) for one in each]
        if len(values) == 1:
            return values[0]
        mine = store.num_labels[jnp.minimum(slot, store.capacity - 1)]
        return jnp.select([mine == count for count in counts], values)

    return store.under(slot, judged)


_OPTIONS = {
    "one_shot": (one_shot, ("implementation", "error")),
    "binary_search": (binary_search, ("base",)),
    "descend": (descend, ("optimizer", "steps")),
    "oracle": (oracle, ()),
    "rerank": (rerank, ("best", "judge")),
    "misfit": (misfit, ()),
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule by its name, with options: callable like `one_shot`, and equal by value.

    Equal by value, so that a jitted function that takes it as a static argument, such as
    `evaluate`'s, never retraces (optimizer, as in `descend`, is equal to itself only).
    name: "one_shot", "binary_search", "descend", "oracle", "rerank" or "misfit".
    The other fields are the options of that function; None is its default.
    Raises ValueError on construction for another name, or an option that the rule does not take.
    """

    name: str
    base: int | None = None
    best: int | None = None
    judge: Objective | None = None
    optimizer: optax.GradientTransformation | None = None
    steps: int | None = None
    implementation: str | None = None
    error: float | None = None

    def __post_init__(self):
        if self.name not in _OPTIONS:
            raise ValueError(f"rule must be one of {sorted(_OPTIONS)}, got {self.name!r}")
        allowed = _OPTIONS[self.name][1]
        if foreign := [name for name in self._options() if name not in allowed]:
            hint = " (what oracle judges by is the objective)" if self.name == "oracle" else ""
            raise ValueError(
                f"rule {self.name!r} takes the options {allowed}, not {foreign[0]!r}{hint}"
            )
        if self.name == "descend" and (self.optimizer is None or self.steps is None):
            raise ValueError("rule 'descend' needs an optimizer and steps")
        check_error(self.error)
        for name, least in (("base", 2), ("best", 1), ("steps", 1)):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), least)

    def check_tasks(self, num_tasks: int) -> None:
        """Raises ValueError for options that this many tasks do not allow, as the rule would."""
        if self.name == "binary_search":
            _check_base(self.base or 2, num_tasks)

    def __call__(
        self,
        net: Network,
        store: TaskStore,
        x: jax.Array,
        objective: Objective = entropy,
        per_example: bool = True,
    ) -> TaskBelief:
        function, _ = _OPTIONS[self.name]
        return function(net, store, x, objective, per_example=per_example, **self._options())

    def _options(self):
        fields = dataclasses.fields(self)[1:]
        given = {field.name: getattr(self, field.name) for field in fields}
        return {name: value for name, value in given.items() if value is not None}
