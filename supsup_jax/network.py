"""The one fixed network that every task shares."""

import copy
import functools
import hashlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from supsup_jax import prng
from supsup_jax.layout import Layout, named_leaves
from supsup_jax.types import PyTree, TaskData

SIGNED_CONSTANT = "signed_constant"
# A power of two, so that multiplying by it is exact, halfway to overflow.
_HUGE = 2.0**64


def is_kernel(name: str, leaf: jax.Array) -> bool:
    """The default choice of masked leaves: floats with two or more axes."""
    del name
    return leaf.ndim >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating)


@jax.tree_util.register_pytree_with_keys_class
class Network:
    """A network whose weights never change, as a pytree: params, state and seed are leaves.

    apply: stateless `apply(params, x) -> logits`; stateful, when state is given,
      `apply(params, state, x, train) -> (logits, state)`. x is [B, ...], logits [B, C]. Static,
      so it must hash by value where networks are made anew for one compiled program.
    params: pytree of the weights.
    masked: `masked(name, leaf) -> bool` with names like "layer0/kernel"; by default every float
      leaf with two or more axes. Resolved here, once.
    state: normalisation statistics and the like, where a task's training starts.

    layout: which leaves are masked, and their order. initializer, seed: how the masked weights
    were drawn, None where they were given (see `signed_constant`).
    Raises TypeError or ValueError for an apply that is not callable, params without arrays, and
    what `Layout.of` refuses.
    """

    def __init__(
        self,
        apply: Callable,
        params: PyTree,
        masked: Callable[[str, jax.Array], bool] | None = None,
        state: PyTree = None,
    ):
        if not callable(apply):
            raise TypeError(f"apply must be a function of (params, x), got {type(apply).__name__}")
        if masked is not None and not callable(masked):
            raise TypeError(f"masked must be a function of (name, leaf), got {masked!r}")
        self.apply = apply
        self.params = jax.tree.map(jnp.asarray, params)
        self.state = jax.tree.map(jnp.asarray, state) if jax.tree.leaves(state) else None
        self.seed = None
        self.initializer = None
        self.layout = Layout.of(self.params, masked or is_kernel)
        self._fingerprint = None

    @classmethod
    def from_nnx(cls, module: Any, masked: Callable | None = None) -> "Network":
        """The network of a Flax NNX module, with the module's weights.

        Its Params become params; everything else (batch statistics, dropout's keys and counters)
        becomes state. Training runs it as `module.train()`, prediction as `module.eval()`.
        Raises TypeError when `module` is not an nnx.Module.
        """
        from supsup_jax import adapters  # the core knows no model library until one is used

        apply, params, state = adapters.split_nnx(module)
        return cls(apply, params, masked, state)

    @classmethod
    def from_linen(
        cls, module: Any, variables: PyTree, masked: Callable | None = None
    ) -> "Network":
        """The network of a Flax Linen module and the variables its `init` returned.

        `variables["params"]` becomes params, every other collection state. A module with state
        must take one of the arguments train, training, deterministic or use_running_average.
        Linen's rngs are not passed: for dropout use NNX, where the module carries its keys.
        Raises TypeError or ValueError when it does not, or when there are no params.
        """
        from supsup_jax import adapters

        apply, params, state = adapters.split_linen(module, variables)
        return cls(apply, params, masked, state)

    def __call__(self, mask: PyTree, x: jax.Array, state: PyTree = None) -> jax.Array:
        """Logits [B, C] of x [B, ...] under a mask, or under a mixture of masks.

        Masked weights are multiplied by the mask (None where a leaf is not masked). A stateful
        network uses `state`, as a task's in prediction; without one, the statistics of the
        whole x under this mask, held constant under differentiation.
        Raises ValueError when the mask does not fit, or apply does not return [B, C].
        """
        weights = self.superpose(mask)
        if self.state is not None and state is None:
            state = self.batch_state(weights, x)
        return self.forward(weights, state, x, train=False)[0]

    def train_logits(self, mask: PyTree, state: PyTree, x: jax.Array) -> tuple[jax.Array, PyTree]:
        """Logits [B, C] in train mode, and the state behind this batch."""
        return self.forward(self.superpose(mask), state, x, train=True)

    def forward(
        self, weights: PyTree, state: PyTree, x: jax.Array, train: bool
    ) -> tuple[jax.Array, PyTree]:
        """Logits [B, C] under `weights`, a pytree like params, and the state behind x.

        What every use of `apply` comes down to; state is None for a network without.
        """
        if self.state is None:
            logits, state = self.apply(weights, x), None
        else:
            logits, state = self.apply(weights, state, x, train)
        return check_logits(logits, x), state

    def superpose(self, mask: PyTree) -> PyTree:
        """The params with each masked leaf multiplied by its mask or mixture."""
        factors = dict(zip(self.layout.shapes, self.layout.leaves(mask, "the mask"), strict=True))
        return _with_masked(
            self.params, lambda name, weight: weight * factors[name].astype(weight.dtype), factors
        )

    def batch_state(self, weights: PyTree, x: jax.Array) -> PyTree:
        """State that makes eval mode use the statistics of `x` [B, ...] itself, held constant.

        Running statistics move as new = m old + (1 - m) batch in train mode, with a momentum m of
        their own. From old = 0 they arrive at (1 - m) batch; from an old that dwarfs the batch, at
        m old. The passes differ in these few numbers only, and XLA computes the rest once.
        Leaves that train mode returns untouched stay as they are; it must not read those it moves.
        """
        moves = self._moving_state(weights, x)

        def arrive(start):
            # In float32, where half precision could not tell the batch from the start.
            old = jax.tree.map(
                lambda leaf, move: jnp.full(leaf.shape, start, jnp.float32) if move else leaf,
                self.state,
                moves,
            )
            return self.apply(weights, old, x, True)[1]

        def batch(leaf, move, from_zero, from_huge):
            if not move:
                return leaf
            momentum = from_huge / _HUGE
            still = momentum == 1
            value = jnp.where(still, leaf, from_zero / jnp.where(still, 1, 1 - momentum))
            return lax.stop_gradient(value).astype(leaf.dtype)

        return jax.tree.map(batch, self.state, moves, arrive(0.0), arrive(_HUGE))

    def _moving_state(self, weights, x):
        """Which float leaves of the state train mode replaces: bools in a tree like the state."""
        moves = []

        def watch(state):
            new = self.apply(weights, state, x, True)[1]
            for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True):
                floating = jnp.issubdtype(before.dtype, jnp.floating)
                moves.append(floating and after is not before)

        jax.eval_shape(watch, self.state)
        return jax.tree.unflatten(jax.tree.structure(self.state), moves)

    @property
    def fingerprint(self) -> str:
        """sha256 of all params (names, dtypes, shapes and bytes), in hex.

        Computed on the host once a Network object, so it cannot be read inside jit.
        """
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for name, leaf in sorted(named_leaves(self.params).items()):
                if isinstance(leaf, jax.core.Tracer):
                    raise TypeError("a fingerprint is taken outside jit, where weights have values")
                array = np.ascontiguousarray(jax.device_get(leaf))
                digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
                digest.update(array.tobytes())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def tree_flatten_with_keys(self):
        key = jax.tree_util.GetAttrKey
        leaves = [(key(name), getattr(self, name)) for name in ("params", "state", "seed")]
        return leaves, (self.apply, self.layout, self.initializer)

    @classmethod
    def tree_unflatten(cls, static, leaves):
        # Not through __init__: its checks ran once, and transformations put placeholders in.
        self = object.__new__(cls)
        self.apply, self.layout, self.initializer = static
        self.params, self.state, self.seed = leaves
        self._fingerprint = None
        return self

    def __repr__(self) -> str:
        origin = f"{self.initializer}, seed {self.seed}" if self.initializer else "given weights"
        return (
            f"Network({self.layout.num_weights:,} maskable weights in "
            f"{len(self.layout.shapes)} leaves, {origin})"
        )


