"""Asking a store: the task that each row belongs to, and its label under that task's mask."""

import csv
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from supsup_jax.command import inputs, tasks
from supsup_jax.command.networks import network_of
from supsup_jax.inference import rejection
from supsup_jax.inference.predict import REFUSED
from supsup_jax.inference.predict import predict as logits_of
from supsup_jax.inference.search import Rule
from supsup_jax.layout import dense_widths
from supsup_jax.network import Network
from supsup_jax.objectives import (
    MaxLogit,
    OfLabels,
    Standardised,
    Superfluous,
    energy,
    entropy,
    max_confidence,
    max_logit,
)
from supsup_jax.stores import journal
from supsup_jax.stores.coded import TaskInfo
from supsup_jax.stores.disk import FORMAT, DiskStore
from supsup_jax.stores.mask_store import MaskStore
from supsup_jax.types import Objective, StoreError, num_rows

BATCH = 128
RULES = Literal["one_shot", "binary_search", "oracle", "rerank", "misfit"]
OBJECTIVES = Literal["entropy", "superfluous", "max_logit", "max_confidence", "energy"]
_OF_LOGITS = {"max_logit": max_logit, "max_confidence": max_confidence, "energy": energy}


class Asked(NamedTuple):
    """What is asked, and how.

    store: of the tasks that may be named. ids: their numbers on disk. infos: what is known of them.
    known: the place in the store of the one task that the rows are of, if that was told.
    """

    net: Network
    store: MaskStore
    ids: np.ndarray
    infos: list[TaskInfo]
    known: int | None
    rule: Rule
    objective: Objective
    together: bool


def predict(
    store: Path,
    /,
    input: tuple[Path, ...],
    net: str | None = None,
    task: str | None = None,
    rule: RULES = "one_shot",
    objective: OBJECTIVES = "entropy",
    num_labels: int | None = None,
    standardised: bool = False,
    together: bool = False,
    reject: float | None = None,
    calibrate: tuple[Path, ...] = (),
    without: tuple[int, ...] = (),
    scores: bool = False,
    mean: float = 0.0,
    std: float = 1.0,
    format: Literal["csv", "jsonl"] = "csv",
    cache: bool = False,
) -> None:
    """The task that each row belongs to, and its label under that task's mask.

    A label is one that the task names, where it names any.

    Args:
        store: Folder of the store.
        input: A .npy file of inputs [B, ...] as the network takes them; a .npz file of one array,
            or of several that the network takes by these names; images, or a folder of them.
        net: MODULE:FUNCTION, which returns the Network or the Flax NNX module; its masked weights
            are drawn anew where the store's were drawn from a seed. A chain of dense layers such
            as this library's MLP needs none.
        task: The number or name of the rows' task, where it is known.
        rule: How the task is found: by one gradient, or a rule of the library.
        objective: What certainty is measured by.
        num_labels: How many outputs are labels; otherwise as many as the tasks say or name.
        standardised: Judge each task against its own scores, which the store must know.
        together: One task for all rows.
        reject: Refuse rows of no learned task: as unsure as this fraction of --calibrate's rows.
        calibrate: Inputs of learned tasks, new to their masks, to calibrate --reject on.
        without: Numbers of tasks to leave out, such as damaged ones.
        scores: Add the score of every task.
        mean: Of pixels in [0, 1], which is taken from them.
        std: What pixels are divided by then.
        format: csv, or one JSON object a line.
        cache: Keep compiled programs in the user's cache folder: the next start is faster.
    """
    if cache:
        keep_programs()
    if (reject is None) != (not calibrate):
        raise ValueError("--reject RATE and --calibrate FILE go together: pass both or neither")
    if reject is not None and (together or task is not None):
        raise ValueError("--reject is of rows one by one, whose task is not told")
    manifest = journal.read_manifest(store)
    network = network_of(manifest, store, net, FORMAT)
    widths = None if net else dense_widths(manifest["layout"])
    rows = inputs.read(list(input), widths, mean, std)
    with DiskStore.open(store, network) as disk:
        one = None if task is None else tasks.id_of(disk, task)
        ids = _chosen(disk, one, without)
        masks, infos = _loaded(disk, ids)
    judged = _objective(objective, num_labels, infos, standardised)
    known = None if task is None else 0
    asked = Asked(network, masks, ids, infos, known, Rule(rule), judged, together)
    refusal = None
    if reject is not None:
        learned = inputs.read(list(calibrate), widths, mean, std).x
        # Where masks are tried alone the best score says more: `rejection.best_score`.
        alone = rule in ("oracle", "rerank", "misfit")
        statistic = rejection.best_score if alone else rejection.confidence
        refusal = rejection.calibrate(_belief(asked, learned), reject, statistic)
    _write(format, _answers(asked, rows, refusal, scores))


