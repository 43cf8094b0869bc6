"""What exact top-k masks cost inside a training step, against a full sort.

    python -m tests.stress.benchmark_topk

    step       a training step of ResNet-18 (11.2 million weights in 21 kernels, --width 64) on
               images of 32x32, top-k masks of every kernel by an Erdos-Renyi budget
    threshold  the same step with threshold masks, which cost next to nothing
    top-k      the masks alone, and their straight-through gradient is a product
    sort       sorting every kernel's scores, as the reference does each step

The share of the step is top-k over step; step less threshold says the same, with more noise.
Medians of side-by-side rounds. Writes benchmark_topk.json to --out, and ends with a table. Ten
minutes on 2 CPU cores.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro
from flax import nnx

import supsup_jax as ss
from experiments import split_cifar
from experiments.frame import bench
from experiments.frame.run import usage_errors, writable_folder, write_result
from supsup_jax import data, models
from supsup_jax.training import train


@dataclasses.dataclass(frozen=True)
class Args:
    """Times top-k masks in a training step."""

    width: int = 64
    """Base channels of the ResNet-18: 64 has 11.2 million weights."""
    scale: float = 32
    """Of the Erdos-Renyi density."""
    batch_size: int = 128
    rounds: int = 5
    steps: int = 2
    """Steps a call, in a loop as training runs them."""
    out: Path = Path("runs/benchmark_topk")
    tiny: bool = False
    """Two blocks of width 2 and batches of 4: to see that it runs."""


def measure(args: Args) -> dict[str, float]:
    """Seconds of one step, of its parts, and of sorting."""
    # A ResNet-18 compiles for minutes, whatever its width.
    model = split_cifar.small_resnet if args.tiny else models.gem_resnet18
    module = model(5, width=args.width, rngs=nnx.Rngs(0))
    net = ss.signed_constant(ss.Network.from_nnx(module), 0)
    task = data.synthetic(jax.random.key(0), (32, 32, 3), 5, args.batch_size, 5).train
    topk = ss.TrainConfig(
        rule="topk",
        density=ss.ErdosRenyi(args.scale),
        optimizer="adam",
        steps=args.steps,
        batch_size=args.batch_size,
    )
    threshold = dataclasses.replace(topk, rule="threshold", density=None)
    scores = ss.train_task(jax.random.key(0), net, task, threshold).scores

    def chained(function):
        """`function` of scores, so often as there are steps, each after the one before."""

        def loop(scores):
            def again(scores, _):
                made = function(scores)
                return jax.tree.map(lambda s, m: s + 1e-20 * m, scores, made), None

            return jax.lax.scan(again, scores, None, length=args.steps)[0]

        return jax.jit(loop)

    masks = chained(lambda scores: topk.mask(net.layout, scores))
    sort = chained(
        lambda scores: jax.tree.map(
            lambda leaf: jnp.sort(jnp.abs(leaf).reshape(-1)).reshape(leaf.shape), scores
        )
    )
    seconds = bench.medians(
        {
            "step": lambda: train._train(jax.random.key(0), net, task, None, topk),
            "threshold": lambda: train._train(jax.random.key(0), net, task, None, threshold),
            "topk": lambda: masks(scores),
            "sort": lambda: sort(scores),
        },
        args.rounds,
        budget=120,
    )
    found = {name: spent / args.steps for name, spent in seconds.items()}
    return {
        "weights": net.layout.num_weights,
        **found,
        "share": found["topk"] / found["step"],
        "difference": (found["step"] - found["threshold"]) / found["step"],
    }


def main(args: Args) -> dict:
    """Measures, writes and prints."""
    if args.tiny:
        args = dataclasses.replace(args, width=2, batch_size=4, rounds=1)
    with usage_errors():
        writable_folder(args.out)
    found = measure(args)
    result = write_result(args.out / "benchmark_topk.json", **found)
    print(f"{found['weights']:,} weights, batches of {args.batch_size}, milliseconds a step:")
    for name in ("step", "threshold", "topk", "sort"):
        print(f"{name:10} {1000 * found[name]:10.1f}")
    print(
        f"top-k alone is {found['share']:.1%} of the step; step less threshold:"
        f" {found['difference']:.1%}; a sort would be {found['sort'] / found['step']:.1%}"
    )
    return result


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
