"""The frame of a continual-learning run, which the scripts fill with presets.

Learns a stream of tasks one after another by one method, and at each checkpoint asks how well all
of them are recognised: with the id given (GG), and inferred where the method can (GNs with shared
labels, GNu where the wrong task is an error). Writes result.json, accuracy.csv (the accuracy
matrix), what was learned, inferred.npz (which task was inferred for which) and pictures to --out.
"""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
import tyro
from flax import nnx
from tqdm import tqdm

import supsup_jax as ss
from experiments.frame import hosts, learners, paper, plots
from experiments.frame import rows as reports
from experiments.frame import run as runs
from experiments.frame.run import Run, UsageError, usage_errors
from supsup_jax import data, models

MODELS = {
    "lenet_300_100": models.lenet_300_100,
    "fc_1024_1024": models.fc_1024_1024,
    "notebook_300_300": models.notebook_300_300,
}


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
    later: ss.TrainConfig | None = None  # of tasks whose own weights alone are trained
    save_every: int = 100
    seed: int = 0
    independent_seeds: bool = False
    method: str = "supsup"  # of learners.METHODS
    stream: str = "permuted"  # or "rotated"
    rule: str = "one_shot"  # how SupSup infers a task


@dataclasses.dataclass(frozen=True)
class Args(hosts.Args):
    """What every script takes; each adds `preset`, a name of its PRESETS."""

    PRESETS: ClassVar[dict[str, Config]]
    SCRIPT: ClassVar[str]

    method: str = "supsup"
    """supsup, or what the paper compares with: upper_bound, lower_bound, separate_heads,
    separate_heads_random, batche, batche_random, abatche, psp."""
    data_dir: Path | None = None
    """Folder in which tensorflow-datasets has prepared the dataset."""
    out: Path | None = None
    """Folder of the run; by default runs/SCRIPT/PRESET-METHOD-seedS."""
    seed: int = 0
    """Of weights, scores, batches and permutations."""
    tasks: int | None = None
    """Learn this many tasks instead of the preset's."""
    outputs: int | None = None
    """Outputs of the network instead of the preset's (the paper's s)."""
    steps: int | None = None
    """Training steps a task instead of the preset's."""
    independent_seeds: bool = False
    """Permutations that no two seeds share; the paper's seeds share nearly all."""
    resume: bool = False
    """Continue the run in --out, or show it when it is finished."""
    tiny: bool = False
    """A smoke test of seconds that needs no data: 3 tasks, 50 steps, digits or drawn images."""

    # What a script may do its own way.
    def load(self, config: Config) -> data.Dataset:
        """The dataset; raises before anything slow when it is not there."""
        return load(config, self.data_dir)

    def make_stream(self, config: Config, dataset: data.Dataset) -> Any:
        """The tasks, as a PermutedStream has them."""
        return make_stream(config, dataset)

    def build(self, config: Config, dataset: data.Dataset) -> ss.Network:
        """The fixed network."""
        return build(config, dataset)

    def configure(self, config: Config) -> Config:
        """A preset's config, which is SupSup's, made for --method."""
        return learners.METHODS[self.method].configure(config, self.method)

    def config(self) -> Config:
        """The preset with the other arguments put in. Raises UsageError for one out of range."""
        config = dataclasses.replace(
            self.PRESETS[self.preset], seed=self.seed, independent_seeds=self.independent_seeds
        )
        if self.method not in learners.METHODS:
            raise UsageError(
                f"--method must be one of {', '.join(learners.METHODS)}, got {self.method!r}"
            )
        config = self.configure(config)
        if self.tiny:
            config = dataclasses.replace(
                config,
                dataset="digits" if config.dataset == "digits" else "synthetic",
                tasks=3,
                checkpoints=(2, 3),
                images_per_task=config.images_per_task and 128,
            )
            config = trained(config, steps=50, learning_rate=1e-3)
        if self.seed < 0:
            raise UsageError(f"--seed must not be negative, got {self.seed}")
        for name in ("steps", "outputs", "tasks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name} must be at least 1, got {value}")
        if self.steps is not None:
            config = trained(config, steps=self.steps)
        if self.outputs is not None:
            config = dataclasses.replace(config, outputs=self.outputs)
        if self.tasks is not None:
            kept = tuple(c for c in config.checkpoints if c < self.tasks)
            config = dataclasses.replace(config, tasks=self.tasks, checkpoints=(*kept, self.tasks))
        return config

    def folder(self) -> Path:
        """Where the run is kept."""
        named = [self.preset, *(["tiny"] if self.tiny else []), f"seed{self.seed}"]
        if self.method != "supsup":
            named.insert(1, self.method)
        if self.outputs is not None:
            named.insert(-1, f"s{self.outputs}")
        return self.out or Path("runs") / self.SCRIPT / "-".join(named)


