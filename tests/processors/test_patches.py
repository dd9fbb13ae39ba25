import jax
import numpy as np
import pytest

from vlm_jax.processors.patches import num_places, pack_patches, packed_length, patchify, window_of_blocks
from vlm_jax.types import PatchFormat

from ..advice import tried

GRIDS = [(1, 6, 4), (2, 4, 10), (1, 2, 2)]


def numbered(grids, width=3):
    """Patches whose first value is their index."""
    count = int(np.prod(grids, axis=1).sum())
    return np.arange(count, dtype=np.float32)[:, None] + np.zeros(width, np.float32)


def test_patchify_cuts_where_a_loop_would():
    frames = np.random.default_rng(0).normal(size=(4, 8, 12, 3)).astype(np.float32)
    patches, grid = patchify(frames, patch_size=2, temporal_patch_size=2, merge_size=2)
    assert grid == (2, 4, 6)
    expected = [
        frames[2 * t : 2 * t + 2, 2 * row : 2 * row + 2, 2 * col : 2 * col + 2].transpose(3, 0, 1, 2).reshape(-1)
        for t in range(2)
        for row_block in range(2)
        for col_block in range(3)
        for row in (2 * row_block, 2 * row_block + 1)
        for col in (2 * col_block, 2 * col_block + 1)
    ]
    np.testing.assert_array_equal(patches, expected)


def test_channels_may_come_last():
    frames = np.random.default_rng(0).normal(size=(2, 4, 6, 3)).astype(np.float32)
    patches, grid = patchify(frames, patch_size=2, temporal_patch_size=2, channels_last=True)
    assert grid == (1, 2, 3)
    np.testing.assert_array_equal(patches[4], frames[:, 2:4, 2:4].reshape(-1))


def test_an_image_is_repeated_over_the_frames_of_a_patch():
    image = np.random.default_rng(0).normal(size=(1, 4, 4, 3)).astype(np.float32)
    once, grid = patchify(image, patch_size=2, temporal_patch_size=2)
    twice, _ = patchify(np.concatenate([image, image]), patch_size=2, temporal_patch_size=2)
    assert grid == (1, 2, 2)
    np.testing.assert_array_equal(once, twice)


