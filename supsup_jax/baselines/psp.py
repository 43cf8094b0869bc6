"""PSP, parameter superposition by rotation (Cheung et al., arXiv 1902.05522): each task turns the
inputs of every layer by a random rotation of its own, and all train the same kernels.
"""

import dataclasses
import itertools

import jax

from supsup_jax import prng
from supsup_jax.baselines.heads import check_stateless
from supsup_jax.baselines.sharing import Baseline
from supsup_jax.network import Network
from supsup_jax.packing import named_leaves
from supsup_jax.types import PyTree


def psp(net: Network) -> Baseline:
    """Rotations drawn from a task's key and never trained, so a task adds no bytes; the kernels
    train on every task.

    net: dense layers in the order of its masked leaves, ReLU between them, as `models.MLP`.
    Raises ValueError for kernels that do not form such a chain.
    """
    net = check_stateless(net)
    shapes = tuple(net.layout.shapes.values())
    dense = all(len(shape) == 2 for shape in shapes)
    if not dense or any(a[1] != b[0] for a, b in itertools.pairwise(shapes)):
        raise ValueError(f"psp needs dense kernels [in, out] that form a chain, got {shapes}")
    return Rotations("always", False, tuple(net.layout.shapes), tuple(s[0] for s in shapes))


def rotate_dense(x: jax.Array, kernel: jax.Array, rotation: jax.Array) -> jax.Array:
    """y = kernel' (C x) of each row: x [B, in], kernel [in, out], rotation C [in, in]."""
    return (x @ rotation.T) @ kernel


@dataclasses.dataclass(frozen=True)
class Rotations(Baseline):
    """A task turns the inputs of the kernels `names`, of these widths."""

    names: tuple[str, ...]
    widths: tuple[int, ...]

    def draw_own(self, key: jax.Array) -> list[jax.Array]:
        """Uniform over the orthogonal group, each [in, in]."""
        keys = jax.random.split(prng.purpose_key(key, "rotations"), len(self.widths))
        return [jax.random.orthogonal(k, n) for k, n in zip(keys, self.widths, strict=True)]

    def logits(self, shared: PyTree, own: list[jax.Array], x: jax.Array) -> jax.Array:
        kernels = named_leaves(shared)
        x = x.reshape(len(x), -1)
        for name, rotation in zip(self.names[:-1], own[:-1], strict=True):
            x = jax.nn.relu(rotate_dense(x, kernels[name], rotation))
        return rotate_dense(x, kernels[self.names[-1]], own[-1])
