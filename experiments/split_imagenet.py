"""SplitImageNet: 100 tasks of ten classes each in one ResNet-50, ids given (paper Figure 2, left).

    python -m experiments.split_imagenet --tiny                       # seconds, no data
    python -m experiments.split_imagenet --preset imagenet-rn50-s8 --data-dir DIR --workers 16

Each task learns a top-k mask over one fixed network and its own norm statistics, by Adam over
random crops. `s` is the budget of the masks: density min(.5, s (I + O) / (I O kh kw)) a layer. The
classes are dealt as in the reference, whatever the seed: it has one split.

    preset             s   weights kept of 23.5 M   paper   its bytes, 100 tasks
    imagenet-rn50-s4   4   0.9%                     .8637   65.50 M
    imagenet-rn50-s8   8   1.7%                     .8868   100.98 M
    imagenet-rn50-s16  16  3.4%                     .8958   195.18 M

None of them has been run yet. `DIR` must hold imagenet2012 as tensorflow-datasets prepares it; the
first run reads all of it once, for its labels. Every task takes 5,100 steps of 256 images, whole
epochs of the mean task, so that one program serves all. `--workers` processes decode images, each
some 240 a second. A run is saved every 500 steps and continues inside a task with --resume, to the
same bits on the same device.

Writes result.json, accuracy.csv, the store (tasks/) and pictures to --out.
"""

import contextlib
import dataclasses
import functools
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import jax
import orbax.checkpoint as ocp
import tyro
from flax import nnx
from tqdm import tqdm

import supsup_jax as ss
from experiments.frame import learners
from experiments.frame import loop as continual
from experiments.frame import rows as reports
from experiments.frame.run import Run, UsageError, usage_errors
from supsup_jax import data, models

MODELS = {
    "resnet50": models.resnet50,
    # Two blocks, which compile in seconds.
    "resnet6": functools.partial(models.ResNet, models.BasicBlock, (1, 1), small_images=False),
}


@dataclasses.dataclass(frozen=True)
class Config(continual.Config):
    """A run over images that stay on disk. `train` follows from the fields below."""

    classes: int = 1000
    classes_per_task: int = 10
    class_seed: int = 1  # of the order in which classes are dealt: the reference's, for any seed
    images_per_class: int = 1282  # of the training split, on average; decides an epoch's steps
    size: int = 224
    width: int = 64
    scale: float = 8  # of the Erdos-Renyi density: the paper's s
    epochs: int = 100
    warmup_epochs: int = 5
    save_steps: int = 500  # after so many a task underway is saved


def training(config: Config) -> Config:
    """The config with its training made from epochs and scale: as many steps for every task."""
    images = config.classes_per_task * config.images_per_class
    steps = math.ceil(images / config.train.batch_size)
    return continual.trained(
        config,
        rule="topk",
        density=ss.ErdosRenyi(config.scale),
        steps=config.epochs * steps,
        schedule="cosine",
        warmup_steps=config.warmup_epochs * steps,
    )


PAPER = Config(
    "imagenet2012",
    "resnet50",
    10,
    100,
    tuple(range(10, 101, 10)),
    protocols=("given",),
    objectives=(),
    train=ss.TrainConfig(optimizer="adam", learning_rate=1e-3, batch_size=256),
    save_every=1,
    stream="split",
)
PRESETS = {f"imagenet-rn50-s{s}": dataclasses.replace(PAPER, scale=float(s)) for s in (4, 8, 16)}
TINY = {
    "dataset": "tiny_imagenet",
    "model": "resnet6",
    "outputs": 2,
    "tasks": 2,
    "checkpoints": (1, 2),
    "train": dataclasses.replace(PAPER.train, learning_rate=1e-2, batch_size=6),
    "classes": 4,
    "classes_per_task": 2,
    "images_per_class": 6,
    "size": 32,
    "width": 4,
    "epochs": 10,
    "warmup_epochs": 1,
    "save_steps": 8,
}


@dataclasses.dataclass(frozen=True)
class Args:
    """Learns SplitImageNet, a mask a task."""

    preset: Literal[tuple(PRESETS)] = "imagenet-rn50-s8"
    data_dir: Path | None = None
    """Folder in which tensorflow-datasets has prepared imagenet2012."""
    out: Path | None = None
    """Folder of the run; by default runs/split_imagenet/PRESET-seedS."""
    seed: int = 0
    """Of weights, scores, batches and crops."""
    tasks: int | None = None
    """Learn the first so many tasks only."""
    epochs: int | None = None
    """Train each task so long instead of the preset's 100."""
    workers: int = 0
    """Processes that decode images; 0 is this one."""
    resume: bool = False
    """Continue the run in --out, or show it when it is finished."""
    tiny: bool = False
    """A smoke test of seconds that needs no data: 2 tasks, a narrow net, a dataset made for it."""

    def config(self) -> Config:
        config = dataclasses.replace(
            PRESETS[self.preset], seed=self.seed, **(TINY if self.tiny else {})
        )
        if self.seed < 0:
            raise UsageError(f"--seed must not be negative, got {self.seed}")
        if self.workers < 0:
            raise UsageError(f"--workers must not be negative, got {self.workers}")
        if self.epochs is not None:
            if self.epochs < 1:
                raise UsageError(f"--epochs must be at least 1, got {self.epochs}")
            warmup = min(config.warmup_epochs, self.epochs - 1)
            config = dataclasses.replace(config, epochs=self.epochs, warmup_epochs=warmup)
        if self.tasks is not None:
            if not 1 <= self.tasks <= config.tasks:
                raise UsageError(f"--tasks must lie in [1, {config.tasks}], got {self.tasks}")
            kept = tuple(c for c in config.checkpoints if c < self.tasks)
            config = dataclasses.replace(config, tasks=self.tasks, checkpoints=(*kept, self.tasks))
        return training(config)

    def folder(self) -> Path:
        name = f"{self.preset}{'-tiny' if self.tiny else ''}-seed{self.seed}"
        return self.out or Path("runs") / "split_imagenet" / name


