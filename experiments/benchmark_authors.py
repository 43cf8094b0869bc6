"""This library beside the authors' own code, in turn on one machine: a decision, training, memory.

    git clone https://github.com/RAIVNLab/supsup DIR
    python -m experiments.benchmark_authors --authors DIR --python PYTHON

PYTHON is an interpreter with what their code imports: torch, scipy, pillow and pyyaml. Without
--authors ours alone is timed. LeNet-300-100, batches of 128, all cores of the machine for each:

    decision  their `se_oneshot_entropy_minimization` on one batch, H of all its images, masks
              stacked before; `ss.one_shot` on the same shapes, exact and with an error of 1e-6
    task      their training step on a batch already in memory, times 1,000; `ss.train_task` of
              1,000 steps from call to result, batches drawn and mask made
    memory    the peak of each process, which holds one network with its masks and decides

Masks are of random bits: time does not depend on them, but for the decision with an error, which
real masks slow down or speed up (`benchmark_inference --run`). Each number of tasks has a process
of its own for each code, in turn, and what counts is the median of all rounds. Their code needs 4.5
MB a task. Writes benchmark_authors.json to --out, and ends with a table.
"""

import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import jax
import tyro

import supsup_jax as ss
from experiments.frame import bench
from experiments.frame.run import UsageError, usage_errors, writable_folder, write_result
from supsup_jax import data

THEIRS = Path(__file__).parent / "frame" / "authors.py"
BATCH = 128


@dataclasses.dataclass(frozen=True)
class Args:
    """Times decisions and training beside the authors' code."""

    authors: Path | None = None
    """Clone of their repository."""
    python: Path = Path(sys.executable)
    """Interpreter that has torch."""
    tasks: tuple[int, ...] = (10, 250, 2500)
    network: Literal["lenet-100", "lenet-500"] = "lenet-100"
    rounds: int = 3
    """Processes of each code for each number of tasks."""
    repeats: int = 5
    """Decisions, and blocks of training steps, a process."""
    out: Path = Path("runs/benchmark_authors")
    tiny: bool = False
    """Ours alone, 2 tasks: seconds, to see that it runs."""
    ours: int | None = None
    """Times ours at so many tasks in this process; how the script calls itself."""


def ours(tasks: int, args: Args) -> dict:
    """Seconds of each decision and task, and this process's peak of memory."""
    net = bench.network(args.network, seed=0)
    store = bench.random_store(net, tasks)
    x = jax.random.normal(jax.random.key(1), (BATCH, 784))
    calls = {
        "decision": lambda: ss.one_shot(net, store, x, per_example=False),
        "decision_error": lambda: ss.one_shot(net, store, x, per_example=False, error=1e-6),
    }
    seconds = {name: timed(call, args.repeats) for name, call in calls.items()}
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    dataset = data.synthetic(jax.random.key(0), (28, 28), 10, 512 if args.tiny else 60_000, 10)
    task, config = data.PermutedStream(dataset, 2).train[1], ss.TrainConfig(steps=steps(args))
    once = max(1, args.repeats // 3)
    seconds["task"] = timed(lambda: ss.train_task(jax.random.key(0), net, task, config), once)
    return {"seconds": seconds, "peak_bytes": peak}


def steps(args: Args) -> int:
    return 20 if args.tiny else 1000


def timed(call, repeats: int) -> list[float]:
    """Seconds of each of so many calls, behind one that may compile."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def child(words: list, cwd: Path | None = None) -> dict:
    """What a process prints as the last line, read as JSON. Raises UsageError where it fails."""
    path = os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path} if cwd is None else dict(os.environ)
    done = subprocess.run(
        [*map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise UsageError(f"{words[0]} {words[1]} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(tasks: int, args: Args) -> dict:
    """One row: both codes in turn, medians over all rounds."""
    found = {"ours": [], "theirs": []}
    for _ in range(args.rounds):
        words = ["--network", args.network, "--repeats", args.repeats]
        me = [sys.executable, "-m", "experiments.benchmark_authors", "--ours", tasks, *words]
        found["ours"].append(child(me + ["--tiny"] * args.tiny))
        if args.authors is not None:
            outputs = args.network.removeprefix("lenet-")
            them = [args.python.absolute(), THEIRS.resolve(), tasks, outputs, BATCH, args.repeats]
            found["theirs"].append(child(them, cwd=args.authors))
    return {"tasks": tasks} | {name: merged(rounds) for name, rounds in found.items() if rounds}


def merged(rounds: list[dict]) -> dict:
    seconds = {
        name: statistics.median(value for each in rounds for value in each["seconds"][name])
        for name in rounds[0]["seconds"]
    }
    return {"seconds": seconds, "peak_bytes": max(each["peak_bytes"] for each in rounds)}


def main(args: Args) -> dict | None:
    if args.ours is not None:
        print(json.dumps(ours(args.ours, args)))
        return None
    if args.tiny:
        args = dataclasses.replace(args, authors=None, tasks=(2,), rounds=1, repeats=2)
    with usage_errors():
        if min(args.rounds, args.repeats, *args.tasks) < 1:
            raise UsageError("--rounds, --repeats and --tasks must be at least 1")
        if args.authors is not None and not (args.authors / "adaptors.py").is_file():
            raise UsageError(f"--authors {args.authors} holds no clone of RAIVNLab/supsup")
        writable_folder(args.out)
        rows = [measure(tasks, args) for tasks in args.tasks]
    settings = {"network": args.network, "rounds": args.rounds, "repeats": args.repeats}
    result = write_result(args.out / "benchmark_authors.json", **settings, rows=rows)
    show(result)
    return result


def show(result: dict) -> None:
    print(f"{result['network']}, {result['device']}")
    print("tasks            a decision, ms  with error 1e-6, ms  a task, s  peak, GB")
    for row in result["rows"]:
        for name in ("ours", "theirs"):
            if name in row:
                seconds = row[name]["seconds"]
                error = seconds.get("decision_error")
                print(
                    f"{row['tasks']:5}  {name:6} {1e3 * seconds['decision']:15.1f}  "
                    f"{'-' if error is None else f'{1e3 * error:.1f}':>19}  "
                    f"{seconds['task']:9.2f}  {row[name]['peak_bytes'] / 1e9:8.2f}"
                )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
