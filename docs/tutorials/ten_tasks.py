# %% [markdown]
# # Ten tasks, found without ids
#
# Ten tasks of handwritten digits in one network. Each task sees the pixels in an order of its own,
# as if ten customers each had a scanner of another make. No one says at test time whose image it
# is. You need the extra `data` (`pip install '.[data]'`) and about a minute.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

import supsup_jax as ss
from supsup_jax import data, models

# %% [markdown]
# ## The tasks
#
# scikit-learn's 1,797 digits of 8 x 8 pixels, a fifth set apart for testing. A stream makes task i's
# data when asked for it; all tasks share one copy of the images.

# %%
stream = data.PermutedStream(data.load_dataset("digits"), num_tasks=10)
figure, panels = plt.subplots(1, 5, figsize=(8, 1.8))
for i, axes in enumerate(panels):
    x, y = stream.train[i].batch(jnp.arange(1))
    axes.imshow(x.reshape(8, 8), cmap="gray")
    axes.set_title(f"task {i}, a {y[0]}", fontsize=9)
    axes.axis("off")

# %% [markdown]
# ## One network that is never trained
#
# LeNet-300-100 with 100 outputs: the first 10 are the labels, 90 are superfluous and learn to be off.
# `signed_constant` draws every weight as plus or minus one size, from a seed.

# %%
module = models.lenet_300_100(100, num_inputs=64, rngs=nnx.Rngs(0))
net = ss.signed_constant(ss.Network.from_nnx(module), seed=0)
net

# %% [markdown]
# ## A mask for each task
#
# `train_task` learns which weights to keep. Its `loss` says whether the learning rate and the number
# of steps are right: it should have come down and be flat. Small networks and few steps need a larger
# rate than the default of 1e-4.

# %%
config = ss.TrainConfig(steps=600, learning_rate=1e-3)
store = ss.MaskStore.create(net, capacity=10)
for i in range(10):
    learned = ss.train_task(jax.random.key(i), net, stream.train[i], config)
    store = store.append(learned.task)
    print(f"task {i}: loss {learned.loss[0]:.2f} -> {learned.loss[-50:].mean():.3f}")

# %% [markdown]
# A mask is one bit a weight. In memory the store also counts how many tasks keep each weight.

# %%
print(f"a mask: {net.layout.num_weights // 8:,} bytes; the store: {store.nbytes:,} bytes")

# %% [markdown]
# ## Whose image is it?
#
# One gradient for each image: `scores[b, i]` says how much surer the network would be of image b if
# it had more of mask i. The largest names the task.

# %%
x, labels = stream.test[7].batch(jnp.arange(200))
belief = ss.one_shot(net, store, x)
print("named:", np.bincount(belief.task, minlength=10))
logits = ss.predict(net, store, x, belief.task)
print("label accuracy:", float(jnp.mean(logits.argmax(-1) == labels)))

# %% [markdown]
# ## All tasks measured
#
# `evaluate` does it for the whole stream. `given` tells the id (scenario GG), `per_example` has every
# image name its own task (GNu). H is the default objective; G looks at the superfluous outputs.

# %%
given = ss.evaluate(net, store, stream.test, "given")
print(f"with the id: {np.mean([row.accuracy for row in given]):.4f}")
for name, objective in (("H", ss.entropy), ("G", ss.Superfluous(10))):
    rows = ss.evaluate(net, store, stream.test, "per_example", objective=objective)
    accuracy = np.mean([row.accuracy for row in rows])
    found = np.mean([row.task_accuracy for row in rows])
    print(f"without, by {name}: accuracy {accuracy:.4f}, task accuracy {found:.4f}")

# %%
table = np.stack([np.bincount(row.inferred, minlength=10) for row in rows])
plt.figure(figsize=(3.2, 3))
plt.imshow(table)
plt.xlabel("task named, by G")
_ = plt.ylabel("true task")

# %% [markdown]
# Permuted pixels are the case that works: under a wrong mask an image looks like nothing the network
# knows, and it is unsure. Tasks that are natural classes are another matter:
# [Which rule for my data?](which_rule.ipynb)
