import functools
import json
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import supsup_jax as ss
from supsup_jax import models
from tests.conftest import GOLDEN
from tests.test_masks import as_ours, layout_of

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
    depths = 1 if small_images else 2, 1  # with each kind of shortcut
    rng = np.random.default_rng(0)
    make = functools.partial(models.ResNet, width=2, small_images=small_images, num_channels=2)
    module = nnx.eval_shape(lambda: make(block, depths, 3, rngs=nnx.Rngs(0)))
    graphdef, *drawn = nnx.split(module, nnx.Param, ...)
    params, state = jax.tree.map(
        lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32), drawn
    )
    params = jax.tree.map(lambda leaf: leaf - 1, params)
    x = rng.normal(size=(2, 9, 8, 2)).astype(np.float32)

    @jax.jit
    def forward(params, state, x):
        module = nnx.merge(graphdef, params, state)
        module.eval()
        return module(x)

    got = forward(params, state, x)
    want = plain_forward(*map(nnx.to_pure_dict, (params, state)), x, depths, small_images)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_bad_sizes():
    with pytest.raises(ValueError, match="must be positive, got 0, 5"):
        models.gem_resnet18(5, width=0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"must be \[B, H, W, channels\], got shape \(2, 8, 8\)"):
        nnx.eval_shape(lambda: models.gem_resnet18(5, rngs=nnx.Rngs(0))(jnp.zeros((2, 8, 8))))


# --- any conv net of a user's


class LinenCNN(linen.Module):
    """Flax's own MNIST example, in form: a convolution with bias, pooling, two dense layers."""

    @linen.compact
    def __call__(self, x, train: bool):
        x = linen.Conv(4, (3, 3))(x)
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
    """Its params ones, but for what signed_constant draws."""
    module, x = LinenCNN(), jnp.zeros((1, 8, 8, 1))
    shapes = jax.eval_shape(functools.partial(module.init, train=True), jax.random.key(0), x)
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
    return ss.Network.from_linen(module, ones)


def nnx_net():
    return ss.Network.from_nnx(nnx.jit(lambda: SeparableCNN(nnx.Rngs(0)))())


@pytest.mark.parametrize("make", [linen_net, nnx_net])
def test_any_conv_net_goes_all_the_way(make):
    """Trained, stored, found and judged; what each step gives is what its parts say."""
    net = ss.signed_constant(make(), 0)
    rng = np.random.default_rng(0)
    config = ss.TrainConfig(rule="topk", density=0.5, steps=3, batch_size=8, shuffle=False)
    normalize = ss.Normalize(0.5, 0.5)
    store, stream = ss.MaskStore.create(net, 2), []
    for i in range(2):
        images = rng.integers(0, 256, (16, 8, 8, 1)).astype(np.uint8)
        stream.append(ss.TaskData(images, np.arange(16) % 4, transform=normalize))
        result = ss.train_task(jax.random.key(i), net, stream[i], config)
        assert np.isfinite(result.loss).all()
        # Half of each kernel, no more: what is not a kernel is left alone.
        kept = [int(leaf.sum()) for leaf in jax.tree.leaves(result.task.mask)]
        assert kept == list(ss.kept_counts(net.layout, 0.5).values())
        store = store.append(result.task)
    x, y = ((images / 255 - 0.5) / 0.5).astype(np.float32), np.asarray(stream[1].labels)
    belief = ss.one_shot(net, store, x, per_example=False)
    assert belief.scores.shape == (2,) and np.isfinite(belief.scores).all()
    assert int(belief.task) == np.argmax(belief.scores)
    for i, row in enumerate(ss.evaluate(net, store, [stream[1]] * 2)):
        logits = np.asarray(ss.predict(net, store, x, np.full(16, i)))
        assert np.isfinite(logits).all()
        # But for one image, which may lie where rounding decides.
        assert abs(row.accuracy - (logits.argmax(-1) == y).mean()) < 1.5 / 16
