"""Permuted images without task ids, in training as in testing: scenario NNs, Figure 4 of the paper.

    python -m experiments.nns                                    # digits, no data needed
    python -m experiments.nns --preset mnist-100 --data-dir DIR

Each task sends its batches and is gone; the learner is told neither which task they belong to nor
when another begins. Every 100 batches it asks its masks and learns the batch with the one that
knows it, or with a new one. At each checkpoint the tasks seen so far are judged by their test
images: with the mask inferred by the first image of each batch of 128, labels shared (protocol
"paper"), and under the mask that learned most of the task's windows (protocol "given").

    preset      network               tasks  budget  paper          on 2 CPU cores
    digits      LeNet-300-100, s=500     20      30  -              2 minutes
    mnist-100   LeNet-300-100, s=500    100     150  .935           15 minutes
    mnist-2500  LeNet-300-100, s=500   2500    2500  .9345 at 2000  hours; made for a GPU

s is the paper's name for the number of outputs in all, of which the first 10 are labels. digits
draws each of its 8x8 pixels as 3x3: among permutations of only 64 pixels a mask takes images of
other tasks for its own, and the rule, made for MNIST, merges them.
Writes result.json, accuracy.csv (the accuracy matrix), store.npz, decisions.npz (what happened at
each window) and three pictures to --out; and while the run is under way masks/, the scores and
optimizer state of every mask.
"""

import dataclasses
import functools
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

import supsup_jax as ss
from experiments.frame import loop as continual
from experiments.frame import paper, plots
from experiments.frame import rows as reports
from experiments.frame.run import Run, UsageError, usage_errors
from supsup_jax import data, metrics, prng
from supsup_jax.layout import named_leaves
from supsup_jax.training import train
from supsup_jax.training.stream import allocated_store, draw_windows, fresh_slot, restore_stream


@dataclasses.dataclass(frozen=True)
class Config:
    """All that decides a run's numbers; a resumed run must have the same."""

    dataset: str  # "digits", "synthetic", or a name that TFDS has prepared
    model: str
    outputs: int  # C, of which the dataset's labels come first
    tasks: int
    checkpoints: tuple[int, ...]  # tasks seen at which all of them are judged
    budget: int | None
    window: int = 100
    eps: float = 1 / 8
    floor: int = 5
    beyond: str = "reuse"
    train: ss.TrainConfig = dataclasses.field(default_factory=ss.TrainConfig)
    save_every: int = 10  # tasks
    # Pixels of digits in each direction for one. 8 tasks at 1: max nu x masks asked reached 1.6
    # where a task began, and fell to 1.15 where it went on; at 3, 1.02 and 1.18.
    enlarge: int = 1
    seed: int = 0
    independent_seeds: bool = False
    method: str = "supsup"
    stream: str = "permuted"

    def learner(self) -> ss.stream.StreamConfig:
        names = ("window", "eps", "floor", "budget", "beyond", "train")
        return ss.stream.StreamConfig(**{name: getattr(self, name) for name in names})


MNIST = Config("mnist", "lenet_300_100", 500, 100, (10, 50, 100), budget=150)
PRESETS = {
    "digits": dataclasses.replace(
        MNIST,
        dataset="digits",
        enlarge=3,
        tasks=20,
        checkpoints=(5, 10, 20),
        budget=30,
    ),
    "mnist-100": MNIST,
    "mnist-2500": dataclasses.replace(
        MNIST,
        tasks=2500,
        checkpoints=(10, 500, 1000, 1500, 2000, 2500),
        budget=2500,
        save_every=100,
    ),
}


@dataclasses.dataclass(frozen=True)
class Args:
    """Finds permuted tasks in a stream that never names them, and learns a mask for each."""

    preset: Literal[tuple(PRESETS)] = "digits"
    data_dir: Path | None = None
    """Folder in which tensorflow-datasets has prepared the dataset."""
    out: Path | None = None
    """Folder of the run; by default runs/nns/PRESET-seedS."""
    seed: int = 0
    """Of weights, scores, batches and permutations."""
    tasks: int | None = None
    """Stream this many tasks instead of the preset's."""
    independent_seeds: bool = False
    """Permutations that no two seeds share; the paper's seeds share nearly all."""
    resume: bool = False
    """Continue the run in --out, or show it when it is finished."""
    tiny: bool = False
    """A smoke test of seconds that needs no data: 3 tasks, 60 batches each, digits or drawn
    images."""

    def config(self) -> Config:
        config = dataclasses.replace(
            PRESETS[self.preset], seed=self.seed, independent_seeds=self.independent_seeds
        )
        if self.tiny:
            config = dataclasses.replace(
                config,
                dataset="digits" if config.dataset == "digits" else "synthetic",
                tasks=3,
                checkpoints=(2, 3),
                budget=6,
                window=20,
                save_every=1,
                train=dataclasses.replace(config.train, steps=60, learning_rate=1e-2),
            )
        if self.seed < 0:
            raise UsageError(f"--seed must not be negative, got {self.seed}")
        if self.tasks is not None:
            if self.tasks < 1:
                raise UsageError(f"--tasks must be at least 1, got {self.tasks}")
            kept = tuple(c for c in config.checkpoints if c < self.tasks)
            config = dataclasses.replace(config, tasks=self.tasks, checkpoints=(*kept, self.tasks))
        return config

    def folder(self) -> Path:
        name = f"{self.preset}{'-tiny' if self.tiny else ''}-seed{self.seed}"
        return self.out or Path("runs") / "nns" / name


