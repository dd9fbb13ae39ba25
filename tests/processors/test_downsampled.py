"""Tiles in fewer pixels, against Pillow's filter; their number and layout are those of the full size."""

import numpy as np
import pytest
from PIL import Image

from vlm_jax.budget import InfeasibleBudget
from vlm_jax.processors.anyres import AnyresViews
from vlm_jax.processors.crops import CropViews
from vlm_jax.processors.downsampled import DownsampledViews
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.prompt import TiledText
from vlm_jax.processors.square import SquareViews
from vlm_jax.processors.tiles import DeepSeekVL2Views, InternVLViews, Ovis2Views
from vlm_jax.processors.views import PictureMismatch

from .test_processor import processor, say

PIXELS = Pixels((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 61, 3), np.uint8))
CANVASES = ((8, 8), (8, 16), (16, 8), (8, 24))
EVERY = [
    SquareViews(PIXELS, (8, 8), 16),
    AnyresViews(SquareViews(PIXELS, (8, 8), 16), (4, 4), CANVASES, 8),
    InternVLViews(PIXELS, 8, 16),
    DeepSeekVL2Views(PIXELS, 8, (4, 4), CANVASES),
    Ovis2Views(PIXELS, 8, 16),
]


@pytest.mark.parametrize("full", EVERY, ids=lambda views: type(views).__name__)
def test_tiles_are_those_of_the_full_size_in_fewer_pixels(full):
    views = DownsampledViews(full.retokened((2, 3)), (4, 6))
    (before,), (after,) = full.images([PICTURE]), views.images([PICTURE])
    assert after.pixels.dtype == np.float32 and views.tile_shape == (4, 6, 3) and views.tile_tokens == 6
    for tile, smaller in zip(before.pixels, after.pixels, strict=True):
        for channel in range(3):
            expected = Image.fromarray(tile[:, :, channel]).resize((6, 4), Image.Resampling.BILINEAR)
            np.testing.assert_allclose(smaller[:, :, channel], np.asarray(expected), atol=1e-5)
    sizes = [(20, 61)]
    np.testing.assert_array_equal(after.layout, views.layouts(sizes)[0])
    assert views.loads(sizes) == full.loads(sizes) == [len(after.pixels)]
    assert after.num_rows == 6 * len(after.pixels)
    assert views.join([[after], []]).shape == (2, len(after.pixels), 4, 6, 3)
    # Learned rows stand between rows of tokens and tiles as before.
    learned = [np.unique(one.layout[one.layout < 0]).tolist() for one in (before, after)]
    assert learned[0] == learned[1]


def test_crops_are_switched_in_fewer_pixels():
    """Of a call, also of one conversation and of sizes alone."""
    crops = CropViews(SquareViews(PIXELS, (8, 8), 16), min_crop_size=4, active=False)
    made = processor(
        DownsampledViews(crops.retokened(4), (4, 4)), {"image": "<image>"}, tiled=TiledText("<image>", "", "")
    )
    messages, shown = say("<image>"), [np.asarray(PICTURE)]
    for active, tiles in ((None, 1), (False, 1), (True, 4)):
        example = made.example(messages, shown, do_pan_and_scan=active)
        pixels = np.concatenate([image.pixels for image in example.images])
        assert example.load.images == tiles and pixels.shape == (tiles, 4, 4, 3)
        assert made.measure(messages, [(20, 61)], do_pan_and_scan=active) == example.load
        assert made(messages, shown, do_pan_and_scan=active).images.shape == (1, tiles, 4, 4, 3)
    with pytest.raises(PictureMismatch, match="do_pan_and_scan: this system has no pan and scan; remove the option"):
        processor(DownsampledViews(EVERY[0], (4, 4)))(messages, shown, do_pan_and_scan=True)


def test_rows_of_tokens_end_in_the_learned_row():
    views = DownsampledViews(DeepSeekVL2Views(PIXELS, 8, (4, 4), ((8, 16),)).retokened((1, 2)), (2, 4))
    newline, separator = -1, -2
    expected = [0, 1, newline, separator, 2, 3, 4, 5, newline]
    np.testing.assert_array_equal(views.layouts([(8, 16)])[0], expected)


def test_a_bound_leaves_fewer_tiles():
    views = DownsampledViews(InternVLViews(PIXELS, 8, 16, max_tiles=3).retokened(4), (4, 4))
    assert views.loads([(20, 61)]) == [4]  # of 1x3 tiles and the whole
    assert views.within(15).loads([(20, 61)]) == [3]
    assert views.within(15).tile_shape == (4, 4, 3)
    with pytest.raises(InfeasibleBudget, match="takes at least 4 visual tokens, more than the 3 allowed"):
        views.within(3)


def test_frames_of_a_video_are_smaller_too():
    views = DownsampledViews(InternVLViews(PIXELS, 8, 16).retokened(4), (4, 4))
    frames = [PICTURE] * 3
    shown = views.video(frames, None)
    assert [one.pixels.shape for one in shown] == [(1, 4, 4, 3)] * 3
    assert [layout.tolist() for layout in views.video_layouts(3, (20, 61))] == [one.layout.tolist() for one in shown]
    assert views.video_load(3, (20, 61)) == 3
