"""Seconds to learn a task, beside the matrix products that no implementation can avoid.

    python -m experiments.benchmark_training

"products" is a loop over the step's own matrix products alone, on arrays of the step's shapes:
forward, weight gradient and input gradient of each dense layer (the first needs no input
gradient). "task" is ss.train_task from call to result, order of examples, gather, loss, optimizer
and mask included. The images are drawn from a key: time does not depend on what they show.
Writes benchmark_training.json to --out, and ends with a table. A minute on 2 CPU cores.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import tyro
from flax import nnx
from jax import lax

import supsup_jax as ss
from experiments import runs, timing
from supsup_jax import data, models

NETWORKS = {
    "lenet-100": (models.lenet_300_100, 100),
    "lenet-500": (models.lenet_300_100, 500),
    "fc-500": (models.fc_1024_1024, 500),
}


@dataclasses.dataclass(frozen=True)
class Args:
    """Times the training of one task."""

    network: Literal["lenet-100", "lenet-500", "fc-500"] = "lenet-100"
    steps: int = 1000
    rounds: int = 5
    out: Path = Path("runs/benchmark_training")
    tiny: bool = False
    """20 steps and 2 rounds: seconds, to see that it runs."""


def products(kernels: list[jax.Array], x: jax.Array, steps: int) -> jax.Array:
    """The step's matrix products alone, chained so that none can be hoisted or left out."""

    def step(carry, _):
        kernels, gradient = carry
        inputs = [x]
        for kernel in kernels:
            inputs.append(inputs[-1] @ kernel)
        moved = []
        for layer in reversed(range(len(kernels))):
            weight_gradient = inputs[layer].T @ gradient
            # Adding a multiple of it, as an optimizer would, makes the next step wait for it.
            moved.append(kernels[layer] + 1e-20 * weight_gradient)
            if layer:
                gradient = gradient @ kernels[layer].T
        last = inputs[-1] * 1e-20 + 1
        return (moved[::-1], last), None

    last = jnp.ones((x.shape[0], kernels[-1].shape[1]))
    (kernels, _), _ = lax.scan(step, (kernels, last), None, length=steps)
    return kernels


def main(args: Args) -> dict:
    steps, rounds = (20, 2) if args.tiny else (args.steps, args.rounds)
    with runs.usage_errors():
        if steps < 1 or rounds < 1:
            raise runs.UsageError("--steps and --rounds must be at least 1")
        runs.writable_folder(args.out)
    model, outputs = NETWORKS[args.network]
    net = ss.signed_constant(ss.Network.from_nnx(model(outputs, rngs=nnx.Rngs(0))), 0)
    num_train = 512 if args.tiny else 60_000
    dataset = data.synthetic(jax.random.key(0), (28, 28), 10, num_train, 10)
    task = data.PermutedStream(dataset, 2).train[1]
    config = ss.TrainConfig(steps=steps)
    kernels = [net.params[f"layer{i}"]["kernel"] for i in range(3)]
    x = jnp.ones((config.batch_size, kernels[0].shape[0]))
    alone = jax.jit(products, static_argnames="steps")
    seconds = timing.medians(
        {
            "products": lambda: alone(kernels, x, steps=steps),
            "task": lambda: ss.train_task(jax.random.key(0), net, task, config),
        },
        rounds,
    )
    result = {
        "schema": runs.SCHEMA,
        "network": args.network,
        "weights": net.layout.num_weights,
        "steps": steps,
        "rounds": rounds,
        "seconds": seconds,
        "ratio": seconds["task"] / seconds["products"],
        "versions": runs.versions(),
        "device": runs.device(),
    }
    runs.write_json(args.out / "benchmark_training.json", result)
    print(f"{args.network}, {steps} steps of 128, medians of {rounds} rounds, {result['device']}")
    print(f"matrix products alone {seconds['products']:7.3f} s")
    print(f"a task, end to end    {seconds['task']:7.3f} s")
    print(f"ratio                 {result['ratio']:7.2f}")
    return result


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