class Progress:
    """A learner between two tasks of the stream, and what happened at each window before.

    Saved as masks/SLOT-WINDOWS.npz, one file a slot, written where the slot has changed, and the
    list of files in progress.json. That list is replaced in one piece and names only files that
    are whole, so a save that was killed half-way leaves the one before it.
    """

    def __init__(self, run: Run, state: ss.stream.StreamState, decisions: list[ss.stream.Decision]):
        self.run, self.state, self.decisions = run, state, decisions
        self.files: list[str] = list(run.extra.get("files", []))
        self._saved = state.slots if self.files else ()

    @classmethod
    def load(cls, run: Run, config: Config, net: ss.Network) -> "Progress":
        """Where the run in its folder was last saved, or at its start."""
        key = prng.purpose_key(jax.random.key(config.seed), "stream")
        if not run.extra:
            return cls(run, ss.stream.init_stream(key, net, config.learner()), [])
        like = fresh_slot(key, 0, net, config.learner())
        slots = [_load_slot(run.out / "masks" / name, like) for name in run.extra["files"]]
        counters = {name: run.extra[name] for name in ("allocated", "windows", "skipped")}
        state = restore_stream(key, net, slots, config.learner(), **counters)
        return cls(run, state, [ss.stream.Decision(*fields) for fields in run.extra["decisions"]])

    def save(self) -> None:
        state, folder = self.state, self.run.out / "masks"
        with self.run.phase("save"):
            folder.mkdir(exist_ok=True)
            for i, slot in enumerate(state.slots):
                if i < len(self._saved) and slot is self._saved[i]:
                    continue
                name = f"{i:05}-{state.windows:06}.npz"
                _save_slot(folder / name, slot)
                self.files[i : i + 1] = [name]
            self._saved = state.slots
        self.run.extra = {
            "allocated": state.allocated,
            "windows": state.windows,
            "skipped": state.skipped,
            "files": list(self.files),
            "decisions": list(self.decisions),
        }
        if state.allocated:
            self.run.save(allocated_store(state))
        else:
            self.run.write_progress()
        for path in set(folder.iterdir()) - {folder / name for name in self.files}:
            path.unlink()

    def counts(self, config: Config) -> np.ndarray:
        """[true task, mask] windows of the tasks seen so far."""
        tasks = true_tasks(config, len(self.decisions))
        masks = [decision.mask for decision in self.decisions]
        return metrics.window_counts(tasks, masks)


def true_tasks(config: Config, windows: int) -> np.ndarray:
    """The task behind each window of the stream, which the learner is never told."""
    return np.arange(windows) // (config.train.steps // config.window)


def main(args: Args) -> dict:
    """Runs, or resumes, or shows a run; returns its result."""
    with usage_errors():
        config = args.config()
        run = Run.open(args.folder(), config, args.resume)
        if (result := run.result) is not None:
            print(f"{run.out} is finished:")
            print_result(result)
            return result
        with run.phase("data"):
            dataset = load(config, args.data_dir)
            stream = continual.make_stream(config, dataset)
        net = continual.build(config, dataset)
        progress = Progress.load(run, config, net)
        run.create()
    if config.dataset == "synthetic":
        print("--tiny: images drawn from a key with the dataset's shapes, not real data")
    print(f"{run.out}: {config.tasks} tasks of {dataset.name}, {net}")
    learn(run, config, net, stream, progress)
    return finish(run, config, progress)


def load(config: Config, data_dir: Path | None) -> data.Dataset:
    """The dataset, digits with each of its 8x8 pixels as `enlarge` x `enlarge`."""
    dataset = continual.load(config, data_dir)
    if config.dataset != "digits":
        return dataset

    def enlarged(split):
        images = np.asarray(split.images).reshape(-1, 8, 8)
        images = images.repeat(config.enlarge, axis=1).repeat(config.enlarge, axis=2)
        return dataclasses.replace(split, images=jnp.asarray(images))

    return dataset._replace(train=enlarged(dataset.train), test=enlarged(dataset.test))


