"""Norms by the batch, with statistics that each task keeps, or by the example, with none."""

import jax
from flax import nnx

NORMS = ("batch", "layer", "group")
MOMENTUM = 0.9  # of the running statistics: what is kept each step; PyTorch calls this .1
GROUPS = 4


def norm_of(kind: str, width: int, rngs: nnx.Rngs) -> nnx.Module:
    """A norm of images [B, H, W, width] without a learned scale or offset, so that nothing of it
    is a task's but statistics.

    "batch": by each channel over the batch; the running mean and variance are the task's. "layer":
    of each example over all that it is, "group": over each of 4 groups of channels; a network of
    these knows no other examples, with or without the task.
    Raises ValueError for another kind, and for a width that groups do not divide.
    """
    plain = {"use_bias": False, "use_scale": False, "rngs": rngs}
    if kind == "batch":
        return nnx.BatchNorm(width, momentum=MOMENTUM, **plain)
    if kind == "layer":
        return nnx.LayerNorm(width, reduction_axes=(-3, -2, -1), feature_axes=-1, **plain)
    if kind == "group":
        return nnx.GroupNorm(width, num_groups=GROUPS, **plain)
    raise ValueError(f"norm must be one of {NORMS}, got {kind!r}")


def of_images(x: jax.Array) -> None:
    """Raises ValueError unless x is [B, H, W, channels]."""
    if x.ndim != 4:
        raise ValueError(f"images must be [B, H, W, channels], got shape {x.shape}")
