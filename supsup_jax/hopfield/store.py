"""HopSupSup: masks as memories of a Hopfield network (section 3.5); `recovery` finds them again.

A Hopfield network of d units stores patterns z of +-1, here a mask's bits, in one matrix W [d, d];
each is a minimum of the energy E(z) = -1/2 z'Wz, as long as they are not too many. The store's
size does not grow with the tasks, and no mask is kept.

Against one bit a weight this never saves memory: d^2 floats are the price of 32 d masks, and the
rules hold fewer than d. What it buys is a search that does not know what it searches among.
"""

import functools
import math
import os
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from supsup_jax import devices
from supsup_jax.checks import check_type
from supsup_jax.layout import Layout
from supsup_jax.masks import check_binary
from supsup_jax.network import Network
from supsup_jax.stores import store_file
from supsup_jax.stores.base import check_same_network, digest_of
from supsup_jax.types import CapacityError, PyTree, StoreError, Task, TrainResult

FORMAT = "supsup_jax.HopfieldStore"
VERSION = 1


def hebbian(weights: jax.Array, pattern: jax.Array) -> jax.Array:
    """W + (x x' - I) / d: the weights [d, d] with one pattern x [d] of +-1 more.

    Raises TypeError or ValueError unless the shapes agree and the pattern is of signed numbers.
    """
    x = _checked_pattern(weights, pattern)
    return weights + (_outer(x, x) - jnp.eye(len(x), dtype=weights.dtype)) / len(x)


def storkey(weights: jax.Array, pattern: jax.Array) -> jax.Array:
    """W + (x x' - I - x h' - h x') / d with h = W x: the paper's rule, of more capacity.

    As the reference computes it (`golden/storkey.npz`): Storkey's own rule leaves the terms i
    and j out of h_ij. Shapes and errors as `hebbian`.
    """
    x = _checked_pattern(weights, pattern)
    h = jnp.matmul(weights, x, precision=lax.Precision.HIGHEST)
    local = _outer(x, h) + _outer(h, x)
    return weights + (_outer(x, x) - jnp.eye(len(x), dtype=weights.dtype) - local) / len(x)


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


class _Static(NamedTuple):
    layout: Layout
    rule: str
    initializer: str | None


