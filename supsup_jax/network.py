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
from jax.core import Tracer

from supsup_jax import prng, roles
from supsup_jax.checks import cause, check_int
from supsup_jax.layout import Layout, named_leaves
from supsup_jax.types import PyTree, TaskData, kinds_of, num_rows, shapes_of

SIGNED_CONSTANT = "signed_constant"
# A power of two, so that multiplying by it is exact, halfway to overflow.
_HUGE = 2.0**64


@jax.tree_util.register_pytree_with_keys_class
class Network:
    """A network whose weights never change, as a pytree: params, state and seed are leaves.

    apply: stateless `apply(params, x) -> logits`; stateful, when state is given,
      `apply(params, state, x, train) -> (logits, state)`. x is [B, ...], an array or a pytree of
      arrays; logits [B, C]. Static, so it must hash by value where networks are made anew for one
      compiled program.
    params: pytree of the weights.
    masked: `masked(name, leaf) -> bool` with names like "layer0/kernel"; by default the kernels and
      embeddings, as `roles` tells them: never a bias of any rank, a norm's scale or offset, a
      token, a table of positions. Resolved here, once.
    state: normalisation statistics and the like, where a task's training starts.
    fan_in: `fan_in(name, leaf) -> int`, how many inputs one output of a masked leaf sums over, or
      None for what the leaf's module or name says. It sets the scale of weights and scores.

    layout: which leaves are masked, their order and fan-ins; print the network for the whole table.
    initializer, seed: how the masked weights were drawn, None where they were given (see
    `signed_constant`).
    Raises TypeError or ValueError for an apply that is not callable, params without arrays, and
    what `Layout.of` refuses.
    """

    HINT = ": Network.from_nnx and Network.from_linen make one of a module"

    def __init__(
        self,
        apply: Callable,
        params: PyTree,
        masked: Callable[[str, jax.Array], bool] | None = None,
        state: PyTree = None,
        fan_in: roles.FanIn | None = None,
        *,
        found: dict[str, roles.Role] | None = None,
    ):
        if not callable(apply):
            raise TypeError(f"apply must be a function of (params, x), got {type(apply).__name__}")
        for what, rule in (("masked", masked), ("fan_in", fan_in)):
            if rule is not None and not callable(rule):
                raise TypeError(f"{what} must be a function of (name, leaf), got {rule!r}")
        self.apply = apply
        self.params = jax.tree.map(jnp.asarray, params)
        self.state = jax.tree.map(jnp.asarray, state) if jax.tree.leaves(state) else None
        self.seed: jax.Array | None = None
        self.initializer: str | None = None
        # What modules say of their leaves (`found`, of the adapters) goes before what names say.
        found = roles.of_names(self.params) | (found or {})
        self.layout = Layout.of(
            self.params,
            masked or (lambda name, leaf: found[name].connects),
            functools.partial(_fan_in, fan_in, found),
            functools.partial(_kernel, fan_in, found),
        )
        self._fingerprint = None

    @classmethod
    def from_nnx(
        cls, module: Any, masked: Callable | None = None, fan_in: roles.FanIn | None = None
    ) -> "Network":
        """The network of a Flax NNX module, with the module's weights.

        Its Params become params; everything else (batch statistics, dropout's keys and counters)
        becomes state. Training runs it as `module.train()`, prediction as `module.eval()`, and
        where its __call__ takes them it gets train, training, deterministic or
        use_running_average, and rngs. A batch that is a dict with the names of arguments of
        __call__ goes to these; of a tuple that it returns the first are the logits.
        masked, fan_in: as of `Network`; the layers say which axes of their kernels are inputs.
        Raises TypeError when `module` is not an nnx.Module.
        """
        from supsup_jax import adapters  # the core knows no model library until one is used

        apply, params, state, found = adapters.split_nnx(module)
        return cls(apply, params, masked, state, fan_in, found=found)

    @classmethod
    def from_linen(
        cls,
        module: Any,
        variables: PyTree,
        masked: Callable | None = None,
        fan_in: roles.FanIn | None = None,
    ) -> "Network":
        """The network of a Flax Linen module and the variables its `init` returned.

        `variables["params"]` becomes params, every other collection state. A module that differs
        in training takes one of the arguments train, training, deterministic or
        use_running_average, as one with state must, or else it or the modules in its fields, such
        as a Sequential's, have such a field, which is then set. Its dropout draws from a key that
        is kept in the state. Inputs and outputs as of `from_nnx`.
        masked, fan_in: as of `Network`; which axes are inputs follows from the names that Linen
        gives, and where a kernel has no bias to tell its outputs, the last axis is taken for them.
        Raises TypeError or ValueError when it does not, or when there are no params.
        """
        from supsup_jax import adapters

        apply, params, state, found = adapters.split_linen(module, variables)
        return cls(apply, params, masked, state, fan_in, found=found)

    def __call__(self, mask: PyTree, x: PyTree, state: PyTree = None) -> jax.Array:
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

    def train_logits(self, mask: PyTree, state: PyTree, x: PyTree) -> tuple[jax.Array, PyTree]:
        """Logits [B, C] in train mode, and the state behind this batch."""
        return self.forward(self.superpose(mask), state, x, train=True)

    def forward(
        self, weights: PyTree, state: PyTree, x: PyTree, train: bool
    ) -> tuple[jax.Array, PyTree]:
        """Logits [B, C] under `weights`, a pytree like params, and the state behind x.

        What every use of `apply` comes down to; state is None for a network without.
        """
        logits, state = self._applied(weights, state, x, train)
        return check_logits(logits, x), state

    def _applied(self, weights, state, x, train):
        """What apply gives; of what it fails on, what came and, where a trial tells, was wanted."""

        def applied(x):
            if self.state is None:
                return self.apply(weights, x), None
            return self.apply(weights, state, x, train)

        try:
            return applied(x)
        except (jax.errors.JAXTypeError, FloatingPointError, RuntimeError):
            raise  # of values, not of what the inputs are like
        except Exception as error:
            raise ValueError(_refusal(applied, x, error, self.layout)) from error

    def superpose(self, mask: PyTree) -> PyTree:
        """The params with each masked leaf multiplied by its mask or mixture."""
        factors = dict(zip(self.layout.shapes, self.layout.leaves(mask, "the mask"), strict=True))
        return _with_masked(
            self.params, lambda name, weight: weight * factors[name].astype(weight.dtype), factors
        )

    def batch_state(self, weights: PyTree, x: PyTree) -> PyTree:
        """State that makes eval mode use the statistics of `x` [B, ...] itself, held constant.

        Running statistics move as new = m old + (1 - m) batch in train mode, with a momentum m of
        their own. From old = 0 they arrive at (1 - m) batch; from an old that dwarfs the batch, at
        m old. The passes differ in these few numbers only, and XLA computes the rest once.
        Leaves that train mode returns untouched stay as they are; it must not read those it moves.
        """
        if not self.has_statistics:
            return self.state
        moves = self._moving_state(weights, x)

        def arrive(start):
            # In float32, where half precision could not tell the batch from the start.
            old = jax.tree.map(
                lambda leaf, move: jnp.full(leaf.shape, start, jnp.float32) if move else leaf,
                self.state,
                moves,
            )
            return self._applied(weights, old, x, True)[1]

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
            new = self._applied(weights, state, x, True)[1]
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
                if isinstance(leaf, Tracer):
                    raise TypeError("a fingerprint is taken outside jit, where weights have values")
                array = np.ascontiguousarray(jax.device_get(leaf))
                digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
                digest.update(array.tobytes())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def tree_flatten_with_keys(self):
        """For JAX: the arrays by name, and what is static."""
        key = jax.tree_util.GetAttrKey
        leaves = [(key(name), getattr(self, name)) for name in ("params", "state", "seed")]
        return leaves, (self.apply, self.layout, self.initializer)

    @classmethod
    def tree_unflatten(cls, static, leaves):
        """For JAX: the inverse of `tree_flatten_with_keys`."""
        # Not through __init__: its checks ran once, and transformations put placeholders in.
        self = object.__new__(cls)
        self.apply, self.layout, self.initializer = static
        self.params, self.state, self.seed = leaves
        self._fingerprint = None
        return self

    @property
    def has_statistics(self) -> bool:
        """Whether an example's logits may depend on others: through state that is of floats."""
        return any(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(self.state))

    def __repr__(self) -> str:
        origin = f"{self.initializer}, seed {self.seed}" if self.initializer else "given weights"
        fan_ins = dict(zip(self.layout.shapes, self.layout.fan_ins, strict=True))
        rows = [("leaf", "masked", "shape", "fan-in", "magnitude")]
        for name, leaf in named_leaves(self.params).items():
            fan_in = fan_ins.get(name)
            magnitude = "as given"
            if self.initializer and fan_in:
                magnitude = f"{math.sqrt(2 / fan_in):.3g}"
            masked = "yes" if name in fan_ins else "no"
            rows.append((name, masked, str(leaf.shape), str(fan_in or "-"), magnitude))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = "".join("\n  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        return (
            f"Network({self.layout.num_weights:,} maskable weights in "
            f"{len(self.layout.shapes)} leaves, {origin}){table}"
        )