def trained(config: Config, **changes: Any) -> Config:
    """The config with every training of it changed."""
    later = config.later and dataclasses.replace(config.later, **changes)
    train = dataclasses.replace(config.train, **changes)
    return dataclasses.replace(config, train=train, later=later)


def saved_config(out: Path) -> Config:
    """The config of the run in `out`. Raises UsageError where there is none."""
    fields = Run.saved(out)["config"]
    tuples = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    trainings = {
        name: fields[name] and ss.TrainConfig(**fields[name]) for name in ("train", "later")
    }
    return Config(**{**fields, **tuples, **trainings})


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
            dataset = args.load(config)
            stream = args.make_stream(config, dataset)
        learner = learners.make(config, args.build(config, dataset), stream)
        learner.restore(run)
        run.create()
        hosts.check_shared(run.out / "progress.json")
    if config.dataset == "synthetic":
        print("--tiny: images drawn from a key with the dataset's shapes, not real data")
    print(f"{run.out}: {config.tasks} tasks of {dataset.name} by {config.method}, {learner.net}")
    learn(run, config, learner)
    return finish(run, config, learner)


def load(config: Config, data_dir: Path | None) -> data.Dataset:
    """The dataset; raises before anything slow when it is not there."""
    if config.dataset == "synthetic":
        return data.synthetic(jax.random.key(config.seed), (28, 28), 10, 512, 256)
    return data.load_dataset(config.dataset, data_dir, config.seed)


def make_stream(config: Config, dataset: data.Dataset) -> data.ViewStream:
    """The tasks."""
    if config.stream == "rotated":
        return data.RotatedStream(dataset, config.tasks)
    return data.PermutedStream(dataset, config.tasks, config.seed, config.independent_seeds)


def build(config: Config, dataset: data.Dataset) -> ss.Network:
    """The fixed network: signed constant weights from the run's seed."""
    least = dataset.num_labels + (config.method in learners.NEED_SUPERFLUOUS)
    if config.outputs < least:
        raise UsageError(
            f"outputs must be at least {least}: the {dataset.num_labels} labels, and for "
            f"task inference more; got {config.outputs}"
        )
    # The module's own weights are thrown away, so its key does not matter.
    module = MODELS[config.model](config.outputs, num_inputs=dataset.num_pixels, rngs=nnx.Rngs(0))
    return ss.signed_constant(ss.Network.from_nnx(module), config.seed)


def learn(run: Run, config: Config, learner: Any) -> None:
    """Learns what is left to learn, evaluates what is left to evaluate, and saves on the way."""
    evaluated = {row["tasks_learned"] for row in run.rows}
    if learner.done in config.checkpoints and learner.done not in evaluated:
        checkpoint(run, learner)
    stops = {*config.checkpoints, *range(0, config.tasks, config.save_every)}
    hidden = not runs.writes()
    with tqdm(initial=learner.done, total=config.tasks, unit="task", disable=hidden) as bar:
        while (done := learner.done) < config.tasks:
            group = range(done, min([done + learner.together, *(s for s in stops if s > done)]))
            with run.phase("train"):
                learner.learn(group)
            with run.phase("evaluate"):
                accuracy = learner.last_accuracy()
            bar.set_postfix(task=group.stop - 1, accuracy=f"{accuracy:.4f}", refresh=False)
            bar.update(len(group))
            if group.stop in stops or learner.appends:
                with run.phase("save"):
                    learner.save(run)
                run.write_progress()
            if group.stop in config.checkpoints:
                checkpoint(run, learner)


