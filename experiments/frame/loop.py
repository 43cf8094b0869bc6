"""The frame of a run: tasks learned one after another, all of them judged at each checkpoint.

A script hands in an Experiment: its presets, and as functions what is its own. Writes result.json,
accuracy.csv (the accuracy matrix), what was learned, and pictures to --out.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tyro
from tqdm import tqdm

from experiments.frame import figures, hosts, learners
from experiments.frame.learners import Learner
from experiments.frame.rows import continual_metrics, print_table, summary, write_csv
from experiments.frame.run import Run, UsageError, usage_errors, writes

# Data that --tiny makes for itself.
DRAWN = ("synthetic", "tiny_imagenet")
# Arguments that a run's default folder has at a place of their own, or that change no result.
_NAMED_APART = {
    "preset",
    "method",
    "tiny",
    "outputs",
    "seed",
    "data_dir",
    "out",
    "resume",
    "workers",
}
_NAMED_APART |= {field.name for field in dataclasses.fields(hosts.Args)}


@dataclasses.dataclass(frozen=True)
class Args:
    """What every script takes; `preset` is of each script's own."""

    preset: str
    data_dir: Path | None = None
    """Folder in which tensorflow-datasets has prepared the dataset."""
    out: Path | None = None
    """Folder of the run; by default runs/SCRIPT/PRESET-seedS, with what else is given."""
    seed: int = 0
    """Of all that is drawn: weights, scores, batches, permutations, crops."""
    tasks: int | None = None
    """Learn this many tasks instead of the preset's."""
    resume: bool = False
    """Continue the run in --out, or show it when it is finished."""
    tiny: bool = False
    """A smoke test of seconds that needs no data: 2 or 3 tasks of digits or of drawn images."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a script hands to the frame; a config is a frozen dataclass, saved with the run.

    name: the script's, and of its folder below runs/.
    presets: configs by name.
    load(config, args): the data; raises before anything slow when it is not there.
    stream(config, data): the tasks, as the learner takes them.
    network(config, data): the fixed network.
    options(config, args): the preset with the script's own arguments in it. Raises UsageError for
      one out of range.
    learner(config, net, stream, run): see `learners`.
    conclude(run, config, learner): draws pictures; returns what result.json has of this script's.
    show(result): ends the run, ours beside the paper's.
    """

    name: str
    presets: Mapping[str, Any]
    load: Callable[[Any, Any], Any]
    stream: Callable[[Any, Any], Any]
    network: Callable[[Any, Any], Any]
    options: Callable[[Any, Any], Any]
    learner: Callable[..., Learner] = learners.make
    conclude: Callable[[Run, Any, Any], dict[str, Any]] = figures.of_run
    show: Callable[[dict[str, Any]], None] = print_table
    kind: str | None = None  # what result.json calls the experiment, if not by its name

    def config(self, args: Args) -> Any:
        """The preset with the other arguments put in. Raises UsageError for one out of range."""
        if args.seed < 0:
            raise UsageError(f"--seed must not be negative, got {args.seed}")
        if args.tasks is not None and args.tasks < 1:
            raise UsageError(f"--tasks must be at least 1, got {args.tasks}")
        config = dataclasses.replace(self.presets[args.preset], seed=args.seed)
        config = self.options(config, args)
        return config if args.tasks is None else first_tasks(config, args.tasks)

    def folder(self, args: Args) -> Path:
        """Where the run is kept; by default the name says what differs from the preset."""
        given = vars(args)
        named = [args.preset]
        named += [name for name in [given.get("method")] if name not in (None, "supsup")]
        named += ["tiny"] if args.tiny else []
        named += [f"s{given['outputs']}"] if given.get("outputs") else []
        named += [f"seed{args.seed}"]
        for field in dataclasses.fields(args):
            value = given[field.name]
            if field.name not in _NAMED_APART and value != field.default:
                told = "" if value is True else f"{value}".removesuffix(".0")
                named.append(f"{field.name}{told}")
        return args.out or Path("runs") / self.name / "-".join(named)


