"""Permuted images, the task id given or inferred: Figure 3 and Figure 4 of the paper.

    python -m experiments.permuted                                          # digits, no data needed
    python -m experiments.permuted --preset mnist-250-lenet --data-dir DIR  # Figure 3, left

Learns the tasks one after another, each a permutation of the pixels of its own, and at each
checkpoint asks how well they are recognised: with the id given (GG), and inferred by one gradient
(GNs with shared labels, GNu where the wrong task is an error), by entropy H and by the paper's G.

    preset             network                tasks  paper, GNu      on 2 CPU cores
    digits             LeNet-300-100, s=100      50  -               1 minute
    mnist-10           LeNet-300-100, s=100      10  .9367           2 minutes
    mnist-250-lenet    LeNet-300-100, s=100     250  .9363           half an hour
    mnist-250-fc       FC-1024-1024, s=500      250  .9566 H .9591 G hours; made for a GPU
    mnist-2500-lenet   LeNet-300-100, s=500    2500  .9345           hours; made for a GPU
    mnist-2500-lenet-per-example    the same, each of 25 million test images routed on its own

s is the paper's name for the number of outputs in all, of which the first 10 are labels.
Writes result.json, accuracy.csv (the accuracy matrix), store.npz, inferred.npz (which task was
inferred for which) and three pictures to --out.
"""

import dataclasses
import functools
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
from experiments import paper, plots, reports
from experiments.runs import Run, UsageError, usage_errors
from supsup_jax import data, metrics, models, prng

TOGETHER = 100
MODELS = {"lenet_300_100": models.lenet_300_100, "fc_1024_1024": models.fc_1024_1024}


@dataclasses.dataclass(frozen=True)
class Config:
    """All that decides a run's numbers; a resumed run must have the same."""

    dataset: str  # "digits", "synthetic", or a name that TFDS has prepared
    model: str
    outputs: int  # C, of which the dataset's labels come first
    tasks: int
    checkpoints: tuple[int, ...]  # tasks learned at which all protocols are run
    protocols: tuple[str, ...] = ("paper", "per_example", "batch-8")  # the first is drawn
    objectives: tuple[str, ...] = ("entropy", "superfluous")
    # Test images of each task that per_example and batch-m look at; paper looks at all.
    images_per_task: int | None = None
    # After the last task the first of protocols and of objectives looks at all test images too.
    every_image_at_the_end: bool = False
    train: ss.TrainConfig = dataclasses.field(default_factory=ss.TrainConfig)
    save_every: int = 100
    seed: int = 0
    independent_seeds: bool = False


PAPER = Config("mnist", "lenet_300_100", 100, 10, (2, 5, 10))
PRESETS = {
    "digits": dataclasses.replace(
        PAPER,
        dataset="digits",
        tasks=50,
        checkpoints=(10, 20, 30, 40, 50),
        protocols=("per_example", "paper", "batch-8"),
        train=ss.TrainConfig(steps=1500),
    ),
    "mnist-10": PAPER,
    "mnist-250-lenet": dataclasses.replace(
        PAPER,
        tasks=250,
        checkpoints=(10, 50, 100, 150, 200, 250),
        protocols=("paper", "per_example"),
        images_per_task=128,
    ),
    "mnist-250-fc": dataclasses.replace(
        PAPER,
        model="fc_1024_1024",
        outputs=500,
        tasks=250,
        checkpoints=(10, 50, 100, 150, 200, 250),
        protocols=("paper",),
    ),
    "mnist-2500-lenet": dataclasses.replace(
        PAPER,
        outputs=500,
        tasks=2500,
        checkpoints=(10, 500, 1000, 1500, 2000, 2500),
        protocols=("paper",),
    ),
    "mnist-2500-lenet-per-example": dataclasses.replace(
        PAPER,
        outputs=500,
        tasks=2500,
        checkpoints=(10, 500, 1000, 1500, 2000, 2500),
        protocols=("per_example",),
        images_per_task=1000,
        every_image_at_the_end=True,
    ),
}


