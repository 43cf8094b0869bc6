"""Experiments killed while they run, resumed, and killed again: do they end as if they were not?

    python -m experiments.stress_runs

Each of a few experiments runs once undisturbed. Then it is started again and again with --resume,
and ended by SIGKILL at a random time; where it comes to its end all the same, it begins anew. The
last start is left to finish. Each end's rows, and every byte of its tasks, must equal the first's.

Expected: every run ends, and equal. Writes stress_runs.json to --out. 10 minutes on 2 CPU cores.
"""

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro

from experiments import runs

RUNS = {
    "permuted": ("permuted", "--tasks", "12"),
    "permuted, BatchE": ("permuted", "--method", "batche", "--tasks", "6"),
    "split_cifar, transfer": ("split_cifar", "--method", "supsup_transfer"),
    "nns": ("nns",),
}


@dataclasses.dataclass(frozen=True)
class Args:
    """Kills experiments and compares what they end with."""

    kills: int = 10
    """Of each experiment."""
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


def killed(argv: list[str], env: dict[str, str], seconds: float) -> bool:
    """Runs for so long at most; whether it had to be killed."""
    child = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(seconds)
    if child.poll() is None:
        child.send_signal(signal.SIGKILL)
    return child.wait() == -signal.SIGKILL


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
    done, ends = 0, []
    while done < kills:
        # Rarely later than the start-up takes, half the time in the midst of the work.
        done += killed(argv, env, rng.uniform(0.3, 1.0) * again)
        if done < kills and (broken / "result.json").exists():
            ends.append(outcome(whole) == outcome(broken))
            shutil.rmtree(broken)
    finished(argv, env)
    ends.append(outcome(whole) == outcome(broken))
    return {"run": name, "kills": done, "ends": len(ends), "equal": all(ends)}


def main(args: Args) -> dict:
    with runs.usage_errors():
        runs.writable_folder(args.out)
    rng = random.Random(args.seed)
    names, kills = (list(RUNS)[:1], 1) if args.tiny else (list(RUNS), args.kills)
    rows = []
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        for name in names:
            rows.append(measure(Path(folder), name, kills, rng))
            row = rows[-1]
            print(
                f"{name}: killed {row['kills']} times, {row['ends']} ends, equal: {row['equal']}",
                flush=True,
            )
    result = {
        "schema": runs.SCHEMA,
        "seed": args.seed,
        "versions": runs.versions(),
        "device": runs.device(),
        "rows": rows,
    }
    runs.write_json(args.out / "stress_runs.json", result)
    if not all(row["equal"] for row in rows):
        raise SystemExit("error: a killed run ended otherwise than an undisturbed one")
    return result


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
