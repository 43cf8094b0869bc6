"""What training lowers: functions of (logits [B, C], labels), of whose values the mean counts.

Functions of optax serve as they are, such as `optax.sigmoid_binary_cross_entropy` for several
labels an example and `optax.squared_error` for numbers.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax

from supsup_jax.checks import check_int


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """Softmax cross-entropy of class labels [B], in nats, over all C outputs; the default.

    smoothing: of each label's mass, the part that goes to all `labels` classes alike.
    weights: of each class, a number that its examples count by; None counts all alike. The mean is
      over examples, not weights.
    labels: how many of the outputs are classes, for smoothing; None for all.
    Equal by value, so that it never retraces. Raises ValueError on construction for numbers out of
    range.
    """

    smoothing: float = 0.0
    weights: tuple[float, ...] | None = None
    labels: int | None = None

    def __post_init__(self):
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must lie in [0, 1), got {self.smoothing!r}")
        if self.weights is not None:
            object.__setattr__(self, "weights", tuple(map(float, self.weights)))
            if not all(0 <= weight < math.inf for weight in self.weights):
                raise ValueError(f"weights must be finite and not negative, got {self.weights}")
        if self.labels is not None:
            check_int("labels", self.labels, 1)

    def __call__(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        logits = logits.astype(jnp.float32)
        if jnp.issubdtype(labels.dtype, jnp.integer):  # others optax refuses
            labels = labels.astype(jnp.int32)
        if self.labels is not None and self.labels > logits.shape[-1]:
            raise ValueError(
                f"the loss is of {self.labels} labels, the network has {logits.shape[-1]} outputs"
            )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        if self.smoothing:
            classes = logits[:, : self.labels]
            even = (jax.nn.logsumexp(logits, axis=-1, keepdims=True) - classes).mean(axis=-1)
            loss = (1 - self.smoothing) * loss + self.smoothing * even
        if self.weights is not None:
            loss = loss * jnp.asarray(self.weights, jnp.float32)[labels]
        return loss


def gaussian(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-log of a normal density, [B, L], for labels [B, L] or [B] of numbers: regression.

    logits: [B, 2 L], the means and behind them the logarithms of the variances, by which
    `objectives.log_variance` finds the task.
    Raises ValueError unless there are twice as many outputs as numbers.
    """
    labels = labels.reshape(len(labels), -1)
    if logits.shape[-1] != 2 * labels.shape[-1]:
        raise ValueError(
            f"the gaussian loss wants 2 outputs for each of the {labels.shape[-1]} numbers of a "
            f"label, mean and log variance, got {logits.shape[-1]}"
        )
    mean, log_variance = jnp.split(logits.astype(jnp.float32), 2, axis=-1)
    return 0.5 * (log_variance + (labels - mean) ** 2 * jnp.exp(-log_variance))
