"""The command `supsup`: looks at a store on disk, mends it, moves tasks, and asks it.

    supsup inspect STORE                    what is in it; or in a file of this library
    supsup find STORE NAME                  the tasks of that name, or pattern
    supsup verify STORE                     every checksum, and which tasks are lost
    supsup repair STORE                     after a crash, or damage
    supsup export STORE TASK FILE           one task for a colleague
    supsup export STORE all FOLDER          a copy, --without what is damaged
    supsup import STORE FILE                and back into a store of the same network
    supsup replace STORE TASK FILE          in the place of another
    supsup remove STORE TASK [TASK ...]     for good: no bit of them remains
    supsup compact STORE                    gives back the bytes that they took
    supsup predict STORE --input x.npy      the task and the label of each row
    supsup --version

TASK is a number, or the name of a task. Exit code 0; 1 where `verify` finds anything, `repair` a
loss or `find` no task; 2 for wrong arguments or an unusable store.
"""

import contextlib
import os
import sys
from collections.abc import Iterator

import jax

from supsup_jax.command.asking import predict
from supsup_jax.command.changing import compact, export, import_, remove, repair, replace
from supsup_jax.command.looking import find, inspect, verify
from supsup_jax.extras import MissingExtraError, needed
from supsup_jax.version import __version__

_COMMANDS = (inspect, find, verify, repair, export, replace, remove, compact, predict)


def main(argv: list[str] | None = None) -> None:
    """The console script."""
    with _one_line_errors():
        if (sys.argv[1:] if argv is None else argv) == ["--version"]:
            print(f"supsup_jax {__version__}, jax {jax.__version__}")
            return
        with needed("command"):
            import tyro
        app = tyro.extras.SubcommandApp()
        for command in _COMMANDS:
            app.command(command)
        app.command(name="import")(import_)
        app.cli(prog="supsup", description=__doc__, args=argv)


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:  # such as `supsup inspect STORE | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, TypeError, MissingExtraError) as error:
        print(f"error: {error}".replace("\n", " "), file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
