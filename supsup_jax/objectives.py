"""How uncertain an output is: callables of logits [..., C] -> [...], lower is more certain.

All are equal by value (module functions, or a frozen dataclass), so that passing one to a jitted
function never retraces. Values are float32, in nats where they are logarithms.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from supsup_jax.checks import check_int


def entropy(logits: jax.Array) -> jax.Array:
    """H = -sum_c p_c log p_c of softmax(logits), in nats (paper section 3.3).

    0 log 0 = 0 in the value and in every derivative, so both stay finite at extreme logits.
    Raises ValueError for a single output, of which it is 0 whatever the output.
    """
    if logits.shape[-1] < 2:
        raise ValueError(
            "entropy tells nothing of a single output: for regression learn a mean and a log "
            "variance by losses.gaussian and pass objective=objectives.log_variance"
        )
    log_p = jax.nn.log_softmax(_as_float32(logits))
    p = jnp.exp(log_p)
    return -jnp.sum(p * jnp.where(p > 0, log_p, 0), axis=-1)


@dataclasses.dataclass(frozen=True)
class Superfluous:
    """The paper's G (section 3.6): -log P(labels), with P(labels) the softmax mass on them.

    The first `num_labels` outputs are labels, the rest are superfluous; training pushes their
    mass down, so a network under the right mask puts little there. The value is
    logsumexp(all) - logsumexp(labels); under differentiation only the superfluous logits carry
    a gradient, which equals that of the paper's G = logsumexp(all).
    Raises ValueError unless there are more outputs than labels.
    """

    num_labels: int

    def __post_init__(self):
        object.__setattr__(self, "num_labels", _checked_count(self.num_labels))

    def __call__(self, logits: jax.Array) -> jax.Array:
        if logits.shape[-1] <= self.num_labels:
            raise ValueError(
                f"Superfluous({self.num_labels}) needs more than {self.num_labels} outputs, "
                f"got {logits.shape[-1]}"
            )
        logits = _as_float32(logits)
        labels = lax.stop_gradient(logits[..., : self.num_labels])
        everything = jnp.concatenate([labels, logits[..., self.num_labels :]], axis=-1)
        return jax.nn.logsumexp(everything, axis=-1) - jax.nn.logsumexp(labels, axis=-1)


def sigmoid_entropy(logits: jax.Array) -> jax.Array:
    """The entropy of C independent labels, yes or no each, in nats: for several labels an input."""
    logits = _as_float32(logits)
    # -p log p - q log q with q = 1 - p, of which -log q = softplus(logit) and log p = logit - it.
    return jnp.sum(jax.nn.softplus(logits) - jax.nn.sigmoid(logits) * logits, axis=-1)


def log_variance(logits: jax.Array) -> jax.Array:
    """Mean of the second half of the outputs: of nets learned by the loss `losses.gaussian`."""
    return jnp.mean(_as_float32(logits[..., logits.shape[-1] // 2 :]), axis=-1)


def max_logit(logits: jax.Array) -> jax.Array:
    """Minus the largest logit."""
    return -jnp.max(_as_float32(logits), axis=-1)


def max_confidence(logits: jax.Array) -> jax.Array:
    """Minus the largest softmax probability."""
    return -jnp.max(jax.nn.softmax(_as_float32(logits)), axis=-1)


def energy(logits: jax.Array) -> jax.Array:
    """-logsumexp of the logits: an input's energy (arXiv 2010.03759), low where one is large."""
    return -jax.nn.logsumexp(_as_float32(logits), axis=-1)


@dataclasses.dataclass(frozen=True)
class OfLabels:
    """An objective of the first `num_labels` outputs alone, the labels: such as
    OfLabels(max_logit, 2), OfLabels(energy, 2), OfLabels(max_confidence, 2).

    Raises ValueError where there are fewer outputs.
    """

    objective: Callable[[jax.Array], jax.Array]
    num_labels: int

    def __post_init__(self):
        object.__setattr__(self, "num_labels", _checked_count(self.num_labels))

    def __call__(self, logits: jax.Array) -> jax.Array:
        return self.objective(_labels_of(self, logits))

    def __repr__(self) -> str:
        return f"OfLabels({name_of(self.objective)}, {self.num_labels})"


