"""Crops of photographs of any size to a square, as ImageNet is trained and tested with.

As torchvision's RandomResizedCrop and Resize with CenterCrop: Pillow resizes, bilinearly, with a
filter that widens as images shrink.
"""

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

SCALE = 0.08, 1.0  # of the image's area
RATIO = 3 / 4, 4 / 3  # width to height
ATTEMPTS = 10
_BILINEAR = 2  # PIL.Image.Resampling.BILINEAR


def random_crop(image: "Image.Image", size: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [size, size, channels]: a random part of the image, mirrored in half of the draws.

    The part's area is uniform in SCALE of the image's, its ratio log-uniform in RATIO. When
    ATTEMPTS draws do not fit into the image it is the largest part at the middle whose ratio is
    in RATIO.
    """
    part = image.crop(random_box(*image.size, rng)).resize((size, size), _BILINEAR)
    pixels = np.asarray(part)
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


def random_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, upper, right and lower edge of a random part, as `random_crop` says."""
    for _ in range(ATTEMPTS):
        area = width * height * rng.uniform(*SCALE)
        ratio = math.exp(rng.uniform(*np.log(RATIO)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, upper = rng.integers(width - w + 1), rng.integers(height - h + 1)
            return int(left), int(upper), int(left) + w, int(upper) + h
    w = min(width, round(height * RATIO[1]))
    h = min(height, round(width / RATIO[0]))
    return _middle(width, height, w, h)


def centre_crop(image: "Image.Image", size: int) -> np.ndarray:
    """uint8 [size, size, channels]: the middle of the image, its shorter side made 8/7 of size.

    Of 224 pixels that is 256.
    """
    width, height = image.size
    shorter, least = min(width, height), size * 8 // 7
    resized = (least * width // shorter, least * height // shorter)
    image = image.resize(resized, _BILINEAR)
    return np.asarray(image.crop(_middle(*resized, size, size)))


def _middle(width, height, w, h):
    left, upper = round((width - w) / 2), round((height - h) / 2)
    return left, upper, left + w, upper + h
