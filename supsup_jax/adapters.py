"""Flax modules as (apply, params, state): the only module of the core that imports Flax.

Each `apply` is a frozen dataclass equal by value, so that two networks made from the same module
definition share one compiled program.
"""

import dataclasses
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from supsup_jax.types import PyTree

# How Linen modules spell "training", and what each is set to.
_LINEN_MODES = {
    "train": lambda train: train,
    "training": lambda train: train,
    "deterministic": lambda train: not train,
    "use_running_average": lambda train: not train,
}


@dataclasses.dataclass(frozen=True)
class NnxStateless:
    """apply(params, x) of an NNX module whose variables are all Params."""

    graphdef: nnx.GraphDef

    def __call__(self, params, x):
        return nnx.merge(self.graphdef, params)(x)


@dataclasses.dataclass(frozen=True)
class NnxStateful:
    """apply(params, state, x, train) of an NNX module with further variables."""

    train_graphdef: nnx.GraphDef
    eval_graphdef: nnx.GraphDef

    def __call__(self, params, state, x, train):
        graphdef = self.train_graphdef if train else self.eval_graphdef
        module = nnx.merge(graphdef, params, _wrap_keys(state))
        logits = module(x)
        _, _, state = nnx.split(module, nnx.Param, ...)
        return logits, _unwrap_keys(nnx.to_pure_dict(state))


@dataclasses.dataclass(frozen=True)
class LinenStateless:
    """apply(params, x) of a Linen module without other collections, always in eval mode."""

    module: linen.Module
    mode: str | None

    def __call__(self, params, x):
        arguments = {self.mode: _LINEN_MODES[self.mode](False)} if self.mode else {}
        return self.module.apply({"params": params}, x, **arguments)


@dataclasses.dataclass(frozen=True)
class LinenStateful:
    """apply(params, state, x, train) of a Linen module; state maps collections to variables."""

    module: linen.Module
    mode: str

    def __call__(self, params, state, x, train):
        logits, moved = self.module.apply(
            {"params": params, **state},
            x,
            mutable=list(state),
            **{self.mode: _LINEN_MODES[self.mode](train)},
        )
        return logits, {**state, **moved}


def split_nnx(module: Any) -> tuple[Any, PyTree, PyTree]:
    if not isinstance(module, nnx.Module):
        raise TypeError(
            f"from_nnx wants a flax.nnx.Module, got {type(module).__name__}; "
            "a linen.Module goes through from_linen"
        )
    # Setting the mode writes to the module, and this one is the caller's.
    module = nnx.clone(module)
    module.eval()
    eval_graphdef, params, state = nnx.split(module, nnx.Param, ...)
    module.train()
    train_graphdef = nnx.graphdef(module)
    params, state = nnx.to_pure_dict(params), _unwrap_keys(nnx.to_pure_dict(state))
    if not jax.tree.leaves(state):
        return NnxStateless(eval_graphdef), params, None
    return NnxStateful(train_graphdef, eval_graphdef), params, state


def split_linen(module: Any, variables: PyTree) -> tuple[Any, PyTree, PyTree]:
    if not isinstance(module, linen.Module):
        raise TypeError(f"from_linen wants a flax.linen.Module, got {type(module).__name__}")
    if "params" not in variables:
        raise ValueError(
            f"variables must hold 'params', as module.init returns it; got {sorted(variables)}"
        )
    state = {name: tree for name, tree in variables.items() if name != "params"}
    arguments = inspect.signature(type(module).__call__).parameters
    modes = [mode for mode in _LINEN_MODES if mode in arguments]
    if not state:
        return LinenStateless(module, modes[0] if modes else None), variables["params"], None
    if not modes:
        raise ValueError(
            f"{type(module).__name__} has state {sorted(state)}, so its __call__ must take one of "
            f"{sorted(_LINEN_MODES)}; it takes {sorted(arguments)}"
        )
    return LinenStateful(module, modes[0]), variables["params"], state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _KeyData:
    """Where a typed PRNG key stood: state is stored, stacked and saved as plain numbers."""

    data: jax.Array
    impl: str = dataclasses.field(metadata={"static": True})


def _unwrap_keys(tree):
    def unwrap(leaf):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        if not is_key:
            return leaf
        return _KeyData(jax.random.key_data(leaf), str(jax.random.key_impl(leaf)))

    return jax.tree.map(unwrap, tree)


def _wrap_keys(tree):
    def wrap(node):
        if not isinstance(node, _KeyData):
            return node
        return jax.random.wrap_key_data(node.data, impl=node.impl)

    return jax.tree.map(wrap, tree, is_leaf=lambda node: isinstance(node, _KeyData))
