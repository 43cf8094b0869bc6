"""A plain convolutional network for small images, such as a CPU trains in minutes."""

from collections.abc import Sequence

import jax
from flax import nnx

from supsup_jax.models.norms import norm_of, of_images


class ConvNet(nnx.Module):
    """3x3 convolutions, each with a norm and ReLU behind it, and a linear classifier of all that is
    left of an image; no biases.

    widths, strides: of each convolution. norm: one of `norms.NORMS`. size: of images [size, size].
    Raises ValueError unless there is one stride a width.
    """

    def __init__(
        self,
        num_outputs: int,
        *,
        widths: Sequence[int] = (48, 96, 192),
        strides: Sequence[int] = (2, 2, 2),
        norm: str = "batch",
        size: int = 32,
        num_channels: int = 3,
        rngs: nnx.Rngs,
    ):
        if len(widths) != len(strides) or not widths:
            raise ValueError(f"widths {tuple(widths)} and strides {tuple(strides)} must be pairs")
        self.depth, features = len(widths), num_channels
        for i, (width, stride) in enumerate(zip(widths, strides, strict=True)):
            conv = nnx.Conv(
                features, width, (3, 3), strides=stride, padding=1, use_bias=False, rngs=rngs
            )
            setattr(self, f"conv{i}", conv)
            setattr(self, f"norm{i}", norm_of(norm, width, rngs))
            features, size = width, -(-size // stride)
        self.head = nnx.Linear(features * size**2, num_outputs, use_bias=False, rngs=rngs)

    def features(self, x: jax.Array) -> jax.Array:
        """What the classifier sees, [B, h, w, widths[-1]], of images [B, size, size, channels]."""
        of_images(x)
        for i in range(self.depth):
            x = jax.nn.relu(getattr(self, f"norm{i}")(getattr(self, f"conv{i}")(x)))
        return x

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits [B, C] of images [B, size, size, channels]."""
        return self.head(self.features(x).reshape(len(x), -1))
