import numpy as np
import pytest
from PIL import Image

from supsup_jax.data import crops


def ramp(width, height):
    """An image that says where it is: red is twice the x of a pixel, green twice its y."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([2 * x, 2 * y, 0 * x], axis=-1).astype(np.uint8))


def test_a_random_crop_is_its_box_resized_and_mirrored_in_half_of_the_draws():
    image, mirrored = ramp(120, 100), []
    for seed in range(60):
        left, upper, right, lower = crops.random_box(*image.size, np.random.default_rng(seed))
        got = crops.random_crop(image, 8, np.random.default_rng(seed)).astype(float)
        assert got.shape == (8, 8, 3)
        # The middle of output pixel j in the image; the outermost see less to one side.
        place = np.arange(1, 7) + 0.5
        x = left + place * (right - left) / 8 - 0.5
        y = upper + place * (lower - upper) / 8 - 0.5
        red, green = got[1:7, 1:7, 0], got[1:7, 1:7, 1]
        mirrored.append(red[0, 0] > red[0, -1])
        want = x[::-1] if mirrored[-1] else x
        np.testing.assert_allclose(red, np.tile(2 * want, (6, 1)), atol=1.5)
        np.testing.assert_allclose(green, np.tile(2 * y[:, None], (1, 6)), atol=1.5)
    assert 15 < sum(mirrored) < 45


@pytest.mark.parametrize("size", [(500, 375), (300, 500)])
def test_boxes_are_drawn_as_the_definition_says(size):
    """Against the same definition by rejection, all draws at once."""
    rng, (width, height) = np.random.default_rng(0), size
    boxes = np.asarray([crops.random_box(width, height, rng) for _ in range(4000)])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (boxes >= 0).all()
    assert (boxes[:, 2] <= width).all()
    assert (boxes[:, 3] <= height).all()

    area = rng.uniform(0.08, 1, 40000)
    ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), 40000))
    want_w = np.sqrt(area * ratio * width * height)
    want_h = np.sqrt(area / ratio * width * height)
    fits = (want_w <= width) & (want_h <= height)
    for got, want in (
        (w * h / (width * height), area[fits]),
        (np.log(w / h), np.log(ratio[fits])),
        (boxes[:, 0] / (width - w + 1), rng.uniform(size=40000)),
        (boxes[:, 1] / (height - h + 1), rng.uniform(size=40000)),
    ):
        marks = np.linspace(0.1, 0.9, 9)
        np.testing.assert_allclose(
            (got[:, None] <= np.quantile(want, marks)).mean(axis=0), marks, atol=0.03
        )


def test_an_image_too_thin_for_any_box_gives_its_middle():
    rng = np.random.default_rng(0)
    assert crops.random_box(100, 2, rng) == (48, 0, 51, 2)
    assert crops.random_box(2, 100, rng) == (0, 48, 2, 51)
    assert crops.random_box(1, 1, rng) == (0, 0, 1, 1)


def test_the_centre_crop_by_hand():
    # 64x48 becomes 32x24, and 21x21 are cut from (6, 2) on.
    got = crops.centre_crop(ramp(64, 48), 21).astype(float)
    assert got.shape == (21, 21, 3)
    x = (np.arange(6, 27) + 0.5) * 2 - 0.5
    y = (np.arange(2, 23) + 0.5) * 2 - 0.5
    np.testing.assert_allclose(got[..., 0], np.tile(2 * x, (21, 1)), atol=1.5)
    np.testing.assert_allclose(got[..., 1], np.tile(2 * y[:, None], (1, 21)), atol=1.5)


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (256, 256), (20, 900)])
def test_224_pixels_are_cut_from_256(size):
    got = crops.centre_crop(ramp(*size), 224)
    assert got.shape == (224, 224, 3)
    if max(size) == 256:  # nothing to resize
        np.testing.assert_array_equal(got, np.asarray(ramp(*size))[16:240, 16:240])
