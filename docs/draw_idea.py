"""The pictures of `docs/idea.md`, drawn from a real network of 8 x 8 digits; a minute on two cores.

python docs/draw_idea.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

import supsup_jax as ss
from supsup_jax import data, models

FOLDER = Path(__file__).parent / "pictures"
TASKS, SHOWN = 8, 24  # tasks; weights a side of the corner that is shown
BLUE, ORANGE = "#3b6ea8", "#d9822b"


def learned():
    """The network, the store of its tasks, and the stream that they are of."""
    stream = data.PermutedStream(data.load_dataset("digits"), TASKS)
    module = models.lenet_300_100(100, num_inputs=64, rngs=nnx.Rngs(0))
    net = ss.signed_constant(ss.Network.from_nnx(module), seed=0)
    config, store = ss.TrainConfig(steps=1000, learning_rate=1e-3), ss.MaskStore.create(net, TASKS)
    for i in range(TASKS):
        store = store.append(ss.train_task(jax.random.key(i), net, stream.train[i], config).task)
    return net, store, stream


def corner(tree):
    """The weights from some middle inputs to the first units, of a pytree like params."""
    return np.asarray(tree["layer0"]["kernel"])[8 : 8 + SHOWN, :SHOWN]


def bare(axes):
    axes.set_xticks([])
    axes.set_yticks([])


def save(figure, name):
    figure.savefig(FOLDER / f"idea_{name}.png", dpi=110, bbox_inches="tight")
    plt.close(figure)


def draw_masks(net, store):
    figure, panels = plt.subplots(1, 4, figsize=(11, 3.2), layout="constrained")
    weights = np.sign(corner(net.params))
    colors = matplotlib.colors.ListedColormap([BLUE, "#f2f2f2", ORANGE])
    shown = [("the fixed weights, + and -", weights)]
    for i in range(3):
        shown.append((f"what task {i} keeps", weights * corner(store.mask(i))))
    for axes, (title, image) in zip(panels, shown, strict=True):
        axes.imshow(image, cmap=colors, vmin=-1, vmax=1)
        axes.set_title(title, fontsize=11)
        bare(axes)
    save(figure, "masks")


def draw_superposition(net, store, x):
    """x: one image of task 5."""
    figure, panels = plt.subplots(1, 4, figsize=(11.5, 3), layout="constrained")
    counts = corner(store.mixture()) * TASKS
    picture = panels[0].imshow(counts, cmap="viridis", vmin=0, vmax=TASKS)
    panels[0].set_title(f"how many of {TASKS} tasks\nkeep each weight", fontsize=10)
    bare(panels[0])
    figure.colorbar(picture, ax=panels[0], shrink=0.8)
    wrong, right = store.mask(2), store.mask(5)
    shown = [
        ("all masks laid over each other", store.mixture()),
        ("the mask of task 2, wrong", wrong),
        ("the mask of task 5, right", right),
    ]
    for axes, (title, mask) in zip(panels[1:], shown, strict=True):
        logits = net(mask, x)
        p = np.asarray(jax.nn.softmax(logits[0]))[:30]
        axes.bar(range(30), p, color=[ORANGE] * 10 + [BLUE] * 20)
        axes.set_ylim(0, 1)
        axes.set_title(f"{title}\nH = {float(ss.entropy(logits)[0]):.2f}", fontsize=10)
        axes.set_xlabel("output (orange: the 10 labels)", fontsize=9)
    panels[1].set_ylabel("probability")
    save(figure, "superposition")


def draw_gradient(net, store, x, stream):
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4), layout="constrained")
    scores = np.asarray(ss.one_shot(net, store, x).scores[0])
    left.bar(
        range(TASKS), scores, color=[ORANGE if i == scores.argmax() else BLUE for i in range(8)]
    )
    left.axhline(0, color="black", linewidth=0.6)
    left.set_title("one image of task 5: -dH/da of each task", fontsize=10)
    left.set_xlabel("task")
    images = [stream.test[i].batch(jnp.arange(50))[0] for i in range(TASKS)]
    every = np.asarray(ss.one_shot(net, store, jnp.concatenate(images)).scores)
    low, high = every.min(1, keepdims=True), every.max(1, keepdims=True)
    right.imshow((every - low) / (high - low), aspect="auto", interpolation="none", cmap="viridis")
    named = np.mean(every.argmax(1) == np.repeat(np.arange(TASKS), 50))
    right.set_title(f"50 images of each task: {named:.3f} named rightly", fontsize=10)
    right.set_xlabel("task")
    right.set_ylabel("image, by its true task")
    right.set_yticks([50 * i + 25 for i in range(TASKS)], [str(i) for i in range(TASKS)])
    save(figure, "gradient")


def main():
    FOLDER.mkdir(exist_ok=True)
    net, store, stream = learned()
    x, _ = stream.test[5].batch(jnp.arange(1))
    draw_masks(net, store)
    draw_superposition(net, store, x)
    draw_gradient(net, store, x, stream)


if __name__ == "__main__":
    main()
