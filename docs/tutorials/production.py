# %% [markdown]
# # Many small models in production
#
# Twelve customers, each with a scanner of its own, so that pixels come in another order. One network,
# one folder on disk. Add models, route requests to the right one, refuse strangers, replace a model,
# delete one for good.

# %%
import operator
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import supsup_jax as ss
from supsup_jax import data, models

folder = Path(tempfile.mkdtemp())
stream = data.PermutedStream(data.load_dataset("digits"), num_tasks=14)
module = models.MLP((64, 200, 60), rngs=nnx.Rngs(0))
net = ss.signed_constant(ss.Network.from_nnx(module), seed=0)
config = ss.TrainConfig(steps=600, learning_rate=2e-3)

# %% [markdown]
# ## Add
#
# `train_tasks` learns many at once. `append` returns once the task is on the device, and gives an id
# that is the task's for ever. `labels` are the names of its outputs.

# %%
keys = jax.random.split(jax.random.key(0), 12)
learned = ss.train_tasks(keys, net, stream.together(range(12)), config)
names = [f"customer {i}" for i in range(12)]
with ss.DiskStore.open(folder / "models", net, mode="x") as disk:
    for i, name in enumerate(names):
        task = jax.tree.map(operator.itemgetter(i), learned.task)
        disk.append(task, name=name, labels=list("0123456789"))
    size = sum(file.stat().st_size for file in disk.path.iterdir())
    print(disk.info(3))
    print(f"{len(disk.ids)} models of {net.layout.num_weights:,} weights in {size:,} bytes")

# %% [markdown]
# ## Route
#
# A server opens the folder to read, loads the masks and decides. `ids[belief.task]` turns places
# in the loaded store into ids, which stay right when models in between were deleted; `disk.places(ids)`
# is the way back, where a customer's id is known and `predict` is to use it. Here one gradient
# routes every request, since these inputs look different to this network. Of yours, measure it
# ([Which rule?](which_rule.ipynb)): it depends on the network, too. A net that mixes all inputs first,
# such as a dense layer, tells permuted inputs better than a convolution does.

# %%
disk = ss.DiskStore.open(folder / "models", net)  # mode "r": any number of readers
ids = disk.ids  # of now: where another process writes, a later read may bring others
store = disk.load(ids)


def answer(x):
    belief = ss.one_shot(net, store, x, ss.Superfluous(10))
    return ids[belief.task], ss.predict(net, store, x, belief.task).argmax(-1)


x = np.concatenate([stream.test[i].batch(jnp.arange(50))[0] for i in range(12)])
truth = np.concatenate([stream.test[i].batch(jnp.arange(50))[1] for i in range(12)])
customer, label = answer(x)
print("routed rightly:", np.mean(customer == np.repeat(np.arange(12), 50)))
print("answered rightly:", np.mean(label == truth))

# %% [markdown]
# ## Refuse
#
# Customers 12 and 13 have no model. A rule always names one of those it has; how sure it was tells
# whether to believe it. Calibrate on requests known to be good, which the masks were not trained on:
# here every second test image.

# %%
rule = ss.Rule("rerank", best=1, judge=ss.Superfluous(10))
rejection = ss.rejection.calibrate(
    rule(net, store, x[::2]), rate=0.02, statistic=ss.rejection.best_score
)
known = ss.rejection.reject(rule(net, store, x[1::2]), rejection)
strangers = np.concatenate([stream.test[i].batch(jnp.arange(100))[0] for i in (12, 13)])
unknown = ss.rejection.reject(rule(net, store, strangers), rejection)
print("known requests refused:", float(jnp.mean(known.task == -1)))
print("strangers refused:", float(jnp.mean(unknown.task == -1)))

# %% [markdown]
# `rate` is what calibration refuses of its own examples; of others it is near that. `predict` gives NaN
# for rows of id -1: answer the rows that were not refused.

# %%
kept = np.flatnonzero(unknown.task >= 0)
print(f"{len(kept)} of {len(strangers)} strangers would be answered")

# %% [markdown]
# ## Replace and delete
#
# One process writes; readers go on meanwhile, each seeing whole models only. After `replace` and
# `remove` no bit of the former model is left in the folder. Ids of others stay. `compact` gives the
# bytes back.

# %%
better = ss.train_task(jax.random.key(99), net, stream.train[3], ss.TrainConfig(steps=1200))
with ss.DiskStore.open(folder / "models", net, mode="a") as writer:
    writer.replace(3, better.task, name="customer 3", labels=list("0123456789"))
    writer.remove(5)
    print("bytes given back:", writer.compact())
    new = ss.train_task(jax.random.key(12), net, stream.train[12], config)
    print("id of the new model:", writer.append(new.task, name="customer 12"))

# %% [markdown]
# A reader takes it in when it asks:

# %%
disk.refresh()
ids = disk.ids
store = disk.load(ids)
print("ids:", ids.tolist())
customer, _ = answer(stream.test[12].batch(jnp.arange(100))[0])
print("customer 12 routed rightly:", np.mean(customer == 12))
print("damage found:", disk.verify())

# %% [markdown]
# ## At a shell
#
# The same by the command: `supsup inspect`, `verify`, `repair`, `export`, `import`, `remove`,
# `compact`, `predict`.

# %%
disk.close()
command = [sys.executable, "-m", "supsup_jax.cli", "inspect", str(folder / "models")]
said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
print("\n".join(line[:100] for line in said.replace(str(folder), "...").splitlines()[:12]))

# %% [markdown]
# What holds when a process dies or the power goes, and how it was tested:
# [A store on disk](../store.md). More models than memory holds: `ss.one_shot_streamed`. More than one
# device: [Many devices](../devices.md).
