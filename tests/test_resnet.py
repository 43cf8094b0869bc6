import json
from collections import Counter

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import supsup_jax as ss
from supsup_jax import models
from supsup_jax.models import convolution
from tests.conftest import GOLDEN
from tests.test_density import as_ours, layout_of

REFERENCE = json.loads((GOLDEN / "er_density.json").read_text())


@pytest.mark.parametrize(
    ("model", "outputs", "name"),
    [(models.gem_resnet18, 5, "GEMResNet18"), (models.resnet50, 10, "ResNet50")],
)
def test_kernels_are_those_of_the_reference(model, outputs, name):
    ours = Counter(layout_of(model, outputs).shapes.values())
    theirs = Counter(as_ours(layer) for layer in REFERENCE[name])
    theirs[theirs_head := (1, 1, *head(ours, outputs))] -= 1  # a dense layer here
    theirs[theirs_head[2:]] += 1
    assert ours == +theirs


def head(shapes, outputs):
    (shape,) = [shape for shape in shapes if len(shape) == 2]
    assert shape[1] == outputs
    return shape


def test_resnet18_has_the_weights_of_imagenets():
    # torchvision's 11,689,512 parameters less its norms' 9,600 and the classifier's 1,000 biases.
    assert layout_of(models.resnet18, 1000).num_weights == 11_689_512 - 9_600 - 1_000


