"""How decisions are run: one after another or in pieces, over which devices, along which masks.

What one decision computes is in `one_shot`; nothing here knows a rule. On CPU decisions go one by
one, so that a gradient stays in the cache, or, for many among few tasks, mask by mask. Elsewhere
they go in pieces that fill the device. With a store over a mesh each device runs the same program
on its own tasks and rows.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import custom_vjp_call_p

from supsup_jax.devices import ROWS, ROWS_OF_SLOTS, SLOTS, WHOLE, in_pieces, varying_like
from supsup_jax.inference.arguments import Race
from supsup_jax.kernels.contraction import cpu_form
from supsup_jax.loops import equations
from supsup_jax.objectives import Logarithm, Superfluous, of_labels
from supsup_jax.stores.base import TaskStore
from supsup_jax.types import Objective, PyTree, TaskBelief, is_open, num_rows

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
# As few tasks of another network on CPU: gradients held at once, to be met with masks that are
# unpacked once for them all. 128 products with 16 masks of 56,800 weights take 11 ms in
# pieces of 32, 16 of 8, and 35 one by one; below 8 at a time, unpacking costs what it saves.
UNPACKED_FOR = 8, 32
UNPACKED_FLOATS = 16 * 1024 * 1024


def differ(objective: Objective, store: TaskStore) -> bool:
    """Whether tasks differ in their number of labels, and the objective counts labels."""
    each = {of_labels(objective, count) for count in store.label_counts}
    return len(each) > 1


def by_labels(
    scores: Callable[[Objective], jax.Array],
    objective: Objective,
    store: TaskStore,
    among: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """scores(F) [..., K] of each task by its own F, the objective for its number of labels.

    Where those differ, derivatives of different F are compared: each in proportion to its F (of
    log F, for G), and less the mean over the tasks that are compared: the derivative along the
    simplex, where coefficients sum to 1. Three tasks of 2, 3 and 5 digits, one image each: task
    accuracy .53 in the mean, .38 by the derivatives as they are, .24 to .50 by G of one number for
    all.
    among: bool [K], the tasks compared, and how many those are; None for all.
    """
    if not differ(objective, store):
        return scores(of_labels(objective, *(store.label_counts[:1] or (None,))))
    chosen, (slots, num_tasks) = jnp.float32(0), among or (store.slots, store.all_tasks)
    for count in store.label_counts:
        own = of_labels(objective, count)
        found = scores(Logarithm(own) if isinstance(own, Superfluous) else own)
        total = store.devices.total(jnp.sum(jnp.where(slots, found, 0), -1, keepdims=True))
        mean = total / num_tasks.astype(jnp.float32)
        chosen = jnp.where(store.num_labels == count, found - mean, chosen)
    return chosen


def unchanged(value: PyTree) -> PyTree:
    """What `finish` and `mean` are where there is nothing to do."""
    return value


class Decisions(NamedTuple):
    """D decisions by m images each.

    x: [D, m, ...]. everything: [B, ...], all images of the call, whose statistics count.
    over_devices: the mean of a value here and those of other devices whose images decide together
      with these.
    """

    x: PyTree
    everything: PyTree = None
    over_devices: Callable[[jax.Array], jax.Array] = unchanged

    @property
    def num(self) -> int:
        """D."""
        return jax.tree.leaves(self.x)[0].shape[0]

    @property
    def deciders(self) -> int:
        """m."""
        return jax.tree.leaves(self.x)[0].shape[1]

    @property
    def rows(self) -> PyTree:
        """[D m, ...]."""
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), self.x)


def single(x: PyTree) -> PyTree:
    """x [B, ...] as decisions of one example each, [B, 1, ...]."""
    return jax.tree.map(lambda leaf: leaf[:, None], x)


def compiled(
    num_options: int = 0, scores_only: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a rule for decisions the compiled program of a call; over a mesh, on every device.

    decorated: (net, store, Decisions, objective, *options, *arrays [K]) -> TaskBelief of task [D]
      and scores [D, K], or of scores alone.
    the program: (net, store, x [B, ...], objective, per_example, *options, *arrays) -> the same,
      D = B; but not per_example, where all of x makes one decision, [] and [K].
    num_options: how many there are, all part of what is compiled.
    """

    def wrap(decide):
        def program(net, store, x, objective, per_example, *options):
            options, arrays = options[:num_options], options[num_options:]
            here = functools.partial(_decided, decide, per_example, (objective, *options))
            where = (ROWS, ROWS_OF_SLOTS) if per_example else (WHOLE, SLOTS)
            out = TaskBelief._make(where)
            out = out.scores if scores_only else out
            arrays = [(each, SLOTS) for each in arrays]
            return store.spread(here, (net, WHOLE), (x, ROWS), *arrays, out=out)

        program.__name__ = decide.__name__
        return jax.jit(program, static_argnums=range(3, 5 + num_options))

    return wrap


