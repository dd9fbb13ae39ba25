"""Tiles, packed patches and frames against arithmetic written out here."""

import math

import numpy as np
import pytest

from vlm_jax.config import ConfigError
from vlm_jax.processors.patches import pack_patches
from vlm_jax.processors.sample_views import NativeViews, Pixels, TiledViews, fit_blocks, packed_length, uniform_frames
from vlm_jax.types import PatchFormat

PIXELS = {"channels": 1, "mean": (0.0,), "std": (1 / 255,), "filter": "box"}  # normalised pixels are the grey levels


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 1), np.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 2}, r"config\.data\.channels: .* got 2"),
        ({"mean": (0.5, 0.5)}, r"config\.processor\.mean: one number a channel, 1, expected"),
        ({"std": (0.0,)}, r"config\.processor\.std: positive numbers expected"),
        (
            {"filter": "nearest"},
            r"config\.processor\.filter: 'nearest' is not one of box, bilinear, bicubic, lanczos",
        ),
    ],
)
def test_impossible_pixels_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        Pixels(**{**PIXELS, **change})


def test_tiles_lie_row_by_row_and_the_thumbnail_follows():
    views = TiledViews(Pixels(**PIXELS), (2, 3), num_tokens=5, tiles=(2, 3), thumbnail=True)
    page = picture(4, 9)
    got = views([[page]])
    assert got.shape == (1, 7, 2, 3, 1) and got.dtype == np.float32
    for tile in range(6):
        row, col = divmod(tile, 3)
        np.testing.assert_allclose(got[0, tile], page[2 * row : 2 * row + 2, 3 * col : 3 * col + 3], atol=1e-3)
    means = page.reshape(2, 2, 3, 3, 1).astype(float).mean((1, 3))  # a box filter averages, and rounds
    np.testing.assert_allclose(got[0, 6], means, atol=1.01)
    assert views.count([page]) == 7 * 5


def test_clips_follow_each_other_frame_by_frame():
    views = TiledViews(Pixels(**PIXELS), (2, 2), num_tokens=3, tiles=(1, 2))
    frames = [picture(2, 4, seed) for seed in range(4)]
    got = views([frames[:3], frames[3:]])
    assert got.shape == (1, 8, 2, 2, 1)
    for place in range(8):
        frame, tile = divmod(place, 2)
        np.testing.assert_allclose(got[0, place], frames[frame][:, 2 * tile : 2 * tile + 2], atol=1e-3)
    assert (views.count(frames[:3]), views.count(frames[3:])) == (18, 6)


SIZES = [(1, 1), (48, 48), (47, 200), (1000, 31), (3, 900), (640, 480), (28, 2800), (14, 14), (4000, 4000)]


@pytest.mark.parametrize("unit", [14, 28])
@pytest.mark.parametrize(("least", "most"), [(1, 1), (1, 4), (4, 4), (4, 16), (6, 25), (64, 256)])
def test_no_picture_has_more_blocks_than_it_may(unit, least, most):
    for height, width in SIZES:
        rows, cols = fit_blocks(height, width, unit, least, most)
        assert rows >= 1 and cols >= 1 and rows * cols <= most
        natural = max(1, round(height / unit)) * max(1, round(width / unit))
        if least <= natural <= most:
            assert rows * cols == natural
        if natural > most and min(rows, cols) > 1:  # about as large as may be: a side more would be too many
            scale = math.sqrt(most / (height * width))
            assert (rows, cols) == (math.floor(height * scale + 1e-9), math.floor(width * scale + 1e-9))


def test_a_small_picture_grows_to_its_least():
    assert fit_blocks(14, 14, 14, 4, 16) == (2, 2)
    assert fit_blocks(14, 28, 14, 8, 16) == (2, 4)
    assert fit_blocks(14, 28, 14, 7, 16) == (2, 4)  # sqrt(3.5) by sqrt(14), up
    assert fit_blocks(10, 30, 14, 4, 4) == (1, 3)  # up would be 2x4: down again, to sqrt(4 / 3) by sqrt(12)


@pytest.mark.parametrize("channels_last", [False, True])
def test_patches_hold_the_pixels_of_the_resized_picture(channels_last):
    form = PatchFormat(2, merge_size=2, channels_last=channels_last)
    pages = [picture(8, 4), picture(4, 12, 1)]
    three = {**PIXELS, "channels": 3, "mean": (0.0, 0.0, 100 / 255), "std": (1 / 255,) * 3}
    packed = NativeViews(Pixels(**three), form, 24, max_blocks=3)([[page] for page in pages])
    assert packed.patches.shape == (1, 24, 12)
    np.testing.assert_array_equal(packed.segment_ids, [[1] * 8 + [2] * 12 + [0] * 4])
    for place in range(20):
        page = pages[packed.segment_ids[0, place] - 1]
        row, col = 2 * packed.positions[0, place]
        expected = page[row : row + 2, col : col + 2].astype(float) - np.array([0, 0, 100.0])
        if not channels_last:
            expected = expected.transpose(2, 0, 1)
        np.testing.assert_allclose(packed.patches[0, place], expected.reshape(-1), atol=1e-3)


def test_a_clip_shares_patches_in_time_and_the_size_of_its_first_frame():
    form = PatchFormat(2, temporal_patch_size=2, merge_size=1)
    views = NativeViews(Pixels(**PIXELS), form, 12, max_blocks=6)
    frames = [picture(4, 6), picture(5, 5, 1), picture(4, 6, 2)]
    assert views.count(frames) == 2 * 6
    packed = views([frames])
    assert packed.segment_ids.tolist() == [[1] * 6 + [2] * 6]
    first = packed.patches[0, 0].reshape(2, 2, 2)
    np.testing.assert_allclose(first[0], frames[0][:2, :2, 0], atol=1e-3)
    last = packed.patches[0, 6].reshape(2, 2, 2)
    np.testing.assert_allclose(last[0], last[1])  # the third frame has no partner and is repeated


def test_counts_are_those_of_the_packed_patches():
    views = NativeViews(
        Pixels(**PIXELS),
        PatchFormat(2, merge_size=2),
        packed_length(20, PatchFormat(2, merge_size=2)),
        max_blocks=10,
        block_tokens=4,
    )
    for height, width in SIZES:
        clip = [np.zeros((min(height, 50), min(width, 90), 1), np.uint8)]
        assert views.count(clip) == np.count_nonzero(views([clip]).segment_ids) <= 40


@pytest.mark.parametrize("window", [2, 3, 4])
def test_the_length_holds_any_images(window):
    rng = np.random.default_rng(window)
    for _ in range(60):
        grids = [(1, *(2 * rng.integers(1, 9, 2)).tolist()) for _ in range(rng.integers(1, 4))]
        blocks = sum(rows * cols // 4 for _, rows, cols in grids)
        length = packed_length(blocks, PatchFormat(2, merge_size=2, window=window))
        pack_patches(np.zeros((4 * blocks, 1), np.float32), grids, merge_size=2, window=window, length=length)
    assert packed_length(12, PatchFormat(2, merge_size=2)) == 48


@pytest.mark.parametrize(
    ("count", "wanted", "expected"),
    [(8, 8, list(range(8))), (8, 4, [1, 3, 5, 7]), (9, 3, [1, 4, 7]), (2, 4, [0, 0, 1, 1]), (1, 2, [0, 0])],
)
def test_frames_are_the_middles_of_equal_parts(count, wanted, expected):
    assert uniform_frames(count, wanted) == expected
