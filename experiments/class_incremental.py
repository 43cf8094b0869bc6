"""Class-incremental: natural images, no task id, and no stored image; by masks alone.

    python -m experiments.class_incremental --tiny                       # seconds, no data
    python -m experiments.class_incremental --data-dir DIR               # CIFAR-10, 5 tasks of 2
    python -m experiments.class_incremental --preset tiny-imagenet32-10x10 --data-dir DIR

One gradient names the task of permuted images, and is at chance on natural classes. Here every step
that helps is measured on its own: each mask tried alone in place of one gradient, the raw logit in
place of a certainty, turned images as superfluous outputs (ss.LabelledViews) and the average over
turns, transfer from earlier masks, scores standardised by each task's own held-out images, feature
statistics, and images that decide together.

    preset                  network                     tasks    made for
    cifar10                 3 convolutions, 48-96-192   5 x 2    2 CPU cores
    tiny-imagenet32-10x10   the same                    10 x 10  2 CPU cores
    tiny-imagenet32-20x5    the same                    20 x 5   2 CPU cores
    cifar10-gpu             ResNet-18 of width 64       5 x 2    a GPU

--trainings: "plain" learns labels only, its other outputs are superfluous as the paper's; "views"
learns the four turns of each image as classes; "+transfer" starts scores at the mean of those of
earlier tasks. Each task's last training images (--held-out) are kept from it, to measure its scores
by. Tasks are saved as they are learned, and --resume goes on. Rows: accuracy with the task given
(TIL), class-incremental accuracy (CIL) and how often the task is named, by one image and by 5, 20
and 100 images of one task together. Writes result.json to --out, and ends with the table.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from tqdm import tqdm

import supsup_jax as ss
from experiments.frame import bench, judging
from experiments.frame.run import Run, UsageError, usage_errors
from supsup_jax import data, labelled_views, models, prng

GROUPS = (1, 5, 20, 100)
# Images that go through a network together in measurements.
BATCH = 250
# Of images known to be of a learned task, the fraction that may be refused.
RATE = 0.05
# Where images of no learned task come from.
STRANGERS = {"cifar10_jpeg": "tiny_imagenet32", "tiny_imagenet32": "cifar10_jpeg"}
TRAININGS = ("plain", "views", "plain+transfer", "views+transfer")


@dataclasses.dataclass(frozen=True)
class Config:
    """One run: its data, its network, and how each task is trained."""

    dataset: str
    tasks: int
    classes: int  # a task
    steps: int
    batch_size: int = 128
    learning_rate: float = 5e-3
    model: str = "conv_net"
    widths: tuple[int, ...] = (48, 96, 192)
    norm: str = "batch"
    held_out: int = 500
    trainings: tuple[str, ...] = ("plain", "views", "views+transfer")
    seed: int = 0

    @property
    def views(self) -> ss.LabelledViews:
        return ss.LabelledViews(self.classes)


CIFAR10 = Config("cifar10_jpeg", 5, 2, steps=1500)
PRESETS = {
    "cifar10": CIFAR10,
    "tiny-imagenet32-10x10": dataclasses.replace(
        CIFAR10, dataset="tiny_imagenet32", tasks=10, classes=10, steps=700, held_out=250
    ),
    "tiny-imagenet32-20x5": dataclasses.replace(
        CIFAR10, dataset="tiny_imagenet32", tasks=20, classes=5, steps=400, held_out=125
    ),
    "cifar10-gpu": dataclasses.replace(CIFAR10, model="gem_resnet18", widths=(64,), steps=19_500),
}
TINY = Config(
    "synthetic",
    3,
    2,
    steps=3,
    batch_size=8,
    widths=(4, 8),
    held_out=6,
    trainings=("plain", "views"),
)


@dataclasses.dataclass(frozen=True)
class Args:
    """Names the task of natural images by masks alone."""

    preset: Literal[tuple(PRESETS)] = "cifar10"
    data_dir: Path | None = None
    """Folder in which tensorflow-datasets has prepared the dataset."""
    out: Path | None = None
    """By default runs/class_incremental/PRESET-seedS."""
    seed: int = 0
    """Of weights, scores, batches and views. Classes are dealt in the dataset's order."""
    steps: int | None = None
    """Of each task instead of the preset's."""
    norm: str | None = None
    """batch, layer or group instead of the preset's."""
    trainings: tuple[Literal[TRAININGS], ...] | None = None
    """Instead of the preset's."""
    resume: bool = False
    tiny: bool = False
    """A smoke test of seconds that needs no data: drawn images, three tasks, few steps."""


