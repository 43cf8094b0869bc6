"""Views that are classes of their own: in training by hand, in prediction by plain NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import supsup_jax as ss
from supsup_jax import baselines, labelled_views
from supsup_jax.inference import evaluation
from supsup_jax.labelled_views import LabelledViews
from tests.conftest import ConvNet, filled_store, random_masks, relu_net


def mirrored(x):
    return x[:, :, ::-1]


def flat_net(outputs, seed=0):
    """A dense net over images of 4x4."""
    base = relu_net((16, 10, outputs), seed)
    return ss.signed_constant(ss.Network(flat_apply, base.params), seed)


def flat_apply(params, x):
    hidden = jax.nn.relu(x.reshape(len(x), -1) @ params["kernel0"])
    return hidden @ params["kernel1"]


def test_each_example_gets_a_view_and_its_class():
    views = LabelledViews(2)
    x = np.random.default_rng(0).standard_normal((400, 4, 4, 1), np.float32)
    y = np.arange(400) % 2
    seen, labels = jax.jit(lambda key: views(key, x, y))(jax.random.key(0))
    turns, classes = np.divmod(np.asarray(labels), 2)
    np.testing.assert_array_equal(classes, y)
    for row, image, turn in zip(np.asarray(seen), x, turns, strict=True):
        np.testing.assert_array_equal(row, np.rot90(image, turn, (0, 1)))
    # 400 draws of 4: each about 100, with a deviation of 8.7.
    assert np.bincount(turns, minlength=4).min() > 50


def test_labels_of_bytes_become_more_classes_than_bytes_hold():
    views, y = LabelledViews(100), np.arange(64, dtype=np.uint8)
    _, labels = views(jax.random.key(0), np.zeros((64, 4, 4, 1), np.float32), y)
    np.testing.assert_array_equal(np.asarray(labels) % 100, y)
    assert labels.max() >= 300


def test_the_average_counts_from_each_view_on():
    net, views = flat_net(10), LabelledViews(2)
    mask = random_masks(net, 1)[0]
    x = np.random.default_rng(0).standard_normal((5, 4, 4, 1), np.float32)
    want = np.zeros((5, 10))
    for v in range(4):
        logits = np.asarray(net(mask, np.rot90(x, v, (1, 2)).copy()))
        for j in range(4):
            block = (v + j) % 4
            want[:, 2 * j : 2 * j + 2] += logits[:, 2 * block : 2 * block + 2] / 4
        want[:, 8:] += logits[:, 8:] / 4
    np.testing.assert_allclose(views.averaged(net)(mask, x), want, rtol=1e-5, atol=1e-6)


def test_every_rule_takes_the_averaged_network_with_the_same_store():
    net, views = flat_net(8), LabelledViews(2)
    masks = random_masks(net, 3)
    store, averaged = filled_store(net, masks, 4), views.averaged(net)
    x = np.random.default_rng(0).standard_normal((6, 4, 4, 1), np.float32)
    tried = ss.oracle(averaged, store, x, ss.MaxLogit(2))
    want = np.stack([np.asarray(averaged(mask, x))[:, :2].max(1) for mask in masks], 1)
    np.testing.assert_allclose(tried.scores[:, :3], want, rtol=1e-5)

    def g(alphas, row):
        mixture = store.mixture(alphas)
        return ss.Superfluous(2)(averaged(mixture, row[None]))[0]

    want = [-jax.grad(g)(jnp.ones(3) / 3, row) for row in x]
    got = ss.one_shot(averaged, store, x, ss.Superfluous(2)).scores[:, :3]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    ids = np.array([0, 1, 2, 2, 1, 0])
    got = ss.predict(averaged, store, x, ids)
    want = [np.asarray(averaged(masks[i], row[None]))[0] for i, row in zip(ids, x, strict=True)]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_statistics_of_a_batch_are_those_of_all_its_views():
    module = ConvNet(num_outputs=8, rngs=nnx.Rngs(0))
    net = ss.signed_constant(ss.Network.from_nnx(module), 0)
    mask = random_masks(net, 1)[0]
    x = np.random.default_rng(0).standard_normal((6, 8, 8, 1), np.float32)
    every = np.concatenate([np.rot90(x, v, (1, 2)) for v in range(4)])
    _, want = net.train_logits(mask, net.state, every)
    _, got = LabelledViews(2).averaged(net).train_logits(mask, net.state, x)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_equal_views_share_a_program():
    net, traces = flat_net(8), []

    def turned(x):
        traces.append(None)
        return x[:, ::-1]

    store = filled_store(net, random_masks(net, 2), 2)
    x = np.ones((3, 4, 4, 1), np.float32)
    views = [LabelledViews(4, (labelled_views.unturned, turned)) for _ in range(2)]
    assert views[0] == views[1]
    ss.oracle(views[0].averaged(net), store, x)
    seen = len(traces)
    ss.oracle(views[1].averaged(net), store, x)
    assert len(traces) == seen


def test_training_sees_turned_images_under_their_class():
    """One step by SGD from given scores is the gradient on the turned batch."""
    net, views = flat_net(8), LabelledViews(2)
    rng = np.random.default_rng(0)
    data = ss.TaskData(rng.standard_normal((16, 4, 4, 1), np.float32), rng.integers(0, 2, 16))
    config = ss.TrainConfig(
        steps=1, batch_size=16, shuffle=False, optimizer="sgd", learning_rate=1.0, views=views
    )
    start = net.layout.tree(
        [rng.standard_normal(s).astype(np.float32) for s in net.layout.shapes.values()]
    )

    def loss(scores, x, y):
        mask = jax.tree.map(ss.threshold_mask, scores)
        return config.loss(net(mask, x), y).mean()

    # The key of the draw is the library's own; that it is one of all draws is what is checked.
    result = ss.train_task(jax.random.key(3), net, data, config, start)
    moved = jax.tree.map(lambda a, b: a - b, start, result.scores)
    from supsup_jax import prng

    key = prng.purpose_key(jax.random.key(3), "augment")
    key = jax.random.fold_in(prng.purpose_key(key, "views"), 0)
    x, y = views(key, data.inputs, data.labels)
    assert len(set(np.asarray(y).tolist())) > 2
    want = jax.grad(loss)(start, x, y)
    for one, other in zip(jax.tree.leaves(moved), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


def test_batches_and_many_tasks_learn_with_views():
    net, views = flat_net(8), LabelledViews(2)
    rng = np.random.default_rng(0)
    data = ss.TaskData(rng.standard_normal((32, 4, 4, 1), np.float32), rng.integers(0, 2, 32))
    config = ss.TrainConfig(
        steps=4, batch_size=8, shuffle=False, optimizer="sgd", learning_rate=0.1, views=views
    )
    key = jax.random.key(0)
    whole = ss.train_task(key, net, data, config)
    parts = [(data.inputs[i : i + 8], data.labels[i : i + 8]) for i in range(0, 32, 8)]
    batched = ss.train_on_batches(key, net, parts, config)
    np.testing.assert_allclose(batched.loss, whole.loss, rtol=1e-5)
    several = ss.train_tasks(key[None], net, data, config)
    np.testing.assert_allclose(several.loss[0], whole.loss, rtol=1e-5)


def test_labels_are_told_by_averaged_views_alone():
    @dataclasses.dataclass(frozen=True)
    class Own:
        num_labels: int = 1

        def __call__(self, params, x):
            return x @ params["w"]

    net = ss.Network(Own(), {"w": np.ones((16, 8))})
    assert evaluation.labels_told(net) is None
    assert evaluation.labels_told(LabelledViews(2).averaged(net)) == 2


def test_what_does_not_fit_is_refused():
    net = flat_net(8)
    images = np.ones((4, 4, 4, 1), np.float32)
    train = functools.partial(ss.train_task, jax.random.key(0))

    def config(views, **more):
        return ss.TrainConfig(steps=1, batch_size=4, views=views, **more)

    with pytest.raises(ValueError, match="4 views of 3 labels need 12 outputs, the network has 8"):
        train(net, ss.TaskData(images, np.zeros(4, int)), config(LabelledViews(3)))
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\)"):
        train(net, ss.TaskData(images, np.array([0, 1, 2, 1])), config(LabelledViews(2)))
    weighted = ss.losses.CrossEntropy(weights=(1, 2))
    with pytest.raises(ValueError, match="weights of 2 classes, got a label of 7"):
        train(net, ss.TaskData(images, np.zeros(4, int)), config(LabelledViews(2), loss=weighted))
    small, key = flat_net(4), jax.random.key(0)
    baseline, weights = baselines.upper_bound(small), baselines.shared_weights(small, key)
    with pytest.raises(ValueError, match="4 views of 2 labels need 8 outputs, the network has 4"):
        data = ss.TaskData(images, np.zeros(4, int))
        baselines.learn(key, baseline, weights, data, config(LabelledViews(2)), first=True)
    oblong = ss.TaskData(np.ones((4, 2, 8, 1), np.float32), np.zeros(4, int))
    with pytest.raises(ValueError, match=r"a view must keep the inputs' shapes .* quarter_turn"):
        train(net, oblong, config(LabelledViews(2)))
    with pytest.raises(ValueError, match="two functions of x or more"):
        LabelledViews(2, (mirrored,))
    with pytest.raises(ValueError, match="num_labels must be an int of at least 1"):
        LabelledViews(0)
    with pytest.raises(TypeError, match="views must be a LabelledViews"):
        config(mirrored)
    numbers = ss.TaskData(images, np.zeros(4, np.float32))
    with pytest.raises(TypeError, match="labels must hold integers"):
        train(net, numbers, config(LabelledViews(2), loss=ss.losses.gaussian))
    small = LabelledViews(4).averaged(net)
    with pytest.raises(ValueError, match="need 16 outputs"):
        small(random_masks(net, 1)[0], images)


def test_a_network_of_averaged_views_tells_its_labels():
    """Its other outputs are views of the same labels, and no answers."""
    views = ss.LabelledViews(3, (lambda x: x, lambda x: -x))
    net = ss.Network(lambda params, x: x @ params["kernel"], {"kernel": jnp.eye(6)})
    asked = views.averaged(net)
    masks = ss.MaskStore.create(asked, 1).append(random_masks(asked, 1)[0])
    x = np.random.default_rng(0).standard_normal((40, 6), np.float32)
    data = [ss.TaskData(x, np.arange(40) % 3)]
    told, labels, every = (
        ss.evaluate(asked, masks, data, metric=metric)[0].accuracy
        for metric in (None, ss.LabelAccuracy(3), evaluation.is_right)
    )
    assert told == labels > every
