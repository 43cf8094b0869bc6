"""Time and memory of one decision against the number of tasks K, 10 to 200,000.

    python -m experiments.benchmark_inference --run RUN --data-dir DIR
    python -m experiments.benchmark_inference --network fc-500

With --run the first masks are those that a run of experiments.permuted has learned, and the others
of independent bits, each as often 1 as in the learned ones; images of a learned task decide.
Without, task 0 is learned (1,000 steps on scikit-learn's digits, enlarged and permuted), and the
other masks are fair bits. For each K:

    read           the packed masks read once by NumPy on one core: the floor of any rule
    gradient       forward and backward pass of a shared batch of 128 under the mixture
    contraction    the product of that gradient with all masks, float32-class
    certified      the same, for the task only, from as few bits as prove it
    error          the same, from as few as make another task's chance 1e-6
    shared         the whole decision of a batch of 128: gradient, contraction, argmax
    shared/cert, shared/error    the same, certified, and at error=1e-6
    1, 8, 128      that many decisions in one call, each example for itself; 8 and 128 among up
                   to --several-tasks
    128/cert, 128/error          the same, certified, and at error=1e-6
    predict        logits of 128 examples under the masks of 128 different tasks
    oracle         K forward passes of the batch, one under each mask
    dense          the product with masks kept as float32, as a direct port does, while they fit

Beside times the share of the masks' bits that each race read, and how many of its decisions
differ from the exact ones. Each K has a process of its own, so that its peak of resident memory
(without "dense") is its own.
Last, the contraction among 1,000 tasks and more, all numbers in the same rounds of one process:
whether time is linear in K shows there, free of the machine's faster and slower minutes.
Writes benchmark_inference.json and .png to --out, and ends with a table. 10 minutes on 2 CPU
cores. Times are milliseconds, medians of side-by-side rounds.
"""

import concurrent.futures
import dataclasses
import functools
import multiprocessing
import resource
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import supsup_jax as ss
from experiments.frame import bench, config, plots
from experiments.frame.run import UsageError, device, usage_errors, writable_folder, write_result
from supsup_jax import data, devices
from supsup_jax.inference import one_shot

DENSE_BYTES = 3 * 2**30
ERROR = 1e-6
# Of the device's memory; the store is held once, and made tile by tile.
FRACTION = 0.6


@dataclasses.dataclass(frozen=True)
class Args:
    """Times one-shot decisions among K tasks."""

    network: Literal[bench.NETWORKS] = "lenet-100"
    """Without --run, which has its own."""
    run: Path | None = None
    """Folder of a run of experiments.permuted, finished or not."""
    data_dir: Path | None = None
    tasks: tuple[int, ...] = (10, 50, 250, 1000, 2500, 10_000, 100_000)
    rounds: int = 9
    oracle_tasks: int = 2500
    """The most tasks for which the oracle is timed."""
    several_tasks: int = 2500
    """The most tasks among which 8 and 128 decisions are timed."""
    seed: int = 0
    out: Path = Path("runs/benchmark_inference")
    tiny: bool = False
    """K = 5, 2 rounds, a task of 20 steps, 16 images for 128: to see that it runs."""


def digits_task(num_pixels: int, seed: int) -> tuple[ss.TaskData, ss.TaskData]:
    """A permuted task of digits, enlarged by nearest neighbour to as many pixels: train, test."""
    dataset = data.load_dataset("digits", seed=seed)
    side, small = round(num_pixels**0.5), round(dataset.num_pixels**0.5)
    near = np.arange(side) * small // side
    view = (near[:, None] * small + near[None]).reshape(-1)[data.permutation(0, num_pixels, seed)]
    view = jnp.asarray(view, jnp.int32)
    train, test = (dataclasses.replace(task, view=view) for task in (dataset.train, dataset.test))
    return train, test


def network_of(args: Args) -> ss.Network:
    return bench.network(args.network, args.seed) if args.run is None else learned_masks(args)[0]


def name_of(args: Args) -> str:
    if args.run is None:
        return args.network
    of_run = config.saved_config(args.run)
    return f"{of_run.model}, {of_run.outputs} outputs"


