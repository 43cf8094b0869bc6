"""HopSupSup: masks as memories of a Hopfield network (section 3.5); `recovery` finds them again.

A Hopfield network of d units stores patterns z of +-1, here a mask's bits, in one matrix W [d, d];
each is a minimum of the energy E(z) = -1/2 z'Wz, as long as they are not too many. The store's
size does not grow with the tasks, and no mask is kept.

Against one bit a weight this never saves memory: d^2 floats are the price of 32 d masks, and the
rules hold fewer than d. What it buys is a search that does not know what it searches among.
"""

import dataclasses
import functools
import math
import os
import warnings

import jax
import jax.numpy as jnp
from jax import lax

from supsup_jax import devices
from supsup_jax.checks import check_type, is_traced
from supsup_jax.network import Network
from supsup_jax.stores.base import TaskStore, checked_mask, checked_task
from supsup_jax.stores.origin import (
    Origin,
    Owned,
    arrays_in,
    load_record,
    manifest_of,
    save_arrays,
    sensible,
)
from supsup_jax.types import CapacityError, PyTree, Task

FORMAT = "supsup_jax.HopfieldStore"


def hebbian(weights: jax.Array, pattern: jax.Array) -> jax.Array:
    """W + (x x' - I) / d: the weights [d, d] with one pattern x [d] of +-1 more.

    Raises TypeError or ValueError unless the shapes agree and the pattern is of signed numbers.
    """
    x = _checked_pattern(weights, pattern)
    return weights + (jnp.outer(x, x) - jnp.eye(len(x), dtype=weights.dtype)) / len(x)


def storkey(weights: jax.Array, pattern: jax.Array) -> jax.Array:
    """W + (x x' - I - x h' - h x') / d with h = W x: the paper's rule, of more capacity.

    As the reference computes it (`golden/storkey.npz`): Storkey's own rule leaves the terms i
    and j out of h_ij. Shapes and errors as `hebbian`.
    """
    x = _checked_pattern(weights, pattern)
    h = jnp.matmul(weights, x, precision=lax.Precision.HIGHEST)
    local = jnp.outer(x, h) + jnp.outer(h, x)
    return weights + (jnp.outer(x, x) - jnp.eye(len(x), dtype=weights.dtype) - local) / len(x)


def energy(weights: jax.Array, z: jax.Array) -> jax.Array:
    """-1/2 z'Wz, [], of z [d] under weights [d, d]. Errors as `hebbian`."""
    z = _checked_pattern(weights, z)
    return -0.5 * jnp.dot(z, jnp.matmul(weights, z, precision=lax.Precision.HIGHEST))


def retrieve(weights: jax.Array, pattern: jax.Array, sweeps: int = 20) -> jax.Array:
    """The pattern [d] that sign(W z), all units at once, leads to from `pattern` (+1 at 0).

    Stops when nothing changes, or after `sweeps`: updates at once may end in a cycle of two.
    Errors as `hebbian`.
    """
    return _retrieve(weights, _checked_pattern(weights, pattern), sweeps)


@jax.jit
def _retrieve(weights, z, sweeps):
    def changes(carry):
        sweep, before, after = carry
        return (sweep < sweeps) & jnp.any(before != after)

    def update(carry):
        sweep, _, z = carry
        field = jnp.matmul(weights, z, precision=lax.Precision.HIGHEST)
        return sweep + 1, z, jnp.where(field >= 0, 1, -1).astype(z.dtype)

    # -z differs from z, so that there is a first update.
    return lax.while_loop(changes, update, (jnp.int32(0), -z, z))[2]


RULES = {"storkey": storkey, "hebbian": hebbian}