class ConvFeatures(models.ConvNet):
    """A ConvNet's weights, and the mean over the image of what its classifier sees."""

    def __call__(self, x):
        return self.features(x).mean((1, 2))


def network(config: Config, features: bool = False) -> ss.Network:
    """The fixed network, of an output for each class in each view; or that of its features."""
    rngs, outputs = nnx.Rngs(0), config.views.num_outputs
    if config.model == "gem_resnet18":
        module = models.gem_resnet18(outputs, width=config.widths[0], norm=config.norm, rngs=rngs)
    else:
        make = ConvFeatures if features else models.ConvNet
        strides = (2,) * len(config.widths)
        module = make(outputs, widths=config.widths, strides=strides, norm=config.norm, rngs=rngs)
    return ss.signed_constant(ss.Network.from_nnx(module), config.seed)


def tasks_of(config: Config, dataset: data.Dataset) -> tuple[list, list, list]:
    """Of each task what it learns from, what is held out of that, and its test data."""
    stream = data.SplitStream(
        dataset, config.classes, range(config.tasks * config.classes), relabel=True
    )
    learned, held = [], []
    for i in range(config.tasks):
        whole = stream.train[i]
        cut = whole.num_examples - config.held_out
        learned.append(part(whole, slice(cut)))
        held.append(part(whole, slice(cut, None)))
    return learned, held, list(stream.test)


def part(task: ss.TaskData, rows: slice) -> ss.TaskData:
    return dataclasses.replace(task, inputs=task.inputs[rows], labels=task.labels[rows])


def train_config(config: Config, training: str, dataset: data.Dataset) -> ss.TrainConfig:
    pixels = dataset.train.transform
    assert isinstance(pixels, ss.Normalize)  # which knows what black is
    return ss.TrainConfig(
        steps=config.steps,
        batch_size=config.batch_size,
        optimizer="adam",
        learning_rate=config.learning_rate,
        schedule="cosine",
        augment=data.CropAndFlip(4, pixels),
        views=config.views if training.startswith("views") else None,
    )


def learn(run: Run, config: Config, training: str, net, dataset, tasks) -> ss.MaskStore:
    """The masks of all tasks, those learned before from the run's folder."""
    how = train_config(config, training, dataset)
    mean = ss.ScoreMean.create(net) if training.endswith("+transfer") else None
    key = prng.purpose_key(jax.random.key(config.seed), "tasks")
    with ss.DiskStore.open(run.out / training.replace("+", "-"), net, mode="a") as disk:
        if mean is not None:
            for i in range(len(disk)):
                mean = mean.include(disk.scores(i))
        for i in tqdm(range(len(disk), len(tasks)), unit="task", desc=training):
            one = jax.random.fold_in(key, i)
            with run.phase(f"train {training}"):
                learned = ss.train_task(one, net, tasks[i], how, mean)
                if mean is not None:
                    mean = mean.include(learned.scores)
                disk.append(learned.task, learned.scores if mean is not None else None)
            run.write_progress()
        return disk.load()


@jax.jit
def _inputs(task, index):
    return task.batch(index)[0]


@functools.partial(jax.jit, static_argnames="view")
def _outputs(net, store, x, i, view):
    task = store.task(i)
    return net(task.mask, view(x), task.state)


def outputs(
    net, store, task: ss.TaskData, view: Callable = labelled_views.unturned, masks=None
) -> np.ndarray:
    """What the network gives for a task's data in a view under each mask alone, [T, N, C].

    masks: which; None for all.
    """
    masks = range(int(store.num_tasks)) if masks is None else masks
    found = []
    for start in range(0, task.num_examples, BATCH):
        x = _inputs(task, jnp.arange(start, min(start + BATCH, task.num_examples)))
        each = [_outputs(net, store, x, i, view) for i in masks]
        found.append(np.stack(jax.device_get(each)))
    return np.concatenate(found, axis=1)


