"""Networks and data of your own: a transformer on text, a ViT on photographs, a trained backbone.

    python -m experiments.own_networks text                        # packages' source files
    python -m experiments.own_networks vit --data-dir DIR          # cifar10_jpeg, 5 tasks of 2
    python -m experiments.own_networks pretrained --data-dir DIR   # cifar10_jpeg, 5 + 5 classes

text         64 tokens of a Python source file -> which of two installed packages it is from; five
             tasks, ten packages. Files are split into training and test whole; lines of imports,
             comments and the packages' own names are left out. Embedding, two blocks of attention.
vit          two classes a task; beside it the same network trained without masks on the first task,
             in as many steps of the same batches.
pretrained   a conv net trained on five classes; masks on its weights, from the whole of it
             (init_scores="all") and from drawn scores, learn the other five. Beside them masks on
             random weights, and all weights trained on; with the bytes that each takes a task.

Writes result.json to --out and prints its rows. Seed 0: text GG .916, task accuracy by one gradient
.21 (chance .20); pretrained .741 from the whole backbone, .708 from drawn scores, .720 on random
weights, .760 for all weights, which take 32 times the bytes.
"""

import dataclasses
import importlib.util
import itertools
import re
from collections import Counter
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from tqdm import tqdm

import supsup_jax as ss
from experiments.frame.run import Run, UsageError, usage_errors, writable_folder
from supsup_jax import data, prng

PACKAGES = (
    ("jax", "flax"),
    ("numpy", "scipy"),
    ("sklearn", "matplotlib"),
    ("optax", "orbax"),
    ("tensorflow_datasets", "fontTools"),
)
LENGTH, VOCABULARY = 64, 4096
OUTPUTS = 10  # two labels a task, the others superfluous


@dataclasses.dataclass(frozen=True)
class Args:
    """Measures what tasks learn in networks that are not the paper's."""

    case: tyro.conf.Positional[Literal["text", "vit", "pretrained"]] = "text"
    data_dir: Path | None = None
    """Folder in which tensorflow-datasets has prepared cifar10_jpeg or cifar10."""
    dataset: str = "cifar10_jpeg"
    out: Path | None = None
    """By default runs/own_networks/CASE-seedS."""
    seed: int = 0
    """Of weights, scores and batches."""
    steps: int | None = None
    """Of each task; by default 1,000, of text 400."""
    tiny: bool = False
    """A smoke test of seconds that needs no data: drawn images, two tasks of text, few steps."""


class Block(nnx.Module):
    """Attention and two dense layers, each behind a norm, beside the stream."""

    def __init__(self, width, heads, *, rngs):
        self.norm1, self.norm2 = (nnx.LayerNorm(width, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x, mask=None):
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x))))