def pattern_capacity(rule: str, d: int) -> float:
    """About how many random patterns of d units a rule holds: d / sqrt(2 ln d) by Storkey's rule,
    d / (2 ln d) by Hebb's, as d grows. Masks are not random; measure recovery.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {sorted(RULES)}, got {rule!r}")
    spread = 2 * math.log(max(d, 2))
    return d / math.sqrt(spread) if rule == "storkey" else d / spread


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("_weights", "_total", "num_tasks", "origin"),
    meta_fields=("rule",),
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class HopfieldStore(Owned):
    """The masks of all tasks in one Hopfield network a masked leaf: of constant size.

    A pytree: it goes through jit and vmap, and `append` returns a new store. Make one with
    `HopfieldStore.create(net)` or `HopfieldStore.load(path, net)`.

    Leaves: for each masked leaf of d weights the Hopfield weights, float32 [d, d], and the sum of
    the +-1 masks, int32 [d], whose mean is where recovery starts (the sum is exact, so ties of
    the mean stay ties); T, int32 []; and seed and fingerprint of `origin`, which says whose the
    masks are. rule: "storkey" or "hebbian".
    """

    _weights: tuple[jax.Array, ...]
    _total: tuple[jax.Array, ...]
    num_tasks: jax.Array
    origin: Origin
    rule: str

    @classmethod
    def create(cls, net: Network, rule: str = "storkey") -> "HopfieldStore":
        """An empty store for masks of `net`, learned by `rule`, "storkey" or "hebbian".

        Raises TypeError unless net is a Network, ValueError for another rule or a network with
        state (a task's statistics would not be constant in size), CapacityError, a ValueError
        too, where d^2 floats for each masked leaf do not fit in memory.
        """
        check_type("net", net, Network)
        if rule not in RULES:
            raise ValueError(f"rule must be one of {sorted(RULES)}, got {rule!r}")
        if net.state is not None:
            raise ValueError(
                "a HopfieldStore keeps no statistics, but the network has state: normalise by "
                "the batch's own, as models.BNNet does"
            )
        sizes = _sizes(net.layout)
        if (needed := sum(4 * d * d for d in sizes.values())) > (room := devices.device_bytes()):
            raise CapacityError(
                f"Hopfield networks of {sizes} units take {needed:,} bytes, and there are "
                f"{room:,}: mask leaves of few weights, such as norm scales"
            )
        weights, total, num_tasks = _empty(tuple(sizes.values()))
        return cls(weights, total, num_tasks, Origin.of(net), rule)

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves, the same for any number of tasks."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    @property
    def weights(self) -> PyTree:
        """The Hopfield weights, each [d, d], in a pytree like a mask."""
        return self.layout.tree(list(self._weights))

    @property
    def total(self) -> PyTree:
        """Sum of the +-1 masks, each int32 [d], in a pytree like a mask."""
        return self.layout.tree(list(self._total))

    @property
    def mean(self) -> PyTree:
        """Mean of the +-1 masks, float32 pytree like a mask; zeros where there is none."""
        count = jnp.maximum(1, self.num_tasks).astype(jnp.float32)
        return self._like_a_mask(total.astype(jnp.float32) / count for total in self._total)

    @property
    def bound(self) -> float:
        """About how many masks the smallest of the networks holds; see `pattern_capacity`."""
        return pattern_capacity(self.rule, min(_sizes(self.layout).values()))

    def append(self, task: Task | PyTree) -> "HopfieldStore":
        """This store and one more mask; the mask itself is not kept.

        Outside jit the first mask beyond `bound` warns.
        task: a Task without state, or a bare mask.
        Raises TypeError or ValueError for a mask of another network, or not of 0 and 1 only.
        """
        leaves, _ = checked_task(task, self.layout, None)
        if not is_traced(self.num_tasks):
            self._warn_beyond(int(self.num_tasks) + 1)
        weights, total, num_tasks = _append(
            self._weights, self._total, self.num_tasks, leaves, rule=self.rule
        )
        return HopfieldStore(weights, total, num_tasks, self.origin, self.rule)

    def remove(self, mask: PyTree) -> "HopfieldStore":
        """This store with what it knows of one mask wiped out, and T less by one.

        W becomes P W P with P = I - x x' / d, x the +-1 mask, which has energy 0 from then on;
        what other masks have in common with it goes too, so this is no exact inverse of `append`.
        Raises TypeError or ValueError as `append`, and StoreError for an empty store.
        """
        self.check_holds_tasks()
        leaves = checked_mask(self.layout, mask, "the mask")
        weights, total, num_tasks = _remove(self._weights, self._total, self.num_tasks, leaves)
        return HopfieldStore(weights, total, num_tasks, self.origin, self.rule)

    def settle(self, mask: PyTree, sweeps: int = 20) -> PyTree:
        """The mask, of bools, that `retrieve` leads to from `mask` in each leaf."""
        signs = [_signs(leaf) for leaf in checked_mask(self.layout, mask, "the mask")]
        found = [retrieve(W, x, sweeps) for W, x in zip(self._weights, signs, strict=True)]
        return self._like_a_mask(z > 0 for z in found)

    def _like_a_mask(self, flat):
        shapes = self.layout.shapes.values()
        return self.layout.tree([z.reshape(d) for z, d in zip(flat, shapes, strict=True)])

    check_holds_tasks = TaskStore.check_holds_tasks

    def save(self, path: str | os.PathLike, overwrite: bool = False) -> None:
        """Writes the store to the file `path`, wholly or not at all; `docs/format.md` is its page.

        In a DiskStore's folder, as reservoir.bin, it is among what `DiskStore.verify` checks.
        Errors as `MaskStore.save`.
        """
        save_arrays(
            path,
            manifest_of(FORMAT, self.origin),
            {"rule": self.rule, "num_tasks": int(self.num_tasks)},
            [*self._weights, *self._total],
            overwrite,
        )

    @classmethod
    def load(cls, path: str | os.PathLike, net: Network) -> "HopfieldStore":
        """The store saved at `path`, once it is seen to belong to `net`.

        Raises FileNotFoundError when nothing is there, and StoreError, naming what differs, for a
        file that is damaged, not of a HopfieldStore, of another version, or of another network.
        """
        record, _ = load_record(path, FORMAT, net)
        with sensible(path):
            rule, num_tasks = record.metadata["rule"], record.metadata["num_tasks"]
            if rule not in RULES or type(num_tasks) is not int or num_tasks < 0:
                raise ValueError(f"{num_tasks!r} tasks by the rule {rule!r}")
        sizes = _sizes(net.layout).values()
        kinds = [*(("<f4", (d, d)) for d in sizes), *(("<i4", (d,)) for d in sizes)]
        arrays = tuple(map(jnp.asarray, arrays_in(record.body, kinds, path)))
        weights, total = arrays[: len(sizes)], arrays[len(sizes) :]
        return cls(weights, total, jnp.int32(num_tasks), Origin.of(net), rule)

    def _warn_beyond(self, num_tasks):
        """Once a store: when the bound is crossed, and not at every append behind it."""
        if num_tasks - 1 <= self.bound < num_tasks:
            form = {"storkey": "d / sqrt(2 ln d)", "hebbian": "d / (2 ln d)"}[self.rule]
            d = min(_sizes(self.layout).values())
            warnings.warn(
                f"{num_tasks} masks are more than the {self.rule} rule is known to hold, about "
                f"{form} = {self.bound:.1f} in a leaf of d = {d}: measure recovery "
                "(recover(..., target=mask) counts the bits that differ)",
                stacklevel=3,
            )

    def __repr__(self) -> str:
        return f"HopfieldStore({self.rule}, units={list(_sizes(self.layout).values())})"


@functools.partial(jax.jit, static_argnums=0)
def _empty(sizes):
    """Weights, sums and number of no tasks."""
    weights = tuple(jnp.zeros((d, d), jnp.float32) for d in sizes)
    return weights, tuple(jnp.zeros(d, jnp.int32) for d in sizes), jnp.zeros((), jnp.int32)


@functools.partial(jax.jit, static_argnames="rule")
def _append(weights, total, num_tasks, leaves, *, rule):
    signs = [_signs(leaf) for leaf in leaves]
    return (
        tuple(RULES[rule](W, x) for W, x in zip(weights, signs, strict=True)),
        tuple(old + x.astype(jnp.int32) for old, x in zip(total, signs, strict=True)),
        num_tasks + 1,
    )


@jax.jit
def _remove(weights, total, num_tasks, leaves):
    signs = [_signs(leaf) for leaf in leaves]

    def wiped(W, x):
        W = W - jnp.outer(x, jnp.matmul(x, W, precision=lax.Precision.HIGHEST)) / len(x)
        return W - jnp.outer(jnp.matmul(W, x, precision=lax.Precision.HIGHEST), x) / len(x)

    return (
        tuple(wiped(W, x) for W, x in zip(weights, signs, strict=True)),
        tuple(old - x.astype(jnp.int32) for old, x in zip(total, signs, strict=True)),
        num_tasks - 1,
    )


def _signs(leaf):
    """The +-1 pattern, float32 [d], of a mask's leaf."""
    return jnp.where(jnp.ravel(jnp.asarray(leaf)) != 0, 1.0, -1.0).astype(jnp.float32)


def _sizes(layout):
    """Units of each leaf's Hopfield network, by name."""
    return {name: math.prod(shape) for name, shape in layout.named_shapes}


def _checked_pattern(weights, pattern):
    pattern = jnp.asarray(pattern)
    if weights.ndim != 2 or weights.shape[0] != weights.shape[1]:
        raise ValueError(f"weights must be [d, d], got shape {weights.shape}")
    if pattern.shape != weights.shape[:1]:
        raise ValueError(
            f"the pattern must be [{weights.shape[0]}], as the weights are, got {pattern.shape}"
        )
    if not jnp.issubdtype(pattern.dtype, jnp.signedinteger) and not jnp.issubdtype(
        pattern.dtype, jnp.floating
    ):
        raise TypeError(f"the pattern must hold -1 and 1 (2 * mask - 1), got dtype {pattern.dtype}")
    return pattern.astype(weights.dtype)
