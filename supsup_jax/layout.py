"""The one place that knows how a mask becomes bits.

The masked leaves of a network, in the pytree's own order, hold n weights.

*Words.* A word of 32 bits holds 32 inputs of one unit, so that its weights have no gradient where
the unit is dead: of a single image's gradient nearly half of the words are zero. A leaf
[..., in, out] is a matrix [rows, out] of G = ceil(rows / 32) words a column, side by side: row r of
column o is bit r // G of the column's word r % G. The words of one leaf after another are the nw
of a mask. Leaves whose rows would leave more than an eighth of the bits unused are one column.

*Vectors.* A float for each bit, [32 nw], 0 where a bit stands for no weight, lines up with the
words as reshape(32, nw). `ravel` makes one of a pytree and `unravel` the reverse.

*Tiles.* A store keeps its tasks as [num_tiles, nw, lanes] words, the task axis minor: task i is
lane i % lanes of tile i // lanes. The lanes of a tile are the vector lanes of the arithmetic, and
loops run over the tiles that hold a task, so time follows T and not K. Wider tiles than 1,024 were
5% faster and follow T in coarser steps.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from supsup_jax.types import PyTree

WORD_BITS = 32
# Lanes come in whole vectors of AVX-512, the widest there are; narrower tiles are not vectorised.
VECTOR_LANES = 16
MAX_LANES = 1024


def leaf_name(path: tuple) -> str:
    """A pytree path as the name users see, such as "layer0/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves of `tree` by name; None has no leaf."""
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _shape(name, leaf):
    del name
    return leaf.shape


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which leaves of a network are masked, and where each lies in the flat vector.

    treedef: structure of the params with None where a leaf is not masked.
    named_shapes: (name, shape) of each masked leaf, in order; `shapes` is the same as a dict.
    fan_ins: of each, how many inputs an output of it sums over; None where that has no meaning.
    kernels: of each, its shape as [window..., in, out], for densities; its own where unknown.
    """

    treedef: Any
    named_shapes: tuple[tuple[str, tuple[int, ...]], ...]
    fan_ins: tuple[int | None, ...] = ()
    kernels: tuple[tuple[int, ...], ...] = ()

    @functools.cached_property
    def _hash(self):
        return hash((self.treedef, self.named_shapes))

    def __hash__(self) -> int:  # once: every call of a jitted function asks
        return self._hash

    @classmethod
    def of(
        cls,
        params: PyTree,
        masked: Callable[[str, jax.Array], bool],
        fan_in: Callable[[str, jax.Array], int | None] | None = None,
        kernel: Callable[[str, jax.Array], tuple[int, ...]] | None = None,
    ) -> "Layout":
        """The layout that masks the leaves for which `masked(name, leaf)` holds.

        fan_in, kernel: what gives a leaf's; None: all axes but the last are inputs.
        Raises TypeError when it picks a leaf that is not of floats, ValueError when it picks none.
        """

        def pick(path, leaf):
            name = leaf_name(path)
            if not masked(name, leaf):
                return None
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise TypeError(f"masked leaves must hold floats, got {leaf.dtype} at {name!r}")
            return leaf

        kept = jax.tree_util.tree_map_with_path(pick, params)
        leaves = named_leaves(kept)
        shapes = tuple((name, tuple(leaf.shape)) for name, leaf in leaves.items())
        if not shapes:
            raise ValueError(
                f"masked selects no leaf of params, which has {sorted(named_leaves(params))}"
            )
        fan_in = fan_in or (lambda name, leaf: math.prod(leaf.shape[:-1]))
        fan_ins = tuple(fan_in(name, leaf) for name, leaf in leaves.items())
        kernels = tuple(tuple((kernel or _shape)(name, leaf)) for name, leaf in leaves.items())
        return cls(jax.tree.structure(kept), shapes, fan_ins, kernels)

    @property
    def has_windows(self) -> bool:
        """Whether a leaf has other axes than a dense kernel's two, as a convolution's does."""
        return any(len(shape) != 2 for shape in self.shapes.values())

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The masked leaves by name, in the order of the flat mask."""
        return dict(self.named_shapes)

    @functools.cached_property
    def num_weights(self) -> int:
        """n."""
        return sum(math.prod(shape) for _, shape in self.named_shapes)

    @property
    def num_words(self) -> int:
        """nw."""
        return sum(words * columns for _, words, columns in self.columns)

    def leaves(self, tree: PyTree, what: str) -> list[jax.Array]:
        """The leaves of a mask-like `tree` in order.

        Raises ValueError, naming the leaf, for one that is missing, extra, or of another shape.
        """
        found = named_leaves(tree)
        if missing := [name for name, _ in self.named_shapes if name not in found]:
            raise ValueError(f"{what} lacks the masked leaf {missing[0]!r}; it has {list(found)}")
        if extra := [name for name in found if name not in self.shapes]:
            raise ValueError(
                f"{what} has the leaf {extra[0]!r}, which this network does not mask "
                f"(masked: {list(self.shapes)}); put None there"
            )
        for name, shape in self.named_shapes:
            if (got := tuple(jnp.shape(found[name]))) != shape:
                raise ValueError(f"{what} must have shape {shape} at {name!r}, got {got}")
        return [found[name] for name, _ in self.named_shapes]

    def tree(self, leaves: list) -> PyTree:
        """A mask-like pytree of `leaves`, None where not masked."""
        return jax.tree.unflatten(self.treedef, leaves)

    @functools.cached_property
    def columns(self) -> tuple[tuple[int, int, int], ...]:
        """Of each leaf as a matrix: rows, words of a column, columns."""
        return tuple(_columns(shape) for _, shape in self.named_shapes)

    def ravel(self, tree: PyTree, what: str) -> jax.Array:
        """A mask-like pytree as a vector [32 nw], 0 where a bit stands for no weight."""
        return self.ravel_leaves(self.leaves(tree, what))

    def ravel_leaves(self, leaves: list[jax.Array]) -> jax.Array:
        """As `ravel`, of leaves in order."""
        planes = []
        for leaf, (rows, words, columns) in zip(leaves, self.columns, strict=True):
            matrix = jnp.pad(leaf.reshape(rows, columns), [(0, WORD_BITS * words - rows), (0, 0)])
            matrix = matrix.reshape(WORD_BITS, words, columns)
            planes.append(matrix.swapaxes(1, 2).reshape(WORD_BITS, -1))
        return jnp.concatenate(planes, axis=1).reshape(-1)

    def unravel(self, flat: jax.Array | np.ndarray) -> PyTree:
        """The mask-like pytree of a vector [32 nw]."""
        leaves, start, planes = [], 0, flat.reshape(WORD_BITS, -1)
        for (_, shape), (rows, words, columns) in zip(self.named_shapes, self.columns, strict=True):
            mine = planes[:, start : start + words * columns]
            mine = mine.reshape(WORD_BITS, columns, words).swapaxes(1, 2)
            leaves.append(mine.reshape(-1, columns)[:rows].reshape(shape))
            start += words * columns
        return self.tree(leaves)


