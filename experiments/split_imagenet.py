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

import dataclasses
import functools
import math
import shutil
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Literal

import jax
from flax import nnx
from tqdm import tqdm

import supsup_jax as ss
from experiments.frame import checkpoints, learners, loop
from experiments.frame import config as frame
from experiments.frame.rows import Row
from experiments.frame.run import UsageError
from supsup_jax import data, devices, models

MODELS = {
    "resnet50": models.resnet50,
    # Two blocks, which compile in seconds.
    "resnet6": functools.partial(models.ResNet, models.BasicBlock, (1, 1), small_images=False),
}


@dataclasses.dataclass(frozen=True)
class Config(frame.Config):
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
    return frame.trained(
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
class Args(loop.Args):
    """Learns SplitImageNet, a mask a task."""

    preset: Literal[tuple(PRESETS)] = "imagenet-rn50-s8"
    epochs: int | None = None
    """Train each task so long instead of the preset's 100."""
    workers: int = 0
    """Processes that decode images; 0 is this one."""


def options(config: Config, args: Args) -> Config:
    """The preset with --tiny and --epochs in it."""
    if args.tiny:
        config = dataclasses.replace(config, **TINY)
    loop.check_first(config, args)
    if args.workers < 0:
        raise UsageError(f"--workers must not be negative, got {args.workers}")
    if args.epochs is not None:
        if args.epochs < 1:
            raise UsageError(f"--epochs must be at least 1, got {args.epochs}")
        warmup = min(config.warmup_epochs, args.epochs - 1)
        config = dataclasses.replace(config, epochs=args.epochs, warmup_epochs=warmup)
    return training(config)


class StreamedMasks(learners.Masks):
    """SupSup over images that stay on disk, a task at a time, saved inside a task too."""

    def __init__(self, config, net, stream, run):
        super().__init__(config, net, stream, run)
        self.together = 1
        # Of each task right after it was learned, and final: nothing is forgotten.
        self.accuracies: list[float] = []

    def learn(self, group: range) -> None:
        (task,) = group
        config, train = self.config, self.config.train
        key = jax.random.fold_in(self.key, task)
        first = task * train.steps  # checkpoints are numbered by the steps of the whole run
        with (
            checkpoints.manager(self.run) as saved,
            tqdm(total=train.steps, desc=f"  task {task}", leave=False, unit="step") as bar,
        ):
            start = ss.start_training(key, self.net, train)
            latest = saved.latest_step()
            if latest is not None and first < latest < first + train.steps:
                start = checkpoints.restored(saved, latest, start)
            bar.update(int(start.step))

            def on_step(step, progress):
                bar.update()
                if step % config.save_steps == 0 and step < train.steps:
                    checkpoints.save(saved, first + step, progress)
                    self.run.write_progress()

            batches = self.stream.train(task, train.steps, int(start.step))
            learned = ss.train_on_batches(
                key, self.net, batches, train, start=start, on_step=on_step
            )
        self.include(jax.tree.map(devices.on_host, learned.task))

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

    def evaluate(self) -> list[Row]:
        self.last_accuracy()  # a run cut short may lack it
        return [Row(self.config.method, "gg", list(self.accuracies))]

    def save(self) -> None:
        super().save()
        self.run.extra["accuracies"] = list(self.accuracies)
        shutil.rmtree(self.run.out / checkpoints.FOLDER)

    def restore(self) -> None:
        super().restore()
        self.accuracies = self.run.extra.get("accuracies", [])[: self.done]


def load(config: Config, args: Args) -> data.RecordStream:
    """The tasks; raises before anything slow when the dataset is not there, whole."""
    if args.tiny:
        folder = Path(tempfile.mkdtemp())
        from experiments.frame import tiny_imagenet

        tiny_imagenet.prepare(folder)
    order = data.class_order(config.classes, config.class_seed)
    stream = data.RecordStream(
        config.dataset,
        folder if args.tiny else args.data_dir,
        config.classes_per_task,
        order[: config.tasks * config.classes_per_task],
        relabel=True,
        size=config.size,
        batch_size=config.train.batch_size,
        num_workers=args.workers,
        seed=config.seed,
    )
    if args.tiny:  # the images are read as long as there is the stream
        weakref.finalize(stream, shutil.rmtree, folder)
    return stream


def network(config: Config, stream: data.RecordStream) -> ss.Network:
    """The fixed network: signed constant weights from the run's seed."""
    # The module's own weights are thrown away, so its key does not matter.
    module = MODELS[config.model](config.outputs, width=config.width, rngs=nnx.Rngs(0))
    return ss.signed_constant(ss.Network.from_nnx(module), config.seed)


EXPERIMENT = loop.Experiment(
    name="split_imagenet",
    presets=PRESETS,
    load=load,
    stream=lambda config, stream: stream,
    network=network,
    options=options,
    learner=StreamedMasks,
    kind="split",
)

if __name__ == "__main__":
    loop.cli(EXPERIMENT, Args, sys.argv[1:], __doc__)
