"""Split images, masks recovered from a Hopfield network by images alone: HopSupSup (section 4.5).

    python -m experiments.split_mnist                                          # digits, no data
    python -m experiments.split_mnist --preset mnist-hopsupsup --data-dir DIR  # the paper's

Learns five tasks of two classes each, a mask over hidden units a task, and after each puts its mask
into one Hopfield network a layer. Then every task learned is sought anew: descent along its test
images, one step a batch, recovers a mask, under which all its test images are judged. The masks are
kept beside, to measure against and nothing else. Three protocols:

    stream         the paper's rule; whether it finds the right mask varies from seed to seed
    stream-guided  `RecoveryConfig(guided=True)`, then sign updates without images
    stream-best-3  the least uncertain of three such recoveries, each a pass over the test images

    preset             network            tasks   paper  ours: stream, guided  on 2 CPU cores
    digits             64-512-512-10          5   -      .382, .962 (seed 0)   1 minute
    mnist-hopsupsup    784-2048-2048-10       5   .9743  .865, .988 (6 seeds)  5 minutes

Writes result.json, accuracy.csv, store.npz (the Hopfield networks), masks.npz, traces.npz and two
pictures to --out: distance.png, bits that differ from the task's mask against steps, and
capacity.png, how many random masks each rule holds.
"""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from tqdm import tqdm

import supsup_jax as ss
from experiments.frame import loop as continual
from experiments.frame import plots
from experiments.frame import rows as reports
from experiments.frame.run import Run, UsageError, usage_errors
from supsup_jax import data, models, prng
from supsup_jax.hopfield.store import RULES, pattern_capacity, retrieve


@dataclasses.dataclass(frozen=True)
class Config:
    """All that decides a run's numbers; a resumed run must have the same."""

    dataset: str  # "digits", "synthetic", or a name that TFDS has prepared
    model: str = "bnnet"
    width: int = 2048
    outputs: int = 10
    tasks: int = 5
    classes_per_task: int = 2
    # Training: sgd at a constant rate, scores from 0, whole epochs of each task's own images; the
    # last batch of the last epoch is filled from the next order.
    epochs: int = 1
    batch_size: int = 128
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    # Recovery: passes over the shuffled test images of a task, one step a batch.
    recovery: ss.hopfield.RecoveryConfig = dataclasses.field(
        default_factory=ss.hopfield.RecoveryConfig
    )
    passes: int = 1
    test_batch_size: int = 64
    attempts: int = 3
    # The capacity curve: units of a random mask, most stored, share of bits flipped.
    capacity_units: int = 256
    capacity_stored: int = 120
    capacity_noise: float = 0.1
    seed: int = 0
    method: str = "hopsupsup"
    stream: str = "split"


PRESETS = {
    "digits": Config(
        "digits",
        width=512,
        epochs=10,
        batch_size=32,
        # Energies grow as the width: gamma times width is the paper's.
        recovery=ss.hopfield.RecoveryConfig(gamma=4 * 1.5e-3),
        passes=3,
        test_batch_size=8,
    ),
    "mnist-hopsupsup": Config("mnist"),
}


@dataclasses.dataclass(frozen=True)
class Args:
    """Recovers masks from a Hopfield network by images alone."""

    preset: Literal[tuple(PRESETS)] = "digits"
    data_dir: Path | None = None
    """Folder in which tensorflow-datasets has prepared the dataset."""
    out: Path | None = None
    """Folder of the run; by default runs/split_mnist/PRESET-seedS."""
    seed: int = 0
    """Of weights, batches and the order of test images."""
    tasks: int | None = None
    """Learn the first so many tasks only."""
    resume: bool = False
    """Continue the run in --out, or show it when it is finished."""
    tiny: bool = False
    """A smoke test of seconds that needs no data: 2 tasks, a narrow net, digits or drawn images."""

    def config(self) -> Config:
        config = dataclasses.replace(PRESETS[self.preset], seed=self.seed)
        if self.tiny:
            config = dataclasses.replace(
                config,
                dataset="digits" if config.dataset == "digits" else "synthetic",
                width=64,
                tasks=2,
                epochs=4,
                batch_size=32,
                recovery=ss.hopfield.RecoveryConfig(gamma=32 * 1.5e-3, learning_rate=100.0),
                passes=2,
                test_batch_size=8,
                capacity_units=32,
                capacity_stored=12,
            )
        if self.seed < 0:
            raise UsageError(f"--seed must not be negative, got {self.seed}")
        if self.tasks is not None:
            if not 1 <= self.tasks <= config.tasks:
                raise UsageError(f"--tasks must lie in [1, {config.tasks}], got {self.tasks}")
            config = dataclasses.replace(config, tasks=self.tasks)
        return config

    def folder(self) -> Path:
        name = f"{self.preset}{'-tiny' if self.tiny else ''}-seed{self.seed}"
        return self.out or Path("runs") / "split_mnist" / name


