"""Patches of images and videos of any size, and packing into one sequence of a fixed length.

This is NumPy on the host: the shapes of a compiled model do not depend on the packed images.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, Num

from vlm_jax.types import PADDING_SEGMENT, PackedPatches, PatchFormat

# Frames (after merging consecutive ones), rows and columns of patches.
Grid3D = tuple[int, int, int]


def patchify(
    frames: Num[np.ndarray, "frames height width channels"],
    *,
    patch_size: int,
    temporal_patch_size: int = 1,
    merge_size: int = 1,
    channels_last: bool = False,
) -> tuple[Num[np.ndarray, "N P"], Grid3D]:
    """Patchifies an image (one frame) or a video as in `PackedPatches.patches`, and returns its grid.

    Args:
      frames: pixels, normalised or not. The last frame is repeated up to a multiple of temporal_patch_size.
      patch_size: side of a patch in pixels.
      temporal_patch_size: frames of a patch.
      merge_size: side in patches of the blocks in which patches are ordered.
      channels_last: flattens a patch as (frame, row, column, channel), as in NaFlex, instead of
        (channel, frame, row, column).

    Raises:
      ValueError: height or width is not a multiple of patch_size * merge_size.

    Source: transformers, Qwen2VLImageProcessor._preprocess; big_vision, pp/proj/image_text/ops_naflex.py.
    """
    count, height, width, channels = frames.shape
    unit = patch_size * merge_size
    if height % unit or width % unit or not height or not width:
        raise ValueError(
            f"frames of {height}x{width} pixels cannot be divided into blocks of {merge_size}x{merge_size} patches "
            f"of {patch_size} pixels; resize both sides to a multiple of {unit}"
        )
    frames = np.concatenate([frames, np.repeat(frames[-1:], -count % temporal_patch_size, axis=0)])
    grid = (len(frames) // temporal_patch_size, height // patch_size, width // patch_size)
    blocks = frames.reshape(
        *(grid[0], temporal_patch_size),
        *(grid[1] // merge_size, merge_size, patch_size),
        *(grid[2] // merge_size, merge_size, patch_size),
        channels,
    )
    inside = (1, 4, 7, 8) if channels_last else (8, 1, 4, 7)
    rows = blocks.transpose(0, 2, 5, 3, 6, *inside)
    return rows.reshape(grid[0] * grid[1] * grid[2], -1), grid


def pack_patches(
    patches: Float[np.ndarray, "n P"],
    grids: Sequence[Sequence[int]] | Int[np.ndarray, "images 3"],
    *,
    merge_size: int = 1,
    window: int | None = None,
    length: int | None = None,
    class_tokens: bool = False,
) -> PackedPatches:
    """Packs the patches of several images into one sequence, a batch of 1; without images, only padding.

    With windows the sequence consists of rows of length window_length = (window * merge_size) ** 2, each
    filled with whole windows, largest first; truncated windows at an image's edge share a row. Without
    windows the patches are in the given order.

    Args:
      patches: rows of all images in the processor's order; see `PackedPatches`.
      grids: (frames, rows, columns) of every image or video, in patches.
      merge_size: side in patches of the blocks that become one visual token.
      window: side of an attention window, in blocks; None where no layer has windows.
      length: length of the sequence, for static shapes; as short as possible when
        None.
      class_tokens: also gives every image or frame a place after all patches, for a class token.

    Raises:
      ValueError: the grids do not fit the patches, the blocks, or the length; or class tokens with windows.
    """
    units = _checked(len(patches), grids, merge_size)
    if class_tokens and window is not None:
        raise ValueError("class tokens attend to whole images, of which windows hold parts; set window to None")
    block = merge_size**2
    row_length = block if window is None else window**2 * block
    windows = None if window is None else window_of_blocks(grids, merge_size, window)
    places = np.arange(units) if windows is None else _fill_rows(windows, row_length // block)
    if length is not None and window is not None and places.max(initial=-1) * block >= length:
        places = _one_after_another(grids, merge_size, window)  # never more than each image needs by itself
    positions, sizes, segments = _of_patches(grids, merge_size)
    num_classes = int(segments.max(initial=0)) if class_tokens else 0
    added = -(-num_classes // block) * block
    needed = -(-(int(places.max(initial=-1)) + 1) // (row_length // block)) * row_length + added
    length = needed if length is None else length
    if length < needed or length % row_length:
        raise ValueError(
            f"{units * block} patches need a length of {needed}, but length is {length}; pass a "
            f"multiple of {row_length} that is at least {needed}, or fewer images"
        )
    # In the processor's order: the index of every patch in the sequence.
    place = (places[:, None] * block + np.arange(block)).reshape(-1)

    def laid_out(values: np.ndarray, padding: int) -> np.ndarray:
        sequence = np.full((1, length, *values.shape[1:]), padding, values.dtype)
        sequence[0, place] = values
        return sequence

    order = None
    if windows is not None:
        order = np.concatenate([place, np.setdiff1d(np.arange(length), place)])[None].astype(np.int32)
    segment_ids = laid_out(segments, PADDING_SEGMENT)
    classes = len(place) + np.arange(num_classes)
    segment_ids[0, classes] = 1 + np.arange(num_classes)
    return PackedPatches(
        patches=laid_out(patches, 0),
        positions=laid_out(positions, 0),
        sizes=laid_out(sizes, 1),
        segment_ids=segment_ids,
        window_ids=None if windows is None else laid_out(np.repeat(windows, block), PADDING_SEGMENT),
        order=order,
        window_length=0 if window is None else row_length,
        class_tokens=np.isin(np.arange(length), classes)[None] if class_tokens else None,
    )


def num_places(grid: Grid3D, merge_size: int, window: int | None, class_tokens: bool = False) -> int:
    """Sequence length of one image or video; an upper bound for several is the sum.

    Args:
      grid: frames, rows and columns of patches.
      merge_size, window, class_tokens: as in `pack_patches`.
    """
    if window is None:
        return math.prod(grid) + (-(-grid[0] // merge_size**2) * merge_size**2 if class_tokens else 0)
    return _num_rows(grid, merge_size, window) * (window * merge_size) ** 2


@functools.lru_cache(1 << 14)
def _num_rows(grid: Grid3D, merge_size: int, window: int) -> int:
    places = _fill_rows(window_of_blocks([grid], merge_size, window), window**2)
    return int(places.max()) // window**2 + 1


def _one_after_another(grids: Sequence[Sequence[int]] | np.ndarray, merge_size: int, window: int) -> np.ndarray:
    """The index of every block where images do not share rows."""
    found, start = [np.zeros(0, int)], 0
    for frames, rows, cols in np.asarray(grids).tolist():
        places = _fill_rows(window_of_blocks([(frames, rows, cols)], merge_size, window), window**2)
        found.append(places + start)
        start += (int(places.max()) // window**2 + 1) * window**2
    return np.concatenate(found)


def window_of_blocks(grids: Sequence[Sequence[int]] | np.ndarray, merge_size: int, window: int) -> np.ndarray:
    """int32 [blocks], from 1: the window of each block of merge_size x merge_size patches.

    Windows are `window` x `window` blocks of one frame, in row-major order; those at the right and lower
    edge are smaller. A stable sort of blocks by window gives `window_index` of the released code.

    Source: Bai et al. 2025 (Qwen2.5-VL), section 2.1.1; transformers, get_vision_window_index.
    """
    found, count = [np.zeros(0, int)], 0
    for frames, rows, cols in np.asarray(grids).tolist():
        row, col = np.arange(rows // merge_size) // window, np.arange(cols // merge_size) // window
        of_frame = row[:, None] * (col[-1] + 1) + col
        per_frame = int(of_frame[-1, -1]) + 1
        of_image = np.arange(frames)[:, None, None] * per_frame + of_frame + 1 + count
        found.append(of_image.reshape(-1))
        count += frames * per_frame
    return np.concatenate(found).astype(np.int32)


def packed_length(blocks: int, format: PatchFormat, num_slots: int = 1) -> int:
    """A sequence length sufficient for any image of at most `blocks` blocks, in `num_slots` temporal patches.

    With windows, rows of whole windows are filled first-fit: any two rows together have more blocks than one
    can hold, so there are fewer than 2 * blocks / capacity rows.
    """
    if format.window is None:
        return num_places((num_slots, 1, 1), format.merge_size, None, format.class_tokens) + (
            blocks * format.merge_size**2 - num_slots
        )
    room = format.window**2
    return max(1, -(-2 * blocks // room) - 1) * room * format.merge_size**2


def _checked(num_patches: int, grids: Sequence[Sequence[int]] | np.ndarray, merge_size: int) -> int:
    """Checks the grids and returns the number of blocks."""
    table = np.asarray(grids)
    if table.ndim != 2 or table.shape[1] != 3 or table.min(initial=1) < 1:
        raise ValueError(f"grids must be rows of (frames, rows, columns), each at least 1, got {table.tolist()}")
    if odd := [tuple(grid) for grid in table.tolist() if grid[1] % merge_size or grid[2] % merge_size]:
        raise ValueError(
            f"grids {odd} cannot be merged by {merge_size}x{merge_size}: rows and columns must be multiples "
            f"of {merge_size}; resize the images to multiples of {merge_size} patches"
        )
    expected = int(table.prod(axis=1).sum())
    if num_patches != expected:
        raise ValueError(f"the grids {table.tolist()} have {expected} patches in total, but got {num_patches}")
    return expected // merge_size**2


def _of_patches(
    grids: Sequence[Sequence[int]] | np.ndarray, merge_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row, column), (rows, columns) and the frame number from 1 of every patch in order."""
    positions, sizes, segments = [np.zeros((0, 2), int)], [np.zeros((0, 2), int)], [np.zeros(0, int)]
    count = 0
    for frames, rows, cols in np.asarray(grids).tolist():
        blocks = np.moveaxis(np.mgrid[:rows, :cols], 0, -1)
        blocks = blocks.reshape(rows // merge_size, merge_size, cols // merge_size, merge_size, 2)
        of_frame = blocks.swapaxes(1, 2).reshape(-1, 2)
        positions.append(np.tile(of_frame, (frames, 1)))
        sizes.append(np.tile([[rows, cols]], (frames * rows * cols, 1)))
        segments.append(np.repeat(np.arange(count, count + frames) + 1, rows * cols))
        count += frames
    return tuple(np.concatenate(part).astype(np.int32) for part in (positions, sizes, segments))  # type: ignore


def _fill_rows(windows: np.ndarray, capacity: int) -> np.ndarray:
    """The index of every block: first-fit of windows, the largest first, into rows.

    Any two rows except the last hold more than `capacity` blocks together, so at most twice the
    minimum number of rows is used.
    """
    counts = np.bincount(windows)[1:]
    used: list[int] = []
    starts = np.zeros(len(counts), int)
    first = 0  # previous rows are full
    for i in np.argsort(-counts, kind="stable"):
        row = next((r for r in range(first, len(used)) if used[r] + counts[i] <= capacity), len(used))
        if row == len(used):
            used.append(0)
        starts[i] = row * capacity + used[row]
        used[row] += int(counts[i])
        while first < len(used) and used[first] == capacity:
            first += 1
    by_window = np.argsort(windows, kind="stable")
    rank = np.arange(len(windows)) - np.repeat(np.cumsum(counts) - counts, counts)
    places = np.empty(len(windows), int)
    places[by_window] = np.repeat(starts, counts) + rank
    return places
