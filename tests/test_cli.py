"""The command `supsup`, as a user calls it."""

import csv
import io
import json

import numpy as np
import pytest
from flax import nnx

import supsup_jax as ss
from supsup_jax import cli, models
from tests.conftest import filled_store, random_masks, relu_net

SIZES = (6, 8, 5)


def dense_net(seed=3):
    return ss.signed_constant(ss.Network.from_nnx(models.MLP(SIZES, rngs=nnx.Rngs(0))), seed)


def other_net():
    """As `--net tests.test_cli:other_net` names it: its weights are drawn anew."""
    return relu_net((6, 6, 5), seed=9)


@pytest.fixture(scope="module")
def net():
    return dense_net()


@pytest.fixture
def path(tmp_path, net):
    path = tmp_path / "store"
    with ss.DiskStore.open(path, net, mode="x") as disk:
        for i, mask in enumerate(random_masks(net, 3)):
            disk.append(mask, name=f"task {i}", labels=[f"{i}{c}" for c in "abcd"])
    return path


def fails(capsys, *argv, code=2):
    with pytest.raises(SystemExit) as error:
        cli.main([str(arg) for arg in argv])
    assert error.value.code == code
    return "".join(capsys.readouterr())


def test_inspect(path, net, capsys, tmp_path):
    ss.DiskStore.open(tmp_path / "empty", net, mode="x").close()
    cli.main(["inspect", str(tmp_path / "empty")])
    assert "0 tasks" in capsys.readouterr().out
    cli.main(["inspect", str(path), "--tasks", "2", "--picture", str(tmp_path / "overlap.png")])
    out = capsys.readouterr().out
    assert "3 tasks of one network" in out
    assert net.fingerprint in out
    assert "signed_constant, seed 3" in out
    assert "task 2" in out and "task 0" not in out
    assert "words        3 masks, 48 bytes" in out
    assert (tmp_path / "overlap.png").read_bytes().startswith(b"\x89PNG")


def test_verify_and_repair(path, capsys):
    cli.main(["verify", str(path)])
    assert "3 tasks, 0 problems" in capsys.readouterr().out
    with open(path / "tasks.bin", "ab") as file:
        file.write(b"half a record")
    assert "13 bytes of an unfinished record" in fails(capsys, "verify", path, code=1)
    cli.main(["repair", str(path)])
    assert capsys.readouterr().out.startswith("dropped 13 bytes behind task 2")
    cli.main(["repair", str(path)])
    assert capsys.readouterr().out == "nothing to mend\n"
    cli.main(["verify", str(path)])
    data = bytearray((path / "tasks.bin").read_bytes())
    data[50] ^= 1
    (path / "tasks.bin").write_bytes(data)
    assert "the record of task 0" in fails(capsys, "verify", path, code=1)


def test_export_and_import(path, net, tmp_path, capsys):
    other = tmp_path / "other"
    ss.DiskStore.open(other, net, mode="x").close()
    cli.main(["export", str(path), "1", str(tmp_path / "one.task")])
    cli.main(["import", str(other), str(tmp_path / "one.task")])
    assert capsys.readouterr().out == "task 0\n"
    with ss.DiskStore.open(other, net) as disk:
        assert disk.info(0).name == "task 1"
    stranger = tmp_path / "stranger"
    ss.DiskStore.open(stranger, dense_net(seed=4), mode="x").close()
    assert "of another network" in fails(capsys, "import", stranger, tmp_path / "one.task")
    assert "task 7 is not in" in fails(capsys, "export", path, 7, tmp_path / "seven.task")


