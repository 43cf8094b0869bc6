"""The command `supsup`, as a user calls it."""

import csv
import io
import json

import numpy as np
import pytest
from flax import nnx
from PIL import Image

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


def damage(path, place):
    data = bytearray((path / "tasks.bin").read_bytes())
    data[place] ^= 1
    (path / "tasks.bin").write_bytes(data)


def test_work_goes_on_without_a_damaged_task(path, net, tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32))
    ask = ["predict", path, "--input", tmp_path / "x.npy"]
    cli.main(["export", str(path), "0", str(tmp_path / "zero.task")])
    damage(path, 50)
    told = fails(capsys, "verify", path, code=1)
    assert "the record of task 0" in told and "lost: task 0; the other 2 are whole" in told
    assert "lost: task 0" in fails(capsys, "repair", path, code=1)
    assert "go on with the others by --without 0" in fails(capsys, *ask)
    cli.main([*map(str, ask), "--without", "0"])
    answers = capsys.readouterr().out
    assert {row["task"] for row in csv.DictReader(io.StringIO(answers))} <= {"1", "2"}
    assert "is damaged" in fails(capsys, "export", path, "all", tmp_path / "all")
    cli.main(["export", str(path), "all", str(tmp_path / "copy"), "--without", "0"])
    cli.main(["verify", str(tmp_path / "copy")])
    assert "2 tasks, 0 problems, 0 of which lose data; 1 more" in capsys.readouterr().out
    cli.main(["predict", str(tmp_path / "copy"), *map(str, ask[2:])])
    assert capsys.readouterr().out == answers  # under the same numbers
    assert "--without 7 is no task" in fails(capsys, *ask, "--without", 7)
    assert "for the export of all tasks" in fails(
        capsys, "export", path, 1, tmp_path / "one", "--without", 0
    )
    cli.main(["replace", str(path), "0", str(tmp_path / "zero.task")])
    cli.main(["verify", str(path)])
    assert "3 tasks, 0 problems" in capsys.readouterr().out


def test_a_store_cut_short_counts_what_is_lost(path, net, capsys):
    """Records of removals that are cut off are nobody's loss, and no number is given twice."""
    with ss.DiskStore.open(path, net, "a") as disk:
        extra = disk.append(disk.task(0))
        disk.remove(1)
    size = (path / "tasks.bin").stat().st_size
    with ss.DiskStore.open(path, net) as disk:
        start = disk._log.entry(extra).offset
    with open(path / "tasks.bin", "r+b") as file:
        file.truncate(start + 10)
    assert start + 10 < size
    told = fails(capsys, "verify", path, code=1)
    assert f"lost: task {extra}; the other 2 are whole" in told
    assert f"gave up task {extra}" in fails(capsys, "repair", path, code=1)
    cli.main(["verify", str(path)])
    assert "2 tasks, 0 problems" in capsys.readouterr().out
    with ss.DiskStore.open(path, net, "a") as disk:
        assert disk.ids.tolist() == [0, 2]
        assert disk.append(disk.task(0)) == extra + 1


def test_tasks_by_name(path, tmp_path, capsys):
    cli.main(["find", str(path), "task ?"])
    assert capsys.readouterr().out.splitlines()[1] == "     1  task 1  1a, 1b, 1c, 1d"
    assert fails(capsys, "find", path, "task", code=1) == ""
    assert "no task of" in fails(capsys, "export", path, "two", tmp_path / "two.task")
    cli.main(["export", str(path), "task 2", str(tmp_path / "two.task")])
    with ss.DiskStore.open(path) as disk:
        words = disk.words(2)
    assert "task 2 of" in fails(capsys, "replace", path, "0", tmp_path / "two.task")  # its name
    assert "task 2 of" in fails(capsys, "import", path, tmp_path / "two.task")
    cli.main(["replace", str(path), "0", str(tmp_path / "two.task"), "--name", "former 2"])
    cli.main(["import", str(path), str(tmp_path / "two.task"), "--name", "again"])
    cli.main(["remove", str(path), "task 2"])
    cli.main(["replace", str(path), "former 2", str(tmp_path / "two.task")])
    with ss.DiskStore.open(path) as disk:
        assert [disk.info(i).name for i in disk.ids] == ["task 2", "task 1", "again"]
        for i in (0, 3):
            np.testing.assert_array_equal(disk.words(i), words)
    said = "replaced task 0\ntask 3\nremoved task 2\nreplaced task 0\n"
    assert capsys.readouterr().out == said