def main(args: Args) -> dict:
    """Runs, or resumes, or shows a run; returns its result."""
    with usage_errors():
        config = args.config()
        run = Run.open(args.folder(), config, args.resume)
        if (result := run.result) is not None:
            print(f"{run.out} is finished:")
            print_table(result)
            return result
        with run.phase("data"):
            dataset = continual.load(config, args.data_dir)
            labels = range(config.tasks * config.classes_per_task)
            stream = data.SplitStream(dataset, config.classes_per_task, order=list(labels))
        net = build(config, dataset)
        store, masks = opened(run, config, net)
        run.create()
    if config.dataset == "synthetic":
        print("--tiny: images drawn from a key with the dataset's shapes, not real data")
    print(f"{run.out}: {config.tasks} tasks of {dataset.name}, {net}")
    store, masks = learn(run, config, net, store, masks, stream)
    return finish(run, config, store, masks)


def build(config: Config, dataset: data.Dataset) -> ss.Network:
    """The fixed network: signed constant kernels from the run's seed, scales of one to mask."""
    key = prng.purpose_key(jax.random.key(config.seed), "weights")
    module = models.bnnet(
        config.outputs,
        num_inputs=dataset.num_pixels,
        width=config.width,
        rngs=nnx.Rngs(params=key),
    )
    return ss.Network.from_nnx(module, masked=models.is_norm_scale)


def opened(
    run: Run, config: Config, net: ss.Network
) -> tuple[ss.hopfield.HopfieldStore, ss.MaskStore]:
    """The stores of a run, empty or where it stopped. The masks' file is written first."""
    masks = ss.MaskStore.create(net, capacity=config.tasks)
    if not run.store_path.exists():
        return ss.hopfield.HopfieldStore.create(net), masks
    store = ss.hopfield.HopfieldStore.load(run.store_path, net)
    saved = ss.MaskStore.load(run.out / "masks.npz", net)
    for i in range(int(store.num_tasks)):
        masks = masks.append(saved.task(i))
    return store, masks


def learn(
    run: Run,
    config: Config,
    net: ss.Network,
    store: ss.hopfield.HopfieldStore,
    masks: ss.MaskStore,
    stream: data.SplitStream,
) -> tuple[ss.hopfield.HopfieldStore, ss.MaskStore]:
    """Learns what is left to learn, and after each task recovers all learned so far."""
    key = prng.purpose_key(jax.random.key(config.seed), "tasks")
    zeros = net.layout.tree([jnp.zeros(shape) for shape in net.layout.shapes.values()])
    evaluated = {row["tasks_learned"] for row in run.rows}
    done = int(store.num_tasks)
    if done and done not in evaluated:
        checkpoint(run, config, net, store, masks, stream)
    with tqdm(initial=done, total=config.tasks, unit="task") as bar:
        while done < config.tasks:
            with run.phase("train"):
                train = stream.train[done]
                learned = ss.train_task(
                    jax.random.fold_in(key, done),
                    net,
                    train,
                    train_config(config, train.num_examples),
                    init_scores=zeros,
                )
                masks, store = masks.append(learned.task), store.append(learned.task)
            done += 1
            with run.phase("save"):
                masks.save(run.out / "masks.npz", overwrite=True)
            run.save(store)
            row = checkpoint(run, config, net, store, masks, stream)
            bar.set_postfix(recovered=f"{row['accuracy']:.4f}", refresh=False)
            bar.update()
    return store, masks


def train_config(config: Config, num_examples: int) -> ss.TrainConfig:
    return ss.TrainConfig(
        steps=config.epochs * math.ceil(num_examples / config.batch_size),
        batch_size=config.batch_size,
        optimizer="sgd",
        learning_rate=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )


