"""BatchE (Wen et al., arXiv 2002.06715): each task scales the inputs and outputs of every layer.

y = ((x * t) W) * s is W under the real-valued mask t s', so a task's factors are a mask of rank
one, and everything that works on masks works on them: `FactorStore` stands where a MaskStore does.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from supsup_jax import prng
from supsup_jax.baselines.sharing import (
    STATIC,
    Baseline,
    check_kernels,
    check_state,
    put_leaves,
)
from supsup_jax.checks import check_int, is_traced
from supsup_jax.kernels.race import Finish
from supsup_jax.layout import Layout, named_leaves
from supsup_jax.network import Network
from supsup_jax.stores.base import TaskStore
from supsup_jax.types import PyTree, StoreError, Task


class Factors(NamedTuple):
    """One kernel [..., in, out] of one task: t [in] scales its inputs, s [out] its outputs."""

    t: jax.Array
    s: jax.Array


def batche(net: Network, trained: bool = True) -> Baseline:
    """A pair of factors a kernel and task, starting at random signs.

    trained: the shared kernels learn with the first task (the method as published); otherwise
    they stay random and only factors are learned.
    """
    return RankOne("first" if trained else "never", True, check_kernels(net))


def outer(factors: Factors, shape: tuple[int, ...]) -> jax.Array:
    """The mask t s' of a kernel of this shape, the same for every position of a convolution."""
    return jnp.broadcast_to(factors.t[:, None] * factors.s[None], shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RankOne(Baseline):
    """A task scales the inputs and outputs of every kernel."""

    def draw_own(self, key: jax.Array) -> dict[str, Factors]:
        """Signs drawn for a new task: by kernel, t [in] and s [out]."""
        layout = self.net.layout
        keys = jax.random.split(prng.purpose_key(key, "factors"), (len(layout.shapes), 2))
        return {
            name: Factors(
                jax.random.rademacher(k[0], shape[-2:-1], jnp.float32),
                jax.random.rademacher(k[1], shape[-1:], jnp.float32),
            )
            for k, (name, shape) in zip(keys, layout.named_shapes, strict=True)
        }

    def weights(self, shared: PyTree, own: dict[str, Factors]) -> PyTree:
        """The shared weights, each kernel times t s' of the task's own."""
        kernels = named_leaves(shared)
        scaled = {name: kernels[name] * outer(own[name], kernels[name].shape) for name in own}
        return put_leaves(shared, scaled)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FactorStore(TaskStore):
    """The factors of all tasks, for inference without an id (the paper's Figure 5, right).

    factors: by kernel, t [K, in] and s [K, out]. states: each task's normalisation statistics,
    [K, ...], None for a network without. num_tasks: int32 [], T. layout: the network's.
    one_shot with it is BatchE with one-shot inference; oracle is ABatchE.
    """

    factors: dict[str, Factors]
    states: PyTree
    num_tasks: jax.Array
    layout: Layout = dataclasses.field(metadata=STATIC)

    @classmethod
    def create(cls, net: Network, capacity: int) -> "FactorStore":
        """Room for `capacity` tasks. Raises ValueError unless it is at least 1."""
        check_int("capacity", capacity, 1)
        factors = {
            name: Factors(*(jnp.zeros((capacity, width), jnp.float32) for width in shape[-2:]))
            for name, shape in check_kernels(net).layout.named_shapes
        }
        states = jax.tree.map(
            lambda leaf: jnp.zeros((capacity, *leaf.shape), leaf.dtype), net.state
        )
        return cls(factors, states, jnp.int32(0), net.layout)

    def append(self, own: dict[str, Factors], state: PyTree = None) -> "FactorStore":
        """With one more task: its factors and statistics, a Learned's `own` and `state`.

        Raises StoreError when full (inside jit it is dropped, and nothing tells), ValueError unless
        factors and state are of the network's shapes.
        """
        check_state(self.states, state)
        one = jax.tree.map(lambda rows: rows.shape[1:], self.factors)
        if (got := jax.tree.map(jnp.shape, own)) != one:
            raise ValueError(f"own must be factors of shapes {one}, got {got}")
        held = self.num_tasks
        if not is_traced(held) and int(held) == self.capacity:
            raise StoreError(f"the store is full: its capacity is {self.capacity}")
        factors, states = jax.tree.map(
            lambda rows, row: rows.at[held].set(row, mode="drop"),
            (self.factors, self.states),
            (own, state),
        )
        num_tasks = jnp.minimum(held + 1, self.capacity)
        return dataclasses.replace(self, factors=factors, states=states, num_tasks=num_tasks)

    @property
    def capacity(self) -> int:
        """K, how many tasks there is room for."""
        return jax.tree.leaves(self.factors)[0].shape[0]

    def task(self, i: jax.Array | int) -> Task:
        """Task i, with its statistics. Raises as `mask`."""
        i = jnp.clip(self._index(i), 0, jnp.maximum(self.num_tasks - 1, 0))
        own, state = jax.tree.map(lambda rows: rows[i], (self.factors, self.states))
        masks = [outer(own[name], shape) for name, shape in self.layout.named_shapes]
        return Task(self.layout.tree(masks), state)

    def mixture(self, alphas: jax.Array | None = None) -> PyTree:
        """sum_i alphas_i t_i s_i' as `MaskStore.mixture`."""
        self.check_holds_tasks()
        if alphas is None:
            alphas = self.slots / self.num_tasks.astype(jnp.float32)
        alphas = self.per_slot(alphas)
        return self.layout.tree(
            [
                jnp.broadcast_to(jnp.einsum("k,ki,ko->io", alphas, *self.factors[name]), shape)
                for name, shape in self.layout.named_shapes
            ]
        )

    def taken(self, ids: jax.Array, num_tasks: jax.Array) -> "FactorStore":
        """A store of capacity S with the tasks ids [S], the first `num_tasks` of them."""
        factors, states = jax.tree.map(lambda rows: rows[ids], (self.factors, self.states))
        return dataclasses.replace(self, factors=factors, states=states, num_tasks=num_tasks)

    def contract(self, v: jax.Array, implementation: str | None = None) -> jax.Array:
        """<v, t_i s_i'> for every task: [..., K] of v [..., 32 nw]; one form, so any name does."""
        del implementation
        if v.ndim > 1:
            return jax.vmap(self.contract)(v)
        scores = [
            jnp.einsum(
                "io,ki,ko->k", part.reshape(-1, *part.shape[-2:]).sum(0), *self.factors[name]
            )
            for name, part in named_leaves(self.layout.unravel(v)).items()
        ]
        return jnp.where(self.slots, sum(scores), 0)

    def best_scores(self, v: jax.Array, error: float | None = None) -> Finish:
        """As of `MaskStore`; all scores are exact, whatever the error."""
        del error
        return Finish(jnp.where(self.slots, self.contract(v), -jnp.inf), jnp.float32(1))
