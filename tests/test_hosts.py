"""Two processes over gloo against one, and what a process says that finds no other."""

import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments.frame import hosts
from experiments.frame.run import UsageError
from tests import on_hosts
from tests.conftest import ROOT

pytestmark = pytest.mark.scripts


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def on_two(scene, folder):
    """Exit codes and what was said, of processes 0 and 1."""
    port = str(free_port())
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    argv = [sys.executable, "-m", "tests.on_hosts", scene]
    processes = [
        subprocess.Popen(
            [*argv, str(i), port, str(folder)],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for i in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in processes]
    return [process.returncode for process in processes], said


def test_a_store_over_two_processes(tmp_path):
    codes, said = on_two("store", tmp_path)
    assert codes == [0, 0], "\n".join(said)


def test_a_run_by_two_processes_ends_as_by_one(tmp_path):
    want = on_hosts.main(tmp_path / "alone")
    codes, said = on_two("whole", tmp_path)
    assert codes == [0, 0], "\n".join(said)
    got = json.loads((tmp_path / "run" / "result.json").read_text())
    assert got["rows"] == want["rows"]
    assert got["bytes"] == want["bytes"]
    for file in ("tasks.bin", "index.bin"):
        mine, alone = (tmp_path / name / "tasks" / file for name in ("run", "alone"))
        assert mine.read_bytes() == alone.read_bytes()
    mine, alone = (np.load(tmp_path / name / "inferred.npz")["counts"] for name in ("run", "alone"))
    np.testing.assert_array_equal(mine, alone)


def test_processes_that_see_other_folders_are_told(tmp_path):
    codes, said = on_two("alone", tmp_path)
    # Process 0 alone is sure to come to speak: when it ends, JAX ends the others.
    assert codes[0] == 2 and codes[1], "\n".join(said)
    assert "must lie on a file system that all processes see" in said[0]


@pytest.fixture
def initialize(monkeypatch):
    """Calls of jax.distributed.initialize, which are kept from happening."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: calls.append(options))
    for name in hosts.CLUSTER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return calls


def test_alone_nothing_is_joined(initialize):
    assert not hosts.join(hosts.Args())
    assert not hosts.join(hosts.Args("127.0.0.1:1", 1, 0))
    assert initialize == []


# As jax._src.clusters and jax._src.cloud_tpu_init have them.
@pytest.mark.parametrize(
    "name",
    ["SLURM_STEP_NODELIST", "OMPI_MCA_orte_hnp_uri", "TPU_WORKER_HOSTNAMES", "TPU_ML_PLATFORM"],
)
def test_a_cluster_says_who_is_who(initialize, monkeypatch, name):
    monkeypatch.setenv(name, "something")
    assert hosts.join(hosts.Args(coordinator_timeout=7))
    nothing = dict.fromkeys(("coordinator_address", "num_processes", "process_id"))
    assert initialize == [nothing | {"initialization_timeout": 7}]


def test_a_coordinator_that_does_not_answer_is_named(initialize):
    port = free_port()
    with pytest.raises(UsageError, match=f"coordinator 127.0.0.1:{port} did not answer within 1 s"):
        hosts.join(hosts.Args(f"127.0.0.1:{port}", 2, 1, coordinator_timeout=1))
    assert initialize == []


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (hosts.Args(num_processes=2), "go together"),
        (hosts.Args("somewhere", 2, 1), "HOST:PORT"),
        (hosts.Args("127.0.0.1:1", 2, 2, 1), r"--process-id must lie in \[0, 2\), got 2"),
    ],
)
def test_arguments_that_do_not_fit(initialize, args, said):
    with pytest.raises(UsageError, match=said):
        hosts.join(args)
    assert initialize == []


def test_a_method_that_cannot_be_shared_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(SystemExit, match="2"):
        on_hosts.main(tmp_path / "run", method="psp")