def checkpoint(
    run: Run,
    config: Config,
    net: ss.Network,
    store: ss.hopfield.HopfieldStore,
    masks: ss.MaskStore,
    stream: data.SplitStream,
) -> dict:
    """Recovers and judges every task learned so far; keeps the rows, returns the paper's rule's."""
    num_tasks = int(store.num_tasks)
    known = [masks.mask(i) for i in range(num_tasks)]
    guided = dataclasses.replace(config.recovery, guided=True)

    def judged(recovered):
        found, rows = ss.MaskStore.create(net, capacity=config.tasks), []
        for i, mask in enumerate(recovered):
            found, size = found.append(mask), config.test_batch_size
            while stream.test[i].num_examples % size == 1:  # one image has no statistics
                size += 1
            rows += ss.evaluate(net, found, stream.test, batch_size=size, tasks=[i])
        return rows

    plain, best = [], []
    with run.phase("recover"):
        for i in tqdm(range(num_tasks), desc="  recoveries", leave=False):
            x = batches_of(config, stream, i)
            plain.append(ss.hopfield.recover(net, store, x, config.recovery, target=known[i]))
            best.append(
                ss.hopfield.recover_best(
                    net, store, x, guided, attempts=config.attempts, target=known[i]
                )
            )
    first = [found.attempts[0] for found in best]
    traces = {"stream": traces_of(net, plain), "stream-guided": traces_of(net, first)}
    with run.phase("evaluate"):
        run.rows += reports.rows_of("given", None, None, judged(known), config.method)
        rows = {}
        for protocol, recoveries in (
            ("stream", plain),
            ("stream-guided", first),
            (f"stream-best-{config.attempts}", [found.best for found in best]),
        ):
            recovered = [recovery.mask for recovery in recoveries]
            rows[protocol] = row_of(protocol, judged(recovered), recovered, known)
    for protocol, distances in traces.items():
        totals = [sum(leaves.values()) for leaves in distances]
        rows[protocol] |= {
            "stream_steps": [len(total) - 1 for total in totals],
            "recovery_steps": [steps_until_final(total) for total in totals],
        }
    run.rows += rows.values()
    np.savez_compressed(
        run.out / "traces.npz",
        **{
            f"{protocol}/{i}/{name}": leaf
            for protocol, distances in traces.items()
            for i, leaves in enumerate(distances)
            for name, leaf in leaves.items()
        },
    )
    (gg,) = reports.find(run.rows, scenario="gg", tasks_learned=num_tasks)
    found = ", ".join(f"{protocol} {row['accuracy']:.4f}" for protocol, row in rows.items())
    tqdm.write(f"{num_tasks} tasks: GG {gg['accuracy']:.4f}, {found}")
    run.write_progress()
    return rows["stream"]


def traces_of(
    net: ss.Network, recoveries: list[ss.hopfield.Recovery]
) -> list[dict[str, np.ndarray]]:
    """Distances [S + 1] of each recovery by leaf."""
    return [
        dict(zip(net.layout.shapes, map(np.asarray, jax.tree.leaves(each.distance)), strict=True))
        for each in recoveries
    ]


def batches_of(config: Config, stream: data.SplitStream, task: int) -> jax.Array:
    """Test images of a task in batches [S, B, ...], each pass in an order of its own."""
    key = prng.purpose_key(jax.random.key(config.seed), "test streams")
    keys = jax.random.split(jax.random.fold_in(key, task), config.passes)
    return jnp.concatenate(
        [data.one_pass(stream.test[task], config.test_batch_size, each) for each in keys]
    )


def row_of(protocol: str, measured: list, recovered: list, known: list) -> dict:
    """A row of recoveries, one a task; labels are not shared by tasks, so this is GNu."""
    found, target = (
        [np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(m)]) for m in ms]
        for ms in (recovered, known)
    )
    distance = np.asarray([[np.sum(a != b) for b in target] for a in found])
    nearest = distance.argmin(axis=1)
    per_task = [row.accuracy for row in measured]
    return {
        "method": "hopsupsup",
        "scenario": "gnu",
        "objective": "entropy",
        "protocol": protocol,
        "images_per_task": None,
        "tasks_learned": len(measured),
        "decisions": len(measured),
        "accuracy": float(np.mean(per_task)),
        "task_accuracy": float(np.mean(nearest == np.arange(len(measured)))),
        "per_task": per_task,
        "bits_off": np.diag(distance).tolist(),
    }


