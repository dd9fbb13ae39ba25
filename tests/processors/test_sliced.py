"""An image as a whole and in slices, packed at their own size; sizes as of the reference are in tests/parity."""

import dataclasses
import math

import numpy as np
import pytest
from PIL import Image

from vlm_jax.budget import InfeasibleBudget
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.sliced import SlicedViews, area_size, slice_grid
from vlm_jax.processors.views import ItemSize, PictureMismatch
from vlm_jax.types import PatchFormat

# Blocks of 8 pixels, views of 3x3 blocks, at most 4 slices; frames of 2x2 blocks, at most 2.
VIEWS = SlicedViews(
    Pixels(),
    PatchFormat(2, merge_size=4),
    area_size,
    0,
    24 * 24,
    max_slices=4,
    video_area=16 * 16,
    video_slices=2,
    merge_sizes=(2, 4),
)
SQUARE, WIDE = (48, 48), (24, 48)


def picture(size):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8))


def test_slices_are_near_to_the_aspect_of_the_image():
    assert slice_grid(SQUARE, 4, 24) == (2, 2) and slice_grid(WIDE, 4, 24) == (1, 2)
    assert slice_grid((48, 24), 4, 24) == (2, 1) and slice_grid(SQUARE, 1, 24) is None
    assert slice_grid((24, 24), 4, 24) is None  # as large as a view
    assert VIEWS.tile_grids([SQUARE, WIDE, (10, 10)]) == [(2, 2), (1, 2), None]


def test_places_of_an_image():
    """The whole, then every slice; together they are the image."""
    sizes = [SQUARE, WIDE, (10, 10)]
    shares = VIEWS.shares(sizes)
    # A whole of twice the width has 2 blocks by 4; a small image is enlarged.
    assert [[len(share.layout) for share in of_image] for of_image in shares] == [[9] * 5, [8, 9, 9], [9]]
    assert [[share.load for share in of_image] for of_image in shares] == [[144] * 5, [128, 144, 144], [144]]
    assert [len(layout) for layout in VIEWS.layouts(sizes)] == [45, 26, 9]
    assert VIEWS.loads(sizes) == [720, 416, 144]
    for made, of_image in zip(VIEWS.images([picture(size) for size in sizes]), shares, strict=True):
        assert len(made.pixels) == sum(share.load for share in of_image)
        tiles = made.in_tiles(len(of_image)) if len(of_image) > 1 else [made]
        assert [(len(tile.pixels), tile.num_rows) for tile in tiles] == [(s.load, len(s.layout)) for s in of_image]
        np.testing.assert_array_equal(np.concatenate([tile.pixels for tile in tiles]), made.pixels)


def test_slices_show_the_parts_of_the_image():
    """An image whose slices need no resizing."""
    image = picture(SQUARE)
    (made,) = VIEWS.images([image])
    corner = VIEWS.images([image.crop((24, 0, 48, 24))])[0]
    np.testing.assert_array_equal(made.tiles[2].pixels, corner.pixels)
    boxes = [region.box for region in VIEWS.regions(SQUARE)]
    assert boxes[0] == (0, 0, 1, 1) and boxes[2] == (0, 0.5, 0.5, 1)
    assert [region.blocks for region in VIEWS.regions(WIDE)] == [(2, 4), (3, 3), (3, 3)]


@pytest.mark.parametrize("most", [45, 44, 27, 17, 9, 8, 5, 4, 3, 2, 1])
def test_a_bound_is_met_by_fewer_slices_then_fewer_pixels(most):
    views = VIEWS.within(most)
    counts = [len(layout) for layout in views.layouts([SQUARE, WIDE, (10, 10), (31, 47), (100, 70)])]
    assert max(counts) <= most
    # Of the square: 4 slices, 2 slices, and the whole in squares of blocks.
    expected = {45: 45, 44: 44, 27: 27, 17: 9, 9: 9, 8: 4, 5: 4, 4: 4, 3: 1, 2: 1, 1: 1}
    assert counts[0] <= expected[most]
    assert (counts[0] == expected[most]) == (most not in (44, 27))


def test_a_bound_below_a_block():
    with pytest.raises(InfeasibleBudget, match="an image takes at least 1 visual tokens, more than the 0 allowed"):
        VIEWS.within(0)
    assert VIEWS.within(9).within(20).most == 9
    # A thin image is a row of blocks, however few pixels it has.
    assert len(VIEWS.within(3).layouts([(8, 400)])[0]) == 6


def test_budgets_of_the_modes():
    """Five views of 9 blocks, or of four times as many; another number is a bound in the mode of the views."""
    assert VIEWS.of_budget(45) == VIEWS
    fine = VIEWS.of_budget(180)
    assert fine.format == PatchFormat(2, merge_size=2) and fine.most is None
    assert [len(layout) for layout in fine.layouts([SQUARE])] == [180] and fine.of_budget(45) == VIEWS
    assert VIEWS.of_budget(100) == VIEWS.within(100)
    alone = dataclasses.replace(VIEWS, max_slices=1)
    assert alone.of_budget(36).format.merge_size == 2


def test_frames_of_a_video():
    clip = [picture(WIDE) for _ in range(3)]
    made, shares = VIEWS.video(clip, 2.0), VIEWS.video_shares(3, WIDE)
    assert VIEWS.frame_grid(3, WIDE) == (1, 2)
    assert [len(share.layout) for share in shares] == [len(one.layout) for one in made] == [3, 4, 4] * 3
    assert [share.load for share in shares] == [len(one.pixels) for one in made]
    assert VIEWS.video_load(3, WIDE) == sum(share.load for share in shares)
    few = VIEWS.video_layouts(3, WIDE, 12)
    assert VIEWS.frame_grid(3, WIDE, 12) is None and [len(layout) for layout in few] == [3] * 3
    assert sum(map(len, VIEWS.video_layouts(3, SQUARE, 6))) == 3
    with pytest.raises(InfeasibleBudget, match="a video of 3 frames takes at least 3 visual tokens"):
        VIEWS.video_layouts(3, WIDE, 2)


def test_an_item_has_no_size_of_its_own():
    assert VIEWS.sized(ItemSize()) is VIEWS
    with pytest.raises(PictureMismatch, match="max_pixels: this system's images have fixed sizes"):
        VIEWS.sized(ItemSize(max_pixels=100))


def test_rounding_of_a_view():
    draw = np.random.default_rng(0)
    most = 0
    for height, width in draw.integers(8, 2000, (300, 2)).tolist():
        if max(height, width) / min(height, width) < 20:
            most = max(most, math.prod(area_size((height, width), 8, 0, 24 * 24)) // 64)
    assert 9 < most <= VIEWS.most_tokens == 18
