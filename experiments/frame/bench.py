"""Side-by-side timing: on a shared machine only ratios within one run mean anything."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


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
