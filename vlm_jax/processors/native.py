"""Images and videos at native resolution, as packed patches: Qwen2-VL to Qwen3-VL, Ovis 2.5, others."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from PIL import Image

from vlm_jax.processors.image import CorruptImage, height_and_width, scale_and_shift
from vlm_jax.processors.patches import num_places, pack_patches, patchify
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.smart_resize import check_aspect
from vlm_jax.processors.tiling import Size
from vlm_jax.processors.views import ItemSize, Layout, PictureMismatch, PreparedImage, Share, shared, too_few
from vlm_jax.types import Fields, Grid, PackedPatches, PatchFormat, Tree

# Of an image whose size its message sets. Source: qwen-vl-utils, vision_process.py, MIN_PIXELS and MAX_PIXELS.
MIN_BLOCKS, MAX_BLOCKS = 4, 16384
# (size of an image, side of a block, minimum and maximum pixels) -> size: a function of `smart_resize`.
SizeRule = Callable[[Size, int, int, int], Size]


@dataclasses.dataclass(frozen=True)
class VideoLimits:
    """Limits of the frame size of videos.

    Attributes:
      min_pixels, max_pixels: of a frame.
      max_tokens: of a video, divided evenly by its frames; `min_pixels` with a margin of 5% takes precedence. None
        for no limit.

    Source: Wang et al. 2024 (Qwen2-VL), section 3.2; qwen-vl-utils, vision_process.py, fetch_video.
    """

    min_pixels: int
    max_pixels: int
    max_tokens: int | None = None

    def pixels(self, num_slots: int, block_pixels: int) -> int:
        """Maximum pixels of a frame of a video with `num_slots` temporal patches."""
        if self.max_tokens is None:
            return self.max_pixels
        share = self.max_tokens * block_pixels // num_slots
        return max(min(self.max_pixels, share), min(int(self.min_pixels * 1.05), self.max_pixels))


@dataclasses.dataclass(frozen=True)
class VolumeLimits:
    """Limits of the pixels of all frames of a video together.

    Attributes:
      min_pixels, max_pixels: of a video.
      max_tokens: of a frame, which also gets at most an even share of `max_pixels`, or `min_pixels` with a margin of
        5%; None for no limit.

    Source: transformers, models/qwen3_vl/video_processing_qwen3_vl.py, resize, and models/glm4v, smart_resize.
    """

    min_pixels: int
    max_pixels: int
    max_tokens: int | None = None

    def size(self, size: Size, num_frames: int, depth: int, unit: int) -> Size:
        """(height, width) of resized frames.

        Args:
          size: (height, width) of a frame, in pixels.
          num_frames: of the video.
          depth: frames of a temporal patch.
          unit: side of a block, in pixels.

        Raises:
          CorruptImage: one side is more than 200 times the other.
        """
        most, num_frames = self.max_pixels, max(num_frames, depth)  # a single frame is repeated
        if self.max_tokens is not None:
            share = min(self.max_tokens * unit**2, self.max_pixels // num_frames)
            most = max(share, int(self.min_pixels * 1.05)) * num_frames
        height, width = size
        if min(size) < unit:
            scale = max(unit / height, unit / width)
            height, width = int(height * scale), int(width * scale)
        check_aspect((height, width))
        rows, cols = round(height / unit), round(width / unit)
        volume = round(num_frames / depth) * depth * rows * cols * unit**2
        if volume > most:
            shrink = math.sqrt(num_frames * height * width / most)
            rows, cols = (max(1, math.floor(side / shrink / unit)) for side in (height, width))
        elif volume < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (num_frames * height * width))
            rows, cols = (math.ceil(side * grow / unit) for side in (height, width))
        return rows * unit, cols * unit

    def of_frames(self, unit: int) -> VideoLimits:
        """The limits of a video whose item has settings of its own, for blocks of `unit` pixels.

        Source: qwen-vl-utils, vision_process.py, VIDEO_MIN_TOKEN_NUM, VIDEO_MAX_TOKEN_NUM and MODEL_SEQ_LEN.
        """
        return VideoLimits(128 * unit**2, 768 * unit**2, 115_200)


class Region(NamedTuple):
    """A part of an image that is encoded by itself.

    Attributes:
      box: (top, left, bottom, right), as shares of the image's sides.
      blocks: rows and columns of blocks of patches.
    """

    box: tuple[float, float, float, float]
    blocks: Grid


@dataclasses.dataclass(frozen=True)
class NativeViews:
    """Every image with its own grid.

    Attributes:
      pixels: resizing and normalisation.
      format: how images are patchified and packed.
      size_rule: computes the size of a resized image.
      min_pixels, max_pixels: of an image.
      block_tokens: visual tokens of a block.
      video_limits: limits of a video's frames, each or all together; those of images when None.
      video_parts: whether each temporal patch of a video has a position of its own in the text.
      video_pixels: resizing and normalisation of a video's frames; `pixels` when None.
      box_scale: side of an image in the unit of an answer's JSON boxes; None for pixels of the model's input.
      image_edges, video_edges: the learned rows before and after an image and a video; None for none.
      rotary_3d: whether tokens have positions of time, row and column.
      tokens_per_second: temporal positions per second of video; None for one per temporal patch.
      seconds_first: a time is computed in seconds first, and then multiplied by `tokens_per_second` (Qwen2.5-Omni),
        which rounds to other positions at some rates than the product of the two.
      num_left: number of tokens of an image or a video before a reducer -> number after it; None for all.
      size_before: (height, width) to which an image counts as resized before `size_rule`; its own when None.
    """

    pixels: Pixels
    format: PatchFormat
    size_rule: SizeRule
    min_pixels: int
    max_pixels: int
    block_tokens: int = 1
    video_limits: VideoLimits | VolumeLimits | None = None
    video_parts: bool = False
    video_pixels: Pixels | None = None
    box_scale: int | None = None
    image_edges: tuple[int, int] | None = None
    video_edges: tuple[int, int] | None = None
    rotary_3d: bool = False
    tokens_per_second: float | None = None
    seconds_first: bool = False
    num_left: Callable[[int], int] | None = None
    size_before: Size | None = None

    @property
    def channels(self) -> int:
        """As in `Views`."""
        return self.pixels.channels

    @property
    def frames_per_part(self) -> int:
        """As in `Views`."""
        return self.format.temporal_patch_size

    @property
    def interpolates(self) -> bool:
        """False: every token is a row."""
        return False

    @property
    def most_tokens(self) -> int:
        """Visual tokens of an image of the maximum of pixels; a long row or column of blocks may take more."""
        return self.max_pixels // self.format.block_size**2 * self.block_tokens

    def regions(self, size: Size) -> list[Region]:
        """Where the tokens of an image are, one grid of blocks after another."""
        height, width = self.size(size)
        return [Region((0.0, 0.0, 1.0, 1.0), (height // self.format.block_size, width // self.format.block_size))]

    def images(self, pictures: Sequence[Image.Image]) -> list[PreparedImage]:
        """Prepares every image independently."""
        return [
            self._prepared([picture], self.pixels, self.size(height_and_width(picture)), self.image_edges)
            for picture in pictures
        ]

    def within(self, max_tokens: int) -> "NativeViews":
        """The same with fewer pixels; an image that is one long row or column of blocks may take more."""
        edges = 0 if self.image_edges is None else len(self.image_edges)
        if max_tokens < edges + self.block_tokens:
            raise too_few(max_tokens, edges + self.block_tokens)
        blocks = (max_tokens - edges) // self.block_tokens
        most = min(self.max_pixels, blocks * self.format.block_size**2)
        if most == self.max_pixels:
            return self
        # Enlarged sides are rounded up, and could exceed a limit slightly above.
        return dataclasses.replace(self, max_pixels=most, min_pixels=min(self.min_pixels, most // 4))

    def sized(self, size: ItemSize) -> "NativeViews":
        """The same with an item's own size, which takes precedence over the release's limits.

        Source: qwen-vl-utils, vision_process.py, fetch_image and fetch_video.
        """
        if size == ItemSize():
            return self
        unit = self.format.block_size**2
        least, most = _item_limits(size, self.min_pixels, self.max_pixels, unit)
        limits = self.video_limits
        if isinstance(limits, VolumeLimits):
            limits = limits.of_frames(self.format.block_size)
        if limits is not None:
            bounds = _item_limits(size, limits.min_pixels, limits.max_pixels, unit)
            tokens = limits.max_tokens if size.total_pixels is None else max(1, size.total_pixels // unit)
            limits = VideoLimits(*bounds, tokens)
        fields: Fields = {"min_pixels": least, "max_pixels": most, "video_limits": limits, "size_before": size.resized}
        return dataclasses.replace(self, **fields)

    def retokened(self, tokens: Grid | int) -> "NativeViews":
        """The same with another number of tokens per block."""
        return dataclasses.replace(self, block_tokens=tokens if isinstance(tokens, int) else math.prod(tokens))

    def layouts(self, sizes: Sequence[Size]) -> list[Layout]:
        """Block after block, between the edges."""
        return [self._layout(1, self.size(size), self.image_edges) for size in sizes]

    def loads(self, sizes: Sequence[Size]) -> list[int]:
        """Sequence length of the packed patches of each image."""
        return [self._load(1, self.size(size)) for size in sizes]

    def tile_grids(self, sizes: Sequence[Size]) -> list[Grid | None]:
        """Nones: there are no tiles."""
        return [None] * len(sizes)

    def shares(self, sizes: Sequence[Size]) -> list[list[Share]]:
        """One for each image."""
        return [[Share(*each)] for each in zip(self.layouts(sizes), self.loads(sizes), strict=True)]

    def video(
        self, frames: Sequence[Image.Image], fps: float | int | None, max_tokens: int | None = None
    ) -> list[PreparedImage]:
        """A video, whole or in parts; its frames get the size of the first, or a smaller one to meet `max_tokens`."""
        size = self._video_size(len(frames), height_and_width(frames[0]), max_tokens)
        pixels, depth = self.video_pixels or self.pixels, self.format.temporal_patch_size
        parts = [frames]
        if self.video_parts:
            parts = [frames[start : start + depth] for start in range(0, len(frames), depth)]
        return [self._prepared(part, pixels, size, self.video_edges, fps) for part in parts]

    def video_layouts(self, num_frames: int, size: Size, max_tokens: int | None = None) -> list[Layout]:
        """The layout of its single entry, or of each part."""
        size, num_slots = self._video_size(num_frames, size, max_tokens), self.format.num_slots(num_frames)
        parts = [1] * num_slots if self.video_parts else [num_slots]
        return [self._layout(count, size, self.video_edges) for count in parts]

    def video_load(self, num_frames: int, size: Size, max_tokens: int | None = None) -> int:
        """Sequence length of the packed patches of all frames."""
        size, num_slots = self._video_size(num_frames, size, max_tokens), self.format.num_slots(num_frames)
        return num_slots * self._load(1, size) if self.video_parts else self._load(num_slots, size)

    def video_shares(self, num_frames: int, size: Size, max_tokens: int | None = None) -> list[Share]:
        """One for all, or one for each part."""
        layouts = self.video_layouts(num_frames, size, max_tokens)
        return shared(layouts, self.video_load(num_frames, size, max_tokens))

    def frame_grid(self, num_frames: int, size: Size, max_tokens: int | None = None) -> Grid | None:
        """None: there are no tiles."""
        del num_frames, size, max_tokens
        return None

    def kept_frames(self, num_frames: int, size: Size, max_tokens: int | None = None) -> Sequence[int]:
        """All frames."""
        del size, max_tokens
        return range(num_frames)

    def _video_size(self, num_frames: int, size: Size, max_tokens: int | None) -> Size:
        num_slots, unit = self.format.num_slots(num_frames), self.format.block_size
        least, most = self.min_pixels, self.max_pixels
        found = None
        if isinstance(self.video_limits, VolumeLimits):
            found = self.video_limits.size(size, num_frames, self.format.temporal_patch_size, unit)
            most = math.prod(found)
        elif self.video_limits is not None:
            least, most = self.video_limits.min_pixels, self.video_limits.pixels(num_slots, unit**2)
        if max_tokens is not None:
            edges = 0 if self.video_edges is None else len(self.video_edges) * (num_slots if self.video_parts else 1)
            share = (max_tokens - edges) // (num_slots * self.block_tokens) * unit**2
            if share < unit**2:
                least_tokens = num_slots * self.block_tokens + edges
                raise too_few(max_tokens, least_tokens, f"a video of {num_frames} frames")
            if share < most:  # enlarged sides are rounded up, and could exceed a limit slightly above
                least, most, found = min(least, share // 4), share, None
        return found or self._size(size, least, most)

    def size(self, size: Size) -> Size:
        """(height, width) of the resized image.

        Raises:
          CorruptImage: its aspect ratio is too large.
        """
        return self._size(size, self.min_pixels, self.max_pixels)

    def _size(self, size: Size, least: int, most: int) -> Size:
        found = self.size_rule(self.size_before or size, self.format.block_size, least, most)
        if not all(found):
            raise CorruptImage(f"an image of {size[0]}x{size[1]} pixels is too thin for at most {most} pixels")
        return found

    def _layout(self, num_slots: int, size: Size, edges: tuple[int, int] | None) -> Layout:
        blocks = num_slots * math.prod(size) // self.format.block_size**2
        return _between(self._left(blocks * self.block_tokens), edges)

    def _left(self, count: int) -> int:
        return count if self.num_left is None else self.num_left(count)

    def _load(self, num_slots: int, size: Size) -> int:
        grid = (num_slots, size[0] // self.format.patch_size, size[1] // self.format.patch_size)
        return num_places(grid, self.format.merge_size, self.format.window, self.format.class_tokens)

    def join(
        self, rows: Sequence[Sequence[PreparedImage]], capacity: int | None = None, pictures: int | None = None
    ) -> PackedPatches | None:
        """The patches of every row as one sequence, all of one length."""
        if capacity == 0 or (capacity is None and not any(rows)):
            return None
        form = self.format
        settings: Fields = {
            "merge_size": form.merge_size,
            "window": form.window,
            "length": capacity,
            "class_tokens": form.class_tokens,
        }
        channels = len((self.video_pixels or self.pixels).mean)
        none = np.zeros((0, channels * form.temporal_patch_size * form.patch_size**2), np.float32)
        patches = [np.concatenate([none, *(image.pixels for image in row)]) for row in rows]
        grids: list[Tree] = [[image.grid for image in row] or np.zeros((0, 3), int) for row in rows]
        packed = [pack_patches(part, grid, **settings) for part, grid in zip(patches, grids, strict=True)]
        if capacity is None and len(packed) > 1:
            settings["length"] = max(part.patches.shape[1] for part in packed)
            packed = [pack_patches(part, grid, **settings) for part, grid in zip(patches, grids, strict=True)]
        fields = {
            field.name: np.concatenate([getattr(part, field.name) for part in packed])
            for field in dataclasses.fields(PackedPatches)  # type: ignore
            if isinstance(getattr(packed[0], field.name), np.ndarray)
        }
        return dataclasses.replace(packed[0], **fields)  # type: ignore

    def _prepared(
        self,
        frames: Sequence[Image.Image],
        pixels: Pixels,
        size: Size,
        edges: tuple[int, int] | None,
        fps: float | int | None = None,
    ) -> PreparedImage:
        form = self.format
        resized = np.stack([pixels.array(pixels.resized(frame, size)) for frame in frames])
        depth = 1 if len(frames) == 1 else form.temporal_patch_size
        patches, grid = patchify(
            resized,
            patch_size=form.patch_size,
            temporal_patch_size=depth,
            merge_size=form.merge_size,
            channels_last=form.channels_last,
        )
        values = _normalised(patches, pixels, form.channels_last)
        if depth < form.temporal_patch_size:  # an image is repeated over time, which needs no arithmetic
            shape = (1, -1) if form.channels_last else (pixels.channels, 1, -1)
            frame = values.reshape(len(values), *shape)
            values = np.repeat(frame, form.temporal_patch_size, axis=-2).reshape(len(values), -1)
        merged = (grid[0], grid[1] // form.merge_size, grid[2] // form.merge_size)
        positions = rotary_positions(merged, self._times(grid[0], fps)) if self.rotary_3d else None
        layout = self._layout(grid[0], size, edges)
        return PreparedImage(values, self._left(math.prod(merged) * self.block_tokens), layout, grid, positions)

    def _times(self, count: int, fps: float | int | None) -> Int[np.ndarray, " count"]:
        """Temporal positions of a video's temporal patches, computed in float32 and truncated as in the releases."""
        numbers = np.arange(count)
        if self.tokens_per_second is None or fps is None:
            return numbers
        factors = np.float32(self.format.temporal_patch_size / fps), np.float32(self.tokens_per_second)
        found = numbers.astype(np.float32)
        found = found * factors[0] * factors[1] if self.seconds_first else found * (factors[0] * factors[1])
        return found.astype(np.int64)


