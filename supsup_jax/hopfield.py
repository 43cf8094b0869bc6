"""HopSupSup: masks as the memories of a Hopfield network, recovered by descent (section 3.5).

A Hopfield network of d units stores patterns z of +-1, here a mask's bits, in one matrix W [d, d];
each is a minimum of the energy E(z) = -1/2 z'Wz, as long as they are not too many. The store's
size does not grow with the tasks, and no mask is kept. A task's mask is found again from images
alone: descent from the mean of all masks makes the output certain first, then the energy low.

Against one bit a weight this never saves memory: d^2 floats are the price of 32 d masks, and the
rules hold fewer than d. What it buys is a search that does not know what it searches among.
"""

import dataclasses
import functools
import math
import os
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from supsup_jax import infer, masks, memory, store_file
from supsup_jax.network import Network
from supsup_jax.objectives import entropy
from supsup_jax.packing import Layout
from supsup_jax.store import check_binary, check_same_network, digest_of
from supsup_jax.types import CapacityError, Objective, PyTree, StoreError, Task, TrainResult

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
        if not isinstance(net, Network):
            raise TypeError(f"net must be a Network, got {type(net).__name__}")
        if rule not in RULES:
            raise ValueError(f"rule must be one of {sorted(RULES)}, got {rule!r}")
        if net.state is not None:
            raise ValueError(
                "a HopfieldStore keeps no statistics, but the network has state: normalise by "
                "the batch's own, as models.BNNet does"
            )
        sizes = _sizes(net.layout)
        if (needed := sum(4 * d * d for d in sizes.values())) > (room := memory.device_bytes()):
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
        leaves = _checked_mask(self.layout, mask, "the mask")
        weights, total, num_tasks = _remove(self._weights, self._total, self.num_tasks, leaves)
        return HopfieldStore(weights, total, num_tasks, self._fingerprint, self._seed, self._static)

    def settle(self, mask: PyTree, sweeps: int = 20) -> PyTree:
        """The mask, of bools, that `retrieve` leads to from `mask` in each leaf."""
        signs = [_signs(leaf) for leaf in _checked_mask(self.layout, mask, "the mask")]
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
        if not isinstance(net, Network):
            raise TypeError(f"net must be a Network, got {type(net).__name__}")
        manifest, arrays = store_file.read(path, FORMAT, VERSION, net)
        with store_file.sensible(path):
            rule, num_tasks = manifest["rule"], int(manifest["num_tasks"])
            if rule not in RULES or num_tasks < 0:
                raise ValueError(f"{num_tasks} tasks by the rule {rule!r}")
        want = {}
        for i, d in enumerate(_sizes(net.layout).values()):
            want |= {f"weights.{i}": ((d, d), "float32"), f"total.{i}": ((d,), "int32")}
        store_file.check_arrays(path, manifest, arrays, want)
        empty = cls.create(net, rule)
        places = range(len(empty._weights))
        return cls(
            weights=tuple(jnp.asarray(arrays[f"weights.{i}"]) for i in places),
            total=tuple(jnp.asarray(arrays[f"total.{i}"]) for i in places),
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
        return _checked_mask(self.layout, mask, "the mask")

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


@dataclasses.dataclass(frozen=True)
class RecoveryConfig:
    """How a mask is recovered; hashable by value. The defaults are the paper's.

    Raises ValueError on construction for a number out of range.
    """

    gamma: float = 1.5e-3  # of the energy beside the uncertainty
    learning_rate: float = 500.0  # of sgd on the scores, which the mean of masks starts in [-1, 1]
    momentum: float = 0.9
    weight_decay: float = 1e-4  # added to the gradient
    # The uncertainty is that of the real-valued mask (z + 1) / 2 clipped to [0, 1], at first the
    # mixture of all masks, and its gradient passes through the Hopfield weights, which keep the
    # part of it that stored masks explain. Not the paper's; faster and surer, see `recover`.
    guided: bool = False

    def __post_init__(self):
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate!r}")
        for name, most in (("gamma", math.inf), ("momentum", 1), ("weight_decay", math.inf)):
            if not 0 <= getattr(self, name) < most:
                raise ValueError(f"{name} must lie in [0, {most}), got {getattr(self, name)!r}")
        if not isinstance(self.guided, bool):
            raise ValueError(f"guided must be True or False, got {self.guided!r}")

    def transformation(self) -> optax.GradientTransformation:
        """The optimizer, as optax builds it."""
        step = optax.sgd(self.learning_rate, momentum=self.momentum or None)
        if self.weight_decay:
            step = optax.chain(optax.add_decayed_weights(self.weight_decay), step)
        return step