def conv(x, kernel, stride):
    """Plain convolution of one image [H, W, I], padded by half a window on every side."""
    size, _, _, num_out = kernel.shape
    x = np.pad(x, [(size // 2, size // 2)] * 2 + [(0, 0)])
    height, width = ((length - size) // stride + 1 for length in x.shape[:2])
    y = np.zeros((height, width, num_out))
    for i in range(height):
        for j in range(width):
            window = x[i * stride : i * stride + size, j * stride : j * stride + size]
            y[i, j] = np.tensordot(window, kernel, 3)
    return y


def standardised(images, mean, variance):
    return (images - mean) / np.sqrt(variance + 1e-5)


def plain_forward(params, state, images, depths, small_images):
    """A ResNet as the paper's reference computes it, in NumPy, by given statistics."""

    def block(x, name, stride):
        kernels, norms = params[name], state[name]

        def layer(x, i, stride):
            y = np.stack([conv(one, kernels[f"conv{i}"]["kernel"], stride) for one in x])
            return standardised(y, norms[f"norm{i}"]["mean"], norms[f"norm{i}"]["var"])

        number = len([each for each in kernels if each.startswith("conv")])
        strides = (stride, 1) if number == 2 else (1, stride, 1)
        y = x
        for i in range(1, number + 1):
            y = layer(y, i, strides[i - 1])
            y = np.maximum(y, 0) if i < number else y
        if "shortcut" in kernels:
            own, norm = kernels["shortcut"]["layers"][0], norms["shortcut"]["layers"][1]
            x = np.stack([conv(one, own["kernel"], stride) for one in x])
            x = standardised(x, norm["mean"], norm["var"])
        return np.maximum(x + y, 0)

    stride = 1 if small_images else 2
    x = np.stack([conv(one, params["stem"]["kernel"], stride) for one in images])
    x = standardised(x, state["stem_norm"]["mean"], state["stem_norm"]["var"])
    x = np.maximum(x, 0)
    if not small_images:
        padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)], constant_values=-np.inf)
        shifted = [
            padded[:, i : i + x.shape[1] : 2, j : j + x.shape[2] : 2]
            for i in range(3)
            for j in range(3)
        ]
        x = np.max(shifted, axis=0)
    for stage, depth in enumerate(depths):
        for i in range(depth):
            stride = 2 if stage and not i else 1
            x = block(x, f"stage{stage + 1}_block{i + 1}", stride)
    return x.mean(axis=(1, 2)) @ params["head"]["kernel"]


@pytest.mark.parametrize(
    ("block", "small_images"), [(models.BasicBlock, True), (models.Bottleneck, False)]
)
def test_forward_is_that_of_plain_numpy(block, small_images):
    module = models.ResNet(
        block, (2, 1), 3, width=2, small_images=small_images, num_channels=2, rngs=nnx.Rngs(0)
    )
    net = ss.signed_constant(ss.Network.from_nnx(module), 0)
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda leaf: jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype), net.state
    )
    x = rng.normal(size=(2, 9, 8, 2)).astype(np.float32)
    got = jax.jit(net)(net.layout.unravel(jnp.ones(net.layout.num_weights)), x, state)
    params, state = jax.tree.map(np.asarray, (net.params, state))
    want = plain_forward(params, state, x, (2, 1), small_images)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_and_its_gradients_are_laxs(size, stride):
    x = jax.random.normal(jax.random.key(0), (2, 9, 8, 3))
    kernel = jax.random.normal(jax.random.key(1), (size, size, 3, 4))

    def plain(x, kernel, stride):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            [(size // 2, size // 2)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    def value_and_grads(conv):
        y, pull = jax.vjp(lambda x, kernel: conv(x, kernel, stride), x, kernel)
        return y, pull(jnp.cos(y))

    got, want = value_and_grads(convolution.convolve), value_and_grads(plain)
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-4)
    # What other platforms run, which no test here lowers otherwise.
    elsewhere = value_and_grads(
        lambda x, kernel, stride: convolution._by_platform(x, kernel, stride=stride)
    )
    chex.assert_trees_all_close(elsewhere, want, rtol=1e-4, atol=1e-4)
    lowered = jax.jit(jax.grad(lambda k: jnp.sum(convolution.convolve(x, k, stride) ** 2)))
    assert "convolution" in lowered.trace(kernel).lower(lowering_platforms=("cuda",)).as_text()


def test_bad_sizes():
    with pytest.raises(ValueError, match="must be positive, got 0, 5"):
        models.gem_resnet18(5, width=0, rngs=nnx.Rngs(0))
    module = models.gem_resnet18(5, width=1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"must be \[B, H, W, channels\], got shape \(2, 8, 8\)"):
        module(jnp.zeros((2, 8, 8)))


# --- any conv net of a user's


class LinenCNN(linen.Module):
    """Flax's own MNIST example, in form: convolutions with biases, pooling, two dense layers."""

    @linen.compact
    def __call__(self, x, train: bool):
        for features in (4, 6):
            x = linen.Conv(features, (3, 3))(x)
            x = linen.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            x = linen.avg_pool(linen.relu(x), (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        return linen.Dense(4)(linen.relu(linen.Dense(8)(x)))


class SeparableCNN(nnx.Module):
    """What users build: depthwise convolutions, group norm, dropout, and batch norm with scale."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 6, (3, 3), rngs=rngs)
        self.batch_norm = nnx.BatchNorm(6, momentum=0.9, rngs=rngs)
        self.depthwise = nnx.Conv(6, 6, (3, 3), strides=2, feature_group_count=6, rngs=rngs)
        self.group_norm = nnx.GroupNorm(6, num_groups=2, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.relu(self.batch_norm(self.conv(x)))
        x = jax.nn.relu(self.group_norm(self.depthwise(x)))
        return self.head(self.dropout(x.mean(axis=(1, 2))))


def linen_net():
    module = LinenCNN()
    variables = module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=True)
    return ss.Network.from_linen(module, variables)


def nnx_net():
    return ss.Network.from_nnx(SeparableCNN(nnx.Rngs(0)))


@pytest.mark.parametrize("make", [linen_net, nnx_net])
def test_any_conv_net_learns_and_finds_its_tasks(make):
    """Bright or dark quarters to be told apart; the second task sees negatives."""
    net = ss.signed_constant(make(), 0)
    labels = np.arange(240) % 4
    images = np.random.default_rng(0).integers(0, 60, (240, 8, 8, 1)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        top, left = 4 * (label // 2), 4 * (label % 2)
        image[top : top + 4, left : left + 4] += 150
    config = ss.TrainConfig(
        rule="topk", density=0.5, steps=120, batch_size=32, optimizer="adam", learning_rate=0.05
    )
    store = ss.MaskStore.create(net, 2)
    stream = []
    for i, turned in enumerate((images, 255 - images)):
        data = ss.TaskData(turned, labels, transform=ss.Normalize(0.5, 0.5))
        store = store.append(ss.train_task(jax.random.key(i), net, data, config).task)
        stream.append(data)
    rows = ss.evaluate(net, store, stream)
    assert min(row.accuracy for row in rows) > 0.4  # chance is 0.25
    # Half of each kernel, no more: what is not a kernel is left alone.
    kept = sum(int(leaf.sum()) for leaf in jax.tree.leaves(store.mask(0)))
    assert kept == sum(ss.kept_counts(net.layout, 0.5).values())
    x, _ = stream[1].batch(jnp.arange(4))
    assert ss.one_shot(net, store, x, per_example=False).scores.shape == (2,)
    task = ss.one_shot(net, store, x).task
    assert np.isfinite(ss.predict(net, store, x, task)).all()
