"""None of these: are inputs of no learned task told from those of the learned ones?

    python -m experiments.none_of_these                                    # digits, 20 tasks
    python -m experiments.none_of_these --dataset mnist --data-dir DIR     # mnist, 10 tasks

Learns permuted tasks (LeNet-300-100, 100 outputs, the recipe of experiments.permuted), and asks for
single images how sure the inference was: test images of the learned tasks, of 5 permutations that
were never learned, and of uniform noise. The threshold is calibrated on the first half of each
task's images, at a false refusal rate of 1%; all figures are of the second half.

For one_shot, by entropy H and by the paper's G, four statistics of the scores:

    confidence   T max softmax(scores), supsup_jax.confidence
    deviations   (largest - mean) / standard deviation
    margin       (largest - second largest) / standard deviation
    best_score   the largest score itself, supsup_jax.best_score

and for rerank (by the gradient of H; judged by H or by G) and oracle the best score. AUROC is the
chance that an image of a learned task is surer than one of none. Expected, permutations:

                                     digits                 mnist
                               AUROC   refused        AUROC   refused
    one_shot H, confidence     .9989      .971        .9967      .927
    one_shot G, confidence     .9970      .946        .9998     1.000
    one_shot H, deviations     .9948      .910        .9996      .994
    one_shot H, margin         .9872      .742        .9990      .984
    rerank judged by G        1.0000     1.000       1.0000     1.000

Writes result.json to --out and ends with a table. 3 minutes on 2 CPU cores, for mnist 5.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

import supsup_jax as ss
from experiments.frame import config as frame
from experiments.frame.config import Config
from experiments.frame.run import Run, UsageError, usage_errors, writable_folder
from supsup_jax import data, prng
from supsup_jax.types import Objective

# As experiments.permuted learns them.
CONFIGS = {
    "digits": Config("digits", "lenet_300_100", 100, 20, (20,), train=ss.TrainConfig(steps=1500)),
    "mnist": Config("mnist", "lenet_300_100", 100, 10, (10,)),
}
UNLEARNED = 5
RATE = 0.01


@dataclasses.dataclass(frozen=True)
class Args:
    """Measures how well inputs of no learned task are refused."""

    dataset: Literal[tuple(CONFIGS)] = "digits"
    data_dir: Path | None = None
    """Folder in which tensorflow-datasets has prepared the dataset."""
    out: Path | None = None
    """By default runs/none_of_these/DATASET-seedS."""
    seed: int = 0
    """Of weights, scores, batches, permutations and noise."""
    images: int = 1000
    """Test images of each task, half of them to calibrate on."""
    tiny: bool = False
    """A smoke test of seconds that needs no data: 3 tasks, 50 steps, digits or drawn images."""


def deviations(belief: ss.TaskBelief) -> jax.Array:
    live = jnp.isfinite(belief.scores)
    mean = jnp.mean(belief.scores, axis=-1, where=live)
    return (ss.rejection.best_score(belief) - mean) / jnp.std(belief.scores, axis=-1, where=live)


def margin(belief: ss.TaskBelief) -> jax.Array:
    live = jnp.isfinite(belief.scores)
    first, second = jnp.moveaxis(jax.lax.top_k(belief.scores, 2)[0], -1, 0)
    return (first - second) / jnp.std(belief.scores, axis=-1, where=live)


def auroc(known: np.ndarray, unknown: np.ndarray) -> float:
    """The chance that a known one lies above an unknown one; equal ones count half."""
    unknown = np.sort(unknown)
    below = np.searchsorted(unknown, known, "left") + np.searchsorted(unknown, known, "right")
    return float(below.mean() / (2 * len(unknown)))


class Kind(NamedTuple):
    """A kind of belief: by which objective's name, which rule, whose judge's name, and what of it
    tells the known from the unknown.
    """

    objective: str
    rule: ss.Rule
    judge: str | None
    statistics: list[Callable[[ss.TaskBelief], jax.Array]]


def plan(objectives: dict[str, Objective]) -> list[Kind]:
    statistics = [ss.rejection.confidence, deviations, margin, ss.rejection.best_score]
    kinds = [Kind(name, ss.Rule("one_shot"), None, statistics) for name in objectives]
    for name, best in (("entropy", 1), ("superfluous", 1), ("superfluous", 5)):
        rule = ss.Rule("rerank", best=best, judge=objectives[name])
        kinds.append(Kind("entropy", rule, name, [ss.rejection.best_score]))
    oracle = ss.Rule("oracle")
    return [*kinds, Kind("superfluous", oracle, "superfluous", [ss.rejection.best_score])]


def main(args: Args) -> dict:
    with usage_errors():
        if args.images < 2 / RATE and not args.tiny:
            raise UsageError(f"--images must be at least {2 / RATE:.0f}, got {args.images}")
        config = dataclasses.replace(CONFIGS[args.dataset], seed=args.seed)
        config = frame.tiny(config) if args.tiny else config
        tasks = config.tasks
        dataset = frame.load(config, args)
        name = f"{args.dataset}{'-tiny' if args.tiny else ''}-seed{args.seed}"
        out = args.out or Path("runs") / "none_of_these" / name
        writable_folder(out)
    settings = {"data_dir": str(args.data_dir), "out": str(out), "tasks": tasks, "rate": RATE}
    run = Run(out, {**dataclasses.asdict(args), **settings}, None)
    net = frame.dense_network(config, dataset)
    stream = data.PermutedStream(dataset, tasks + UNLEARNED, args.seed, independent=True)
    store = ss.MaskStore.create(net, tasks)
    key = jax.random.key(args.seed)
    with run.phase("train"):
        for i in tqdm(range(tasks), unit="task"):
            one = jax.random.fold_in(prng.purpose_key(key, "tasks"), i)
            learned = ss.train_task(one, net, stream.train[i], config.train)
            store = store.append(learned.task, donate=True)
    with run.phase("evaluate"):
        noise = prng.purpose_key(key, "noise")
        run.rows = measure(net, store, stream, dataset, noise, args.images)
    result = run.finish()
    print_table(result)
    return result


def measure(net, store, stream, dataset, key, images) -> list[dict]:
    """A row for each rule and statistic."""
    tasks = int(store.num_tasks)
    images = min(images, dataset.test.num_examples)
    half = images // 2
    x = [stream.test[i].batch(jnp.arange(images))[0] for i in range(tasks + UNLEARNED)]
    top = int(dataset.test.inputs.max()) + 1
    shape = (UNLEARNED * half, *dataset.test.inputs.shape[1:])
    noise = jax.random.randint(key, shape, 0, top).astype(dataset.test.inputs.dtype)
    inputs = {
        "calibration": [part[:half] for part in x[:tasks]],
        "known": [part[half:] for part in x[:tasks]],
        "unlearned": [part[half:] for part in x[tasks:]],
        "noise": jnp.split(dataset.test.transform(noise), UNLEARNED),
    }
    rows = []
    objectives = {"entropy": ss.entropy, "superfluous": ss.Superfluous(dataset.num_labels)}
    for name, rule, judge, statistics in tqdm(plan(objectives), leave=False):
        beliefs = {
            kind: jax.tree.map(
                lambda *parts: jnp.concatenate(parts),
                *[rule(net, store, part, objectives[name]) for part in parts],
            )
            for kind, parts in inputs.items()
        }
        true = np.repeat(np.arange(tasks), images - half)
        for statistic in statistics:
            # A smoke test has too few images for the rate that is meant.
            rate = max(RATE, 1 / len(beliefs["calibration"].task))
            rejection = ss.rejection.calibrate(beliefs["calibration"], rate, statistic)
            values = {kind: np.asarray(statistic(belief)) for kind, belief in beliefs.items()}
            refused = {
                kind: float((ss.rejection.reject(belief, rejection).task < 0).mean())
                for kind, belief in beliefs.items()
            }
            rows.append(
                {
                    "rule": rule.name if rule.best is None else f"{rule.name}-{rule.best}",
                    "objective": name,
                    "judge": judge,
                    "statistic": statistic.__name__,
                    "tasks_learned": tasks,
                    "decisions": len(true),
                    "task_accuracy": float(np.mean(np.asarray(beliefs["known"].task) == true)),
                    "auroc_unlearned": auroc(values["known"], values["unlearned"]),
                    "auroc_noise": auroc(values["known"], values["noise"]),
                    "refused_known": refused["known"],
                    "refused_unlearned": refused["unlearned"],
                    "refused_noise": refused["noise"],
                }
            )
    return rows


def print_table(result: dict) -> None:
    config = result["config"]
    print(f"{config['tasks']} tasks of {config['dataset']}, refused at {RATE:.0%} of known images")
    print(
        f"{'rule':10}{'objective':13}{'judge':13}{'statistic':12}{'task acc.':>10}"
        f"{'AUROC perm.':>12}{'noise':>8}{'refused known':>15}{'perm.':>8}{'noise':>8}"
    )
    for row in result["rows"]:
        print(
            f"{row['rule']:10}{row['objective']:13}{row['judge'] or '-':13}{row['statistic']:12}"
            f"{row['task_accuracy']:10.4f}{row['auroc_unlearned']:12.4f}{row['auroc_noise']:8.4f}"
            f"{row['refused_known']:15.4f}{row['refused_unlearned']:8.4f}{row['refused_noise']:8.4f}"
        )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
