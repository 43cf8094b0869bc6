"""Not run: what type checkers must accept of the public surface, as `make lint` sees to."""

from pathlib import Path

import jax
import numpy as np
import optax

import supsup_jax as ss
from supsup_jax import data


def decide(net: ss.Network, store: ss.MaskStore, x: np.ndarray, mesh: jax.sharding.Mesh) -> float:
    """NumPy arrays, batches of several, every kind of store."""
    for held in (store, ss.shard(store, mesh)):
        belief = ss.one_shot(net, held, x, ss.Superfluous(10))
        belief = ss.one_shot(net, held, {"ids": x}, per_example=False, error=1e-6)
        belief = ss.rerank(net, held, jax.numpy.asarray(x), judge=ss.max_logit)
        ss.predict(net, held, x, belief.task)
        ss.predict(net, held, x, np.zeros(len(x), np.int32))
        ss.predict(net, held, x, 3)
        ss.alpha_gradient(net, held, x, alphas=np.full(3, 1 / 3, np.float32))
    sure = ss.rejection.calibrate(belief, 0.01)
    return float(ss.rejection.reject(belief, sure).scores.max())


def learn(net: ss.Network, x: np.ndarray, y: np.ndarray, path: str) -> ss.MaskStore:
    """Optimizers by name or by optax, masks of NumPy, paths of either kind."""
    store = ss.MaskStore.create(net, capacity=2)
    for config in (ss.TrainConfig(), ss.TrainConfig(optimizer=optax.adamw(1e-3))):
        task = ss.TaskData(x, y, transform=ss.Normalize(0.5, 0.25))
        store = store.append(ss.train_task(jax.random.key(0), net, task, config).task)
    store = store.replace(0, store.task(1)).remove(1)
    with ss.DiskStore.open(Path(path) / "tasks", net, mode="a") as disk:
        disk.extend(store, names=["a"])
        ss.one_shot_streamed(net, disk.parts(), x)
        store = disk.load(disk.ids)
    stream = data.SplitStream(data.load_dataset("digits"), np.full(5, 2), np.arange(10))
    ss.evaluate(net, store, stream.test, tasks=np.arange(2), ids=np.zeros(5, int))
    store.save(path, overwrite=True)
    return ss.MaskStore.load(path, net)