@dataclasses.dataclass(frozen=True)
class Args:
    """Learns permuted tasks in one network and finds the right one by one gradient."""

    preset: Literal[tuple(PRESETS)] = "digits"
    data_dir: Path | None = None
    """Folder in which tensorflow-datasets has prepared the dataset."""
    out: Path | None = None
    """Folder of the run; by default runs/permuted/PRESET-seedS."""
    seed: int = 0
    """Of weights, scores, batches and permutations."""
    tasks: int | None = None
    """Learn this many tasks instead of the preset's."""
    steps: int | None = None
    """Training steps a task instead of the preset's."""
    independent_seeds: bool = False
    """Permutations that no two seeds share; the paper's seeds share nearly all."""
    resume: bool = False
    """Continue the run in --out, or show it when it is finished."""
    tiny: bool = False
    """A smoke test of seconds that needs no data: 3 tasks, 50 steps, digits or drawn images."""

    def config(self) -> Config:
        config = dataclasses.replace(
            PRESETS[self.preset], seed=self.seed, independent_seeds=self.independent_seeds
        )
        if self.tiny:
            config = dataclasses.replace(
                config,
                dataset="digits" if config.dataset == "digits" else "synthetic",
                tasks=3,
                checkpoints=(2, 3),
                images_per_task=64,
                train=dataclasses.replace(config.train, steps=50, learning_rate=1e-3),
            )
        if self.seed < 0:
            raise UsageError(f"--seed must not be negative, got {self.seed}")
        if self.steps is not None:
            if self.steps < 1:
                raise UsageError(f"--steps must be at least 1, got {self.steps}")
            config = dataclasses.replace(
                config, train=dataclasses.replace(config.train, steps=self.steps)
            )
        if self.tasks is not None:
            if self.tasks < 1:
                raise UsageError(f"--tasks must be at least 1, got {self.tasks}")
            kept = tuple(c for c in config.checkpoints if c < self.tasks)
            config = dataclasses.replace(config, tasks=self.tasks, checkpoints=(*kept, self.tasks))
        return config

    def folder(self) -> Path:
        name = f"{self.preset}{'-tiny' if self.tiny else ''}-seed{self.seed}"
        return self.out or Path("runs") / "permuted" / name


def saved_config(out: Path) -> Config:
    """The config of the run in `out`. Raises UsageError where there is none."""
    fields = Run.saved(out)["config"]
    tuples = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return Config(**{**fields, **tuples, "train": ss.TrainConfig(**fields["train"])})


def main(args: Args) -> dict:
    """Runs, or resumes, or shows a run; returns its result."""
    with usage_errors():
        config = args.config()
        run = Run.open(args.folder(), config, args.resume)
        if (result := run.result) is not None:
            print(f"{run.out} is finished:")
            reports.print_table(result)
            return result
        with run.phase("data"):
            dataset = load(config, args.data_dir)
            stream = data.PermutedStream(
                dataset, config.tasks, config.seed, config.independent_seeds
            )
        net = build(config, dataset)
        store = (
            ss.MaskStore.load(run.store_path, net)
            if run.store_path.exists()
            else ss.MaskStore.create(net, capacity=min(64, config.tasks))
        )
        run.create()
    if config.dataset == "synthetic":
        print("--tiny: images drawn from a key with the dataset's shapes, not real data")
    print(f"{run.out}: {config.tasks} tasks of {dataset.name}, {net}")
    store = learn(run, config, net, store, stream)
    return finish(run, config, store)


def load(config: Config, data_dir: Path | None) -> data.Dataset:
    """The dataset; raises before anything slow when it is not there."""
    if config.dataset == "synthetic":
        return data.synthetic(jax.random.key(config.seed), (28, 28), 10, 512, 256)
    return data.load_dataset(config.dataset, data_dir, config.seed)


def build(config: Config, dataset: data.Dataset) -> ss.Network:
    """The fixed network: signed constant weights from the run's seed."""
    if config.outputs <= dataset.num_labels:
        raise UsageError(f"outputs must exceed the {dataset.num_labels} labels")
    # The module's own weights are thrown away, so its key does not matter.
    module = MODELS[config.model](config.outputs, num_inputs=dataset.num_pixels, rngs=nnx.Rngs(0))
    return ss.signed_constant(ss.Network.from_nnx(module), config.seed)


def learn(
    run: Run,
    config: Config,
    net: ss.Network,
    store: ss.MaskStore,
    stream: data.PermutedStream,
) -> ss.MaskStore:
    """Learns what is left to learn, evaluates what is left to evaluate, and saves on the way."""
    key = prng.purpose_key(jax.random.key(config.seed), "tasks")
    # A CPU gains nothing from several tasks at once; a GPU is idle with one.
    together = 1 if jax.default_backend() == "cpu" else TOGETHER
    evaluated = {row["tasks_learned"] for row in run.rows}
    done = int(store.num_tasks)
    if done in config.checkpoints and done not in evaluated:
        checkpoint(run, config, net, store, stream)
    stops = {*config.checkpoints, *range(0, config.tasks, config.save_every)}
    with tqdm(initial=done, total=config.tasks, unit="task") as bar:
        while done < config.tasks:
            group = range(done, min(done + together, *(stop for stop in stops if stop > done)))
            with run.phase("train"):
                store = learn_group(net, store, stream, group, key, config.train)
            done = group.stop
            with run.phase("evaluate"):
                (row,) = ss.evaluate(net, store, stream.test, tasks=[done - 1])
            bar.set_postfix(task=done - 1, accuracy=f"{row.accuracy:.4f}", refresh=False)
            bar.update(len(group))
            if done in stops:
                run.save(store)
            if done in config.checkpoints:
                checkpoint(run, config, net, store, stream)
    return store


