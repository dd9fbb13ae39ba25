"""Gemma 3's pan and scan: the whole image, then crops of equal size along the longer side of an oblong one."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from vlm_jax.processors.image import height_and_width
from vlm_jax.processors.square import SquareViews
from vlm_jax.processors.tiling import Size
from vlm_jax.processors.views import Layout, PreparedImage, Tiles, too_few
from vlm_jax.types import Grid


@dataclasses.dataclass(frozen=True)
class CropViews(Tiles):
    """The image as one tile, then as many crops of it as its aspect ratio, rounded, each as a tile.

    Each tile has a place of its own in the text.

    Attributes:
      whole: makes a tile of an image, and of a crop.
      max_crops: of an image; 0 for none.
      min_crop_size: shortest side of a crop, in pixels; an image whose crops would be smaller has none.
      min_ratio: of the longer side to the shorter one; an image with a smaller ratio has no crops.
      active: whether there are crops at all.

    Source: Gemma Team 2025 (Gemma 3), section 2.1; transformers, models/gemma3/image_processing_pil_gemma3.py,
    `pan_and_scan`.
    """

    whole: SquareViews
    max_crops: int = 4
    min_crop_size: int = 256
    min_ratio: float = 1.2
    active: bool = True

    def grid(self, size: Size) -> Grid | None:
        """Rows and columns of crops of an image of `size`, one of them 1; None for no crops."""
        long, short = max(size), min(size)
        if not self.active or not self.max_crops or long / short < self.min_ratio:
            return None
        wanted = min(math.floor(long / self.min_crop_size), math.floor(long / short + 0.5))
        length = math.ceil(long / min(self.max_crops, max(2, wanted)))
        if min(length, short) < self.min_crop_size:
            return None
        count = math.ceil(long / length)
        return (1, count) if size[1] >= size[0] else (count, 1)

    def tile_grids(self, sizes: Sequence[Size]) -> list[Grid | None]:
        """See `Views`; the tile of the whole image comes first."""
        return [self.grid(size) for size in sizes]

    def images(self, pictures: Sequence[Image.Image]) -> list[PreparedImage]:
        """Prepares every image independently."""
        found = []
        for picture in pictures:
            tiles = [self.whole.tile(one) for one in (picture, *self.crops(picture))]
            count = len(tiles) * self.tile_tokens
            found.append(PreparedImage(self.whole.pixels.tiles(tiles), count, np.arange(count)))
        return found

    def crops(self, picture: Image.Image) -> list[Image.Image]:
        """The crops of an image, in its own pixels; the last one may be smaller."""
        height, width = height_and_width(picture)
        grid = self.grid((height, width))
        if grid is None:
            return []
        down, across = math.ceil(height / grid[0]), math.ceil(width / grid[1])
        return [
            picture.crop((left, top, min(left + across, width), min(top + down, height)))
            for top in range(0, height, down)
            for left in range(0, width, across)
        ]

    def within(self, max_tokens: int) -> "CropViews":
        """The same views with fewer crops, or with none."""
        most = max_tokens // self.tile_tokens - 1 if self.tile_tokens else 0
        if most < 0:
            raise too_few(max_tokens, self.tile_tokens)
        return dataclasses.replace(self, max_crops=min(self.max_crops, most if most > 1 else 0))

    def retokened(self, tokens: Grid | int) -> "CropViews":
        """The same views with another number of tokens per tile."""
        return dataclasses.replace(self, whole=self.whole.retokened(tokens))

    def layouts(self, sizes: Sequence[Size]) -> list[Layout]:
        """Tile after tile."""
        return [np.arange(count * self.tile_tokens) for count in self.loads(sizes)]

    def loads(self, sizes: Sequence[Size]) -> list[int]:
        """Tiles of each image, including the whole image."""
        return [1 if grid is None else 1 + math.prod(grid) for grid in map(self.grid, sizes)]

    @property
    def tile_tokens(self) -> int:
        """Visual tokens of a tile."""
        return self.whole.tile_tokens

    @property
    def tile_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of a tile."""
        return self.whole.tile_shape
