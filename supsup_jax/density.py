"""How many weights of each layer a top-k mask keeps: a budget over the whole network.

"Density" is the share of weights that a mask keeps: higher is denser. (The reference calls its
budget "sparsity", where higher is denser too.) Counts are host integers, so that they are static
inside jit and the same on every device.
"""

import dataclasses
import math
from collections.abc import Callable

from supsup_jax.masks import kept_count
from supsup_jax.packing import Layout

# One number for every layer, or what gives a layer's density by its kernel's shape [..., in, out].
Density = float | Callable[[tuple[int, ...]], float]


@dataclasses.dataclass(frozen=True)
class ErdosRenyi:
    """Density min(most, scale (I + O) / (I O window)) for a kernel [window..., I, O].

    Small layers are kept denser than large ones: the paper's budget for conv nets, whose `scale`
    it calls s (`golden/er_density.json`). Equal by value, so it never retraces.
    Raises ValueError on construction for a scale or most that is no density.
    """

    scale: float
    most: float = 0.5

    def __post_init__(self):
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale must be positive and finite, got {self.scale!r}")
        if not 0 < self.most <= 1:
            raise ValueError(f"most must be a density in (0, 1], got {self.most!r}")

    def __call__(self, shape: tuple[int, ...]) -> float:
        if len(shape) < 2:
            raise ValueError(
                f"an Erdos-Renyi density needs a kernel [..., in, out], got shape {shape}"
            )
        return min(self.most, self.scale * (shape[-2] + shape[-1]) / math.prod(shape))


def kept_counts(layout: Layout, density: Density) -> dict[str, int]:
    """Weights kept of each masked leaf, by name, in the layout's order.

    Raises ValueError, naming the layer, where a density is outside (0, 1] or keeps nothing.
    """
    counts = {}
    for name, shape in layout.named_shapes:
        try:
            share = density(shape) if callable(density) else density
            counts[name] = kept_count(share, math.prod(shape))
        except ValueError as error:
            raise ValueError(f"layer {name!r} of shape {shape}: {error}") from error
    return counts
