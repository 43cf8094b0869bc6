"""docs/deployment.md, as it is printed: its programs answer where there is nothing but JAX."""

import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax import export

import supsup_jax as ss
from tests.conftest import ROOT, random_masks

pytest.importorskip("flatbuffers", reason="jax.export writes with it: the extra `export`")

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "deployment.md").read_text(), re.S)
SERVED = "answer.bin", "answer_with.bin"  # by a block that has no library
ONLY_JAX = """
import sys
assert not {"supsup_jax", "flax", "optax"} & set(sys.modules)
np.savez("got.npz", task, logits)
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Where the blocks that need the library have run, in their order; and what they named."""
    folder, names = tmp_path_factory.mktemp("deployed"), {}
    before = os.getcwd()
    os.chdir(folder)
    try:
        for block in BLOCKS:
            if "export.deserialize" not in block:
                exec(block, names)
    finally:
        os.chdir(before)
    return folder, names["net"], names["store"]


@pytest.mark.parametrize("file", SERVED)
def test_answers_where_there_is_only_jax(page, file):
    folder, net, store = page
    (block,) = (block for block in BLOCKS if "export.deserialize" in block and f'"{file}"' in block)
    rows = int(re.search(r"np\.zeros\(\((\d+), 784\)", block)[1])
    x = np.random.default_rng(0).normal(size=(rows, 784)).astype(np.float32)
    np.save(folder / "x.npy", x)
    code = re.sub(r"np\.zeros\(.*?np\.float32\)", 'np.load("x.npy")', block) + ONLY_JAX
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    task, logits = np.load(folder / "got.npz").values()
    want = ss.one_shot(net, store, x).task
    np.testing.assert_array_equal(task, want)
    np.testing.assert_allclose(logits, ss.predict(net, store, x, want), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "rule",
    [ss.one_shot, ss.oracle, ss.binary_search, ss.Rule("rerank", best=2)],
    ids=["one_shot", "oracle", "binary_search", "rerank"],
)
def test_one_program_of_a_rule_for_batches_of_any_size(page, rule):
    _, net, store = page

    def answer(x):
        belief = rule(net, store, x)
        return belief, ss.predict(net, store, x, belief.task)

    shape = jax.ShapeDtypeStruct(export.symbolic_shape("b, 784"), np.float32)
    call = export.export(jax.jit(answer))(shape).call
    for rows in (1, 40):  # fewer than a segment of `predict`, and more
        x = np.random.default_rng(rows).normal(size=(rows, 784)).astype(np.float32)
        got, want = call(x), answer(x)
        np.testing.assert_array_equal(got[0].task, want[0].task)
        np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-6)


def test_a_program_serves_stores_to_come(page):
    folder, net, store = page
    more = store.append(random_masks(net, 1, seed=3)[0])
    x = np.random.default_rng(0).normal(size=(5, 784)).astype(np.float32)
    call = export.deserialize((folder / "answer_with.bin").read_bytes()).call
    for held in (store, more):
        task, _ = call(jax.tree.leaves((net, held)), x)
        np.testing.assert_array_equal(task, ss.one_shot(net, held, x).task)
