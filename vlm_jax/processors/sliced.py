"""MiniCPM-V's views: an image as a whole and, where it is large, slices of it, all packed at their own size."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from vlm_jax.processors.image import height_and_width
from vlm_jax.processors.native import NativeViews, Region
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.tiles import cut
from vlm_jax.processors.tiling import Size
from vlm_jax.processors.views import ItemSize, Layout, PreparedImage, Share, refuse_sizes, too_few
from vlm_jax.types import Grid


def area_size(size: Size, factor: int, min_pixels: int, max_pixels: int) -> Size:
    """(height, width) of about the area `max_pixels` and the aspect of `size`, rounded to multiples of `factor`.

    Rounding may enlarge the area; a long row or column has a side of `factor`.

    Args:
      size: (height, width), in pixels.
      factor: side of a block, in pixels.
      min_pixels: unread; small images are enlarged.
      max_pixels: of the result before rounding.

    Source: transformers, models/minicpmv4_6, MiniCPMV4_6ImageProcessorPil.find_best_resize.
    """
    del min_pixels
    aspect = size[1] / size[0]
    height = int(math.sqrt(max_pixels) / math.sqrt(aspect))
    return multiple_of(height, factor), multiple_of(int(height * aspect), factor)


def multiple_of(length: float | int, factor: int) -> int:
    """The multiple of `factor` that is nearest to a length, at least one; of two as near the even one."""
    return max(round(length / factor) * factor, factor)


def slice_grid(size: Size, most: int, side: int) -> Grid | None:
    """Rows and columns of the slices of an image, of the aspect nearest to its own; None where it has none.

    Args:
      size: (height, width) of the image, in pixels.
      most: maximum number of slices; an image with 1 has none.
      side: of a square whose area a slice has, in pixels.

    Source: transformers, models/minicpmv4_6, MiniCPMV4_6ImageProcessorPil.get_sliced_grid.
    """
    height, width = size
    wanted = min(math.ceil(width * height / (side * side)), most)
    if wanted <= 1:
        return None
    counts = [count for count in (wanted - 1, wanted, wanted + 1) if 1 < count <= most]
    grids = [(rows, count // rows) for count in counts for rows in range(1, count + 1) if count % rows == 0]
    aspect, best, nearest = math.log(width / height), (1, 1), math.inf
    for rows, cols in grids:
        distance = abs(aspect - math.log(cols / rows))
        if distance < nearest or (distance == nearest and rows > best[0]):
            best, nearest = (rows, cols), distance
    return best


class Cut(NamedTuple):
    """How an image is encoded.

    Attributes:
      whole: (height, width) of the image as a whole, in pixels.
      grid: rows and columns of slices; None without slices.
      part: (height, width) of a slice, in pixels.
    """

    whole: Size
    grid: Grid | None
    part: Size

    @property
    def sizes(self) -> list[Size]:
        """Of the whole, and of each slice."""
        return [self.whole, *[self.part] * (0 if self.grid is None else math.prod(self.grid))]


@dataclasses.dataclass(frozen=True)
class SlicedViews(NativeViews):
    """`NativeViews` of the image as a whole and of slices of it, each with a place in the text.

    `max_pixels` is the area of a view, of which `video_limits` are not read.

    Attributes:
      max_slices: maximum number of slices of an image; 1 for none.
      video_area: area of a view of a frame, in pixels.
      video_slices: maximum number of slices of a frame; 1 for none.
      most: maximum visual tokens of an image; None for no limit. Larger images have fewer slices, then fewer pixels.
      merge_sizes: sides in patches of the blocks of a visual token that the system's tower can make, its modes of
        downsampling.

    Source: Xu et al. 2024 (LLaVA-UHD), section 3.1; Yao et al. 2024 (MiniCPM-V), section 3.2; transformers,
    models/minicpmv4_6, MiniCPMV4_6ImageProcessorPil and MiniCPMV4_6VideoProcessor.
    """

    max_slices: int = 9
    video_area: int = 448 * 448
    video_slices: int = 9
    most: int | None = None
    merge_sizes: tuple[int, ...] = ()

    @property
    def most_tokens(self) -> int:
        """Of a view: rounding enlarges its area, but no more than this unless it is a long row or column of blocks."""
        return 2 * super().most_tokens

    def cut(self, size: Size, area: int, slices: int, most: int | None) -> Cut:
        """How an image is encoded.

        Args:
          size: (height, width) of the image, in pixels.
          area: of a view, in pixels.
          slices: maximum number of slices.
          most: maximum visual tokens; the fewest possible where no view has as few.
        """
        for count in range(slices, 0, -1):
            found = self._cut(size, area, count)
            if self._fits(found, most):
                return found
        unit = self.format.block_size**2
        for blocks in range(min(area, (most or 1) * unit) // unit, 0, -1):
            found = self._cut(size, blocks * unit, 1)
            if self._fits(found, most):
                break
        return found

    def _cut(self, size: Size, area: int, slices: int) -> Cut:
        unit = self.format.block_size
        whole, grid = self.size_rule(size, unit, 0, area), slice_grid(size, slices, math.isqrt(area))
        if grid is None:
            return Cut(whole, None, whole)
        height, width = (multiple_of(side, count) // count for side, count in zip(size, grid, strict=True))
        return Cut(whole, grid, self.size_rule((height, width), unit, 0, area))

    def _fits(self, found: Cut, most: int | None) -> bool:
        return most is None or sum(map(self._count, found.sizes)) <= most

    def _count(self, size: Size) -> int:
        return math.prod(size) // self.format.block_size**2 * self.block_tokens

    def _of_image(self, size: Size) -> Cut:
        return self.cut(size, self.max_pixels, self.max_slices, self.most)

    def _of_frame(self, num_frames: int, size: Size, max_tokens: int | None) -> Cut:
        share = None if max_tokens is None else max_tokens // num_frames
        if share is not None and max_tokens is not None and share < self.block_tokens:
            raise too_few(max_tokens, num_frames * self.block_tokens, f"a video of {num_frames} frames")
        return self.cut(size, self.video_area, self.video_slices, share)

    def size(self, size: Size) -> Size:
        """(height, width) of the image as a whole."""
        return self._of_image(size).whole

    def regions(self, size: Size) -> list[Region]:
        """The whole, then the slices."""
        found, unit = self._of_image(size), self.format.block_size
        whole, part = ((height // unit, width // unit) for height, width in (found.whole, found.part))
        regions = [Region((0.0, 0.0, 1.0, 1.0), whole)]
        rows, cols = found.grid or (0, 0)
        for row in range(rows):
            for col in range(cols):
                regions.append(Region((row / rows, col / cols, (row + 1) / rows, (col + 1) / cols), part))
        return regions

    def within(self, max_tokens: int) -> "SlicedViews":
        """The same with fewer slices, then fewer pixels; an image that is one long row of blocks may take more."""
        if max_tokens < self.block_tokens:
            raise too_few(max_tokens, self.block_tokens)
        return dataclasses.replace(self, most=max_tokens if self.most is None else min(self.most, max_tokens))

    def of_budget(self, tokens: int) -> "SlicedViews":
        """The same in the mode of downsampling of that number; another number is a bound, as in `within`.

        Raises:
          InfeasibleBudget: not even one block.
        """
        views = self.max_slices + (self.max_slices > 1)
        for merge_size in self.merge_sizes:
            block = (self.format.patch_size * merge_size) ** 2
            if tokens == views * (self.max_pixels // block) * self.block_tokens:
                return dataclasses.replace(self, format=dataclasses.replace(self.format, merge_size=merge_size))
        return self.within(tokens)

    def sized(self, size: ItemSize) -> "SlicedViews":
        """Raises `PictureMismatch` for any setting: views have one area."""
        refuse_sizes(size)
        return self

    def images(self, pictures: Sequence[Image.Image]) -> list[PreparedImage]:
        """Prepares every image independently."""
        return [
            _joined(self._views(picture, self.pixels, self._of_image(height_and_width(picture))))
            for picture in pictures
        ]

    def layouts(self, sizes: Sequence[Size]) -> list[Layout]:
        """The whole, then slice after slice."""
        return [np.arange(sum(len(share.layout) for share in shares)) for shares in self.shares(sizes)]

    def loads(self, sizes: Sequence[Size]) -> list[int]:
        """Sequence length of the packed patches of each image with its slices."""
        return [sum(share.load for share in shares) for shares in self.shares(sizes)]

    def tile_grids(self, sizes: Sequence[Size]) -> list[Grid | None]:
        """Rows and columns of slices."""
        return [self._of_image(size).grid for size in sizes]

    def shares(self, sizes: Sequence[Size]) -> list[list[Share]]:
        """One for the whole and each slice."""
        return [[self._share(view) for view in self._of_image(size).sizes] for size in sizes]

    def _share(self, view: Size) -> Share:
        return Share(self._layout(1, view, None), self._load(1, view))

    def video(
        self, frames: Sequence[Image.Image], fps: float | int | None, max_tokens: int | None = None
    ) -> list[PreparedImage]:
        """Every frame as an image, with its slices; all are sliced as the first."""
        del fps  # the frame rate is not used
        found = self._of_frame(len(frames), height_and_width(frames[0]), max_tokens)
        pixels = self.video_pixels or self.pixels
        return [view for frame in frames for view in self._views(frame, pixels, found)]

    def video_layouts(self, num_frames: int, size: Size, max_tokens: int | None = None) -> list[Layout]:
        """The layout of every view of every frame."""
        return [share.layout for share in self.video_shares(num_frames, size, max_tokens)]

    def video_load(self, num_frames: int, size: Size, max_tokens: int | None = None) -> int:
        """Sequence length of the packed patches of all frames."""
        return sum(share.load for share in self.video_shares(num_frames, size, max_tokens))

    def video_shares(self, num_frames: int, size: Size, max_tokens: int | None = None) -> list[Share]:
        """One for every view of every frame."""
        return [self._share(view) for view in self._of_frame(num_frames, size, max_tokens).sizes] * num_frames

    def frame_grid(self, num_frames: int, size: Size, max_tokens: int | None = None) -> Grid | None:
        """Rows and columns of slices of a frame."""
        return self._of_frame(num_frames, size, max_tokens).grid

    def _views(self, picture: Image.Image, pixels: Pixels, found: Cut) -> list[PreparedImage]:
        """The whole, and the slices."""
        views = [self._prepared([pixels.resized(picture, found.whole)], pixels, found.whole, None)]
        if found.grid is not None:
            (rows, cols), (height, width) = found.grid, found.part
            whole = pixels.resized(picture, (rows * height, cols * width))
            views += [self._prepared([tile], pixels, found.part, None) for tile in cut(whole, height, width)]
        return views


def _joined(views: Sequence[PreparedImage]) -> PreparedImage:
    """Views of one image as one; the only one as it is."""
    if len(views) == 1:
        return views[0]
    count = sum(view.num_rows for view in views)
    patches = np.concatenate([view.pixels for view in views])
    return PreparedImage(patches, count, np.arange(count), views[0].grid, tiles=tuple(views))
