"""What a run learns with: SupSup's masks, or one of the methods that the paper compares with.

`Learner` is what the frame asks of them.
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import supsup_jax as ss
from experiments.frame import checkpoints, hosts
from experiments.frame.rows import Row, evaluated, store_bytes
from experiments.frame.run import Run, UsageError, writes
from supsup_jax import baselines, data, devices, metrics, prng
from supsup_jax.layout import named_leaves

TOGETHER = 100  # tasks learned at once off the CPU, which gains nothing from several
XAVIER = jax.nn.initializers.glorot_normal()


def objectives(num_labels: int) -> dict[str, Any]:
    """What inference may minimise, by the names of configs and rows."""
    return {
        "entropy": ss.entropy,
        "superfluous": ss.Superfluous(num_labels),
        "max_confidence": ss.max_confidence,
    }


class Learner:
    """What the frame asks of every learner, and what all of them share.

    done: tasks learned.
    together: how many tasks it learns at once, at most.
    appends: whether saving costs what is new only, so that no task need be learned again.
    net_to_infer, store: what `measure` asks for the task.
    """

    appends: ClassVar = False
    done: int
    net_to_infer: ss.Network
    store: Any

    def __init__(self, config: Any, net: ss.Network, stream: Any, run: Run):
        self.config, self.net, self.stream, self.run = config, net, stream, run
        self.together = 1
        self.key = prng.purpose_key(jax.random.key(config.seed), "tasks")

    @classmethod
    def configure(cls, config: Any, method: str) -> Any:
        """The config of a preset, made for SupSup, for this method."""
        return dataclasses.replace(config, method=method)

    def learn(self, group: range) -> None:
        """Learns these tasks, those behind `done`."""
        raise NotImplementedError

    def evaluate(self) -> list[Row]:
        """The rows of a checkpoint."""
        raise NotImplementedError

    def last_accuracy(self) -> float:
        """Of the task learned last, with its id."""
        raise NotImplementedError

    def save(self) -> None:
        """Keeps what was learned in the run's folder."""
        raise NotImplementedError

    def restore(self) -> None:
        """Takes up what the run's folder keeps; a new one keeps nothing."""
        raise NotImplementedError

    def bytes(self) -> dict[str, float]:
        """What is kept of a task, in bytes, by kinds."""
        raise NotImplementedError

    def shown(self) -> dict[str, str]:
        """What the progress bar says of the task learned last."""
        return {"accuracy": f"{self.last_accuracy():.4f}"}

    def kept(self) -> dict[str, list[int]] | None:
        """Weights kept and weights in all of each layer, where every task keeps as many."""
        return None

    def finished(self) -> None:
        """Puts away what the run needs no more, once its result is written."""

    def to_judge(self) -> range:
        """Tasks judged at a checkpoint: those learned, or of these every n-th, from task 0 on."""
        return range(0, self.done, -(-self.done // (self.config.judge_most or self.done)))

    def measure(self, protocol, name, images, method, rule=None, keep=None) -> list[Row]:
        """Rows of one protocol and objective; `keep`: where to put who was inferred for whom."""
        test = self.stream.first_test(images) if images else self.stream.test
        tasks = self.to_judge()
        label = f"  {self.done} tasks, {protocol} {name or ''}"
        measured = ss.evaluate(
            self.net_to_infer,
            self.store,
            test,
            protocol,
            objective=objectives(self.stream.dataset.num_labels).get(name, ss.entropy),
            rule=rule,
            tasks=tasks,
            progress=functools.partial(
                tqdm, desc=label, leave=False, unit="task", disable=not writes()
            ),
        )
        if keep is not None and writes():
            keep.unlink(missing_ok=True)  # of an earlier checkpoint
            if tasks.step == 1:
                counts = metrics.confusion([row.inferred for row in measured])
                np.savez_compressed(keep, counts=counts)
        sample = {"tasks_learned": self.done, "judge_every": tasks.step}
        return evaluated(protocol, name, images, measured, method, **sample)


class Masks(Learner):
    """SupSup: a mask a task in one fixed network.

    mesh: of several devices, each of which learns its tasks, and holds its share of all to infer.
      Between evaluations the masks then lie in the run's folder alone, where process 0 puts them.
    """

    appends = True

    def __init__(self, config, net, stream, run, mesh=None):
        super().__init__(config, net, stream, run)
        self.mesh, self.done = mesh, 0
        self.store = ss.MaskStore.create(net, capacity=min(64, config.tasks))
        self._new: list[ss.Task] = []  # learned, and not saved yet
        self.together = 1 if jax.default_backend() == "cpu" else TOGETHER
        if mesh is not None:
            self.store, self.together = None, self.together * mesh.size

    @property
    def net_to_infer(self) -> ss.Network:
        return self.net

    def learn(self, group: range) -> None:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(self.key, jnp.asarray(group))
        many = self.stream.together(group)
        learned = ss.train_tasks(keys, self.net, many, self.config.train, mesh=self.mesh).task
        # To every process: a bit a weight would do, a byte is what crosses.
        tasks = jax.tree.map(devices.on_host, learned)
        for i in range(len(group)):
            self.include(jax.tree.map(lambda leaf: leaf[i], tasks))  # noqa: B023

    def include(self, task: ss.Task) -> None:
        """Counts a task as learned."""
        self._new.append(task)
        self.done += 1
        if self.mesh is None:
            self.store = self.store.append(task, donate=True)

    def last_accuracy(self) -> float:
        store, test = self.store, self.stream.test
        if self.mesh is not None:
            store = ss.MaskStore.create(self.net, 1).append(self._new[-1])
            (row,) = ss.evaluate(self.net, store, [test[self.done - 1]])
        else:
            (row,) = ss.evaluate(self.net, store, test, tasks=[self.done - 1])
        return row.accuracy

    def evaluate(self) -> list[Row]:
        config, few = self.config, self.config.images_per_task
        plan = [("given", None, None)] + ([("given", None, few)] if few else [])
        plan += [
            (protocol, name, None if protocol == "paper" else few)
            for protocol in config.protocols
            for name in config.objectives
        ]
        if config.every_image_at_the_end and self.done == config.tasks:
            plan.append((config.protocols[0], config.objectives[0], None))
        rule = None if config.rule == "one_shot" else config.rule
        if self.mesh is not None:
            with ss.DiskStore.open(self.run.tasks_path, self.net) as disk:
                self.store = disk.load(slice(self.done), mesh=self.mesh)
        rows = []
        for protocol, name, images in plan:
            first = (protocol, name) == (config.protocols[0], config.objectives[0])
            keep = self.run.out / "inferred.npz" if first else None
            rows += self.measure(protocol, name, images, config.method, rule, keep)
        if self.mesh is not None:
            self.store = None
        return rows

    def save(self) -> None:
        if writes():
            with ss.DiskStore.open(self.run.tasks_path, self.net, "a") as disk:
                for task in self._new[len(self._new) - (self.done - len(disk)) :]:
                    disk.append(task, durable=False)
                disk.flush()
        self._new.clear()
        hosts.meet("tasks are saved")

    def restore(self) -> None:
        try:
            disk = ss.DiskStore.open(self.run.tasks_path, self.net)
        except FileNotFoundError:  # killed before the first task: no folder, or no store yet
            disk = None
        if disk is not None:
            with disk:
                self.done = self.whole(len(disk))
                if self.done and self.mesh is None:
                    self.store = disk.load(slice(self.done))
        hosts.check_agreed(self.done, f"tasks in {self.run.tasks_path}")

    def whole(self, held: int) -> int:
        """How many of the tasks that the run's folder holds need not be learned again."""
        return held

    def bytes(self) -> dict[str, float]:
        state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.net.state))
        with ss.DiskStore.open(self.run.tasks_path, self.net) as disk:
            masks = (disk.task(i).mask for i in range(len(disk)))
            return store_bytes(masks, self.net.layout, state_bytes, self.run.tasks_path)

    def kept(self) -> dict[str, list[int]] | None:
        if self.config.train.rule != "topk":
            return None
        layout = self.net.layout
        counts = ss.kept_counts(layout, self.config.train.density)
        return {name: [counts[name], math.prod(shape)] for name, shape in layout.named_shapes}