class Recovery(NamedTuple):
    """A mask found again by `recover` in S steps.

    mask: bool pytree like a mask. scores: real-valued scores behind it.
    uncertainty: float32 [S], the mean objective of each step's batch, before its update.
    energy: float32 [S], summed over the leaves, before each update.
    distance: int32 [S + 1] for each leaf, in a pytree like a mask: bits that differ from the
      target at the start and after each step; None without a target.
    """

    mask: PyTree
    scores: PyTree
    uncertainty: jax.Array
    energy: jax.Array
    distance: PyTree = None


def recover(
    net: Network,
    store: HopfieldStore,
    x: jax.Array | Iterable[jax.Array],
    config: RecoveryConfig = RecoveryConfig(),
    *,
    objective: Objective = entropy,
    target: PyTree | None = None,
) -> Recovery:
    """The mask of the task that the batches x come from: one gradient step a batch.

    Step b of S descends (1 - b/S) F + gamma (b/S) E in the scores z, b = 1 ... S: F the mean
    objective of batch b's logits under the mask z >= 0, E the sum of the leaves' energies of the
    +-1 pattern 2 mask - 1. z starts at the mean of the +-1 masks stored. Under differentiation
    the mask is the identity in z, so the pattern's derivative is 2, as in the reference.
    The weight of F is 0 in the last step, so the last batch decides nothing, whatever it holds.

    The paper's rule (the default) can end in another task's mask, or in one task's mask in one
    leaf and another's in the next, without a sign of it. On SplitMNIST it recovered all five tasks
    in one network of three and four in the others; config.guided 14 of 15, in some 5 steps in
    place of 15 to 30. `recover_best` tells wrong masks by their uncertainty.

    x: [S, B, ...], the task's test stream in batches (`data.one_pass`), or an iterable of S
      batches [B, ...], which is read whole. S is part of what is compiled.
    target: a mask, if known; it is only measured against.
    Raises TypeError or ValueError for arguments that do not fit, and for an empty store.
    """
    if not isinstance(store, HopfieldStore):
        raise TypeError(f"store must be a HopfieldStore, got {type(store).__name__}")
    if not isinstance(config, RecoveryConfig):
        raise TypeError(f"config must be a RecoveryConfig, got {type(config).__name__}")
    store.check_fits(net)
    store.check_holds_tasks()
    infer.check_objective(objective)
    x = _stacked(x)
    if target is not None:
        leaves = _checked_mask(net.layout, target, "target")
        target = net.layout.tree([jnp.asarray(leaf) != 0 for leaf in leaves])
    return _recover(net, store, x, target, config=config, objective=objective)


class BestRecovery(NamedTuple):
    """The best of several recoveries.

    best: the Recovery of the lowest uncertainty. chosen: int32 [], which of the attempts.
    uncertainty: float32 [A], of each attempt's mask over all of x.
    attempts: the A recoveries, masks settled, in the order in which they were found.
    """

    best: Recovery
    chosen: jax.Array
    uncertainty: jax.Array
    attempts: tuple[Recovery, ...]


def recover_best(
    net: Network,
    store: HopfieldStore,
    x: jax.Array | Iterable[jax.Array],
    config: RecoveryConfig = RecoveryConfig(guided=True),
    *,
    attempts: int = 3,
    objective: Objective = entropy,
    target: PyTree | None = None,
) -> BestRecovery:
    """The mask of the lowest uncertainty among `attempts`, each recovered without those before.

    Each attempt is `recover` over the whole of x, settled by sign updates, judged by its mean
    objective over x, and removed from the store that the next one searches. Cost grows with
    `attempts` (outside jit T at most) and not with T. All attempts share one compiled program.
    Arguments and errors as `recover`, and ValueError unless attempts is a positive int.
    """
    if isinstance(attempts, bool) or not isinstance(attempts, int) or attempts < 1:
        raise ValueError(f"attempts must be a positive int, got {attempts!r}")
    x, left, found, judged = _stacked(x), store, [], []
    for attempt in range(attempts):
        recovery = recover(net, left, x, config, objective=objective, target=target)
        settled = store.settle(recovery.mask)
        found.append(recovery._replace(mask=settled))
        judged.append(_uncertainty(net, settled, x, objective=objective))
        if not isinstance(store.num_tasks, jax.core.Tracer) and attempt + 1 == int(store.num_tasks):
            break
        left = left.remove(settled)
    uncertainty = jnp.stack(judged)
    chosen = jnp.argmin(uncertainty).astype(jnp.int32)
    best = jax.tree.map(lambda *leaves: jnp.stack(leaves)[chosen], *found)
    return BestRecovery(best, chosen, uncertainty, tuple(found))


