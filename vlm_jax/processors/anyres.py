"""LLaVA-NeXT's views: the whole image, and tiles of the image padded to a larger canvas, without the padding."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import Image

from vlm_jax.processors.image import height_and_width
from vlm_jax.processors.square import SquareViews
from vlm_jax.processors.tiling import Size, best_resolution
from vlm_jax.processors.views import Layout, PreparedImage, Tiles, too_few
from vlm_jax.types import Grid

Merge = Literal["flat", "spatial", "spatial_unpad"]
NEWLINE = -1  # in a layout: the first learned row


@dataclasses.dataclass(frozen=True)
class AnyresViews(Tiles):
    """The whole image as the first tile, then the tiles of the best of several canvases.

    | merge | the tokens of the tiles of the canvas |
    |---|---|
    | `flat` | tile after tile |
    | `spatial` | row after row of the canvas |
    | `spatial_unpad` | the same without padding, and with the learned row after every row |

    Attributes:
      base: normalises tiles, and resizes the whole image where there is no canvas.
      grid: rows and columns of tokens of a tile.
      canvases: (height, width) in pixels, in the release's order; empty for a single tile.
      side: side of a tile of a canvas, in pixels.
      merge: a row of the table.
      port: removes padding as in transformers, which rounds where the release truncates.

    Source: Liu et al. 2024 (LLaVA-NeXT); LLaVA, mm_utils.py, process_anyres_image, and llava_arch.py.
    """

    base: SquareViews
    grid: Grid
    canvases: tuple[Size, ...]
    side: int
    merge: Merge = "spatial_unpad"
    port: bool = False

    def images(self, pictures: Sequence[Image.Image]) -> list[PreparedImage]:
        """Prepares every image independently."""
        seen = []
        for picture, layout in zip(
            pictures, self.layouts([height_and_width(picture) for picture in pictures]), strict=True
        ):
            tiles = self.tiles(picture)
            seen.append(PreparedImage(self.base.pixels.tiles(tiles), len(tiles) * math.prod(self.grid), layout))
        return seen

    def tiles(self, picture: Image.Image) -> list[Image.Image]:
        """The tiles of an image, in 8 bits."""
        if not self.canvases:
            return [self.base.tile(picture)]
        short = min(self.base.size) if self.base.shortest_edge is None else self.base.shortest_edge
        canvas = self.canvas(picture)
        parts = [
            canvas.crop((left, top, left + self.side, top + self.side))
            for top in range(0, canvas.height, self.side)
            for left in range(0, canvas.width, self.side)
        ]
        return [self.base.tile(part) for part in (self.base.pixels.resized(picture, (short, short)), *parts)]

    def canvas(self, picture: Image.Image) -> Image.Image:
        """The image centred on its best canvas, with black padding."""
        rows, cols = best_resolution(height_and_width(picture), self.canvases)
        across, down = cols / picture.width, rows / picture.height
        if across < down:
            width, height = cols, min(math.ceil(picture.height * across), rows)
        else:
            width, height = min(math.ceil(picture.width * down), cols), rows
        canvas = Image.new("RGB", (cols, rows))
        canvas.paste(self.base.pixels.resized(picture, (height, width)), ((cols - width) // 2, (rows - height) // 2))
        return canvas

    def within(self, max_tokens: int) -> "AnyresViews":
        """The same views with only the canvases that take at most `max_tokens` for any image size."""
        if not self.canvases:
            self.base.within(max_tokens - (self.merge == "spatial_unpad"))
            return self
        whole = [dataclasses.replace(self, canvases=(size,)) for size in self.canvases]
        counts = [len(one._layout(one.canvases[0])) for one in whole]
        kept = tuple(size for size, count in zip(self.canvases, counts, strict=True) if count <= max_tokens)
        if not kept:
            raise too_few(max_tokens, min(counts))
        return dataclasses.replace(self, canvases=kept)

    def retokened(self, tokens: Grid | int) -> "AnyresViews":
        """The same views with other tokens per tile; without a grid, tile after tile and without the learned row."""
        if isinstance(tokens, int):
            return dataclasses.replace(self, grid=(1, tokens), merge="flat")
        return dataclasses.replace(self, grid=tokens)

    def loads(self, sizes: Sequence[Size]) -> list[int]:
        """Tiles of each image, including the whole image."""
        if not self.canvases:
            return [1] * len(sizes)
        canvases = [best_resolution(size, self.canvases) for size in sizes]
        return [1 + (height // self.side) * (width // self.side) for height, width in canvases]

    @property
    def tile_tokens(self) -> int:
        """Visual tokens of a tile."""
        return math.prod(self.grid)

    @property
    def tile_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of a tile."""
        return self.base.tile_shape

    def layouts(self, sizes: Sequence[Size]) -> list[Layout]:
        """The tokens of the whole image, then those of the canvas."""
        return [self._layout(size) for size in sizes]

    def _layout(self, size: Size) -> Layout:
        (rows, cols), count = self.grid, math.prod(self.grid)
        whole = np.arange(count)
        if not self.canvases:
            return np.append(whole, NEWLINE) if self.merge == "spatial_unpad" else whole
        height, width = best_resolution(size, self.canvases)
        down, across = height // self.side, width // self.side
        tokens = count + np.arange(down * across * count)
        if self.merge != "flat":
            tokens = tokens.reshape(down, across, rows, cols).swapaxes(1, 2).reshape(down * rows, across * cols)
        if self.merge == "spatial_unpad":
            tokens = unpadded(tokens, size, rounded=self.port)
            tokens = np.pad(tokens, ((0, 0), (0, 1)), constant_values=NEWLINE)
        return np.concatenate([whole, tokens.reshape(-1)])


def unpadded(canvas: np.ndarray, size: Size, *, rounded: bool) -> np.ndarray:
    """Removes the padding of a canvas.

    Args:
      canvas: [rows, columns, ...], with the image centred.
      size: original (height, width) of the image.
      rounded: rounds to the seventh decimal before a side is truncated, as in transformers.

    Source: LLaVA, llava_arch.py, unpad_image.
    """
    (height, width), (rows, cols) = size, canvas.shape[:2]
    if width / height > cols / rows:
        border = (rows - _truncated(height, cols, width, rounded)) // 2
        return canvas[border : rows - border]
    border = (cols - _truncated(width, rows, height, rounded)) // 2
    return canvas[:, border : cols - border]


def _truncated(side: int, new: int, old: int, rounded: bool) -> int:
    length = side * (new / old)
    return int(round(length, 7) if rounded else length)
