"""Views: gather indices over an image's pixels that turn one dataset into many tasks."""

import math

import numpy as np


def permutation(task: int, num_pixels: int, seed: int = 0, independent: bool = False) -> np.ndarray:
    """int32 [num_pixels], the paper's permutation of task `task` at `seed`.

    `np.random.RandomState(task + seed).permutation(num_pixels)`, as the reference draws it
    (`golden/orders.npz`): seeds s and s + 1 share all tasks but one, so deviations over seeds
    say little. independent: draw by (seed, task) instead, so that no two seeds share a task.
    """
    if task < 0 or seed < 0:
        raise ValueError(f"task and seed must not be negative, got {task} and {seed}")
    if independent:
        order = np.random.default_rng([seed, task]).permutation(num_pixels)
    else:
        order = np.random.RandomState(task + seed).permutation(num_pixels)
    return order.astype(np.int32)


def class_order(num_classes: int, seed: int) -> np.ndarray:
    """int32 [num_classes], the order in which classes are dealt to tasks (`golden/orders.npz`)."""
    if num_classes < 1 or seed < 0:
        raise ValueError(
            f"num_classes must be positive and seed not negative, got {num_classes} and {seed}"
        )
    return np.random.RandomState(seed).permutation(num_classes).astype(np.int32)


def rotation(degrees: float, shape: tuple[int, int]) -> np.ndarray:
    """int32 [H, W], a rotation about the image's middle, anticlockwise, nearest neighbour.

    Pixels from outside are -1, black. As Pillow's `Image.rotate`, which the reference uses
    (`golden/rotated.npz`): the centre of each pixel seen is turned back, and its place truncated.
    """
    height, width = shape
    angle = -math.radians(degrees % 360)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    middle_x, middle_y = width / 2, height / 2
    x = np.arange(width)[None] + 0.5 - middle_x
    y = np.arange(height)[:, None] + 0.5 - middle_y
    from_x = np.floor(cos * x + sin * y + middle_x).astype(np.int32)
    from_y = np.floor(-sin * x + cos * y + middle_y).astype(np.int32)
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    return np.where(inside, from_y * width + from_x, -1).astype(np.int32)
