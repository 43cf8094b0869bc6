"""Convolutions that are as fast within loops as outside.

XLA's CPU backend convolves fast where dimensions come in one order, channels last, and brings those
of other convolutions into it; but it looks for these outside loops only (ConvCanonicalization in
jax 0.10.2), and the gradients that differentiation makes of a convolution are such others: within a
loop that of a kernel takes 10 to 50 times as long, that of its input 2 to 7 times. Decisions and
training steps are loops, and networks are their users' own: so it is the trace that is rewritten.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax import lax
from jax.extend import core

CONVOLUTION = "conv_general_dilated"


def equations(jaxpr: Any) -> Iterator[Any]:
    """A jaxpr's operations, also those within others."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def primitives(jaxpr: Any) -> set[str]:
    """The names of `equations`."""
    return {equation.primitive.name for equation in equations(jaxpr)}


def fast_in_loops(gradient: Callable) -> Callable:
    """The same function of pytrees of arrays, on a CPU with all dimensions in XLA's order.

    gradient: one that jax.grad has made, or that calls such: what is differentiated later is not
      rewritten. Convolutions within a custom_jvp or custom_vjp that nothing differentiates stay as
      they are.
    """

    def fast(*args):
        traced, out = jax.make_jaxpr(gradient, return_shape=True)(*args)
        found = core.jaxpr_as_fun(_rewritten(traced))(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(out), found)

    return fast


def _rewritten(jaxpr):
    """A jaxpr, open or closed, and those within it."""
    # From jax 0.12 on a closed one is its own `jaxpr`: there is one class of both.
    opened = getattr(jaxpr, "jaxpr", jaxpr)
    if CONVOLUTION not in primitives(opened):
        return jaxpr
    if opened is not jaxpr:
        return jaxpr.replace(jaxpr=_rewritten(opened))
    return jaxpr.replace(eqns=[_replaced(equation) for equation in jaxpr.eqns])


def _replaced(equation):
    name, params = equation.primitive.name, equation.params
    if name == CONVOLUTION:
        if params["dimension_numbers"] == _channels_last(equation.invars[0].aval.ndim):
            return equation
        inputs = [var.aval for var in equation.invars]
        (ours,) = jax.make_jaxpr(jax.jit(functools.partial(_convolve, equation)))(*inputs).eqns
        return equation.replace(primitive=ours.primitive, params=ours.params)
    if name.startswith("custom_"):  # with its rule, of which a jaxpr does not tell
        return equation
    inner = jax.tree.map(
        lambda leaf: _rewritten(leaf) if _is_jaxpr(leaf) else leaf, params, is_leaf=_is_jaxpr
    )
    return equation.replace(params=inner)


def _is_jaxpr(value):
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)


def _channels_last(ndim):
    """Of x [N, ..., I], kernel [..., I, O] and result [N, ..., O]."""
    x = 0, ndim - 1, *range(1, ndim - 1)
    return lax.ConvDimensionNumbers(x, (ndim - 1, ndim - 2, *range(ndim - 2)), x)


def _convolve(equation, x, kernel):
    """A convolution, on a CPU between transpositions."""
    original = functools.partial(equation.primitive.bind, **equation.params)
    ours = {**equation.params, "dimension_numbers": _channels_last(x.ndim)}
    x_axes, kernel_axes, out_axes = equation.params["dimension_numbers"]

    def channels_last(x, kernel):
        x = x.transpose(x_axes[0], *x_axes[2:], x_axes[1])
        kernel = kernel.transpose(*kernel_axes[2:], kernel_axes[1], kernel_axes[0])
        y = equation.primitive.bind(x, kernel, **ours)
        order = out_axes[0], *out_axes[2:], out_axes[1]
        return y.transpose([order.index(axis) for axis in range(y.ndim)])

    return lax.platform_dependent(x, kernel, cpu=channels_last, default=original)