def _decided(decide, per_example, options, store, net, x, *arrays):
    everything = store.devices.all_rows(x)
    if per_example:
        return decide(net, store, Decisions(single(x), everything), *options, *arrays)
    x = jax.tree.map(lambda leaf: leaf[None], x)
    decisions = Decisions(x, everything, store.devices.mean)
    return jax.tree.map(lambda leaf: leaf[0], decide(net, store, decisions, *options, *arrays))


def over_rows(function: Callable, store: TaskStore, rows: PyTree, *whole: PyTree) -> PyTree:
    """function(store, rows, *whole), row for row; over a mesh each device has rows of its own."""
    placed = [(value, WHOLE) for value in whole]
    return store.spread(function, (rows, ROWS), *placed, out=ROWS)


def map_decisions(
    task_scores: Callable,
    uncertainty: Any,
    store: TaskStore,
    mixture: PyTree,
    decisions: Decisions,
    implementation: str | None = None,
    finish: Callable[[jax.Array], PyTree] = unchanged,
) -> PyTree:
    """-dF/da [D, K] of D decisions, each by the mean uncertainty F of its m images.

    Two forms, equal up to rounding. "Gradients": the weight gradient of each decision against all
    masks, one decision after another on CPU, or some for few tasks, in large pieces elsewhere.
    "Tangents", on CPU for few tasks of a dense network: for one mask after another, the derivative
    of all D outputs along it, about a forward pass each.
    task_scores, uncertainty: of `one_shot`, which imports this module; F is an `Uncertainty`.
    finish: what to keep of scores [d, K], with a leading d, before the next piece is computed.
    """
    x = decisions.x
    contract = _product(store, implementation)
    net, objective, state = uncertainty.net, uncertainty.objective, uncertainty.state
    own = varying_like(mixture, x)

    def one(x):
        scores = task_scores(
            net, store, x, objective, state, own, lambda v: contract(decisions.over_devices(v))
        )
        return jax.tree.map(lambda row: row[0], finish(scores[None]))

    def many(each_of, contract, x):
        def scores(objective):
            each = dataclasses.replace(uncertainty, objective=objective)
            return -contract(each_of(functools.partial(each.gradient, own))(x))

        return finish(by_labels(scores, objective, store))

    if decisions.num == 1:
        first = jax.tree.map(lambda leaf: leaf[0], x)
        return jax.tree.map(lambda row: row[None], one(first))
    on_cpu = functools.partial(lax.map, one)
    values = functools.partial(_mean_values, uncertainty)
    few = implementation is None and _few_tasks(store, decisions)
    dense = not store.layout.has_windows  # where a forward pass costs about 2 n an example
    least, most = UNPACKED_FOR
    if few and dense and _has_tangents(values, mixture, x):
        tangents = functools.partial(_tangent_scores, uncertainty, store, mixture, finish)
        size = max(1, TANGENT_EXAMPLES // decisions.deciders)
        on_cpu = functools.partial(in_pieces, tangents, size=size)
    elif few and (size := min(most, UNPACKED_FLOATS // store.layout.num_weights)) >= least:
        one_by_one = lambda gradient: functools.partial(lax.map, gradient)  # noqa: E731
        some = functools.partial(many, one_by_one, _product(store, "matrix"))
        on_cpu = functools.partial(in_pieces, some, size=size)
    together = functools.partial(many, jax.vmap, contract)
    elsewhere = functools.partial(in_pieces, together, size=piece_size(store))
    return lax.platform_dependent(x, cpu=on_cpu, default=elsewhere)


def fastest(function: Callable, store: TaskStore, x: PyTree) -> PyTree:
    """function(x [D, m, ...], implementation) by what soonest tells the best task."""
    exact = functools.partial(function, implementation=None)
    # A CPU that does not count the bits of vectors takes 38 ms by "select", 56 to be certain.
    exactly = _few_tasks(store, Decisions(x)) or cpu_form() == "select"
    if exactly or len(store.label_counts) > 1:
        return exact(x)
    race = functools.partial(function, implementation=Race())
    return lax.platform_dependent(x, cpu=race, default=exact)


def piece_size(store: TaskStore) -> int:
    """How many decisions are run at once where they are batched."""
    return max(1, GRADIENT_FLOATS // max(store.layout.num_weights, store.capacity))


def _product(store, implementation):
    """dF/da [..., K] of v [..., 32 nw].

    Scores are -dF/da, higher is better: `best_scores` is one of them, hence its two minuses.
    """

    def race(v):
        if v.ndim > 1:  # off the CPU, where the product of many vectors is fast
            return store.contract(v)
        return -store.best_scores(-v, implementation.error).scores

    if isinstance(implementation, Race):
        return race
    return functools.partial(store.contract, implementation=implementation)


def _few_tasks(store, decisions):
    """Whether probing mask by mask is cheaper on CPU than a gradient a decision."""
    if is_open(decisions.num) or is_open(decisions.deciders):
        return False
    few = store.capacity * decisions.deciders <= TANGENTS_UPTO
    return few and decisions.num >= TANGENTS_FROM


def _mean_values(uncertainty, mixture, x):
    """F [D] of x [D, m, ...]."""
    decisions = Decisions(x)
    values = uncertainty.values(mixture, decisions.rows)
    return values.reshape(decisions.num, decisions.deciders).mean(axis=1)


def _tangent_scores(uncertainty, store, mixture, finish, x):
    def scores(objective):
        each = dataclasses.replace(uncertainty, objective=objective)
        _, along = jax.linearize(lambda mixture: _mean_values(each, mixture, x), mixture)

        def derivative(i):
            return along(jax.tree.map(lambda mask: mask.astype(jnp.float32), store.mask(i)))

        return -over_tasks(store, derivative, 0.0, x)

    return finish(by_labels(scores, uncertainty.objective, store))


def over_tasks(
    store: TaskStore, function: Callable[[jax.Array], jax.Array], empty: float, x: PyTree
) -> jax.Array:
    """function(i) [B] of each task as columns, [B, K], for x [B, ...]; `empty` for no task.

    A scan over cond rather than a loop of T rounds: empty slots cost next to nothing, and the
    result can be differentiated.
    """
    nothing = varying_like(jnp.full(num_rows(x), empty, jnp.float32), x)

    def one(i):
        return lax.cond(i < store.num_tasks, function, lambda _: nothing, i)

    return lax.map(one, jnp.arange(store.capacity, dtype=jnp.int32)).T


def _has_tangents(function, *args):
    """Whether forward mode works: a custom_vjp, in the network or the objective, forbids it."""
    found = equations(jax.make_jaxpr(function)(*args).jaxpr)
    return all(equation.primitive is not custom_vjp_call_p for equation in found)
