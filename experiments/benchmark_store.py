"""A store on disk against its size, and against tensorstore: what appends, opening, loading cost.

    python -m experiments.benchmark_store

LeNet-300-100 (s=100), whose mask is 34,400 bytes.

    append    one task to a store of T = 10 to 10,000: milliseconds beyond the flush, and the flush
    open      a store of 2,500: its manifest, and where each task is
    load      2,500 tasks as a MaskStore, every checksum compared, beside reading the same bytes
    stream    one decision among more tasks than memory may hold, in parts: a process whose data
              segment is limited, over a store four times the limit (--stream-tasks 0 leaves it out)

The same appends and loads through tensorstore, each task a chunk or a key of its own: `zarr3`, with
crc32c, one file a task; `ocdbt`, its database of atomic transactions.

Expected: append below 5 ms at any T, open below 50 ms, load below 10 times the reading. Writes
benchmark_store.json to --out. 5 minutes on 2 CPU cores and 2 GB of disk.
"""

import dataclasses
import functools
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import tyro

import supsup_jax as ss
from experiments.frame import bench
from experiments.frame.run import usage_errors, writable_folder, write_result
from supsup_jax.stores import journal, system

MASKS = 8  # distinct ones; a disk does not know that they come again


@dataclasses.dataclass(frozen=True)
class Args:
    """Measures a DiskStore beside tensorstore."""

    sizes: tuple[int, ...] = (10, 100, 1000, 10_000)
    """T at which an append is timed."""
    tasks: int = 2500
    """T at which opening and loading are timed."""
    appends: int = 50
    rounds: int = 7
    stream_tasks: int = 60_000
    """T of the store that is four times as large as the limit of memory."""
    seed: int = 0
    out: Path = Path("runs/benchmark_store")
    tiny: bool = False
    """Stores of 20 tasks: seconds, to see that it runs."""


def random_tasks(net: ss.Network, seed: int) -> list:
    rng = np.random.default_rng(seed)
    shapes = net.layout.shapes.values()
    return [net.layout.tree([rng.random(shape) < 0.5 for shape in shapes]) for _ in range(MASKS)]


def fill(disk: ss.DiskStore, masks: list, tasks: int) -> None:
    for i in range(len(disk), tasks):
        disk.append(masks[i % MASKS], durable=False)
    disk.flush()


def append_times(disk: ss.DiskStore, masks: list, appends: int) -> dict[str, float]:
    """Median milliseconds of an append, apart from the flush that it waits for, and of that."""
    flush, flushing = system.flush, []

    def timed(fd):
        start = time.perf_counter()
        flush(fd)
        flushing.append(time.perf_counter() - start)

    system.flush = timed
    try:
        totals = []
        for i in range(appends):
            start = time.perf_counter()
            disk.append(masks[i % MASKS], name=f"task {len(disk)}", labels=list("0123456789"))
            totals.append(time.perf_counter() - start)
    finally:
        system.flush = flush
    beyond = [total - spent for total, spent in zip(totals, flushing, strict=True)]
    return {
        "beyond_ms": 1e3 * statistics.median(beyond),
        "flush_ms": 1e3 * statistics.median(flushing),
    }


def measure_appends(folder: Path, net: ss.Network, sizes: tuple[int, ...], args: Args) -> list:
    masks, rows = random_tasks(net, args.seed), []
    with ss.DiskStore.open(folder / "appends", net, mode="x") as disk:
        for size in sorted(sizes):
            fill(disk, masks, size)
            rows.append({"tasks": size, **append_times(disk, masks, args.appends)})
    return rows


def measure_loads(folder: Path, net: ss.Network, tasks: int, rounds: int, seed: int) -> dict:
    path = folder / "loads"
    with ss.DiskStore.open(path, net, mode="x") as disk:
        fill(disk, random_tasks(net, seed), tasks)
        seconds = bench.medians(
            {
                "open": lambda: ss.DiskStore.open(path, net).close(),
                "read": lambda: len((path / journal.RECORDS).read_bytes()),
                "load": disk.load,
            },
            rounds,
        )
    return {
        "tasks": tasks,
        "bytes": (path / journal.RECORDS).stat().st_size,
        **{f"{name}_seconds": spent for name, spent in seconds.items()},
        "load_over_read": seconds["load"] / seconds["read"],
    }


