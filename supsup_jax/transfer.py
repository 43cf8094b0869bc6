"""Where a new task's scores start when earlier tasks may help: at the mean of theirs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from supsup_jax.network import Network
from supsup_jax.types import PyTree


class ScoreMean(NamedTuple):
    """The running mean of the scores of the tasks learned so far (paper section 3.2): O(n).

    num_tasks: int32 []. mean: float32 pytree like a mask, 0 before the first task.
    A pytree; `train_task(..., init_scores=mean)` starts there, or from a draw before any task.
    """

    num_tasks: jax.Array
    mean: PyTree

    @classmethod
    def create(cls, net: Network) -> "ScoreMean":
        """Of no task yet."""
        zeros = [jnp.zeros(shape) for shape in net.layout.shapes.values()]
        return cls(jnp.int32(0), net.layout.tree(zeros))

    def include(self, scores: PyTree) -> "ScoreMean":
        """With one more task's scores, a TrainResult's `scores`.

        Raises ValueError when they are not a pytree like the mean, leaf by leaf.
        """
        if jax.tree.structure(scores) != jax.tree.structure(self.mean):
            raise ValueError(
                f"scores must be a pytree like {jax.tree.structure(self.mean)}, as a TrainResult "
                f"holds them, got {jax.tree.structure(scores)}"
            )
        for mean, each in zip(jax.tree.leaves(self.mean), jax.tree.leaves(scores), strict=True):
            if jnp.shape(each) != mean.shape:
                raise ValueError(
                    f"scores must be of one task, {mean.shape}, got {jnp.shape(each)}: include "
                    "those of several one by one"
                )
        num_tasks = self.num_tasks + 1
        mean = jax.tree.map(lambda m, s: m + (s - m) / num_tasks, self.mean, scores)
        return ScoreMean(num_tasks, mean)

    def start(self, drawn: PyTree) -> PyTree:
        """The mean, or the `drawn` scores where there is no earlier task."""
        return jax.tree.map(lambda m, d: jnp.where(self.num_tasks > 0, m, d), self.mean, drawn)
