"""Inputs that are no images: tokens, trees of arrays, arrays of others, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import supsup_jax as ss
from tests.conftest import filled_store, random_masks

SIZES = {"embedding": (11, 6), "w1": (6, 8), "w2": (8, 5)}


def bag(params, x):
    """Logits of the mean of the embeddings of {"ids": [B, L], "mask": [B, L]}."""
    rows = params["embedding"][x["ids"]] * x["mask"][..., None]
    mean = rows.sum(1) / x["mask"].sum(1, keepdims=True)
    return jax.nn.relu(mean @ params["w1"]) @ params["w2"]


def tokens_alone(params, ids):
    return bag(params, {"ids": ids, "mask": jnp.ones(ids.shape, bool)})


@pytest.fixture(scope="module")
def text():
    rng = np.random.default_rng(0)
    params = {name: np.zeros(shape, np.float32) for name, shape in SIZES.items()}
    net = ss.signed_constant(ss.Network(bag, params), 0)
    ids, lengths = rng.integers(0, 11, (24, 7)), rng.integers(1, 8, 24)
    x = {"ids": ids.astype(np.int32), "mask": np.arange(7) < lengths[:, None]}
    return net, filled_store(net, random_masks(net, 4), capacity=4), x


forward = jax.jit(lambda net, mask, x: net(mask, x))
slope_of = jax.jit(jax.grad(lambda mix, net, one: ss.entropy(net(mix, one))[0]))


def alone(net, store, x, row):
    """-dF/da [T] of one row, by the chain rule written out: one mask after another."""
    slope = slope_of(store.mixture(), net, {name: leaf[row : row + 1] for name, leaf in x.items()})
    masks = [store.mask(i) for i in range(4)]
    return [-sum(np.vdot(slope[k], np.asarray(m[k], np.float32)) for k in slope) for m in masks]


@pytest.mark.parametrize("rows", [3, 24])
def test_one_gradient_of_a_tree_of_arrays(text, rows):
    net, store, x = text
    some = {name: leaf[:rows] for name, leaf in x.items()}
    found = ss.one_shot(net, store, some)
    for row in (0, rows - 1):
        np.testing.assert_allclose(
            found.scores[row], alone(net, store, x, row), rtol=1e-4, atol=1e-6
        )
    together = ss.one_shot(net, store, some, per_example=False)
    np.testing.assert_allclose(together.scores, found.scores.mean(0), rtol=1e-4, atol=1e-6)


def test_every_rule_and_predict_take_trees_and_tokens(text):
    net, store, x = text
    want = np.stack([forward(net, store.mask(i), x) for i in range(4)])
    task = np.arange(24) % 4
    np.testing.assert_allclose(
        ss.predict(net, store, x, task), want[task, np.arange(24)], rtol=1e-5, atol=1e-6
    )
    scores = -np.stack([ss.entropy(each) for each in want], axis=1)
    np.testing.assert_allclose(ss.oracle(net, store, x).scores, scores, rtol=1e-4, atol=1e-6)
    assert ss.rerank(net, store, x, best=4).task.tolist() == scores.argmax(1).tolist()
    assert ss.binary_search(net, store, x).scores.shape == (24, 4)
    bare = ss.Network(tokens_alone, net.params)
    store = filled_store(bare, [store.mask(i) for i in range(4)], capacity=4)
    full = {"ids": x["ids"], "mask": np.ones((24, 7), bool)}
    np.testing.assert_allclose(
        ss.one_shot(bare, store, x["ids"]).scores,
        ss.one_shot(net, filled_store(net, [store.mask(i) for i in range(4)], 4), full).scores,
        rtol=1e-4,
        atol=1e-6,
    )


def test_tokens_train_and_are_evaluated_under_every_protocol(text):
    net, store, x = text
    data = ss.TaskData(x, np.arange(24) % 5, transform=None)
    config = ss.TrainConfig(steps=3, batch_size=8, learning_rate=0.1)
    learned = ss.train_task(jax.random.key(0), net, data, config)
    assert np.isfinite(learned.loss).all()
    for protocol in ("given", "paper", "per_example", "batch-4"):
        rows = ss.evaluate(net, store, [data] * 4, protocol)
        assert [row.task for row in rows] == [0, 1, 2, 3]
    named = ss.evaluate(net, store, [data] * 4, "per_example")[0].inferred
    np.testing.assert_array_equal(named, ss.one_shot(net, store, x).task)


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.int32, np.int64])
def test_integers_that_are_no_bytes_need_a_rule(text, dtype):
    net, _, x = text
    bare = ss.Network(tokens_alone, net.params)
    data = ss.TaskData(x["ids"].astype(dtype), np.zeros(24, np.int32))
    with pytest.raises(TypeError, match=r"inputs of dtype u?int\d+ need a rule: transform=None"):
        ss.train_task(jax.random.key(0), bare, data)
    passed, _ = dataclasses.replace(data, transform=None).batch(np.arange(3))
    np.testing.assert_array_equal(passed, x["ids"][:3])


def test_each_dtype_under_the_default_rule_and_normalize():
    bytes_, floats = np.array([[0, 51, 255]], np.uint8), np.array([[0.0, 0.2, 1.0]], np.float32)
    both = ss.TaskData({"image": bytes_, "mask": bytes_ > 0, "size": floats}, np.zeros(1, int))
    seen, _ = both.batch(np.arange(1))
    np.testing.assert_allclose(seen["image"], floats, rtol=1e-6)
    np.testing.assert_allclose(seen["size"], floats)
    assert seen["mask"].dtype == bool
    for images in (bytes_, floats):
        got = ss.Normalize(0.5, 0.5)(jnp.asarray(images))
        np.testing.assert_allclose(got, [[-1, -0.6, 1]], rtol=1e-5)
    with pytest.raises(TypeError, match="Normalize needs scale= for pixels of int32"):
        ss.Normalize(0.5, 0.5)(jnp.arange(3)[None])
    np.testing.assert_allclose(ss.Normalize(0, 1, 2)(jnp.arange(3)[None]), [[0, 0.5, 1]])


class Tensor:
    """What torch's tensors are to us: something NumPy takes for an array."""

    def __init__(self, array):
        self._array = array

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self._array, dtype)