class TextNet(nnx.Module):
    """Tokens {"ids": [B, L], "mask": [B, L]} -> logits."""

    def __init__(self, width=128, depth=2, *, rngs):
        self.embed = nnx.Embed(VOCABULARY, width, rngs=rngs)
        self.positions = nnx.Param(0.5 * jax.random.normal(rngs.params(), (1, LENGTH, width)))
        self.blocks = nnx.List([Block(width, 4, rngs=rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, OUTPUTS, rngs=rngs)

    def __call__(self, ids, mask):
        x = self.embed(ids) + self.positions[...]
        for block in self.blocks:
            x = block(x, mask[:, None, None, :])
        x = jnp.where(mask[..., None], self.norm(x), 0).sum(1) / mask.sum(1, keepdims=True)
        return self.head(x)


class Vit(nnx.Module):
    """Photographs [B, 32, 32, 3] -> logits."""

    def __init__(self, outputs=OUTPUTS, width=96, depth=2, *, rngs):
        self.patches = nnx.Conv(3, width, (4, 4), strides=4, rngs=rngs)
        self.positions = nnx.Param(0.5 * jax.random.normal(rngs.params(), (1, 64, width)))
        self.blocks = nnx.List([Block(width, 4, rngs=rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, outputs, rngs=rngs)

    def __call__(self, x):
        x = self.patches(x).reshape(len(x), 64, -1) + self.positions[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class ConvNet(nnx.Module):
    """Photographs [B, 32, 32, 3] -> logits; normalised by the example."""

    def __init__(self, outputs=OUTPUTS, width=32, *, rngs):
        widths = (3, width, 2 * width, 4 * width)
        self.convs = nnx.List(
            [nnx.Conv(a, b, (3, 3), strides=2, rngs=rngs) for a, b in itertools.pairwise(widths)]
        )
        self.norms = nnx.List([nnx.GroupNorm(b, 8, rngs=rngs) for b in widths[1:]])
        self.head = nnx.Linear(widths[-1], outputs, rngs=rngs)

    def __call__(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = jax.nn.relu(norm(conv(x)))
        return self.head(x.mean((1, 2)))


def words(package: str) -> dict[str, list[str]]:
    """The tokens of each source file of an installed package."""
    found = importlib.util.find_spec(package)
    assert found is not None, package
    (folder, *_) = map(Path, found.submodule_search_locations or ())
    names = {name for pair in PACKAGES for name in pair} | {"np", "jnp", "plt"}
    texts = {}
    for path in sorted(folder.rglob("*.py")):
        lines = path.read_text(errors="ignore").splitlines()
        kept = [line for line in lines if not re.match(r"\s*(#|from |import )", line)]
        tokens = re.findall(r"[A-Za-z_]+|\d+|[^\sA-Za-z_\d]", "\n".join(kept))
        texts[str(path.relative_to(folder))] = [word for word in tokens if word not in names]
    return texts


def text_tasks(pairs, snippets: int, seed: int):
    """Training and test data of each pair of packages, by files."""
    rng = np.random.default_rng(seed)
    parts = {}
    for package in (name for pair in pairs for name in pair):
        files = words(package)
        order = rng.permutation(sorted(files))
        cut = len(order) // 5
        for split, names in (("test", order[:cut]), ("train", order[cut:])):
            pieces = [
                files[name][i : i + LENGTH]
                for name in names
                for i in range(0, len(files[name]), LENGTH)
                if len(files[name]) - i >= LENGTH // 2
            ]
            count = snippets if split == "train" else snippets // 8
            chosen = rng.permutation(len(pieces))[:count]
            parts[package, split] = [pieces[i] for i in chosen]
    train = [piece for (_, split), pieces in parts.items() if split == "train" for piece in pieces]
    seen = Counter(word for piece in train for word in piece)
    ids = {word: i + 1 for i, (word, _) in enumerate(seen.most_common(VOCABULARY - 1))}

    def task(pair, split):
        pieces = [(piece, label) for label in (0, 1) for piece in parts[pair[label], split]]
        table = np.zeros((len(pieces), LENGTH), np.int32)
        for row, (piece, _) in zip(table, pieces, strict=True):
            row[: len(piece)] = [ids.get(word, 0) for word in piece]
        lengths = np.array([len(piece) for piece, _ in pieces])
        mask = np.arange(LENGTH) < lengths[:, None]
        labels = np.array([label for _, label in pieces], np.int32)
        return ss.TaskData({"ids": table, "mask": mask}, labels, transform=None)

    return [task(pair, "train") for pair in pairs], [task(pair, "test") for pair in pairs]


def fit(key, net, task, config) -> tuple:
    """Weights [as params] trained without masks on the same batches, by Adam at 1e-3."""
    from supsup_jax.training.steps import batch_indices

    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, config.steps))

    @jax.jit
    def step(carry, index):
        params, moments = carry
        x, y = task.batch(index)

        def loss(params):
            logits, _ = net.forward(params, net.state, x, train=True)
            return config.loss(logits, y).mean()

        updates, moments = optimizer.update(jax.grad(loss)(params), moments, params)
        return optax.apply_updates(params, updates), moments

    carry = net.params, optimizer.init(net.params)
    for index in tqdm(batch_indices(key, task.num_examples, config), unit="step"):
        carry = step(carry, index)
    return carry[0]


def accuracy(net, params, test) -> float:
    """Of weights without masks."""
    judge = jax.jit(lambda index: net.forward(params, net.state, test.batch(index)[0], False)[0])
    parts = np.array_split(np.arange(test.num_examples), max(1, test.num_examples // 250))
    logits = np.concatenate([judge(part) for part in parts])
    return float((logits.argmax(1) == np.asarray(test.labels)).mean())


def learn(key, net, train, config, init_scores=None):
    """The store of all tasks."""
    store = ss.MaskStore.create(net, len(train))
    for i, task in enumerate(tqdm(train, unit="task")):
        own = jax.random.fold_in(key, i)
        learned = ss.train_task(own, net, task, config, init_scores)
        store = store.append(learned.task, donate=True)
    return store


def evaluated(net, store, test, labels) -> list[dict]:
    """GG and GNu by one gradient of H and of G, single inputs and 16 together."""
    rows = [row_of("gg", "given", None, ss.evaluate(net, store, test))]
    for name, objective in (("H", ss.entropy), ("G", ss.Superfluous(labels))):
        for protocol in ("per_example", "batch-16"):
            found = ss.evaluate(net, store, test, protocol, objective=objective)
            rows.append(row_of("gnu", protocol, name, found))
    return rows


def row_of(scenario, protocol, objective, found) -> dict:
    named = [row.task_accuracy for row in found]
    return {
        "scenario": scenario,
        "protocol": protocol,
        "objective": objective,
        "tasks_learned": len(found),
        "accuracy": float(np.mean([row.accuracy for row in found])),
        "task_accuracy": None if named[0] is None else float(np.mean(named)),
        "per_task": [row.accuracy for row in found],
    }


def photographs(args, classes):
    """The stream of tasks, of drawn images where the run is tiny."""
    if args.tiny:
        dataset = data.synthetic(jax.random.key(0), (32, 32, 3), 10, 200, 100)
    else:
        dataset = data.load_dataset(args.dataset, args.data_dir)
    return data.SplitStream(dataset, classes, relabel=True)


def text(args, key, config):
    pairs = PACKAGES[3:] if args.tiny else PACKAGES  # those of the least text
    train, test = text_tasks(pairs, 100 if args.tiny else 4000, args.seed)
    module = TextNet(depth=1 if args.tiny else 2, rngs=nnx.Rngs(args.seed))
    net = ss.signed_constant(ss.Network.from_nnx(module), args.seed)
    print(net)
    return evaluated(net, learn(key, net, train, config), test, labels=2)


def vit(args, key, config):
    stream = photographs(args, 2)
    module = Vit(rngs=nnx.Rngs(args.seed))
    net = ss.signed_constant(ss.Network.from_nnx(module), args.seed)
    print(net)
    store = learn(key, net, [stream.train[i] for i in range(len(stream))], config)
    rows = evaluated(net, store, [stream.test[i] for i in range(len(stream))], labels=2)
    plain = ss.Network.from_nnx(module)
    params = fit(jax.random.fold_in(key, 0), plain, stream.train[0], config)
    rows.append({"method": "no masks, task 0", "tasks_learned": 1, "scenario": "gg"})
    rows[-1] |= {"accuracy": accuracy(plain, params, stream.test[0])}
    return rows


def pretrained(args, key, config):
    stream = photographs(args, 5)
    module = ConvNet(rngs=nnx.Rngs(args.seed))
    plain = ss.Network.from_nnx(module)
    params = fit(jax.random.fold_in(key, 0), plain, stream.train[0], config)
    backbone = ss.Network(plain.apply, params)
    drawn = ss.signed_constant(plain, args.seed)
    train, test, rows = stream.train[1], stream.test[1], []

    def add(method, value, size):
        rows.append({"method": method, "tasks_learned": 1, "scenario": "gg", "accuracy": value})
        rows[-1]["bytes_a_task"] = size

    add("backbone, its own classes", accuracy(plain, params, stream.test[0]), 0)
    topk = dataclasses.replace(config, rule="topk", density=0.5)
    for method, net, how, start in (
        ("masks from the whole backbone", backbone, config, "all"),
        ("top-k masks from the whole backbone", backbone, topk, "all"),
        ("masks from drawn scores on the backbone", backbone, config, None),
        ("masks on random weights", drawn, config, None),
    ):
        learned = ss.train_task(jax.random.fold_in(key, 1), net, train, how, start)
        store = ss.MaskStore.create(net, 1).append(learned.task)
        bits = -(-net.layout.num_weights // 8)
        add(method, ss.evaluate(net, store, [test])[0].accuracy, bits)
    tuned = fit(jax.random.fold_in(key, 1), backbone, train, config)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(tuned))
    add("all weights trained on", accuracy(backbone, tuned, test), size)
    return rows


CASES = {"text": text, "vit": vit, "pretrained": pretrained}


def main(args: Args) -> dict:
    with usage_errors():
        if args.steps is not None and args.steps < 1:
            raise UsageError(f"--steps must be at least 1, got {args.steps}")
        name = f"{args.case}{'-tiny' if args.tiny else ''}-seed{args.seed}"
        out = args.out or Path("runs") / "own_networks" / name
        writable_folder(out)
        steps = args.steps or (3 if args.tiny else 400 if args.case == "text" else 1000)
        config = ss.TrainConfig(
            steps=steps,
            batch_size=16 if args.tiny else 64,
            optimizer="adam",
            learning_rate=2e-2,
            schedule="cosine",
        )
        settings = {"steps": steps, "out": str(out), "data_dir": str(args.data_dir)}
        run = Run(out, {**dataclasses.asdict(args), **settings}, None)
        with run.phase(args.case):
            key = prng.purpose_key(jax.random.key(args.seed), "tasks")
            run.rows = CASES[args.case](args, key, config)
    result = run.finish()
    for row in result["rows"]:
        print(*(f"{name}={value}" for name, value in row.items() if name != "per_task"))
    return result


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
