"""What decides a run of permuted, rotated or split images, from its command line to its network."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from flax import nnx

import supsup_jax as ss
from experiments.frame import hosts, learners
from experiments.frame.loop import Args
from experiments.frame.run import Run, UsageError
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
    judge_most: int | None = None  # tasks judged at a checkpoint, evenly spread; None for all
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
class MethodArgs(hosts.Args, Args):
    """What a script takes that runs SupSup and what the paper compares with."""

    method: str = "supsup"
    """supsup, or what the paper compares with: upper_bound, lower_bound, separate_heads,
    separate_heads_random, batche, batche_random, abatche, psp."""
    outputs: int | None = None
    """Outputs of the network instead of the preset's (the paper's s)."""
    steps: int | None = None
    """Training steps a task instead of the preset's."""
    judge_most: int | None = None
    """Judge at most so many tasks at a checkpoint, evenly spread: of thousands, a sample says as
    much."""
    independent_seeds: bool = False
    """Permutations that no two seeds share; the paper's seeds share nearly all."""


def by_method(config: Config, args: MethodArgs) -> Config:
    """A preset's config with the options of MethodArgs in it, small with --tiny."""
    check_method(args, config.stream)
    config = learners.METHODS[args.method].configure(config, args.method)
    config = dataclasses.replace(config, independent_seeds=args.independent_seeds)
    if args.tiny:
        config = tiny(config)
    check_positive(args, "steps", "outputs", "judge_most")
    if args.steps is not None:
        config = trained(config, steps=args.steps)
    given = {name: getattr(args, name) for name in ("outputs", "judge_most")}
    given = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(config, **given)


def check_positive(args: Args, *names: str) -> None:
    """Raises UsageError for one of these options that is given and below 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}")


def check_method(args: MethodArgs, stream: str) -> None:
    """Raises UsageError for a method that there is not, and for an option of another stream's."""
    if args.method not in learners.METHODS:
        known = ", ".join(learners.METHODS)
        raise UsageError(f"--method must be one of {known}, got {args.method!r}")
    if args.independent_seeds and stream != "permuted":
        raise UsageError(f"--independent-seeds is of permutations, and {stream} tasks have none")


def tiny(config: Config) -> Config:
    """The config at a size of seconds, of data that need not be there."""
    config = dataclasses.replace(
        config,
        dataset=at_hand(config.dataset),
        tasks=3,
        checkpoints=(2, 3),
        images_per_task=config.images_per_task and 128,
    )
    return trained(config, steps=50, learning_rate=1e-3)


def at_hand(dataset: str) -> str:
    """What stands for a dataset where no data is needed."""
    return "digits" if dataset == "digits" else "synthetic"


def trained(config: Any, **changes: Any) -> Any:
    """The config with every training of it changed."""
    later = config.later and dataclasses.replace(config.later, **changes)
    train = dataclasses.replace(config.train, **changes)
    return dataclasses.replace(config, train=train, later=later)


def saved_config(out: Path) -> Config:
    """The config of the run in `out`. UsageError where there is none, or another script's."""
    fields = Run.saved(out)["config"]
    if (
        not {"train", "later"}
        <= fields.keys()
        <= {field.name for field in dataclasses.fields(Config)}
    ):
        raise UsageError(f"{out} is not a run of permuted or rotated images: name one of those")
    tuples = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    trainings = {name: fields[name] and _training(fields[name]) for name in ("train", "later")}
    return Config(**{**fields, **tuples, **trainings})


def _training(fields):
    return ss.TrainConfig(**{**fields, "loss": ss.losses.CrossEntropy(**fields["loss"])})


def load(config: Any, args: Any) -> data.Dataset:
    """The dataset; raises before anything slow when it is not there."""
    if config.dataset == "synthetic":
        return data.synthetic(jax.random.key(config.seed), (28, 28), 10, 512, 256)
    return data.load_dataset(config.dataset, args.data_dir, config.seed)


def views(config: Any, dataset: data.Dataset) -> data.ViewStream:
    """The tasks, which see one dataset each in a way of its own."""
    if config.stream == "rotated":
        return data.RotatedStream(dataset, config.tasks)
    return data.PermutedStream(dataset, config.tasks, config.seed, config.independent_seeds)


def dense_network(config: Any, dataset: data.Dataset) -> ss.Network:
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