def test_arrays_of_other_libraries():
    x, y = np.eye(4, 6, dtype=np.float32), np.arange(4)
    data = ss.TaskData(Tensor(x), Tensor(y))
    assert isinstance(data.inputs, jax.Array)
    np.testing.assert_array_equal(data.inputs, x)
    for batch in ((x, y), [Tensor(x), Tensor(y)], {"image": x, "label": y}):
        data = ss.types.as_data(batch, "batch 0")
        np.testing.assert_array_equal(data.inputs, x)
        np.testing.assert_array_equal(data.labels, y)
    data = ss.types.as_data({"ids": y[:, None], "pixels": x.astype(np.uint8), "label": y}, "it")
    seen, _ = data.batch(np.arange(4))  # tokens pass, bytes are scaled
    np.testing.assert_array_equal(seen["ids"], y[:, None])
    np.testing.assert_allclose(seen["pixels"], x / 255)
    with pytest.raises(
        TypeError, match=r"batch 3 must be a TaskData, .* got a dict of \['a', 'b'\]"
    ):
        ss.types.as_data({"a": x, "b": y}, "batch 3")
    with pytest.raises(ValueError, match=r"inputs must fit into int32, got .*1099511627776"):
        ss.TaskData(np.array([[2**40]]), y[:1])
    with pytest.raises(TypeError, match="labels must hold numbers, got dtype <U3"):
        ss.TaskData(x, np.array(["cat", "dog", "cat", "dog"]))


def test_bad_trees(text):
    net, store, x = text
    short = {**x, "mask": x["mask"][:3]}
    with pytest.raises(ValueError, match=r"x must be \[B, ...\] with one B, got shape .*'mask'"):
        ss.one_shot(net, store, short)
    with pytest.raises(ValueError, match=r"inputs must be \[N, ...\]"):
        ss.TaskData(short, np.zeros(24, int)).check()
    with pytest.raises(ValueError, match="a view is of the pixels of one array"):
        ss.TaskData(x, np.zeros(24, int), view=np.arange(7)).check()
    with pytest.raises(TypeError, match="got uint8"):
        ss.one_shot(net, store, {**x, "ids": x["ids"].astype(np.uint8)})
    with pytest.raises(TypeError, match=r"x must be a float array, or tokens, .* got dict"):
        ss.one_shot(net, store, {"ids": "word"})


def test_channels_first_are_named():
    images = np.zeros((8, 3, 16, 16), np.uint8)

    def apply(params, x):
        return jax.lax.conv_general_dilated(
            x, params["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ).mean((1, 2))

    net = ss.Network(apply, {"w": np.ones((3, 3, 3, 5), np.float32)})
    data = ss.TaskData(images, np.zeros(8, int))
    with pytest.raises(ValueError, match=r"\[B, 3, 16, 16\]: it takes .*transpose\(inputs"):
        ss.train_task(jax.random.key(0), net, data)


def test_inputs_of_another_width_are_told_what_is_taken(problem):
    net, store, x = problem
    wide = np.zeros((8, 7), np.float32)
    match = r"fails on inputs float32 \[B, 7\]: it takes float32 \[B, 6\]"
    data = ss.TaskData(wide, np.zeros(8, int))
    for call in (
        lambda: ss.train_task(jax.random.key(0), net, data),
        lambda: ss.one_shot(net, store, wide),
        lambda: ss.predict(net, store, wide, 0),
        lambda: ss.evaluate(net, store, [data] * 5, metric=lambda logits, y: logits[:, 0]),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(ValueError, match=r"\[B, 6\]: inputs.reshape\(len\(inputs\), -1\)"):
        ss.one_shot(net, store, x.reshape(20, 2, 3))


class Named(nnx.Module):
    def __init__(self, *, rngs):
        self.head = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, ids, mask):
        return self.head(ids * mask)


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        (lambda x: {"ids": x}, "{ids: float32 .*missing .* argument: 'mask'"),
        (lambda x: {"ids": x, "m": x}, r"takes \['ids', 'mask'\], none of which is \['m'\]"),
        (lambda x: (x, x), r"\(float32 \[B, 3\], float32 \[B, 3\]\): .* argument: 'mask'"),
    ],
)
def test_trees_that_are_no_arguments(inputs, match):
    net = ss.Network.from_nnx(Named(rngs=nnx.Rngs(0)))
    data = ss.TaskData(inputs(np.ones((4, 3), np.float32)), np.zeros(4, int))
    with pytest.raises(ValueError, match=match):
        ss.train_task(jax.random.key(0), net, data)
