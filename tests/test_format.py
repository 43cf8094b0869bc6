"""docs/format.md against what is written: its example is run as it stands."""

import re
from pathlib import Path

import jax
import numpy as np

import supsup_jax as ss
from tests.conftest import random_masks

PAGE = Path(__file__).parent.parent / "docs" / "format.md"


def test_the_page_s_example_reads_the_masks(small_net, tmp_path, monkeypatch):
    expected = random_masks(small_net, 3)
    with ss.DiskStore.open(tmp_path / "store", small_net, mode="a") as disk:
        for mask in expected:
            disk.append(mask, labels=["a"])
        disk.replace(0, expected[2])
        disk.remove(1)
    section = PAGE.read_text().split("## Reading\n")[1].split("\n## ")[0]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec("\n".join(re.findall(r"^    (.*)$", section, re.MULTILINE)), names)
    assert sorted(names["masks"]) == [0, 1, 2] and names["masks"][1] is None
    for i in (0, 2):
        for got, want in zip(names["masks"][i], jax.tree.leaves(expected[2]), strict=True):
            np.testing.assert_array_equal(got, want)
