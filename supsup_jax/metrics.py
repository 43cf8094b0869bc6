"""Continual-learning metrics over an accuracy matrix, in NumPy.

R [T, T]: R[i, j] is the accuracy on task j after learning task i, as a fraction; NaN where it was
not measured (j > i unless forward transfer is wanted; whole rows between checkpoints). The last
row must be measured for every task. Conventions follow GEM and Mammoth.
"""

import numpy as np


def average_accuracy(R: np.ndarray) -> float:
    """ACC: mean over tasks of the accuracy after the last one."""
    return float(np.mean(_checked(R)[-1]))


def average_incremental_accuracy(R: np.ndarray) -> float:
    """Mean over measured rows i of the mean accuracy on tasks 0..i."""
    R = _checked(R)
    rows = [R[i, : i + 1].mean() for i in range(len(R)) if np.isfinite(R[i, : i + 1]).all()]
    return float(np.mean(rows))


def forgetting(R: np.ndarray) -> float:
    """Mean over all tasks but the last of (best earlier accuracy - final accuracy).

    Where R has checkpoints only, "earlier" means at earlier checkpoints, and tasks without one
    do not count; 0 when none does.
    """
    R = _checked(R)
    drops = [
        np.nanmax(R[j:-1, j]) - R[-1, j] for j in range(len(R) - 1) if np.isfinite(R[j:-1, j]).any()
    ]
    return float(np.mean(drops)) if drops else 0.0


def backward_transfer(R: np.ndarray) -> float:
    """BWT: mean over all tasks but the last of (final accuracy - accuracy when first measured).

    That is R[j, j] in a full matrix, else the first checkpoint at or after j but before the last.
    """
    R = _checked(R)
    gains = []
    for j in range(len(R) - 1):
        measured = R[j:-1, j][np.isfinite(R[j:-1, j])]
        if measured.size:
            gains.append(R[-1, j] - measured[0])
    return float(np.mean(gains)) if gains else 0.0


def forward_transfer(R: np.ndarray, untrained: np.ndarray) -> float:
    """FWT: mean over tasks j >= 1 of R[j - 1, j] - untrained[j].

    untrained [T]: accuracy on each task before anything was learned.
    """
    R = _checked(R)
    if np.shape(untrained) != (len(R),):
        raise ValueError(f"untrained must be [{len(R)}], got shape {np.shape(untrained)}")
    return float(np.mean([R[j - 1, j] - untrained[j] for j in range(1, len(R))]))


def confusion(inferred: list[np.ndarray]) -> np.ndarray:
    """[T, T] counts: row i, column j is how many decisions on task i named task j."""
    num_tasks = len(inferred)
    return np.stack([np.bincount(ids, minlength=num_tasks)[:num_tasks] for ids in inferred])


def task_accuracy(confusion: np.ndarray) -> float:
    """Fraction of all decisions that named the right task."""
    return float(np.trace(confusion) / np.sum(confusion))


def _checked(R):
    R = np.asarray(R, np.float64)
    if R.ndim != 2 or R.shape[0] != R.shape[1] or not len(R):
        raise ValueError(f"R must be [T, T] with T >= 1, got shape {R.shape}")
    if not np.isfinite(R[-1]).all():
        raise ValueError("the last row of R must be measured for every task; it has NaN")
    return R
