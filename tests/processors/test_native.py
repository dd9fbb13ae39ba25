"""Native views: limits of videos, positions and edges by hand; patches are those of `patches`."""

import numpy as np
import pytest
from PIL import Image

from vlm_jax.processors.image import CorruptImage
from vlm_jax.processors.native import NativeViews, VideoLimits, rotary_positions
from vlm_jax.processors.patches import packed_length
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.smart_resize import bounded_size, ovis_size, qwen_size
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
    assert VideoLimits(640, 6400).pixels(5000, 64) == 6400
    frames = [picture(64, 64)] * 8
    (seen,) = views(video_limits=limits).video(frames, 2.0)
    assert seen.grid == (4, 10, 10)  # 25 tokens of 8 x 8 pixels each
    assert seen.num_rows == len(seen.layout) == 100


def test_frames_have_pixels_of_their_own():
    """Statistics, and torch's last bits, only for videos."""
    frame = picture(30, 22)
    own = views(video_pixels=Pixels((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), resizes_as="torch"))
    (seen,), (plain,) = own.video([frame] * 2, 2.0), views().images([frame])
    np.testing.assert_array_equal(own.images([frame])[0].pixels, plain.pixels)
    difference = seen.pixels / 4 + 0.5 - plain.pixels
    assert 1 / 256 < np.abs(difference).max() < 2.1 / 255


def test_pictures_of_which_nothing_is_left_are_refused():
    thin = NativeViews(Pixels(), FORMAT, ovis_size, 64, 4096)
    with pytest.raises(CorruptImage, match="an image of 9x1700 pixels is too thin for at most 4096"):
        thin.layouts([(9, 1700)])


def test_positions_of_a_video_follow_its_seconds():
    expected = [[t, r, c] for t in (0, 2, 5) for r in range(2) for c in range(1)]
    np.testing.assert_array_equal(rotary_positions((3, 2, 1), np.array([0, 2, 5])), expected)
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
    np.testing.assert_array_equal((joined.segment_ids > 0).sum(1), [lengths[0], 0, lengths[1]])
    assert one.join([[], []]) is None
    assert one.join([[], []], 0) is None


GREY = Pixels((0.0,), (1 / 255,), Image.Resampling.BOX)  # normalised pixels are the grey levels


def grey(height, width):
    return Image.fromarray(DRAW.integers(0, 256, (height, width), np.uint8))


def bounded(pixels, form, most, **fields):
    """Images of at most so many blocks."""
    return NativeViews(pixels, form, bounded_size, 1, most * form.block_size**2, **fields)


@pytest.mark.parametrize("channels_last", [False, True])
def test_patches_hold_the_pixels_of_the_resized_picture(channels_last):
    form = PatchFormat(2, merge_size=2, channels_last=channels_last)
    pages = [picture(8, 4), picture(4, 12)]
    blue_less = Pixels((0.0, 0.0, 100 / 255), (1 / 255,) * 3, Image.Resampling.BOX)
    made = bounded(blue_less, form, 3)
    packed = made.join([made.images(pages)], 24)
    assert packed.patches.shape == (1, 24, 12)
    np.testing.assert_array_equal(packed.segment_ids, [[1] * 8 + [2] * 12 + [0] * 4])
    for place in range(20):
        page = np.asarray(pages[packed.segment_ids[0, place] - 1])
        row, col = 2 * packed.positions[0, place]
        expected = page[row : row + 2, col : col + 2].astype(float) - np.array([0, 0, 100.0])
        if not channels_last:
            expected = expected.transpose(2, 0, 1)
        np.testing.assert_allclose(packed.patches[0, place], expected.reshape(-1), atol=1e-3)


def test_a_clip_shares_patches_in_time_and_the_size_of_its_first_frame():
    made = bounded(GREY, PatchFormat(2, temporal_patch_size=2, merge_size=1), 6)
    frames = [grey(4, 6), grey(5, 5), grey(4, 6)]
    (seen,) = made.video(frames, None)
    assert seen.num_rows == len(seen.layout) == made.video_load(3, (4, 6)) == 2 * 6
    packed = made.join([[seen]], 12)
    assert packed.segment_ids.tolist() == [[1] * 6 + [2] * 6]
    first = packed.patches[0, 0].reshape(2, 2, 2)
    np.testing.assert_allclose(first[0], np.asarray(frames[0])[:2, :2], atol=1e-3)
    last = packed.patches[0, 6].reshape(2, 2, 2)
    np.testing.assert_allclose(last[0], last[1])  # the third frame has no partner and is repeated


def test_counts_are_those_of_the_packed_patches():
    form = PatchFormat(2, merge_size=2)
    made = bounded(GREY, form, 10, block_tokens=4)
    for height, width in [(1, 1), (48, 48), (47, 200), (1000, 31), (3, 900), (640, 480), (14, 14), (4000, 4000)]:
        page = Image.new("L", (min(width, 90), min(height, 50)))
        packed = made.join([made.images([page])], packed_length(10, form))
        (layout,) = made.layouts([(page.height, page.width)])
        assert len(layout) == np.count_nonzero(packed.segment_ids) <= 40


def test_windows_decide_the_load_of_a_picture():
    """3 x 3 blocks in windows of 2 x 2: four windows of 4, 2, 2 and 1 blocks fill three rows of 16 patches."""
    made = bounded(GREY, PatchFormat(2, merge_size=2, window=2), 9)
    assert made.loads([(12, 12)]) == [48]
    (seen,) = made.images([grey(12, 12)])
    assert made.join([[seen]]).patches.shape == (1, 48, 4)
    assert made.join([[]], 48).segment_ids.tolist() == [[0] * 48]
