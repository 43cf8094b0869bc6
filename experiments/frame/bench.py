"""What benchmarks share: side-by-side timing, the paper's dense networks, stores of any size.

On a shared machine only ratios within one run mean anything.
"""

import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import supsup_jax as ss
from experiments.frame import config
from experiments.frame.run import UsageError
from supsup_jax import data, models
from supsup_jax.layout import column, pack, place
from supsup_jax.stores import arrays

_MODELS = {
    "lenet-100": (models.lenet_300_100, 100),
    "lenet-500": (models.lenet_300_100, 500),
    "fc-500": (models.fc_1024_1024, 500),
}
NETWORKS = tuple(_MODELS)


def medians(
    measures: dict[Any, Callable[[], Any]], rounds: int, budget: float = 20.0, again: bool = False
) -> dict[Any, float]:
    """Median seconds of each function over `rounds`, all of them once a round, in turn.

    The first call of each, which may compile, is not counted. A function that has taken `budget`
    seconds sits out the rounds that are left. again: each is called twice in a row, and the second
    call counts, with the caches as the first has left them.
    """
    for function in measures.values():
        jax.block_until_ready(function())
    seconds = {name: [] for name in measures}
    for _ in range(rounds):
        for name, function in measures.items():
            if sum(seconds[name]) > budget:
                continue
            if again:
                jax.block_until_ready(function())
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def network(name: str, seed: int) -> ss.Network:
    """A network of 784 inputs with signed constant weights; the number in its name is C."""
    model, outputs = _MODELS[name]
    return ss.signed_constant(ss.Network.from_nnx(model(outputs, rngs=nnx.Rngs(0))), seed)


def learned(run: Path, args: Any) -> tuple[ss.Network, ss.MaskStore, data.ViewStream]:
    """Network, masks and stream of a run of experiments.permuted, finished or not.

    Raises UsageError where there is none, or none of its tasks yet.
    """
    of_run = config.saved_config(run)
    dataset = config.load(of_run, args)
    net = config.dense_network(of_run, dataset)
    with ss.DiskStore.open(run / "tasks", net) as disk:
        if not len(disk):
            raise UsageError(f"--run {run} has saved no task yet")
        return net, disk.load(), config.views(of_run, dataset)


def random_store(
    net: ss.Network, num_tasks: int, learned: ss.MaskStore | None = None
) -> ss.MaskStore:
    """`num_tasks` masks: those of `learned` first, the others of independent bits.

    Each bit is as often 1 as in the learned masks, to a sixteenth; without these in half of all.
    To a network, another task's mask is little else.
    """
    if learned is not None and not int(learned.num_tasks):
        learned = None
    first = 0 if learned is None else min(num_tasks, int(learned.num_tasks))
    store = ss.MaskStore.create(net, num_tasks)
    tiles, num_words, lanes = store.bank.words.shape
    layout = net.layout
    half = layout.tree([jnp.full(shape, 0.5) for shape in layout.shapes.values()])
    mean = half if learned is None else learned.mixture()
    sixteenths = jnp.round(16 * layout.ravel(mean, "the mean"))
    # Words of the digits of each bit's frequency, the lowest first.
    sixteenths = jnp.minimum(sixteenths, 15).astype(jnp.int32)
    digits = [pack((sixteenths >> digit) & 1)[:, None] for digit in range(4)]

    @jax.jit
    def draw():
        def tile(i):
            key = jax.random.fold_in(jax.random.key(0), i)
            words = jnp.zeros((num_words, lanes), jnp.uint32)
            # A digit that is 1 makes of the chance so far (1 + p) / 2, one that is 0 makes p / 2.
            for n, digit in enumerate(digits if first else digits[-1:]):
                more = jax.random.bits(jax.random.fold_in(key, n), words.shape, jnp.uint32)
                words = (words & more) | (digit & (words | more))
            task = i * lanes + jnp.arange(lanes)
            return jnp.where((task < num_tasks)[None], words, 0)

        return jax.lax.map(tile, jnp.arange(tiles, dtype=jnp.int32))

    @functools.partial(jax.jit, donate_argnums=0)
    def with_learned(words, learned):
        def copy(i, words):
            mask = column(learned, i)[None, :, None]
            return jax.lax.dynamic_update_slice(words, mask, place(words, i))

        return jax.lax.fori_loop(jnp.int32(0), jnp.int32(first), copy, words)

    words = draw()
    if learned is not None:
        words = with_learned(words, learned.bank.words)
    return store.with_bank(arrays.holding(store.bank, words, num_tasks))