@pytest.mark.parametrize("size", [(6, 8), (8, 6), (0, 8)])
def test_patchify_refuses_what_it_cannot_cut(size):
    advised = tried(
        "frames of {}x{} pixels cannot be divided into blocks of {2}x{2} patches of {2} pixels; resize both"
    )
    with pytest.raises(ValueError, match=advised):
        patchify(np.zeros((1, *size, 3), np.float32), patch_size=2, merge_size=2)
    whole = [max(-(-side // 4) * 4, 4) for side in size]  # a multiple of 4
    assert (
        patchify(np.zeros((1, *whole, 3), np.float32), patch_size=2, merge_size=2)[0].shape[0]
        == whole[0] * whole[1] // 4
    )


def test_positions_follow_the_order_of_patches():
    """Cutting an image of coordinates gives the coordinates of its patches."""
    rows, cols = 6, 4
    image = np.stack(np.mgrid[:rows, :cols], axis=-1)[None].astype(np.float32)
    patches, grid = patchify(image, patch_size=1, merge_size=2)
    packed = pack_patches(patches, [grid], merge_size=2)
    np.testing.assert_array_equal(packed.positions[0], patches)
    np.testing.assert_array_equal(packed.sizes[0], np.tile([[rows, cols]], (rows * cols, 1)))


def test_without_windows_patches_keep_their_places():
    packed = pack_patches(numbered(GRIDS), GRIDS, merge_size=2, length=120)
    assert packed.patches.shape == (1, 120, 3) and packed.order is None and packed.window_ids is None
    np.testing.assert_array_equal(packed.patches[0, :108, 0], np.arange(108))
    np.testing.assert_array_equal(packed.segment_ids[0], np.repeat([1, 2, 3, 4, 0], [24, 40, 40, 4, 12]))
    assert not packed.patches[0, 108:].any() and (packed.sizes > 0).all()


@pytest.mark.parametrize(("length", "places"), [(None, 112), (120, 120)])
def test_class_tokens_have_places_after_all_patches(length, places):
    packed = pack_patches(numbered(GRIDS), GRIDS, merge_size=2, length=length, class_tokens=True)
    padding = [0] * (places - 112)
    expected = [*np.repeat([1, 2, 3, 4], [24, 40, 40, 4]), 1, 2, 3, 4, *padding]
    np.testing.assert_array_equal(packed.segment_ids[0], expected)
    np.testing.assert_array_equal(packed.class_tokens[0], np.isin(np.arange(places), np.arange(108, 112)))
    assert not packed.patches[0, 108:].any()
    # A block for up to four frames; a video of five needs two.
    assert num_places((1, 6, 4), 2, None, True) == 28 and num_places((5, 2, 4), 2, None, True) == 48
    assert packed_length(10, PatchFormat(2, merge_size=2, class_tokens=True), 5) == 48
    with pytest.raises(ValueError, match="108 patches need a length of 112, but length is 108"):
        pack_patches(numbered(GRIDS), GRIDS, merge_size=2, length=108, class_tokens=True)
    with pytest.raises(ValueError, match=tried("of which windows hold parts; set window to None")):
        pack_patches(numbered(GRIDS), GRIDS, merge_size=2, window=2, class_tokens=True)


def test_windows_of_blocks_are_numbered_row_by_row():
    # 3x2 blocks, then two frames of 2x5 blocks, then one block, in windows of 2x2.
    expected = [1, 1, 1, 1, 2, 2, *([3, 3, 4, 4, 5] * 2), *([6, 6, 7, 7, 8] * 2), 9]
    np.testing.assert_array_equal(window_of_blocks(GRIDS, 2, 2), expected)


@pytest.mark.parametrize("length", [None, 160])
def test_rows_hold_whole_windows(length):
    packed = pack_patches(numbered(GRIDS), GRIDS, merge_size=2, window=2, length=length)
    places = packed.segment_ids.shape[1]
    # 27 blocks in windows of at most 4: 6 full ones, and 4 + 3 x 2 + 1 ... cut off at edges.
    assert packed.window_length == 16 and places == (length or 112)
    rows = packed.window_ids.reshape(-1, 16)
    for window in range(1, 10):
        assert (rows == window).any(axis=1).sum() == 1, f"window {window} is torn apart"
    windows = np.repeat(window_of_blocks(GRIDS, 2, 2), 4)
    index = packed.patches[0, :, 0].astype(int)
    real = packed.segment_ids[0] > 0
    np.testing.assert_array_equal(np.sort(index[real]), np.arange(108))
    np.testing.assert_array_equal(packed.window_ids[0][real], windows[index[real]])
    assert not packed.window_ids[0][~real].any()


def test_order_brings_patches_back():
    packed = pack_patches(numbered(GRIDS), GRIDS, merge_size=2, window=2, length=160)
    np.testing.assert_array_equal(np.sort(packed.order[0]), np.arange(160))
    np.testing.assert_array_equal(packed.patches[0, packed.order[0, :108], 0], np.arange(108))
    # Blocks stay together, so that they can be merged before they are brought back.
    blocks = packed.order[0].reshape(-1, 4)
    np.testing.assert_array_equal(blocks - blocks[:, :1], np.tile(np.arange(4), (40, 1)))
    assert (blocks[:, 0] % 4 == 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_never_more_than_twice_those_that_patches_fill(seed):
    random = np.random.default_rng(seed)
    grids = np.stack([random.integers(1, 3, 6), *(2 * random.integers(1, 9, (2, 6)))], axis=1)
    packed = pack_patches(numbered(grids), grids, merge_size=2, window=3)
    assert packed.segment_ids.size <= 2 * np.prod(grids, axis=1).sum() + packed.window_length


def test_packed_sequences_form_a_batch():
    parts = [
        pack_patches(numbered(grids), grids, merge_size=2, window=2, length=64) for grids in ([(1, 4, 6)], [(1, 8, 4)])
    ]
    batch = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    assert batch.patches.shape == (2, 64, 3) and batch.window_length == 16


@pytest.mark.parametrize(
    ("grids", "patches", "more", "message"),
    [
        (
            [(1, 6, 5)],
            30,
            {},
            tried("grids {[(1, 6, 5)]} cannot be merged by {2}x{2}: rows and columns must be multiples of {2}; resize"),
        ),
        ([(1, 4, 4), (1, 3, 4)], 28, {}, r"\[\(1, 3, 4\)\] cannot be merged"),
        ([(1, 4, 4)], 12, {}, "have 16 patches in total, but got 12"),
        ([(2, 4, 4)], 16, {}, "have 32 patches in total, but got 16"),
        ([(0, 4, 4)], 0, {}, "each at least 1"),
        ([], 0, {}, "rows of .frames, rows, columns."),
        ([(4, 4)], 16, {}, "rows of .frames, rows, columns."),
        (
            [(1, 4, 4)],
            16,
            {"length": 12},
            tried("{16} patches need a length of {16}, but length is {12}; pass a multiple of {4} that is at least"),
        ),
        ([(1, 4, 4)], 16, {"length": 18}, "multiple of 4"),
        ([(1, 4, 6)], 24, {"window": 2, "length": 24}, "24 patches need a length of 32, .* multiple of 16"),
    ],
)
def test_what_does_not_fit_is_refused(grids, patches, more, message):
    with pytest.raises(ValueError, match=message):
        pack_patches(np.zeros((patches, 3), np.float32), grids, merge_size=2, **more)


def test_patches_are_packed_as_messages_say():
    assert pack_patches(np.zeros((24, 3), np.float32), [(1, 6, 4)], merge_size=2).patches.shape[-2] == 24
    assert pack_patches(np.zeros((16, 3), np.float32), [(1, 4, 4)], merge_size=2, length=20).patches.shape[-2] == 20
    assert pack_patches(np.zeros((8, 3), np.float32), [(1, 4, 2)], merge_size=2, length=12).patches.shape[-2] == 12


@pytest.mark.parametrize("window", [2, 3, 4])
def test_the_length_holds_any_one_image(window):
    """Every grid of up to 15 x 15 blocks, one of two frames among them."""
    form = PatchFormat(2, merge_size=2, window=window)
    for rows in range(1, 16):
        for cols in range(1, 16):
            for frames in (1, 2):
                grid = (frames, 2 * rows, 2 * cols)
                assert num_places(grid, 2, window) <= packed_length(frames * rows * cols, form)
    assert packed_length(12, PatchFormat(2, merge_size=2)) == 48


@pytest.mark.parametrize("window", [None, 2, 3])
def test_the_places_of_each_image_hold_all_of_them(window):
    """A row whose length is the sum of `num_places` holds the images, whatever they are."""
    random = np.random.default_rng(0)
    for _ in range(100):
        grids = [(1, *(2 * random.integers(1, 9, 2)).tolist()) for _ in range(random.integers(1, 5))]
        length = sum(num_places(grid, 2, window) for grid in grids)
        packed = pack_patches(numbered(grids), grids, merge_size=2, window=window, length=length)
        real = packed.segment_ids[0] > 0
        np.testing.assert_array_equal(np.sort(packed.patches[0, real, 0]), np.arange(real.sum()))
