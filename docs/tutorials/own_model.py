# %% [markdown]
# # Your own Flax model
#
# A conv net written for the purpose, on arrays of your own. Four tasks: the same digits as four
# cameras would see them, upright, turned by 90 degrees, mirrored, and in negative.

# %%
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from sklearn.datasets import load_digits

import supsup_jax as ss

# %% [markdown]
# ## Arrays
#
# Anything that NumPy takes for an array will do: [N, height, width, channels] here, labels [N].

# %%
digits = load_digits()
images = np.float32(digits.images[..., None] / 16)
labels = digits.target
order = np.random.default_rng(0).permutation(len(labels))
train, test = order[:1400], order[1400:]
cameras = {
    "upright": images,
    "turned": np.rot90(images, axes=(1, 2)),
    "mirrored": images[:, :, ::-1],
    "negative": 1 - images,
}

# %% [markdown]
# ## A task's data
#
# A `transform` runs inside jit. `Normalize` centres: the network should be unsure of what it does not
# know, and that works best around zero.

# %%
centre = ss.Normalize(mean=0.3, std=0.5)
tasks = [ss.TaskData(seen[train], labels[train], transform=centre) for seen in cameras.values()]
tests = [ss.TaskData(seen[test], labels[test], transform=centre) for seen in cameras.values()]


# %% [markdown]
# ## The module
#
# A Flax NNX module like any other. Kernels get masks; biases, norms and embeddings of positions do not.
# LayerNorm rather than BatchNorm: its statistics are the image's own, so that an answer does not
# depend on which images are asked about together. More outputs (40) than labels (10).


# %%
class ConvNet(nnx.Module):
    def __init__(self, *, rngs):
        self.conv0 = nnx.Conv(1, 32, (3, 3), rngs=rngs)
        self.conv1 = nnx.Conv(32, 64, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.LayerNorm(64, rngs=rngs)
        self.dense = nnx.Linear(64 * 16, 128, rngs=rngs)
        self.head = nnx.Linear(128, 40, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.relu(self.conv0(x))
        x = jax.nn.relu(self.norm(self.conv1(x)))
        x = jax.nn.relu(self.dense(x.reshape(x.shape[0], -1)))
        return self.head(x)


net = ss.signed_constant(ss.Network.from_nnx(ConvNet(rngs=nnx.Rngs(0))), seed=0)
net

# %% [markdown]
# ## Learning
#
# Any optimizer of optax; here Adam by name. `on_step` reports while it learns.

# %%
config = ss.TrainConfig(
    steps=200, batch_size=64, optimizer="adam", learning_rate=5e-3, schedule="cosine"
)
store = ss.MaskStore.create(net, capacity=4)
for i, (name, task) in enumerate(zip(cameras, tasks, strict=True)):
    learned = ss.train_task(jax.random.key(i), net, task, config)
    store = store.append(learned.task)
    print(f"{name}: loss {learned.loss[-20:].mean():.3f}")

# %% [markdown]
# ## Measuring
#
# With the id, and without it: by one gradient of H and of G, and by trying every mask alone and taking
# the one that puts the least on superfluous outputs, for one image and for eight that are known to be
# of one camera. Chance is .25.

# %%
given = ss.evaluate(net, store, tests, "given")
print("with the id:", [f"{row.accuracy:.3f}" for row in given])
G = ss.Superfluous(10)
ways = {
    "one gradient, H": ("per_example", {"objective": ss.entropy}),
    "one gradient, G": ("per_example", {"objective": G}),
    "every mask tried, G": ("per_example", {"objective": G, "rule": "oracle"}),
    "eight images, one gradient, G": ("batch-8", {"objective": G}),
    "eight images, every mask, G": ("batch-8", {"objective": G, "rule": "oracle"}),
}
for name, (protocol, options) in ways.items():
    rows = ss.evaluate(net, store, tests, protocol, **options)
    print(f"{name}: task accuracy", [f"{row.task_accuracy:.3f}" for row in rows])

# %% [markdown]
# A digit in a mirror still looks like a digit, and a conv net is sure of much that it never saw: one
# gradient names the camera badly here, where permuted pixels
# [are named in .999 of cases](ten_tasks.ipynb). Trying every mask takes as many forward passes as there
# are tasks and names it better; `ss.rerank` tries the best few of one gradient only. Several images of
# one task decide better still. [Which rule for my data?](which_rule.ipynb) goes through the cases.
#
# ## Keeping it
#
# A store is saved as one file, and refused by any network but its own: same leaves, same seed, same
# weights.

# %%
with tempfile.TemporaryDirectory() as folder:
    store.save(path := Path(folder) / "cameras.supsup")
    again = ss.MaskStore.load(path, net)
    other = ss.signed_constant(net, seed=1)
    try:
        ss.MaskStore.load(path, other)
    except ss.StoreError as error:
        print(str(error).replace(folder, "..."))
x, y = tests[1].batch(jnp.arange(100))
print("label accuracy:", float(jnp.mean(ss.predict(net, again, x, 1).argmax(-1) == y)))
