"""One view of an image: where its pixels go, by images of one colour with marks."""

import numpy as np
import pytest
from PIL import Image

from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.square import SquareViews

GREY = Pixels((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), Image.Resampling.NEAREST)


def picture(height, width):
    """Red left of the middle, and blue."""
    array = np.zeros((height, width, 3), np.uint8)
    array[:, : width // 2, 0] = 255
    array[:, width // 2 :, 2] = 255
    return Image.fromarray(array)


def tile(fit, height, width, **fields):
    return np.asarray(SquareViews(GREY, (8, 8), 4, fit, **fields).tile(picture(height, width)))


def test_stretched():
    np.testing.assert_array_equal(tile("stretch", 4, 16), tile("stretch", 16, 4))
    assert (tile("stretch", 4, 16)[:, :4, 0] == 255).all()


def test_cropped_in_the_middle():
    found = tile("crop", 8, 16)
    np.testing.assert_array_equal(found, np.asarray(picture(8, 8)))
    # The shorter side may be longer than the crop, and the crop longer than it: then borders are black.
    assert (tile("crop", 8, 16, shortest_edge=4)[[0, 1, 6, 7]] == 0).all()
    assert tile("crop", 20, 20, shortest_edge=16).any(axis=2).all()


def test_padded_with_the_background():
    found = tile("pad", 4, 8)
    assert (found[[0, 1, 6, 7]] == 127).all()
    assert (found[2:6, :4] == (255, 0, 0)).all()
    assert (tile("pad", 8, 4, background=(1, 2, 3))[:, [0, 7]] == (1, 2, 3)).all()


def test_shrunk_with_the_other_side_truncated_or_rounded():
    # 5.6 rows.
    assert (tile("shrink", 7, 10, min_size=1) == 127).all(axis=(1, 2)).tolist() == [True, *[False] * 5, True, True]
    assert (tile("shrink_rounded", 7, 10, min_size=1) == 127).all(axis=(1, 2)).sum() == 2
    assert not (tile("shrink", 1, 100, min_size=6) == 127).all(axis=(1, 2))[1:7].any()


@pytest.mark.parametrize("fit", ["stretch", "crop", "pad", "shrink"])
def test_pixels_are_normalised_and_every_token_has_a_place(fit):
    views = SquareViews(GREY, (8, 8), 4, fit)
    (seen, _) = views.images([picture(9, 30), picture(8, 8)])
    np.testing.assert_allclose(seen.pixels[0], np.asarray(views.tile(picture(9, 30))) / 255 * 4 - 2, atol=1e-6)
    np.testing.assert_array_equal(seen.layout, range(4))
    assert [len(layout) for layout in views.layouts([(9, 30), (8, 8)])] == [4, 4]
    with pytest.raises(ValueError, match="does not support videos"):
        views.video([picture(8, 8)], None)
