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
    mnist-hopsupsup    784-2048-2048-10       5   .9743  .919, .988            5 minutes

Writes result.json, accuracy.csv, store.supsup (the Hopfield networks), masks.supsup, traces.npz and
two pictures to --out: distance.png, bits that differ from the task's mask against steps, and
capacity.png, how many random masks each rule holds.
"""

import dataclasses
import math
import sys
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

import supsup_jax as ss
from experiments.frame import config as frame
from experiments.frame import loop, plots
from experiments.frame.learners import Learner
from experiments.frame.rows import Row, evaluated, print_table
from experiments.frame.run import Run, UsageError
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
    attempts: int = 3  # 0: the paper's rule alone
    # The capacity curve: units of a random mask, most stored, share of bits flipped.
    capacity_units: int = 256
    capacity_stored: int = 120
    capacity_noise: float = 0.1
    seed: int = 0
    method: str = "hopsupsup"
    stream: str = "split"

    # Every task is a checkpoint, and saved; neither is for a user to choose.
    @property
    def checkpoints(self) -> range:
        return range(1, self.tasks + 1)

    @property
    def save_every(self) -> int:
        return 1


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
class Args(loop.Args):
    """Recovers masks from a Hopfield network by images alone."""

    preset: Literal[tuple(PRESETS)] = "digits"
    attempts: int = 3
    """Guided recoveries a task, of which the least uncertain is kept; 0: the paper's rule alone."""


def options(config: Config, args: Args) -> Config:
    """The preset, with --tiny 2 tasks in a narrow net."""
    if args.attempts < 0:
        raise UsageError(f"--attempts must not be negative, got {args.attempts}")
    config = dataclasses.replace(config, attempts=args.attempts)
    if args.tiny:
        config = dataclasses.replace(
            config,
            dataset=frame.at_hand(config.dataset),
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
    loop.check_first(config, args)
    return config


def classes(config: Config, dataset: data.Dataset) -> data.SplitStream:
    """The tasks: classes in the order of their labels."""
    labels = range(config.tasks * config.classes_per_task)
    return data.SplitStream(dataset, config.classes_per_task, order=list(labels))


def network(config: Config, dataset: data.Dataset) -> ss.Network:
    """The fixed network: signed constant kernels from the run's seed, scales of one to mask."""
    key = prng.purpose_key(jax.random.key(config.seed), "weights")
    module = models.bnnet(
        config.outputs,
        num_inputs=dataset.num_pixels,
        width=config.width,
        rngs=nnx.Rngs(params=key),
    )
    return ss.Network.from_nnx(module, masked=models.is_norm_scale)


class Recovered(Learner):
    """HopSupSup: masks put into a Hopfield network, and beside it only to measure against."""

    def __init__(self, config: Config, net: ss.Network, stream: data.SplitStream, run: Run):
        super().__init__(config, net, stream, run)
        self.store = ss.hopfield.HopfieldStore.create(net)
        self.masks = ss.MaskStore.create(net, capacity=config.tasks)
        self.masks_path = run.out / "masks.supsup"

    @property
    def done(self) -> int:
        return int(self.store.num_tasks)

    def learn(self, group: range) -> None:
        (task,) = group
        layout, part = self.net.layout, self.stream.train[task]
        learned = ss.train_task(
            jax.random.fold_in(self.key, task),
            self.net,
            part,
            train_config(self.config, part.num_examples),
            init_scores=layout.tree([jnp.zeros(shape) for shape in layout.shapes.values()]),
        )
        self.masks, self.store = self.masks.append(learned.task), self.store.append(learned.task)

    def shown(self) -> dict[str, str]:
        return {}  # the checkpoint that follows says more

    def save(self) -> None:
        self.masks.save(self.masks_path, overwrite=True)
        self.store.save(self.run.store_path, overwrite=True)

    def restore(self) -> None:
        """From both files; the masks' is written first, and may hold a task more."""
        if not self.run.store_path.exists():
            return
        self.store = ss.hopfield.HopfieldStore.load(self.run.store_path, self.net)
        saved = ss.MaskStore.load(self.masks_path, self.net)
        for i in range(self.done):
            self.masks = self.masks.append(saved.task(i))

    def evaluate(self) -> list[Row]:
        """Recovers and judges every task learned so far, by each protocol."""
        net, config = self.net, self.config
        known = [self.masks.mask(i) for i in range(self.done)]
        guided = dataclasses.replace(config.recovery, guided=True)
        best_of = f"stream-best-{config.attempts}"
        found = {"stream": []}
        if config.attempts:
            found |= {"stream-guided": [], best_of: []}
        with self.run.phase("recover"):
            for i in tqdm(range(self.done), desc="  recoveries", leave=False):
                x, to = batches_of(config, self.stream, i), {"target": known[i]}
                plain = ss.hopfield.recover(net, self.store, x, config.recovery, **to)
                found["stream"].append(plain)
                if config.attempts:
                    best = ss.hopfield.recover_best(
                        net, self.store, x, guided, attempts=config.attempts, **to
                    )
                    found["stream-guided"].append(best.attempts[0])
                    found[best_of].append(best.best)
        # The best is settled, and has no trace of its own.
        traces = {name: traces_of(net, each) for name, each in found.items() if name != best_of}
        save_traces(self.run, traces)
        rows = evaluated("given", None, None, self.judged(known), config.method)
        for protocol, recoveries in found.items():
            masks = [recovery.mask for recovery in recoveries]
            rows.append(recovered(protocol, self.judged(masks), masks, known, traces.get(protocol)))
        return rows

    def judged(self, masks: list) -> list:
        """`ss.evaluate` of a mask a task."""
        found, rows = ss.MaskStore.create(self.net, capacity=self.config.tasks), []
        test = self.stream.test
        for i, mask in enumerate(masks):
            found, size = found.append(mask), self.config.test_batch_size
            while test[i].num_examples % size == 1:  # one image has no statistics
                size += 1
            rows += ss.evaluate(self.net, found, test, batch_size=size, tasks=[i])
        return rows

    def bytes(self) -> dict[str, int]:
        """Bytes of what HopSupSup keeps, beside those of keeping the masks."""
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(self.store.weights))
        layout = self.store.layout
        return {
            "hopfield_weights": weights,
            "mask_sum": 4 * layout.num_weights,
            "norm_statistics": 0,
            "heads": 0,
            "seed": 4,
            "total": weights + 4 * layout.num_weights + 4,
            "store_file": self.run.store_path.stat().st_size,
            "masks_if_kept": int(self.masks.num_tasks) * layout.num_words * 4,
        }


