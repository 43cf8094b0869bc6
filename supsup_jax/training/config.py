"""How a task is trained."""

import dataclasses
import math
from collections.abc import Callable, Hashable
from typing import Any

import optax

from supsup_jax import masks
from supsup_jax.checks import check_int, check_type
from supsup_jax.labelled_views import LabelledViews
from supsup_jax.layout import Layout
from supsup_jax.losses import CrossEntropy
from supsup_jax.masks import Density, kept_counts
from supsup_jax.types import PyTree

CROSS_ENTROPY = CrossEntropy()

RULES = ("threshold", "topk")

OPTIMIZERS = ("rmsprop", "adam", "adamw", "sgd")

SCHEDULES = ("constant", "cosine")

# Fields of the named optimizers.
_OF_NAMED = (
    "learning_rate",
    "momentum",
    "decay",
    "eps",
    "weight_decay",
    "schedule",
    "warmup_steps",
    "clip_norm",
)


class Made:
    """What `function(*args, **kwargs)` makes, told by how it is made, and so equal by value.

    Transformations and schedules of optax are equal to themselves only, so that a config with a new
    one compiles anew. `Made(optax.adamw, 1e-3)` is equal to any other of the same words; arguments
    may be such themselves.
    """

    def __init__(self, function: Callable, *args: Any, **kwargs: Any):
        self._words = function, args, tuple(sorted(kwargs.items()))
        try:
            hash(self._words)
        except TypeError as error:
            raise TypeError(f"what Made is told must be hashable, got {self!r}: {error}") from error

    def make(self) -> Any:
        """A new one, of arguments that are made first where they are `Made` themselves."""
        function, args, kwargs = self._words
        value = {name: _made(each) for name, each in kwargs}
        return function(*map(_made, args), **value)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Made) and self._words == other._words

    def __hash__(self) -> int:
        return hash(self._words)

    def __repr__(self) -> str:
        function, args, kwargs = self._words
        words = [*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs)]
        name = getattr(function, "__name__", repr(function))
        return f"Made({', '.join([name, *words])})"


