"""Finding the task of an input: one forward and backward pass, whatever the number of tasks.

With all masks superposed at coefficients a, the output's uncertainty F has the gradient
dF/da_i = <dF/dW_eff * W, M_i>: one backward pass to the effective weights, then one product of
that vector with the packed masks (paper section 3.3). `task_scores` is that for one decision;
`schedule` runs it for many, on whatever device. Every rule returns scores in which higher is better
and -inf marks an empty slot (at which jax_debug_infs stops: let the store be full under it).

Called on concrete arrays each function checks its arguments, then runs one jitted program; inside
the caller's own jit the same code becomes part of the caller's program.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from supsup_jax.devices import varying_like
from supsup_jax.inference import arguments, schedule
from supsup_jax.inference.schedule import Decisions, single
from supsup_jax.kernels import contraction
from supsup_jax.loops import fast_in_loops
from supsup_jax.network import Network
from supsup_jax.objectives import entropy, of_labels
from supsup_jax.stores.base import TaskStore
from supsup_jax.types import Objective, PyTree, StoreError, TaskBelief, num_rows

if TYPE_CHECKING:
    from supsup_jax.stores.mask_store import MaskStore


def task_scores(
    net: Network,
    store: TaskStore,
    x: PyTree,
    objective: Objective,
    state: PyTree = None,
    mixture: PyTree | None = None,
    contract: Callable[[jax.Array], jax.Array] | None = None,
    among: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """-dF/da [K] at a = 1/T, F the mean objective of one decision's images x [m, ...].

    Where tasks differ in their number of labels, and the objective counts labels, each task's score
    is by its own F: one gradient for each number that there is.
    state: the statistics of a stateful network; None: those of x.
    mixture, contract: the store's, unless the caller has another at hand. among: as of `by_labels`,
    the tasks of that mixture.
    """
    mixture = store.mixture() if mixture is None else mixture  # all masks at once, 1/T of each
    contract = contract or store.contract

    def scores(objective):
        gradient = Uncertainty(net, objective, state).gradient(mixture, x)  # forward and backward
        return -contract(gradient)  # one product with the packed masks

    return schedule.by_labels(scores, objective, store, among)


def one_shot(
    net: Network,
    store: TaskStore,
    x: PyTree,
    objective: Objective = entropy,
    per_example: bool = True,
    implementation: str | None = None,
    error: float | None = None,
) -> TaskBelief:
    """The task whose coefficient most lowers the uncertainty: argmax_i -dF/da_i at a = 1/T.

    per_example: task [B], scores [B, K], each row of x for itself; otherwise one decision of the
    whole batch, task [] and scores [K]. Statistics and errors as `alpha_gradient`.
    implementation: how the gradient meets the masks. None: exact (float32), by whatever is fast
      for the device and the sizes. "certified": the same task with certainty, from coarse scores,
      on CPU; those of tasks that have lost stay as they were read. Any name of
      `contraction.contract` forces that form.
    error: the accepted probability, of each decision, of another task than the exact one, such as
      1e-6: on CPU a share of the masks' bits is read. `kernels.race` says under what assumption.
    Raises as `alpha_gradient`, and ValueError for an error outside (0, 1) or beside an
    implementation, and for either where tasks differ in their number of labels and the objective
    counts them: a bound is on one gradient.
    """
    how = arguments.how_to_contract(implementation, error)
    x = arguments.check_call(net, store, x, objective)
    if isinstance(how, arguments.Race) and schedule.differ(objective, store):
        raise ValueError(
            "implementation must be None or a form of contraction, and error None, where tasks "
            "differ in their number of labels: a certificate is of one gradient"
        )
    return _one_shot(net, store, x, objective, per_example, how)


@schedule.compiled(num_options=1)
def _one_shot(net, store, decisions, objective, implementation):
    return belief(store, scores_of(net, store, decisions, objective, implementation))


def alpha_gradient(
    net: Network,
    store: TaskStore,
    x: PyTree,
    objective: Objective = entropy,
    alphas: jax.Array | np.ndarray | None = None,
    per_example: bool = True,
) -> jax.Array:
    """dF/da at coefficients `alphas` ([K] or [T]; None is 1/T each), 0 in empty slots.

    x: [B, ...]. per_example: [B, K], row b the gradient of objective(logits[b]); otherwise [K],
    the gradient of the batch's mean objective (`golden/one_shot.npz`).
    A stateful network uses the statistics of the whole x under the mixture, held constant.
    Where tasks differ in their number of labels, and the objective counts them: derivatives of
    each task's own, made comparable as `schedule.by_labels` says.
    Raises TypeError or ValueError for arguments that do not fit, and for an empty store.
    """
    x = arguments.check_call(net, store, x, objective)
    if alphas is not None:
        alphas = store.per_slot(alphas)
        if alphas.ndim != 1:
            raise ValueError(f"alphas must be [{store.capacity}], got shape {alphas.shape}")
    return _alpha_gradient(net, store, x, objective, per_example, alphas)


@schedule.compiled(scores_only=True)
def _alpha_gradient(net, store, decisions, objective, alphas):
    return -scores_of(net, store, decisions, objective, alphas=alphas)


def scores_of(
    net: Network,
    store: TaskStore,
    decisions: Decisions,
    objective: Objective,
    implementation: str | None = None,
    *,
    alphas: jax.Array | np.ndarray | None = None,
    finish: Callable = schedule.unchanged,
) -> PyTree:
    """The `task_scores` of each decision, [D, K], under the statistics of all that is asked about.

    alphas: as of `mixture`. finish: as of `schedule.map_decisions`.
    """
    mixture = store.mixture(alphas)
    uncertainty = Uncertainty.among(net, objective, mixture, decisions.everything)
    return schedule.map_decisions(
        task_scores, uncertainty, store, mixture, decisions, implementation, finish
    )


def belief(store: TaskStore, scores: jax.Array) -> TaskBelief:
    """The task of the highest of scores [D, K], of equal ones the lower; empty slots ruled out."""
    scores = live(store, scores)
    return TaskBelief(store.devices.argmax(scores), scores)


def live(store: TaskStore, scores: jax.Array) -> jax.Array:
    """The scores [D, K], -inf in empty slots."""
    return jnp.where(store.slots[None], scores, -jnp.inf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Uncertainty:
    """F: how uncertain the network is of its outputs, by an objective. A pytree.

    state: the statistics of a stateful network, constant; None: those of the images at hand.
    """

    net: Network
    objective: Objective = dataclasses.field(metadata={"static": True})
    state: PyTree = None

    @classmethod
    def among(cls, net: Network, objective: Objective, mixture: PyTree, x: PyTree) -> "Uncertainty":
        """F where no id is known: under the statistics of x [B, ...] in the mixture."""
        if not net.has_statistics:
            return cls(net, objective, net.state)
        return cls(net, objective, net.batch_state(net.superpose(mixture), x))

    def values(self, mask: PyTree, x: PyTree) -> jax.Array:
        """The objective of each row of x [B, ...] under a mask or a mixture, float32 [B]."""
        values = self.objective(self.net(mask, x, self.state))
        if values.shape != (num_rows(x),):
            raise ValueError(
                f"objective must map logits [B, C] to [B], here [{num_rows(x)}], "
                f"got shape {values.shape}"
            )
        return values.astype(jnp.float32)

    def gradient(self, mixture: PyTree, x: PyTree) -> jax.Array:
        """dF/dW_eff * W as one vector [32 nw], F the mean over x [m, ...].

        As W_eff = W * mixture, that is the gradient in the mixture.
        """
        gradient = jax.grad(lambda mixture: self.values(mixture, x).mean())
        if self.net.layout.has_windows:  # decisions are loops, this library's or its caller's
            gradient = fast_in_loops(gradient)
        return self.net.layout.ravel(gradient(mixture), "the mixture")


def task_ids(uncertainty: Uncertainty, store: TaskStore, mixture: PyTree, x: PyTree) -> jax.Array:
    """Ids int32 [D] of D one-shot decisions, x [D, m, ...], by the fastest form for the device.

    Never holds the scores of more than a piece of the decisions.
    """
    return schedule.over_rows(_task_ids, store, x, uncertainty, mixture)


def _task_ids(store, x, uncertainty, mixture):
    def best_here(scores):
        return store.devices.best_here(live(store, scores))

    def best(x, implementation):
        return schedule.map_decisions(
            task_scores, uncertainty, store, mixture, Decisions(x), implementation, best_here
        )

    return store.devices.best(*schedule.fastest(best, store, x))


def one_shot_streamed(
    net: Network,
    parts: "Iterable[MaskStore]",
    x: PyTree,
    objective: Objective = entropy,
    per_example: bool = True,
    implementation: str | None = None,
) -> TaskBelief:
    """`one_shot` among more tasks than memory holds: those of all `parts`, numbered in order.

    parts: stores of tasks of one network, gone through twice and held one at a time: a list, or an
      object whose __iter__ loads one after another, such as from files. A generator is used up
      after one pass and is refused.
    scores: [B, T] or [T], T the tasks of all parts; capacities leave no gaps.
    implementation: as in `contraction.contract`.
    Holds B weight gradients, [B, n] floats. Raises as `one_shot`.
    """
    arguments.check_objective(objective)
    if implementation == arguments.CERTIFIED:
        raise ValueError(
            "implementation must be None or a form of contraction here: a certificate among the "
            "tasks of one part says nothing of the others"
        )
    contraction.check_implementation(implementation)
    x = arguments.check_input(x)
    if iter(parts) is parts:
        raise TypeError(
            "parts are gone through twice: pass a list, or an object whose __iter__ starts anew, "
            f"not a {type(parts).__name__}"
        )
    counts, num_tasks, own = jnp.uint32(0), 0, set()
    for part in parts:
        arguments.check_pair(net, part)
        own |= {of_labels(objective, count) for count in part.label_counts or (None,)}
        counts = counts + part.counts().astype(jnp.uint32)
        num_tasks += int(part.num_tasks)
    if not num_tasks:
        raise StoreError("parts hold no store: pass at least one")
    if len(own) > 1:
        raise ValueError(
            "the tasks of parts must have one number of labels for an objective that counts them: "
            "those of several are compared in one store only, by one_shot"
        )
    (objective,) = own
    mean = counts.astype(jnp.float32) / np.float32(num_tasks)
    v = _gradients(net, mean, x, objective=objective, per_example=per_example)
    scores = jnp.concatenate(
        [_part_scores(part, v, implementation)[..., : int(part.num_tasks)] for part in parts],
        axis=-1,
    )
    return TaskBelief(jnp.argmax(scores, axis=-1).astype(jnp.int32), scores)


@functools.partial(jax.jit, static_argnames=("objective", "per_example"))
def _gradients(net, mean, x, *, objective, per_example):
    mixture = net.layout.unravel(mean)
    uncertainty = Uncertainty.among(net, objective, mixture, x)
    gradient = functools.partial(uncertainty.gradient, varying_like(mixture, x))
    return jax.lax.map(gradient, single(x)) if per_example else gradient(x)


@functools.partial(jax.jit, static_argnames="implementation")
def _part_scores(part, v, implementation):
    return -part.contract(v, implementation)