@functools.partial(jax.jit, static_argnames="objective")
def _uncertainty(net, mask, x, *, objective):
    def judge(batch):
        return infer.uncertainty(net, mask, batch, None, objective).mean()

    return jnp.mean(lax.map(judge, x))


@functools.partial(jax.jit, static_argnames=("config", "objective"))
def _recover(net, store, x, target, *, config, objective):
    optimizer = config.transformation()
    num_steps = x.shape[0]

    def uncertainty_of(scores, x):
        seen = _relaxed if config.guided else masks.threshold_mask
        return infer.uncertainty(net, jax.tree.map(seen, scores), x, None, objective).mean()

    def energy_of(scores):
        mask = jax.tree.map(masks.threshold_mask, scores)
        energies = jax.tree.map(
            lambda weights, bits: energy(weights, 2 * bits.reshape(-1) - 1), store.weights, mask
        )
        return jnp.sum(jnp.stack(jax.tree.leaves(energies)))

    def explained(weights, grad):
        return jnp.matmul(weights, grad.reshape(-1)).reshape(grad.shape)

    def distance(scores):
        if target is None:
            return None
        return jax.tree.map(
            lambda z, bits: jnp.sum((z >= 0) != bits, dtype=jnp.int32), scores, target
        )

    def step(before, batch):
        scores, state = before
        progress, x = batch
        uncertainty, towards = jax.value_and_grad(uncertainty_of)(scores, x)
        height, downhill = jax.value_and_grad(energy_of)(scores)
        if config.guided:
            towards = jax.tree.map(explained, store.weights, towards)
        grads = jax.tree.map(
            lambda f, e: (1 - progress) * f + config.gamma * progress * e, towards, downhill
        )
        updates, state = optimizer.update(grads, state, scores)
        scores = optax.apply_updates(scores, updates)
        return (scores, state), (uncertainty, height, distance(scores))

    start = store.mean
    progress = jnp.arange(1, num_steps + 1, dtype=jnp.float32) / num_steps
    (scores, _), (uncertainty, energies, distances) = lax.scan(
        step, (start, optimizer.init(start)), (progress, x)
    )
    if target is not None:
        distances = jax.tree.map(
            lambda first, rest: jnp.concatenate([first[None], rest]), distance(start), distances
        )
    mask = jax.tree.map(lambda z: z >= 0, scores)
    return Recovery(mask, scores, uncertainty, energies, distances)


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


def _relaxed(scores):
    """(z + 1) / 2 clipped to [0, 1]; under differentiation not clipped: the derivative is 1/2."""
    half = scores / 2
    return half + lax.stop_gradient(jnp.clip(half + 0.5, 0, 1) - half)


def _signs(leaf):
    """The +-1 pattern, float32 [d], of a mask's leaf."""
    return jnp.where(jnp.ravel(jnp.asarray(leaf)) != 0, 1.0, -1.0).astype(jnp.float32)


def _outer(a, b):
    return a[:, None] * b[None, :]


def _sizes(layout):
    """Units of each leaf's Hopfield network, by name."""
    return {name: math.prod(shape) for name, shape in layout.named_shapes}


def _checked_mask(layout, mask, what):
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


def _stacked(x: Any) -> jax.Array:
    """x [S, B, ...] of an array, or of an iterable of batches."""
    if not hasattr(x, "dtype"):
        if not isinstance(x, Iterable):
            raise TypeError(f"x must be an array or an iterable of batches, got {x!r}")
        batches = list(x)
        if len(shapes := {np.shape(batch) for batch in batches}) > 1:
            raise ValueError(
                f"the batches of x must have one shape, got {sorted(shapes)}: fill the last one "
                "up (data.one_pass does), it decides nothing"
            )
        if not batches:
            raise ValueError("x must hold at least one batch, got none")
        x = jnp.stack([jnp.asarray(batch) for batch in batches])
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            "x must hold floats as the network takes them (data.one_pass applies a TaskData's "
            f"view and transform), got dtype {x.dtype}"
        )
    if x.ndim < 3 or 0 in x.shape[:2]:
        raise ValueError(f"x must be [S, B, ...] with S, B >= 1, got shape {x.shape}")
    return x
