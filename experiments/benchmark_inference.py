"""Time and memory of one decision against the number of tasks K.

    python -m experiments.benchmark_inference

For each K, on masks drawn from a key (synthetic: time does not depend on what was learned):

    read         the packed masks read once by NumPy, the floor of any rule that looks at all
    gradient     forward and backward pass of a shared batch of 128 under the mixture
    contraction  the product of that gradient with all masks
    one_shot     the whole decision: both of these and the argmax, a shared batch of 128
    one_shot/B   B decisions, each example for itself
    dense        the product with masks kept as float32, as a direct port does, while they fit
    oracle       K forward passes of the batch, one under each mask

Writes benchmark_inference.json and .png to --out, and ends with a table. Two minutes on 2 CPU
cores. Times are milliseconds, medians of side-by-side rounds.
"""

import dataclasses
import resource
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

import supsup_jax as ss
from experiments import plots, runs, timing
from supsup_jax import infer, models

DENSE_BYTES = 3 * 2**30


@dataclasses.dataclass(frozen=True)
class Args:
    """Times one-shot decisions of LeNet-300-100 with 100 outputs."""

    tasks: tuple[int, ...] = (10, 50, 250, 1000, 2500)
    rounds: int = 9
    out: Path = Path("runs/benchmark_inference")
    tiny: bool = False
    """K = 2 and 5, 2 rounds: seconds, to see that it runs."""


def random_store(net: ss.Network, num_tasks: int) -> ss.MaskStore:
    """A store of `num_tasks` masks of independent fair bits."""

    @jax.jit
    def draw(key):
        keys = jax.random.split(key, len(net.layout.shapes))
        shapes = net.layout.shapes.values()
        return net.layout.tree(
            [jax.random.bernoulli(k, 0.5, s) for k, s in zip(keys, shapes, strict=True)]
        )

    store = ss.MaskStore.create(net, capacity=num_tasks)
    for key in jax.random.split(jax.random.key(0), num_tasks):
        store = store.append(draw(key), donate=True)
    return store


def measure(net: ss.Network, store: ss.MaskStore, rounds: int) -> dict[str, float]:
    """Median seconds of each quantity at this store's number of tasks."""
    x = jax.random.normal(jax.random.key(1), (128, 784))

    @jax.jit
    def gradient(net, store, x):
        return infer.weight_gradient(net, store.mixture(), x, None, ss.entropy)

    contract = jax.jit(lambda store, v: store.contract(v))
    v = gradient(net, store, x)
    packed = np.asarray(store._bank.words)
    measures = {
        "read": lambda: np.bitwise_or.reduce(packed, axis=None),
        "gradient": lambda: gradient(net, store, x),
        "contraction": lambda: contract(store, v),
        "one_shot": lambda: ss.one_shot(net, store, x, per_example=False),
        "one_shot/1": lambda: ss.one_shot(net, store, x[:1]),
        "one_shot/8": lambda: ss.one_shot(net, store, x[:8]),
        "one_shot/128": lambda: ss.one_shot(net, store, x),
        "oracle": lambda: ss.oracle(net, store, x, per_example=False),
    }
    if store.capacity * net.layout.num_weights * 4 <= DENSE_BYTES:
        masks = [
            net.layout.ravel(store.mask(i), "the mask").astype(jnp.float32)
            for i in range(store.capacity)
        ]
        dense = jnp.stack(masks)
        del masks
        product = jax.jit(jnp.dot)
        measures["dense"] = lambda: product(dense, v)
    return timing.medians(measures, rounds)


def main(args: Args) -> dict:
    tasks, rounds = ((2, 5), 2) if args.tiny else (args.tasks, args.rounds)
    with runs.usage_errors():
        if not tasks or min(tasks) < 1 or rounds < 1:
            raise runs.UsageError("--tasks and --rounds must be at least 1")
        runs.writable_folder(args.out)
    module = models.lenet_300_100(100, rngs=nnx.Rngs(0))
    net = ss.signed_constant(ss.Network.from_nnx(module), 0)
    x = jnp.zeros((128, 784))
    rows = []
    for num_tasks in sorted(tasks):
        store = random_store(net, num_tasks)
        program = infer._one_shot.lower(
            net, store, x, objective=ss.entropy, per_example=False
        ).compile()
        rows.append(
            {
                "tasks": num_tasks,
                "milliseconds": {
                    name: 1e3 * seconds for name, seconds in measure(net, store, rounds).items()
                },
                "store_bytes": store.nbytes,
                "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
                "peak_resident_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            }
        )
    result = {
        "schema": runs.SCHEMA,
        "network": "lenet-100",
        "weights": net.layout.num_weights,
        "masks": "synthetic, independent fair bits",
        "rounds": rounds,
        "versions": runs.versions(),
        "device": runs.device(),
        "rows": rows,
    }
    runs.write_json(args.out / "benchmark_inference.json", result)
    plots.time_against_tasks(args.out / "benchmark_inference.png", rows)
    names = list(rows[0]["milliseconds"])
    print(f"milliseconds, medians of {rounds} rounds, synthetic masks, {result['device']}")
    print("tasks" + "".join(f"{name:>14}" for name in names))
    for row in rows:
        cells = (row["milliseconds"].get(name) for name in names)
        shown = ("-".rjust(14) if cell is None else f"{cell:14.2f}" for cell in cells)
        print(f"{row['tasks']:5}" + "".join(shown))
    return result


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
