"""Every relative link of README and docs leads somewhere, to the heading that it names."""

import itertools
import json
import re

import pytest

from tests.conftest import ROOT

DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb")])


def prose(path):
    """The Markdown of a page, without code."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells)
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"^    .*$", "", text, flags=re.MULTILINE)


def links(path):
    return re.findall(r"\]\(([^()\s]+)\)", re.sub(r"`[^`\n]*`", "code", prose(path)))


def anchors(path):
    """Ids of headings, as GitHub and the site both make them, and of names in the reference."""
    heads = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    words = [re.sub(r"[^\w\s-]", "", head.replace("`", "").lower()).strip() for head in heads]
    names = re.findall(r"^::: (\S+)", prose(path), re.MULTILINE)
    return {re.sub(r"\s", "-", word) for word in words} | set(names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    broken = []
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(link)
        elif DOCS in page.parents and DOCS not in path.parents:
            broken.append(f"{link} leaves the site")
    assert broken == []


def test_what_links_are_found():
    """The check itself: it sees links and images, and none in code."""
    found = set(itertools.chain(*map(links, PAGES)))
    assert "docs/results/index.md#hopsupsup" in found
    assert "pictures/idea_masks.png" in found
    assert not [link for link in found if "`" in link]


def test_every_wing_the_readme_names_is_there():
    rows = re.findall(r"^\| (`.*?) \| ", (ROOT / "README.md").read_text(), re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`(\w+)/?`", row)]
    names = [name for name in names if name not in ("supsup_jax",)]
    assert "kernels" in names
    for name in names:
        path = ROOT / "supsup_jax" / name
        assert path.is_dir() or path.with_suffix(".py").is_file(), name
