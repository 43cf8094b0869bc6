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

s is the paper's name for the number of outputs in all, of which the first 10 are labels.
Writes result.json, accuracy.csv, store.npz and three pictures to --out.
"""

import csv
import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro
from flax import nnx
from tqdm import tqdm

import supsup_jax as ss
from experiments import paper, plots
from experiments.runs import Run, UsageError, usage_errors
from supsup_jax import data, metrics, models, prng

MODELS = {"lenet_300_100": models.lenet_300_100, "fc_1024_1024": models.fc_1024_1024}


@dataclasses.dataclass(frozen=True)
class Config:
    """All that decides a run's numbers; a resumed run must have the same."""

    dataset: str  # "digits", "synthetic", or a name that TFDS has prepared
    model: str
    outputs: int  # C, of which the dataset's labels come first
    tasks: int
    checkpoints: tuple[int, ...]  # tasks learned at which all protocols are run
    protocols: tuple[str, ...] = ("paper", "per_example", "batch-8")
    objectives: tuple[str, ...] = ("entropy", "superfluous")
    # Test images of each task that per_example and batch-m look at; paper looks at all.
    images_per_task: int | None = None
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
}


@dataclasses.dataclass(frozen=True)
class Args:
    """Learns permuted tasks in one network and finds the right one by one gradient."""

    preset: Literal["digits", "mnist-10", "mnist-250-lenet", "mnist-250-fc", "mnist-2500-lenet"] = (
        "digits"
    )
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
    store = learn(run, config, net, store, stream, dataset)
    return finish(run, config, store, dataset)


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
    dataset: data.Dataset,
) -> ss.MaskStore:
    """Learns what is left to learn, evaluates what is left to evaluate, and saves on the way."""
    key = prng.purpose_key(jax.random.key(config.seed), "tasks")
    evaluated = {row["tasks_learned"] for row in run.rows}
    done = int(store.num_tasks)
    if done in config.checkpoints and done not in evaluated:
        checkpoint(run, config, net, store, stream, dataset)
    with tqdm(range(done, config.tasks), initial=done, total=config.tasks, unit="task") as bar:
        for i in bar:
            with run.phase("train"):
                result = ss.train_task(
                    jax.random.fold_in(key, i), net, stream.train[i], config.train
                )
                store = store.append(result.task, donate=True)
            # The last steps' loss is on data the masks have seen; it says that learning works.
            bar.set_postfix(task=i, loss=f"{float(result.loss[-20:].mean()):.3f}", refresh=False)
            if i + 1 in config.checkpoints:
                run.save(store)
                checkpoint(run, config, net, store, stream, dataset)
            elif (i + 1) % config.save_every == 0:
                run.save(store)
    return store


def checkpoint(
    run: Run,
    config: Config,
    net: ss.Network,
    store: ss.MaskStore,
    stream: data.PermutedStream,
    dataset: data.Dataset,
) -> None:
    """Runs every protocol over the tasks learned so far and keeps the rows."""
    num_tasks = int(store.num_tasks)
    objectives = {"entropy": ss.entropy, "superfluous": ss.Superfluous(dataset.num_labels)}
    few = data.PermutedStream(
        dataset.limit_test(config.images_per_task),
        config.tasks,
        config.seed,
        config.independent_seeds,
    )
    plan = [("given", None)]
    plan += [(protocol, name) for protocol in config.protocols for name in config.objectives]
    with run.phase("evaluate"):
        for protocol, name in plan:
            rows = ss.evaluate(
                net,
                store,
                (stream if protocol in ("given", "paper") else few).test,
                protocol,
                objective=objectives.get(name, ss.entropy),
                progress=lambda tasks, label=f"{protocol} {name or ''}": tqdm(
                    tasks, desc=f"  {num_tasks} tasks, {label}", leave=False, unit="task"
                ),
            )
            record(run, num_tasks, protocol, name, rows)
    gnu = next((r for r in run.rows[::-1] if r["scenario"] == "gnu"), None)
    gg = next(r for r in run.rows[::-1] if r["scenario"] == "gg")
    if gnu:
        tqdm.write(
            f"{num_tasks} tasks: GG {gg['accuracy']:.4f}, GNu {gnu['accuracy']:.4f} "
            f"({gnu['protocol']}, {gnu['objective']}), task accuracy {gnu['task_accuracy']:.4f}"
        )
    run.write_progress()