def learned_masks(args: Args) -> tuple[ss.Network, ss.MaskStore, ss.TaskData]:
    """The network, the masks that were learned, and test data of the first of them."""
    if args.run is not None:
        net, store, stream = bench.learned(args.run, args)
        return net, store, stream.test[0]
    net = network_of(args)
    train, test = digits_task(784, args.seed)
    config = ss.TrainConfig(steps=20 if args.tiny else 1000)
    learned = ss.train_task(jax.random.key(args.seed), net, train, config)
    return net, ss.MaskStore.create(net, 1).append(learned.task), test


def measure(args: Args, num_tasks: int) -> dict:
    """One row: everything at this number of tasks."""
    rounds = args.rounds
    net, learned, test = learned_masks(args)
    store = bench.random_store(net, num_tasks, learned)
    x, _ = test.batch(jnp.arange(16 if args.tiny else 128))

    @jax.jit
    def gradient(net, store, x):
        return -one_shot.Uncertainty(net, ss.entropy).gradient(store.mixture(), x)

    contract = jax.jit(lambda store, v: store.contract(v))
    race = jax.jit(lambda store, v, error: store.best_scores(v, error), static_argnames="error")
    decide = functools.partial(ss.one_shot, net, store)
    v, each = gradient(net, store, x), [gradient(net, store, row) for row in x[:, None]]
    packed = np.asarray(store._bank.words)
    start = time.perf_counter()
    shared = jax.block_until_ready(decide(x, per_example=False))
    compile_seconds = time.perf_counter() - start
    measures = {
        "read": lambda: np.bitwise_or.reduce(packed, axis=None),
        "gradient": lambda: gradient(net, store, x),
        "contraction": lambda: contract(store, v),
        "certified": lambda: race(store, v, None),
        "error": lambda: race(store, v, ERROR),
        "shared": lambda: decide(x, per_example=False),
        "shared/cert": lambda: decide(x, per_example=False, implementation="certified"),
        "shared/error": lambda: decide(x, per_example=False, error=ERROR),
        "1": lambda: decide(x[:1]),
        "predict": lambda: ss.predict(net, store, x, jnp.arange(len(x)) % num_tasks),
    }
    several = {
        "8": lambda: decide(x[:8]),
        "128": lambda: decide(x),
        "128/cert": lambda: decide(x, implementation="certified"),
        "128/error": lambda: decide(x, error=ERROR),
    }
    many = x if num_tasks <= args.several_tasks else x[:1]
    if many is x:
        measures |= several
    if num_tasks <= args.oracle_tasks:
        measures["oracle"] = lambda: ss.oracle(net, store, x, per_example=False)
    seconds = bench.medians(measures, rounds)
    exact = decide(many).task
    races = {"certified": None, "error": ERROR}
    row = {
        "network": name_of(args),
        "tasks": num_tasks,
        "learned": min(num_tasks, int(learned.num_tasks)),
        "decisions": len(many),
        "right": int((exact == 0).sum()),
        "share_read": {name: float(race(store, v, error).share) for name, error in races.items()},
        "share_read_single": {
            name: float(np.mean([race(store, v, error).share for v in each[: len(many)]]))
            for name, error in races.items()
        },
        "differ": {
            "certified": int((decide(many, implementation="certified").task != exact).sum()),
            "error": int((decide(many, error=ERROR).task != exact).sum()),
        },
        "shared_right": bool(shared.task == 0),
        "compile_seconds": compile_seconds,
        "store_bytes": store.nbytes,
        "temporary_bytes": temporary_bytes(net, store, x),
        "peak_resident_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "peak_device_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    }
    if num_tasks * net.layout.num_weights * 4 <= DENSE_BYTES:
        masks = [net.layout.ravel(store.mask(i), "the mask") for i in range(num_tasks)]
        dense = jnp.stack(masks).astype(jnp.float32)
        product = jax.jit(jnp.dot)
        beside = bench.medians(
            {"contraction": measures["contraction"], "dense": lambda: product(dense, v)}, rounds
        )
        # Scaled to the main rounds by what both have, since these rounds come after them.
        seconds["dense"] = beside["dense"] * seconds["contraction"] / beside["contraction"]
    row["milliseconds"] = {name: 1e3 * value for name, value in seconds.items()}
    row["decisions_per_second"] = {
        name: int(name.split("/")[0]) / seconds[name] for name in ("1", *several) if name in seconds
    }
    row["device"] = device()
    return row