class StreamedMasks(learners.Masks):
    """SupSup over images that stay on disk, a task at a time, saved inside a task too."""

    def __init__(self, config: Config, net: ss.Network, stream: data.RecordStream, run: Run):
        super().__init__(config, net, stream)
        self.run, self.together = run, 1
        # Of each task right after it was learned, and final: nothing is forgotten.
        self.accuracies: list[float] = []

    def learn(self, group: range) -> None:
        (task,) = group
        config, train = self.config, self.config.train
        key = jax.random.fold_in(self.key, task)
        first = task * train.steps  # checkpoints are numbered by the steps of the whole run
        with (
            learners.checkpoints(self.run) as saved,
            tqdm(total=train.steps, desc=f"  task {task}", leave=False, unit="step") as bar,
        ):
            start = ss.start_training(key, self.net, train)
            latest = saved.latest_step()
            if latest is not None and first < latest < first + train.steps:
                start = saved.restore(latest, args=ocp.args.StandardRestore(start))
            bar.update(int(start.step))

            def on_step(step, progress):
                bar.update()
                if step % config.save_steps == 0 and step < train.steps:
                    saved.save(first + step, args=ocp.args.StandardSave(progress))
                    self.run.write_progress()

            batches = self.stream.train(task, train.steps, int(start.step))
            learned = ss.train_on_batches(
                key, self.net, batches, train, start=start, on_step=on_step
            )
        self.store = self.store.append(learned.task, donate=True)

    def last_accuracy(self) -> float:
        rows = ss.evaluate(
            self.net,
            self.store,
            self.stream.test,
            batch_size=self.config.train.batch_size,
            tasks=range(len(self.accuracies), self.done),
        )
        self.accuracies += [row.accuracy for row in rows]
        return self.accuracies[-1]

    def evaluate(self, run: Run) -> list[dict]:
        self.last_accuracy()  # a run cut short may lack it
        return [reports.given_row(self.config.method, list(self.accuracies))]

    def save(self, run: Run) -> None:
        super().save(run)
        run.extra["accuracies"] = list(self.accuracies)
        shutil.rmtree(run.out / learners.CHECKPOINTS)

    def restore(self, run: Run) -> None:
        super().restore(run)
        self.accuracies = run.extra.get("accuracies", [])[: self.done]


def main(args: Args) -> dict:
    """Runs, or resumes, or shows a run; returns its result."""
    with contextlib.ExitStack() as stack:
        with usage_errors():
            config = args.config()
            run = Run.open(args.folder(), config, args.resume)
            if (result := run.result) is not None:
                print(f"{run.out} is finished:")
                reports.print_table(result)
                return result
            with run.phase("data"):
                folder = stack.enter_context(tiny_data()) if args.tiny else args.data_dir
                stream = make_stream(config, folder, args.workers)
            learner = StreamedMasks(config, build(config), stream, run)
            learner.restore(run)
            run.create()
        if args.tiny:
            print("--tiny: images made for it, not ImageNet's")
        print(f"{run.out}: {config.tasks} tasks of {config.dataset}, {learner.net}")
        continual.learn(run, config, learner)
        return continual.finish(run, config, learner)


@contextlib.contextmanager
def tiny_data() -> Iterator[Path]:
    """A temporary folder with a prepared dataset of a few images."""
    from experiments.frame import tiny_imagenet

    with tempfile.TemporaryDirectory() as folder:
        tiny_imagenet.prepare(Path(folder))
        yield Path(folder)


def make_stream(config: Config, data_dir: Path | None, workers: int) -> data.RecordStream:
    """The tasks; raises before anything slow when the dataset is not there, whole."""
    order = data.class_order(config.classes, config.class_seed)
    return data.RecordStream(
        config.dataset,
        data_dir,
        config.classes_per_task,
        order[: config.tasks * config.classes_per_task],
        relabel=True,
        size=config.size,
        batch_size=config.train.batch_size,
        num_workers=workers,
        seed=config.seed,
    )


def build(config: Config) -> ss.Network:
    """The fixed network: signed constant weights from the run's seed."""
    # The module's own weights are thrown away, so its key does not matter.
    module = MODELS[config.model](config.outputs, width=config.width, rngs=nnx.Rngs(0))
    return ss.signed_constant(ss.Network.from_nnx(module), config.seed)


def cli(argv: list[str]) -> None:
    main(tyro.cli(Args, args=argv, description=__doc__))


if __name__ == "__main__":
    cli(sys.argv[1:])