def steps_until_final(distance: np.ndarray) -> int:
    """Steps after which the distance [S + 1] no longer changes."""
    changed = np.flatnonzero(distance != distance[-1])
    return int(changed[-1]) + 1 if len(changed) else 0


def finish(run: Run, config: Config, store: ss.hopfield.HopfieldStore, masks: ss.MaskStore) -> dict:
    """Writes everything a finished run has, the result last."""
    with run.phase("capacity"):
        held = capacity_curves(config)
    reports.write_csv(run.out / "accuracy.csv", run.rows)
    draw(run, config, held)
    result = run.finish(
        experiment="split_mnist",
        bytes=store_bytes(run, store, masks),
        metrics=reports.continual_metrics(run.rows),
        capacity=held,
    )
    print_table(result)
    return result


def store_bytes(run: Run, store: ss.hopfield.HopfieldStore, masks: ss.MaskStore) -> dict[str, int]:
    """Bytes of what HopSupSup keeps, beside those of keeping the masks."""
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(store.weights))
    total = 4 * store.layout.num_weights
    return {
        "hopfield_weights": weights,
        "mask_sum": total,
        "norm_statistics": 0,
        "heads": 0,
        "seed": 4,
        "total": weights + total + 4,
        "store_file": run.store_path.stat().st_size,
        "masks_if_kept": int(masks.num_tasks) * masks.layout.num_words * 4,
    }


def capacity_curves(config: Config) -> list[dict]:
    """How many of the random masks stored so far each rule gives back from noisy ones."""
    d, most = config.capacity_units, config.capacity_stored
    key = prng.purpose_key(jax.random.key(config.seed), "capacity")
    patterns = jax.random.rademacher(key, (most, d), jnp.float32)
    flip = jax.random.bernoulli(jax.random.fold_in(key, 1), config.capacity_noise, (most, d))
    noisy = jnp.where(flip, -patterns, patterns)

    @jax.jit
    def retrieved(weights):
        found = jax.vmap(retrieve, (None, 0))(weights, noisy)
        return jnp.all(found == patterns, axis=1), jnp.mean(found == patterns, axis=1)

    rows = []
    for rule, learn_one in RULES.items():
        weights, learn_one = jnp.zeros((d, d)), jax.jit(learn_one)
        for i in range(most):
            weights = learn_one(weights, patterns[i])
            if (i + 1) % (most // 12) == 0:
                whole, bits = (np.asarray(part)[: i + 1] for part in retrieved(weights))
                rows.append(
                    {
                        "rule": rule,
                        "units": d,
                        "stored": i + 1,
                        "retrieved": float(whole.mean()),
                        "bits_right": float(bits.mean()),
                        "known_capacity": pattern_capacity(rule, d),
                    }
                )
    return rows


def draw(run: Run, config: Config, held: list[dict]) -> None:
    """distance.png and capacity.png."""
    curves = {}
    with np.load(run.out / "traces.npz") as traces:
        for name in traces.files:
            protocol, task, leaf = name.split("/", 2)
            curves.setdefault(f"{protocol}, {leaf}", {})[int(task)] = traces[name]
    title = f"Split {config.dataset}, {config.tasks} tasks, seed {config.seed}"
    plots.distance_against_steps(run.out / "distance.png", title, curves)
    plots.retrieved_against_stored(
        run.out / "capacity.png",
        f"{config.capacity_units} units, {config.capacity_noise:.0%} of the bits flipped",
        held,
    )


def print_table(result: dict) -> None:
    """Ours beside the paper's; then how long recoveries took, and how far they came."""
    reports.print_table(result)
    print("\ntasks  protocol          ours  task acc  steps  bits off   (slowest, worst recovery)")
    for row in result["rows"]:
        if row["scenario"] == "gnu":
            steps = max(row["recovery_steps"]) if "recovery_steps" in row else "-"
            print(
                f"{row['tasks_learned']:5}  {row['protocol']:14}  {row['accuracy']:.4f}  "
                f"{row['task_accuracy']:8.4f}  {steps:>5}  {max(row['bits_off']):>8}"
            )


def cli(argv: list[str]) -> None:
    main(tyro.cli(Args, args=argv, description=__doc__))


if __name__ == "__main__":
    cli(sys.argv[1:])
