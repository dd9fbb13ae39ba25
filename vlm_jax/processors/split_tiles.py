"""Idefics3's and SmolVLM's views: tiles that the text names by row and column, then the whole image."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from vlm_jax.processors.image import height_and_width
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.tiles import FrameTiles, cut
from vlm_jax.processors.tiling import Size
from vlm_jax.processors.views import NO_VIDEOS, Layout, PictureMismatch, PreparedImage, too_few
from vlm_jax.types import Grid

MAX_EDGE = 4096  # of any image, in pixels


@dataclasses.dataclass(frozen=True)
class SplitViews(FrameTiles):
    """Tiles of the image, resized to a longest edge and stretched to whole tiles, then all of it as one tile.

    Each tile has a place of its own in the text, where the prompt names it. A frame of a video is one tile.

    Attributes:
      pixels: resizing and normalisation.
      side: side of a tile, in pixels.
      num_tokens: visual tokens of a tile.
      longest_edge: of the resized image, in pixels.
      splits: whether an image is divided; else it is one tile.
      video_pixels: resizing and normalisation of a video's frames; `pixels` when None.
      video_edge: longest edge to which frames are resized before they are tiles; None where videos are not supported.

    Source: Laurençon et al. 2024 (Idefics3), section 4.1; transformers, image_processing_pil_idefics3.py of
    models/idefics3 and video_processing_smolvlm.py of models/smolvlm.
    """

    pixels: Pixels
    side: int
    num_tokens: int
    longest_edge: int = 1456
    splits: bool = True
    video_pixels: Pixels | None = None
    video_edge: int | None = None

    def grid(self, size: Size) -> Grid:
        """Rows and columns of tiles of an image of `size`, without the whole image."""
        if not self.splits:
            return 1, 1
        height, width = whole_tiles(resized_size(size, self.longest_edge), self.side)
        return height // self.side, width // self.side

    def tile_grids(self, sizes: Sequence[Size]) -> list[Grid | None]:
        """See `Views`."""
        grids = [self.grid(size) for size in sizes]
        return [None if grid == (1, 1) else grid for grid in grids]

    def tiles(self, picture: Image.Image) -> list[Image.Image]:
        """The tiles of an image, in 8 bits."""
        size, tile = height_and_width(picture), (self.side, self.side)
        (rows, cols), resized = self.grid(size), self.pixels.resized(picture, resized_size(size, self.longest_edge))
        stretched = self.pixels.resized(resized, (rows * self.side, cols * self.side))
        if rows * cols == 1:
            return [stretched]
        return [*cut(stretched, *tile), self.pixels.resized(stretched, tile)]

    def images(self, pictures: Sequence[Image.Image]) -> list[PreparedImage]:
        """Prepares every image independently."""
        return [self._prepared(self.tiles(picture), self.pixels) for picture in pictures]

    def within(self, max_tokens: int) -> "SplitViews":
        """The same views with a shorter longest edge, or without splitting."""
        edge = min(self.longest_edge, MAX_EDGE)
        most = math.ceil((edge + edge % 2) / self.side) if self.splits else 1  # the other side is rounded up to even
        for count in range(most, 1, -1):
            if (count * count + 1) * self.num_tokens <= max_tokens:
                return dataclasses.replace(self, longest_edge=min(self.longest_edge, count * self.side // 2 * 2))
        if self.num_tokens > max_tokens:
            raise too_few(max_tokens, self.num_tokens)
        return dataclasses.replace(self, splits=False)

    def retokened(self, tokens: Grid | int) -> "SplitViews":
        """The same views with another number of tokens per tile."""
        return dataclasses.replace(self, num_tokens=tokens if isinstance(tokens, int) else math.prod(tokens))

    def layouts(self, sizes: Sequence[Size]) -> list[Layout]:
        """Tile after tile."""
        return [np.arange(count * self.num_tokens) for count in self.loads(sizes)]

    def loads(self, sizes: Sequence[Size]) -> list[int]:
        """Tiles of each image, including the whole image."""
        counts = [math.prod(self.grid(size)) for size in sizes]
        return [count + (count > 1) for count in counts]

    def video_load(self, num_frames: int, size: Size, max_tokens: int | None = None) -> int:
        """See `FrameTiles`.

        Raises:
          PictureMismatch: there is no `video_edge`.
        """
        if self.video_edge is None:
            raise PictureMismatch(NO_VIDEOS)
        return super().video_load(num_frames, size, max_tokens)

    def frame_tile(self, frame: Image.Image) -> Image.Image:
        """The frame at the longest edge, then as a tile."""
        assert self.video_edge is not None
        pixels = self.frame_pixels
        resized = pixels.resized(frame, resized_size(height_and_width(frame), min(self.video_edge, MAX_EDGE)))
        return pixels.resized(resized, (self.side, self.side))


def resized_size(size: Size, longest_edge: int) -> Size:
    """(height, width) at a longest edge and about the same aspect; the other side is even, or 1.

    Above `MAX_EDGE` pixels the image is shrunk once more.
    """
    height, width = size
    aspect = width / height
    if width >= height:
        height, width = int(longest_edge / aspect), longest_edge
        height += height % 2
    else:
        height, width = longest_edge, int(longest_edge * aspect)
        width += width % 2
    height, width = max(height, 1), max(width, 1)
    aspect = width / height
    if width >= height and width > MAX_EDGE:
        height, width = int(MAX_EDGE / aspect), MAX_EDGE
    elif height > width and height > MAX_EDGE:
        height, width = MAX_EDGE, int(MAX_EDGE * aspect)
    return max(height, 1), max(width, 1)


def whole_tiles(size: Size, side: int) -> Size:
    """(height, width) of the tiles that cover an image: the longer side is rounded up first, then the other's part."""
    height, width = size
    aspect = width / height
    if width >= height:
        width = math.ceil(width / side) * side
        return math.ceil(int(width / aspect) / side) * side, width
    height = math.ceil(height / side) * side
    return height, math.ceil(int(height * aspect) / side) * side