def _item_limits(size: ItemSize, least: int, most: int, block_pixels: int) -> tuple[int, int]:
    """Minimum and maximum pixels of an item, from the release's."""
    smallest, largest = MIN_BLOCKS * block_pixels, MAX_BLOCKS * block_pixels
    if size.resized is not None:
        return smallest, largest
    found_least = least if size.min_pixels is None else size.min_pixels
    found_most = max(most, found_least) if size.max_pixels is None else size.max_pixels
    if found_most < block_pixels:
        raise PictureMismatch(f"max_pixels: expected at least one block of {block_pixels} pixels, got {found_most}")
    return (min(smallest, found_most) if found_least > found_most else found_least), found_most


def _normalised(patches: np.ndarray, pixels: Pixels, channels_last: bool) -> np.ndarray:
    """Normalised float32 of uint8 patches, whose values are ordered by channel or by pixel."""
    count = patches.shape[1] // pixels.channels
    spread = np.tile if channels_last else np.repeat
    scale, shift = (spread(part, count) for part in scale_and_shift(pixels.mean, pixels.std))
    values = patches.astype(np.float32)
    values *= scale
    values -= shift
    return values


def rotary_positions(grid: tuple[int, int, int], times: Int[np.ndarray, " times"]) -> Int[np.ndarray, "n 3"]:
    """(time, row, column) of the tokens of a grid.

    Args:
      grid: times, rows and columns, in tokens.
      times: temporal position of each time.

    Source: Wang et al. 2024 (Qwen2-VL), section 2.1; Bai et al. 2025 (Qwen2.5-VL), section 2.1.3.
    """
    positions = np.indices(grid).reshape(3, -1).T
    positions[:, 0] = times[positions[:, 0]]
    return positions


def _between(count: int, edges: tuple[int, int] | None) -> Layout:
    tokens = np.arange(count)
    return tokens if edges is None else np.concatenate([[-1 - edges[0]], tokens, [-1 - edges[1]]])
