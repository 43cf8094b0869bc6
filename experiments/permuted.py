"""Permuted images, the task id given or inferred: Figures 3, 4, 5 (right) and 6 of the paper.

    python -m experiments.permuted                                          # digits, no data needed
    python -m experiments.permuted --preset mnist-250-lenet --data-dir DIR  # Figure 3, left
    python -m experiments.permuted --preset mnist-250-lenet --method psp --data-dir DIR

Each task permutes the pixels in an order of its own. Inference is by one gradient, of entropy H and
of the paper's G; --method runs what the paper compares with on the same stream.

    preset             network                tasks  paper, GNu      on 2 CPU cores
    digits             LeNet-300-100, s=100      50  -               2 to 4 minutes
    mnist-10           LeNet-300-100, s=100      10  .9367           2 minutes
    mnist-50-lenet     LeNet-300-100, s=100      50  .9368           Figure 6, with --outputs
    mnist-250-lenet    LeNet-300-100, s=100     250  .9363           half an hour
    mnist-250-fc       FC-1024-1024, s=500      250  .9566 H .9591 G hours; made for a GPU
    mnist-2500-lenet   LeNet-300-100, s=500    2500  .9345           hours; made for a GPU
    mnist-2500-lenet-per-example    the same, each of 25 million test images routed on its own
    mnist-10000-lenet  the same             10000  -               hours; 100 of them judged
    mnist-notebook     784-300-300-100            5  -               the authors' mnist.ipynb, .9237

s is the paper's name for the number of outputs in all, of which the first 10 are labels.
"""

import dataclasses
import sys
from typing import Literal

import supsup_jax as ss
from experiments.frame import config, loop
from experiments.frame.config import Config

PAPER = Config("mnist", "lenet_300_100", 100, 10, (2, 5, 10))
TO_250 = (10, 50, 100, 150, 200, 250)
TO_2500 = (10, 500, 1000, 1500, 2000, 2500)
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
    "mnist-50-lenet": dataclasses.replace(
        PAPER, tasks=50, checkpoints=(10, 50), protocols=("paper",)
    ),
    "mnist-250-lenet": dataclasses.replace(
        PAPER,
        tasks=250,
        checkpoints=TO_250,
        protocols=("paper", "per_example"),
        images_per_task=128,
    ),
    "mnist-250-fc": dataclasses.replace(
        PAPER,
        model="fc_1024_1024",
        outputs=500,
        tasks=250,
        checkpoints=TO_250,
        protocols=("paper",),
        save_every=10,  # minutes apart, where a task takes half of one
    ),
    "mnist-2500-lenet": dataclasses.replace(
        PAPER, outputs=500, tasks=2500, checkpoints=TO_2500, protocols=("paper",)
    ),
    "mnist-2500-lenet-per-example": dataclasses.replace(
        PAPER,
        outputs=500,
        tasks=2500,
        checkpoints=TO_2500,
        protocols=("per_example",),
        images_per_task=1000,
        every_image_at_the_end=True,
    ),
    # Beyond the paper: where does it give way?
    "mnist-10000-lenet": dataclasses.replace(
        PAPER,
        outputs=500,
        tasks=10_000,
        checkpoints=(5000, 7500, 10_000),  # the first 2,500 tasks are those of the preset above
        protocols=("paper",),
        judge_most=100,
    ),
    # The authors' notebook: one epoch of batches of 128, whose last our batches fill up.
    "mnist-notebook": dataclasses.replace(
        PAPER,
        model="notebook_300_300",
        tasks=5,
        checkpoints=(5,),
        protocols=("paper", "batch-128"),
        train=ss.TrainConfig(steps=469),
    ),
}


@dataclasses.dataclass(frozen=True)
class Args(config.MethodArgs):
    """Learns permuted tasks in one network and finds the right one by one gradient."""

    preset: Literal[tuple(PRESETS)] = "digits"


EXPERIMENT = loop.Experiment(
    name="permuted",
    presets=PRESETS,
    load=config.load,
    stream=config.views,
    network=config.dense_network,
    options=config.by_method,
)

if __name__ == "__main__":
    loop.cli(EXPERIMENT, Args, sys.argv[1:], __doc__)