def _made(value):
    return value.make() if isinstance(value, Made) else value


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
    # Or "adam", "adamw", "sgd", a transformation of optax, or `Made` of one, which is equal by
    # value; of these two the fields down to clip_norm are no part.
    optimizer: str | optax.GradientTransformation | Made = "rmsprop"
    learning_rate: float | Callable | Made = 1e-4  # a function of the step is a schedule
    momentum: float = 0.0  # of sgd and rmsprop
    decay: float = 0.99  # of rmsprop's squared gradients
    eps: float = 1e-8  # of rmsprop and adam, added outside the root
    weight_decay: float = 0.0  # added to the gradient; of adamw decoupled from it
    schedule: str = "constant"  # or "cosine", to 0 at the last step
    warmup_steps: int = 0  # linear, from 0
    clip_norm: float | None = None  # of the gradient of all scores together
    # (logits [B, C], labels) -> any shape, of which the mean is lowered; equal by value.
    loss: Callable = CROSS_ENTROPY
    balanced: bool = False  # draw each class as often as another, with replacement
    shuffle: bool = True  # every example once an epoch, in a new order; False keeps the given order
    augment: Callable | None = None  # (key, x [B, ...]) -> x, traced inside jit, equal by value
    views: LabelledViews | None = None  # after it: a view drawn for each example is its class, too

    def __post_init__(self):
        named = [("rule", RULES), ("schedule", SCHEDULES)]
        if isinstance(self.optimizer, Made | optax.GradientTransformation):
            self._check_unnamed()
        else:
            named.append(("optimizer", OPTIMIZERS))
        for name, allowed in named:
            if (value := getattr(self, name)) not in allowed:
                more = ", a transformation of optax, or Made of one" if name == "optimizer" else ""
                raise ValueError(f"{name} must be one of {allowed}{more}, got {value!r}")
        for name, least in (("steps", 1), ("batch_size", 1), ("warmup_steps", 0)):
            check_int(name, getattr(self, name), least)
        if callable(self.learning_rate) or isinstance(self.learning_rate, Made):
            if self.schedule != "constant" or self.warmup_steps:
                raise ValueError("a learning_rate of the step is a schedule: name no other")
        elif isinstance(self.learning_rate, str) or not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate!r}")
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise ValueError(f"clip_norm must be positive, got {self.clip_norm!r}")
        limits = {"momentum": 1, "decay": 1, "eps": math.inf, "weight_decay": math.inf}
        for name, most in limits.items():
            if not 0 <= getattr(self, name) < most:
                raise ValueError(f"{name} must lie in [0, {most}), got {getattr(self, name)!r}")
        if self.momentum and self.optimizer in ("adam", "adamw"):
            raise ValueError("adam has a momentum of its own: momentum must be 0")
        if self.balanced and not self.shuffle:
            raise ValueError("balanced draws its own order: shuffle must be True")
        for name in ("augment", "loss"):
            value = getattr(self, name)
            optional = value is None and name == "augment"
            if not (optional or callable(value)) or not isinstance(value, Hashable):
                raise TypeError(f"{name} must be a hashable function, got {value!r}")
        if self.views is not None:
            check_type("views", self.views, LabelledViews)
        if self.rule == "topk" and self.density is None:
            raise ValueError("rule 'topk' needs a density in (0, 1], got None")
        if self.rule == "threshold" and self.density is not None:
            raise ValueError("rule 'threshold' keeps what it keeps: density must be None")
        if callable(self.density):
            if not isinstance(self.density, Hashable):
                raise TypeError(f"density must hash by value, got {self.density!r}")
        elif self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"density must lie in (0, 1], got {self.density!r}")
        for field in dataclasses.fields(self):  # a config is a static argument of every program
            try:
                hash(value := getattr(self, field.name))
            except TypeError as error:
                raise TypeError(
                    f"{field.name} must hash by value, got {value!r}: {error}"
                ) from error

    def _check_unnamed(self):
        """Raises TypeError for what makes no transformation, and ValueError for fields that an
        optimizer of the user's own has no part in.
        """
        if not isinstance(made := _made(self.optimizer), optax.GradientTransformation):
            raise TypeError(f"optimizer must make a transformation of optax, got {made!r}")
        for field in dataclasses.fields(self):
            if field.name in _OF_NAMED and getattr(self, field.name) != field.default:
                raise ValueError(
                    f"{field.name} is a field of the named optimizers {OPTIMIZERS}: set it in the "
                    "transformation that you pass"
                )

    @property
    def takes_classes(self) -> bool:
        """Whether labels are the numbers of classes: of any CrossEntropy."""
        return isinstance(self.loss, CrossEntropy)

    @property
    def told_rate(self) -> str:
        """The learning rate, in words."""
        if not isinstance(self.optimizer, str):
            return f"of {self.optimizer!r}" if isinstance(self.optimizer, Made) else "of optimizer"
        rate = self.learning_rate
        return f"{rate:g}" if isinstance(rate, int | float) else repr(rate)

    def transformation(self) -> optax.GradientTransformation:
        """The optimizer, as optax builds it."""
        if not isinstance(self.optimizer, str):
            return _made(self.optimizer)
        rate: Any = _made(self.learning_rate)
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
            "adamw": lambda: optax.adamw(rate, eps=self.eps, weight_decay=self.weight_decay),
            "sgd": lambda: optax.sgd(rate, momentum=momentum),
        }[self.optimizer]()
        if self.weight_decay and self.optimizer != "adamw":
            step = optax.chain(optax.add_decayed_weights(self.weight_decay), step)
        if self.clip_norm is not None:
            step = optax.chain(optax.clip_by_global_norm(self.clip_norm), step)
        return step

    def mask(self, layout: Layout, scores: PyTree) -> PyTree:
        """The mask of `scores` by this rule, straight-through, as a pytree like them."""
        leaves = layout.leaves(scores, "scores")
        if self.rule == "threshold":
            return layout.tree([masks.threshold_mask(leaf) for leaf in leaves])
        assert self.density is not None  # of topk, as is checked
        counts = kept_counts(layout, self.density).values()
        return layout.tree(
            [masks.topk_mask(leaf, k) for leaf, k in zip(leaves, counts, strict=True)]
        )
