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
import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from tqdm import tqdm

import supsup_jax as ss
from experiments.frame import bench
from experiments.frame.run import Run, UsageError, usage_errors
from supsup_jax import data, labelled_views, models, prng
from supsup_jax.objectives import OfLabels, energy

GROUPS = (1, 5, 20, 100)
# Images that go through a network together in measurements.
BATCH = 250
# Of the covariance of features, how much is spread evenly over all directions.
SHRINKAGE = 0.1
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
    return ss.TrainConfig(
        steps=config.steps,
        batch_size=config.batch_size,
        optimizer="adam",
        learning_rate=config.learning_rate,
        schedule="cosine",
        augment=data.CropAndFlip(4, dataset.train.transform),
        views=config.views if training.startswith("views") else None,
    )


def learn(run: Run, config: Config, training: str, net, dataset, tasks) -> ss.MaskStore:
    """The masks of all tasks, those learned before from the run's folder."""
    how, mean = train_config(config, training, dataset), None
    if training.endswith("+transfer"):
        mean = ss.ScoreMean.create(net)
    key = prng.purpose_key(jax.random.key(config.seed), "tasks")
    with ss.DiskStore.open(run.out / training.replace("+", "-"), net, mode="a") as disk:
        for i in range(len(disk) if mean is not None else 0):
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


@functools.partial(jax.jit, static_argnames="view")
def _outputs(net, store, x, i, view):
    task = store.task(i)
    return net(task.mask, view(x), task.state)


def outputs(net, store, task: ss.TaskData, view: Callable = labelled_views.unturned) -> np.ndarray:
    """What the network gives for a task's data in a view under each mask alone, [T, N, C]."""
    batch, found = jax.jit(task.batch), []
    for start in range(0, task.num_examples, BATCH):
        x, _ = batch(jnp.arange(start, min(start + BATCH, task.num_examples)))
        each = [_outputs(net, store, x, i, view) for i in range(int(store.num_tasks))]
        found.append(np.stack(jax.device_get(each)))
    return np.concatenate(found, axis=1)


def averaged(views: ss.LabelledViews, logits: np.ndarray) -> np.ndarray:
    """As `LabelledViews.averaged`, of the logits [V, ..., C] of each view."""
    blocks = logits.reshape(*logits.shape[:-1], len(views.views), views.num_labels)
    own = [np.roll(block, -v, axis=-2) for v, block in enumerate(blocks)]
    return np.mean(own, axis=0).reshape(logits.shape[1:])


def own_view(views: ss.LabelledViews, logits: np.ndarray) -> np.ndarray:
    """The sum over views of log P(this view), [...], of the logits [V, ..., C] of each."""
    log_p = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    blocks = log_p.reshape(*logits.shape[:-1], len(views.views), views.num_labels)
    mine = [np.asarray(jax.nn.logsumexp(b[..., v, :], axis=-1)) for v, b in enumerate(blocks)]
    return np.sum(mine, axis=0)


def label_objectives(labels: int) -> dict[str, Callable]:
    return {
        "entropy": ss.entropy,
        "G": ss.Superfluous(labels),
        "max softmax": OfLabels(ss.max_confidence, labels),
        "energy": OfLabels(energy, labels),
        "max logit": ss.MaxLogit(labels),
    }


