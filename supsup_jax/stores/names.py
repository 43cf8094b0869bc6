"""What people call the tasks of a folder: one name, one task."""

import contextlib
from collections.abc import Iterator

from supsup_jax.stores.journal import TaskLog
from supsup_jax.types import StoreError


class Names:
    """Of the tasks in `log`. A writer reads them once, with the first name that is given."""

    def __init__(self, log: TaskLog):
        self._log = log
        self._known: set[str] | None = None

    @contextlib.contextmanager
    def giving(self, name: str | None, i: int | None = None) -> Iterator[None]:
        """While task i, or a new one, gets this name. Raises ValueError where another has it."""
        former, self._known = self._known, None  # where what follows fails, they are read again
        if name is not None:
            if former is None or i is not None:
                former = {called for j, called in self.called() if j != i}
            if name in former:
                (other, *_) = (j for j, called in self.called() if called == name)
                raise ValueError(
                    f"name must be the task's own, and task {other} of "
                    f"{self._log.path} is called {name!r}: replace that one, or choose another name"
                )
        yield
        if i is None:
            if former is not None and name is not None:
                former.add(name)
            self._known = former

    def called(self) -> Iterator[tuple[int, str]]:
        """Ids and names, as far as records can be read."""
        for i in self._log.ids:
            with contextlib.suppress(StoreError):
                if (name := self._log.metadata(i).get("name")) is not None:
                    yield i, name
