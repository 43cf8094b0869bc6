"""What one of two processes does for test_hosts: python -m tests.on_hosts SCENE ID PORT FOLDER."""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np

jax.config.update("jax_numpy_rank_promotion", "raise")

import supsup_jax as ss  # noqa: E402
from experiments import permuted  # noqa: E402
from experiments.frame import hosts, loop, run  # noqa: E402
from tests.conftest import random_masks, relu_net  # noqa: E402

NUM_TASKS = 5
PRESET = dataclasses.replace(
    permuted.PRESETS["digits"], protocols=("per_example",), objectives=("entropy",)
)
# `permuted --tiny`, by one protocol and objective.
EXPERIMENT = dataclasses.replace(permuted.EXPERIMENT, presets={"digits": PRESET})


def main(out: Path, **args) -> dict:
    return loop.main(EXPERIMENT, permuted.Args(tiny=True, out=out, **args))


def store(folder: Path) -> None:
    """Every part of a store over both processes against the same store on this one."""
    net = relu_net((6, 6, 5))
    masks = random_masks(net, NUM_TASKS)
    alone = ss.MaskStore.create(net, NUM_TASKS)
    for mask in masks:
        alone = alone.append(mask)
    if jax.process_index() == 0:
        with ss.DiskStore.open(folder / "tasks", net, "x") as disk:
            disk.extend(alone)
    hosts.meet("the tasks are there")

    mesh = jax.make_mesh((jax.device_count(),), ("task",))
    with ss.DiskStore.open(folder / "tasks", net) as disk:
        read, fields = [], disk._fields
        disk._fields = lambda *like: read.append(like[-1]) or fields(*like)
        loaded = disk.load(mesh=mesh)
    # Four devices of two slots: process 0 holds tasks 0 to 3, process 1 the last one.
    assert read == ([0, 1, 2, 3], [4])[jax.process_index()], read
    shards = [shard.data.size for shard in loaded.bank.words.addressable_shards]
    assert len(shards) == 2 and 2 * sum(shards) == loaded.bank.words.size

    x = jax.random.normal(jax.random.key(0), (4, 6))
    want = ss.one_shot(net, alone, x)
    grown = ss.shard(loaded, mesh).append(masks[0]).append(masks[1])
    for many in (loaded, ss.shard(alone, mesh), grown):
        np.testing.assert_array_equal(np.asarray(many.task(3).mask["kernel0"]), masks[3]["kernel0"])
        if many is not grown:
            np.testing.assert_array_equal(many.counts(), alone.counts())
            np.testing.assert_array_equal(ss.one_shot(net, many, x).task, want.task)
    assert int(grown.num_tasks) == NUM_TASKS + 2
    np.testing.assert_array_equal(np.asarray(grown.task(6).mask["kernel0"]), masks[1]["kernel0"])
    back = grown.gathered()
    np.testing.assert_array_equal(back.task(5).mask["kernel0"], masks[0]["kernel0"])

    data = ss.TaskData(x, np.array([0, 1, 2, 3]))
    config = ss.TrainConfig(steps=3, batch_size=4)
    keys = jax.random.split(jax.random.key(1), 4)
    learned = ss.train_tasks(keys, net, data, config, mesh=mesh)
    here = ss.train_tasks(keys, net, data, config)
    for shard in learned.task.mask["kernel0"].addressable_shards:
        np.testing.assert_array_equal(shard.data, here.task.mask["kernel0"][shard.index])
    rows = jax.make_mesh((jax.device_count(),), ("data",))
    learned = ss.train_task(keys[0], net, data, config, mesh=rows)
    np.testing.assert_allclose(learned.loss, here.loss[0], rtol=1e-5)


def whole(folder: Path) -> None:
    """A whole run, of which process 0 alone may write."""
    if jax.process_index() != 0:
        run.write_json = loop.write_csv = ss.DiskStore.append = None
    main(folder / "run", resume=True)


def alone(folder: Path) -> None:
    """A run whose folder this process alone can see."""
    main(folder / f"run{jax.process_index()}")


if __name__ == "__main__":
    scene, process, port, folder = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 2 if scene == "store" else 1)
    with hosts.joined(hosts.Args(f"127.0.0.1:{port}", 2, int(process))):
        globals()[scene](Path(folder))