def train_config(config: Config, num_examples: int) -> ss.TrainConfig:
    return ss.TrainConfig(
        steps=config.epochs * math.ceil(num_examples / config.batch_size),
        batch_size=config.batch_size,
        optimizer="sgd",
        learning_rate=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )


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


def recovered(
    protocol: str, measured: list, masks: list, known: list, traces: list[dict] | None
) -> Row:
    """A row of recoveries, one a task; labels are not shared by tasks, so this is GNu."""
    found, target = (
        [np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(m)]) for m in ms]
        for ms in (masks, known)
    )
    distance = np.asarray([[np.sum(a != b) for b in target] for a in found])
    nearest = distance.argmin(axis=1)
    more = {"bits_off": np.diag(distance).tolist()}
    if traces is not None:
        totals = [np.sum([*leaves.values()], axis=0) for leaves in traces]
        more["stream_steps"] = [len(total) - 1 for total in totals]
        more["recovery_steps"] = [steps_until_final(total) for total in totals]
    return Row(
        "hopsupsup",
        "gnu",
        [row.accuracy for row in measured],
        "entropy",
        protocol,
        decisions=len(measured),
        task_accuracy=float(np.mean(nearest == np.arange(len(measured)))),
        more=more,
    )


def save_traces(run: Run, traces: dict[str, list[dict]]) -> None:
    """traces.npz: PROTOCOL/TASK/LEAF, each the distances of one recovery."""
    np.savez_compressed(
        run.out / "traces.npz",
        **{
            f"{protocol}/{i}/{name}": leaf
            for protocol, distances in traces.items()
            for i, leaves in enumerate(distances)
            for name, leaf in leaves.items()
        },
    )


def steps_until_final(distance: np.ndarray) -> int:
    """Steps after which the distance [S + 1] no longer changes."""
    changed = np.flatnonzero(distance != distance[-1])
    return int(changed[-1]) + 1 if len(changed) else 0


def conclude(run: Run, config: Config, learner: Recovered) -> dict[str, Any]:
    """Draws; how many masks each rule holds."""
    with run.phase("capacity"):
        held = capacity_curves(config)
    draw(run, config, held)
    return {"capacity": held}


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


def print_result(result: dict) -> None:
    """Ours beside the paper's; then how long recoveries took, and how far they came."""
    print_table(result)
    print("\ntasks  protocol          ours  task acc  steps  bits off   (slowest, worst recovery)")
    for row in result["rows"]:
        if row["scenario"] == "gnu":
            steps = max(row["recovery_steps"]) if "recovery_steps" in row else "-"
            print(
                f"{row['tasks_learned']:5}  {row['protocol']:14}  {row['accuracy']:.4f}  "
                f"{row['task_accuracy']:8.4f}  {steps:>5}  {max(row['bits_off']):>8}"
            )


EXPERIMENT = loop.Experiment(
    name="split_mnist",
    presets=PRESETS,
    load=frame.load,
    stream=classes,
    network=network,
    options=options,
    learner=Recovered,
    conclude=conclude,
    show=print_result,
)

if __name__ == "__main__":
    loop.cli(EXPERIMENT, Args, sys.argv[1:], __doc__)
