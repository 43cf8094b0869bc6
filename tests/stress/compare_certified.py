"""Certified decisions against exact ones: do both name the same task, and at what price?

    python -m tests.stress.compare_certified --run RUN --data-dir DIR

Takes the masks that a run of experiments.permuted has learned, fills up with synthetic ones
(independent fair bits) to --tasks, and lets test images of the learned tasks decide, each for
itself, by both implementations of ss.one_shot and both objectives. Writes compare_certified.json
to --out, and ends with a table. 10,000 decisions among 2,500 tasks take 8 minutes on 2 CPU cores.
"""

import dataclasses
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

import supsup_jax as ss
from experiments.frame import bench
from experiments.frame import config as frame
from experiments.frame.run import UsageError, usage_errors, writable_folder, write_result
from supsup_jax import data

BATCH = 128


@dataclasses.dataclass(frozen=True)
class Args:
    """Compares the certified with the exact implementation on a run's masks."""

    run: Path | None = None
    """Folder of a run of experiments.permuted, finished or not."""
    data_dir: Path | None = None
    tasks: int = 2500
    decisions: int = 10_000
    """Half of them by entropy, half by the paper's G."""
    out: Path = Path("runs/compare_certified")
    tiny: bool = False
    """3 tasks of digits learned in 50 steps each, 300 in all, 256 decisions."""


def learned_masks(args: Args) -> tuple[ss.Network, ss.MaskStore, data.ViewStream]:
    """A run's network, masks and stream."""
    if args.tiny:
        config = frame.tiny(frame.Config("digits", "lenet_300_100", 100, 3, (3,)))
    else:
        if args.run is None:
            raise UsageError("--run must name a run of experiments.permuted (or pass --tiny)")
        config = frame.saved_config(args.run)
    dataset = frame.load(config, args)
    net = frame.dense_network(config, dataset)
    stream = frame.views(config, dataset)
    if not args.tiny:
        with ss.DiskStore.open(args.run / "tasks", net) as disk:
            return net, disk.load(), stream
    store = ss.MaskStore.create(net, config.tasks)
    for i in range(config.tasks):
        result = ss.train_task(jax.random.key(i), net, stream.train[i], config.train)
        store = store.append(result.task, donate=True)
    return net, store, stream


def compare(net, store, stream, num_learned, objective, batches, rng) -> dict:
    """Counts over `batches` batches of images, each batch of one learned task, tasks in turn."""
    counts = {"decisions": 0, "same": 0, "exact_right": 0, "certified_right": 0}
    seconds = {"exact": 0.0, "certified": 0.0}
    for n in tqdm(range(-1, batches), unit="batch", leave=False):
        i = max(n, 0) * num_learned // batches
        test = stream.test[i]
        index = jnp.asarray(rng.integers(test.num_examples, size=BATCH))
        x, _ = test.batch(index)
        found = {}
        for name, implementation in (("exact", None), ("certified", "certified")):
            start = time.perf_counter()
            belief = ss.one_shot(net, store, x, objective, implementation=implementation)
            found[name] = np.asarray(belief.task)
            if n >= 0:  # the first batch compiles and is not counted
                seconds[name] += time.perf_counter() - start
        if n >= 0:
            counts["decisions"] += BATCH
            counts["same"] += int((found["exact"] == found["certified"]).sum())
            counts["exact_right"] += int((found["exact"] == i).sum())
            counts["certified_right"] += int((found["certified"] == i).sum())
    return {**counts, "seconds": seconds}


def main(args: Args) -> dict:
    tasks, decisions = (300, 256) if args.tiny else (args.tasks, args.decisions)
    with usage_errors():
        if tasks < 1 or decisions < 1:
            raise UsageError("--tasks and --decisions must be at least 1")
        net, learned, stream = learned_masks(args)
        writable_folder(args.out)
        num_learned = min(tasks, int(learned.num_tasks))
        if not num_learned:
            raise UsageError(f"--run {args.run} has saved no task yet")
    store = bench.random_store(net, tasks, learned)
    rng = np.random.default_rng(0)
    objectives = {"entropy": ss.entropy, "superfluous": ss.Superfluous(stream.dataset.num_labels)}
    batches = -(-decisions // (BATCH * len(objectives)))
    rows = {
        name: compare(net, store, stream, num_learned, objective, batches, rng)
        for name, objective in objectives.items()
    }
    result = write_result(
        args.out / "compare_certified.json",
        run=str(args.run),
        dataset=stream.dataset.name,
        weights=net.layout.num_weights,
        tasks=tasks,
        learned=num_learned,
        rows=rows,
    )
    print(f"{tasks} tasks, {num_learned} of them learned, {net}, {result['device']}")
    print("objective    decisions  same task  right: exact  certified  seconds: exact  certified")
    for name, row in rows.items():
        print(
            f"{name:11}{row['decisions']:11}{row['same']:11}{row['exact_right']:14}"
            f"{row['certified_right']:11}{row['seconds']['exact']:16.1f}"
            f"{row['seconds']['certified']:11.1f}"
        )
    return result


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
