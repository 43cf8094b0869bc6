"""Fully connected networks of the MNIST experiments."""

import itertools
import math
from collections.abc import Sequence

import jax
from flax import nnx


class MLP(nnx.Module):
    """Dense layers without biases, ReLU between them; images are flattened on the way in.

    sizes: features of the input, of each hidden layer and of the output, e.g. (784, 300, 100, 10).
    """

    def __init__(self, sizes: Sequence[int], *, rngs: nnx.Rngs):
        if len(sizes) < 2 or any(size < 1 for size in sizes):
            raise ValueError(f"sizes must be two or more positive ints, got {tuple(sizes)}")
        self.depth = len(sizes) - 1
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
            setattr(self, f"layer{i}", nnx.Linear(fan_in, fan_out, use_bias=False, rngs=rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits [B, C] of x [B, ...]."""
        x = x.reshape(x.shape[0], math.prod(x.shape[1:]))
        for i in range(self.depth - 1):
            x = jax.nn.relu(getattr(self, f"layer{i}")(x))
        return getattr(self, f"layer{self.depth - 1}")(x)


def lenet_300_100(num_outputs: int, *, num_inputs: int = 784, rngs: nnx.Rngs) -> MLP:
    """LeNet-300-100; at 100 outputs and 784 inputs, 275,200 weights."""
    return MLP((num_inputs, 300, 100, num_outputs), rngs=rngs)


def fc_1024_1024(num_outputs: int, *, num_inputs: int = 784, rngs: nnx.Rngs) -> MLP:
    """Two hidden layers of 1,024; at 500 outputs and 784 inputs, 2,363,392 weights."""
    return MLP((num_inputs, 1024, 1024, num_outputs), rngs=rngs)


def notebook_300_300(num_outputs: int, *, num_inputs: int = 784, rngs: nnx.Rngs) -> MLP:
    """Two hidden layers of 300, the network of the authors' notebook."""
    return MLP((num_inputs, 300, 300, num_outputs), rngs=rngs)