class Transfer(Masks):
    """SupSup whose tasks start from the mean of the earlier tasks' scores (section 3.2)."""

    appends = False  # a task counts with the mean behind it

    def __init__(self, config, net, stream, run):
        super().__init__(config, net, stream, run)
        self.mean, self.together = ss.ScoreMean.create(net), 1

    def learn(self, group: range) -> None:
        (i,) = group
        key = jax.random.fold_in(self.key, i)
        learned = ss.train_task(
            key, self.net, self.stream.train[i], self.config.train, init_scores=self.mean
        )
        self.mean = self.mean.include(learned.scores)
        self.include(jax.tree.map(devices.on_host, learned.task))

    def save(self) -> None:
        with checkpoints.manager(self.run) as saved:  # first: the store's tasks are what counts
            checkpoints.save(saved, self.done, self.mean._asdict())
        super().save()

    def whole(self, held: int) -> int:
        with checkpoints.manager(self.run) as saved:
            steps = set(saved.all_steps())
            kept = {0, *(step for step in steps if step <= held)}
            for step in steps - kept:  # of a save that was interrupted before its tasks were there
                saved.delete(step)
            if done := max(kept):
                self.mean = ss.ScoreMean(**checkpoints.restored(saved, done, self.mean._asdict()))
        return done