def signed_constant(net: Network, seed: int) -> Network:
    """`net` with every masked weight redrawn as +-sqrt(2 / fan_in), the sign uniform.

    The signed Kaiming constant of the paper; fan_in = prod(shape[:-1]). Leaves that are not
    masked stay. The weights follow from `seed` alone (a host int or an integer array), which the
    returned network remembers.
    Raises ValueError for a host seed outside [0, 2**32).
    """
    if isinstance(seed, bool) or not jnp.issubdtype(jnp.result_type(seed), jnp.integer):
        raise TypeError(f"seed must be an integer, got {seed!r}")
    if not isinstance(seed, jax.core.Tracer) and not 0 <= int(seed) < 2**32:
        raise ValueError(f"seed must lie in [0, 2**32), got {int(seed)}")
    drawn = copy.copy(net)
    drawn.seed = jnp.asarray(seed, jnp.uint32)
    drawn.initializer = SIGNED_CONSTANT
    drawn._fingerprint = None
    weights = dict(zip(net.layout.shapes, _signed(drawn.seed, net.layout), strict=True))
    drawn.params = _with_masked(
        net.params, lambda name, leaf: weights[name].astype(leaf.dtype), weights
    )
    return drawn


def _with_masked(params, function, names):
    """The params with function(name, leaf) in place of the leaves `names`."""
    leaves = [
        function(name, leaf) if name in names else leaf
        for name, leaf in named_leaves(params).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


@functools.partial(jax.jit, static_argnames="layout", inline=True)
def _signed(seed, layout):
    """The weights of each masked leaf, float32."""
    key = prng.purpose_key(jax.random.key(seed), "weights")
    keys = jax.random.split(key, len(layout.shapes))
    return [
        jax.random.rademacher(key, shape, jnp.float32)
        * np.float32(math.sqrt(2 / math.prod(shape[:-1])))
        for key, (_, shape) in zip(keys, layout.named_shapes, strict=True)
    ]


def check_logits(logits: jax.Array, x: jax.Array) -> jax.Array:
    """`logits`, once they are seen to be [B, C] for x [B, ...]; runs while tracing only."""
    shape = getattr(logits, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != x.shape[0]:
        got = f"a {type(logits).__name__}" if shape is None else f"shape {shape}"
        raise ValueError(
            f"apply must return logits [B, C] with B = {x.shape[0]} for x of shape {x.shape}, "
            f"got {got}"
        )
    return logits


def num_outputs(net: Network, data: TaskData) -> int:
    """C, found without computing anything. Raises ValueError unless logits are [B, C]."""

    def logits(net, data):
        x, _ = data.batch(jnp.zeros(2, jnp.int32))
        ones = [jnp.ones(shape) for shape in net.layout.shapes.values()]
        return net.train_logits(net.layout.tree(ones), net.state, x)[0]

    return jax.eval_shape(logits, net, data).shape[1]