def measure_tensorstore(folder: Path, net: ss.Network, kind: str, args: Args, tasks: int) -> dict:
    """Appends of one task at a time, each committed, and the loading of all."""
    import tensorstore

    base = {"driver": "file", "path": str(folder / kind)}
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "ocdbt", "base": base} if kind == "ocdbt" else base,
        "metadata": {
            "shape": [tasks + args.appends, net.layout.num_words],
            "data_type": "uint32",
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [1, net.layout.num_words]},
            },
            "codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}},
                {"name": "crc32c"},
            ],
        },
    }
    array = tensorstore.open(spec, create=True, delete_existing=True).result()
    rows = np.random.default_rng(args.seed).integers(
        0, 1 << 32, (MASKS, net.layout.num_words), np.uint32
    )
    array[:tasks].write(np.resize(rows, (tasks, net.layout.num_words))).result()
    appends = []
    for i in range(args.appends):
        start = time.perf_counter()
        array[tasks + i].write(rows[i % MASKS]).result()
        appends.append(time.perf_counter() - start)

    def load():
        # Opened anew: no cache of an earlier reading.
        return tensorstore.open(spec, open=True).result()[:tasks].read().result()

    seconds = bench.medians({"load": load}, args.rounds)
    return {
        "kind": kind,
        "append_ms": 1e3 * statistics.median(appends),
        "load_seconds": seconds["load"],
        "files": sum(len(files) for _, _, files in os.walk(folder / kind)),
    }


def decide_within(path: str, limit: int) -> None:
    """In a process of its own: one decision over all parts, with `limit` bytes of data to spend."""
    net = bench.network("lenet-100", 0)
    disk = ss.DiskStore.open(path, net)
    x = jax.random.normal(jax.random.key(1), (1, 784))
    decide = functools.partial(ss.one_shot_streamed, net, disk.parts(), x)
    # What the interpreter and the compiler's threads have mapped already is counted too.
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    start = time.perf_counter()
    task = int(decide().task[0])
    print(task, time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def measure_stream(folder: Path, net: ss.Network, tasks: int, seed: int) -> dict:
    path = folder / "stream"
    with ss.DiskStore.open(path, net, mode="x") as disk:
        fill(disk, random_tasks(net, seed), tasks)
    size = (path / journal.RECORDS).stat().st_size
    code = (
        f"from experiments import benchmark_store as b; b.decide_within({str(path)!r}, {size // 4})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    shutil.rmtree(path)
    if done.returncode:
        raise RuntimeError(
            f"the limited process ended with {done.returncode}: {done.stderr[-800:]}"
        )
    task, seconds, resident = done.stdout.split()
    return {
        "tasks": tasks,
        "bytes": size,
        "limit_bytes": size // 4,
        "resident_bytes": 1024 * int(resident),
        "seconds": float(seconds),
        "task": int(task),
    }


def main(args: Args) -> dict:
    if args.tiny:
        args = dataclasses.replace(
            args, sizes=(10, 20), tasks=20, appends=3, rounds=2, stream_tasks=0
        )
    with usage_errors():
        writable_folder(args.out)
    net = bench.network("lenet-100", args.seed)
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        folder = Path(folder)
        appends = measure_appends(folder, net, args.sizes, args)
        loads = measure_loads(folder, net, args.tasks, args.rounds, args.seed)
        others = [
            measure_tensorstore(folder, net, kind, args, args.tasks) for kind in ("zarr3", "ocdbt")
        ]
        stream = None
        if args.stream_tasks:
            stream = measure_stream(folder, net, args.stream_tasks, args.seed)
    result = write_result(
        args.out / "benchmark_store.json",
        seed=args.seed,
        appends=appends,
        loads=loads,
        tensorstore=others,
        stream=stream,
    )
    print("append to T tasks   beyond the flush   the flush")
    for row in appends:
        print(f"{row['tasks']:17,}   {row['beyond_ms']:13.2f} ms {row['flush_ms']:8.2f} ms")
    print(
        f"{loads['tasks']:,} tasks: open {1e3 * loads['open_seconds']:.1f} ms, "
        f"read {1e3 * loads['read_seconds']:.0f} ms, load {1e3 * loads['load_seconds']:.0f} ms, "
        f"{loads['load_over_read']:.1f} times the reading"
    )
    for row in others:
        print(
            f"tensorstore {row['kind']}: append {row['append_ms']:.2f} ms, "
            f"load {1e3 * row['load_seconds']:.0f} ms, {row['files']:,} files"
        )
    if stream:
        print(
            f"one decision among {stream['tasks']:,} tasks, {stream['bytes'] / 1e6:,.0f} MB, "
            f"within {stream['limit_bytes'] / 1e6:,.0f} MB of data: {stream['seconds']:.1f} s"
        )
    return result


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
