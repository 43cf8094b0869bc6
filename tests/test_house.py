"""The direction of the house: who may import whom, and no circle."""

import ast

import pytest

from tests.conftest import ROOT

# From the ground up: a module imports from its own floor or a lower one, never from a higher one.
FLOORS = (
    ("types", "checks", "version", "extras", "prng", "objectives", "losses", "metrics", "loops"),
    ("layout", "devices"),
    ("roles",),
    ("masks", "network", "adapters", "labelled_views"),
    ("kernels",),
    ("stores",),
    ("inference",),
    ("training", "hopfield"),
    ("baselines", "data", "models", "command", "cli"),
    ("experiments",),
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def sources():
    for package in ("supsup_jax", "experiments"):
        for path in sorted((ROOT / package).rglob("*.py")):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room(module):
    """The floor's name of a module: supsup_jax.stores.disk -> stores."""
    parts = module.split(".")
    return parts[0] if parts[0] == "experiments" or len(parts) == 1 else parts[1]


def imported(module, modules):
    """Modules of the project that `module` imports at its top."""
    path = ROOT.joinpath(*module.split("."))
    tree = ast.parse(
        (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    )
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                yield whole if whole in modules else node.module
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def graph():
    modules = set(sources())
    return {
        module: sorted({other for other in imported(module, modules) if other in modules})
        for module in sorted(modules)
    }


def test_imports_go_down():
    for module, others in graph().items():
        for other in others:
            if "supsup_jax" in (module, other):  # the face, which shows what is inside
                assert module == "supsup_jax" or room(module) == "experiments", (module, other)
                continue
            assert FLOOR[room(other)] <= FLOOR[room(module)], f"{module} imports {other}"


def test_no_circle():
    edges, done = graph(), set()

    def visit(module, above):
        assert module not in above, " -> ".join([*above, module])
        if module in done:
            return
        for other in edges[module]:
            # A wing's own __init__ shows its rooms.
            if other != "supsup_jax" and not module.startswith(f"{other}."):
                visit(other, (*above, module))
        done.add(module)

    for module in edges:
        visit(module, ())


def test_every_room_has_a_floor():
    assert {room(module) for module in sources()} - {"supsup_jax"} == set(FLOOR)


@pytest.mark.parametrize("folder", ["supsup_jax", "experiments", "tests"])
def test_no_file_is_long(folder):
    for path in (ROOT / folder).rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 450, path
