"""What arguments are checked for everywhere, each refused in one sentence: wanted, got."""

from typing import Any

import jax
import numpy as np
from jax.core import Tracer


class WrongTypeError(TypeError, ValueError):
    """An argument of the wrong type. Also a ValueError, which a number out of range raises."""


def check_type(name: str, value: Any, wanted: type, what: str | None = None) -> None:
    """Raises TypeError unless `value` is a `wanted`; `what` names it where its name does not.

    A class may have a HINT: how to make one.
    """
    if not isinstance(value, wanted):
        article = "an" if (what or wanted.__name__)[0] in "AEIOUaeiou" else "a"
        raise WrongTypeError(
            f"{name} must be {article} {what or wanted.__name__}, got {type(value).__name__}"
            + getattr(wanted, "HINT", "")
        )


def check_int(name: str, value: Any, least: int) -> None:
    """Raises TypeError or ValueError unless `value` is an int of at least `least`; no bool is."""
    said = f"{name} must be an int of at least {least}, got {value!r}"
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise WrongTypeError(said)
    if value < least:
        raise ValueError(said)


def check_key(key: Any) -> None:
    """Raises TypeError unless `key` is an array, as random keys are."""
    if not hasattr(key, "dtype"):
        raise WrongTypeError(f"key must be a JAX random key, got {key!r}")


def cause(error: Exception) -> str:
    """What an error of others says, in a line."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def in_trace(*trees: Any) -> bool:
    """Whether this runs inside jit and the like, whatever was closed over."""
    return is_traced(trees) or isinstance(jax.device_put(np.int32(0)), Tracer)


def is_traced(tree: Any) -> bool:
    """Whether any leaf is a tracer: under jit and the like, where values cannot be looked at."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))