def measure(config: Config, training: str, net, store, tasks, strangers) -> list[dict]:
    """The rows of one training."""
    learned, held, test = tasks
    labels, views = config.classes, config.views
    parts = {"test": test, "held": held, "strangers": [strangers]}
    seen = views.views if training.startswith("views") else views.views[:1]
    logits = {
        name: np.stack(
            [joined([outputs(net, store, each, view) for each in split]) for view in seen]
        )
        for name, split in parts.items()
    }
    found = {name: judging.by_rule(views, each) for name, each in logits.items()}
    last = list(found["test"])[-1]
    if config.model == "conv_net":
        by_features = features_under(config, store, learned)
        for name, split in parts.items():
            features = joined([outputs(by_features.net, store, each) for each in split])
            found[name][last]["mahalanobis"] = by_features.scores(features)
    of_test, of_held = (
        np.repeat(np.arange(len(split)), [each.num_examples for each in split])
        for split in (test, held)
    )
    y, rows = np.concatenate([np.asarray(each.labels) for each in test]), []
    for kind in found["test"]:
        shown = logits["test"][0] if kind == "one view" else judging.averaged(views, logits["test"])
        right = shown[..., :labels].argmax(-1) == y
        given = float(right[of_test, np.arange(len(y))].mean())
        scores = with_standardised({name: found[name][kind] for name in parts}, of_held)
        for rule in scores["test"]:
            row = {"training": training, "network": kind, "rule": rule, "given": given}
            for group in GROUPS:
                row[f"task_{group}"], row[f"cil_{group}"] = judging.judged(
                    scores["test"][rule], right, of_test, group
                )
            known, kept_out, unknown = (scores[name][rule] for name in parts)
            row |= judging.refusals(known, kept_out, unknown, RATE)
            rows.append(row | {"tasks_learned": config.tasks})
    rows += by_one_gradient(config, training, net, store, test)
    return rows + (by_misfit(config, training, net, store, held, test) if net.state else [])


def joined(parts: list[np.ndarray]) -> np.ndarray:
    """[T, N, ...] of the images of several, one after another."""
    return np.concatenate(parts, axis=1)


def with_standardised(scores: dict[str, dict], of_held: np.ndarray) -> dict[str, dict]:
    """Scores of each part by rule, with the standardised ones behind them, and sums of those."""
    held, found = scores["held"], {}
    for part, rules in scores.items():
        white = {
            rule: judging.standardised(each, held[rule], of_held) for rule, each in rules.items()
        }
        found[part] = rules | {f"{rule}, standardised": each for rule, each in white.items()}
        names, total = "max logit", white["max logit"]
        for rule in ("own view", "mahalanobis"):
            if rule in white:
                names, total = f"{names} + {rule}", total + white[rule]
                found[part][names] = total
    return found


class Features(NamedTuple):
    """A network of features, and of each task's training images under its mask the features [M, D]
    and the labels [M].
    """

    net: ss.Network
    own: list[np.ndarray]
    labels: list[np.ndarray]

    def scores(self, features: np.ndarray) -> np.ndarray:
        return judging.mahalanobis(features, self.own, self.labels)


def features_under(config: Config, store, learned) -> Features:
    net = network(config, features=True)
    own = [outputs(net, store, task, masks=[i])[0] for i, task in enumerate(learned)]
    return Features(net, own, [np.asarray(task.labels) for task in learned])


def by_one_gradient(config: Config, training: str, net, store, test) -> list[dict]:
    """Rows of `one_shot`."""
    rows, metric = [], ss.LabelAccuracy(config.classes)
    for name, objective in (("entropy", ss.entropy), ("G", ss.Superfluous(config.classes))):
        row: dict[str, Any] = {"training": training, "network": "one view"}
        row["rule"] = f"one gradient, {name}"
        for group in (1, 20):
            if test[0].num_examples < group:
                continue
            protocol = "per_example" if group == 1 else f"batch-{group}"
            found = ss.evaluate(net, store, test, protocol, objective=objective, metric=metric)
            named = np.array([each.task_accuracy for each in found], float)
            row[f"task_{group}"] = float(named.mean())
            row[f"cil_{group}"] = float(np.mean([each.accuracy for each in found]))
        rows.append(row | {"tasks_learned": config.tasks})
    return rows


def by_misfit(config: Config, training: str, net, store, held, test) -> list[dict]:
    """Rows of `misfit`, and of it standardised by held-out batches of the same size."""
    fit = jax.jit(lambda net, store, x: ss.misfit(net, store, x).scores)

    def scores(tasks, group):
        found = []
        for task in tasks:
            count = task.num_examples - task.num_examples % group
            x, _ = task.batch(jnp.arange(count))
            found.append([fit(net, store, x[i : i + group]) for i in range(0, count, group)])
        return np.concatenate(found).T[: config.tasks], np.repeat(
            np.arange(len(tasks)), [len(each) for each in found]
        )

    rows: list[dict[str, Any]] = [{"rule": rule} for rule in ("misfit", "misfit, standardised")]
    for group in GROUPS[1:]:
        if min(task.num_examples for task in (*held, *test)) < 2 * group:
            continue
        raw, of_test = scores(test, group)
        own, of_held = scores(held, group)
        for row, each in zip(rows, (raw, judging.standardised(raw, own, of_held)), strict=True):
            row[f"task_{group}"] = float((each.argmax(axis=0) == of_test).mean())
    shared = {"training": training, "network": "one view", "tasks_learned": config.tasks}
    return [shared | row for row in rows]


