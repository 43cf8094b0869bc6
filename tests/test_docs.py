"""README and docs: their blocks run as printed, in order; the reference misses no public name."""

import ast
import inspect
import json
import re

import numpy as np
import pytest

import supsup_jax as ss
from supsup_jax import baselines, data, models
from tests.conftest import ROOT

DOCS = ROOT / "docs"
REFERENCE = sorted((DOCS / "api").glob("*.md"))
ELSEWHERE = "deployment"  # tests/test_deployment runs its blocks, some where there is JAX only
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *REFERENCE]
PAGES = [page for page in PAGES if page.stem != ELSEWHERE]
TUTORIALS = sorted((DOCS / "tutorials").glob("*.py"))


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def run(code, names):
    """Runs a block. Of an expression with `# -> text` behind it, text is what repr must give."""
    lines = code.splitlines()
    for node in ast.parse(code).body:
        told = lines[node.end_lineno - 1][node.end_col_offset :].partition("# -> ")[2]
        if isinstance(node, ast.Expr) and told:
            got = eval(compile(ast.Expression(node.value), "page", "eval"), names)
            assert repr(got) == told, ast.unparse(node)
        else:
            exec(compile(ast.Module([node], []), "page", "exec"), names)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda p: p.stem)
def test_blocks_run_as_printed(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in blocks(page):
        run(code, names)
    if page.stem == "README":
        assert np.mean(names["belief"].task == -1) > 0.5
        assert np.mean(names["logits"].argmax(-1) == names["labels"]) > 0.5  # 1 / 10 is chance
        assert [name for name in ("tasks", "masks.supsup") if not (tmp_path / name).exists()] == []
    if page.stem == "networks":
        assert names["belief"].scores.shape == (256, 64)
        assert names["store"].num_labels[:2].tolist() == [4, 3]


def public():
    """Names below `supsup_jax`, with a dot where they are reached by topic."""
    for name in ss.__all__:
        if not inspect.ismodule(module := getattr(ss, name)):
            yield name
            continue
        own = _own(module)
        yield from (f"{name}.{each}" for each in own if each not in ss.__all__)
    for module in (baselines, data, models):
        yield from (
            f"{module.__name__.removeprefix('supsup_jax.')}.{each}" for each in _own(module)
        )


def _own(module):
    """Names of a topic: those it lists, or else its public functions and classes."""
    if hasattr(module, "__all__"):
        return module.__all__
    members = inspect.getmembers(module, lambda one: inspect.isclass(one) or callable(one))
    return [
        name
        for name, one in members
        if name[0] != "_" and getattr(one, "__module__", None) == module.__name__
    ]


def documented(page):
    return re.findall(r"^::: supsup_jax\.(\S+)", page.read_text(), re.MULTILINE)


def test_the_reference_has_every_public_name_once():
    found = [name for page in REFERENCE for name in documented(page)]
    assert sorted({name for name in found if found.count(name) > 1}) == []
    assert sorted(set(public()) - set(found)) == []


@pytest.mark.parametrize("page", REFERENCE, ids=lambda page: page.stem)
def test_every_name_of_the_reference_has_an_example(page):
    code = "\n".join(blocks(page))
    topics = "losses", "objectives", "rejection", "stream", "hopfield"
    missing = [
        name
        for name in documented(page)
        if name not in topics and not re.search(rf"\b{name.rpartition('.')[2]}\b", code)
    ]
    assert missing == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@pytest.mark.parametrize("source", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_is_what_its_source_says(source):
    """Notebooks are made by docs/run_tutorials: after a change of the source, made again."""
    cells = json.loads(source.with_suffix(".ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    parts = re.split(r"^# %%.*\n", source.read_text(), flags=re.MULTILINE)
    kinds = re.findall(r"^# %%(.*)\n", source.read_text(), flags=re.MULTILINE)
    wanted = [
        part.strip("\n") for kind, part in zip(kinds, parts[1:], strict=True) if "[m" not in kind
    ]
    assert code == wanted
    outputs = [out for cell in cells for out in cell.get("outputs", ())]
    assert outputs
    assert not [out for out in outputs if out["output_type"] == "error"]
    assert source.with_suffix(".ipynb").stat().st_size < 300_000
    assert str(ROOT) not in source.with_suffix(".ipynb").read_text()
