"""Views: gather indices over an image's pixels that turn one dataset into many tasks."""

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
