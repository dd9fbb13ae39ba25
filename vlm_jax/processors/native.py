"""Pictures and videos at about their own size, as packed patches: Qwen2-VL, Qwen2.5-VL, Ovis 2.5."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int
from PIL import Image

from vlm_jax.processors.image import CorruptImage, height_and_width, scale_and_shift
from vlm_jax.processors.patches import num_places, pack_patches, patchify
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.tiling import Size
from vlm_jax.processors.views import Layout, PreparedImage, too_few
from vlm_jax.types import Fields, Grid, PackedPatches, PatchFormat, Tree

# Of a picture's size, the side of a block, and the least and most pixels: one of `smart_resize`.
SizeRule = Callable[[Size, int, int, int], Size]


@dataclasses.dataclass(frozen=True)
class VideoLimits:
    """How large the frames of a video are.

    Attributes:
      min_pixels, max_pixels: of a frame.
      max_tokens: of a video; many frames share them evenly, but for `min_pixels` with a margin of 5%.

    Source: Wang et al. 2024 (Qwen2-VL), section 3.2; qwen-vl-utils, vision_process.py, fetch_video.
    """

    min_pixels: int
    max_pixels: int
    max_tokens: int

    def pixels(self, num_slots: int, block_pixels: int) -> int:
        """Most pixels of a frame where the video has so many temporal patches."""
        share = self.max_tokens * block_pixels // num_slots
        return max(min(self.max_pixels, share), int(self.min_pixels * 1.05))


@dataclasses.dataclass(frozen=True)
class NativeViews:
    """Every picture with a grid of its own.

    Attributes:
      pixels: what is done to pixels.
      format: how patches are cut and packed.
      size_rule: the size that a picture is brought to.
      min_pixels, max_pixels: of a picture.
      block_tokens: visual tokens of a block.
      video_limits: limits of a video's frames; None where they are a picture's.
      video_pixels: what is done to the pixels of a video's frames; None where it is what is done to a picture's.
      image_edges, video_edges: the learned rows before and after a picture and a video; None without.
      rotary_3d: whether places have positions of time, row and column.
      tokens_per_second: temporal positions of a second of video; None where every temporal patch is one.
      num_left: how many tokens of so many of a picture, or of a video, a reducer leaves; None for all.
    """

    pixels: Pixels
    format: PatchFormat
    size_rule: SizeRule
    min_pixels: int
    max_pixels: int
    block_tokens: int = 1
    video_limits: VideoLimits | None = None
    video_pixels: Pixels | None = None
    image_edges: tuple[int, int] | None = None
    video_edges: tuple[int, int] | None = None
    rotary_3d: bool = False
    tokens_per_second: float | None = None
    num_left: Callable[[int], int] | None = None

    @property
    def channels(self) -> int:
        """As of `Views`."""
        return self.pixels.channels

    def images(self, pictures: Sequence[Image.Image]) -> list[PreparedImage]:
        """Every picture by itself."""
        return [
            self._prepared([picture], self.pixels, self.size(height_and_width(picture)), self.image_edges, 1.0)
            for picture in pictures
        ]

    def within(self, max_tokens: int) -> "NativeViews":
        """With fewer pixels; one so thin that its single row or column is longer takes more all the same."""
        edges = 0 if self.image_edges is None else len(self.image_edges)
        if max_tokens < edges + self.block_tokens:
            raise too_few(max_tokens, edges + self.block_tokens)
        blocks = (max_tokens - edges) // self.block_tokens
        most = min(self.max_pixels, blocks * self.format.block_size**2)
        if most == self.max_pixels:
            return self
        # Sides that grow are rounded up, and would not stay below a limit right above.
        return dataclasses.replace(self, max_pixels=most, min_pixels=min(self.min_pixels, most // 4))

    def retokened(self, tokens: Grid | int) -> "NativeViews":
        """With another number of tokens for a block."""
        return dataclasses.replace(self, block_tokens=tokens if isinstance(tokens, int) else math.prod(tokens))

    def layouts(self, sizes: Sequence[Size]) -> list[Layout]:
        """Block after block, between the edges."""
        return [self._layout(1, self.size(size), self.image_edges) for size in sizes]

    def loads(self, sizes: Sequence[Size]) -> list[int]:
        """Places of the packed patches of each picture."""
        return [self._load(1, self.size(size)) for size in sizes]

    def video(
        self, frames: Sequence[Image.Image], fps: float | int | None, max_tokens: int | None = None
    ) -> list[PreparedImage]:
        """A video in one place; its frames get the size of the first, a smaller one to meet `max_tokens`."""
        size = self._video_size(len(frames), height_and_width(frames[0]), max_tokens)
        interval = 1.0
        if self.tokens_per_second is not None and fps is not None:
            interval = self.tokens_per_second * self.format.temporal_patch_size / fps
        pixels = self.video_pixels or self.pixels
        return [self._prepared(frames, pixels, size, self.video_edges, interval)]

    def video_layouts(self, num_frames: int, size: Size, max_tokens: int | None = None) -> list[Layout]:
        """The layout of its one place."""
        size = self._video_size(num_frames, size, max_tokens)
        return [self._layout(self.format.num_slots(num_frames), size, self.video_edges)]

    def video_load(self, num_frames: int, size: Size, max_tokens: int | None = None) -> int:
        """Places of the packed patches of all frames."""
        return self._load(self.format.num_slots(num_frames), self._video_size(num_frames, size, max_tokens))

    def _video_size(self, num_frames: int, size: Size, max_tokens: int | None) -> Size:
        num_slots, unit = self.format.num_slots(num_frames), self.format.block_size
        least, most = self.min_pixels, self.max_pixels
        if self.video_limits is not None:
            least, most = self.video_limits.min_pixels, self.video_limits.pixels(num_slots, unit**2)
        if max_tokens is not None:
            edges = 0 if self.video_edges is None else len(self.video_edges)
            share = (max_tokens - edges) // (num_slots * self.block_tokens) * unit**2
            if share < unit**2:
                least_tokens = num_slots * self.block_tokens + edges
                raise too_few(max_tokens, least_tokens, f"a video of {num_frames} frames")
            if share < most:  # sides that grow are rounded up, and would not stay below a limit right above
                least, most = min(least, share // 4), share
        return self._size(size, least, most)

    def size(self, size: Size) -> Size:
        """(height, width) that a picture of a size is brought to.

        Raises:
          CorruptImage: it is too thin.
        """
        return self._size(size, self.min_pixels, self.max_pixels)

    def _size(self, size: Size, least: int, most: int) -> Size:
        found = self.size_rule(size, self.format.block_size, least, most)
        if not all(found):
            raise CorruptImage(f"a picture of {size[0]}x{size[1]} pixels is too thin for {most} pixels at most")
        return found

    def _layout(self, num_slots: int, size: Size, edges: tuple[int, int] | None) -> Layout:
        blocks = num_slots * math.prod(size) // self.format.block_size**2
        return _between(self._left(blocks * self.block_tokens), edges)

    def _left(self, count: int) -> int:
        return count if self.num_left is None else self.num_left(count)

    def _load(self, num_slots: int, size: Size) -> int:
        grid = (num_slots, size[0] // self.format.patch_size, size[1] // self.format.patch_size)
        return num_places(grid, self.format.merge_size, self.format.window)

    def join(self, rows: Sequence[Sequence[PreparedImage]], capacity: int | None = None) -> PackedPatches | None:
        """The patches of every row in one sequence, all of one length."""
        if capacity == 0 or (capacity is None and not any(rows)):
            return None
        form = self.format
        settings: Fields = {"merge_size": form.merge_size, "window": form.window, "length": capacity}
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
        interval: float,
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
        if depth < form.temporal_patch_size:  # a picture fills its patches with copies, which need no arithmetic
            shape = (1, -1) if form.channels_last else (pixels.channels, 1, -1)
            frame = values.reshape(len(values), *shape)
            values = np.repeat(frame, form.temporal_patch_size, axis=-2).reshape(len(values), -1)
        merged = (grid[0], grid[1] // form.merge_size, grid[2] // form.merge_size)
        positions = rotary_positions(merged, interval) if self.rotary_3d else None
        layout = self._layout(grid[0], size, edges)
        return PreparedImage(values, self._left(math.prod(merged) * self.block_tokens), layout, grid, positions)


def _normalised(patches: np.ndarray, pixels: Pixels, channels_last: bool) -> np.ndarray:
    """float32 of uint8 patches, whose values lie channel after channel, or pixel after pixel."""
    count = patches.shape[1] // pixels.channels
    spread = np.tile if channels_last else np.repeat
    scale, shift = (spread(part, count) for part in scale_and_shift(pixels.mean, pixels.std))
    values = patches.astype(np.float32)
    values *= scale
    values -= shift
    return values


def rotary_positions(grid: tuple[int, int, int], interval: float) -> Int[np.ndarray, "n 3"]:
    """(time, row, column) of the tokens of a grid of so many times, rows and columns.

    Args:
      grid: in tokens.
      interval: between two times; positions are truncated.

    Source: Wang et al. 2024 (Qwen2-VL), section 2.1; Bai et al. 2025 (Qwen2.5-VL), section 2.1.3.
    """
    positions = np.indices(grid).reshape(3, -1).T
    positions[:, 0] = (positions[:, 0] * np.float32(interval)).astype(np.int64)
    return positions


def _between(count: int, edges: tuple[int, int] | None) -> Layout:
    tokens = np.arange(count)
    return tokens if edges is None else np.concatenate([[-1 - edges[0]], tokens, [-1 - edges[1]]])
