"""What holds for every script of runs: a test class, which each script's tests begin from."""

import csv
import json
from typing import ClassVar

import numpy as np
import pytest

import supsup_jax as ss
from experiments.frame import loop, rows

MATRICES = "accuracy.png matrix.png tasks"


def main(module, out, **args):
    """A tiny run of a script's."""
    return loop.main(module.EXPERIMENT, module.Args(tiny=True, out=out, **args))


def error_of(module, argv, capsys):
    """The one line on which a script ends with exit code 2."""
    with pytest.raises(SystemExit) as exit_:
        loop.cli(module.EXPERIMENT, module.Args, argv, "")
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def interrupt(monkeypatch, module, function, number):
    """Interrupts the `number`th call of a function; returns the list of its calls."""
    original, calls = getattr(module, function), []

    def wrapped(*args, **options):
        calls.append(args)
        if len(calls) == number:
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(module, function, wrapped)
    return calls


def assert_same_files(out, want, names):
    for name in names.split():
        if not name.endswith(".npz"):
            assert (out / name).read_bytes() == (want / name).read_bytes()
            continue
        with np.load(out / name) as a, np.load(want / name) as b:
            assert a.files == b.files
            for field in set(a.files) - {"manifest"}:
                np.testing.assert_array_equal(a[field], b[field])


class EveryRun:
    """The tests of a script's tiny run, made once; a subclass says what is the script's own.

    module: the script.
    learned: tasks_learned of its rows.
    files: it writes, beside those of every run.
    trains: module and name of the function that learns, of which call `cut` is interrupted; after
      that there are `calls` in all, since what was saved is not learned again.
    kept: files that a resumed run must have alike.
    above: what the best row's accuracy must be, where guessing gives far less.
    changed: an option that makes it another run, and what is said then.
    """

    module: ClassVar
    learned: ClassVar[list[int]]
    files: ClassVar[str]
    trains: ClassVar = (ss, "train_tasks")
    cut: ClassVar[int]
    calls: ClassVar[int]
    kept: ClassVar[str]
    above: ClassVar = 0.5
    changed: ClassVar = ("--seed 2", "seed is 0 there, 2 here")

    @pytest.fixture(scope="class")
    @classmethod
    def finished(cls, tmp_path_factory):
        """The result and the folder of the tiny run."""
        out = tmp_path_factory.mktemp("runs") / "tiny"
        return main(cls.module, out), out

    def test_a_run_writes_what_it_promises(self, finished):
        result, out = finished
        assert json.loads((out / "result.json").read_text()) == result
        every = {"accuracy.csv", "progress.json", "result.json"}
        assert {path.name for path in out.iterdir()} == every | set(self.files.split())
        fields = "schema config experiment seed seconds bytes versions device metrics rows"
        assert set(fields.split()) <= set(result)
        assert [row["tasks_learned"] for row in result["rows"]] == self.learned
        for row in result["rows"]:
            given = row["protocol"] == "given"
            assert row["method"] == result["config"]["method"]
            assert row["scenario"] in ("gg", "gns", "gnu", "nns")
            assert given == (row["task_accuracy"] is None) == (row["objective"] is None)
            assert (row["scenario"] == "gg") <= given
            assert 0 <= row["accuracy"] <= 1
        assert max(row["accuracy"] for row in result["rows"]) > self.above

    def test_the_csv_means_what_the_result_says(self, finished):
        result, out = finished
        with open(out / "accuracy.csv", newline="") as file:
            lines = list(csv.DictReader(file))
        for row in result["rows"]:
            mine = [
                float(line["accuracy"])
                for line in lines
                if all(line[field] == str(row[field] or "") for field in rows.SERIES)
                and int(line["tasks_learned"]) == row["tasks_learned"]
            ]
            assert len(mine) == row["tasks_learned"]
            assert np.mean(mine) == pytest.approx(row["accuracy"])
        assert len(lines) == sum(row["tasks_learned"] for row in result["rows"])

    def killed(self, out, whole):
        """What else a kill may leave, of an interrupted run in `out` that was to be as `whole`."""

    def test_an_interrupted_run_resumes_to_the_same_result(self, finished, tmp_path, monkeypatch):
        want, whole = finished
        out = tmp_path / "run"
        calls = interrupt(monkeypatch, *self.trains, self.cut)
        with pytest.raises(KeyboardInterrupt):
            main(self.module, out)
        assert not (out / "result.json").exists()
        self.killed(out, whole)
        got = main(self.module, out, resume=True)
        assert len(calls) == self.calls
        differing = {field for field in want if got[field] != want[field]}
        assert differing <= {"seconds"}
        assert_same_files(out, whole, self.kept)
        assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}

    def test_a_finished_run_is_shown_and_not_repeated(self, finished, capsys, monkeypatch):
        want, out = finished
        monkeypatch.setattr(loop, "learn", None)
        assert main(self.module, out, resume=True) == want
        shown = capsys.readouterr().out
        assert "is finished" in shown
        assert all(row["protocol"] in shown for row in want["rows"])

    def test_another_run_in_the_folder_is_left_alone(self, finished, capsys):
        _, out = finished
        before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
        here = ["--tiny", "--out", str(out)]
        assert "pass --resume to continue it" in error_of(self.module, here, capsys)
        other = error_of(self.module, [*here, "--seed", "1", "--resume"], capsys)
        assert "holds a run with another config" in other
        assert "seed is 0 there, 1 here" in other
        options, message = self.changed
        assert message in error_of(self.module, [*here, *options.split(), "--resume"], capsys)
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