def checkpoint(run: Run, learner: Any) -> None:
    """Evaluates the tasks learned so far and keeps the rows."""
    with run.phase("evaluate"):
        rows = learner.evaluate(run)
    run.rows += rows
    (gg,) = reports.find(rows, scenario="gg", images_per_task=None)
    said = f"{gg['tasks_learned']} tasks: GG {gg['accuracy']:.4f}"
    if gnu := reports.find(rows, scenario="gnu"):
        said += (
            f", GNu {gnu[0]['accuracy']:.4f} ({gnu[0]['protocol']}, {gnu[0]['objective']}), "
            f"task accuracy {gnu[0]['task_accuracy']:.4f}"
        )
    if runs.writes():
        tqdm.write(said)
    run.write_progress()


def finish(run: Run, config: Config, learner: Any) -> dict:
    """Writes everything a finished run has, the result last."""
    if not runs.writes():
        hosts.meet("the result is written")
        return run.result
    reports.write_csv(run.out / "accuracy.csv", run.rows)
    draw(run, config)
    result = run.finish(
        experiment=config.stream,
        bytes=learner.bytes(run),
        kept=learner.kept(),
        metrics=reports.continual_metrics(run.rows),
    )
    hosts.meet("the result is written")
    reports.print_table(result)
    return result


def draw(run: Run, config: Config) -> None:
    """accuracy.png and matrix.png, and inferred.png where tasks were inferred."""
    curves, matrices = [], {}
    for label, rows in drawn_series(run.rows, config):
        matrices[label] = reports.accuracy_matrix(rows)[list(np.subtract(config.checkpoints, 1))]
        curves.append(plots.curve(f"ours, {label}", reports.points(rows), rows[0]))
    for method in dict.fromkeys((config.method, "supsup", "upper_bound")):
        for objective in (None, "entropy", "superfluous"):
            points = paper.CURVES.get((reports.figure(run.config), method, objective))
            if points and points not in [curve["points"] for curve in curves]:  # H's may be G's
                curves.append(plots.paper_curve(method, objective, points))
    title = (
        f"{config.stream.capitalize()} {config.dataset}, {config.model}, {config.outputs} outputs, "
        f"seed {config.seed}"
    )
    plots.accuracy_against_tasks(run.out / "accuracy.png", title, curves)
    plots.accuracy_matrices(run.out / "matrix.png", matrices, list(config.checkpoints))
    if (counts := run.out / "inferred.npz").exists():
        plots.inferred_tasks(
            run.out / "inferred.png",
            f"{config.tasks} tasks, {config.protocols[0]}",
            np.load(counts)["counts"],
        )


def drawn_series(rows: list[dict], config: Config) -> list[tuple[str, list[dict]]]:
    """GG, and GNu by the first protocol, each objective: (label, rows)."""
    found = []
    for (method, scenario, objective, protocol, images), series in reports.series(rows).items():
        if scenario == "gg" and images is None:
            found.append((f"{plots.METHODS[method]}, GG", series))
        elif scenario == "gnu" and protocol == config.protocols[0]:
            symbol = plots.OBJECTIVES[objective]
            first = f", first {images} images" if images else ""
            found.append((f"{plots.METHODS[method]}, GNu, {symbol} ({protocol}{first})", series))
    return found


def cli(args_class: type[Args], argv: list[str], description: str) -> None:
    """A script's entry."""
    args = tyro.cli(args_class, args=argv, description=description)
    with hosts.joined(args):
        main(args)
