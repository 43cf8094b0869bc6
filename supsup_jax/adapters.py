"""Flax modules as (apply, params, state): the only module of the core that imports Flax.

Each `apply` is a frozen dataclass equal by value, so that two networks made from the same module
definition share one compiled program.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Mapping
from typing import Any

import jax
from flax import errors, linen, nnx

from supsup_jax import prng, roles
from supsup_jax.checks import cause
from supsup_jax.types import PyTree

# How modules spell "training", and what each is set to.
_MODES = {
    "train": lambda train: train,
    "training": lambda train: train,
    "deterministic": lambda train: not train,
    "use_running_average": lambda train: not train,
}
# Where the state keeps the key of a module that is handed its random numbers call by call.
_CALLS = "supsup_jax_calls"

_NORMS = nnx.BatchNorm, nnx.LayerNorm, nnx.RMSNorm, nnx.GroupNorm, nnx.InstanceNorm


@dataclasses.dataclass(frozen=True)
class _Call:
    """How a module is called: the arguments of its __call__, and how it spells "training"."""

    names: tuple[str, ...]

    @classmethod
    def of(cls, module: Any) -> "_Call":
        return cls(tuple(inspect.signature(type(module).__call__).parameters)[1:])

    @property
    def has_mode(self) -> bool:
        """Whether an argument tells training from prediction."""
        return any(name in _MODES for name in self.names)

    def __call__(self, function: Any, x: PyTree, train: bool, **named: Any) -> Any:
        named |= {name: told(train) for name, told in _MODES.items() if name in self.names}
        if not isinstance(x, Mapping):
            return function(x, **named)
        if set(x) <= set(self.names):
            return function(**x, **named)
        try:
            return function(x, **named)
        except Exception as error:
            others = sorted(set(x) - set(self.names))
            raise TypeError(
                f"__call__ takes {list(self.names)}, none of which is {others}, and so the dict as "
                f"a whole: {cause(error)}"
            ) from error


def _logits(outputs):
    """Logits of a module that may return further outputs behind them."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def _first_key():
    """Of one generator, whatever the user's flags: it is part of what stores compare."""
    return jax.random.key(0, impl="threefry2x32")


def _next_key(state):
    """A key for this call, and the state of the next."""
    key = prng.wrap_keys(state[_CALLS])
    after = prng.unwrap_keys(prng.purpose_key(key, "next call"))
    return prng.purpose_key(key, "this call"), {**state, _CALLS: after}


@dataclasses.dataclass(frozen=True)
class NnxStateless:
    """apply(params, x) of an NNX module whose variables are all Params."""

    graphdef: nnx.GraphDef
    call: _Call

    def __call__(self, params, x):
        return _logits(self.call(nnx.merge(self.graphdef, params), x, False))


@dataclasses.dataclass(frozen=True)
class NnxStateful:
    """apply(params, state, x, train) of an NNX module with further variables."""

    train_graphdef: nnx.GraphDef
    eval_graphdef: nnx.GraphDef
    call: _Call

    def __call__(self, params, state, x, train):
        named, moved = {}, {}
        if _CALLS in state:
            key, moved = _next_key(state)
            named["rngs"] = nnx.Rngs(key)
            state = {name: leaf for name, leaf in state.items() if name != _CALLS}
            moved = {_CALLS: moved[_CALLS]}
        graphdef = self.train_graphdef if train else self.eval_graphdef
        module = nnx.merge(graphdef, params, prng.wrap_keys(state))
        logits = _logits(self.call(module, x, train, **named))
        _, _, _, state = nnx.split(module, nnx.Param, nnx.Intermediate, ...)
        return logits, {**prng.unwrap_keys(nnx.to_pure_dict(state)), **moved}


@dataclasses.dataclass(frozen=True)
class LinenStateless:
    """apply(params, x) of a Linen module that is the same in training and has no state."""

    module: linen.Module
    call: _Call

    def __call__(self, params, x):
        def function(*args, **named):
            return self.module.apply({"params": params}, *args, **named)

        try:
            return _logits(self.call(function, x, False))
        except errors.InvalidRngError as error:
            raise ValueError(
                f"{type(self.module).__name__} draws, and nothing tells it training from "
                f"prediction: give its __call__, or its fields, one of {sorted(_MODES)}"
            ) from error


@dataclasses.dataclass(frozen=True)
class LinenStateful:
    """apply(params, state, x, train) of a Linen module; state maps collections to variables."""

    module: linen.Module
    call: _Call

    def __call__(self, params, state, x, train):
        key, after = _next_key(state)
        collections = {name: tree for name, tree in state.items() if name != _CALLS}

        def function(*args, **named):
            return _in_mode(self.module, self.call, train).apply(
                {"params": params, **collections},
                *args,
                **named,
                rngs={"params": key, "dropout": key} if train else None,
                mutable=list(collections),
            )

        outputs, moved = self.call(function, x, train)
        return _logits(outputs), {**(after if train else state), **moved}