def learn_group(
    net: ss.Network,
    store: ss.MaskStore,
    stream: data.PermutedStream,
    group: range,
    key: jax.Array,
    config: ss.TrainConfig,
) -> ss.MaskStore:
    """The store with the tasks of `group` learned at once."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(group.start, group.stop))
    views = jnp.stack([stream.view(i) for i in group])
    many = dataclasses.replace(stream.train[group.start], view=views)
    learned = ss.train_tasks(keys, net, many, config).task
    for i in range(len(group)):
        store = store.append(jax.tree.map(lambda leaf: leaf[i], learned), donate=True)  # noqa: B023
    return store


def checkpoint(
    run: Run,
    config: Config,
    net: ss.Network,
    store: ss.MaskStore,
    stream: data.PermutedStream,
) -> None:
    """Runs every protocol over the tasks learned so far and keeps the rows."""
    num_tasks = int(store.num_tasks)
    objectives = {"entropy": ss.entropy, "superfluous": ss.Superfluous(stream.dataset.num_labels)}
    few = config.images_per_task
    few_stream = stream.on(stream.dataset.limit_test(few))
    plan = [("given", None, None)] + ([("given", None, few)] if few else [])
    plan += [
        (protocol, name, None if protocol == "paper" else few)
        for protocol in config.protocols
        for name in config.objectives
    ]
    if config.every_image_at_the_end and num_tasks == config.tasks:
        plan.append((config.protocols[0], config.objectives[0], None))
    with run.phase("evaluate"):
        for protocol, name, images in plan:
            label = f"  {num_tasks} tasks, {protocol} {name or ''}"
            measured = ss.evaluate(
                net,
                store,
                (few_stream if images else stream).test,
                protocol,
                objective=objectives.get(name, ss.entropy),
                progress=functools.partial(tqdm, desc=label, leave=False, unit="task"),
            )
            run.rows += reports.rows_of(protocol, name, images, measured)
            if (protocol, name) == (config.protocols[0], config.objectives[0]):
                counts = metrics.confusion([row.inferred for row in measured])
                np.savez_compressed(run.out / "inferred.npz", counts=counts)
    (gg,) = reports.find(run.rows, scenario="gg", images_per_task=None, tasks_learned=num_tasks)
    gnu = reports.find(run.rows, scenario="gnu", tasks_learned=num_tasks)[0]
    tqdm.write(
        f"{num_tasks} tasks: GG {gg['accuracy']:.4f}, GNu {gnu['accuracy']:.4f} "
        f"({gnu['protocol']}, {gnu['objective']}), task accuracy {gnu['task_accuracy']:.4f}"
    )
    run.write_progress()


def finish(run: Run, config: Config, store: ss.MaskStore) -> dict:
    """Writes everything a finished run has, the result last."""
    reports.write_csv(run.out / "accuracy.csv", run.rows)
    draw(run, config)
    result = run.finish(
        bytes=reports.store_bytes(store, run.store_path),
        metrics=reports.continual_metrics(run.rows),
    )
    reports.print_table(result)
    return result


def draw(run: Run, config: Config) -> None:
    """accuracy.png, matrix.png and inferred.png."""
    figure = reports.figure(run.config)
    curves = [
        {"label": label, "points": points, "color": color, "style": "s--"}
        for method, objective, label, color in (
            ("supsup", "entropy", "paper, GNu, H", plots.PAPER),
            ("upper_bound", None, "paper, a network a task", plots.BOUND),
        )
        if (points := paper.CURVES.get((figure, method, objective)))
    ]
    symbols = {"entropy": "H", "superfluous": "G"}
    drawn = [{"scenario": "gg", "protocol": "given", "images_per_task": None}]
    drawn += [
        {"scenario": "gnu", "protocol": config.protocols[0], "objective": name}
        for name in config.objectives
    ]
    matrices = {}
    for fields in drawn:
        rows = reports.find(run.rows, **fields)
        given = fields["scenario"] == "gg"
        label = "GG" if given else f"GNu, {symbols[fields['objective']]} ({fields['protocol']})"
        matrices[label] = reports.accuracy_matrix(rows)[list(np.subtract(config.checkpoints, 1))]
        curves.append(
            {
                "label": f"ours, {label}",
                "points": {row["tasks_learned"]: row["accuracy"] for row in rows},
                "color": plots.OURS["gg" if given else fields["objective"]],
            }
        )
    title = (
        f"Permuted {config.dataset}, {config.model}, {config.outputs} outputs, seed {config.seed}"
    )
    plots.accuracy_against_tasks(run.out / "accuracy.png", title, curves)
    plots.accuracy_matrices(run.out / "matrix.png", matrices, list(config.checkpoints))
    plots.inferred_tasks(
        run.out / "inferred.png",
        f"{config.tasks} tasks, {config.protocols[0]}, {symbols[config.objectives[0]]}",
        np.load(run.out / "inferred.npz")["counts"],
    )


def cli(argv: list[str]) -> None:
    main(tyro.cli(Args, args=argv, description=__doc__))


if __name__ == "__main__":
    cli(sys.argv[1:])
