"""Races against exact scores: do they name the same task, and of how many bits?

    python -m tests.stress.compare_races --run RUN --data-dir DIR

Takes the masks that a run of experiments.permuted has learned, fills up with others of independent
bits, as often 1 as in those, to --tasks, and lets test images of the learned tasks decide: by both
objectives, one image at a time and --images together. Each gradient goes through the exact
product, the certified race, and that with --error. Writes compare_races.json to --out after each
kind of decision, and ends with a table. 100,000 decisions among 600 tasks take about an hour on 2
CPU cores.
"""

import dataclasses
import functools
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
from supsup_jax.inference import one_shot

AT_ONCE = 64  # decisions in a call, all of images of one task


@dataclasses.dataclass(frozen=True)
class Args:
    """Compares certified and likely answers with the exact ones on a run's masks."""

    run: Path | None = None
    """Folder of a run of experiments.permuted, finished or not."""
    data_dir: Path | None = None
    tasks: int = 2500
    decisions: int = 10_000
    """Of all four kinds together: half by entropy, half by the paper's G."""
    images: int = 32
    """Of a decision of several: an eighth of all decisions."""
    error: float = 1e-6
    out: Path = Path("runs/compare_races")
    tiny: bool = False
    """3 tasks of digits learned in 50 steps each, 100 in all, 256 decisions."""


def learned_masks(args: Args) -> tuple[ss.Network, ss.MaskStore, data.ViewStream]:
    """A run's network, masks and stream."""
    if not args.tiny:
        if args.run is None:
            raise UsageError("--run must name a run of experiments.permuted (or pass --tiny)")
        return bench.learned(args.run, args)
    config = frame.tiny(frame.Config("digits", "lenet_300_100", 100, 3, (3,)))
    dataset = frame.load(config, args)
    net = frame.dense_network(config, dataset)
    stream = frame.views(config, dataset)
    store = ss.MaskStore.create(net, config.tasks)
    for i in range(config.tasks):
        result = ss.train_task(jax.random.key(i), net, stream.train[i], config.train)
        store = store.append(result.task, donate=True)
    return net, store, stream


@functools.partial(jax.jit, static_argnames=("objective", "error"))
def ask(net, store, x, objective, error):
    """Of decisions x [D, m, ...] the exact task [D], and task and share read of both races."""
    mixture = store.mixture()
    uncertainty = one_shot.Uncertainty(net, objective)

    def one(x):
        v = -uncertainty.gradient(mixture, x)
        exact = jnp.argmax(jnp.where(store.slots, store.contract(v, "select"), -jnp.inf))
        races = {"certified": store.best_scores(v), "error": store.best_scores(v, error)}
        return exact, {name: (jnp.argmax(race.scores), race.share) for name, race in races.items()}

    return jax.lax.map(one, x)


def compare(net, store, stream, num_learned, objective, images, calls, error, rng) -> dict:
    """Counts over `calls` calls, each of images of one learned task, tasks in turn."""
    row = {"decisions": 0, "right": 0}
    row |= {name: {"differ": 0, "share": 0.0} for name in ("certified", "error")}
    for n in tqdm(range(calls), unit="call", leave=False):
        i = n * num_learned // calls
        test = stream.test[i]
        x, _ = test.batch(jnp.asarray(rng.integers(test.num_examples, size=AT_ONCE * images)))
        x = x.reshape(AT_ONCE, images, *x.shape[1:])
        exact, races = jax.device_get(ask(net, store, x, objective, error))
        row["decisions"] += AT_ONCE
        row["right"] += int((exact == i).sum())
        for name, (task, share) in races.items():
            row[name]["differ"] += int((task != exact).sum())
            row[name]["share"] += float(share.mean()) / calls
    return row


def main(args: Args) -> dict:
    tasks, decisions = (100, 128) if args.tiny else (args.tasks, args.decisions)
    with usage_errors():
        if tasks < 1 or decisions < 1 or args.images < 1:
            raise UsageError("--tasks, --decisions and --images must be at least 1")
        net, learned, stream = learned_masks(args)
        writable_folder(args.out)
    num_learned = min(tasks, int(learned.num_tasks))
    store = bench.random_store(net, tasks, learned)
    rng = np.random.default_rng(0)
    rows, labels = {}, stream.dataset.num_labels
    for images, share in ((1, 7 / 16), (args.images, 1 / 16)):
        calls = max(1, round(decisions * share / AT_ONCE))
        for name, objective in (("entropy", ss.entropy), ("G", ss.Superfluous(labels))):
            args_of = (net, store, stream, num_learned, objective, images, calls, args.error, rng)
            rows[f"{name}, {images}"] = compare(*args_of)
            result = write_result(
                args.out / "compare_races.json",
                run=str(args.run),
                dataset=stream.dataset.name,
                weights=net.layout.num_weights,
                tasks=tasks,
                learned=num_learned,
                error=args.error,
                rows=rows,
            )
    size = net.layout.num_weights
    print(f"{tasks} tasks, {num_learned} of them learned, {size:,} weights, {result['device']}")
    print("objective, images  decisions  right  certified: differ  read  error: differ  read")
    for name, row in rows.items():
        certified, error = row["certified"], row["error"]
        print(
            f"{name:17}{row['decisions']:11}{row['right']:7}{certified['differ']:19}"
            f"{certified['share']:6.2f}{error['differ']:15}{error['share']:6.2f}"
        )
    return result


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