@dataclasses.dataclass(frozen=True)
class MaxLogit:
    """Minus the largest logit among the first `num_labels` outputs, a task's own labels, less
    `normalised` times the logsumexp of all outputs.

    normalised: 0 compares raw logits, which tell how much a mask knows; 1 log-probabilities, which
      tell how sure it is; in between, both. For masks tried alone (`oracle`, `rerank`) on natural
      images (docs/natural_images.md).
    Raises ValueError where there are fewer outputs, and for a weight outside [0, 1].
    """

    num_labels: int
    normalised: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "num_labels", _checked_count(self.num_labels))
        if not 0 <= self.normalised <= 1:
            raise ValueError(f"normalised must lie in [0, 1], got {self.normalised!r}")
        # Equals have one name: 1 is 1.0, and NumPy's numbers are numbers.
        object.__setattr__(self, "normalised", float(self.normalised))

    def __call__(self, logits: jax.Array) -> jax.Array:
        own = max_logit(_labels_of(self, logits))
        return own - self.normalised * energy(logits) if self.normalised else own


@dataclasses.dataclass(frozen=True)
class Standardised:
    """An objective by which each task is judged against its own: (score - mean) / deviation.

    Mean and deviation are those of the task's own inputs under its mask, which a store keeps once
    `measure_statistics(net, store, stream, objective)` has found them. For `oracle` and for
    `rerank(judge=)`; a gradient has no such numbers, and `one_shot` refuses it. Groups that decide
    together sum them: sums of numbers on one scale.
    """

    objective: Callable[[jax.Array], jax.Array]

    def __post_init__(self):
        if not callable(self.objective) or isinstance(self.objective, Standardised):
            raise TypeError(f"Standardised is of an objective, got {self.objective!r}")

    @property
    def name(self) -> str:
        """What its moments are kept under."""
        return name_of(self.objective)

    def __call__(self, logits: jax.Array) -> jax.Array:
        raise ValueError(
            f"{self!r} judges masks tried alone: pass it to oracle, or to rerank(judge=...)"
        )

    def __repr__(self) -> str:
        return f"Standardised({self.name})"


def name_of(objective: Callable[[jax.Array], jax.Array]) -> str:
    """An objective in words, the same in every process: of a function its name."""
    return getattr(objective, "__qualname__", None) or repr(objective)


@dataclasses.dataclass(frozen=True)
class Logarithm:
    """log F of a positive F, whose derivatives are in proportion to it."""

    objective: Callable[[jax.Array], jax.Array]

    def __call__(self, logits: jax.Array) -> jax.Array:
        return jnp.log(self.objective(logits) + 1e-6)  # at 0, too, with a derivative


def of_labels(
    objective: Callable[[jax.Array], jax.Array], num_labels: int | None
) -> Callable[[jax.Array], jax.Array]:
    """The objective for a task of so many labels: G and the logit rules count a task's own, where
    `max_logit`, `max_confidence` and `energy` count all outputs otherwise.

    None: the task does not tell, and the objective stays.
    """
    if num_labels is None:
        return objective
    if isinstance(objective, Superfluous):
        return Superfluous(num_labels)
    if isinstance(objective, OfLabels | MaxLogit):
        return dataclasses.replace(objective, num_labels=num_labels)
    own = (max_logit, max_confidence, energy)
    return OfLabels(objective, num_labels) if objective in own else objective


def _checked_count(num_labels):
    """As an int, of NumPy's, too: equals have one name."""
    check_int("num_labels", num_labels, 1)
    return int(num_labels)


def _labels_of(objective, logits):
    """The logits of an objective's labels."""
    count = objective.num_labels
    if logits.shape[-1] < count:
        raise ValueError(f"{objective!r} needs {count} outputs, got {logits.shape[-1]}")
    return logits[..., :count]


def _as_float32(logits):
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