def learn(
    run: Run, config: Config, net: ss.Network, stream: data.PermutedStream, progress: Progress
) -> None:
    """Streams what is left to stream, judges at the checkpoints, and saves on the way."""
    key = prng.purpose_key(jax.random.key(config.seed), "tasks")
    learner = config.learner()
    done = progress.state.windows // (config.train.steps // config.window)
    if done in config.checkpoints and done not in {row["tasks_learned"] for row in run.rows}:
        checkpoint(run, config, net, stream, progress)
    with tqdm(initial=done, total=config.tasks, unit="task") as bar:
        for task in range(done, config.tasks):
            part = stream.train[task]
            with run.phase("train"):
                task_key = jax.random.fold_in(key, task)
                for index in np.asarray(draw_windows(task_key, part.num_examples, learner)):
                    progress.state, decision = ss.stream.observe(
                        progress.state, net, part, index, learner, donate=True
                    )
                    progress.decisions.append(decision)
            postfix = {"masks": progress.state.allocated}
            ids = metrics.mask_of_task(progress.counts(config))
            if ids[task] >= 0:
                with run.phase("evaluate"):
                    (row,) = ss.evaluate(
                        net, progress.state.store, stream.test, tasks=[task], ids=ids
                    )
                postfix["accuracy"] = f"{row.accuracy:.4f}"
            bar.set_postfix(postfix, refresh=False)
            bar.update()
            seen = task + 1
            if seen in config.checkpoints or seen % config.save_every == 0:
                progress.save()
            if seen in config.checkpoints:
                checkpoint(run, config, net, stream, progress)


def checkpoint(
    run: Run, config: Config, net: ss.Network, stream: data.PermutedStream, progress: Progress
) -> None:
    """Judges the tasks seen so far and keeps the rows."""
    counts = progress.counts(config)
    store = allocated_store(progress.state)
    with run.phase("evaluate"):
        for protocol in ("paper", "given"):
            label = f"  {len(counts)} tasks, {protocol}"
            run.rows.append(
                row_of(
                    net,
                    store,
                    stream,
                    protocol,
                    counts,
                    functools.partial(tqdm, desc=label, leave=False, unit="task"),
                )
            )
    inferred, given = run.rows[-2:]
    tqdm.write(
        f"{len(counts)} tasks, {inferred['masks']} masks: accuracy "
        f"{inferred['accuracy']:.4f} inferred, "
        f"{given['accuracy']:.4f} given, task accuracy {inferred['task_accuracy']:.4f}, "
        f"{inferred['split']} split, {inferred['merged']} merged"
    )
    run.write_progress()


def row_of(
    net: ss.Network,
    store: ss.MaskStore,
    stream: data.PermutedStream,
    protocol: str,
    counts: np.ndarray,
    progress: Any = iter,
) -> dict:
    """One protocol's row over the tasks of `counts`, a right label counting under any mask.

    A decision is right when it names a mask whose task it is. Under "given", a task of which no
    window was learned has no mask, and counts as all wrong.
    """
    inferred = protocol != "given"
    ids, tasks = metrics.mask_of_task(counts), metrics.task_of_mask(counts)
    judged = [i for i in range(len(ids)) if inferred or ids[i] >= 0]
    rows = ss.evaluate(net, store, stream.test, protocol, tasks=judged, ids=ids, progress=progress)
    per_task = [0.0] * len(counts)
    for row in rows:
        per_task[row.task] = row.shared_accuracy
    named = np.concatenate([tasks[row.inferred] == row.task for row in rows])
    return {
        "method": "supsup",
        "scenario": "nns",
        "objective": "entropy" if inferred else None,
        "protocol": protocol,
        "images_per_task": None,
        "tasks_learned": len(counts),
        "decisions": len(named),
        "accuracy": float(np.mean(per_task)),
        "task_accuracy": float(np.mean(named)) if inferred else None,
        **metrics.found(counts)._asdict(),
        "per_task": per_task,
    }


def finish(run: Run, config: Config, progress: Progress) -> dict:
    """Writes everything a finished run has, the result last."""
    reports.write_csv(run.out / "accuracy.csv", run.rows)
    windows = window_table(config, progress.decisions)
    np.savez_compressed(run.out / "decisions.npz", **windows)
    draw(run, config, windows, progress.counts(config))
    store = allocated_store(progress.state)
    masks = map(store.mask, range(int(store.num_tasks)))
    result = run.finish(
        experiment="nns",
        bytes=reports.store_bytes(masks, store.layout, store.state_bytes, run.store_path),
        metrics=reports.continual_metrics(run.rows),
        novelty=margins(config, windows),
    )
    shutil.rmtree(run.out / "masks")
    print_result(result)
    return result