def split_nnx(module: Any) -> tuple[Any, PyTree, PyTree, dict[str, roles.Role]]:
    """(apply, params, state, roles of the leaves that the layers tell)."""
    if not isinstance(module, nnx.Module):
        raise TypeError(
            f"from_nnx wants a flax.nnx.Module, got {type(module).__name__}; "
            "a linen.Module goes through from_linen"
        )
    # Setting the mode writes to the module, and this one is the caller's.
    module = nnx.clone(module)
    nnx.pop(module, nnx.Intermediate)  # what it has sown is of inputs, and no state
    call, found = _Call.of(module), _nnx_roles(module)
    _set_mode(module, False)
    eval_graphdef, params, state = nnx.split(module, nnx.Param, ...)
    _set_mode(module, True)
    train_graphdef = nnx.graphdef(module)
    params, state = nnx.to_pure_dict(params), prng.unwrap_keys(nnx.to_pure_dict(state))
    if "rngs" in call.names:
        state = {**state, _CALLS: prng.unwrap_keys(_first_key())}
    if not jax.tree.leaves(state):  # and so nothing random in it
        return NnxStateless(eval_graphdef, call), params, None, found
    return NnxStateful(train_graphdef, eval_graphdef, call), params, state, found


def _set_mode(module, train):
    """As module.train() and eval() do, and of flags that layers hold under names they overlook."""
    (nnx.Module.train if train else nnx.Module.eval)(module)
    for _, layer in nnx.iter_graph(module):
        for name, mode in _MODES.items() if isinstance(layer, nnx.Module) else ():
            if isinstance(vars(layer).get(name), bool):
                setattr(layer, name, mode(train))


def _nnx_roles(module):
    """What the layers of a module say of their kernels, embeddings, scales and biases."""
    found = {}
    for path, layer in nnx.iter_graph(module):
        if not isinstance(layer, nnx.Module):
            continue
        own = {"/".join(map(str, (*path, name))): name for name in vars(layer)}
        for leaf, name in own.items():
            if name == "bias" or isinstance(layer, _NORMS):
                found[leaf] = roles.NONE
            elif name == "kernel" and (kernel := _nnx_kernel(layer)):
                found[leaf] = roles.of_kernel(kernel)
            elif name == "embedding" and isinstance(layer, nnx.Embed):
                table = roles.is_table(leaf.rpartition("/")[0])
                found[leaf] = roles.of_embedding((layer.num_embeddings, layer.features), table)
    return found


def _nnx_kernel(layer):
    """A layer's kernel as [window..., in, out], however it lies; of stacked layers that of one."""
    if isinstance(layer, nnx.LinearGeneral):
        return math.prod(layer.in_features), math.prod(layer.out_features)
    if isinstance(layer, nnx.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, nnx.Conv):
        return layer.kernel_shape
    if isinstance(layer, nnx.ConvTranspose):
        return *layer.kernel_size, layer.in_features, layer.out_features
    if isinstance(layer, nnx.Einsum):
        operands, outputs = layer.einsum_str.replace(" ", "").split("->")
        axes = zip(operands.split(",")[1].replace(".", ""), layer.kernel_shape, strict=True)
        fan_in = math.prod(size for axis, size in axes if axis not in outputs)
        return fan_in, math.prod(layer.kernel_shape) // fan_in
    return None


def split_linen(
    module: Any, variables: PyTree
) -> tuple[Any, PyTree, PyTree, dict[str, roles.Role]]:
    """(apply, params, state, roles: what names say is all there is)."""
    if not isinstance(module, linen.Module):
        raise TypeError(f"from_linen wants a flax.linen.Module, got {type(module).__name__}")
    if "params" not in variables:
        raise ValueError(
            f"variables must hold 'params', as module.init returns it; got {sorted(variables)}"
        )
    params, call = variables["params"], _Call.of(module)
    state = {name: tree for name, tree in variables.items() if name != "params"}
    if not call.has_mode and _in_mode(module, call, True) == _in_mode(module, call, False):
        if not state:
            return LinenStateless(module, call), params, None, {}
        raise ValueError(
            f"{type(module).__name__} has state {sorted(state)}, so its __call__, or its fields, "
            f"must have one of {sorted(_MODES)}; its __call__ takes {sorted(call.names)}"
        )
    # Whether it draws in training nobody knows before it is called: it has a key to draw from.
    state = {**state, _CALLS: prng.unwrap_keys(_first_key())}
    return LinenStateful(module, call), params, state, {}


def _in_mode(module, call, train):
    """A module whose __call__ is not told whether it trains, but whose fields are, or their own."""

    def told(name, value):
        if isinstance(value, linen.Module):
            return _in_mode(value, call, train)
        return _MODES[name](train) if name in _MODES and isinstance(value, bool) else value

    if call.has_mode:
        return module
    own = {each.name for each in dataclasses.fields(module)} - {"parent", "name"}
    fields = {name: getattr(module, name) for name in own}
    return module.clone(
        **{
            name: jax.tree.map(functools.partial(told, name), value)
            for name, value in fields.items()
            if jax.tree.leaves(value)
        }
    )