@jax.tree_util.register_pytree_with_keys_class
class HopfieldStore:
    """The masks of all tasks in one Hopfield network a masked leaf: of constant size.

    A pytree: it goes through jit and vmap, and `append` returns a new store. Make one with
    `HopfieldStore.create(net)` or `HopfieldStore.load(path, net)`.

    Leaves: for each masked leaf of d weights the Hopfield weights, float32 [d, d], and the sum of
    the +-1 masks, int32 [d], whose mean is where recovery starts (the sum is exact, so ties of
    the mean stay ties); T; the fingerprint of the network's weights and their seed.
    """

    def __init__(self, weights, total, num_tasks, fingerprint, seed, static: _Static):
        self._weights, self._total, self._num_tasks = weights, total, num_tasks
        self._fingerprint, self._seed, self._static = fingerprint, seed, static

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
        return cls(
            weights=tuple(jnp.zeros((d, d)) for d in sizes.values()),
            total=tuple(jnp.zeros(d, jnp.int32) for d in sizes.values()),
            num_tasks=jnp.zeros((), jnp.int32),
            fingerprint=digest_of(net),
            seed=None if net.seed is None else jnp.array(net.seed, copy=True),
            static=_Static(net.layout, rule, net.initializer),
        )

    @property
    def num_tasks(self) -> jax.Array:
        """T, int32 []."""
        return self._num_tasks

    @property
    def rule(self) -> str:
        return self._static.rule

    @property
    def layout(self) -> Layout:
        """Which leaves are masked, and their order."""
        return self._static.layout

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
        return self.layout.tree(
            [
                (total.astype(jnp.float32) / count).reshape(shape)
                for total, shape in zip(self._total, self.layout.shapes.values(), strict=True)
            ]
        )

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
        leaves = self._leaves(task)
        if not isinstance(self.num_tasks, jax.core.Tracer):
            self._warn_beyond(int(self.num_tasks) + 1)
        weights, total, num_tasks = _append(
            self._weights, self._total, self.num_tasks, leaves, rule=self.rule
        )
        return HopfieldStore(weights, total, num_tasks, self._fingerprint, self._seed, self._static)

    def remove(self, mask: PyTree) -> "HopfieldStore":
        """This store with what it knows of one mask wiped out, and T less by one.

        W becomes P W P with P = I - x x' / d, x the +-1 mask, which has energy 0 from then on;
        what other masks have in common with it goes too, so this is no exact inverse of `append`.
        Raises TypeError or ValueError as `append`, and StoreError for an empty store.
        """
        self.check_holds_tasks()
        leaves = checked_mask(self.layout, mask, "the mask")
        weights, total, num_tasks = _remove(self._weights, self._total, self.num_tasks, leaves)
        return HopfieldStore(weights, total, num_tasks, self._fingerprint, self._seed, self._static)

    def settle(self, mask: PyTree, sweeps: int = 20) -> PyTree:
        """The mask, of bools, that `retrieve` leads to from `mask` in each leaf."""
        signs = [_signs(leaf) for leaf in checked_mask(self.layout, mask, "the mask")]
        found = [retrieve(W, x, sweeps) for W, x in zip(self._weights, signs, strict=True)]
        shapes = self.layout.shapes.values()
        return self.layout.tree(
            [(z > 0).reshape(shape) for z, shape in zip(found, shapes, strict=True)]
        )

    def check_holds_tasks(self) -> None:
        """Raises StoreError when the store is known to be empty."""
        if not isinstance(self.num_tasks, jax.core.Tracer) and int(self.num_tasks) == 0:
            raise StoreError("the store is empty: append a task first")

    def check_fits(self, net: Network) -> None:
        """Raises StoreError unless the masks have the network's leaves, shapes and weights.

        What can be compared when: as `MaskStore.check_fits`.
        """
        check_same_network(self.layout, self._seed, self._fingerprint, net)

    def save(self, path: str | os.PathLike, overwrite: bool = False) -> None:
        """Writes the store to the file `path`, wholly or not at all, as `MaskStore.save` does.

        In the manner of `store_file`, format 1 of its own: weights.0 ... float32 [d, d] and
        total.0 ... int32 [d], in the layout's order; the manifest names the rule and T.
        Errors as `MaskStore.save`.
        """
        origin = store_file.Origin(
            self.layout,
            self._static.initializer,
            self._seed,
            np.asarray(self._fingerprint).tobytes(),
        )
        path = store_file.target(path, origin, overwrite)
        arrays = {f"weights.{i}": np.asarray(leaf) for i, leaf in enumerate(self._weights)}
        arrays |= {f"total.{i}": np.asarray(leaf) for i, leaf in enumerate(self._total)}
        fields = {"rule": self.rule, "num_tasks": int(self.num_tasks)}
        store_file.write(path, FORMAT, VERSION, origin, fields, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike, net: Network) -> "HopfieldStore":
        """The store saved at `path`, once it is seen to belong to `net`.

        Raises FileNotFoundError when nothing is there, and StoreError, naming what differs, for a
        file that is damaged, not of a HopfieldStore, of a newer version, or of another network.
        """
        check_type("net", net, Network)
        manifest, arrays = store_file.read(path, FORMAT, VERSION, net)
        with store_file.sensible(path):
            rule, num_tasks = manifest["rule"], int(manifest["num_tasks"])
            if rule not in RULES or num_tasks < 0:
                raise ValueError(f"{num_tasks} tasks by the rule {rule!r}")
        want = {}
        for i, d in enumerate(_sizes(net.layout).values()):
            want |= {f"weights.{i}": ((d, d), "float32"), f"total.{i}": ((d,), "int32")}
        store_file.check_arrays(path, manifest, arrays, want)
        places = range(len(net.layout.shapes))
        weights, totals = ([arrays[f"{name}.{i}"] for i in places] for name in ("weights", "total"))
        return cls.of_arrays(net, rule, num_tasks, weights, totals)

    @classmethod
    def of_arrays(
        cls,
        net: Network,
        rule: str,
        num_tasks: int,
        weights: Sequence[np.ndarray],
        totals: Sequence[np.ndarray],
    ) -> "HopfieldStore":
        """The store of arrays as loaded from files: float32 [d, d] and int32 [d] a masked leaf."""
        empty = cls.create(net, rule)
        return cls(
            weights=tuple(map(jnp.asarray, weights)),
            total=tuple(map(jnp.asarray, totals)),
            num_tasks=jnp.int32(num_tasks),
            fingerprint=empty._fingerprint,
            seed=empty._seed,
            static=empty._static,
        )

    def _leaves(self, task):
        if isinstance(task, TrainResult):
            raise TypeError("task must be a Task or a mask, got a TrainResult: append its .task")
        mask, state = task if isinstance(task, Task) else (task, None)
        if jax.tree.leaves(state):
            raise ValueError("a HopfieldStore keeps no statistics, but the task brings some")
        return checked_mask(self.layout, mask, "the mask")

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

    def tree_flatten_with_keys(self):
        key = jax.tree_util.GetAttrKey
        names = ("weights", "total", "num_tasks", "fingerprint", "seed")
        return [(key(name), getattr(self, f"_{name}")) for name in names], self._static

    @classmethod
    def tree_unflatten(cls, static, leaves):
        return cls(*leaves, static=static)

    def __repr__(self) -> str:
        return f"HopfieldStore({self.rule}, units={list(_sizes(self.layout).values())})"


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
        W = W - _outer(x, jnp.matmul(x, W, precision=lax.Precision.HIGHEST)) / len(x)
        return W - _outer(jnp.matmul(W, x, precision=lax.Precision.HIGHEST), x) / len(x)

    return (
        tuple(wiped(W, x) for W, x in zip(weights, signs, strict=True)),
        tuple(old - x.astype(jnp.int32) for old, x in zip(total, signs, strict=True)),
        num_tasks - 1,
    )


def _signs(leaf):
    """The +-1 pattern, float32 [d], of a mask's leaf."""
    return jnp.where(jnp.ravel(jnp.asarray(leaf)) != 0, 1.0, -1.0).astype(jnp.float32)


def _outer(a, b):
    return a[:, None] * b[None, :]


def _sizes(layout):
    """Units of each leaf's Hopfield network, by name."""
    return {name: math.prod(shape) for name, shape in layout.named_shapes}


def checked_mask(layout: Layout, mask: PyTree, what: str) -> list[jax.Array]:
    """The leaves of a mask, once they are seen to fit and to hold 0 and 1 only."""
    leaves = layout.leaves(mask, what)
    for name, leaf in zip(layout.shapes, leaves, strict=True):
        check_binary(name, leaf)
    return leaves


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
