"""Tiled views: layouts written out by hand, and tiles combined again."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from vlm_jax.budget import InfeasibleBudget
from vlm_jax.processors.anyres import AnyresViews
from vlm_jax.processors.crops import CropViews
from vlm_jax.processors.native import NativeViews
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.smart_resize import ovis_size
from vlm_jax.processors.split_tiles import SplitViews
from vlm_jax.processors.square import SquareViews
from vlm_jax.processors.tiles import DeepSeekVL2Views, FixedTilesViews, InternVLViews, Ovis2Views
from vlm_jax.processors.views import NoViews
from vlm_jax.types import PatchFormat

DRAW = np.random.default_rng(0)


def picture(height, width):
    return Image.fromarray(DRAW.integers(0, 255, (height, width, 3), np.uint8))


GREY = Pixels((0.0,), (1 / 255,), Image.Resampling.BOX)  # normalised pixels are the grey levels


def grey(height, width):
    return Image.fromarray(DRAW.integers(0, 256, (height, width), np.uint8))


def test_fixed_tiles_lie_row_by_row_and_the_thumbnail_follows():
    views = FixedTilesViews(GREY, (2, 3), num_tokens=5, grid=(2, 3), thumbnail=True)
    page = grey(4, 9)
    values = np.asarray(page)[:, :, None]
    (seen,) = views.images([page])
    assert seen.pixels.shape == (7, 2, 3, 1) and seen.pixels.dtype == np.float32
    for tile in range(6):
        row, col = divmod(tile, 3)
        expected = values[2 * row : 2 * row + 2, 3 * col : 3 * col + 3]
        np.testing.assert_allclose(seen.pixels[tile], expected, atol=1e-3)
    means = values.reshape(2, 2, 3, 3, 1).astype(float).mean((1, 3))  # a box filter averages, and rounds
    np.testing.assert_allclose(seen.pixels[6], means, atol=1.01)
    np.testing.assert_array_equal(seen.layout, range(7 * 5))
    assert seen.num_rows == 7 * 5


def test_clips_of_fixed_tiles_follow_each_other_frame_by_frame():
    views = FixedTilesViews(GREY, (2, 2), num_tokens=3, grid=(1, 2))
    frames = [grey(2, 4) for _ in range(4)]
    clips = [*views.video(frames[:3], None), *views.video(frames[3:], None)]
    got = views.join([clips])
    assert got.shape == (1, 8, 2, 2, 1)
    for place in range(8):
        frame, tile = divmod(place, 2)
        expected = np.asarray(frames[frame])[:, 2 * tile : 2 * tile + 2, None]
        np.testing.assert_allclose(got[0, place], expected, atol=1e-3)
    assert [clip.num_rows for clip in clips] == [18, 6]
    with pytest.raises(InfeasibleBudget, match="a video takes at least 18 visual tokens, more than the 17 allowed"):
        views.video(frames[:3], None, 17)


def test_tiles_of_internvl_are_the_picture_and_the_whole_follows():
    views = InternVLViews(Pixels(), 8, 2)
    image = picture(16, 24)
    (seen,) = views.images([image])
    mosaic = seen.pixels[:6].reshape(2, 3, 8, 8, 3).swapaxes(1, 2).reshape(16, 24, 3)
    np.testing.assert_allclose(mosaic, np.asarray(image) / 255, atol=1e-6)
    np.testing.assert_allclose(seen.pixels[6], np.asarray(image.resize((8, 8), 3)) / 255, atol=1e-6)
    np.testing.assert_array_equal(seen.layout, range(14))
    assert len(views.images([picture(8, 8)])[0].pixels) == 1
    assert [part.pixels.shape for part in views.video([picture(8, 30), picture(9, 9)], 1.0)] == [(1, 8, 8, 3)] * 2


def test_frames_of_internvl_have_pixels_of_their_own():
    frame = picture(8, 8)
    views = InternVLViews(Pixels(), 8, 2, video_pixels=Pixels((0.5, 0.5, 0.5)))
    np.testing.assert_allclose(views.video([frame], None)[0].pixels, views.images([frame])[0].pixels - 0.5, atol=1e-6)


@pytest.mark.parametrize("whole_first", [True, False])
def test_rows_of_deepseek_vl2_run_across_tiles(whole_first):
    views = DeepSeekVL2Views(Pixels(), 8, (2, 2), ((8, 8), (8, 16), (16, 8)), whole_first=whole_first)
    newline, separator = -1, -2
    whole = [0, 1, newline, 2, 3, newline]
    tiles = [4, 5, 8, 9, newline, 6, 7, 10, 11, newline]
    (layout,) = views.layouts([(50, 100)])
    first, second = (whole, tiles) if whole_first else (tiles, whole)
    np.testing.assert_array_equal(layout, [*first, separator, *second])


def test_three_pictures_of_deepseek_vl2_are_not_cut():
    views = DeepSeekVL2Views(Pixels(), 8, (2, 2), ((8, 8), (8, 16)))
    image = picture(8, 16)
    assert [len(seen.pixels) for seen in views.images([image] * 2)] == [3, 3]
    three = views.images([image] * 3)
    assert [len(seen.pixels) for seen in three] == [2, 2, 2]
    np.testing.assert_array_equal(three[0].pixels[0], three[0].pixels[1])
    assert list(map(len, views.layouts([(8, 16)] * 3))) == [len(seen.layout) for seen in three] == [13] * 3


def test_parts_of_ovis_2_and_what_stands_between_them():
    start, first, column, row, end = -1, -2, -3, -4, -5
    views = Ovis2Views(Pixels(), 8, 2, 4)
    np.testing.assert_array_equal(views.layout((1, 1)), [start, 0, 1, first, end])
    expected = [start, 0, 1, first, 2, 3, column, 4, 5, row, 6, 7, column, 8, 9, end]
    np.testing.assert_array_equal(views.layout((2, 2)), expected)
    # A part keeps its aspect on a canvas of zeros.
    (seen,) = views.images([picture(4, 8)])
    assert not seen.pixels[0, [0, 1, 6, 7]].any()
    assert seen.pixels[0, 2:6].all(axis=1).any()
    port = Ovis2Views(Pixels(), 8, 2, 4, port=True)
    assert views.grid((8, 16)) == port.grid((8, 16))[::-1] == (1, 2)


GRID = (2, 2)


def anyres(merge, canvases=((8, 16),), **fields):
    return AnyresViews(SquareViews(Pixels(), (8, 8), 4, "crop"), GRID, canvases, 8, merge, **fields)


@pytest.mark.parametrize(
    ("merge", "canvas"),
    [
        ("flat", [4, 5, 6, 7, 8, 9, 10, 11]),
        ("spatial", [4, 5, 8, 9, 6, 7, 10, 11]),
        ("spatial_unpad", [4, 5, 8, 9, -1, 6, 7, 10, 11, -1]),
    ],
)
def test_layouts_of_anyres(merge, canvas):
    (layout,) = anyres(merge).layouts([(50, 100)])
    np.testing.assert_array_equal(layout, [0, 1, 2, 3, *canvas])


def test_borders_of_a_canvas_take_no_place():
    # On two tiles the image is a square: of four columns the middle ones show it.
    (layout,) = anyres("spatial_unpad").layouts([(50, 50)])
    np.testing.assert_array_equal(layout, [0, 1, 2, 3, 5, 8, -1, 7, 10, -1])
    canvas = np.asarray(anyres("flat").canvas(Image.new("RGB", (50, 50), (255, 255, 255))))
    assert (canvas[:, :4] == 0).all()
    assert (canvas[:, 4:12] == 255).all()
    assert (canvas[:, 12:] == 0).all()


def test_one_tile_ends_in_the_learned_row():
    (layout,) = anyres("spatial_unpad", canvases=()).layouts([(50, 100)])
    np.testing.assert_array_equal(layout, [0, 1, 2, 3, -1])


def test_bounds_on_a_resized_grid_hold_for_every_picture():
    """A grid just below the maximum keeps its size, and takes more than a larger one that is resized."""
    canvases = tuple((8 * rows, 8 * cols) for rows in range(1, 4) for cols in range(1, 4))
    views = anyres("spatial_unpad", canvases, max_tiles=2)
    sizes = [(20, width) for width in range(5, 80, 5)]
    counts = {}
    for most in (12, 16, 30):
        found = [len(views.within(most).layouts([size])[0]) for size in sizes]
        assert max(found) <= most
        counts[most] = max(found)
    assert counts[30] == max(len(views.layouts([size])[0]) for size in sizes) > counts[12]
    with pytest.raises(ValueError, match="at least 10 visual tokens, more than the 9 allowed"):
        views.within(9)


def test_fewer_frames_are_left_of_a_pooled_video():
    views = dataclasses.replace(anyres("spatial_unpad"), frames=SquareViews(Pixels(), (8, 8), 4))
    frames = [picture(8, 8) for _ in range(5)]
    (seen,) = views.video(frames, None, 4)  # one token of each frame, and the learned row
    np.testing.assert_allclose(seen.pixels[1], np.asarray(frames[1]) / 255, atol=1e-6)
    np.testing.assert_array_equal(seen.layout, [3, 7, 11, -1])  # the nearest of four tokens
    np.testing.assert_array_equal(seen.interpolation.index[1], [4, 5, 6, 7])
    np.testing.assert_array_equal(seen.interpolation.weights, [[0.25] * 4] * 3 + [[1, 0, 0, 0]])
    assert views.video_load(5, (8, 8), 4) == 3 == views.retokened(1).video_load(5, (8, 8), 3)
    with pytest.raises(ValueError, match="a video takes at least 2 visual tokens, more than the 1 allowed"):
        views.video(frames, None, 1)


def test_batches_are_filled_up_with_blank_tiles():
    views = InternVLViews(Pixels(), 8, 1)
    three, one = views.images([picture(8, 16)]), views.images([picture(8, 8)])
    joined = views.join([three, [], one])
    assert joined.shape == (3, 3, 8, 8, 3)
    np.testing.assert_array_equal(joined[0], three[0].pixels)
    np.testing.assert_array_equal(joined[2, :1], one[0].pixels)
    assert not joined[1].any()
    assert not joined[2, 1:].any()
    assert views.join([[], []]) is None


def test_rows_of_a_stated_capacity_are_filled_up_with_blank_tiles():
    views = FixedTilesViews(Pixels(), (4, 4), 1)
    one = views.images([picture(4, 4)])
    joined = views.join([one, []], 3)
    assert joined.shape == (2, 3, 4, 4, 3)
    np.testing.assert_array_equal(joined[0, 0], one[0].pixels[0])
    assert not joined[0, 1:].any() and not joined[1].any()
    assert views.join([[]], 0) is None


def test_a_text_only_model_refuses_pictures():
    with pytest.raises(ValueError, match="only text, got 1 images"):
        NoViews().images([picture(2, 2)])
    with pytest.raises(ValueError, match="only text, got sizes of 2 images"):
        NoViews().layouts([(2, 2)] * 2)
    assert NoViews().join([[]]) is None


BUDGETED = [
    (InternVLViews(Pixels(), 8, 2), 8, 2),
    (DeepSeekVL2Views(Pixels(), 8, (2, 2), ((8, 8), (8, 16), (16, 8), (16, 16))), 17, 13),
    (Ovis2Views(Pixels(), 8, 2, 9), 15, 5),
    (anyres("spatial_unpad", canvases=((8, 16), (16, 16))), 14, 14),
    (SplitViews(Pixels(), 8, 2, 32), 10, 2),  # of 34: two rows and columns, and the whole
    (SplitViews(Pixels(), 7, 2, 21), 20, 2),  # the sides become 21 and 22
    (CropViews(SquareViews(Pixels(), (8, 8), 2), 4, 4), 6, 2),  # of 10: the whole and 2 crops
    (SquareViews(Pixels(), (8, 8), 4), 4, 4),
    (FixedTilesViews(Pixels(), (8, 8), 2, (1, 2), thumbnail=True), 6, 6),
    (NativeViews(Pixels(), PatchFormat(4, 1, 2), ovis_size, 4096, 4096, image_edges=(0, 1)), 20, 3),
]


@pytest.mark.parametrize(("views", "budget", "least"), BUDGETED)
def test_no_picture_takes_more_than_its_budget(views, budget, least):
    fewer = views.within(budget)
    sizes = [(8, 8), (30, 30), (20, 61), (100, 35), (60, 11)]
    counts = [len(fewer.layouts([size])[0]) for size in sizes]
    assert max(counts) <= budget
    assert [len(seen.layout) for seen in fewer.images([picture(*size) for size in sizes[:1]])] == counts[:1]
    assert [len(layout) for layout in views.within(10**6).layouts(sizes)] == list(map(len, views.layouts(sizes)))
    with pytest.raises(
        InfeasibleBudget, match=f"takes at least {least} visual tokens, more than the {least - 1} allowed"
    ):
        views.within(least - 1)


def test_splitting_is_kept_as_long_as_a_square_picture_fits():
    """4 x 4 tiles and the whole are 34 tokens, 3 x 3 are 20, 2 x 2 are 10; without splitting 2 are left."""
    views = SplitViews(Pixels(), 8, 2, 32)
    assert [len(views.within(most).layouts([(8, 8)])[0]) for most in (34, 33, 20, 19, 10, 9)] == [34, 20, 20, 10, 10, 2]
    assert views.tile_grids([(8, 8), (30, 61), (60, 11)]) == [(4, 4), (2, 4), (4, 1)]
    assert views.within(2).tile_grids([(30, 61)]) == [None]


def test_crops_are_parts_of_the_longer_side():
    """The last one is smaller where the side is no multiple; the whole comes first."""
    views = CropViews(SquareViews(GREY, (1, 1), 2), min_crop_size=3)
    page = grey(5, 11)
    assert [views.grid(size) for size in ((5, 11), (11, 5), (5, 100), (5, 5), (2, 11), (5, 6))] == [
        (1, 2),
        (2, 1),
        (1, 4),
        None,
        None,
        (1, 2),
    ]
    (seen,) = views.images([page])
    parts = [np.asarray(page), np.asarray(page)[:, :6], np.asarray(page)[:, 6:]]
    np.testing.assert_allclose(seen.pixels.reshape(-1), [part.mean() for part in parts], atol=1.01)
    assert [views.within(most).loads([(5, 100)]) for most in (10, 9, 6, 5, 2)] == [[5], [4], [3], [1], [1]]


@pytest.mark.parametrize(("views", "budget", "least"), BUDGETED)
def test_loads_are_those_of_the_pixels(views, budget, least):
    """Tiles, or patches where images have a separate grid."""
    del budget, least
    pictures = [picture(8, 8), picture(20, 61)]
    sizes = [(8, 8), (20, 61)]
    seen = views.images(pictures)
    assert views.loads(sizes) == [len(image.pixels) for image in seen]
    assert [layout.tolist() for layout in views.layouts(sizes)] == [image.layout.tolist() for image in seen]


@pytest.mark.parametrize("tokens", [3, (1, 3)])
def test_other_numbers_of_tokens(tokens):
    """(2, 2) tokens of a tile become three."""
    for views, expected in (
        (FixedTilesViews(Pixels(), (8, 8), 4, (1, 2)), 6),
        (InternVLViews(Pixels(), 8, 4), 3 * 3),  # two tiles and the whole
        (Ovis2Views(Pixels(), 8, 4, 1), 3 + 3),  # one tile and three learned rows
        (SquareViews(Pixels(), (8, 8), 4), 3),
        (NativeViews(Pixels(), PatchFormat(4, 1, 2), ovis_size, 64, 4096), 2 * 3),  # a block is 8 x 8 pixels
    ):
        assert len(views.retokened(tokens).layouts([(8, 16)])[0]) == expected, type(views)
    deepseek = DeepSeekVL2Views(Pixels(), 8, (2, 2), ((8, 8), (8, 16))).retokened(tokens)
    newline, separator = (-1, -2)
    lines = [[0, 1, 2], [3, 4, 5, 6, 7, 8]]
    if tokens == (1, 3):
        lines = [[*line, newline] for line in lines]
    np.testing.assert_array_equal(deepseek.layouts([(8, 16)])[0], [*lines[0], separator, *lines[1]])
