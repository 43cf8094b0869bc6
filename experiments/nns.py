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
    mnist-2500  LeNet-300-100, s=500   2500    2500  .9345 at 2000  3 hours

s is the paper's name for the number of outputs in all, of which the first 10 are labels. digits
draws each of its 8x8 pixels as 3x3: among permutations of only 64 pixels a mask takes images of
other tasks for its own, and the rule, made for MNIST, merges them.
Writes result.json, accuracy.csv (the accuracy matrix), store.supsup, decisions.npz (what happened
at each window) and three pictures to --out; and while the run is under way masks/, the scores and
optimizer state of every mask.
"""

import dataclasses
import functools
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import supsup_jax as ss
from experiments.frame import config as frame
from experiments.frame import loop, paper, plots
from experiments.frame.learners import Learner
from experiments.frame.rows import Row, figure, find, points, print_table, store_bytes
from experiments.frame.run import Run, UsageError, replacing
from supsup_jax import data, metrics, prng
from supsup_jax.layout import named_leaves
from supsup_jax.training.steps import TrainState
from supsup_jax.training.stream import (
    FEW,
    allocated_store,
    draw_windows,
    fresh_slot,
    restore_stream,
)


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
    deviations: float | None = None
    train: ss.TrainConfig = dataclasses.field(default_factory=ss.TrainConfig)
    judge_most: int | None = None  # tasks judged at a checkpoint, evenly spread; None for all
    save_every: int = 10  # tasks
    # Pixels of digits in each direction for one. 8 tasks at 1: max nu x masks asked reached 1.6
    # where a task began, and fell to 1.15 where it went on; at 3, 1.02 and 1.18.
    enlarge: int = 1
    seed: int = 0
    independent_seeds: bool = False
    method: str = "supsup"
    stream: str = "permuted"

    def rule(self) -> ss.stream.StreamConfig:
        names = ("window", "eps", "floor", "budget", "beyond", "deviations", "train")
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
class Args(loop.Args):
    """Finds permuted tasks in a stream that never names them, and learns a mask for each."""

    preset: Literal[tuple(PRESETS)] = "digits"
    judge_most: int | None = None
    """Judge at most so many tasks at a checkpoint, evenly spread."""
    deviations: float | None = None
    """Among 50 masks or more, one knows a batch only where its score leads the others' by so many
    standard deviations, such as 5; by default the paper's rule alone."""
    independent_seeds: bool = False
    """Permutations that no two seeds share; the paper's seeds share nearly all."""


def options(config: Config, args: Args) -> Config:
    """The preset as Args wants it; with --tiny 3 tasks of 60 batches each."""
    frame.check_positive(args, "judge_most")
    names = ("independent_seeds", "judge_most", "deviations")
    fields = {name: getattr(args, name) for name in names}
    config = dataclasses.replace(config, **fields)
    if not args.tiny:
        return config
    return dataclasses.replace(
        config,
        dataset=frame.at_hand(config.dataset),
        tasks=3,
        checkpoints=(2, 3),
        budget=6,
        window=20,
        save_every=1,
        train=dataclasses.replace(config.train, steps=60, learning_rate=1e-2),
    )


def load(config: Config, args: Args) -> data.Dataset:
    """The dataset, digits with each of its 8x8 pixels as `enlarge` x `enlarge`."""
    dataset = frame.load(config, args)
    if config.dataset != "digits":
        return dataset

    def enlarged(split):
        images = np.asarray(split.inputs).reshape(-1, 8, 8)
        images = images.repeat(config.enlarge, axis=1).repeat(config.enlarge, axis=2)
        return dataclasses.replace(split, inputs=jnp.asarray(images))

    return dataset._replace(train=enlarged(dataset.train), test=enlarged(dataset.test))


