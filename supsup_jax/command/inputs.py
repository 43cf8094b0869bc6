"""Rows to be asked about, from the files that people have."""

import math
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from supsup_jax.extras import needed
from supsup_jax.types import PyTree, shapes_of

ARRAYS = (".npy", ".npz")
SIXTEEN = ("I;16", "I;16B", "I;16L", "I;16N")  # Pillow's names of 16 bits a pixel


class Rows(NamedTuple):
    """x: [B, ...], an array or a dict of arrays; files: of each row, where each is an image."""

    x: PyTree
    files: list[str] | None = None


def read(paths: list[Path], widths: list[int] | None, mean: float = 0.0, std: float = 1.0) -> Rows:
    """The rows in a .npy or .npz file, or in images, one a file, or in a folder of images.

    widths: of the network, where it is a chain of dense layers: rows are then made flat, and images
      grey where that gives as many pixels as it has inputs.
    mean, std: pixels, in [0, 1], become (pixel - mean) / std; bytes are scaled to [0, 1] first.
    Raises ValueError for what holds no rows, for a dense network integers of no known scale, and
    for a mean or std that nothing can be scaled by; FileNotFoundError, MissingExtraError.
    """
    if not (math.isfinite(mean) and 0 < std < math.inf):
        raise ValueError(f"--mean must be finite and --std positive, got {mean} and {std}")
    arrays = [path for path in paths if path.suffix.lower() in ARRAYS]
    if arrays and len(paths) > 1:
        raise ValueError(f"--input takes one file of arrays, or images, got {len(paths)} files")
    x, files = (_arrays(arrays[0]), None) if arrays else _images(paths, widths)
    leaves = jax.tree.leaves(x)
    least = 1 if isinstance(x, dict) else 2
    if any(leaf.ndim < least or len(leaf) != len(leaves[0]) for leaf in leaves) or not len(
        leaves[0]
    ):
        raise ValueError(f"--input must hold rows [B, ...], got {shapes_of(x)}")

    for dtype in (leaf.dtype for leaf in leaves if widths):
        if np.issubdtype(dtype, np.integer) and dtype != np.uint8:
            raise ValueError(
                "--input must be floats, or bytes (uint8), which are scaled to [0, 1], for a dense "
                f"network, got {dtype}, whose scale nobody knows"
            )

    def scaled(leaf):
        if leaf.dtype == np.uint8:
            leaf = leaf.astype(np.float32) / 255
        if np.issubdtype(leaf.dtype, np.floating) and (mean, std) != (0, 1):
            leaf = (leaf.astype(np.float32) - mean) / std
        return leaf.reshape(len(leaf), -1) if widths else leaf

    return Rows(jax.tree.map(scaled, x), files)


def _arrays(path):
    try:
        with open(path, "rb") as file:  # NumPy would leave a damaged one open
            found = np.load(file, allow_pickle=False)
            if not isinstance(found, np.ndarray):
                found = {name: found[name] for name in found.files}
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"--input {path} is no file of NumPy arrays: {error}") from error
    if isinstance(found, dict) and len(found) == 1:
        return next(iter(found.values()))
    if not len(found):
        raise ValueError(f"--input {path} holds nothing")
    return found  # several arrays go to the network by their names


def _pixels(image, file, mode):
    """Bytes [H, W] or [H, W, 3]; of what has 16 bits a pixel, floats in [0, 1]."""
    if image.mode in ("I", "F") and not _sixteen(image):
        raise ValueError(
            f"--input {file} has pixels of 32 bits, whose scale nobody knows: save it with 8 or 16"
        )
    if not _sixteen(image):
        return np.asarray(image.convert(mode))
    pixels = np.asarray(image).astype(np.float32) / (2**16 - 1)  # `convert` would cut them at 255
    return pixels if mode == "L" else np.stack([pixels] * 3, axis=-1)


def _sixteen(image):
    # Of these formats, which have no more, Pillow calls some "I", as if they had 32.
    return image.mode in SIXTEEN or (image.mode == "I" and image.format in ("PNG", "PPM"))


def _images(paths, widths):
    with needed("data"):
        from PIL import Image, UnidentifiedImageError

    files = []
    for path in paths:
        inside = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else ()
        files += inside or [path]
    pixels = []
    for file in files:
        try:
            with Image.open(file) as image:
                size = image.width * image.height
                flat = widths and widths[0] == size
                grey = flat or (not widths and (image.mode in ("1", "L") or _sixteen(image)))
                pixels.append(_pixels(image, file, "L" if grey else "RGB"))
        except (UnidentifiedImageError, IsADirectoryError) as error:
            raise ValueError(
                f"--input {file} is neither a .npy or .npz file nor an image"
            ) from error
        first, last = (f"{each.shape} {each.dtype}" for each in (pixels[0], pixels[-1]))
        if first != last:
            raise ValueError(
                f"images must be of one size and kind: {files[0]} is {first}, {file} is {last}"
            )
        if widths and pixels[-1].size != widths[0]:
            raise ValueError(
                f"the network takes {widths[0]} numbers, and {file} has {image.width} x "
                f"{image.height} pixels"
            )
    if not pixels:
        raise ValueError("--input names no file")
    x = np.stack(pixels)
    return (x if x.ndim == 4 else x[..., None]), [str(file) for file in files]
