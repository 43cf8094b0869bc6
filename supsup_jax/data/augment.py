"""Augmentation of images on the device, inside jit: what a TrainConfig takes as `augment`."""

import dataclasses

import jax
import jax.numpy as jnp

from supsup_jax.types import Normalize


@dataclasses.dataclass(frozen=True)
class CropAndFlip:
    """Each image shifted by up to `padding` pixels each way, and mirrored half of the time.

    The CIFAR recipe: a crop of the image's own size out of one padded with black, at a place drawn
    uniformly for each image; then left and right exchanged with probability 1/2.
    x [B, H, W, channels] is what the network takes, normalised already: `normalize` says what black
    is then. Equal by value, so it never retraces.
    """

    padding: int = 4
    normalize: Normalize | None = None  # None: black is 0

    def __call__(self, key: jax.Array, x: jax.Array) -> jax.Array:
        if x.ndim != 4:
            raise ValueError(f"CropAndFlip takes images [B, H, W, channels], got shape {x.shape}")
        crop_key, flip_key = jax.random.split(key)
        num, height, width, _ = x.shape
        black = jnp.zeros(()) if self.normalize is None else self.normalize.black
        black = black.reshape((1,) * (4 - black.ndim) + black.shape).astype(x.dtype)
        # Taken from the unpadded image, and black where that lies outside.
        shift = jax.random.randint(crop_key, (2, num, 1), -self.padding, self.padding + 1)
        rows = jnp.arange(height)[None] + shift[0]
        columns = jnp.arange(width)[None] + shift[1]
        flip = jax.random.bernoulli(flip_key, shape=(num, 1))
        columns = jnp.where(flip, columns[:, ::-1], columns)
        inside = _within(rows, height)[:, :, None] & _within(columns, width)[:, None, :]
        taken = x[
            jnp.arange(num)[:, None, None],
            jnp.clip(rows, 0, height - 1)[:, :, None],
            jnp.clip(columns, 0, width - 1)[:, None, :],
        ]
        return jnp.where(inside[..., None], taken, black)


def _within(index, size):
    return (index >= 0) & (index < size)
