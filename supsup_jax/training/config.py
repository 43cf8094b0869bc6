"""How a task is trained."""

import dataclasses
import math
from collections.abc import Callable, Hashable

import optax

from supsup_jax import masks
from supsup_jax.checks import check_int
from supsup_jax.layout import Layout
from supsup_jax.masks import Density, kept_counts
from supsup_jax.types import PyTree

RULES = ("threshold", "topk")

OPTIMIZERS = ("rmsprop", "adam", "sgd")

SCHEDULES = ("constant", "cosine")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How a task is trained; hashable by value, so equal configs share one compiled program.

    The defaults are the paper's MNIST runs (section 4.2): the threshold rule, 1,000 batches of
    128, RMSprop at 1e-4 without a schedule (`golden/train_rmsprop.npz`).
    Raises ValueError on construction for an unknown name or a number out of range.
    """

    rule: str = "threshold"  # or "topk", which needs a density
    # Fraction of each masked leaf that topk keeps, or a function of its shape, as ErdosRenyi is.
    density: Density | None = None
    steps: int = 1000
    batch_size: int = 128
    optimizer: str = "rmsprop"  # or "adam", "sgd"
    learning_rate: float = 1e-4
    momentum: float = 0.0  # of sgd and rmsprop
    decay: float = 0.99  # of rmsprop's squared gradients
    eps: float = 1e-8  # of rmsprop and adam, added outside the root
    weight_decay: float = 0.0  # added to the gradient
    schedule: str = "constant"  # or "cosine", to 0 at the last step
    warmup_steps: int = 0  # linear, from 0
    shuffle: bool = True  # every example once an epoch, in a new order; False keeps the given order
    augment: Callable | None = None  # (key, x [B, ...]) -> x, traced inside jit, equal by value

    def __post_init__(self):
        for name, allowed in (("rule", RULES), ("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        for name, least in (("steps", 1), ("batch_size", 1), ("warmup_steps", 0)):
            check_int(name, getattr(self, name), least)
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate!r}")
        limits = {"momentum": 1, "decay": 1, "eps": math.inf, "weight_decay": math.inf}
        for name, most in limits.items():
            if not 0 <= getattr(self, name) < most:
                raise ValueError(f"{name} must lie in [0, {most}), got {getattr(self, name)!r}")
        if self.momentum and self.optimizer == "adam":
            raise ValueError("adam has a momentum of its own: momentum must be 0")
        if not (self.augment is None or callable(self.augment)) or not isinstance(
            self.augment, Hashable
        ):
            raise TypeError(f"augment must be a hashable function, got {self.augment!r}")
        if self.rule == "topk" and self.density is None:
            raise ValueError("rule 'topk' needs a density in (0, 1], got None")
        if self.rule == "threshold" and self.density is not None:
            raise ValueError("rule 'threshold' keeps what it keeps: density must be None")
        if callable(self.density):
            if not isinstance(self.density, Hashable):
                raise TypeError(f"density must hash by value, got {self.density!r}")
        elif self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"density must lie in (0, 1], got {self.density!r}")

    def transformation(self) -> optax.GradientTransformation:
        """The optimizer, as optax builds it."""
        rate = self.learning_rate
        if self.schedule == "cosine" or self.warmup_steps:
            rest = max(1, self.steps - self.warmup_steps)
            after = (
                optax.cosine_decay_schedule(rate, rest)
                if self.schedule == "cosine"
                else optax.constant_schedule(rate)
            )
            warmup = optax.linear_schedule(0.0, rate, self.warmup_steps)
            rate = optax.join_schedules([warmup, after], [self.warmup_steps])
        momentum = self.momentum or None
        step = {
            # PyTorch adds eps to the root; optax's default inside it costs .7 points of accuracy.
            "rmsprop": lambda: optax.rmsprop(
                rate, decay=self.decay, eps=self.eps, eps_in_sqrt=False, momentum=momentum
            ),
            "adam": lambda: optax.adam(rate, eps=self.eps),
            "sgd": lambda: optax.sgd(rate, momentum=momentum),
        }[self.optimizer]()
        if self.weight_decay:
            step = optax.chain(optax.add_decayed_weights(self.weight_decay), step)
        return step

    def mask(self, layout: Layout, scores: PyTree) -> PyTree:
        """The mask of `scores` by this rule, straight-through, as a pytree like them."""
        leaves = layout.leaves(scores, "scores")
        if self.rule == "threshold":
            return layout.tree([masks.threshold_mask(leaf) for leaf in leaves])
        counts = kept_counts(layout, self.density).values()
        return layout.tree(
            [masks.topk_mask(leaf, k) for leaf, k in zip(leaves, counts, strict=True)]
        )
