"""Rules that look at the masks more than once: slower than `one_shot`, and for some inputs surer.

    descend         gradient descent on the coefficients, of which one_shot is the first step
    binary_search   the surest half of the masks again and again, until one is left
    oracle          every mask tried alone
    rerank          the best few of one_shot tried alone

Arguments, beliefs and errors are those of `infer`, where the one gradient is.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from supsup_jax import infer
from supsup_jax.network import Network
from supsup_jax.objectives import entropy
from supsup_jax.store import MaskStore
from supsup_jax.types import Objective, TaskBelief
from supsup_jax.varying import varying_like

# On CPU the survivors of a binary search are copied together whenever they are a fourth of the
# masks that every round reads, down to stores so small that the network takes as long as they do.
SHRINK = 4
SMALL = 256


def descend(
    net: Network,
    store: MaskStore,
    x: jax.Array,
    objective: Objective = entropy,
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    per_example: bool = True,
) -> TaskBelief:
    """Gradient descent on the coefficients over the simplex, from 1/T each.

    Each of the `steps` updates is projected back onto the simplex. scores are the final
    coefficients; of equal ones, as in the corner a large step lands in, the lower id wins.
    One step of small sgd ranks tasks as `one_shot` does.
    optimizer: from optax; keep and reuse one object, as a new one compiles anew.
    per_example needs a mixture per row: [B, n] floats.
    Raises as `one_shot`, and ValueError unless steps is a positive int.
    """
    infer.check_pair(net, store)
    infer.check_objective(objective)
    infer.check_input(x)
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(f"optimizer must come from optax, got {type(optimizer).__name__}")
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a positive int, got {steps!r}")
    return _descend(
        net,
        store,
        x,
        objective=objective,
        optimizer=optimizer,
        steps=steps,
        per_example=per_example,
    )


def binary_search(
    net: Network,
    store: MaskStore,
    x: jax.Array,
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
    infer.check_pair(net, store)
    infer.check_objective(objective)
    infer.check_input(x)
    _check_count("base", base, 2)
    num_tasks = store.num_tasks
    if not isinstance(num_tasks, jax.core.Tracer):
        _check_base(base, int(num_tasks))
    return _binary_search(
        net, store, x, objective=objective, per_example=per_example, base=int(base)
    )


def oracle(
    net: Network,
    store: MaskStore,
    x: jax.Array,
    objective: Objective = entropy,
    per_example: bool = True,
) -> TaskBelief:
    """Every mask tried alone: scores[b, i] = -F(logits of x_b under mask i), T forward passes.

    An exhaustive rule, not the truth: judged by entropy it can be worse than `one_shot`.
    per_example False judges the batch's mean. Raises as `one_shot`.
    """
    infer.check_pair(net, store)
    infer.check_objective(objective)
    infer.check_input(x)
    return _oracle(net, store, x, objective=objective, per_example=per_example)


def rerank(
    net: Network,
    store: MaskStore,
    x: jax.Array,
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
    infer.check_pair(net, store)
    infer.check_objective(objective)
    infer.check_input(x)
    _check_count("best", best, 1)
    judge = objective if judge is None else judge
    infer.check_objective(judge, "judge")
    return _rerank(
        net,
        store,
        x,
        objective=objective,
        per_example=per_example,
        best=min(int(best), store.capacity),
        judge=judge,
    )


def _check_base(base, num_tasks):
    if base > max(2, num_tasks):
        raise ValueError(
            f"base must be at most T, the number of tasks: got base {base} for {num_tasks} tasks; "
            "one_shot names the task in a single round"
        )


def _check_count(name, value, least):
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an int of at least {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be an int of at least {least}, got {value}")


@functools.partial(jax.jit, static_argnames=("objective", "optimizer", "steps", "per_example"))
def _descend(net, store, x, *, objective, optimizer, steps, per_example):
    decisions = x[:, None] if per_example else x[None]
    state = infer.frozen_state(net, store.mixture(), x)
    start = store.slots / store.num_tasks.astype(jnp.float32)
    alphas = varying_like(jnp.broadcast_to(start[None], (len(decisions), store.capacity)), x)
    moments = jax.tree.map(
        lambda leaf: varying_like(leaf, x) if jnp.ndim(leaf) else leaf, optimizer.init(alphas)
    )

    def gradient(alphas):
        # One mixture a decision: alphas are batched, so the masks are read once for all of them.
        mixtures = jax.vmap(store.mixture)(alphas)
        v = jax.vmap(infer.weight_gradient, (None, 0, 0, None, None))(
            net, mixtures, decisions, state, objective
        )
        return store.contract(v)

    def step(carry, _):
        alphas, moments = carry
        updates, moments = optimizer.update(gradient(alphas), moments, alphas)
        moved = optax.apply_updates(alphas, updates)
        # More than 1 below the largest lies outside the simplex: empty slots stay at 0.
        live = store.slots[None]
        top = jnp.max(jnp.where(live, moved, -jnp.inf), axis=-1, keepdims=True)
        moved = jnp.where(live, moved, top - 2)
        projected = jax.vmap(optax.projections.projection_simplex)(moved)
        return (projected.astype(jnp.float32), moments), None

    (alphas, _), _ = lax.scan(step, (alphas, moments), None, length=steps)
    return infer.belief(store, alphas if per_example else alphas[0])


class _Field(NamedTuple):
    """Where one search stands among the K slots of a store."""

    alive: jax.Array  # bool [K]
    num_alive: jax.Array  # int32 []; follows from T, so all searches of a batch share it
    survived: jax.Array  # float32 [K], rounds


def _narrow(field, gradient, base):
    """The field after a round in which dF/da was `gradient` [K]; of one survivor, as it is."""
    keep = (field.num_alive - 1) // base + 1
    # The sort is stable and takes -0 for 0: of equals the lower id stays. The dead come last.
    order = jnp.lexsort((gradient, ~field.alive))
    alive = jnp.zeros_like(field.alive).at[order].set(jnp.arange(len(order)) < keep)
    return _Field(alive, keep, field.survived + (alive & (field.num_alive > 1)))


@functools.partial(jax.jit, static_argnames=("objective", "per_example", "base"))
def _binary_search(net, store, x, *, objective, per_example, base):
    # Loops as long as T asks for cannot be differentiated, and here nothing depends on anything.
    net, x = lax.stop_gradient((net, x))
    decisions = x[:, None] if per_example else x[None]
    mixture = store.mixture()
    state = infer.frozen_state(net, mixture, x)
    # The first round is one_shot: all decisions share its mixture, which the counts hold ready.
    first = infer.gradient_scores(net, store, mixture, decisions, state, objective)

    def play(store, field, decision, until):
        def play_round(field):
            mixture = store.mixture_of(field.alive)
            state = infer.frozen_state(net, mixture, x)
            v = infer.weight_gradient(net, mixture, decision, state, objective)
            return _narrow(field, store.contract(v), base)

        return lax.while_loop(lambda field: field.num_alive > until, play_round, field)

    def search(store, field, decision, shrink):
        if not (shrink and store.capacity > SMALL):
            return play(store, field, decision, until=1).survived
        size = store.capacity // SHRINK
        field = play(store, field, decision, until=size)
        ids = jnp.nonzero(field.alive, size=size, fill_value=0)[0].astype(jnp.int32)
        few = store.taken(ids, field.num_alive)
        rest = search(
            few, field._replace(alive=few.slots, survived=field.survived[ids]), decision, shrink
        )
        return field.survived.at[jnp.where(few.slots, ids, store.capacity)].set(rest, mode="drop")

    def decide(each, shrink):
        gradient, decision = each
        start = _Field(store.slots, store.num_tasks, jnp.zeros(store.capacity, jnp.float32))
        return search(store, _narrow(start, gradient, base), decision, shrink)

    one_by_one = functools.partial(lax.map, functools.partial(decide, shrink=True))
    floats = max(net.layout.num_weights, store.capacity)
    many = functools.partial(
        infer.in_pieces,
        jax.vmap(functools.partial(decide, shrink=False)),
        size=max(1, infer.GRADIENT_FLOATS // floats),
    )
    if net.state is not None:  # each has the whole x to itself
        many = functools.partial(lax.map, functools.partial(decide, shrink=False))
    survived = lax.platform_dependent((first, decisions), cpu=one_by_one, default=many)
    return infer.belief(store, survived if per_example else survived[0])


@functools.partial(jax.jit, static_argnames=("objective", "per_example"))
def _oracle(net, store, x, *, objective, per_example):
    scores = infer.over_tasks(
        store, functools.partial(_judge, net, store, objective, x), -jnp.inf, x
    )
    return infer.belief(store, scores if per_example else scores.mean(axis=0))


@functools.partial(jax.jit, static_argnames=("objective", "per_example", "best", "judge"))
def _rerank(net, store, x, *, objective, per_example, best, judge):
    mixture = store.mixture()
    state = infer.frozen_state(net, mixture, x)
    decisions = x[:, None] if per_example else x[None]

    def shortlist(gradient):
        """Ids [d, best]; beyond the tasks there are, of empty slots."""
        # Where argmax, and so one_shot, sees no difference between 0 and -0, top_k does.
        scores = jnp.where(gradient == 0, 0, -gradient)
        scores = jnp.where(store.slots[None], scores, -jnp.inf)
        return lax.top_k(scores, best)[1].astype(jnp.int32)

    ids = infer.gradient_scores(net, store, mixture, decisions, state, objective, finish=shortlist)
    if per_example:
        rows = jnp.repeat(jnp.arange(len(x), dtype=jnp.int32), best)
        alone = functools.partial(_judge, net, store, judge)
        judged = infer.grouped(alone, x, rows, ids.reshape(-1)).reshape(ids.shape)
    else:
        judged = lax.map(lambda i: _judge(net, store, judge, x, i).mean(), ids[0])[None]
    scores = jnp.full((len(ids), store.capacity), -jnp.inf, jnp.float32)
    scores = jax.vmap(lambda row, i, new: row.at[i].set(new))(scores, ids, judged)
    return infer.belief(store, scores if per_example else scores[0])


def _judge(net, store, objective, x, i):
    """-F [B] of x under mask i alone, with the task's own statistics."""
    task = store.task(i)
    return -infer.uncertainty(net, task.mask, x, task.state, objective)