class Scores:
    """What rules make of all images under all masks: by a rule's name, test and held-out scores.

    test: [T, N] of the test images of all tasks, one after another. held: [T, H] of the held-out.
    """

    def __init__(self):
        self.test, self.held = {}, {}

    def add(self, name, function, test, held):
        self.test[name], self.held[name] = np.asarray(function(test)), np.asarray(function(held))

    def standardised(self, name: str, of_held: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Test and held-out scores less each task's own mean, over its own deviation."""
        own = [row[of_held == i] for i, row in enumerate(self.held[name])]
        mean, deviation = (np.array([f(each) for each in own])[:, None] for f in (np.mean, np.std))
        return tuple((each[name] - mean) / deviation for each in (self.test, self.held))


def judged(scores, labels_right, of_task, group) -> tuple[float, float]:
    """Task accuracy and class-incremental accuracy where `group` images of a task decide together.

    scores [T, N], images of a task side by side; labels_right [T, N], whether a mask's label is.
    """
    named, right, decisions = [], [], []
    for i in np.unique(of_task):
        rows = np.flatnonzero(of_task == i)
        rows = rows[: len(rows) - len(rows) % group].reshape(-1, group)
        if not len(rows):
            return math.nan, math.nan
        task = scores[:, rows].mean(axis=-1).argmax(axis=0)
        named.append(task == i)
        right.append((task == i)[:, None] & labels_right[i, rows])
        decisions.append(len(task))
    return float(np.concatenate(named).mean()), float(np.concatenate(right).mean())


def mahalanobis(features, train_features, train_labels) -> np.ndarray:
    """Scores [T, N]: minus the least squared distance to a class mean, by each task's own shrunk
    covariance of features [T, N, D]. train_*: of each task its own training images, [M, D] and [M].
    """
    rows = []
    for seen, own, classes in zip(features, train_features, train_labels, strict=True):
        means = np.stack([own[classes == c].mean(0) for c in np.unique(classes)])
        rest = own - means[np.searchsorted(np.unique(classes), classes)]
        covariance = rest.T @ rest / len(rest)
        even = np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        precision = np.linalg.inv((1 - SHRINKAGE) * covariance + SHRINKAGE * even)
        distances = [
            np.einsum("nd,de,ne->n", seen - mean, precision, seen - mean) for mean in means
        ]
        rows.append(-np.min(distances, axis=0))
    return np.stack(rows)


def together(parts: list[np.ndarray]) -> np.ndarray:
    """[T, N, ...] of the images of each task, one after another."""
    return np.concatenate(parts, axis=1)


def measure(config: Config, training: str, net, store, tasks) -> list[dict]:
    """The rows of one training."""
    _, held, test = tasks
    labels, views = config.classes, config.views
    of_test, of_held = (
        np.repeat(np.arange(len(each)), [task.num_examples for task in each])
        for each in (test, held)
    )
    y = np.concatenate([np.asarray(task.labels) for task in test])
    seen = views.views if training.startswith("views") else views.views[:1]
    logits = {
        name: np.stack(
            [together([outputs(net, store, task, view) for task in each]) for view in seen]
        )
        for name, each in (("test", test), ("held", held))
    }
    rows = []

    def add(network, name, scores, right):
        given = right[of_test, np.arange(len(y))].mean()
        row = {"training": training, "network": network, "rule": name, "given": float(given)}
        for group in GROUPS:
            row[f"task_{group}"], row[f"cil_{group}"] = judged(scores, right, of_test, group)
        rows.append(row | {"tasks_learned": config.tasks})

    kinds = [("one view", logits["test"][0], logits["held"][0])]
    if len(seen) > 1:
        kinds.append(("four views", *(averaged(views, logits[name]) for name in ("test", "held"))))
    for network, on_test, on_held in kinds:
        right = on_test[..., :labels].argmax(-1) == y
        found = Scores()
        for name, objective in label_objectives(labels).items():
            found.add(name, lambda z, f=objective: -f(jnp.asarray(z)), on_test, on_held)
        if network == "four views":
            found.test["own view"], found.held["own view"] = (
                own_view(views, logits[name]) for name in ("test", "held")
            )
        if config.model == "conv_net" and network == kinds[-1][0]:
            add_features(found, config, store, tasks, of_held)
        for name, scores in found.test.items():
            add(network, name, scores, right)
        whitened = {name: found.standardised(name, of_held)[0] for name in found.test}
        for name, scores in whitened.items():
            add(network, f"{name}, standardised", scores, right)
        joined = [name for name in ("own view", "mahalanobis") if name in whitened]
        for k in range(len(joined)):
            names = ["max logit", *joined[: k + 1]]
            add(network, " + ".join(names), sum(whitened[name] for name in names), right)
    return rows + by_one_gradient(config, training, net, store, test)


def add_features(found: Scores, config: Config, store, tasks, of_held) -> None:
    learned, held, test = tasks
    net = network(config, features=True)
    own = [outputs_under(net, store, task, i) for i, task in enumerate(learned)]
    own_labels = [np.asarray(task.labels) for task in learned]
    for name, each in (("test", test), ("held", held)):
        features = together([outputs(net, store, task) for task in each])
        getattr(found, name)["mahalanobis"] = mahalanobis(features, own, own_labels)


def outputs_under(net, store, task: ss.TaskData, i: int) -> np.ndarray:
    """[N, ...] of a task's data under mask i."""
    batch, found = jax.jit(task.batch), []
    for start in range(0, task.num_examples, BATCH):
        x, _ = batch(jnp.arange(start, min(start + BATCH, task.num_examples)))
        found.append(jax.device_get(_outputs(net, store, x, i, labelled_views.unturned)))
    return np.concatenate(found)


def by_one_gradient(config: Config, training: str, net, store, test) -> list[dict]:
    """Rows of `one_shot`, on the first images of each task."""
    rows, few = [], [part(task, slice(200)) for task in test]
    for name, objective in (("entropy", ss.entropy), ("G", ss.Superfluous(config.classes))):
        row = {"training": training, "network": "one view", "rule": f"one gradient, {name}"}
        for group in (1, 20):
            if few[0].num_examples < group:
                continue
            protocol = "per_example" if group == 1 else f"batch-{group}"
            found = ss.evaluate(net, store, few, protocol, objective=objective)
            row[f"task_{group}"] = float(np.mean([each.task_accuracy for each in found]))
            row[f"cil_{group}"] = float(np.mean([each.accuracy for each in found]))
        rows.append(row | {"tasks_learned": config.tasks})
    return rows


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


def configured(args: Args) -> Config:
    config = TINY if args.tiny else PRESETS[args.preset]
    given = {name: getattr(args, name) for name in ("steps", "norm", "trainings")}
    given = {name: value for name, value in given.items() if value is not None}
    if given.get("steps", 1) < 1:
        raise UsageError(f"--steps must be at least 1, got {args.steps}")
    return dataclasses.replace(config, seed=args.seed, **given)


def print_table(rows: list[dict]) -> None:
    print(
        f"{'training':16}{'network':11}{'rule':40} given   CIL  task:"
        + "".join(f"{group:6}" for group in GROUPS)
    )
    for row in rows:
        cells = (row.get(name) for name in ("given", "cil_1"))
        shown = "".join("     -" if cell is None else f"{cell:6.3f}" for cell in cells)
        named = (row.get(f"task_{group}") for group in GROUPS)
        shown += "      " + "".join("     -" if cell is None else f"{cell:6.3f}" for cell in named)
        print(f"{row['training']:16}{row['network']:11}{row['rule']:40}{shown}")


def main(args: Args) -> dict:
    with usage_errors():
        config = configured(args)
        dataset = load(config, args)
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
            run.rows += measure(config, training, net, store, tasks)
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
