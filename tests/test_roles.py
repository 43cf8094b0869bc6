"""What is masked, and how many inputs an output sums over: against numbers counted by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import supsup_jax as ss
from supsup_jax import masks


class Layers(nnx.Module):
    """One of each layer whose kernel is not [in, out], and leaves that connect nothing."""

    def __init__(self, *, rngs):
        self.patches = nnx.Conv(3, 32, (4, 4), strides=4, rngs=rngs)
        self.depthwise = nnx.Conv(32, 32, (3, 3), feature_group_count=32, rngs=rngs)
        self.grouped = nnx.Conv(32, 64, (3,), feature_group_count=4, rngs=rngs)
        self.transposed = nnx.ConvTranspose(32, 16, (3, 3), transpose_kernel=True, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 32, qkv_features=64, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(32, rngs=rngs)
        self.cell = nnx.OptimizedLSTMCell(32, 16, rngs=rngs)
        self.einsum = nnx.Einsum("...ab,abc->...c", (4, 8, 32), (32,), rngs=rngs)
        self.embed = nnx.Embed(2000, 32, rngs=rngs)
        self.pos_embed = nnx.Embed(10, 32, rngs=rngs)
        self.cls_token = nnx.Param(jnp.zeros((1, 1, 32)))
        self.positions = nnx.Param(jnp.zeros((1, 65, 32)))
        keys = jax.random.split(jax.random.key(0), 5)
        self.stack = nnx.vmap(lambda key: nnx.Linear(32, 64, rngs=nnx.Rngs(key)))(keys)

    def __call__(self, x):
        return x


# Inputs that one output sums over; None: not masked.
BY_HAND = {
    "patches/kernel": 4 * 4 * 3,
    "depthwise/kernel": 3 * 3,
    "grouped/kernel": 3 * 32 // 4,
    "transposed/kernel": 3 * 3 * 32,
    "attention/query/kernel": 32,
    "attention/key/kernel": 32,
    "attention/value/kernel": 32,
    "attention/out/kernel": 4 * 16,
    "cell/dense_i/kernel": 32,
    "cell/dense_h/kernel": 16,
    "einsum/kernel": 4 * 8,
    "embed/embedding": 1,
    "stack/kernel": 32,
    **dict.fromkeys(
        [
            "patches/bias",
            "depthwise/bias",
            "grouped/bias",
            "transposed/bias",
            "attention/query/bias",
            "attention/key/bias",
            "attention/value/bias",
            "attention/out/bias",
            "norm/scale",
            "norm/bias",
            "cell/dense_h/bias",
            "einsum/bias",
            "pos_embed/embedding",
            "cls_token",
            "positions",
            "stack/bias",
        ]
    ),
}


@pytest.fixture(scope="module")
def module():
    return nnx.jit(lambda: Layers(rngs=nnx.Rngs(0)))()


@pytest.fixture(scope="module")
def layers(module):
    return ss.Network.from_nnx(module)


def leaves_of(net):
    flat = jax.tree_util.tree_leaves_with_path(net.params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def test_every_leaf_of_flax_layers(layers):
    given, drawn = leaves_of(layers), leaves_of(ss.signed_constant(layers, 0))
    assert set(BY_HAND) == set(given)
    for name, fan_in in BY_HAND.items():
        assert (name in layers.layout.shapes) == (fan_in is not None), name
        if fan_in is None:
            np.testing.assert_array_equal(drawn[name], given[name])
        else:
            size = np.abs(np.asarray(drawn[name]))
            np.testing.assert_allclose(size, math.sqrt(2 / fan_in), rtol=1e-6, err_msg=name)
    scores = leaves_of(
        ss.Network(lambda p, x: x, masks.draw_scores(jax.random.key(0), layers.layout))
    )
    for name in layers.layout.shapes:
        top = np.abs(scores[name]).max() * math.sqrt(BY_HAND[name])
        assert 0.9 < top <= 1, name


def test_the_table_says_it(layers):
    table = repr(ss.signed_constant(layers, 0))
    (row,) = [line.split() for line in table.splitlines() if "query/kernel" in line]
    assert row == ["attention/query/kernel", "yes", "(32,", "4,", "16)", "32", "0.25"]
    (row,) = [line.split() for line in table.splitlines() if "query/bias" in line]
    assert row == ["attention/query/bias", "no", "(4,", "16)", "-", "as", "given"]


class LinenAttention(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.MultiHeadDotProductAttention(num_heads=4, use_bias=self.use_bias)(x, x)
        return linen.Dense(5)(linen.LayerNorm()(x).mean(1))

    use_bias: bool = True


@pytest.mark.parametrize("use_bias", [True, False])
def test_linen_attention_by_its_names(use_bias):
    module = LinenAttention(use_bias)
    net = ss.Network.from_linen(module, module.init(jax.random.key(0), jnp.ones((2, 3, 24))))
    found = dict(zip(net.layout.shapes, net.layout.fan_ins, strict=True))
    block = "MultiHeadDotProductAttention_0"
    names = {f"{block}/{name}/kernel": 24 for name in ("query", "key", "value", "out")}
    assert found == {**names, "Dense_0/kernel": 24}


@pytest.mark.parametrize(
    ("params", "want"),
    [
        ({"w1": (6, 4), "b1": (4,), "w2": (4, 2), "b2": (2,)}, {"w1": 6, "w2": 4}),
        ({"weight": (4, 6), "bias": (4,)}, {"weight": 6}),  # PyTorch, Equinox
        ({"weight": (6, 4), "bias": (4,)}, {"weight": 6}),
        ({"weight": (8, 3, 5, 5), "bias": (8, 1, 1)}, {"weight": 75}),
        ({"kernel": (7, 6, 4), "bias": (7, 4)}, {"kernel": 6}),  # stacked
        ({"kernel": (6, 2, 3), "bias": (2, 3)}, {"kernel": 6}),
        ({"kernel": (1, 1, 6, 4)}, {"kernel": 6}),
        ({"w": (1, 5)}, {"w": 1}),
        ({"a": (2, 3), "b": (3, 4)}, {"a": 2, "b": 3}),
        ({"w": (5, 2), "pos": (9, 5), "cls": (1, 5), "token": (1, 1, 5)}, {"w": 5}),
        ({"w": (5, 2), "wpe": (9, 5), "wte": (99, 5)}, {"w": 5, "wte": 1}),
        ({"embed/weight": (100, 8), "pos_embed/weight": (16, 8)}, {"embed/weight": 1}),
        (
            {"cls": (8, 10), "token_proj": (8, 4), "bias_w": (8, 3)},
            dict.fromkeys(["cls", "token_proj", "bias_w"], 8),
        ),
        ({"0": (4, 3), "1": (1, 3)}, {"0": 4}),
        ({"w": (5, 2), "scale": (2, 2), "ln_bias": (2, 2), "gamma": (3, 3)}, {"w": 5}),
    ],
)
def test_names_and_biases_tell_the_rest(params, want):
    arrays = {}
    for name, shape in params.items():
        *folder, last = name.split("/")
        (arrays.setdefault(*folder, {}) if folder else arrays)[last] = np.ones(shape, np.float32)
    net = ss.Network(lambda params, x: x, arrays)
    assert dict(zip(net.layout.shapes, net.layout.fan_ins, strict=True)) == want


def test_a_rule_of_ones_own_goes_first(module):
    def fan_in(name, leaf):
        return leaf.shape[-1] if "embedding" in name else None

    net = ss.Network.from_nnx(module, fan_in=fan_in)
    found = dict(zip(net.layout.shapes, net.layout.fan_ins, strict=True))
    assert found["embed/embedding"] == 32
    assert found["attention/out/kernel"] == 64
    with pytest.raises(ValueError, match=r"fan_in of .* must be an int of at least 1"):
        ss.Network.from_nnx(module, fan_in=lambda name, leaf: 0)
    with pytest.raises(TypeError, match="fan_in must be a function"):
        ss.Network.from_nnx(module, fan_in=3)


def test_what_has_no_fan_in_is_masked_by_name_and_stays_as_given(module):
    net = ss.Network.from_nnx(module, masked=lambda name, leaf: True)
    given, drawn = leaves_of(net), leaves_of(ss.signed_constant(net, 0))
    assert set(net.layout.shapes) == set(BY_HAND)
    for name in ("norm/scale", "attention/query/bias", "positions"):
        np.testing.assert_array_equal(drawn[name], given[name])
    assert np.ptp(np.abs(drawn["attention/query/kernel"])) == 0


def test_densities_see_inputs_and_outputs(layers):
    seen = []

    def density(shape):
        seen.append(shape)
        return 0.5

    params = {"query": {"kernel": (6, 2, 3), "bias": (2, 3)}, "w": (5, 4)}
    arrays = jax.tree.map(np.ones, params, is_leaf=lambda leaf: isinstance(leaf, tuple))
    ss.kept_counts(ss.Network(lambda params, x: x, arrays).layout, density)
    assert seen == [(6, 6), (5, 4)]
    seen.clear()
    more = {"weight": (16, 4, 3, 2), "scan": {"kernel": (7, 6, 4), "bias": (7, 4)}}
    arrays = jax.tree.map(np.ones, more, is_leaf=lambda leaf: isinstance(leaf, tuple))
    ss.kept_counts(ss.Network(lambda params, x: x, arrays).layout, density)
    assert seen == [(6, 4), (3, 2, 4, 16)]
    seen.clear()
    ss.kept_counts(layers.layout, density)
    assert (64, 32) in seen  # out of attention, 4 heads of 16
    assert (3, 3, 32, 16) in seen  # transposed
