# %% [markdown]
# # Which rule for my data?
#
# The symptom: with the id accuracy is good, without it tasks are named hardly better than by chance.
# This tutorial measures which rule names the tasks of your data, and what else helps. `ss.diagnose`
# does the measuring and says it in words.

# %%
import jax
import numpy as np
from flax import nnx
from sklearn.datasets import load_digits

import supsup_jax as ss

digits = load_digits()
images = np.float32(digits.images[..., None] / 16)
order = np.random.default_rng(0).permutation(len(images))
train, held_out = order[:1100], order[1100:]
centre = ss.Normalize(mean=0.3, std=0.5)

# %% [markdown]
# Where tasks look different to the network there is nothing to do: permuted pixels are named by one
# gradient in .999 of cases ([Ten tasks](ten_tasks.ipynb)), and `ss.one_shot` takes hardly longer for many
# tasks than for few. This page is about the other case.
#
# ## Tasks that are natural classes
#
# The digits as they are, two classes a task: 0 and 1, 2 and 3, ... A small net with LayerNorm and
# eight outputs: two labels, six superfluous. Equally many images of each task, so that what is compiled
# for one serves all.


# %%
class Net(nnx.Module):
    def __init__(self, *, rngs):
        self.hidden = nnx.Linear(64, 300, rngs=rngs)
        self.norm = nnx.LayerNorm(300, rngs=rngs)
        self.head = nnx.Linear(300, 8, rngs=rngs)

    def __call__(self, x):  # [B, 8, 8, 1]
        x = jax.nn.relu(self.norm(self.hidden(x.reshape(x.shape[0], -1))))
        return self.head(x)


def pair(rows, count, i):
    mine = rows[digits.target[rows] // 2 == i][:count]
    return ss.TaskData(images[mine], digits.target[mine] % 2, transform=centre)


tasks = [pair(train, 200, i) for i in range(5)]
tests = [pair(held_out, 128, i) for i in range(5)]
net = ss.signed_constant(ss.Network.from_nnx(Net(rngs=nnx.Rngs(0))), seed=0)


def learned(config):
    store = ss.MaskStore.create(net, capacity=5)
    for i, task in enumerate(tasks):
        store = store.append(ss.train_task(jax.random.key(i), net, task, config).task)
    return store


adam = {"optimizer": "adam", "learning_rate": 5e-3, "schedule": "cosine", "batch_size": 64}
plain = learned(ss.TrainConfig(steps=200, **adam))
print(ss.diagnose(net, plain, tests, num_labels=2))

# %% [markdown]
# Read it from the top. With the id all is well, so masks and training are right; what is missing is
# that a network is unsure of other tasks' digits. The table says what each rule makes of it: `oracle`
# tries every mask alone, at a forward pass for each task. `MaxLogit(2)` is the largest logit of a
# task's own labels, `normalised` less a share of the logsumexp of all; `Standardised` compares each
# task with its own mean. Which is best changes with training, so measure again when you train longer;
# and mind the standard error, which for groups is large.
#
# ## Teach it what is not its own
#
# Where a turned image is another thing, rotations are superfluous outputs with something to say: under
# `views` each image is turned at random, and its class is its label in that view. It costs no time in
# training and the bits of more outputs. For prediction `averaged` asks all four views.

# %%
views = ss.LabelledViews(num_labels=2)  # the upright view's outputs come first
turned = learned(ss.TrainConfig(steps=200, views=views, **adam))
print(ss.diagnose(views.averaged(net), turned, tests, num_labels=2))

# %% [markdown]
# ## Use what it found
#
# `Standardised` needs each task's mean and deviation, two floats kept with the mask. Groups decide
# together by `per_example=False`, or by `batch-m` in `evaluate`; that they share a task is your promise.
# An answer is the largest of the *labels'* logits: `logits[:, :2].argmax(-1)`. `evaluate` knows that of
# an averaged network; of others tell it, `metric=ss.LabelAccuracy(2)`. Where there are many tasks,
# `rerank(best=...)` tries only the best few of one gradient: look whether the right one is among them.

# %%
asked, judge = views.averaged(net), ss.MaxLogit(2)
x, y = tests[3].batch(np.arange(64))
alone = ss.oracle(asked, turned, x, judge)
print("one by one:", np.bincount(alone.task, minlength=5))
print(
    "16 together:",
    [int(ss.oracle(asked, turned, x[i : i + 16], judge, False).task) for i in (0, 16, 32, 48)],
)
measured = ss.measure_statistics(asked, turned, tests, judge)
same_scale = ss.oracle(asked, measured, x, ss.Standardised(judge))
print("standardised:", np.bincount(same_scale.task, minlength=5))
logits = ss.predict(asked, turned, x, alone.task)
print(f"right label under the named task: {np.mean(logits[:, :2].argmax(-1) == y):.3f}")
rule = ss.Rule("rerank", best=2, judge=judge)
rows = ss.evaluate(asked, turned, tests, "per_example", objective=ss.Superfluous(2), rule=rule)
print(f"rerank, best=2: task accuracy {np.mean([row.task_accuracy for row in rows]):.3f}")

# %% [markdown]
# Here the short list is too short: one gradient often leaves the right mask out of its best two, and
# `oracle` is worth its five forward passes.
#
# ## From symptom to cause
#
# | you see | look at |
# |---|---|
# | accuracy with the id is low | the result's `.loss`: more steps, a larger rate; more weights |
# | one gradient near 1 / T, `oracle` good | networks that are sure of everything: `oracle`; `rerank` where its short list holds the right mask |
# | one gradient near 1 / T for inputs that look different | a convolution sees them alike: a network whose first layer mixes all inputs |
# | one gradient near 1 / T, `oracle` bad | train with `LabelledViews`; let inputs decide together |
# | good for 16 together, bad alone | single scores are noisy, not biased: group where you can |
# | one task named for everything | its scores lie higher: `Standardised`; or one task's `num_labels` is wrong |
# | answers depend on what else is in the batch | BatchNorm under a mixture: LayerNorm or GroupNorm instead |
# | G is worse than H | too few superfluous outputs, or `num_labels` counts them as labels |
# | accuracy with the id is far below what `diagnose` says | superfluous outputs are counted as answers: `metric=ss.LabelAccuracy(n)` |
# | inputs not centred | `ss.Normalize`: networks are surer under wrong masks without |
