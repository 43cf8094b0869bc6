"""What an installation needs: nothing undeclared, and nothing of an extra but where it is used."""

import ast
import configparser
import importlib
import re
import subprocess
import sys
from importlib import metadata

import pytest

from supsup_jax.extras import MissingExtraError, needed
from tests.conftest import ROOT

SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")


def declared(*extras):
    """The distributions that an installation with these extras asks for, by name."""
    lines = SETUP["options"]["install_requires"].splitlines()
    for extra in extras:
        lines += SETUP["options.extras_require"][extra].splitlines()
    found = set()
    for line in filter(None, lines):
        name = re.match(r"[\w.-]+", line)[0].lower().replace("_", "-")
        inner = re.match(r"supsup-jax\[([\w,]+)\]", line)
        found |= declared(*inner[1].split(",")) if inner else {name}
    return found


def imported(folder):
    """(module, the distributions that may bring it) of all that is imported from outside."""
    brought = metadata.packages_distributions()
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                top = name.partition(".")[0]
                if top in sys.stdlib_module_names | {"supsup_jax", "experiments", "tests"}:
                    continue
                dists = {dist.lower().replace("_", "-") for dist in brought.get(top, [top])}
                yield f"{path.relative_to(ROOT)}: {name}", dists


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("supsup_jax", ("imagenet", "experiments")),
        ("experiments", ("imagenet", "experiments")),
        ("tests", ("test",)),
    ],
)
def test_what_is_imported_is_declared(folder, extras):
    there = declared(*extras)
    undeclared = [where for where, dists in imported(folder) if not dists & there]
    # One file runs in an interpreter of the authors' code.
    assert not [where for where in undeclared if "authors.py" not in where]


# Runs where no package of an extra can be imported.
CORE_ALONE = """
import importlib, pathlib, pkgutil, sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *rest):
        return None if name.partition(".")[0] in HIDDEN else self.finder.find_spec(name, *rest)

HIDDEN = set("tensorflow_datasets importlib_resources array_record PIL sklearn grain tyro tqdm "
             "matplotlib chex pytest hypothesis".split())
sys.meta_path[:] = map(Hiding, sys.meta_path)
import jax, numpy as np
import supsup_jax as ss
for module in pkgutil.walk_packages(ss.__path__, "supsup_jax."):
    importlib.import_module(module.name)
assert not HIDDEN & sys.modules.keys()

from supsup_jax import cli, data, models
from supsup_jax.extras import MissingExtraError
out = pathlib.Path(sys.argv[1])
folder = out / "mnist" / "3.0.1"
folder.mkdir(parents=True)
(folder / "dataset_info.json").write_text('{"splits": [{"name": "train"}]}')
(folder / "mnist.array_record").touch()
for refused in (
    lambda: data.load_dataset("digits"),
    lambda: data.load_dataset("mnist", out),
    lambda: data.RecordStream("mnist", out, 2),
):
    try:
        refused()
    except MissingExtraError as error:
        print(error)
try:
    cli.main(["inspect", str(out)])
except SystemExit as error:
    assert error.code == 2

from flax import nnx
drawn = data.synthetic(jax.random.key(0), (6,), 4, 64, 32)
net = ss.Network.from_nnx(models.MLP((6, 8, 8), rngs=nnx.Rngs(0)))
net = ss.signed_constant(net, 0)
stream = data.PermutedStream(drawn, 2)
store = ss.MaskStore.create(net, 2)
for task in range(2):
    config = ss.TrainConfig(steps=2, batch_size=8)
    store = store.append(ss.train_task(jax.random.key(task), net, stream.train[task], config).task)
x, y = stream.test[1].batch(np.arange(16))
belief = ss.one_shot(net, store, x)
assert ss.predict(net, store, x, belief.task).shape == (16, 8)

try:
    import experiments.permuted
except SystemExit as error:
    print(error)
"""


def test_the_core_runs_without_any_extra(tmp_path):
    command = [sys.executable, "-c", CORE_ALONE, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "sklearn is not installed; it comes with: pip install 'supsup-jax[data]'",
        "tensorflow_datasets is not installed; it comes with: pip install 'supsup-jax[data]'",
        "PIL is not installed; it comes with: pip install 'supsup-jax[data]'",
        "error: tyro is not installed; it comes with: pip install -e '.[experiments]'",
    ]
    assert done.stderr.strip() == (
        "error: tyro is not installed; it comes with: pip install 'supsup-jax[command]'"
    )


def test_other_failures_of_an_import_are_told_as_they_are():
    with pytest.raises(MissingExtraError, match=r"nowhere is.*\[data\]"), needed("data"):
        importlib.import_module("nowhere")
    with pytest.raises(ImportError, match="cannot import name") as error, needed("data"):
        from math import nothing  # noqa: F401
    assert not isinstance(error.value, MissingExtraError)
