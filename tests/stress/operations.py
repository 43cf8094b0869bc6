"""Operations on a store whose outcome follows from their numbers."""

import random

from supsup_jax.stores.journal import TaskLog
from supsup_jax.types import TaskIdError

FIRST = ("append", "append", "append", "replace", "remove", "compact")
REST = 5 * ("append",) + 2 * ("replace",) + 2 * ("remove",) + ("compact",)
HELD = [[]]


def payload(operation: int) -> bytes:
    """What the record that an operation writes must hold: follows from its number."""
    rng = random.Random(operation)
    return rng.randbytes(rng.choice((1, 60, 700, 5000, 40000)))


def operate(k: int, held: list[int | None], log: TaskLog | None = None) -> list[int | None]:
    """Operation k on the tasks of a store; returns which operation wrote each, None: removed."""
    rng, held = random.Random(f"operation {k}"), list(held)
    there = [i for i, operation in enumerate(held) if operation is not None]
    what = FIRST[k] if k < len(FIRST) else rng.choice(REST)
    i = rng.choice(there) if there and what != "append" else len(held)
    record = {"name": f"operation {k}"}, [payload(k)]
    if what == "compact":
        changed, call, arguments = held, "compact", ()
    elif i == len(held):
        changed, call, arguments = [*held, k], "append", record
    elif what == "replace":
        changed, call, arguments = [*held[:i], k, *held[i + 1 :]], "replace", (i, *record)
    else:
        changed, call, arguments = [*held[:i], None, *held[i + 1 :]], "remove", (i,)
    if log is not None:
        getattr(log, call)(*arguments)
    return changed


def held_after(count: int) -> list[int | None]:
    """What a store holds after so many operations."""
    while len(HELD) <= count:
        HELD.append(operate(len(HELD) - 1, HELD[-1]))
    return HELD[count]


def operate_all(log: TaskLog, start: int, end: int) -> None:
    for k in range(start, end):
        operate(k, held_after(k), log)


def read(log: TaskLog, i: int) -> int | None:
    """Which operation wrote task i, None: it was removed. Raises Wrong for what none wrote."""
    try:
        record = log.read(i)
    except TaskIdError:
        return None
    operation = int(record.metadata["name"].removeprefix("operation "))
    if record.body != payload(operation):
        raise Wrong(i)
    return operation


def pieces(operation: int) -> list[bytes]:
    """Of its record: its name, and some of its bytes, long enough to be found by no chance."""
    body = payload(operation)
    starts = {*range(0, len(body) - 16, 1 + len(body) // 8), len(body) - 16}
    return [b'"operation %d"' % operation] + [body[at : at + 16] for at in starts if at >= 0]


class Wrong(Exception):
    """A task's bytes are others, unnoticed."""
