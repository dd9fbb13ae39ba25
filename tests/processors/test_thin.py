"""Parts of resized images: equal to those that are cut from the whole, and thin pictures cost what others do."""

import numpy as np
import pytest
from PIL import Image

from vlm_jax.processors.image import ANTIALIAS, FIXED_POINT, CorruptImage
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.square import SquareViews

from ..memory import peak_bytes


def picture(width, height, mode="RGB"):
    channels = 3 if mode == "RGB" else 1
    pixels = np.random.default_rng(width + height).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels if channels == 3 else pixels[:, :, 0])


FILTERS = [*((kind, False) for kind in ANTIALIAS), *((kind, True) for kind in FIXED_POINT)]


@pytest.mark.parametrize("fit", ["crop", "crop_rounded", "pad"])
@pytest.mark.parametrize(("kind", "as_torch"), FILTERS)
@pytest.mark.parametrize(("width", "height"), [(300, 3), (2, 501), (16, 40), (41, 11), (5, 5)])
def test_a_part_is_that_of_the_whole(monkeypatch, fit, kind, as_torch, width, height):
    pixels = Pixels((0.1, 0.5, 0.9), (1.0, 1.0, 1.0), kind, "torch" if as_torch else "pillow")
    views = SquareViews(pixels, (24, 16), 1, fit, shortest_edge=28)
    given = picture(width, height)
    whole = np.asarray(views.tile(given))
    monkeypatch.setattr("vlm_jax.processors.square.is_large", lambda *_: True)
    np.testing.assert_array_equal(np.asarray(views.tile(given)), whole)


def test_a_part_of_a_grey_picture_is_that_of_the_whole(monkeypatch):
    views, given = SquareViews(Pixels((0.3,), (1.0,)), (24, 16), 1, "crop", shortest_edge=28), picture(97, 31, "L")
    whole = np.asarray(views.tile(given))
    monkeypatch.setattr("vlm_jax.processors.square.is_large", lambda *_: True)
    np.testing.assert_array_equal(np.asarray(views.tile(given)), whole)


@pytest.mark.parametrize("fit", ["crop", "pad", "shrink", "stretch"])
@pytest.mark.parametrize("resizes_as", ["pillow", "torch"])
@pytest.mark.parametrize("size", [(300_000, 1), (1, 300_000)])
def test_a_thin_picture_costs_what_a_square_one_does(fit, resizes_as, size):
    """Of one colour, which it keeps."""
    views = SquareViews(Pixels(resizes_as=resizes_as), (336, 336), 1, fit, background=(9, 99, 199))
    made = []
    assert peak_bytes(lambda: made.append(views.tile(Image.new("RGB", size, (9, 99, 199))))) < 300 * 2**20
    tile = np.asarray(made[0])
    assert tile.shape == (336, 336, 3) and (tile == (9, 99, 199)).all()


def test_a_picture_that_is_too_thin_for_its_views_is_named():
    with pytest.raises(CorruptImage, match="a picture of 1x9000 pixels is too thin"):
        Pixels().resized(picture(9000, 1), (0, 4))