def record(run: Run, num_tasks: int, protocol: str, objective: str | None, rows: list) -> None:
    """Adds the rows of one evaluation: one a scenario, and its per-task detail."""
    given = protocol == "given"
    shared = {
        "method": "supsup",
        "objective": objective,
        "protocol": protocol,
        "tasks_learned": num_tasks,
        "decisions": sum(row.decisions for row in rows),
    }
    task_accuracy = None
    if not given:
        confusion = metrics.confusion([row.inferred for row in rows])
        task_accuracy = metrics.task_accuracy(confusion)
    for scenario, accuracies in (
        [("gg", [row.accuracy for row in rows])]
        if given
        else [
            ("gns", [row.shared_accuracy for row in rows]),
            ("gnu", [row.accuracy for row in rows]),
        ]
    ):
        run.rows.append(
            {
                **shared,
                "scenario": scenario,
                "accuracy": float(np.mean(accuracies)),
                "task_accuracy": task_accuracy,
            }
        )
        name = "/".join(filter(None, (scenario, objective, protocol)))
        run.details.setdefault(name, {})[str(num_tasks)] = accuracies
    if not given:
        # Only the last checkpoint's is drawn, and T x T counts are long.
        run.details["inferred"] = {
            **(run.details.get("inferred", {}) if _same_tasks(run, num_tasks) else {}),
            f"{objective}/{protocol}": confusion.tolist(),
        }
        run.details["inferred_at"] = num_tasks


def _same_tasks(run, num_tasks):
    return run.details.get("inferred_at") == num_tasks


def finish(run: Run, config: Config, store: ss.MaskStore, dataset: data.Dataset) -> dict:
    """Writes everything a finished run has, the result last."""
    matrices = {name: matrix(config, rows) for name, rows in accuracies(run).items()}
    write_csv(run.out / "accuracy.csv", run)
    draw(run, config, matrices, dataset)
    bound = math.ceil(config.tasks * store.layout.num_weights / 8)
    result = run.finish(
        bytes={
            "masks": int(store.num_tasks) * store.layout.num_words * 4,
            # Threshold masks keep about half of the weights, where log2 C(n, k) is n.
            "masks_bound": bound,
            "norm_statistics": 0,
            "heads": 0,
            "seed": 4,
            "store_file": run.store_path.stat().st_size,
        },
        metrics={
            name: {
                "acc": metrics.average_accuracy(square(matrix)),
                "average_incremental_accuracy": metrics.average_incremental_accuracy(
                    square(matrix)
                ),
                "forgetting": metrics.forgetting(square(matrix)),
                "bwt": metrics.backward_transfer(square(matrix)),
                "measured_after": list(config.checkpoints),
            }
            for name, matrix in matrices.items()
        },
    )
    print_table(result)
    return result


def accuracies(run: Run) -> dict[str, dict[str, list[float]]]:
    """Per-task accuracies of each scenario/objective/protocol, by tasks learned."""
    return {name: rows for name, rows in run.details.items() if name.startswith("g")}


def matrix(config: Config, rows: dict[str, list[float]]) -> np.ndarray:
    """R at the checkpoints: [len(checkpoints), T], NaN where a task was not yet learned."""
    result = np.full((len(config.checkpoints), config.tasks), np.nan)
    for i, tasks in enumerate(config.checkpoints):
        result[i, :tasks] = rows[str(tasks)]
    return result


def square(rows: np.ndarray) -> np.ndarray:
    """R [T, T] of the checkpoint rows, NaN between."""
    num_tasks = rows.shape[1]
    result = np.full((num_tasks, num_tasks), np.nan)
    for row in rows:
        result[np.isfinite(row).sum() - 1] = row
    return result


