"""Experiments killed while they run, resumed, and killed again: do they end as if they were not?

    python -m tests.stress.stress_runs

Each of a few experiments runs once undisturbed. Then it is started again and again with --resume,
and ended by SIGKILL at a random time; where it comes to its end all the same, it begins anew. The
last start is left to finish. Each end's rows, and every byte of its tasks, must equal the first's.
One of them is run by two processes, of which one is killed and the other must end by itself; its
undisturbed run and its last start are of one process.

Expected: every run ends, and equal. Writes stress_runs.json to --out. 20 minutes on 2 CPU cores.
"""

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import tyro

from experiments.frame.run import usage_errors, writable_folder, write_result

TWO = "permuted, 2 processes"
RUNS = {
    "permuted": ("permuted", "--tasks", "12"),
    "permuted, BatchE": ("permuted", "--method", "batche", "--tasks", "6"),
    "split_cifar, transfer": ("split_cifar", "--method", "supsup_transfer"),
    "nns": ("nns",),
    TWO: ("permuted", "--tasks", "8"),
}


@dataclasses.dataclass(frozen=True)
class Args:
    """Kills experiments and compares what they end with."""

    kills: int = 10
    """Of each experiment."""
    only: Literal[tuple(RUNS)] | None = None
    """This experiment alone."""
    seed: int = 0
    out: Path = Path("runs/stress_runs")
    tiny: bool = False
    """One experiment, killed once."""


def command(script: str, *options: str, out: Path) -> list[str]:
    return [sys.executable, "-m", f"experiments.{script}", "--tiny", *options, "--out", str(out)]


def environment(folder: Path) -> dict[str, str]:
    """With a cache of compiled programs, so that most of a run is work to be killed in."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return cache | os.environ


def finished(argv: list[str], env: dict[str, str]) -> float:
    """Runs to the end; returns the seconds it took."""
    start = time.monotonic()
    done = subprocess.run(argv, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)} ended with {done.returncode}: {done.stderr[-800:]}")
    return time.monotonic() - start


def killed(argvs: list[list[str]], env: dict[str, str], seconds: float, victim: int) -> bool:
    """Runs for so long at most, a process an argv; whether one of them had to be killed."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    children = [subprocess.Popen(argv, env=env, **quiet) for argv in argvs]
    with contextlib.suppress(subprocess.TimeoutExpired):
        children[victim].wait(seconds)
    if children[victim].poll() is None:
        children[victim].send_signal(signal.SIGKILL)
    # The others end by themselves: JAX notices, at the latest by a heartbeat that it misses.
    codes = [child.wait(timeout=300) for child in children]
    return codes[victim] == -signal.SIGKILL


def together(argv: list[str], num_processes: int) -> list[list[str]]:
    """The command, for each of so many processes that run it together."""
    if num_processes == 1:
        return [argv]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    many = [*argv, "--coordinator", address, "--num-processes", str(num_processes)]
    return [[*many, "--process-id", str(i)] for i in range(num_processes)]


def outcome(out: Path) -> dict:
    """What must not depend on the kills."""
    result = json.loads((out / "result.json").read_text())
    tasks = sorted((out / "tasks").glob("*")) if (out / "tasks").exists() else []
    return {
        "rows": result["rows"],
        "tasks": {file.name: file.read_bytes() for file in tasks},
    }


def measure(folder: Path, name: str, kills: int, rng: random.Random) -> dict:
    script, env = RUNS[name], environment(folder)
    whole, broken = folder / f"{name}-whole", folder / f"{name}-broken"
    finished(command(*script, out=whole), env)
    # Again, with what is compiled by now, for how long it takes.
    again = finished(command(*script, out=folder / f"{name}-again"), env)
    argv = [*command(*script, out=broken), "--resume"]
    done, ends, processes = 0, [], 2 if name == TWO else 1
    while done < kills:
        # Rarely later than the start-up takes, half the time in the midst of the work.
        seconds = rng.uniform(0.3, 1.0) * again * processes
        done += killed(together(argv, processes), env, seconds, rng.randrange(processes))
        if done < kills and (broken / "result.json").exists():
            ends.append(outcome(whole) == outcome(broken))
            shutil.rmtree(broken)
    finished(argv, env)
    ends.append(outcome(whole) == outcome(broken))
    return {"run": name, "kills": done, "ends": len(ends), "equal": all(ends)}


def main(args: Args) -> dict:
    with usage_errors():
        writable_folder(args.out)
    rng = random.Random(args.seed)
    names = [args.only] if args.only else list(RUNS)
    names, kills = (names[:1], 1) if args.tiny else (names, args.kills)
    rows = []
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        for name in names:
            rows.append(measure(Path(folder), name, kills, rng))
            row = rows[-1]
            print(
                f"{name}: killed {row['kills']} times, {row['ends']} ends, equal: {row['equal']}",
                flush=True,
            )
    result = write_result(
        args.out / "stress_runs.json",
        seed=args.seed,
        rows=rows,
    )
    if not all(row["equal"] for row in rows):
        raise SystemExit("error: a killed run ended otherwise than an undisturbed one")
    return result


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
