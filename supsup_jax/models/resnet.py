"""Residual networks of the SplitCIFAR and SplitImageNet experiments (paper section 4.1).

No biases, and norms without a learned scale or offset: all that a task adds is a mask over the
kernels and, where norms are by the batch, their running statistics. Images are [B, H, W, channels].
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from supsup_jax.models.norms import norm_of, of_images


class _Block(nnx.Module):
    """Convolutions, each with a norm behind it and ReLU between them, beside a shortcut.

    convolutions: (features, size, stride) of each.
    """

    expansion = 1

    def __init__(
        self,
        num_in: int,
        convolutions: Sequence[tuple[int, int, int]],
        norm: str,
        rngs: nnx.Rngs,
    ):
        self.depth, features, total = len(convolutions), num_in, 1
        for i, (num_out, size, stride) in enumerate(convolutions, 1):
            setattr(self, f"conv{i}", _conv(features, num_out, size, stride, rngs))
            setattr(self, f"norm{i}", norm_of(norm, num_out, rngs))
            features, total = num_out, total * stride
        self.shortcut = _shortcut(num_in, features, total, norm, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x
        for i in range(1, self.depth + 1):
            y = getattr(self, f"norm{i}")(getattr(self, f"conv{i}")(y))
            y = jax.nn.relu(y) if i < self.depth else y
        return jax.nn.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class BasicBlock(_Block):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(
        self, num_in: int, width: int, stride: int, *, norm: str = "batch", rngs: nnx.Rngs
    ):
        super().__init__(num_in, [(width, 3, stride), (width, 3, 1)], norm, rngs)


class Bottleneck(_Block):
    """A 3x3 convolution between two of 1x1, beside a shortcut; the 3x3 one has the stride."""

    expansion = 4

    def __init__(
        self, num_in: int, width: int, stride: int, *, norm: str = "batch", rngs: nnx.Rngs
    ):
        last = self.expansion * width, 1, 1
        super().__init__(num_in, [(width, 1, 1), (width, 3, stride), last], norm, rngs)


class ResNet(nnx.Module):
    """A stem, four stages of blocks at width, 2, 4 and 8 times width, and a linear classifier.

    block: BasicBlock or Bottleneck, called with (num_in, width, stride, norm=, rngs=).
    depths: blocks of each stage. small_images: a 3x3 stem at stride 1, for images of 32x32; else
      7x7 at stride 2 and a max-pool. norm: one of `norms.NORMS`.
    Raises ValueError for a width or number of outputs below 1.
    """

    def __init__(
        self,
        block: Callable[..., nnx.Module],
        depths: Sequence[int],
        num_outputs: int,
        *,
        width: int,
        small_images: bool,
        num_channels: int = 3,
        norm: str = "batch",
        rngs: nnx.Rngs,
    ):
        if width < 1 or num_outputs < 1:
            raise ValueError(f"width and num_outputs must be positive, got {width}, {num_outputs}")
        size, stride = (3, 1) if small_images else (7, 2)
        self.small_images = small_images
        self.stem = _conv(num_channels, width, size, stride, rngs)
        self.stem_norm = norm_of(norm, width, rngs)
        self.blocks = []
        num_in = width
        for stage, depth in enumerate(depths):
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                name = f"stage{stage + 1}_block{i + 1}"
                setattr(self, name, block(num_in, width * 2**stage, stride, norm=norm, rngs=rngs))
                self.blocks.append(name)
                num_in = width * 2**stage * block.expansion
        self.blocks = tuple(self.blocks)  # static: NNX looks for modules in lists
        self.head = nnx.Linear(num_in, num_outputs, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits [B, C] of images [B, H, W, channels]."""
        of_images(x)
        x = jax.nn.relu(self.stem_norm(self.stem(x)))
        if not self.small_images:
            padding: Any = ((1, 1), (1, 1))  # flax takes it, and types a string only
            x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=padding)
        for name in self.blocks:
            x = getattr(self, name)(x)
        return self.head(jnp.mean(x, axis=(1, 2)))


def gem_resnet18(
    num_outputs: int, *, width: int = 20, norm: str = "batch", rngs: nnx.Rngs
) -> ResNet:
    """ResNet-18 for images of 32x32; at 20 base channels and 5 outputs, 1,090,940 weights."""
    return ResNet(
        BasicBlock, (2, 2, 2, 2), num_outputs, width=width, small_images=True, norm=norm, rngs=rngs
    )


def resnet18(num_outputs: int, *, width: int = 64, rngs: nnx.Rngs) -> ResNet:
    """ResNet-18 for ImageNet; at 1,000 outputs, 11,678,912 weights."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_outputs, width=width, small_images=False, rngs=rngs)


def resnet50(num_outputs: int, *, width: int = 64, rngs: nnx.Rngs) -> ResNet:
    """ResNet-50 for ImageNet; at 10 outputs, 23,475,392 weights."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_outputs, width=width, small_images=False, rngs=rngs)


def _conv(num_in, num_out, size, stride, rngs):
    """Padded as PyTorch pads; "SAME" at stride 2 would pad one side only."""
    return nnx.Conv(
        num_in,
        num_out,
        (size, size),
        strides=stride,
        padding=size // 2,
        use_bias=False,
        rngs=rngs,
    )


def _shortcut(num_in, num_out, stride, norm, rngs):
    """What x passes through where its shape changes."""
    if stride == 1 and num_in == num_out:
        return None
    return nnx.Sequential(_conv(num_in, num_out, 1, stride, rngs), norm_of(norm, num_out, rngs))