def write_csv(path: Path, run: Run) -> None:
    """R in long form: one line for each accuracy measured."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["scenario", "objective", "protocol", "tasks_learned", "task", "accuracy"])
        for name, rows in accuracies(run).items():
            scenario, *objective, protocol = name.split("/")
            for tasks, values in rows.items():
                for task, accuracy in enumerate(values):
                    writer.writerow(
                        [scenario, *(objective or [""]), protocol, tasks, task, accuracy]
                    )


def draw(run: Run, config: Config, matrices: dict[str, np.ndarray], dataset: data.Dataset) -> None:
    """accuracy.png, matrix.png and inferred.png."""
    figure = f"{config.model}/{config.outputs}"
    curves = []
    if dataset.name == "mnist":
        for method, label, color in (
            ("supsup", "paper, GNu, H", plots.PAPER),
            ("upper_bound", "paper, a network a task", plots.BOUND),
        ):
            objective = "entropy" if method == "supsup" else None
            if points := paper.CURVES.get((figure, method, objective)):
                curves.append({"label": label, "points": points, "color": color, "style": "s--"})
    protocol = config.protocols[0]
    wanted = [("gg", None, "given", "ours, GG (id given)", plots.GIVEN, "o-")]
    wanted += [
        ("gnu", name, protocol, f"ours, GNu, {symbol} ({protocol})", plots.OURS, style)
        for name, symbol, style in (("entropy", "H", "o-"), ("superfluous", "G", "^:"))
        if name in config.objectives
    ]
    for scenario, objective, protocol, label, color, style in wanted:
        points = {
            row["tasks_learned"]: row["accuracy"]
            for row in run.rows
            if (row["scenario"], row["objective"], row["protocol"])
            == (scenario, objective, protocol)
        }
        curves.append({"label": label, "points": points, "color": color, "style": style})
    title = f"Permuted {dataset.name}, {config.model}, {config.outputs} outputs, seed {config.seed}"
    plots.accuracy_against_tasks(run.out / "accuracy.png", title, curves)
    key = f"gnu/{config.objectives[0]}/{config.protocols[0]}"
    plots.accuracy_matrices(
        run.out / "matrix.png",
        {"GG": matrices["gg/given"], f"GNu, {config.protocols[0]}": matrices[key]},
        list(config.checkpoints),
    )
    decided = f"{config.objectives[0]}/{config.protocols[-1]}"
    plots.inferred_tasks(
        run.out / "inferred.png",
        f"Task inferred, {config.tasks} tasks ({config.protocols[-1]})",
        np.asarray(run.details["inferred"][decided]),
    )


def print_table(result: dict) -> None:
    """Ours beside the paper's, a line a row, and the seconds by phase."""
    config = result["config"]
    figure = f"{config['model']}/{config['outputs']}"
    print(
        f"\n{'tasks':>5}  {'scenario':8}  {'objective':11}  {'protocol':11}  {'ours':>6}  "
        f"{'paper':>6}  {'diff':>7}  {'task acc':>8}  {'decisions':>9}"
    )
    for row in result["rows"]:
        theirs = None
        if config["dataset"] == "mnist" and row["scenario"] == "gnu":
            curve = paper.CURVES.get((figure, "supsup", row["objective"]), {})
            theirs = curve.get(row["tasks_learned"])
        print(
            f"{row['tasks_learned']:5}  {row['scenario']:8}  {row['objective'] or '-':11}  "
            f"{row['protocol']:11}  {row['accuracy']:.4f}  {_show(theirs, '6.4f')}  "
            f"{_show(theirs and row['accuracy'] - theirs, '+7.4f')}  "
            f"{_show(row['task_accuracy'], '8.4f')}  {row['decisions']:9}"
        )
    spent = ", ".join(f"{name} {seconds:.1f}" for name, seconds in result["seconds"].items())
    print(f"\nseconds: {spent}")
    print(f"bytes: masks {result['bytes']['masks']:,}, store {result['bytes']['store_file']:,}")


def _show(value, form):
    return "-".rjust(int(form.strip("+").split(".")[0])) if value is None else f"{value:{form}}"


def cli(argv: list[str] | None = None, run: Callable[[Args], dict] = main) -> None:
    run(tyro.cli(Args, args=argv, description=__doc__))


if __name__ == "__main__":
    cli(sys.argv[1:])
