"""Native views: limits of videos, positions and edges by hand; patches are those of `patches`."""

import numpy as np
import pytest
from PIL import Image

from vlm_jax.processors.image import CorruptImage
from vlm_jax.processors.native import NativeViews, VideoLimits, rotary_positions
from vlm_jax.processors.smart_resize import ovis_size, qwen_size
from vlm_jax.processors.pixels import Pixels
from vlm_jax.types import PatchFormat

FORMAT = PatchFormat(4, 2, 2)
DRAW = np.random.default_rng(0)


def picture(height, width):
    return Image.fromarray(DRAW.integers(0, 255, (height, width, 3), np.uint8))


def views(**fields):
    return NativeViews(Pixels(), FORMAT, qwen_size, 64, 4096, **fields)


def test_many_frames_share_the_tokens_of_a_video():
    limits = VideoLimits(min_pixels=640, max_pixels=6400, max_tokens=100)
    assert limits.pixels(1, 64) == 6400
    assert limits.pixels(2, 64) == 3200  # 50 tokens each
    assert limits.pixels(50, 64) == 672  # the least, and 5%
    frames = [picture(64, 64)] * 8
    (seen,) = views(video_limits=limits).video(frames, 2.0)
    assert seen.grid == (4, 10, 10)  # 25 tokens of 8 x 8 pixels each
    assert seen.num_rows == len(seen.layout) == 100


def test_frames_have_pixels_of_their_own():
    """Statistics, and torch's last bits, for videos alone."""
    frame = picture(30, 22)
    own = views(video_pixels=Pixels((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), as_torch=True))
    (seen,), (plain,) = own.video([frame] * 2, 2.0), views().images([frame])
    np.testing.assert_array_equal(own.images([frame])[0].pixels, plain.pixels)
    difference = seen.pixels / 4 + 0.5 - plain.pixels
    assert 1 / 256 < np.abs(difference).max() < 2.1 / 255


def test_pictures_of_which_nothing_is_left_are_refused():
    thin = NativeViews(Pixels(), FORMAT, ovis_size, 64, 4096)
    with pytest.raises(CorruptImage, match="a picture of 9x1700 pixels is too thin for 4096"):
        thin.layouts([(9, 1700)])


def test_positions_of_a_video_follow_its_seconds():
    expected = [[t, r, c] for t in (0, 2, 5) for r in range(2) for c in range(1)]  # 2.5 a step, truncated
    np.testing.assert_array_equal(rotary_positions((3, 2, 1), 2.5), expected)
    timed = views(rotary_3d=True, tokens_per_second=5.0)
    (seen,) = timed.video([picture(16, 16)] * 3, 4.0)  # two frames are half a second
    assert sorted(set(seen.positions[:, 0])) == [0, 2]
    (still,) = timed.images([picture(16, 16)])
    np.testing.assert_array_equal(still.positions, [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]])
    assert views().images([picture(16, 16)])[0].positions is None


def test_edges_stand_about_pictures_and_videos():
    edged = views(image_edges=(0, 1), video_edges=(2, 3))
    (seen,), (layout,) = edged.images([picture(8, 16)]), edged.layouts([(8, 16)])
    np.testing.assert_array_equal(seen.layout, [-1, 0, 1, -2])
    np.testing.assert_array_equal(layout, seen.layout)
    np.testing.assert_array_equal(edged.video([picture(8, 8)], None)[0].layout, [-3, 0, -4])


def test_examples_are_packed_to_one_length():
    one = views()
    small, large = one.images([picture(8, 8)]), one.images([picture(16, 16), picture(8, 24)])
    joined = one.join([small, [], large])
    lengths = [sum(len(seen.pixels) for seen in example) for example in (small, large)]
    assert joined.patches.shape == (3, lengths[1], 96)
    np.testing.assert_array_equal(joined.patches[0, : lengths[0]], small[0].pixels)
    np.testing.assert_array_equal(joined.patches[2], np.concatenate([seen.pixels for seen in large]))
    np.testing.assert_array_equal((joined.segment_ids > 0).sum(1), [lengths[0], 4, lengths[1]])
    assert one.join([[], []]) is None
