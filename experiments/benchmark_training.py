"""Seconds to learn a task, and tasks a minute against the number learned at once.

    python -m experiments.benchmark_training

    products  a loop over the step's own matrix products alone, which no implementation can avoid:
              forward, weight gradient and input gradient of each dense layer (the first needs no
              input gradient), on arrays of the step's shapes
    task      ss.train_task from call to result: order of examples, gather, loss, optimizer, mask
    default   ss.train_tasks of so many tasks, in the form that it chooses for the platform
    vmapped   the same tasks as one batch, whatever the platform
    convs     a step of a user's own conv net, of GEMResNet18, and a one-shot decision, each beside
              the same by plain JAX and optax: dense steps, a gradient of each example alone

The images are drawn from a key: time does not depend on what they show. Writes
benchmark_training.json and .png to --out, and ends with a table. Five minutes on 2 CPU cores.
Times are medians of side-by-side rounds; peaks of memory are those of the process so far.
"""

import dataclasses
import resource
import time
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import tyro
from jax import lax

import supsup_jax as ss
from experiments.frame import bench, convs, plots
from experiments.frame.run import UsageError, usage_errors, writable_folder, write_result
from supsup_jax import data
from supsup_jax.training import train


@dataclasses.dataclass(frozen=True)
class Args:
    """Times the training of one task, and of several at once."""

    network: Literal[bench.NETWORKS] = "lenet-100"
    tasks: tuple[int, ...] = ()
    """Numbers of tasks at once; by default 1 to 8 on a CPU, else powers of 2 while memory lasts."""
    steps: int = 1000
    rounds: int = 3
    out: Path = Path("runs/benchmark_training")
    tiny: bool = False
    """2 tasks, 20 steps and 2 rounds: seconds, to see that it runs."""


def products(kernels: list[jax.Array], x: jax.Array, steps: int) -> list[jax.Array]:
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


def measure_many(
    net: ss.Network, stream: data.PermutedStream, tasks: int, config: ss.TrainConfig, rounds: int
) -> dict:
    """One row: `tasks` tasks in one call, and one of them alone."""
    one = stream.train[0]
    views = jnp.stack([stream.view(i) for i in range(tasks)])
    many = dataclasses.replace(one, view=views)
    keys = jax.random.split(jax.random.key(0), tasks)
    programs, compile_seconds = {}, {}
    for form, together in (("default", None), ("vmapped", tasks)):
        start = time.perf_counter()
        programs[form] = train._train_tasks.lower(
            keys, net, many, None, config, together=together
        ).compile()
        compile_seconds[form] = time.perf_counter() - start
    seconds = bench.medians(
        {
            "task": lambda: ss.train_task(keys[0], net, one, config),
            "default": lambda: ss.train_tasks(keys, net, many, config),
            "vmapped": lambda: programs["vmapped"](keys, net, many, None),
        },
        rounds,
    )
    return {
        "tasks": tasks,
        "seconds": seconds,
        "tasks_per_minute": {
            name: 60 * (1 if name == "task" else tasks) / value for name, value in seconds.items()
        },
        "compile_seconds": compile_seconds,
        "temporary_bytes": {
            form: program.memory_analysis().temp_size_in_bytes for form, program in programs.items()
        },
        "peak_resident_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "peak_device_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    }


def measure_all(
    net: ss.Network,
    dataset: data.Dataset,
    tasks: tuple[int, ...],
    config: ss.TrainConfig,
    rounds: int,
) -> list[dict]:
    """A row for each number of tasks, up to the first that does not fit in memory."""
    stream = data.PermutedStream(dataset, max(tasks))
    rows = []
    for number in sorted(tasks):
        try:
            rows.append(measure_many(net, stream, number, config, rounds))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print(f"{number} tasks at once do not fit in memory")
            break
    return rows


def main(args: Args) -> dict:
    steps, rounds = (20, 2) if args.tiny else (args.steps, args.rounds)
    tasks = (2,) if args.tiny else args.tasks or default_tasks()
    with usage_errors():
        if min(steps, rounds, *tasks) < 1:
            raise UsageError("--steps, --rounds and --tasks must be at least 1")
        writable_folder(args.out)
    net = bench.network(args.network, seed=0)
    num_train = 512 if args.tiny else 60_000
    dataset = data.synthetic(jax.random.key(0), (28, 28), 10, num_train, 10)
    config = ss.TrainConfig(steps=steps)
    kernels = [net.params[f"layer{i}"]["kernel"] for i in range(3)]
    x = jnp.ones((config.batch_size, kernels[0].shape[0]))
    alone = jax.jit(products, static_argnames="steps")
    task = data.PermutedStream(dataset, 2).train[1]
    seconds = bench.medians(
        {
            "products": lambda: alone(kernels, x, steps=steps),
            "task": lambda: ss.train_task(jax.random.key(0), net, task, config),
        },
        rounds,
    )
    rows = measure_all(net, dataset, tasks, config, rounds)
    result = write_result(
        args.out / "benchmark_training.json",
        network=args.network,
        weights=net.layout.num_weights,
        steps=steps,
        rounds=rounds,
        seconds=seconds,
        ratio=seconds["task"] / seconds["products"],
        rows=rows,
        convs=convs.measure(args.tiny, rounds),
    )
    title = f"Learning {args.network}, {steps} steps of {config.batch_size}"
    bound = 60 / seconds["products"]
    plots.rate_against_tasks(args.out / "benchmark_training.png", title, rows, bound)
    show(result)
    return result


def default_tasks() -> tuple[int, ...]:
    powers = 4 if jax.default_backend() == "cpu" else 10
    return tuple(2**i for i in range(powers))


def show(result: dict) -> None:
    seconds = result["seconds"]
    print(
        f"{result['network']}, {result['steps']} steps of 128, medians of {result['rounds']} "
        f"rounds, {result['device']}"
    )
    print(f"matrix products alone {seconds['products']:7.3f} s")
    print(f"a task, end to end    {seconds['task']:7.3f} s")
    print(f"ratio                 {result['ratio']:7.2f}")
    print("                  tasks a minute         compile, s       temporaries, MB")
    print("at once     task default vmapped    default vmapped    default vmapped    peak, MB")
    for row in result["rows"]:
        rates = "".join(f"{rate:8.1f}" for rate in row["tasks_per_minute"].values())
        compiles = "".join(f"{value:8.1f}" for value in row["compile_seconds"].values())
        temporary = "".join(f"{value / 1e6:8.0f}" for value in row["temporary_bytes"].values())
        peak = row["peak_device_bytes"] or row["peak_resident_bytes"]
        print(f"{row['tasks']:7} {rates}   {compiles}   {temporary}   {peak / 1e6:9.0f}")
    convs.show(result["convs"])


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
