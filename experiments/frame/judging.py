"""Which mask an image belongs to, from what the network makes of it under each mask alone."""

from collections.abc import Callable

import jax
import numpy as np

import supsup_jax as ss
from supsup_jax.objectives import OfLabels, energy

# Of the covariance of features, how much is spread evenly over all directions.
SHRINKAGE = 0.1
# Between the raw logit and the log-probability: chosen on held-out images, seed 0.
NORMALISED = 0.8


def averaged(views: ss.LabelledViews, logits: np.ndarray) -> np.ndarray:
    """As `LabelledViews.averaged`, of the logits [V, ..., C] of each view."""
    blocks = logits.reshape(*logits.shape[:-1], len(views.views), views.num_labels)
    own = [np.roll(block, -v, axis=-2) for v, block in enumerate(blocks)]
    return np.mean(own, axis=0).reshape(logits.shape[1:])


def own_view(views: ss.LabelledViews, logits: np.ndarray) -> np.ndarray:
    """The sum over views of log P(this view), [...], of the logits [V, ..., C] of each."""
    log_p = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    blocks = log_p.reshape(*logits.shape[:-1], len(views.views), views.num_labels)
    mine = [np.asarray(jax.nn.logsumexp(b[..., v, :], axis=-1)) for v, b in enumerate(blocks)]
    return np.sum(mine, axis=0)


def label_objectives(labels: int) -> dict[str, Callable]:
    return {
        "entropy": ss.entropy,
        "G": ss.Superfluous(labels),
        "max softmax of the labels": OfLabels(ss.max_confidence, labels),
        "energy": OfLabels(energy, labels),
        "max logit": ss.MaxLogit(labels),
        "max logit, normalised": ss.MaxLogit(labels, normalised=NORMALISED),
        "log probability": ss.MaxLogit(labels, normalised=1.0),
    }


def by_rule(views: ss.LabelledViews, logits: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """Scores [T, N] by network and rule, of the logits [V, T, N, C] of each view that was learned.

    Networks: "one view", of the images as they are, and where there are more their average. There
    "own view" is the sum over views of log P(this view), of no use for one.
    """
    labels = views.num_labels

    def scores(z):
        return {name: -np.asarray(rule(z)) for name, rule in label_objectives(labels).items()}

    found = {"one view": scores(logits[0])}
    if len(logits) > 1:
        found["all views"] = scores(averaged(views, logits))
        found["all views"]["own view"] = own_view(views, logits)
    return found


def standardised(scores: np.ndarray, held: np.ndarray, of_held: np.ndarray) -> np.ndarray:
    """scores [T, N] less the mean, over the deviation, of each task's own held-out images.

    held: [T, H], the scores of these. of_held: [H], the task of each.
    """
    own = [row[of_held == i] for i, row in enumerate(held)]
    mean, deviation = (np.array([f(each) for each in own])[:, None] for f in (np.mean, np.std))
    return (scores - mean) / deviation


def judged(scores, labels_right, of_task, group) -> tuple:
    """Task accuracy and class-incremental accuracy where `group` images of a task decide together;
    None where a task has fewer.

    scores [T, N], images of a task side by side; labels_right [T, N], whether a mask's label is.
    """
    named, right = [], []
    for i in np.unique(of_task):
        rows = np.flatnonzero(of_task == i)
        rows = rows[: len(rows) - len(rows) % group].reshape(-1, group)
        if not len(rows):
            return None, None
        task = scores[:, rows].mean(axis=-1).argmax(axis=0)
        named.append(task == i)
        right.append((task == i)[:, None] & labels_right[i, rows])
    return float(np.concatenate(named).mean()), float(np.concatenate(right).mean())


def mahalanobis(features, train_features, train_labels) -> np.ndarray:
    """Scores [T, N]: minus the least squared distance to a class mean, by each task's own shrunk
    covariance of features [T, N, D]. train_*: of each task its own training images, [M, D] and [M].
    """
    rows = []
    for seen, own, classes in zip(features, train_features, train_labels, strict=True):
        means = np.stack([own[classes == c].mean(0) for c in np.unique(classes)])
        rest = own - means[np.searchsorted(np.unique(classes), classes)]
        covariance = rest.T @ rest / len(rest)
        even = np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        precision = np.linalg.inv((1 - SHRINKAGE) * covariance + SHRINKAGE * even)
        distances = [
            np.einsum("nd,de,ne->n", seen - mean, precision, seen - mean) for mean in means
        ]
        rows.append(-np.min(distances, axis=0))
    return np.stack(rows)


def refusals(known: np.ndarray, held: np.ndarray, strangers: np.ndarray, rate: float) -> dict:
    """How well the best score of any mask tells images of learned tasks from others, [T, N] each.

    false_alarms: of known images refused, by the threshold that refuses `rate` of the held-out.
    misses: of strangers not refused. auroc: the chance that a known one scores above a stranger.
    """
    known, held, strangers = (scores.max(axis=0) for scores in (known, held, strangers))
    threshold = np.quantile(held, rate)
    below = np.searchsorted(np.sort(strangers), known, "left")
    equal = np.searchsorted(np.sort(strangers), known, "right") - below
    return {
        "false_alarms": float((known < threshold).mean()),
        "misses": float((strangers >= threshold).mean()),
        "auroc": float((below + equal / 2).mean() / len(strangers)),
    }