def _fan_in(rule, found, name, leaf):
    fan_in = rule(name, leaf) if rule else None
    if fan_in is None:
        return found[name].fan_in
    check_int(f"fan_in of {name!r}", fan_in, 1)
    return int(fan_in)


def _kernel(rule, found, name, leaf):
    fan_in = rule(name, leaf) if rule else None
    if fan_in is not None and leaf.size % fan_in == 0:
        return fan_in, leaf.size // fan_in
    return found[name].kernel or leaf.shape


def signed_constant(net: Network, seed: int) -> Network:
    """`net` with every masked weight redrawn as +-sqrt(2 / fan_in), the sign uniform.

    The signed Kaiming constant of the paper. Leaves that are not masked stay, and so do those
    masked by name in which a fan-in has no meaning, such as biases and scales of norms. The weights
    follow from `seed` alone (a host int or an integer array), which the returned network remembers,
    by a generator of this library's own choice: JAX's flags have no part in them.
    Raises ValueError for a host seed outside [0, 2**32), or where no leaf would be drawn.
    """
    if isinstance(seed, bool) or not jnp.issubdtype(jnp.result_type(seed), jnp.integer):
        raise TypeError(f"seed must be an integer, got {seed!r}")
    if not isinstance(seed, Tracer) and not 0 <= int(seed) < 2**32:
        raise ValueError(f"seed must lie in [0, 2**32), got {int(seed)}")
    if not any(net.layout.fan_ins):
        raise ValueError(
            f"no masked leaf has a fan-in, of {list(net.layout.shapes)}: keep the weights as they "
            "are given, or say fan_in= to the Network"
        )
    drawn = copy.copy(net)
    drawn.seed = jnp.asarray(seed, jnp.uint32)
    drawn.initializer = SIGNED_CONSTANT
    drawn._fingerprint = None
    signs = dict(zip(net.layout.shapes, _signs(drawn.seed, net.layout), strict=True))
    fan_ins = dict(zip(net.layout.shapes, net.layout.fan_ins, strict=True))

    def redraw(name, leaf):
        if (fan_in := fan_ins[name]) is None:
            return leaf
        return (signs[name] * np.float32(math.sqrt(2 / fan_in))).astype(leaf.dtype)

    drawn.params = _with_masked(net.params, redraw, fan_ins)
    return drawn