def measure_side_by_side(args: Args, tasks: list[int]) -> list[dict]:
    """Contraction and read of each number of tasks, microseconds a task, in the same rounds."""
    net, rounds = network_of(args), args.rounds
    v = jax.random.normal(jax.random.key(args.seed), (32 * net.layout.num_words,))
    contract = jax.jit(lambda store, v: store.contract(v))
    measures = {}
    for num_tasks in tasks:
        store = bench.random_store(net, num_tasks)
        packed = np.asarray(store._bank.words)
        measures["read", num_tasks] = functools.partial(np.bitwise_or.reduce, packed, axis=None)
        measures["contraction", num_tasks] = functools.partial(contract, store, v)
    seconds = bench.medians(measures, rounds, again=True)
    return [
        {"tasks": n, **{name: 1e6 * seconds[name, n] / n for name in ("read", "contraction")}}
        for n in tasks
    ]


def temporary_bytes(net: ss.Network, store: ss.MaskStore, x: jax.Array) -> int:
    """What a shared decision allocates beside its arguments, read off the compiled program."""
    program = one_shot._one_shot.lower(net, store, x, ss.entropy, False, None).compile()
    return program.memory_analysis().temp_size_in_bytes


def in_process(function: Any, *args: Any) -> Any:
    """function(*args) in a new process, whose memory ends with it."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def print_table(rows: list[dict], rounds: int) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row["milliseconds"]))
    print(f"{rows[0]['network']}: milliseconds, medians of {rounds} rounds, {rows[0]['device']}")
    print(
        "  tasks"
        + "".join(f"{name:>13}" for name in names)
        + " resident MB   right of many compile"
    )
    for row in rows:
        cells = (row["milliseconds"].get(name) for name in names)
        shown = "".join("-".rjust(13) if cell is None else f"{cell:13.2f}" for cell in cells)
        print(
            f"{row['tasks']:7}{shown}{row['peak_resident_bytes'] / 1e6:13.0f}"
            f"{row['right']:8} of {row['decisions']:3}{row['compile_seconds']:8.1f}s"
        )
    print("share of the bits read, and decisions of these that differ from the exact ones:")
    print("  tasks  certified: batch  single  differ    error: batch  single  differ")
    for row in rows:
        shown = [
            f"{row['share_read'][name]:18.2f}{row['share_read_single'][name]:8.2f}"
            f"{row['differ'][name]:8}"
            for name in ("certified", "error")
        ]
        print(f"{row['tasks']:7}" + "".join(shown))


def main(args: Args) -> dict:
    if args.tiny:
        args = dataclasses.replace(args, tasks=(5,), rounds=2)
    tasks, rounds = args.tasks, args.rounds
    with usage_errors():
        if not tasks or min(tasks) < 1 or rounds < 1:
            raise UsageError("--tasks and --rounds must be at least 1")
        writable_folder(args.out)
    num_weights, memory_there = in_process(_sizes, args)
    rows, left_out = [], []
    for num_tasks in sorted(set(tasks)):
        needed = num_tasks * num_weights // 8
        if needed > FRACTION * memory_there:
            left_out.append({"tasks": num_tasks, "bytes": needed})
            print(
                f"{num_tasks} tasks left out: {needed:,} bytes of masks, of {memory_there:,} there"
            )
            continue
        rows.append(in_process(measure, args, num_tasks))
        print(f"{num_tasks} tasks measured", flush=True)
    with usage_errors():
        if not rows:
            raise UsageError("no --tasks fits into memory")
    large = [row["tasks"] for row in rows if row["tasks"] >= (1 if args.tiny else 1000)]
    while sum(large) * num_weights // 8 > FRACTION * memory_there:
        large.pop()
    side_by_side = in_process(measure_side_by_side, args, large)
    result = write_result(
        args.out / "benchmark_inference.json",
        network=rows[0]["network"],
        weights=num_weights,
        masks=f"{rows[-1]['learned']} learned, the others of independent bits",
        error=ERROR,
        rounds=rounds,
        seed=args.seed,
        device=rows[0]["device"],
        left_out=left_out,
        rows=rows,
        microseconds_a_task=side_by_side,
    )
    plots.cost_against_tasks(args.out / "benchmark_inference.png", rows)
    print_table(rows, rounds)
    print("side by side, microseconds a task:")
    for row in side_by_side:
        print(f"{row['tasks']:7}  read {row['read']:6.2f}  contraction {row['contraction']:6.2f}")
    return result


def _sizes(args):
    return network_of(args).layout.num_weights, devices.device_bytes()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