def window_table(config: Config, decisions: list[ss.stream.Decision]) -> dict[str, np.ndarray]:
    """Each field of Decision as an array over the windows, NaN for None; and the true task."""
    columns = zip(*decisions, strict=True)
    table = {
        name: np.asarray(column, np.float64 if None in column else None)
        for name, column in zip(ss.stream.Decision._fields, columns, strict=True)
    }
    return {"task": true_tasks(config, len(decisions)), **table}


def margins(config: Config, windows: dict[str, np.ndarray]) -> dict[str, float | None]:
    """How far from the threshold windows lie, in units of 1 / max(T, floor).

    new_highest: of max nu at the first window of a task, which should lie below `threshold`.
    known_lowest: at any other, which should not. None where there is no such window.
    """
    height, first = heights(config, windows)
    new, known = height[first], height[~first]
    return {
        "threshold": 1 + config.eps,
        "new_highest": float(np.nanmax(new)) if np.isfinite(new).any() else None,
        "known_lowest": float(np.nanmin(known)) if np.isfinite(known).any() else None,
    }


def heights(config: Config, windows: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """max nu times max(T, floor), NaN at the very first window; whether a task begins there."""
    height = windows["max_nu"] / windows["threshold"] * (1 + config.eps)
    return height, np.diff(windows["task"], prepend=-1) > 0


def draw(run: Run, config: Config, windows: dict[str, np.ndarray], counts: np.ndarray) -> None:
    """accuracy.png, assignment.png and novelty.png."""
    title = (
        f"Permuted {config.dataset}, {config.model}, {config.outputs} outputs, seed {config.seed}"
    )
    curves = []
    for protocol, label in (("given", "ours, mask given"), ("paper", "ours, NNs, H (paper)")):
        rows = reports.find(run.rows, protocol=protocol)
        curves.append(plots.curve(label, reports.points(rows), rows[0]))
    if points := paper.CURVES.get((reports.figure(run.config), "nns", "entropy")):
        points = {tasks: value for tasks, value in points.items() if tasks <= config.tasks}
        curves.append(plots.paper_curve("nns", "entropy", points))
    plots.accuracy_against_tasks(run.out / "accuracy.png", title, curves)
    plots.assigned_windows(
        run.out / "assignment.png", f"{config.tasks} tasks, no id ever given", counts
    )
    height, first = heights(config, windows)
    plots.novelty_against_windows(run.out / "novelty.png", title, height, first, 1 + config.eps)


def print_result(result: dict) -> None:
    """Ours beside the paper's; then what was found, and by what margin."""
    reports.print_table(result)
    print("\ntasks   masks  found  purity  split  merged")
    for row in reports.find(result["rows"], protocol="paper"):
        print(
            f"{row['tasks_learned']:5}  {row['masks']:6}  {row['found']:5}  {row['purity']:.4f}  "
            f"{row['split']:5}  {row['merged']:6}"
        )
    novelty = {
        name: "-" if value is None else f"{value:.3f}" for name, value in result["novelty"].items()
    }
    print(
        f"\nmax nu, in units of 1 / max(T, floor): at most {novelty['new_highest']} where a task "
        f"begins, at least {novelty['known_lowest']} elsewhere; new below {novelty['threshold']}"
    )


def _save_slot(path: Path, slot: train.TrainState) -> None:
    """Written beside and renamed, so that `path` is whole where it exists."""
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **named_leaves(slot))
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def _load_slot(path: Path, like: train.TrainState) -> train.TrainState:
    """The slot saved at `path`. Raises UsageError for a file that is not one of this run's."""
    want = named_leaves(like)
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            leaves = {name: archive[name] for name in archive.files}
    except Exception as error:  # a damaged archive fails in a dozen ways, all of one cure
        raise UsageError(f"{path} cannot be read ({error!r}); take another folder") from error
    shapes = [
        {name: (leaf.shape, leaf.dtype) for name, leaf in of.items()} for of in (leaves, want)
    ]
    if shapes[0] != shapes[1]:
        raise UsageError(f"{path} holds {shapes[0]}, not the {shapes[1]} of this run")
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in want])


def cli(argv: list[str]) -> None:
    main(tyro.cli(Args, args=argv, description=__doc__))


if __name__ == "__main__":
    cli(sys.argv[1:])