def first_tasks(config: Any, tasks: int) -> Any:
    """The config with so many tasks, the last of which is a checkpoint."""
    changes: dict[str, Any] = {"tasks": tasks}
    if "checkpoints" in {field.name for field in dataclasses.fields(config)}:
        changes["checkpoints"] = (*(c for c in config.checkpoints if c < tasks), tasks)
    return dataclasses.replace(config, **changes)


def check_first(config: Any, args: Args) -> None:
    """Raises UsageError for more tasks than the preset's, where there are no others."""
    if args.tasks is not None and not 1 <= args.tasks <= config.tasks:
        raise UsageError(f"--tasks must lie in [1, {config.tasks}], got {args.tasks}")


def main(experiment: Experiment, args: Args) -> dict[str, Any]:
    """Runs, or resumes, or shows a run; returns its result."""
    with usage_errors():
        config = experiment.config(args)
        run = Run.open(experiment.folder(args), config, args.resume)
        if (result := run.result) is not None:
            print(f"{run.out} is finished:")
            experiment.show(result)
            return result
        with run.phase("data"):
            data = experiment.load(config, args)
            stream = experiment.stream(config, data)
        learner = experiment.learner(config, experiment.network(config, data), stream, run)
        learner.restore()
        run.create()
        hosts.check_shared(run.out / "progress.json")
    if config.dataset in DRAWN:
        print("--tiny: images drawn with the dataset's shapes, not real data")
    print(f"{run.out}: {config.tasks} tasks of {config.dataset} by {config.method}, {learner.net}")
    learn(run, config, learner)
    return finish(experiment, run, config, learner)


def learn(run: Run, config: Any, learner: Learner) -> None:
    """Learns what is left to learn, evaluates what is left to evaluate, and saves on the way."""
    evaluated = {row["tasks_learned"] for row in run.rows}
    if learner.done in config.checkpoints and learner.done not in evaluated:
        checkpoint(run, learner)
    stops = {*config.checkpoints, *range(0, config.tasks, config.save_every)}
    with tqdm(initial=learner.done, total=config.tasks, unit="task", disable=not writes()) as bar:
        while (done := learner.done) < config.tasks:
            group = range(done, min([done + learner.together, *(s for s in stops if s > done)]))
            with run.phase("train"):
                learner.learn(group)
            with run.phase("evaluate"):
                shown = learner.shown()
            bar.set_postfix({"task": group.stop - 1, **shown}, refresh=False)
            bar.update(len(group))
            if group.stop in stops or learner.appends:
                with run.phase("save"):
                    learner.save()
                run.write_progress()
            if group.stop in config.checkpoints:
                checkpoint(run, learner)


def checkpoint(run: Run, learner: Learner) -> None:
    """Evaluates the tasks learned so far and keeps the rows."""
    with run.phase("evaluate"):
        rows = learner.evaluate()
    run.rows += [row.json() for row in rows]
    if writes():
        tqdm.write(summary(rows))
    run.write_progress()


def finish(experiment: Experiment, run: Run, config: Any, learner: Learner) -> dict[str, Any]:
    """Writes everything a finished run has, the result last."""
    if not writes():
        hosts.meet("the result is written")
        result = run.result
        assert result is not None, f"{run.out} is not the folder that process 0 writes to"
        return result
    write_csv(run.out / "accuracy.csv", run.rows)
    own = experiment.conclude(run, config, learner)
    result = run.finish(
        experiment=experiment.kind or experiment.name,
        bytes=learner.bytes(),
        metrics=continual_metrics(run.rows),
        **own,
    )
    learner.finished()
    hosts.meet("the result is written")
    experiment.show(result)
    return result


def cli(
    experiment: Experiment, args_class: type[Args], argv: list[str], description: str | None
) -> None:
    """A script's entry."""
    args = tyro.cli(args_class, args=argv, description=description)
    alone = contextlib.nullcontext()
    with hosts.joined(args) if isinstance(args, hosts.Args) else alone:
        main(experiment, args)
