"""Where visual tokens are in a picture, against numbers by hand, and drawings of them."""

import numpy as np
import pytest
from PIL import Image

from vlm_jax.demo.drawing import GREY, OUTLINE, STRENGTH, draw_kept
from vlm_jax.demo.regions import token_boxes
from vlm_jax.processors.anyres import AnyresViews
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.square import SquareViews

PIXELS = Pixels(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), resample=Image.Resampling.BICUBIC)


def square(fit):
    return SquareViews(PIXELS, (96, 96), 9, fit=fit)


@pytest.mark.parametrize(
    ("fit", "size", "first", "middle", "last"),
    [
        # 240 rows and 480 columns on 3 x 3 tokens: 80 rows and 160 columns each.
        ("stretch", (240, 480), (0, 0, 160, 80), (160, 80, 320, 160), (320, 160, 480, 240)),
        # The central 240 x 240 pixels: columns 120 to 360.
        ("crop", (240, 480), (120, 0, 200, 80), (200, 80, 280, 160), (280, 160, 360, 240)),
        # On a square of 480 the picture has rows 120 to 360: the first token has its 40 last rows in it.
        ("pad", (240, 480), (0, 0, 160, 40), (160, 40, 320, 200), (320, 200, 480, 240)),
    ],
)
def test_tokens_of_one_tile(fit, size, first, middle, last):
    boxes = token_boxes(square(fit), size, (6, 6), (3, 3))
    np.testing.assert_allclose(boxes[[0, 4, 8]], [first, middle, last], atol=0.7)


def test_tokens_of_padding_alone_have_no_box():
    """On a square of 480 pixels, a picture of 120 rows has rows 180 to 300; each of the 6 x 6 tokens has 80."""
    boxes = token_boxes(square("pad"), (120, 480), (6, 6), (6, 6)).reshape(6, 6, 4)
    assert np.isnan(boxes[[0, 1, 4, 5]]).all()
    np.testing.assert_allclose(boxes[2, 1], (80, 0, 160, 60), atol=0.7)
    np.testing.assert_allclose(boxes[3, 1], (80, 60, 160, 120), atol=0.7)


def test_blocks_that_do_not_divide_the_patches():
    """Squares of 2 x 2 of 5 x 5 patches: the last has one row and one column."""
    boxes = token_boxes(square("stretch"), (100, 100), (5, 5), (3, 3))
    np.testing.assert_allclose(boxes[[0, 4, 8]], [(0, 0, 40, 40), (40, 40, 80, 80), (80, 80, 100, 100)], atol=0.7)


def test_tiles_of_a_canvas():
    """The whole picture, then its left and its right half."""
    views = AnyresViews(square("stretch"), (2, 2), ((96, 192),), 96)
    boxes = token_boxes(views, (96, 192), (4, 4), (2, 2)).reshape(3, 4, 4)
    np.testing.assert_allclose(boxes[0, 3], (96, 48, 192, 96), atol=0.7)
    np.testing.assert_allclose(boxes[1, 3], (48, 48, 96, 96), atol=0.7)
    np.testing.assert_allclose(boxes[2, 0], (96, 0, 144, 48), atol=0.7)


def test_a_drawing_keeps_pixels_of_the_boxes_alone():
    picture = Image.new("RGB", (30, 20), (200, 100, 0))
    drawn = np.asarray(draw_kept(picture, np.asarray([(10.0, 0.0, 20.0, 10.0)])))
    assert drawn[5, 15].tolist() == [200, 100, 0]
    assert drawn[0, 10].tolist() == drawn[9, 19].tolist() == list(OUTLINE)
    dropped = [round(c + STRENGTH * (g - c)) for c, g in zip((200, 100, 0), GREY, strict=True)]
    np.testing.assert_allclose(drawn[[5, 15], [5, 15]], [dropped, dropped], atol=1)
    assert np.asarray(picture)[5, 5].tolist() == [200, 100, 0]
