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
import optax
from jax import lax

from supsup_jax import devices
from supsup_jax.checks import check_int
from supsup_jax.devices import ONE_DEVICE, ROWS, WHOLE, varying_like
from supsup_jax.inference import one_shot as infer
from supsup_jax.network import Network
from supsup_jax.objectives import entropy
from supsup_jax.stores.mask_store import MaskStore
from supsup_jax.types import Objective, TaskBelief

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
    check_int("steps", steps, 1)
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
    check_int("base", base, 2)
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
    check_int("best", best, 1)
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


@functools.partial(jax.jit, static_argnames=("objective", "optimizer", "steps", "per_example"))
def _descend(net, store, x, *, objective, optimizer, steps, per_example):
    def decide(store, net, x):
        devices = store.devices
        decisions = x[:, None] if per_example else x[None]
        state = infer.frozen_state(net, store.mixture(), devices.all_rows(x))
        # Every device moves the coefficients of all tasks, so that the simplex is one.
        live = devices.all_slots(store.slots)
        start = live / store.all_tasks.astype(jnp.float32)
        alphas = varying_like(jnp.broadcast_to(start[None], (len(decisions), len(live))), x)
        moments = jax.tree.map(
            lambda leaf: varying_like(leaf, x) if jnp.ndim(leaf) else leaf, optimizer.init(alphas)
        )

        def gradient(alphas):
            # One mixture a decision: alphas are batched, so the masks are read once for all.
            mixtures = jax.vmap(store.mixture)(devices.own_slots(alphas))
            v = jax.vmap(infer.weight_gradient, (None, 0, 0, None, None))(
                net, mixtures, decisions, state, objective
            )
            return devices.all_slots(store.contract(v if per_example else devices.mean(v)))

        def step(carry, _):
            alphas, moments = carry
            updates, moments = optimizer.update(gradient(alphas), moments, alphas)
            moved = optax.apply_updates(alphas, updates)
            # More than 1 below the largest lies outside the simplex: empty slots stay at 0.
            top = jnp.max(jnp.where(live[None], moved, -jnp.inf), axis=-1, keepdims=True)
            moved = jnp.where(live[None], moved, top - 2)
            projected = jax.vmap(optax.projections.projection_simplex)(moved)
            return (projected.astype(jnp.float32), moments), None

        (alphas, _), _ = lax.scan(step, (alphas, moments), None, length=steps)
        return infer.belief(store, devices.own_slots(alphas if per_example else alphas[0]))

    return _spread(decide, net, store, x, per_example)


def _spread(decide, net, store, x, per_example):
    out = infer.belief_spec(per_example)
    return store.spread(decide, (net, WHOLE), (x, ROWS), out=out)


class _Field(NamedTuple):
    """Where one search stands among the K slots of a store."""

    alive: jax.Array  # bool [K]
    num_alive: jax.Array  # int32 []; follows from T, so all searches of a batch share it
    survived: jax.Array  # float32 [K], rounds


def _narrow(field, gradient, base, devices=ONE_DEVICE):
    """The field after a round in which dF/da was `gradient` [K]; of one survivor, as it is."""
    keep = (field.num_alive - 1) // base + 1
    gradient, alive = map(devices.all_slots, (gradient, field.alive))
    # The sort is stable and takes -0 for 0: of equals the lower id stays. The dead come last.
    order = jnp.lexsort((gradient, ~alive))
    alive = jnp.zeros_like(alive).at[order].set(jnp.arange(len(order)) < keep)
    alive = devices.own_slots(alive)
    return _Field(alive, keep, field.survived + (alive & (field.num_alive > 1)))


@functools.partial(jax.jit, static_argnames=("objective", "per_example", "base"))
def _binary_search(net, store, x, *, objective, per_example, base):
    def decide(store, net, x):
        return _search(net, store, x, objective, per_example, base)

    # Loops as long as T asks for cannot be differentiated, and here nothing depends on anything.
    net, x = lax.stop_gradient((net, x))
    return _spread(decide, net, store, x, per_example)


