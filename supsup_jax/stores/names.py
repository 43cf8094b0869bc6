"""What people call the tasks of a folder: one name, one task."""

import contextlib
from collections.abc import Iterator, Sequence

from supsup_jax.stores.coded import check_names
from supsup_jax.stores.journal import TaskLog
from supsup_jax.types import StoreError


class Names:
    """Of the tasks in `log`. A writer reads them once, with the first name that is given."""

    def __init__(self, log: TaskLog):
        self._log = log
        self._known: dict[str, int] | None = None

    @contextlib.contextmanager
    def giving(self, names: Sequence[str | None], i: int | None = None) -> Iterator[None]:
        """While task i, or as many new ones, get these names.

        Raises TypeError for what is no name, ValueError for one that another has.
        """
        for name in names:
            check_names(name, None)
        former, self._known = self._known, None  # where what follows fails, they are read again
        if any(name is not None for name in names):
            if former is None or i is not None:
                former = {called: j for j, called in self.called() if j != i}
            for task, name in enumerate(names, len(self._log) if i is None else i):
                if name is not None and (other := former.setdefault(name, task)) != task:
                    raise ValueError(
                        f"name must be the task's own, and task {other} of {self._log.path} is "
                        f"called {name!r}: replace that one, or choose another name"
                    )
        yield
        if i is None:
            self._known = former

    def called(self) -> Iterator[tuple[int, str]]:
        """Ids and names, as far as records can be read."""
        for i in self._log.ids:
            with contextlib.suppress(StoreError):
                if isinstance(name := self._log.metadata(i).get("name"), str):
                    yield i, name