def _with_masked(params, function, names):
    """The params with function(name, leaf) in place of the leaves `names`."""
    leaves = [
        function(name, leaf) if name in names else leaf
        for name, leaf in named_leaves(params).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


@functools.partial(jax.jit, static_argnames="layout", inline=True)
def _signs(seed, layout):
    """The sign of each masked weight, float32, leaf by leaf."""
    return prng.pinned_signs(seed, "weights", list(layout.shapes.values()))


def check_logits(logits: jax.Array, x: PyTree) -> jax.Array:
    """`logits`, once they are seen to be [B, C] for x [B, ...]; runs while tracing only."""
    shape = getattr(logits, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != num_rows(x):
        got = f"a {type(logits).__name__}" if shape is None else f"shape {shape}"
        raise ValueError(
            f"apply must return logits [B, C] with B = {num_rows(x)} for x of shape "
            f"{shapes_of(x)}, got {got}: x is a batch, of one input x[None]"
        )
    return logits


def num_outputs(net: Network, data: TaskData) -> int:
    """C, of a network on such data: known before anything is computed.

    Raises ValueError unless the network takes the inputs and returns logits [B, C].
    """
    return _train_logits.trace(net, data).out_info.shape[1]


@jax.jit
def _train_logits(net, data):
    x, _ = data.batch(jnp.zeros(2, jnp.int32))
    ones = [jnp.ones(shape) for shape in net.layout.shapes.values()]
    return net.train_logits(net.layout.tree(ones), net.state, x)[0]


def _refusal(applied, x, error, layout):
    """That a network does not take x, in one sentence."""
    said = f"the network fails on inputs {kinds_of(x)}: "
    for other, how in _others(x, layout):
        try:
            check_logits(jax.eval_shape(applied, other)[0], other)
        except Exception:  # a guess that fails too, in whatever way: the caller raises from `error`
            continue
        return f"{said}it takes {kinds_of(other)}{how}"
    return f"{said}{cause(error)}"


def _others(x, layout):
    """What may have been meant by an x that a network does not take, and how it is made of x."""
    if not hasattr(x, "ndim") or x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        return
    num, *rest, last = x.shape
    ways = []
    if len(rest) == 2:
        swapped = (num, rest[1], last, rest[0])
        ways.append((swapped, ", channels last: numpy.transpose(inputs, (0, 2, 3, 1))"))
    if rest:
        ways.append(((num, math.prod(rest) * last), ": inputs.reshape(len(inputs), -1)"))
    ways.append(((*x.shape, 1), ": inputs[..., None]"))
    widths = {shape[-2] for shape in layout.shapes.values() if len(shape) > 1}
    ways += [((num, *rest, width), "") for width in sorted(widths | {*layout.fan_ins} - {None})]
    for shape, how in ways:
        yield jax.ShapeDtypeStruct(shape, x.dtype), how
