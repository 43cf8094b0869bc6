"""Views of an input that are classes of their own: superfluous outputs with something to say.

The paper's superfluous neurons (section 3.6) learn that no image is theirs. Of l labels and V
views, such as an image's four quarter turns, class c seen in view v is class c + v l of V l: now
these outputs learn what a task's images look like turned, and so what is not one of them. A view
costs a mask the bits of l more outputs, and with one random view an image no time in training. In
prediction the V views' logits, each counted from its own view on, may be averaged.

WPTP and CLOM train so (rotations of CSI, arXiv 2007.08176), with a contrastive loss before.
"""

import copy
import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from supsup_jax.checks import check_int
from supsup_jax.network import Network
from supsup_jax.types import PyTree, TaskData, shapes_of


def unturned(x: PyTree) -> PyTree:
    """The inputs as they are."""
    return x


def quarter_turn(x: jax.Array) -> jax.Array:
    """Images [B, H, H, channels] turned by 90 degrees."""
    return jnp.rot90(x, 1, (1, 2))


def half_turn(x: jax.Array) -> jax.Array:
    """Images [B, H, W, channels] turned by 180 degrees."""
    return jnp.rot90(x, 2, (1, 2))


def three_quarter_turn(x: jax.Array) -> jax.Array:
    """Images [B, H, H, channels] turned by 270 degrees."""
    return jnp.rot90(x, 3, (1, 2))


ROTATIONS = unturned, quarter_turn, half_turn, three_quarter_turn


@dataclasses.dataclass(frozen=True)
class LabelledViews:
    """V views of inputs whose first `num_labels` outputs are labels; equal by value.

    views: x [B, ...] -> x of the same shapes, the first leaving it as it is.
    As `TrainConfig.views` it is called (key, x, y) -> (x, y) inside jit: each example in a view
    drawn for it, and the class that this makes of its label. `averaged(net)` is the network for
    prediction.
    """

    num_labels: int
    views: tuple[Callable[[PyTree], PyTree], ...] = ROTATIONS

    def __post_init__(self):
        check_int("num_labels", self.num_labels, 1)
        object.__setattr__(self, "views", tuple(self.views))
        if len(self.views) < 2 or not all(map(callable, self.views)):
            raise ValueError(f"views must be two functions of x or more, got {self.views!r}")

    @property
    def num_outputs(self) -> int:
        """The classes, V num_labels."""
        return self.num_labels * len(self.views)

    def __call__(self, key: jax.Array, x: PyTree, y: jax.Array) -> tuple[PyTree, jax.Array]:
        seen = self.seen(x)
        which = jax.random.randint(key, (len(y),), 0, len(self.views))
        pick = jax.vmap(lambda v, *each: jnp.stack(each)[v])
        x = jax.tree.map(lambda *leaves: pick(which, *leaves), *seen)
        return x, jnp.asarray(y, jnp.int32) + which * self.num_labels  # bytes hold 256 classes only

    def check(self, data: TaskData, num_outputs: int, where: str = "") -> None:
        """Raises ValueError unless the views keep the shape of the data, its labels are among the
        first `num_labels`, and there is an output for each in each view.
        """
        where = where and f" in {where}"
        jax.eval_shape(lambda: self.seen(data.batch(jnp.zeros(1, jnp.int32))[0]))
        self.check_outputs(num_outputs)
        try:
            data.check_classes(self.num_labels)
        except ValueError as error:
            raise ValueError(
                f"labels must lie in [0, {self.num_labels}), the views' num_labels{where}: a "
                "SplitStream(relabel=True) numbers them so"
            ) from error

    def check_outputs(self, num_outputs: int) -> None:
        """Raises ValueError where these are too few."""
        if num_outputs < self.num_outputs:
            raise ValueError(
                f"{len(self.views)} views of {self.num_labels} labels need {self.num_outputs} "
                f"outputs, the network has {num_outputs}"
            )

    def seen(self, x: PyTree) -> list[PyTree]:
        """Each view of x. Raises ValueError where one changes shapes."""
        seen = [view(x) for view in self.views]
        for view, each in zip(self.views, seen, strict=True):
            if shapes_of(each) != shapes_of(x):
                raise ValueError(
                    f"a view must keep the inputs' shapes {shapes_of(x)}, got {shapes_of(each)} of "
                    f"{getattr(view, '__name__', view)}: quarter turns are of square images"
                )
        return seen

    def averaged(self, net: Network) -> Network:
        """The network of the mean logits over the views, which takes V times as long.

        Output j l + c is class c seen j views on from the view that an image is in, so that the
        first `num_labels` outputs are still the labels, and those of the right view. Masks of `net`
        are this network's. In train mode a batch counts as its V views.
        """
        averaged = copy.copy(net)
        averaged.apply = Averaged(net.apply, self, net.state is not None)
        return averaged


@dataclasses.dataclass(frozen=True)
class Averaged:
    """An apply of all views; equal by value as its parts are."""

    apply: Callable
    of: LabelledViews
    stateful: bool

    @property
    def num_labels(self) -> int:
        """By which `evaluate` knows that the outputs beyond are no answers."""
        return self.of.num_labels

    def __call__(self, params, *args):
        x = args[1] if self.stateful else args[0]
        x = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *self.of.seen(x))
        if not self.stateful:
            return self._mean(self.apply(params, x))
        state, _, train = args
        logits, state = self.apply(params, state, x, train)
        return self._mean(logits), state

    def _mean(self, logits):
        views, labels = len(self.of.views), self.of.num_labels
        self.of.check_outputs(logits.shape[-1])
        logits = logits.reshape(views, -1, logits.shape[-1])
        blocks = logits[..., : self.of.num_outputs].reshape(*logits.shape[:2], views, labels)
        own = jnp.stack([jnp.roll(block, -v, axis=1) for v, block in enumerate(blocks)])
        own = own.reshape(*logits.shape[:2], self.of.num_outputs)
        return jnp.concatenate([own, logits[..., self.of.num_outputs :]], axis=-1).mean(axis=0)