class Compared(Learner):
    """A baseline: shared weights, and what each task adds."""

    # Weights train as SupSup's scores do, by RMSprop at 1e-4. BatchE and separate heads train as in
    # the reference: by Adam, at 1e-4 while the shared weights learn too, at 1e-2 by themselves.
    FIRST: ClassVar[dict] = {"optimizer": "adam", "learning_rate": 1e-4, "weight_decay": 1e-4}
    LATER: ClassVar[dict] = {"optimizer": "adam", "learning_rate": 1e-2, "weight_decay": 1e-4}

    def __init__(self, config, net, stream, run):
        super().__init__(config, net, stream, run)
        self.baseline = BASELINES[config.method](net)
        initializer = XAVIER if config.method == "psp" else baselines.HE_NORMAL
        weights = prng.purpose_key(jax.random.key(config.seed), "baseline")
        self.shared = baselines.shared_weights(net, weights, initializer)
        self.statistics = net.state  # as the newest task left them
        self.done = 0
        # Accuracy of each task right after it was learned, final where nothing is forgotten.
        self.accuracies = np.full(config.tasks, np.nan)
        self.store = None
        if config.method in NEED_SUPERFLUOUS:
            self.store = baselines.FactorStore.create(net, config.tasks)

    @classmethod
    def configure(cls, config, method):
        config = super().configure(config, method)
        if "batche" in method or "heads" in method:
            config = dataclasses.replace(
                config,
                train=dataclasses.replace(config.train, **cls.FIRST),
                later=dataclasses.replace(config.train, **cls.LATER),
            )
        if method in NEED_SUPERFLUOUS:
            return config
        return dataclasses.replace(config, outputs=10, images_per_task=None)

    @property
    def net_to_infer(self) -> ss.Network:
        return ss.Network(self.net.apply, self.shared, state=self.net.state)

    def task_key(self, i: int) -> jax.Array:
        return jax.random.fold_in(self.key, i)

    def train_config(self, first: bool) -> ss.TrainConfig:
        shared_learns = {"never": False, "first": first, "always": True}
        alone = not shared_learns[self.baseline.shared_learns]
        return self.config.later if alone and self.config.later else self.config.train

    def learn(self, group: range) -> None:
        (i,) = group
        first = i == 0
        learned = baselines.learn(
            self.task_key(i),
            self.baseline,
            self.shared,
            self.stream.train[i],
            self.train_config(first),
            first=first,
            state=self.statistics,
        )
        self.shared, self.statistics = learned.shared, learned.state
        if self.store is not None:
            self.store = self.store.append(learned.own, learned.state)
        self.accuracies[i] = self._accuracy(i, learned.own)
        self.done = i + 1

    def last_accuracy(self) -> float:
        return self.accuracies[self.done - 1]

    def _accuracy(self, i, own) -> float:
        data = self.stream.test[i]
        right = baselines.is_right(self.baseline, self.shared, own, data, self.statistics)
        return float(right.mean())

    def evaluate(self) -> list[Row]:
        per_task, judge_every = self.accuracies[: self.done].tolist(), 1
        if self.baseline.forgets:
            tasks = self.to_judge()
            per_task = [
                self._accuracy(i, baselines.own_weights(self.baseline, self.task_key(i)))
                for i in tqdm(tasks, desc=f"  {self.done} tasks", leave=False)
            ]
            judge_every = tasks.step
        sample: dict[str, Any] = {"tasks_learned": self.done, "judge_every": judge_every}
        rows = [Row(self.config.method, "gg", per_task, **sample)]
        protocol = self.config.protocols[0]
        for method, rule, name in INFERENCES if self.store is not None else ():
            rows += self.measure(protocol, name, None, method, rule)
        return rows

    def _state(self) -> dict:
        state = {
            "shared": self.shared,
            "factors": None if self.store is None else self.store.factors,
            "accuracies": self.accuracies,
            "done": np.asarray(self.done),
        }
        if self.net.state is not None:  # no new keys without: earlier runs would not resume
            state["statistics"] = self.statistics
            state["states"] = None if self.store is None else self.store.states
        return state

    def save(self) -> None:
        with checkpoints.manager(self.run) as saved:
            checkpoints.save(saved, self.done, self._state())

    def restore(self) -> None:
        if not (self.run.out / checkpoints.FOLDER).exists():
            return
        with checkpoints.manager(self.run) as found:
            if (step := found.latest_step()) is None:
                return
            saved = checkpoints.restored(found, step, self._state())
        self.shared, self.statistics = saved["shared"], saved.get("statistics")
        self.accuracies, self.done = np.array(saved["accuracies"]), int(saved["done"])
        if self.store is not None:
            self.store = dataclasses.replace(
                self.store,
                factors=saved["factors"],
                states=saved.get("states"),
                num_tasks=jnp.int32(self.done),
            )

    def bytes(self) -> dict[str, float]:
        """Bytes by kind, at 4 a float; weights that are never trained take their seed."""
        trained = self.baseline.shared_learns != "never"
        statistics = sum(leaf.nbytes for leaf in jax.tree.leaves(self.net.state))
        own = self.config.tasks * baselines.own_bytes(self.baseline)
        if self.baseline.owns_state:
            statistics *= self.config.tasks
            own -= statistics
        replaced = getattr(self.baseline, "names", ()) if self.baseline.own_learns else ()
        leaves = named_leaves(self.shared)
        shared = sum(leaf.size for name, leaf in leaves.items() if name not in replaced)
        heads = own if "heads" in self.config.method else 0
        kinds = {
            "shared_weights": 4 * shared * trained,
            "own_weights": own - heads,
            "norm_statistics": statistics,
            "heads": heads,
            "seed": 4,
        }
        return {**kinds, "total": sum(kinds.values())}


