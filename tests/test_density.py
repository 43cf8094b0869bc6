import json
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import supsup_jax as ss
from supsup_jax import models, network
from supsup_jax.layout import Layout
from tests.conftest import GOLDEN

REFERENCE = json.loads((GOLDEN / "er_density.json").read_text())
# Kept weights of a ResNet-50 mask (FIELD.md, from the reference's budget).
RESNET50 = {4: 204_596, 8: 402_968, 16: 795_696}


def as_ours(layer):
    """A kernel's shape [window..., in, out]; the reference's last layer is a 1x1 convolution."""
    num_out, num_in, *window = layer["shape_oihw"]
    return (*window, num_in, num_out)


@pytest.mark.parametrize("name", REFERENCE)
@pytest.mark.parametrize("scale", [1, 2, 4, 8, 16, 32])
def test_erdos_renyi_matches_the_reference(name, scale):
    for layer in REFERENCE[name]:
        want = layer[f"s{scale}"]
        assert ss.ErdosRenyi(scale)(as_ours(layer)) == pytest.approx(want, rel=1e-12)


def test_a_dense_layer_counts_as_a_window_of_one():
    assert ss.ErdosRenyi(2)((160, 5)) == ss.ErdosRenyi(2)((1, 1, 160, 5)) == 2 * 165 / 800


@pytest.mark.parametrize(("scale", "kept"), RESNET50.items())
def test_kept_counts_of_resnet50(scale, kept):
    counts = ss.kept_counts(layout_of(models.resnet50, 10), ss.ErdosRenyi(scale))
    assert sum(counts.values()) == kept
    assert all(type(count) is int for count in counts.values())


def layout_of(model, num_outputs):
    """The layout of a model whose weights are never made."""

    def params():
        return nnx.to_pure_dict(nnx.state(model(num_outputs, rngs=nnx.Rngs(0)), nnx.Param))

    shapes = jax.eval_shape(params)
    return Layout.of(shapes, network.is_kernel)


def test_uniform_density_is_each_layers_own():
    net = ss.Network(lambda params, x: x, {"a": jnp.zeros((10, 3)), "b": jnp.zeros((4, 5))})
    assert ss.kept_counts(net.layout, 0.25) == {"a": round(7.5), "b": 5}


@pytest.mark.parametrize("density", [0.02, ss.ErdosRenyi(0.01)])
def test_a_density_that_keeps_nothing_names_the_layer(density):
    net = ss.Network(lambda params, x: x, {"a": jnp.zeros((10, 30)), "b": jnp.zeros((4, 5))})
    with pytest.raises(ValueError, match=r"layer '[ab]' of shape \(\d+, \d+\): density .* keeps"):
        ss.kept_counts(net.layout, density)


def test_bad_densities():
    with pytest.raises(ValueError, match="scale must be positive"):
        ss.ErdosRenyi(0)
    with pytest.raises(ValueError, match="scale must be positive"):
        ss.ErdosRenyi(math.inf)
    with pytest.raises(ValueError, match="most must be a density"):
        ss.ErdosRenyi(1, most=1.5)
    with pytest.raises(ValueError, match=r"needs a kernel \[..., in, out\]"):
        ss.ErdosRenyi(1)((4,))
    with pytest.raises(TypeError, match="hash by value"):
        ss.TrainConfig(rule="topk", density=Unhashable())


class Unhashable:
    __hash__ = None

    def __call__(self, shape):
        return 0.5
