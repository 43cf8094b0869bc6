# %% [markdown]
# # Text
#
# Tokens in, a dict of ids and padding, a network with an embedding. Three tasks, each of which tells
# lines of two packages of Python's standard library apart. This is text as it comes: tasks that differ
# in what is said, not in how it is written. So the tutorial also shows where one gradient does not
# do.

# %%
import re
import sysconfig
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import supsup_jax as ss

# %% [markdown]
# ## Data
#
# 24 words of a paragraph of the packages' files; a word's id is its hash. Every fourth paragraph is
# for testing: texts are new then, but of the files that were learned from.

# %%
LENGTH, VOCABULARY = 24, 2048
library = Path(sysconfig.get_paths()["stdlib"])
pairs = [("asyncio", "email"), ("multiprocessing", "unittest"), ("importlib", "xml")]


def texts(package):
    """Ids [N, LENGTH] for training and for testing; 0 is padding."""
    parts, number = ([], []), 0
    for path in sorted((library / package).rglob("*.py")):
        if "test" in path.parts[len(library.parts) + 1 :]:
            continue
        for block in re.split(r"\n\s*\n", path.read_text(errors="ignore")):
            words = re.findall(r"[A-Za-z]\w+", block)
            words = [word for word in words if package not in word.lower()][:LENGTH]
            if len(words) >= 6:
                ids = [1 + zlib.crc32(word.encode()) % (VOCABULARY - 1) for word in words]
                parts[number % 4 == 3].append(ids + [0] * (LENGTH - len(ids)))
                number += 1
    return [np.array(part, np.int32).reshape(-1, LENGTH) for part in parts]


tasks, tests = [], []
for pair in pairs:
    found = [texts(package) for package in pair]
    for split, into in ((0, tasks), (1, tests)):
        ids = np.concatenate([each[split] for each in found])
        labels = np.repeat([0, 1], [len(each[split]) for each in found])
        into.append(ss.TaskData({"ids": ids, "mask": ids > 0}, labels, transform=None))
print([task.num_examples for task in tasks], [task.num_examples for task in tests])


# %% [markdown]
# `transform=None` passes integers as they are: without it they are refused, since nobody can know
# whether they are tokens or pixels. A dict goes to the arguments of its names.
#
# ## The module
#
# Two labels a task; the other six outputs are superfluous.


# %%
class Text(nnx.Module):
    def __init__(self, *, rngs):
        self.embed = nnx.Embed(VOCABULARY, 64, rngs=rngs)
        self.norm = nnx.LayerNorm(64, rngs=rngs)
        self.hidden = nnx.Linear(64, 128, rngs=rngs)
        self.head = nnx.Linear(128, 8, rngs=rngs)

    def __call__(self, ids, mask):
        x = jnp.where(mask[..., None], self.embed(ids), 0).sum(1) / mask.sum(1, keepdims=True)
        return self.head(jax.nn.relu(self.hidden(self.norm(x))))


net = ss.signed_constant(ss.Network.from_nnx(Text(rngs=nnx.Rngs(0))), seed=0)
net

# %% [markdown]
# ## Learning
#
# The packages are not of one size: `balanced=True` draws each class as often as the other.

# %%
config = ss.TrainConfig(
    steps=300, batch_size=64, optimizer="adam", learning_rate=5e-3, schedule="cosine", balanced=True
)
store = ss.MaskStore.create(net, capacity=3)
for i, (pair, task) in enumerate(zip(pairs, tasks, strict=True)):
    learned = ss.train_task(jax.random.key(i), net, task, config)
    store = store.append(learned.task)
    print(f"{pair}: loss {learned.loss[0]:.2f} -> {learned.loss[-20:].mean():.2f}")

# %% [markdown]
# ## With the id
#
# The larger class is the number to beat, not one half.

# %%
for pair, test, row in zip(pairs, tests, ss.evaluate(net, store, tests, "given"), strict=True):
    most = max(np.mean(test.labels == label) for label in (0, 1))
    print(f"{pair}: accuracy {row.accuracy:.3f} (the larger class: {most:.3f})")

# %% [markdown]
# ## Without the id
#
# Chance is 1/3.

# %%
G = ss.Superfluous(2)
ways = {
    "one gradient, H": ("per_example", {}),
    "one gradient, G": ("per_example", {"objective": G}),
    "every mask tried, G": ("per_example", {"objective": G, "rule": "oracle"}),
    "every mask tried, largest logit": (
        "per_example",
        {"objective": ss.max_logit, "rule": "oracle"},
    ),
    "the same, 16 texts together": ("batch-16", {"objective": ss.max_logit, "rule": "oracle"}),
}
for name, (protocol, options) in ways.items():
    rows = ss.evaluate(net, store, tests, protocol, **options)
    each = [f"{row.task_accuracy:.2f}" for row in rows]
    print(f"{name}: {np.mean([row.task_accuracy for row in rows]):.2f}, by task {each}")

# %% [markdown]
# Two things to take from this. The masks work: with the id each task is solved in one network. And
# texts of different topics do not find their task as permuted pixels do: a network that tells two
# packages apart is hardly less sure of a third. If you know the task, say it. Where several texts are
# known to be of one task, let them decide together: 16 name it in more than nine of ten cases.
# [Which rule for my data?](which_rule.ipynb) has more.
