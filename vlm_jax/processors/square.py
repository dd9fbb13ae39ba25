"""One view of fixed size per image: CLIP, SigLIP, LLaVA-1.5, MobileVLM, Qwen-VL, DeepSeek-VL."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import Image

from vlm_jax.processors.image import padded, square_padded
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.thin import Axis, is_large, resized_part
from vlm_jax.processors.tiling import Size
from vlm_jax.processors.views import Layout, PreparedImage, Tiles, joined_tiles, too_few
from vlm_jax.types import Grid, TwoSizes

Fit = Literal["stretch", "crop", "crop_rounded", "pad", "pad_evenly", "shrink", "shrink_rounded"]


@dataclasses.dataclass(frozen=True)
class SquareViews(Tiles):
    """Every image as one tile.

    | fit | how |
    |---|---|
    | `stretch` | to the size, without keeping the aspect ratio |
    | `crop` | its shorter side to `shortest_edge`, then a central crop |
    | `crop_rounded` | the same with a rounded centre, halves to even: torchvision |
    | `pad` | to a square with the background first, then as `crop` |
    | `pad_evenly` | the same with borders of equal width, an odd pixel less, then as `crop_rounded`: Prismatic |
    | `shrink` | its longer side to the size, the other truncated, then to a square with the background |
    | `shrink_rounded` | the same, the other side rounded: DeepSeek-VL in transformers |

    Attributes:
      pixels: resizing and normalisation.
      size: (height, width) of the tile, in pixels.
      num_tokens: visual tokens of a tile; 1 where an encoder returns one vector.
      fit: a row of the table.
      shortest_edge: for crops and paddings before them, in pixels; the smaller side of `size` when None.
      background: colour of padding in 8 bits; the mean of `pixels` when None.
      min_size: minimum length of a side in pixels in `shrink`.

    Source: transformers, models/clip/image_processing_clip.py; LLaVA, mm_utils.py, process_images;
    DeepSeek-VL, models/image_processing_vlm.py.
    """

    pixels: Pixels
    size: Size
    num_tokens: int = 1
    fit: Fit = "stretch"
    shortest_edge: int | None = None
    background: tuple[int, ...] | None = None
    min_size: int = 14

    def images(self, pictures: Sequence[Image.Image]) -> list[PreparedImage]:
        """Prepares every image independently."""
        layout = np.arange(self.num_tokens)
        return [PreparedImage(self.pixels.tiles([self.tile(picture)]), self.num_tokens, layout) for picture in pictures]

    def within(self, max_tokens: int) -> "SquareViews":
        """These views: the number of tokens is fixed."""
        if self.num_tokens > max_tokens:
            raise too_few(max_tokens, self.num_tokens)
        return self

    def retokened(self, tokens: Grid | int) -> "SquareViews":
        """The same views with another number of tokens."""
        return dataclasses.replace(self, num_tokens=tokens if isinstance(tokens, int) else math.prod(tokens))

    def layouts(self, sizes: Sequence[Size]) -> list[Layout]:
        """The same layout for every image."""
        return [np.arange(self.num_tokens)] * len(sizes)

    def loads(self, sizes: Sequence[Size]) -> list[int]:
        """One tile each."""
        return [1] * len(sizes)

    @property
    def tile_tokens(self) -> int:
        """Visual tokens of a tile."""
        return self.num_tokens

    @property
    def tile_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of a tile."""
        return (*self.size, self.pixels.channels)

    def tile(self, picture: Image.Image) -> Image.Image:
        """The image at the tile's size, in 8 bits."""
        if self.fit == "stretch":
            return self.pixels.resized(picture, self.size)
        if self.fit in ("shrink", "shrink_rounded"):
            return self._shrunk(picture)
        return self._cropped(picture)

    @property
    def _colour(self) -> tuple[int, ...]:
        return self.background or self.pixels.mean_colour

    def _cropped(self, picture: Image.Image) -> Image.Image:
        short = min(self.size) if self.shortest_edge is None else self.shortest_edge
        canvas = self._canvas(picture)
        long = int(short * max(canvas) / min(canvas))
        resized = (long, short) if canvas[0] > canvas[1] else (short, long)
        height, width = self.size
        spare = (resized[0] - width, resized[1] - height)
        left, top = (
            round(length / 2) if self.fit in ("crop_rounded", "pad_evenly") else length // 2 for length in spare
        )
        if min(left, top) >= 0 and (is_large(canvas, picture) or is_large(resized, picture)):
            columns, rows = (
                Axis((whole - own) // 2, whole, new, (first, first + kept))
                for whole, own, new, first, kept in zip(
                    canvas, picture.size, resized, (left, top), (width, height), strict=True
                )
            )
            options = {"colour": self._colour, "as_torch": self.pixels.resizes_as == "torch"}
            picture = picture.convert("RGB") if canvas != picture.size and picture.mode != "RGB" else picture
            return resized_part(picture, rows, columns, self.pixels.resample, **options)
        picture = padded(picture, canvas, self._colour)
        picture = self.pixels.resized(picture, (resized[1], resized[0]))
        if (left, top, picture.width, picture.height) == (0, 0, width, height):
            return picture
        return picture.crop((left, top, left + width, top + height))

    def _canvas(self, picture: Image.Image) -> tuple[int, int]:
        """(width, height) of the image with its padding."""
        longer = max(picture.size)
        if self.fit == "pad_evenly":
            width, height = (side + (longer - side) // 2 * 2 for side in picture.size)
            return width, height
        return (longer, longer) if self.fit == "pad" else picture.size

    def _shrunk(self, picture: Image.Image) -> Image.Image:
        long, side = max(picture.size), self.size[0]
        if self.fit == "shrink":
            width, height = (max(int(length / long * side), self.min_size) for length in picture.size)
        else:
            width, height = (max(round(length * (side / long)), self.min_size) for length in picture.size)
        return square_padded(self.pixels.resized(picture, (height, width)), self._colour)


@dataclasses.dataclass(frozen=True)
class TwoSizeViews(Tiles):
    """Every image as one tile at two sizes; the smaller one is resized from the larger in 8 bits.

    The sizes may be equal, for two encoders with different statistics.

    Attributes:
      high: views of the larger size, which determine the tokens.
      low: views of the smaller size.

    Source: transformers, models/deepseek_vl_hybrid/image_processing_deepseek_vl_hybrid.py; openvla/openvla-7b,
    processing_prismatic.py.
    """

    high: SquareViews
    low: SquareViews

    def images(self, pictures: Sequence[Image.Image]) -> list[PreparedImage]:
        """Prepares every image independently."""
        tiles = [self.high.tile(picture) for picture in pictures]
        seen = self.high.images(tiles)
        return [
            dataclasses.replace(one, low=self.low.pixels.tiles([self.low.tile(tile)]))
            for one, tile in zip(seen, tiles, strict=True)
        ]

    def layouts(self, sizes: Sequence[Size]) -> list[Layout]:
        """The same layout for every image."""
        return self.high.layouts(sizes)

    def within(self, max_tokens: int) -> "TwoSizeViews":
        """These views: the number of tokens is fixed."""
        return dataclasses.replace(self, high=self.high.within(max_tokens))

    def retokened(self, tokens: Grid | int) -> "TwoSizeViews":
        """The same views with another number of tokens."""
        return dataclasses.replace(self, high=self.high.retokened(tokens))

    def loads(self, sizes: Sequence[Size]) -> list[int]:
        """One tile each."""
        return self.high.loads(sizes)

    @property
    def tile_tokens(self) -> int:
        """Visual tokens of a tile."""
        return self.high.num_tokens

    @property
    def tile_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of a tile of the larger size."""
        return self.high.tile_shape

    def join(
        self, rows: Sequence[Sequence[PreparedImage]], capacity: int | None = None, pictures: int | None = None
    ) -> TwoSizes | None:
        """The tiles of every row at both sizes."""
        del pictures
        high = joined_tiles([[image.pixels for image in row] for row in rows], self.tile_shape, capacity)
        low = [[image.low for image in row if image.low is not None] for row in rows]
        if high is None or (smaller := joined_tiles(low, self.low.tile_shape, high.shape[1])) is None:
            return None
        return TwoSizes(high, smaller)