def test_one_file_is_looked_at_and_becomes_a_folder(path, net, tmp_path, capsys):
    masks = random_masks(net, 2)
    filled_store(net, masks).save(tmp_path / "masks.npz")
    cli.main(["inspect", str(tmp_path / "masks.npz")])
    out = capsys.readouterr().out
    assert "2 tasks of one network in one file" in out and "signed_constant, seed 3" in out
    assert f"supsup import FOLDER {tmp_path / 'masks.npz'}" in out
    named = "import", tmp_path / "folder", tmp_path / "masks.npz", "--name", "one"
    assert "--name is for a file of one task" in fails(capsys, *named)
    cli.main(["import", str(tmp_path / "folder"), str(tmp_path / "masks.npz")])
    assert capsys.readouterr().out == "tasks 0 to 1\n"
    with ss.DiskStore.open(tmp_path / "folder", net) as disk:
        np.testing.assert_array_equal(
            disk.task(1).mask["layer0"]["kernel"], masks[1]["layer0"]["kernel"]
        )
    cli.main(["export", str(path), "1", str(tmp_path / "one.task")])
    cli.main(["inspect", str(tmp_path / "one.task")])
    assert "one task, 'task 1', labels: 1a, 1b, 1c, 1d" in capsys.readouterr().out
    assert "is a file, and a store is a folder" in fails(capsys, "verify", tmp_path / "masks.npz")


def test_names_and_labels_are_checked_where_they_are_given(path, net):
    (mask,) = random_masks(net, 1, seed=9)
    with ss.DiskStore.open(path, net, mode="a") as disk:
        with pytest.raises(ValueError, match=r"task 1 of .* is called 'task 1': replace that one"):
            disk.append(mask, name="task 1")
        with pytest.raises(ValueError, match="labels must differ, got 'a' more than once"):
            disk.append(mask, labels=["a", "b", "a"])
        for many in ({"labels": [str(i) for i in range(6)]}, {"num_labels": 6}):
            with pytest.raises(ValueError, match="at most 5, the network's outputs, got 6"):
                disk.append(mask, **many)
        disk.replace(1, mask, name="task 1", labels=["a", "", "", "b", ""])
        assert disk.append(mask, name="new") == 3
        with pytest.raises(ValueError, match="called 'new'"):
            disk.replace(0, mask, name="new")


def test_a_name_of_digits_is_no_number(path, net, tmp_path, capsys):
    with ss.DiskStore.open(path, net, mode="a") as disk:
        for name in ("1", "77", "a[1]"):
            disk.append(random_masks(net, 1)[0], name=name)
    told = fails(capsys, "remove", path, "77", "1")  # neither goes
    assert "1 is a task's number and the name of task 3: write 01" in told
    cli.main(["remove", str(path), "77", "01"])
    assert capsys.readouterr().out == "removed task 4\nremoved task 1\n"
    assert "1 is a task's number and" in fails(capsys, "remove", path, "1")  # for ever
    assert "task 1 was removed" in fails(capsys, "remove", path, "3", "01")  # and 3 is there
    assert f"task {10**20} is not in" in fails(capsys, "remove", path, "3", 10**20)
    cli.main(["remove", str(path), "3"])
    assert capsys.readouterr().out == "removed task 3\n"
    cli.main(["find", str(path), "a[1]"])
    assert capsys.readouterr().out == "     5  a[1]\n"
    damage(path, 200)
    cli.main(["find", str(path), "task ?"])
    assert capsys.readouterr().out.splitlines()[0] == "     0  task 0  (damaged)"