def _search(net, store, x, objective, per_example, base):
    decisions = x[:, None] if per_example else x[None]
    everything = store.devices.all_rows(x)
    mixture = store.mixture()
    state = infer.frozen_state(net, mixture, everything)
    # The first round is one_shot: all decisions share its mixture, which the counts hold ready.
    first = infer.gradient_scores(
        net, store, mixture, decisions, state, objective, together=not per_example
    )

    def play(store, field, decision, until):
        def play_round(field):
            mixture = store.mixture_of(field.alive)
            state = infer.frozen_state(net, mixture, everything)
            v = infer.weight_gradient(net, mixture, decision, state, objective)
            v = v if per_example else store.devices.mean(v)
            return _narrow(field, store.contract(v), base, store.devices)

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
        start = _Field(store.slots, store.all_tasks, jnp.zeros(store.capacity, jnp.float32))
        return search(store, _narrow(start, gradient, base, store.devices), decision, shrink)

    # Over a mesh the survivors stay where they are: some devices may hold many, others none.
    alone = store.devices is ONE_DEVICE
    one_by_one = functools.partial(lax.map, functools.partial(decide, shrink=alone))
    floats = max(net.layout.num_weights, store.capacity)
    many = functools.partial(
        devices.in_pieces,
        jax.vmap(functools.partial(decide, shrink=False)),
        size=max(1, infer.GRADIENT_FLOATS // floats),
    )
    if net.state is not None:  # each has the whole x to itself
        many = functools.partial(lax.map, functools.partial(decide, shrink=False))
    survived = lax.platform_dependent((first, decisions), cpu=one_by_one, default=many)
    return infer.belief(store, survived if per_example else survived[0])


@functools.partial(jax.jit, static_argnames=("objective", "per_example"))
def _oracle(net, store, x, *, objective, per_example):
    def decide(store, net, x):
        alone = functools.partial(_judge, net, store, objective, x)
        scores = infer.over_tasks(store, alone, -jnp.inf, x)
        return infer.belief(
            store, scores if per_example else store.devices.mean(scores.mean(axis=0))
        )

    return _spread(decide, net, store, x, per_example)


@functools.partial(jax.jit, static_argnames=("objective", "per_example", "best", "judge"))
def _rerank(net, store, x, *, objective, per_example, best, judge):
    def decide(store, net, x):
        ids = _shortlist(net, store, x, objective, per_example, best)
        slots, devices = store.slot_of(ids), store.devices
        if per_example:
            rows = jnp.repeat(jnp.arange(len(x), dtype=jnp.int32), best)
            alone = functools.partial(_judge, net, store, judge)
            judged = infer.grouped(alone, x, rows, slots.reshape(-1)).reshape(slots.shape)
        else:
            judged = lax.map(lambda slot: _judge(net, store, judge, x, slot).mean(), slots[0])
            judged = devices.mean(judged)[None]
        # Each device has judged its own, and puts them where its own are.
        scores = jnp.full((len(slots), store.capacity), -jnp.inf, jnp.float32)
        scores = jax.vmap(lambda row, slot, new: row.at[slot].set(new, mode="drop"))(
            scores, slots, judged
        )
        return infer.belief(store, scores if per_example else scores[0])

    return _spread(decide, net, store, x, per_example)


def _shortlist(net, store, x, objective, per_example, best):
    """Ids [D, best] of the best of one_shot; beyond the tasks there are, of empty slots."""
    mixture = store.mixture()
    state = infer.frozen_state(net, mixture, store.devices.all_rows(x))
    decisions = x[:, None] if per_example else x[None]
    few = min(best, store.capacity)

    def own_best(gradient):
        # Where argmax, and so one_shot, sees no difference between 0 and -0, top_k does.
        scores = jnp.where(gradient == 0, 0, -gradient)
        scores = jnp.where(store.slots[None], scores, -jnp.inf)
        scores, slots = lax.top_k(scores, few)
        return scores, store.devices.first(store.capacity) + slots.astype(jnp.int32)

    scores, ids = infer.gradient_scores(
        net,
        store,
        mixture,
        decisions,
        state,
        objective,
        finish=own_best,
        together=not per_example,
    )
    return store.devices.best_few(scores, ids, best)


def _judge(net, store, objective, x, slot):
    """-F [B] of x under the mask in `slot` alone, with the task's own statistics."""
    return store.under(
        slot, lambda task: -infer.uncertainty(net, task.mask, x, task.state, objective)
    )


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
                check_int(name, getattr(self, name), least)

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
