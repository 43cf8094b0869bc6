"""The network of the HopSupSup experiment, whose hidden activations are masked (section 4.5)."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

EPS = 1e-5  # beside the variance, as in PyTorch


class BatchNorm(nnx.Module):
    """(x - mean) / sqrt(variance + EPS) * scale over x [B, features], by x's own statistics.

    In training and in testing alike: nothing is remembered, so the module has no state. The
    variance is the biased one. scale [features] starts at ones.
    Raises ValueError for a batch of one, which has no statistics.
    """

    def __init__(self, features: int):
        self.scale = nnx.Param(jnp.ones(features))

    def __call__(self, x: jax.Array) -> jax.Array:
        if x.shape[0] < 2:
            raise ValueError(
                "a BatchNorm by the batch's own statistics needs two images or more at once, "
                f"got x of shape {x.shape}"
            )
        centred = x - x.mean(axis=0, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=0, keepdims=True)
        return centred * jax.lax.rsqrt(variance + EPS) * self.scale[...][None]


class BNNet(nnx.Module):
    """Dense, norm, swish, twice; then dense. No biases; images are flattened on the way in.

    The dense kernels are +-sqrt(2 / fan_in), the sign uniform, drawn here and fixed from then
    on. What a task masks are the two norms' scales, all ones:

        net = ss.Network.from_nnx(models.bnnet(10, rngs=rngs), masked=models.is_norm_scale)

    (`signed_constant` would redraw the scales: it is not called.) A mask then switches off hidden
    units. An image's logits depend on its batch; decide and predict by batches, not per example.
    """

    def __init__(self, num_inputs: int, width: int, num_outputs: int, *, rngs: nnx.Rngs):
        sizes = (num_inputs, width, num_outputs)
        if any(size < 1 for size in sizes):
            raise ValueError(f"num_inputs, width and num_outputs must be positive, got {sizes}")
        self.layer0 = _dense(num_inputs, width, rngs)
        self.norm0 = BatchNorm(width)
        self.layer1 = _dense(width, width, rngs)
        self.norm1 = BatchNorm(width)
        self.layer2 = _dense(width, num_outputs, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits [B, C] of x [B, ...], B at least 2."""
        x = x.reshape(x.shape[0], math.prod(x.shape[1:]))
        x = jax.nn.swish(self.norm0(self.layer0(x)))
        x = jax.nn.swish(self.norm1(self.layer1(x)))
        return self.layer2(x)


def bnnet(num_outputs: int, *, num_inputs: int = 784, width: int = 2048, rngs: nnx.Rngs) -> BNNet:
    """The paper's 784-2048-2048-10 at 10 outputs: 5.8 million fixed weights, 4,096 to mask."""
    return BNNet(num_inputs, width, num_outputs, rngs=rngs)


def is_norm_scale(name: str, leaf: jax.Array) -> bool:
    """Picks the scales of the norms, for the `masked` of a Network."""
    del leaf
    return name.split("/")[-1] == "scale"


def _dense(fan_in, fan_out, rngs):
    return nnx.Linear(fan_in, fan_out, use_bias=False, kernel_init=_signed_constant, rngs=rngs)


def _signed_constant(key, shape, dtype=jnp.float32):
    signs = jax.random.rademacher(key, shape, dtype)
    return signs * jnp.asarray(math.sqrt(2 / math.prod(shape[:-1])), dtype)