def test_repair_says_by_its_exit_code_what_it_set_aside(path, capsys):
    damage(path, 40)
    with open(path / "index.bin", "r+b") as file:
        file.truncate(0)
    assert "with whole records among them" in fails(capsys, "repair", path, code=1)
    with ss.DiskStore.open(path) as disk:
        assert (disk.ids.tolist(), len(disk)) == ([], 3)


def test_version(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out.startswith(f"supsup_jax {ss.__version__}, jax ")


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
    labels = ss.predict(net, store, x, tasks)[:, :4].argmax(-1)  # of five outputs four are named
    assert [int(row["task"]) for row in rows] == list(tasks)
    assert [int(row["label"]) for row in rows] == list(labels)
    for row, task, label in zip(rows, tasks, labels, strict=True):
        assert row["task_name"] == f"task {task}"
        assert row["label_name"] == f"{task}{'abcd'[label]}"


def answers(capsys, *argv):
    cli.main([*map(str, argv), "--format", "jsonl"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_predict_by_rule_and_known_task(path, net, tmp_path, capsys):
    x = np.random.default_rng(0).normal(size=(150, 6)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x)
    ask = ["predict", path, "--input", tmp_path / "x.npz"]
    store = filled_store(net, random_masks(net, 3))
    rows = answers(capsys, *ask, "--rule", "oracle", "--objective", "max_logit", "--scores")
    want = ss.oracle(net, store, x, ss.MaxLogit(4))
    assert [row["task"] for row in rows] == list(want.task)
    np.testing.assert_allclose(
        [[row["scores"][str(i)] for i in range(3)] for row in rows], want.scores[:, :3], rtol=1e-5
    )
    rows = answers(capsys, *ask, "--task", "task 1")
    assert {row["task"] for row in rows} == {1}
    logits = ss.predict(net, store, x, np.ones(150, int))
    assert [row["label"] for row in rows] == list(logits[:, :4].argmax(-1))
    with ss.DiskStore.open(path, net, mode="a") as disk:  # a label without a name never wins
        disk.replace(1, random_masks(net, 3)[1], name="task 1", labels=["", "b", "", "d"])
    rows = answers(capsys, *ask, "--task", "1")
    assert [row["label"] for row in rows] == list(2 * logits[:, 1:4:2].argmax(-1) + 1)
    assert {row["label_name"] for row in rows} == {"b", "d"}
    # G needs to know how many outputs are labels; here all tasks name four.
    rows = answers(capsys, *ask, "--objective", "superfluous")
    want = ss.one_shot(net, store, x, ss.Superfluous(4)).task
    assert [row["task"] for row in rows] == list(want)
    told = fails(capsys, *ask, "--standardised", "--rule", "oracle")
    assert "needs the mean and deviation" in told


def test_predict_refuses_what_it_does_not_know(path, net, tmp_path, capsys):
    x = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    ask = ["predict", path, "--input", tmp_path / "x.npy"]
    rows = answers(capsys, *ask, "--reject", 0.25, "--calibrate", tmp_path / "x.npy")
    belief = ss.one_shot(net, filled_store(net, random_masks(net, 3), capacity=3), x)
    want = ss.rejection.reject(belief, ss.rejection.calibrate(belief, 0.25)).task
    assert [-1 if row["task"] is None else row["task"] for row in rows] == list(want)
    assert {row["label"] for row in rows if row["task"] is None} == {None}
    assert "pass both or neither" in fails(capsys, *ask, "--reject", 0.25)
    told = fails(capsys, *ask, "--reject", 0.1, "--calibrate", tmp_path / "x.npy", "--together")
    assert "rows one by one" in told


def test_predict_reads_images(path, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 2, 3), np.uint8)
    np.save(tmp_path / "x.npy", pixels.reshape(4, 6))
    (tmp_path / "images").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "images" / f"{i}.png")
    ask = ["predict", path, "--mean", 0.5, "--std", 0.25, "--scores", "--input"]
    want = answers(capsys, *ask, tmp_path / "x.npy")
    got = answers(capsys, *ask, tmp_path / "images")
    assert [row.pop("file") for row in got] == [
        str(tmp_path / "images" / f"{i}.png") for i in range(4)
    ]
    assert got == want
    Image.fromarray(257 * pixels[0].astype(np.uint16)).save(tmp_path / "16.png")
    (sixteen,) = answers(capsys, *ask, tmp_path / "16.png")
    assert sixteen | {"file": None} == want[0] | {"file": None}
    # A plain map, which Pillow opens as of 32 bits.
    big = (257 * pixels[0].astype(np.uint16)).astype(">u2").tobytes()
    (tmp_path / "16.pgm").write_bytes(b"P5 3 2 65535\n" + big)
    (map_,) = answers(capsys, *ask, tmp_path / "16.pgm")
    assert map_ | {"file": None} == want[0] | {"file": None}
    told = fails(capsys, *ask, tmp_path / "images" / "0.png", tmp_path / "16.png")
    assert "(2, 3) uint8" in told and "(2, 3) float32" in told
    Image.fromarray(np.zeros((2, 3), np.int32)).save(tmp_path / "32.tif")
    assert "has pixels of 32 bits" in fails(capsys, *ask, tmp_path / "32.tif")
    Image.fromarray(np.zeros((3, 3), np.uint8)).save(tmp_path / "large.png")
    told = fails(capsys, *ask, tmp_path / "images" / "0.png", tmp_path / "large.png")
    assert "images must be of one size" in told
    assert "takes 6 numbers" in fails(capsys, *ask, tmp_path / "large.png")


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
        assert "no store at" in fails(capsys, command, tmp_path / "nothing")
        assert "is no store: the folder lacks manifest.json" in fails(capsys, command, tmp_path)
    assert "no file at" in fails(capsys, "import", path, tmp_path / "nothing")
    cli.main(["export", str(path), "0", str(tmp_path / "zero.task")])
    assert "no store at" in fails(capsys, "import", tmp_path / "nothing", tmp_path / "zero.task")
    np.save(tmp_path / "flat.npy", np.ones(3))
    (tmp_path / "text.npy").write_text("hello")
    np.save(tmp_path / "objects.npy", np.array([{}, {}]), allow_pickle=True)
    np.save(tmp_path / "whole.npy", np.ones((3, 6), np.int64))
    for name in ("flat", "text", "objects", "whole"):
        assert "--input" in fails(capsys, "predict", path, "--input", tmp_path / f"{name}.npy")
    np.savez(tmp_path / "x.npz", x=np.ones((3, 6), np.float32))
    data = (tmp_path / "x.npz").read_bytes()
    for damaged in (data[: len(data) // 2], data.replace(b"\x80?", b"\x80@", 1)):
        (tmp_path / "x.npz").write_bytes(damaged)
        told = fails(capsys, "predict", path, "--input", tmp_path / "x.npz")
        assert "is no file of NumPy arrays" in told
    for option, value in (("--std", 0), ("--std", "nan"), ("--mean", "inf")):
        told = fails(capsys, "predict", path, "--input", tmp_path / "x.npz", option, value)
        assert "--mean must be finite and --std positive" in told
    for command in (["compact"], ["remove", "0"]):
        (tmp_path / "folder").mkdir(exist_ok=True)
        told = fails(capsys, command[0], tmp_path / "folder", *command[1:])
        assert "is no store: the folder lacks manifest.json" in told


def test_remove_and_compact(path, tmp_path, capsys):
    cli.main(["remove", str(path), "0", "2"])
    assert capsys.readouterr().out == "removed task 2\nremoved task 0\n"
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