BASELINES = {
    "upper_bound": baselines.upper_bound,
    "lower_bound": baselines.lower_bound,
    "separate_heads": baselines.separate_heads,
    "separate_heads_random": functools.partial(baselines.separate_heads, trained=False),
    "batche": baselines.batche,
    "batche_random": functools.partial(baselines.batche, trained=False),
    "abatche": baselines.batche,
    "psp": baselines.psp,
}
METHODS = {"supsup": Masks, "supsup_transfer": Transfer, **dict.fromkeys(BASELINES, Compared)}
# Methods that infer a task, and so take as many outputs as SupSup; the others have the labels'.
NEED_SUPERFLUOUS = ("supsup", "supsup_transfer", "abatche")
# Of abatche: (method of the row, rule, objective). ABatchE tries each task's factors alone.
INFERENCES = (
    ("abatche", "oracle", "entropy"),
    ("abatche", "oracle", "max_confidence"),
    ("batche_one_shot", None, "entropy"),
    ("batche_one_shot", None, "superfluous"),
)


def make(config: Any, net: ss.Network, stream: data.ViewStream, run: Run) -> Learner:
    """The learner of a config. Raises UsageError for one that many processes cannot share."""
    if config.method == "supsup":
        return Masks(config, net, stream, run, hosts.mesh())
    if jax.process_count() > 1:
        raise UsageError(
            f"--method {config.method} learns each task from the ones before: run it as one "
            f"process, not {jax.process_count()}; supsup can be shared"
        )
    return METHODS[config.method](config, net, stream, run)
