"""Convolutions within loops: brought into XLA's order, and otherwise what they were."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax import lax

import supsup_jax as ss
from supsup_jax.loops import fast_in_loops
from tests.conftest import ConvNet, filled_store, random_masks

# The shapes of x and kernel, and what `lax.conv_general_dilated` is told beside them.
CASES = {
    "flax's": ((2, 9, 8, 3), (3, 3, 3, 4), {"window_strides": (2, 1)}),
    "pytorch's": ((2, 3, 9, 8), (4, 3, 3, 2), {"dimension_numbers": ("NCHW", "OIHW", "NCHW")}),
    "one axis, edges of its own": ((2, 9, 3), (4, 3, 5), {"padding": ((3, -1),)}),
    "three axes": ((1, 4, 5, 3, 2), (2, 3, 2, 2, 3), {"rhs_dilation": (2, 1, 1)}),
    "transposed": ((2, 4, 5, 3), (3, 3, 3, 4), {"lhs_dilation": (2, 3), "padding": ((1, 2),) * 2}),
    "groups": ((2, 6, 5, 4), (3, 3, 2, 6), {"feature_group_count": 2}),
    "groups of the batch": ((4, 6, 5, 2), (3, 3, 2, 6), {"batch_group_count": 2}),
    "odd order": ((9, 2, 3, 8), (3, 4, 2, 3), {"dimension_numbers": ("HNCW", "IOWH", "WCHN")}),
}
LETTERS = {3: "NWC WIO NWC", 4: "NHWC HWIO NHWC", 5: "NDHWC DHWIO NDHWC"}


def parts(function, *args):
    """A value, and the gradients of both arguments, one decision in each turn of a loop."""

    def one(cotangent):
        value, pull = jax.vjp(function, *args)
        return value, pull(cotangent.astype(value.dtype) * jnp.cos(value))

    return lambda loop, form: loop(form(one), jnp.arange(1.0, 3.0))


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_values_and_gradients_are_laxs(dtype):
    rng = np.random.default_rng(0)

    @jax.jit
    def both(args):
        found = {}
        for name, (_, _, options) in CASES.items():
            numbers = tuple(LETTERS[args[name][0].ndim].split())
            strides = (1,) * (args[name][0].ndim - 2)
            defaults = {"window_strides": strides, "padding": "SAME", "dimension_numbers": numbers}
            if name in ("transposed", "three axes"):
                defaults["padding"] = "VALID"
            conv = functools.partial(lax.conv_general_dilated, **{**defaults, **options})
            # Behind a jit, as networks call it.
            run = parts(jax.jit(conv), *args[name])
            found[name] = [run(lax.map, form) for form in (lambda f: f, fast_in_loops)]
        return found

    args = {
        name: [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
        for name, (*shapes, _) in CASES.items()
    }
    for name, (want, got) in both(args).items():
        tolerance = 1e-4 if dtype == np.float32 else 5e-2
        as_float = functools.partial(jax.tree.map, lambda leaf: np.asarray(leaf, np.float32))
        chex.assert_trees_all_close(
            as_float(got), as_float(want), rtol=tolerance, atol=tolerance, custom_message=name
        )


def orders(program, *args):
    """The dimension numbers of a program's convolutions."""
    text = jax.jit(program).lower(*args).as_text()
    return set(re.findall(r"dim_numbers = (\[.*?]x\[.*?]->\[.*?])", text))


@pytest.mark.parametrize("where", ["scan", "jit", "remat", "cond"])
def test_no_convolution_of_another_order_is_left(where):
    def conv(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def loss(kernel, x):
        if where == "scan":
            x, _ = lax.scan(lambda x, _: (conv(x, kernel), None), x, length=2)
        elif where == "cond":
            x = lax.cond(x.sum() > 0, conv, lambda x, kernel: x, x, kernel)
        else:
            x = {"jit": jax.jit, "remat": jax.checkpoint}[where](conv)(x, kernel)
        return jnp.sin(x).sum()

    x, kernel = jnp.ones((2, 5, 4, 3)), jnp.ones((3, 3, 3, 3))
    both = jax.grad(loss, (0, 1))
    assert len(orders(both, kernel, x)) > 1
    assert len(orders(fast_in_loops(both), kernel, x)) == 1


class Linen(linen.Module):
    """Two convolutions and a classifier."""

    @linen.compact
    def __call__(self, x):
        x = linen.relu(linen.Conv(4, (3, 3), strides=2)(x.reshape(len(x), 8, 8, 1)))
        return linen.Dense(5)(linen.Conv(6, (3, 3))(x).mean((1, 2)))


def linen_net():
    x = jnp.zeros((1, 64))
    return ss.Network.from_linen(Linen(), jax.jit(Linen().init)(jax.random.key(0), x))


def nnx_net():
    return ss.Network.from_nnx(nnx.jit(lambda: ConvNet(rngs=nnx.Rngs(0)))())


@pytest.mark.parametrize("make", [linen_net, nnx_net])
def test_decisions_equal_separate_gradients_and_trace_once(make):
    net = make()
    store = filled_store(net, [ss.Task(mask, net.state) for mask in random_masks(net, 3)], 4)
    x = np.random.default_rng(0).normal(size=(18, 64)).astype(np.float32)
    traces = []

    def objective(logits):
        traces.append(logits.shape)
        return ss.entropy(logits)

    got = ss.one_shot(net, store, x, objective).scores
    once = len(traces)
    assert np.array_equal(ss.one_shot(net, store, x + 0, objective).scores, got)
    assert len(traces) == once

    mixture = store.mixture()
    state = net.batch_state(net.superpose(mixture), x) if net.has_statistics else net.state

    @jax.jit
    def gradient(x):
        return jax.grad(lambda mixture: ss.entropy(net(mixture, x, state)).mean())(mixture)

    for row, scores in zip(x[:3], got[:3], strict=True):
        v = net.layout.ravel(gradient(row[None]), "the mixture")
        np.testing.assert_allclose(scores[:3], -store.contract(v)[:3], rtol=1e-3, atol=1e-6)
    # Descent sets out along the same gradient, on the simplex less its mean.
    alphas = ss.descend(net, store, x, optimizer=optax.sgd(0.1), steps=1).scores[:, :3]
    centred = got[:, :3] - got[:, :3].mean(1, keepdims=True)
    np.testing.assert_allclose((alphas - 1 / 3) / 0.1, centred, rtol=1e-3, atol=1e-5)
    in_loop = jax.jit(functools.partial(ss.one_shot, objective=ss.entropy))
    assert len(orders(in_loop, net, store, x)) == 1
