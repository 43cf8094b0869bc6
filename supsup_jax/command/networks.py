"""The network that masks on disk belong to."""

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from supsup_jax.layout import dense_widths
from supsup_jax.network import SIGNED_CONSTANT, Network, signed_constant
from supsup_jax.stores.origin import read_manifest


def network_of(manifest: dict[str, Any], path: Path, named: str | None, kind: str) -> Network:
    """The network of the masks at `path`, by MODULE:FUNCTION or, of dense layers, by their shapes.

    kind: the format that the manifest must be of. Raises ValueError or TypeError.
    """
    from flax import nnx

    read_manifest(manifest, kind, path)
    found = _by_name(named) if named else _dense(manifest["layout"], path)
    if isinstance(found, nnx.Module):
        found = Network.from_nnx(found)
    if not isinstance(found, Network):
        raise TypeError(
            f"--net {named} must return a Network or module, got {type(found).__name__}"
        )
    if manifest["initializer"] == SIGNED_CONSTANT:
        found = signed_constant(found, manifest["seed"])
    return found


def _by_name(named):
    module, _, function = named.partition(":")
    if not function:
        raise ValueError(f"--net must be MODULE:FUNCTION, got {named!r}")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--net {named} cannot be had: {error}") from error
    if not callable(function):
        raise TypeError(
            f"--net {named} must be a function that returns the network, got the "
            f"{type(function).__name__} itself"
        )
    return function()


def _dense(layout, path):
    from flax import nnx

    from supsup_jax import models

    if not (widths := dense_widths(layout)):
        raise ValueError(
            f"{path} holds masks of {[name for name, _ in layout]}, which is no MLP of this "
            "library: name the network with --net MODULE:FUNCTION"
        )
    return models.MLP(widths, rngs=nnx.Rngs(0))
