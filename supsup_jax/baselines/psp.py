"""PSP, parameter superposition by rotation (Cheung et al., arXiv 1902.05522): each task turns the
inputs of every layer by a random rotation of its own, and all train the same kernels.
"""

import dataclasses
import itertools

import jax

from supsup_jax import prng
from supsup_jax.baselines.sharing import Baseline, check_kernels
from supsup_jax.layout import named_leaves
from supsup_jax.network import Network
from supsup_jax.types import PyTree


def psp(net: Network) -> Baseline:
    """Rotations drawn from a task's key and never trained, so a task adds no bytes; the kernels
    train on every task.

    net: dense layers in the order of its masked leaves, ReLU between them, as `models.MLP`.
    Raises ValueError for normalisation statistics, for other weights beside the kernels, such as
    biases, and for kernels that do not form such a chain.
    """
    if check_kernels(net).state is not None:
        raise ValueError("psp takes a network without normalisation statistics (state)")
    if others := sorted(named_leaves(net.params).keys() - net.layout.shapes.keys()):
        raise ValueError(f"psp takes a network of kernels alone, got {others} beside them")
    shapes = tuple(net.layout.shapes.values())
    dense = all(len(shape) == 2 for shape in shapes)
    if not dense or any(a[1] != b[0] for a, b in itertools.pairwise(shapes)):
        raise ValueError(f"psp needs dense kernels [in, out] that form a chain, got {shapes}")
    return Rotations("always", False, net)


def rotate_dense(x: jax.Array, kernel: jax.Array, rotation: jax.Array) -> jax.Array:
    """y = kernel' (C x) of each row: x [B, in], kernel [in, out], rotation C [in, in]."""
    return (x @ rotation.T) @ kernel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotations(Baseline):
    """A task turns the inputs of every kernel."""

    def draw_own(self, key: jax.Array) -> list[jax.Array]:
        """Uniform over the orthogonal group, each [in, in]."""
        widths = [shape[0] for _, shape in self.net.layout.named_shapes]
        keys = jax.random.split(prng.purpose_key(key, "rotations"), len(widths))
        return [jax.random.orthogonal(k, n) for k, n in zip(keys, widths, strict=True)]

    def forward(
        self, shared: PyTree, own: list[jax.Array], state: PyTree, x: jax.Array, train: bool
    ) -> tuple[jax.Array, PyTree]:
        # Not by `weights`: turning x takes in * in operations an example, turning the kernel in *
        # in * out a batch, and a step of FC-1024-1024 over twice as long on CPU.
        del train
        kernels = named_leaves(shared)
        x = x.reshape(len(x), -1)
        *hidden, last = zip(self.net.layout.shapes, own, strict=True)
        for name, rotation in hidden:
            x = jax.nn.relu(rotate_dense(x, kernels[name], rotation))
        name, rotation = last
        return rotate_dense(x, kernels[name], rotation), state