def keep_programs() -> None:
    """Has JAX keep what it compiles in the user's cache folder, for processes to come."""
    home = Path.home()
    folder = {"darwin": home / "Library" / "Caches", "win32": os.environ.get("LOCALAPPDATA")}
    root = folder.get(sys.platform, os.environ.get("XDG_CACHE_HOME")) or home / ".cache"
    jax.config.update("jax_compilation_cache_dir", str(Path(root) / "supsup_jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _chosen(disk, one, without):
    """The numbers on disk of the tasks that may be named."""
    for i in without:
        if i not in disk.ids:
            raise ValueError(f"--without {i} is no task of {disk.path}")
    ids = np.setdiff1d(disk.ids, without) if one is None else np.array([one])
    if not len(ids):
        raise StoreError(f"{disk.path} holds no task to choose")
    return ids


def _loaded(disk, ids):
    try:
        return disk.load(ids), [disk.info(i) for i in ids]
    except StoreError as error:
        lost = np.intersect1d(tasks.lost(disk), ids).tolist()
        if not lost or len(ids) == 1:
            raise
        raise StoreError(
            f"task {tasks.listed(lost)} of {disk.path} cannot be read ({error}): go on with the "
            f"others by --without {' '.join(map(str, lost))}"
        ) from error


def _objective(name, num_labels, infos, standardised):
    told = {info.num_labels or len(info.labels or ()) for info in infos}
    # Where tasks tell their numbers each is judged by its own, whichever is named here.
    if num_labels is None and (len(told) == 1 or all(info.num_labels for info in infos)):
        num_labels = max(told)
    if name == "superfluous":
        if not num_labels:
            raise ValueError(
                "--objective superfluous needs to know how many outputs are labels: pass "
                "--num-labels"
            )
        found = Superfluous(num_labels)
    elif name == "entropy":
        found = entropy
    elif name == "max_logit" and num_labels:
        found = MaxLogit(num_labels)
    else:
        found = OfLabels(_OF_LOGITS[name], num_labels) if num_labels else _OF_LOGITS[name]
    return Standardised(found) if standardised else found


def _batches(x) -> Iterator[tuple[Any, int]]:
    """Batches of one size, the last filled up, and how many rows of each are real.

    A last batch of its own size would need programs of its own.
    """
    size, total = min(BATCH, num_rows(x)), num_rows(x)
    for start in range(0, total, size):
        index = np.arange(start, start + size) % total
        yield jax.tree.map(lambda leaf, index=index: leaf[index], x), min(size, total - start)


def _belief(asked, x):
    """Of rows decided one by one, in NumPy."""
    parts = []
    for batch, real in _batches(x):
        found = jax.device_get(asked.rule(asked.net, asked.store, batch, asked.objective))
        parts.append(jax.tree.map(lambda rows, real=real: rows[:real], found))
    return jax.tree.map(lambda *rows: np.concatenate(rows), *parts)


def _answers(asked, rows, refusal, with_scores):
    """One dict a row."""
    x, files = rows
    total = num_rows(x)
    if asked.known is not None:
        named, scores = np.full(total, asked.known, np.int32), None
    elif asked.together:
        named, scores = jax.device_get(
            asked.rule(asked.net, asked.store, x, asked.objective, False)
        )
        named, scores = np.resize(named, total), np.broadcast_to(scores, (total, len(scores)))
    else:
        belief = _belief(asked, x)
        named, scores = belief
        if refusal is not None:
            named = np.asarray(rejection.reject(belief, refusal).task)
    labels = _labels(asked, x, named)
    for row in range(total):
        task, label = int(named[row]), int(labels[row])
        info = None if task == REFUSED else asked.infos[task]
        answer: dict[str, Any] = {"row": row} if files is None else {"row": row, "file": files[row]}
        answer |= {
            "task": None if info is None else int(asked.ids[task]),
            "task_name": info and info.name,
            "label": None if info is None else label,
            "label_name": info and (dict(enumerate(info.labels or ())).get(label) or None),
        }
        if with_scores and scores is not None:
            pairs = zip(asked.ids.tolist(), scores[row].tolist(), strict=True)
            answer["scores"] = {i: score if math.isfinite(score) else None for i, score in pairs}
        yield answer


def _labels(asked, x, task):
    """The best of the labels of each row's task, int [B]."""
    labels, start = [], 0
    allowed = None
    for batch, real in _batches(x):
        ids = np.resize(task[start : start + real], num_rows(batch))
        logits = np.asarray(logits_of(asked.net, asked.store, batch, ids))
        if allowed is None:
            allowed = np.stack(
                [
                    _named(i, info, logits.shape[1])
                    for i, info in zip(asked.ids, asked.infos, strict=True)
                ]
            )
        labels.append(np.where(allowed[ids], logits, -np.inf).argmax(-1)[:real])
        start += real
    return np.concatenate(labels)


def _named(i, info, num_outputs):
    """Which outputs are labels of a task, bool [C]: those with a name, or so many, or all."""
    names = info.labels or ()
    if max(len(names), info.num_labels or 0) > num_outputs:
        raise ValueError(
            f"task {i} names {max(len(names), info.num_labels or 0)} labels, and the network has "
            f"{num_outputs} outputs: replace the task, with names for these"
        )
    if any(names):
        return np.array([*map(bool, names), *[False] * (num_outputs - len(names))])
    return np.arange(num_outputs) < (info.num_labels or num_outputs)


def _write(format: str, answers: Iterable[dict[str, Any]]) -> None:
    if format == "jsonl":
        for answer in answers:
            print(json.dumps(answer))
        return
    writer = None
    for answer in answers:
        of_tasks = answer.pop("scores", {})
        answer |= {f"score_{i}": score for i, score in of_tasks.items()}
        if writer is None:
            writer = csv.DictWriter(sys.stdout, list(answer), lineterminator="\n")
            writer.writeheader()
        writer.writerow(answer)
