"""What only an extra brings, and what is said where it is not installed."""

import contextlib
from collections.abc import Iterator


class MissingExtraError(ModuleNotFoundError):
    """A package that an extra of this library brings; the message holds the command."""


@contextlib.contextmanager
def needed(extra: str) -> Iterator[None]:
    """Around imports: raises MissingExtraError, which says how to get `extra`, where one fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{error.name} is not installed; it comes with: pip install 'supsup-jax[{extra}]'",
            name=error.name,
        ) from error