_OPTIONS = {
    "one_shot": (infer.one_shot, ("implementation",)),
    "binary_search": (binary_search, ("base",)),
    "descend": (descend, ("optimizer", "steps")),
    "oracle": (oracle, ()),
    "rerank": (rerank, ("best", "judge")),
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule by its name, with options: callable like `one_shot`, and equal by value.

    Equal by value, so that a jitted function that takes it as a static argument, such as
    `evaluate`'s, never retraces (optimizer, as in `descend`, is equal to itself only).
    name: "one_shot", "binary_search", "descend", "oracle" or "rerank".
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

    def __post_init__(self):
        if self.name not in _OPTIONS:
            raise ValueError(f"rule must be one of {sorted(_OPTIONS)}, got {self.name!r}")
        allowed = _OPTIONS[self.name][1]
        if foreign := [name for name in self._options() if name not in allowed]:
            raise ValueError(f"rule {self.name!r} takes the options {allowed}, not {foreign[0]!r}")
        if self.name == "descend" and (self.optimizer is None or self.steps is None):
            raise ValueError("rule 'descend' needs an optimizer and steps")
        for name, least in (("base", 2), ("best", 1), ("steps", 1)):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name), least)

    def check_tasks(self, num_tasks: int) -> None:
        """Raises ValueError for options that this many tasks do not allow, as the rule would."""
        if self.name == "binary_search":
            _check_base(self.base or 2, num_tasks)

    def __call__(
        self,
        net: Network,
        store: MaskStore,
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