class Windows(Learner):
    """Learns a stream window by window, without ids, and keeps what happened at each.

    Saved as masks/SLOT-WINDOWS.npz, one file a slot, written where the slot has changed, and the
    list of files in progress.json. That list is replaced in one piece and names only files that
    are whole, so a save that was killed half-way leaves the one before it.
    """

    def __init__(self, config: Config, net: ss.Network, stream: data.PermutedStream, run: Run):
        super().__init__(config, net, stream, run)
        self.start = prng.purpose_key(jax.random.key(config.seed), "stream")
        self.state = ss.stream.init_stream(self.start, net, config.rule())
        self.decisions: list[ss.stream.Decision] = []
        self.files: list[str] = []
        self._saved = ()

    @property
    def done(self) -> int:
        """Tasks of which all windows were seen."""
        return self.state.windows // (self.config.train.steps // self.config.window)

    @property
    def folder(self) -> Path:
        return self.run.out / "masks"

    def learn(self, group: range) -> None:
        (task,) = group
        part, rule = self.stream.train[task], self.config.rule()
        windows = draw_windows(jax.random.fold_in(self.key, task), part.num_examples, rule)
        for index in np.asarray(windows):
            self.state, decision = ss.stream.observe(
                self.state, self.net, part, index, rule, donate=True
            )
            self.decisions.append(decision)

    def shown(self) -> dict[str, str]:
        said, task = {"masks": str(self.state.allocated)}, self.done - 1
        ids = metrics.mask_of_task(self.counts())
        if ids[task] >= 0:
            (row,) = ss.evaluate(
                self.net, self.state.store, self.stream.test, tasks=[task], ids=ids
            )
            said["accuracy"] = f"{row.accuracy:.4f}"
        return said

    def evaluate(self) -> list[Row]:
        store, counts = allocated_store(self.state), self.counts()
        of_tasks = counts, self.to_judge()
        return [
            judged(self.net, store, self.stream, name, *of_tasks) for name in ("paper", "given")
        ]

    def save(self) -> None:
        state = self.state
        self.folder.mkdir(exist_ok=True)
        for i, slot in enumerate(state.slots):
            if i < len(self._saved) and slot is self._saved[i]:
                continue
            name = f"{i:05}-{state.windows:06}.npz"
            _save_slot(self.folder / name, slot)
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
            allocated_store(state).save(self.run.store_path, overwrite=True)
        self.run.write_progress()  # before the files go that the progress before counts on
        for path in set(self.folder.iterdir()) - {self.folder / name for name in self.files}:
            path.unlink()

    def restore(self) -> None:
        saved = self.run.extra
        if not saved:
            return
        like = fresh_slot(self.start, 0, self.net, self.config.rule())
        slots = [_load_slot(self.folder / name, like) for name in saved["files"]]
        counters = {name: saved[name] for name in ("allocated", "windows", "skipped")}
        self.state = restore_stream(self.start, self.net, slots, self.config.rule(), **counters)
        self.decisions = [ss.stream.Decision(*fields) for fields in saved["decisions"]]
        self.files, self._saved = list(saved["files"]), self.state.slots

    def bytes(self) -> dict[str, float]:
        store = allocated_store(self.state)
        masks = map(store.mask, range(int(store.num_tasks)))
        return store_bytes(masks, store.layout, store.state_bytes, self.run.store_path)

    def finished(self) -> None:
        shutil.rmtree(self.folder)

    def counts(self) -> np.ndarray:
        """[true task, mask] windows of the tasks seen so far."""
        masks = [decision.mask for decision in self.decisions]
        return metrics.window_counts(true_tasks(self.config, len(masks)), masks)


def true_tasks(config: Config, windows: int) -> np.ndarray:
    """The task behind each window of the stream, which the learner is never told."""
    return np.arange(windows) // (config.train.steps // config.window)