def _columns(shape):
    rows, columns = math.prod(shape[:-1]), shape[-1] if shape else 1
    if -rows % WORD_BITS > rows / 8:
        rows, columns = rows * columns, 1
    return rows, -(-rows // WORD_BITS), columns


def pack(bits: jax.Array) -> jax.Array:
    """bool [32 nw] -> uint32 words [nw]."""
    planes = bits.reshape(WORD_BITS, -1).astype(jnp.uint32)
    return jnp.sum(planes << bit_index()[:, None], axis=0, dtype=jnp.uint32)


def unpack(words: jax.Array) -> jax.Array:
    """uint32 words [nw, ...] -> uint32 0 or 1, [32, nw, ...]: the planes in weight order."""
    index = bit_index().reshape(WORD_BITS, *[1] * words.ndim)
    return (words[None] >> index) & 1


def column(words: jax.Array, i: jax.Array) -> jax.Array:
    """Words [nw] of task i of tiles [num_tiles, nw, lanes]."""
    found = lax.dynamic_slice(words, place(words, i), (1, words.shape[1], 1))
    # Without the barrier XLA fuses this strided read into each of the 32 planes unpacked from it.
    return lax.optimization_barrier(found.reshape(-1))


def place(words: jax.Array, i: jax.Array) -> tuple:
    """Where task i's words start in tiles."""
    lanes = words.shape[2]
    return i // lanes, jnp.zeros_like(i), i % lanes


def bit_index() -> jax.Array:
    """uint32 [32], the place of each bit in a word."""
    return jnp.arange(WORD_BITS, dtype=jnp.uint32)


def dense_widths(named_shapes: Iterable[tuple[str, Sequence[int]]]) -> list[int] | None:
    """Widths of the layers, inputs first, of a `models.MLP` with these masked leaves, None of other
    networks: of them the leaves do not tell which comes last.
    """
    names, shapes = zip(*named_shapes, strict=True)
    named = all(name == f"layer{i}/kernel" for i, name in enumerate(names))
    if not (named and all(len(shape) == 2 for shape in shapes)):
        return None
    if any(a[1] != b[0] for a, b in itertools.pairwise(shapes)):
        return None
    return [shapes[0][0], *(shape[1] for shape in shapes)]
