"""Rotated MNIST, 36 tasks 10 degrees apart, the task id inferred: Figure 5, left, of the paper.

    python -m experiments.rotated --data-dir DIR
    python -m experiments.rotated --method batche --data-dir DIR    # and psp, upper_bound, ...

SupSup finds the task by the Binary rule, entropy of the full batch of 128, in an FC-1024-1024 with
200 outputs; the baselines are given the id (GG). The paper shows a figure and no numbers: SupSup
above both at 36 tasks. Ten batches of each task decide: a round of the Binary rule is a forward and
backward pass of the whole batch, and 36 tasks take six. Half an hour a method on 2 CPU cores.
"""

import dataclasses
import sys
from typing import Literal

from experiments.frame import config, loop
from experiments.frame.config import Config

PRESETS = {
    "mnist-36": Config(
        dataset="mnist",
        model="fc_1024_1024",
        outputs=200,
        tasks=36,
        checkpoints=(2, 5, 10, 15, 20, 25, 30, 36),
        protocols=("batch-128",),
        objectives=("entropy",),
        images_per_task=1280,
        save_every=5,
        stream="rotated",
        rule="binary_search",
    ),
}


@dataclasses.dataclass(frozen=True)
class Args(config.MethodArgs):
    """Learns rotated tasks in one network and finds the right one by halving the candidates."""

    preset: Literal[tuple(PRESETS)] = "mnist-36"


EXPERIMENT = loop.Experiment(
    name="rotated",
    presets=PRESETS,
    load=config.load,
    stream=config.views,
    network=config.dense_network,
    options=config.by_method,
)

if __name__ == "__main__":
    loop.cli(EXPERIMENT, Args, sys.argv[1:], __doc__)
