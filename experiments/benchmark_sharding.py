"""One decision among K tasks on several devices, against the same on one.

    python -m experiments.benchmark_sharding

The masks are synthetic, independent fair bits. On a CPU the devices are JAX's fake ones, a thread
each: give it as many cores as --devices. Elsewhere they are the first of those there are.

    contraction  the product of a gradient with all masks, which needs no other device
    shared       the whole decision of a batch of 128: gradient, contraction, argmax
    8            8 decisions in one call, each example for itself

Medians of side-by-side rounds, all numbers in the same rounds of one process. Writes
benchmark_sharding.json to --out, and ends with a table.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro

import supsup_jax as ss
from experiments.frame import bench
from experiments.frame.run import usage_errors, writable_folder, write_result

NAMES = ("contraction", "shared", "8")


@dataclasses.dataclass(frozen=True)
class Args:
    """Times one-shot decisions on one device and on several."""

    network: Literal[bench.NETWORKS] = "lenet-100"
    tasks: int = 20_000
    devices: int = 2
    rounds: int = 15
    out: Path = Path("runs/benchmark_sharding")
    tiny: bool = False
    """K = 33, 1 round: to see that it runs."""


def measure(args: Args) -> dict:
    """Seconds by name, on one device and on all."""
    net = bench.network(args.network, 0)
    one = bench.random_store(net, args.tasks)
    many = ss.shard(one, jax.make_mesh((args.devices,), ("task",)))
    x = jax.random.normal(jax.random.key(0), (128, 784))
    v = jax.random.normal(jax.random.key(1), (32 * net.layout.num_words,))
    contract = jax.jit(lambda store, v: store.contract(v))
    measures = {}
    for devices, store in ((1, one), (args.devices, many)):
        decide = functools.partial(ss.one_shot, net, store)
        measures |= {
            ("contraction", devices): functools.partial(contract, store, v),
            ("shared", devices): functools.partial(decide, x, per_example=False),
            ("8", devices): functools.partial(decide, x[:8]),
        }
    same = np.array_equal(measures["8", 1]().task, measures["8", args.devices]().task)
    seconds = bench.medians(measures, args.rounds, budget=60)
    return {
        "network": args.network,
        "tasks": args.tasks,
        "devices": args.devices,
        "store_bytes": one.nbytes,
        "same_tasks": same,
        "milliseconds": {
            name: {
                "one": 1e3 * seconds[name, 1],
                "many": 1e3 * seconds[name, args.devices],
                "many_over_one": seconds[name, args.devices] / seconds[name, 1],
            }
            for name in NAMES
        },
    }


def main(args: Args) -> dict:
    """Measures, writes and prints."""
    if args.tiny:
        args = dataclasses.replace(args, tasks=33, rounds=1)
    with usage_errors():
        if args.devices < 2:
            raise ValueError(f"devices must be at least 2, got {args.devices}")
        writable_folder(args.out)
    found = measure(args)
    result = write_result(args.out / "benchmark_sharding.json", **found)
    print(
        f"{args.tasks:,} tasks, milliseconds on 1 and on {args.devices} devices, and their ratio:"
    )
    for name, row in found["milliseconds"].items():
        print(f"{name:12} {row['one']:9.1f} {row['many']:9.1f} {row['many_over_one']:6.2f}")
    return result


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    # Before anything asks for a device; says nothing to other platforms.
    jax.config.update("jax_num_cpu_devices", args.devices)
    main(args)
