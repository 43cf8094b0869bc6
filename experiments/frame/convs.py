"""What convolutions cost here beside the same work by plain JAX and optax, in one process."""

import functools
import itertools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import supsup_jax as ss
from experiments.frame import bench
from supsup_jax import models


class ConvNet(nnx.Module):
    """As a user writes it: three convolutions with batch norm, and a linear classifier."""

    def __init__(self, widths, num_outputs=10, *, rngs):
        pairs = list(itertools.pairwise(widths))
        self.convs = nnx.List(
            [nnx.Conv(num_in, out, (3, 3), strides=2, rngs=rngs) for num_in, out in pairs]
        )
        self.norms = nnx.List([nnx.BatchNorm(width, rngs=rngs) for width in widths[1:]])
        self.head = nnx.Linear(widths[-1], num_outputs, rngs=rngs)

    def __call__(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = jax.nn.relu(norm(conv(x)))
        return self.head(x.mean((1, 2)))


def measure(tiny: bool, rounds: int) -> list[dict]:
    """Of each piece of work its seconds here, by hand, and their ratio."""
    widths = (3, 4, 4) if tiny else (3, 32, 64, 64)
    net = ss.Network.from_nnx(ConvNet(widths, rngs=nnx.Rngs(0)))
    steps, batch = (2, 8) if tiny else (3, 128)
    depths, width = ((1,), 2) if tiny else ((2, 2, 2, 2), 20)
    make = functools.partial(models.ResNet, models.BasicBlock, depths, 5, small_images=True)
    resnet = ss.Network.from_nnx(make(width=width, rngs=nnx.Rngs(0)))
    return [
        _training("a conv net's step", net, 2 if tiny else 30, batch, rounds),
        _training("a ResNet's step", resnet, steps, batch, rounds),
        _decisions(net, 16 if tiny else 128, 3 if tiny else 16, rounds),
    ]


def _row(name, seconds, count):
    each = {key: value / count for key, value in seconds.items()}
    return {"name": name, "seconds": each, "ratio": each["here"] / each["by_hand"]}


def _training(name, net, steps, batch, rounds):
    """train_task beside steps on all weights, no masks, which the host calls one by one."""
    key = jax.random.key(0)
    x = jax.random.normal(key, (4 * batch, 32, 32, 3))
    y = jnp.arange(len(x)) % 5
    config = ss.TrainConfig(steps=steps, batch_size=batch)
    optimizer = optax.rmsprop(1e-4, decay=0.99)

    @jax.jit
    def step(params, state, moments, x, y):
        def loss(params):
            logits, new = net.apply(params, state, x, True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), new

        grads, state = jax.grad(loss, has_aux=True)(params)
        updates, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), state, moments

    def by_hand():
        carry = net.params, net.state, optimizer.init(net.params)
        for i in range(steps):
            start = i % 4 * batch
            carry = step(*carry, x[start : start + batch], y[start : start + batch])
        return carry

    here = functools.partial(ss.train_task, key, net, ss.TaskData(x, y), config)
    return _row(name, bench.medians({"here": here, "by_hand": by_hand}, rounds), steps)


def _decisions(net, num, num_tasks, rounds):
    """one_shot beside a jitted gradient of each example alone, its statistics given."""
    store = ss.MaskStore.create(net, num_tasks)
    for i in range(num_tasks):
        shapes = net.layout.shapes.values()
        draw = functools.partial(jax.random.bernoulli, jax.random.key(i), 0.5)
        store = store.append(ss.Task(net.layout.tree([draw(shape) for shape in shapes]), net.state))
    x = jax.random.normal(jax.random.key(2), (num, 32, 32, 3))
    mixture, alone = store.mixture(), [x[i : i + 1] for i in range(num)]

    @jax.jit
    def gradient(mixture, x):
        return jax.grad(lambda mixture: ss.entropy(net(mixture, x, net.state)).mean())(mixture)

    measures = {
        "here": lambda: ss.one_shot(net, store, x),
        "by_hand": lambda: [gradient(mixture, each) for each in alone],
    }
    return _row(f"a decision of {num}", bench.medians(measures, rounds), num)


def show(rows: list[dict]) -> None:
    print("convolutions             here, ms   by hand, ms   ratio")
    for row in rows:
        here, by_hand = (1e3 * row["seconds"][key] for key in ("here", "by_hand"))
        print(f"{row['name']:20} {here:12.2f} {by_hand:13.2f} {row['ratio']:7.2f}")
