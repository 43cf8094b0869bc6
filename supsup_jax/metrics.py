"""Continual-learning metrics over an accuracy matrix, and over tasks found, in NumPy.

R [T, T]: R[i, j] is the accuracy on task j after learning task i, as a fraction; NaN where it was
not measured (j > i unless forward transfer is wanted; whole rows between checkpoints). The last
row must be measured for every task. Conventions follow GEM and Mammoth.

counts [true task, mask]: how many windows of each task were learned by each mask, where masks
were not told their task (scenario NNs). A mask's task, and a task's mask, is the one with most
windows, the lower id among equals.
"""

from typing import NamedTuple

import numpy as np

from supsup_jax.types import Integers


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
    """FWT: mean over tasks j >= 1 of R[j - 1, j] - untrained[j]; 0 where there is one task only.

    untrained [T]: accuracy on each task before anything was learned.
    """
    R = _checked(R)
    if np.shape(untrained) != (len(R),):
        raise ValueError(f"untrained must be [{len(R)}], got shape {np.shape(untrained)}")
    gains = [R[j - 1, j] - untrained[j] for j in range(1, len(R))]
    return float(np.mean(gains)) if gains else 0.0


def confusion(inferred: list[np.ndarray]) -> np.ndarray:
    """[T, T] counts: row i, column j is how many decisions on task i named task j.

    More columns where tasks are named of which none was asked. Raises ValueError for decisions that
    name none, -1, as those that were refused.
    """
    most = max((int(np.max(ids, initial=-1)) for ids in inferred), default=-1)
    if any(np.min(ids, initial=0) < 0 for ids in inferred):
        raise ValueError(
            "inferred must name tasks, got -1: count decisions that were refused apart"
        )
    return np.stack([np.bincount(ids, minlength=max(most + 1, len(inferred))) for ids in inferred])


def task_accuracy(confusion: np.ndarray) -> float:
    """Fraction of all decisions that named the right task."""
    return float(np.trace(confusion) / np.sum(confusion))


class Found(NamedTuple):
    """How the masks that a stream's learner allocated stand to the true tasks.

    masks: that learned from any window. found: tasks that are the task of some mask.
    purity: fraction of all windows learned by a mask of their task.
    split: tasks learned by several masks. merged: masks that learned several tasks.
    """

    masks: int
    found: int
    purity: float
    split: int
    merged: int


def window_counts(tasks: Integers, masks: Integers, num_tasks: int | None = None) -> np.ndarray:
    """[true task, mask] counts of windows, given task and mask of each; -1: learned by no mask.

    num_tasks: rows, where the last tasks may have no window.
    """
    true, chosen = np.asarray(tasks, int), np.asarray(masks, int)
    if true.shape != chosen.shape or true.ndim != 1:
        raise ValueError(
            f"tasks and masks must name one of each a window, got {true.shape} and {chosen.shape}"
        )
    rows = true.max(initial=-1) + 1 if num_tasks is None else num_tasks
    counts = np.zeros((rows, chosen.max(initial=-1) + 1), int)
    learned = chosen >= 0
    np.add.at(counts, (true[learned], chosen[learned]), 1)
    return counts


def task_of_mask(counts: np.ndarray) -> np.ndarray:
    """The task of each mask, [masks]; -1 where a mask has no window."""
    return mask_of_task(np.transpose(counts))


def mask_of_task(counts: np.ndarray) -> np.ndarray:
    """The mask of each task, [tasks]; -1 where no window of a task was learned."""
    counts = _checked_counts(counts)
    if not counts.shape[1]:
        return np.full(len(counts), -1)
    return np.where(counts.any(axis=1), counts.argmax(axis=1), -1)


def found(counts: np.ndarray) -> Found:
    """How well masks and tasks stand for each other."""
    counts = _checked_counts(counts)
    if not counts.sum():
        raise ValueError("counts must hold at least one window")
    tasks = task_of_mask(counts)
    return Found(
        masks=int(np.sum(tasks >= 0)),
        found=len(set(tasks[tasks >= 0].tolist())),
        purity=float(counts.max(axis=0).sum() / counts.sum()),
        split=int(np.sum((counts > 0).sum(axis=1) > 1)),
        merged=int(np.sum((counts > 0).sum(axis=0) > 1)),
    )


def _checked_counts(counts):
    counts = np.asarray(counts)
    if counts.ndim != 2 or not np.issubdtype(counts.dtype, np.integer) or (counts < 0).any():
        raise ValueError(
            f"counts must be [true task, mask] counts of windows, got {counts.dtype} {counts.shape}"
        )
    return counts


def _checked(R):
    R = np.asarray(R, np.float64)
    if R.ndim != 2 or R.shape[0] != R.shape[1] or not len(R):
        raise ValueError(f"R must be [T, T] with T >= 1, got shape {R.shape}")
    if not np.isfinite(R[-1]).all():
        raise ValueError("the last row of R must be measured for every task; it has NaN")
    return R
