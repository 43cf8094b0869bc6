"""Every public name says what it is."""

import functools
import importlib
import inspect
import pkgutil

import supsup_jax as ss


def public():
    """(name, object) of all modules, functions, classes, methods and properties."""
    for found in pkgutil.walk_packages(ss.__path__, "supsup_jax."):
        module = importlib.import_module(found.name)
        yield found.name, module
        for name, value in vars(module).items():
            own = getattr(value, "__module__", None) == found.name
            if name.startswith("_") or not own or not callable(value):
                continue
            yield f"{found.name}.{name}", value
            for inner, member in vars(value).items() if inspect.isclass(value) else ():
                if not inner.startswith("_") and (inspect.isroutine(member) or is_made(member)):
                    yield f"{found.name}.{name}.{inner}", getattr(value, inner)


def is_made(member):
    return isinstance(member, property | functools.cached_property | classmethod | staticmethod)


def test_every_public_name_has_a_docstring():
    """Of a method, that of what it overrides will do."""
    assert not [name for name, value in public() if not inspect.getdoc(value)]


def test_every_exported_name_is_documented_or_a_value():
    assert {name for name in ss.__all__ if not inspect.getdoc(getattr(ss, name))} == set()
