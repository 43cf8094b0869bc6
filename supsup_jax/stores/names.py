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

    def find(self, name: str) -> list[int]:
        """Ids of the tasks of that name, as far as their records can be read."""
        return [i for i, called in self._called() if called == name]

    @contextlib.contextmanager
    def giving(self, name: str | None, i: int | None = None) -> Iterator[None]:
        """While task i, or a new one, gets this name. Raises ValueError where another has it."""
        former, self._known = self._known, None  # where what follows fails, they are read again
        if name is not None:
            if former is None or i is not None:
                former = {called for j, called in self._called() if j != i}
            if name in former:
                raise ValueError(
                    f"name must be the task's own, and task {self.find(name)[0]} of "
                    f"{self._log.path} is called {name!r}: replace that one, or choose another name"
                )
        yield
        if i is None:
            if name is not None and former is not None:
                former.add(name)
            self._known = former

    def forget(self) -> None:
        """Has the names read again, when next needed."""
        self._known = None

    def _called(self):
        for i in self._log.ids:
            with contextlib.suppress(StoreError):
                if (name := self._log.metadata(i).get("name")) is not None:
                    yield i, name