@pytest.mark.parametrize("format", ["csv", "jsonl"])
@pytest.mark.parametrize("together", [False, True])
def test_predict(path, net, tmp_path, capsys, format, together):
    x = np.random.default_rng(0).normal(size=(150, 6)).astype(np.float32)  # more than one batch
    np.save(tmp_path / "x.npy", x)
    argv = ["predict", str(path), "--input", str(tmp_path / "x.npy"), "--format", format]
    cli.main(argv + ["--together"] * together)
    out = capsys.readouterr().out
    rows = (
        list(csv.DictReader(io.StringIO(out)))
        if format == "csv"
        else [json.loads(line) for line in out.splitlines()]
    )
    store = filled_store(net, random_masks(net, 3))
    task = ss.one_shot(net, store, x, per_example=not together).task
    tasks = np.broadcast_to(task, len(x))
    labels = ss.predict(net, store, x, tasks).argmax(-1)
    assert [int(row["task"]) for row in rows] == list(tasks)
    assert [int(row["label"]) for row in rows] == list(labels)
    for row, task, label in zip(rows, tasks, labels, strict=True):
        assert row["task_name"] == f"task {task}"
        # The tasks name four of five outputs.
        unnamed = "" if format == "csv" else None
        assert row["label_name"] == (f"{task}{'abcd'[label]}" if label < 4 else unnamed)


def test_predict_with_a_network_by_name(tmp_path, capsys):
    net = relu_net((6, 6, 5), seed=2)
    with ss.DiskStore.open(tmp_path / "store", net, mode="x") as disk:
        disk.append(random_masks(net, 1)[0])
    np.save(tmp_path / "x.npy", np.ones((3, 6), np.float32))
    argv = ["predict", tmp_path / "store", "--input", tmp_path / "x.npy"]
    assert "name the network with --net" in fails(capsys, *argv)
    cli.main([*map(str, argv), "--net", "tests.test_cli:other_net"])
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert "must be MODULE:FUNCTION" in fails(capsys, *argv, "--net", "tests.test_cli")
    assert "cannot be had" in fails(capsys, *argv, "--net", "tests.test_cli:nothing")


def test_bad_input(path, tmp_path, capsys):
    for command in ("inspect", "verify", "repair"):
        assert "manifest.json" in fails(capsys, command, tmp_path / "nothing")
    assert "no store at" in fails(capsys, "import", tmp_path / "nothing", tmp_path / "x")
    np.save(tmp_path / "flat.npy", np.ones(3))
    (tmp_path / "text.npy").write_text("hello")
    np.save(tmp_path / "objects.npy", np.array([{}, {}]), allow_pickle=True)
    for name in ("flat", "text", "objects"):
        assert "--input" in fails(capsys, "predict", path, "--input", tmp_path / f"{name}.npy")


def test_remove_and_compact(path, tmp_path, capsys):
    cli.main(["remove", str(path), "0", "2"])
    assert capsys.readouterr().out == "removed task 0\nremoved task 2\n"
    (path / "aside-7.bin").write_bytes(b"")
    assert "task 0 was removed" in fails(capsys, "remove", path, 0)
    assert "name the tasks to remove" in fails(capsys, "remove", path)
    cli.main(["inspect", str(path), "--picture", str(tmp_path / "overlap.png")])
    out = capsys.readouterr().out
    assert "1 tasks of one network; 2 more were removed" in out and "task 1" in out
    cli.main(["verify", str(path)])
    assert "1 tasks, 0 problems, 0 of which lose data; 2 more" in capsys.readouterr().out
    np.save(tmp_path / "x.npy", np.ones((1, 6), np.float32))
    cli.main(["predict", str(path), "--input", str(tmp_path / "x.npy")])
    assert "0,1,task 1," in capsys.readouterr().out
    size = sum(file.stat().st_size for file in path.iterdir())
    cli.main(["compact", str(path)])
    gone = size - sum(file.stat().st_size for file in path.iterdir())
    assert capsys.readouterr().out == f"gave back {gone:,} bytes\n" and gone > 0
    cli.main(["remove", str(path), "1"])
    assert f"not looked at: {path / 'aside-7.bin'}" in capsys.readouterr().out
    assert "holds no task" in fails(capsys, "predict", path, "--input", tmp_path / "x.npy")
    for command in ("remove", "compact"):
        assert "no store at" in fails(
            capsys, command, tmp_path / "new", *["1"] * (command[0] == "r")
        )
