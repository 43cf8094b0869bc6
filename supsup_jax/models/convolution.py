"""Convolutions that are fast to train on every platform.

XLA's CPU backend computes a kernel's gradient 10 to 30 times slower inside a loop than it need be,
and training is a loop. There a convolution is one matrix product over patches; elsewhere it is the
platform's own.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

INIT = jax.nn.initializers.lecun_normal()


class Conv(nnx.Module):
    """Convolution without bias of images [B, H, W, num_in], padded by half a window each side.

    kernel: [size, size, num_in, num_out].
    """

    def __init__(self, num_in: int, num_out: int, size: int, stride: int = 1, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(INIT(rngs.params(), (size, size, num_in, num_out)))
        self.stride = stride

    def __call__(self, x: jax.Array) -> jax.Array:
        return convolve(x, self.kernel[...], self.stride)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """x [B, H, W, I] with kernel [size, size, I, O], size odd: [B, ceil(H / stride), ..., O].

    Padded by size // 2 on every side, as PyTorch pads ("SAME" at stride 2 would pad one side only).
    Reverse mode to any order, no forward mode.
    """
    by_patches = functools.partial(_by_patches, stride=stride)
    own = functools.partial(_by_platform, stride=stride)
    return lax.platform_dependent(x, kernel, cpu=by_patches, default=own)


def _forward(x, kernel, stride):
    return convolve(x, kernel, stride), (x, kernel)


def _backward(stride, saved, cotangent):
    # Patches are made again rather than kept: they take size * size times the memory of x.
    def pull(form):
        return lambda x, kernel, cotangent: jax.vjp(
            functools.partial(form, stride=stride), x, kernel
        )[1](cotangent)

    return lax.platform_dependent(
        *saved, cotangent, cpu=pull(_by_patches), default=pull(_by_platform)
    )


convolve.defvjp(_forward, _backward)


def _by_platform(x, kernel, *, stride):
    pad = (kernel.shape[0] // 2,) * 2
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), (pad, pad), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _by_patches(x, kernel, *, stride):
    size, _, num_in, num_out = kernel.shape
    pad = size // 2
    num, height, width, _ = x.shape
    x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    below, right = (height - 1) // stride * stride + 1, (width - 1) // stride * stride + 1
    shifted = [
        lax.slice(x, (0, i, j, 0), (num, i + below, j + right, num_in), (1, stride, stride, 1))
        for i in range(size)
        for j in range(size)
    ]
    return jnp.concatenate(shifted, axis=-1) @ kernel.reshape(-1, num_out)
