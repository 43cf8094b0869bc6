"""The folder of one run: claimed before work starts, resumed after a crash, finished once.

progress.json   config, seconds and rows so far, tasks saved; present from the start
tasks/          the masks, a DiskStore: each as soon as it is learned; or, where a store is not of
store.supsup    masks appended, that store, saved every so many tasks
result.json     the finished run; its presence means that nothing is left to do
"""

import contextlib
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from supsup_jax.kernels.contraction import cpu_form

SCHEMA = 1


class UsageError(ValueError):
    """What the user must change; shown as one line, without a traceback."""


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Ends the program with one line and exit code 2 on an error of the arguments or the data."""
    try:
        yield
    except (UsageError, OSError, ValueError, TypeError) as error:
        print(f"error: {error}".replace("\n", " "), file=sys.stderr)
        raise SystemExit(2) from error


class Run:
    """One run's folder, seconds by phase and rows."""

    def __init__(self, out: Path, config: dict[str, Any], progress: dict[str, Any] | None):
        self.out = out
        self.config = config
        self.seconds: dict[str, float] = (progress or {}).get("seconds", {})
        self.rows: list[dict] = (progress or {}).get("rows", [])
        # What else a script needs to go on, as JSON.
        self.extra: dict[str, Any] = (progress or {}).get("extra", {})
        self._open = 0  # phases that have begun and not ended

    @classmethod
    def open(cls, out: Path, config: Any, resume: bool) -> "Run":
        """The run in `out`: a new one, or with `resume` the one that is there, where there is one.

        Creates nothing. Raises UsageError when the folder holds something else.
        """
        config = json.loads(json.dumps(dataclasses.asdict(config), default=str))
        if out.exists() and not out.is_dir():
            raise UsageError(f"--out {out} is a file; name a folder")
        # A write cut short leaves a hidden partial file, which means nothing.
        if not out.exists() or all(path.name.startswith(".") for path in out.iterdir()):
            if resume and writes():
                print(f"no run in {out} to resume: it begins")
            return cls(out, config, None)
        if not (out / "progress.json").is_file():
            raise UsageError(f"--out {out} holds files of something else; name an empty folder")
        if not resume:
            raise UsageError(
                f"--out {out} holds a run; pass --resume to continue it, or another --out"
            )
        progress = cls.saved(out)
        if differing := _differences(progress["config"], config):
            raise UsageError(f"--out {out} holds a run with another config: {'; '.join(differing)}")
        return cls(out, config, progress)

    @staticmethod
    def saved(out: Path) -> dict[str, Any]:
        """progress.json of the run in `out`. Raises UsageError where there is none to be read."""
        path = out / "progress.json"
        if not path.is_file():
            raise UsageError(f"{out} holds no run: there is no {path.name}")
        try:
            progress = json.loads(path.read_text())
            dict(progress["config"])
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} is damaged ({error!r}); take another folder") from error
        if progress.get("schema") != SCHEMA:
            raise UsageError(f"{path} has schema {progress.get('schema')}, this release {SCHEMA}")
        return progress

    @property
    def store_path(self) -> Path:
        return self.out / "store.supsup"

    @property
    def tasks_path(self) -> Path:
        return self.out / "tasks"

    @property
    def result(self) -> dict[str, Any] | None:
        """The finished run's result.json, None while there is none."""
        path = self.out / "result.json"
        return json.loads(path.read_text()) if path.exists() else None

    def create(self) -> None:
        """Makes the folder, and finds out now whether it can be written to."""
        if writes():
            writable_folder(self.out)
            self.write_progress()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the block's seconds to a phase; those of phases inside, and of XLA's compilation,
        which is a phase "compile" of its own, count there alone.
        """
        start, before = time.perf_counter(), sum(self.seconds.values())
        self.seconds.setdefault("compile", 0.0)
        if not self._open:
            jax.monitoring.register_event_duration_secs_listener(self._on_event)
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1
            if not self._open:
                jax.monitoring.unregister_event_duration_listener(self._on_event)
            spent = time.perf_counter() - start - (sum(self.seconds.values()) - before)
            self.seconds[name] = self.seconds.get(name, 0.0) + spent

    def write_progress(self) -> None:
        if not writes():
            return
        write_json(
            self.out / "progress.json",
            {
                "schema": SCHEMA,
                "config": self.config,
                "seconds": self.seconds,
                "rows": self.rows,
                "extra": self.extra,
            },
        )

    def finish(self, **extra: Any) -> dict[str, Any]:
        """Writes result.json, the last file of a run, and returns its content."""
        return write_result(
            self.out / "result.json",
            config=self.config,
            seed=self.config["seed"],
            seconds={name: round(spent, 3) for name, spent in self.seconds.items()},
            **extra,
            rows=[
                {name: value for name, value in row.items() if name != "per_task"}
                for row in sorted(self.rows, key=lambda row: row["tasks_learned"])
            ],
        )

    def _on_event(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.seconds["compile"] += duration_secs


def writes() -> bool:
    """Whether this process, of all that run a script together, is the one that writes."""
    return jax.process_index() == 0


def writable_folder(path: Path) -> None:
    """Makes the folder `path` and finds out, before any work, whether it can be written to."""
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
        pass


def write_result(path: Path, **fields: Any) -> dict[str, Any]:
    """Writes what a script found, with what it may depend on; returns it."""
    result = {"schema": SCHEMA, "versions": versions(), "device": device()} | fields
    write_json(path, result)
    return result


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A reader never sees half of it."""
    with replacing(path) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Any]:
    """A file to write bytes to beside `path`, which takes its place once it is whole."""
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(handle)  # else a power cut may leave the name and no bytes
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def versions() -> dict[str, str]:
    """Versions that a figure may depend on."""
    from importlib import metadata

    names = ("jax", "jaxlib", "flax", "optax", "numpy", "supsup-jax")
    return {"python": sys.version.split()[0], **{name: metadata.version(name) for name in names}}


def device() -> str:
    kind = jax.devices()[0].device_kind
    form = f", {cpu_form()}" if jax.default_backend() == "cpu" else ""
    return f"{len(jax.devices())} x {kind}, {os.cpu_count()} cores{form}"


def _differences(saved: dict, wanted: dict, prefix: str = "") -> list[str]:
    found = []
    for name in sorted({*saved, *wanted}):
        old, new = saved.get(name), wanted.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name} is {old!r} there, {new!r} here")
    return found
