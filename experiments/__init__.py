"""Scripts, run from a clone: one a figure or a benchmark."""

import importlib.util

_NEEDED = ("tyro", "tqdm", "matplotlib", "orbax", "tensorflow_datasets", "sklearn")

if _missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
    raise SystemExit(
        f"error: {_missing[0]} is not installed; it comes with: pip install -e '.[experiments]'"
    )