def milliseconds(config: Config, net, tiny: bool) -> dict[int, float]:
    """One image decided by the largest raw logit over four views, by the number of tasks."""
    times, mean = {}, config.views.averaged(net)
    x = jax.random.normal(jax.random.key(0), (1, 32, 32, 3))
    for num_tasks in (2, 3) if tiny else (5, 20, 100):
        store = bench.random_store(net, num_tasks)
        decide = functools.partial(ss.oracle, mean, store, x, ss.MaxLogit(config.classes))
        times[num_tasks] = 1e3 * bench.medians({"decide": decide}, 2 if tiny else 9)["decide"]
    return times


def bytes_of(config: Config, net, store) -> dict[str, int]:
    """What a task takes, by what it is for."""
    width, labels = config.widths[-1], config.classes
    further = 3 * labels * net.layout.shapes["head/kernel"][0]
    return {
        "mask": 4 * net.layout.num_words,
        "of the mask, outputs of further views": further // 8,
        "norm statistics": store.state_bytes,
        "mean and deviation of a rule": 8,
        "class means and covariance": 4 * (labels * width + width * (width + 1) // 2),
    }


def load(config: Config, args: Args) -> data.Dataset:
    if config.dataset == "synthetic":
        labels = config.tasks * config.classes
        return data.synthetic(jax.random.key(0), (32, 32, 3), labels, 20 * labels, 20 * labels)
    return data.load_dataset(config.dataset, args.data_dir)


def strangers_of(config: Config, args: Args, dataset: data.Dataset) -> ss.TaskData:
    """Test images of another dataset, seen as this one's are."""
    if config.dataset == "synthetic":
        other = data.synthetic(jax.random.key(1), (32, 32, 3), 2, 2, 20)
    else:
        other = data.load_dataset(STRANGERS[config.dataset], args.data_dir)
    images = part(other.test, slice(2000))
    return dataclasses.replace(images, transform=dataset.train.transform)


def configured(args: Args) -> Config:
    config = TINY if args.tiny else PRESETS[args.preset]
    given = {name: getattr(args, name) for name in ("steps", "norm", "trainings")}
    given = {name: value for name, value in given.items() if value is not None}
    if given.get("steps", 1) < 1:
        raise UsageError(f"--steps must be at least 1, got {args.steps}")
    return dataclasses.replace(config, seed=args.seed, **given)


def print_table(rows: list[dict]) -> None:
    columns = ["given", "cil_1", *(f"task_{group}" for group in GROUPS), "auroc", "misses"]
    print(f"{'training':16}{'network':11}{'rule':40}" + "".join(f"{name:>9}" for name in columns))
    for row in rows:
        cells = (row.get(name) for name in columns)
        shown = "".join("        -" if cell is None else f"{cell:9.3f}" for cell in cells)
        print(f"{row['training']:16}{row['network']:11}{row['rule']:40}{shown}")


def main(args: Args) -> dict:
    with usage_errors():
        config = configured(args)
        dataset = load(config, args)
        strangers = strangers_of(config, args, dataset)
        name = f"{'tiny' if args.tiny else args.preset}-seed{args.seed}"
        run = Run.open(args.out or Path("runs/class_incremental") / name, config, args.resume)
        net = network(config)
        run.create()
    tasks = tasks_of(config, dataset)
    print(net)
    for training in config.trainings:
        store = learn(run, config, training, net, dataset, tasks[0])
        if any(row["training"] == training for row in run.rows):
            continue
        with run.phase("evaluate"):
            run.rows += measure(config, training, net, store, tasks, strangers)
        run.write_progress()
        print_table([row for row in run.rows if row["training"] == training])
    result = run.finish(
        bytes_a_task=bytes_of(config, net, store),
        milliseconds=milliseconds(config, net, args.tiny),
    )
    print("bytes a task:", result["bytes_a_task"])
    print("milliseconds a decision of one image, by tasks:", result["milliseconds"])
    return result


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