def judged(
    net: ss.Network,
    store: ss.MaskStore,
    stream: data.PermutedStream,
    protocol: str,
    counts: np.ndarray,
    asked: range,
) -> Row:
    """One protocol's row over the tasks `asked`, a right label counting under any mask.

    counts: windows of the tasks seen, [true task, mask].
    A decision is right when it names a mask whose task it is. Under "given", a task of which no
    window was learned has no mask, and counts as all wrong.
    """
    inferred = protocol != "given"
    ids, tasks = metrics.mask_of_task(counts), metrics.task_of_mask(counts)
    known = [i for i in asked if inferred or ids[i] >= 0]
    label = f"  {len(counts)} tasks, {protocol}"
    progress = functools.partial(tqdm, desc=label, leave=False, unit="task")
    rows = ss.evaluate(net, store, stream.test, protocol, tasks=known, ids=ids, progress=progress)
    per_task = dict.fromkeys(asked, 0.0) | {row.task: row.shared_accuracy for row in rows}
    named = np.concatenate([tasks[row.inferred] == row.task for row in rows])
    return Row(
        "supsup",
        "nns",
        list(per_task.values()),
        "entropy" if inferred else None,
        protocol,
        decisions=len(named),
        task_accuracy=float(np.mean(named)) if inferred else None,
        more=metrics.found(counts)._asdict(),
        tasks_learned=len(counts),
        judge_every=asked.step,
    )


def conclude(run: Run, config: Config, learner: Windows) -> dict[str, Any]:
    """decisions.npz and the pictures; the margins of the rule."""
    windows = window_table(config, learner.decisions)
    np.savez_compressed(run.out / "decisions.npz", **windows)
    draw(run, config, windows, learner.counts())
    return {"novelty": margins(config, windows)}


def window_table(config: Config, decisions: list[ss.stream.Decision]) -> dict[str, Any]:
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
    With `deviations` the same of the lead, where it was asked for.
    """
    height, first = heights(config, windows)
    found = {"threshold": 1 + config.eps, **extremes(height, first)}
    if config.deviations is not None:
        asked = (1 + config.eps) / windows["threshold"] > FEW - 0.5
        of_lead = extremes(np.where(asked, windows["lead"], np.nan), first)
        found |= {f"lead_{name}": value for name, value in of_lead.items()}
    return found


def extremes(values: np.ndarray, first: np.ndarray) -> dict[str, float | None]:
    """The highest of values at the first windows of tasks, the lowest at others."""
    new, known = values[first], values[~first]
    return {
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
        rows = find(run.rows, protocol=protocol)
        curves.append(plots.curve(label, points(rows), rows[0]))
    if theirs := paper.CURVES.get((figure(run.config), "nns", "entropy")):
        theirs = {tasks: value for tasks, value in theirs.items() if tasks <= config.tasks}
        curves.append(plots.paper_curve("nns", "entropy", theirs))
    plots.accuracy_against_tasks(run.out / "accuracy.png", title, curves)
    plots.assigned_windows(
        run.out / "assignment.png", f"{config.tasks} tasks, no id ever given", counts
    )
    height, first = heights(config, windows)
    plots.novelty_against_windows(run.out / "novelty.png", title, height, first, 1 + config.eps)


def print_result(result: dict) -> None:
    """Ours beside the paper's; then what was found, and by what margin."""
    print_table(result)
    print("\ntasks   masks  found  purity  split  merged")
    for row in find(result["rows"], protocol="paper"):
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
    if (deviations := result["config"].get("deviations")) is not None:
        print(
            f"lead, among {FEW} masks or more: at most {novelty['lead_new_highest']} where a task "
            f"begins, at least {novelty['lead_known_lowest']} elsewhere; new below {deviations:g}"
        )


def _save_slot(path: Path, slot: TrainState) -> None:
    with replacing(path) as file:
        np.savez(file, **named_leaves(slot))


def _load_slot(path: Path, like: TrainState) -> TrainState:
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


EXPERIMENT = loop.Experiment(
    name="nns",
    presets=PRESETS,
    load=load,
    stream=frame.views,
    network=frame.dense_network,
    options=options,
    learner=Windows,
    conclude=conclude,
    show=print_result,
)

if __name__ == "__main__":
    loop.cli(EXPERIMENT, Args, sys.argv[1:], __doc__)
