"""An image as a whole, and a mosaic of tiles of another size where it is large, as in DeepSeek-OCR."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import Image

from vlm_jax.budget import InfeasibleBudget
from vlm_jax.processors.image import height_and_width
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.square import SquareViews
from vlm_jax.processors.tiles import cut, padded
from vlm_jax.processors.tiling import Order, Size, closest_ratio, ratio_candidates
from vlm_jax.processors.views import Images, Layout, PreparedImage, Tiles, joined_tiles, too_few
from vlm_jax.types import Grid, WholesAndTiles


@dataclasses.dataclass(frozen=True)
class Mosaic:
    """Tiles of an image that is larger than `threshold`.

    Attributes:
      side: of a tile, in pixels.
      tokens: rows and columns of tokens of a tile, or, where they form no grid, their number.
      min_tiles, max_tiles: of an image.
      threshold: an image whose sides are both at most this, in pixels, has no tiles.
      order: of the grids to choose from, for ties; see `ratio_candidates`.
    """

    side: int
    tokens: Grid | int
    min_tiles: int = 2
    max_tiles: int = 9
    threshold: int = 640
    order: Order = "release"

    def grid(self, size: Size) -> Grid | None:
        """Rows and columns of tiles of an image of `size`; None without tiles."""
        if max(size) <= self.threshold:
            return None
        return closest_ratio(size, self.candidates, (self.side, self.side))

    @property
    def candidates(self) -> tuple[Grid, ...]:
        """The grids to choose from; a single tile is none."""
        return ratio_candidates(self.min_tiles, self.max_tiles, self.order)


@dataclasses.dataclass(frozen=True)
class MosaicViews(Tiles):
    """The tiles of an image, the image as a whole, and a separator.

    With newlines the tokens of all tiles together, and those of the whole, are laid out row by row, with a newline
    after every row; without, tile by tile. Newlines are the learned row 0, and the separator is the row after them.
    The visual table has the whole first.

    Attributes:
      pixels: resizing and normalisation.
      side: side of the view of the whole, in pixels.
      tokens: rows and columns of its tokens, or, where they form no grid, their number: rows then do not end with a
        newline.
      stretched: whether the whole is stretched to a square; else it is padded.
      mosaic: the tiles; None for the whole alone.
      modes: other views of the release, to choose from for a bound on the tokens.
      newlines: whether rows of tokens end with a learned newline; else tokens are not laid out by place.
      background: colour beside a padded whole in 8 bits, whose corner is then rounded down, as in transformers; None
        for the mean's colour and the rounding of Pillow.

    Source: Wei et al. 2025 (DeepSeek-OCR), section 3.2.2; DeepSeek-OCR, modeling_deepseekocr.py, infer and forward;
    DeepSeek-OCR-2, modeling_deepseekocr2.py, the same, without newlines.
    """

    pixels: Pixels
    side: int
    tokens: Grid | int
    stretched: bool = False
    mosaic: Mosaic | None = None
    modes: tuple["MosaicViews", ...] = ()
    newlines: bool = True
    background: tuple[int, ...] | None = None

    def grid(self, size: Size) -> Grid | None:
        """Rows and columns of tiles of an image of `size`; None without tiles."""
        return None if self.mosaic is None else self.mosaic.grid(size)

    def whole(self, picture: Image.Image) -> Image.Image:
        """The image as a whole, in 8 bits."""
        size = (self.side, self.side)
        if self.stretched:
            return self.pixels.resized(picture, size)
        if self.background is None:
            return padded(picture, self.pixels, size)
        view = SquareViews(self.pixels, size, fit="shrink_rounded", background=self.background, min_size=1)
        return view.tile(picture)

    def tiles(self, picture: Image.Image) -> list[Image.Image]:
        """The tiles of an image, row by row, in 8 bits; none where it is small."""
        grid = self.grid(height_and_width(picture))
        if grid is None or self.mosaic is None:
            return []
        side = self.mosaic.side
        return cut(self.pixels.resized(picture, (grid[0] * side, grid[1] * side)), side, side)

    def images(self, pictures: Sequence[Image.Image]) -> list[PreparedImage]:
        """Prepares every image independently."""
        made = []
        for picture, layout in zip(pictures, self.layouts([height_and_width(one) for one in pictures]), strict=True):
            tiles = self.tiles(picture)
            made.append(
                PreparedImage(
                    self.pixels.tiles([self.whole(picture)]),
                    sum(self.groups(1 + len(tiles))),
                    layout,
                    parts=self.pixels.tiles(tiles) if tiles else None,
                )
            )
        return made

    def layouts(self, sizes: Sequence[Size]) -> list[Layout]:
        """Tiles, whole and separator, where there are newlines with one after every row of tokens."""
        return [self.layout(self.grid(size)) for size in sizes]

    def layout(self, grid: Grid | None) -> Layout:
        """The layout of an image with `grid` rows and columns of tiles, or without tiles."""
        newline, count = -1, self.tile_tokens
        separator = newline - 1 if self.newlines else -1
        whole, parts = np.arange(count), []
        if grid is not None and self.mosaic is not None:
            (rows, cols), own = grid, self.mosaic.tokens
            tiles = count + np.arange(rows * cols * _count(own))
            if self.newlines and not isinstance(own, int):
                down, across = own
                tiles = tiles.reshape(rows, cols, down, across).swapaxes(1, 2).reshape(rows * down, cols * across)
                tiles = _with_ends(tiles, newline)
            parts.append(tiles)
        flat = isinstance(self.tokens, int) or not self.newlines
        parts.append(whole if flat else _with_ends(whole.reshape(self.tokens), newline))
        return np.concatenate([*parts, [separator]])

    def loads(self, sizes: Sequence[Size]) -> list[int]:
        """The whole and the tiles of each image."""
        return [1 if grid is None else 1 + math.prod(grid) for grid in map(self.grid, sizes)]

    @property
    def tile_tokens(self) -> int:
        """Visual tokens of the whole."""
        return _count(self.tokens)

    @property
    def tile_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the whole."""
        return self.side, self.side, self.pixels.channels

    def groups(self, load: int) -> tuple[int, ...]:
        """Tokens of the whole, and of every tile."""
        return (self.tile_tokens,) * min(load, 1) + (self._part_tokens,) * max(load - 1, 0)

    @property
    def _part_tokens(self) -> int:
        return 0 if self.mosaic is None else _count(self.mosaic.tokens)

    @property
    def most_tokens(self) -> int:
        """Tokens of an image with all its tiles, without newlines and separator."""
        return self.tile_tokens + (0 if self.mosaic is None else self.mosaic.max_tiles * self._part_tokens)

    @property
    def most_positions(self) -> int:
        """Positions of an image with the most, newlines and separator included."""
        grids = [None] if self.mosaic is None else [None, *self.mosaic.candidates]
        return max(len(self.layout(grid)) for grid in grids)

    def within(self, max_tokens: int) -> "MosaicViews":
        """These views, with so few tiles that an image takes at most so many positions.

        Modes have other sides, and a row has one: they are for `of_mode`, which is for all rows.

        Raises:
          InfeasibleBudget: the whole alone takes more.
        """
        try:
            return self._largest(max_tokens, "most_positions", ())
        except InfeasibleBudget as error:
            least = min((views.most_tokens for views in self.modes), default=self.tile_tokens)
            if least >= self.tile_tokens:
                raise
            raise InfeasibleBudget(
                f"{error}; set token_budget, which chooses among the modes, to {least} tokens or more"
            ) from error

    def of_mode(self, max_tokens: int) -> "MosaicViews":
        """The mode with the most tokens, at most so many, or these views with fewer tiles.

        Newlines and the separator are not counted, as the release names its modes: 64, 100, 256, 400.

        Raises:
          InfeasibleBudget: the smallest mode takes more.
        """
        return self._largest(max_tokens, "most_tokens", self.modes)

    def _largest(
        self, bound: int, count: Literal["most_positions", "most_tokens"], modes: Sequence["MosaicViews"]
    ) -> "MosaicViews":
        choices = [self, *modes, dataclasses.replace(self, mosaic=None)]
        if self.mosaic is not None:
            fewer = range(self.mosaic.min_tiles, self.mosaic.max_tiles)
            mosaics = [dataclasses.replace(self.mosaic, max_tiles=most) for most in fewer]
            choices += [dataclasses.replace(self, mosaic=mosaic) for mosaic in mosaics]
        good = [views for views in choices if getattr(views, count) <= bound]
        if not good:
            raise too_few(bound, min(getattr(views, count) for views in choices))
        return self if self in good else max(good, key=lambda views: views.most_tokens)

    def retokened(self, tokens: Grid | int, of_part: Grid | int | None = None) -> "MosaicViews":
        """The same views with other tokens of the whole, and of a tile: the same number unless told."""
        mosaic = self.mosaic
        if mosaic is not None:
            mosaic = dataclasses.replace(mosaic, tokens=tokens if of_part is None else of_part)
        return dataclasses.replace(self, tokens=tokens, mosaic=mosaic, modes=())

    def join(
        self, rows: Sequence[Sequence[PreparedImage]], capacity: int | None = None, pictures: int | None = None
    ) -> Images | None:
        """The wholes and the tiles of every row, each with blank ones behind them; wholes alone where no row has tiles.

        With a capacity, they are padded to as many tiles as one image leaves of it, and to as many wholes as
        `pictures`, or as the capacity.
        """
        most = capacity if pictures is None or capacity is None else min(pictures, capacity)
        wholes = joined_tiles([[image.pixels for image in row] for row in rows], self.tile_shape, most)
        if wholes is None or self.mosaic is None:
            return wholes
        parts = [[image.parts for image in row if image.parts is not None] for row in rows]
        side = self.mosaic.side
        shape = (side, side, self.pixels.channels)
        tiles = joined_tiles(parts, shape, None if capacity is None else capacity - 1)
        if tiles is None:
            return wholes
        table = np.arange(wholes.shape[1] * self.tile_tokens + tiles.shape[1] * self._part_tokens)
        order = np.tile(table, (len(rows), 1)).astype(np.int32)
        of_whole, of_part = np.split(table, [wholes.shape[1] * self.tile_tokens])
        of_whole, of_part = of_whole.reshape(-1, self.tile_tokens), of_part.reshape(-1, self._part_tokens)
        for own, row in zip(order, rows, strict=True):
            start, found = 0, []
            for number, image in enumerate(row):
                count = 0 if image.parts is None else len(image.parts)
                found += [of_whole[number], of_part[start : start + count].reshape(-1)]
                start += count
            if found:
                own[: sum(map(len, found))] = np.concatenate(found)
        return WholesAndTiles(wholes, tiles, order)


def _count(tokens: Grid | int) -> int:
    return tokens if isinstance(tokens, int) else math.prod(tokens)


def _with_ends(rows: np.ndarray, newline: int) -> np.ndarray:
    """Rows of tokens, each with a newline behind it."""
    return np.pad(rows, ((0, 0), (0, 1)), constant_values=newline).reshape(-1)
