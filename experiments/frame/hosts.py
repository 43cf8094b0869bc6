"""One run by many processes: each learns its share of the tasks, and holds its share for inference.

    python -m experiments.permuted --out DIR --coordinator A:1234 --num-processes 2 --process-id 0
    python -m experiments.permuted --out DIR --coordinator A:1234 --num-processes 2 --process-id 1

All of them make the same calls in the same order, as JAX wants it; process 0 alone writes, to a
folder that all must see. docs/hosts.md has more.
"""

import contextlib
import dataclasses
import math
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from experiments.frame.run import UsageError, usage_errors

# Where one of these is set, jax.distributed knows by itself who is who: under srun, mpirun, and on
# a TPU VM, which jax marks by the last of them.
CLUSTER_VARIABLES = (
    "SLURM_STEP_NODELIST",
    "OMPI_MCA_orte_hnp_uri",
    "TPU_WORKER_HOSTNAMES",
    "TPU_ML_PLATFORM",
)


@dataclasses.dataclass(frozen=True)
class Args:
    """What a script takes that many processes can run together."""

    coordinator: str | None = None
    """HOST:PORT at which process 0 waits for the others; by default the cluster's (Slurm, Open MPI,
    TPU pods)."""
    num_processes: int | None = None
    """How many processes run this script together; by default as many as the cluster says, or 1."""
    process_id: int | None = None
    """Which of them this is, from 0; by default as the cluster says."""
    coordinator_timeout: int = 300
    """Seconds to wait for the other processes at the start."""


@contextlib.contextmanager
def joined(args: Args) -> Iterator[None]:
    """Joins the other processes, if there are others. To be entered before JAX starts."""
    with usage_errors():
        many = join(args)
    if not many:
        yield
        return
    try:
        yield
    except BaseException as error:
        # At once: by a plain exit it would wait for minutes for the others, who wait for it.
        code = 1
        if isinstance(error, SystemExit) and isinstance(error.code, int | None):
            code = error.code or 0
        else:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def join(args: Args) -> bool:
    """Whether others were joined. Raises UsageError where that cannot be."""
    given = {
        "coordinator_address": args.coordinator,
        "num_processes": args.num_processes,
        "process_id": args.process_id,
    }
    in_cluster = any(name in os.environ for name in CLUSTER_VARIABLES)
    if args.num_processes == 1 or not (in_cluster or any(v is not None for v in given.values())):
        return False
    if not in_cluster and None in given.values():
        raise UsageError(
            "--coordinator, --num-processes and --process-id go together where no cluster "
            f"says them, got {args.coordinator}, {args.num_processes} and {args.process_id}"
        )
    if args.process_id is not None and not 0 <= args.process_id < (args.num_processes or math.inf):
        raise UsageError(
            f"--process-id must lie in [0, {args.num_processes}), got {args.process_id}"
        )
    if args.coordinator is not None:
        host, port = _address(args.coordinator)
        if args.process_id:
            _wait_for(host, port, args.coordinator_timeout)
    if args.process_id == 0:
        print(f"process 0 waits for the others at {args.coordinator}", flush=True)
    jax.distributed.initialize(**given, initialization_timeout=args.coordinator_timeout)
    return True


def _address(coordinator):
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise UsageError(f"--coordinator must be HOST:PORT, got {coordinator!r}")
    return host.strip("[]"), int(port)


def _wait_for(host, port, seconds):
    """Until something listens there: JAX itself would end without a word that says where."""
    last, said = time.monotonic() + seconds, None
    while time.monotonic() < last:
        try:
            socket.create_connection((host, port), timeout=min(5, seconds)).close()
            return
        except OSError as error:
            said = error
            time.sleep(0.2)
    raise UsageError(
        f"the coordinator {host}:{port} did not answer within {seconds} s ({said}): is process 0 "
        "running there, and does a firewall let this host in?"
    )


def mesh() -> Mesh | None:
    """All devices along the axis `task`; None where there is one, or but the cores of one CPU."""
    if jax.process_count() == 1 and (jax.device_count() == 1 or jax.default_backend() == "cpu"):
        return None
    return jax.make_mesh((jax.device_count(),), ("task",))


def check_agreed(number: int, what: str) -> None:
    """Raises UsageError unless all processes bring the same number."""
    if jax.process_count() > 1:
        numbers = multihost_utils.process_allgather(np.int32(number)).tolist()
        if len(set(numbers)) > 1:
            raise UsageError(
                f"--out must lie on a file system that all processes see alike, but they find, "
                f"from process 0 on, {numbers} {what}"
            )


def check_shared(path: Path) -> None:
    """Raises UsageError unless all processes see the file that process 0 has written."""
    meet("the file is written")
    check_agreed(int(path.exists()), f"files {path}")


def meet(where: str) -> None:
    """Goes on when all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)
