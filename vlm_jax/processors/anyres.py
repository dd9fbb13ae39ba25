"""Views of LLaVA-NeXT and LLaVA-OneVision: the whole image, and tiles of it on a canvas, without the padding."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from vlm_jax.processors.image import height_and_width
from vlm_jax.processors.layout import rows_alone
from vlm_jax.processors.square import SquareViews
from vlm_jax.processors.tiling import Size, best_resolution
from vlm_jax.processors.video import SegmentSampler
from vlm_jax.processors.views import NO_VIDEOS, Layout, PictureMismatch, PreparedImage, Tiles, too_few
from vlm_jax.types import Grid, Interpolation

Merge = Literal["flat", "spatial", "spatial_unpad"]
NEWLINE = -1  # in a layout: the first learned row
OVER = 1.1  # a canvas is resized where its sides are longer than allowed by more than this factor


class LaidOut(NamedTuple):
    """A layout, and the rows of which its tokens are weighted means; None where each is a row."""

    layout: Layout
    interpolation: Interpolation | None = None


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
      max_tiles: tokens of a canvas are resized, bilinear, to about those of this many tiles where they are more by a
        factor of `OVER`**2; None for any number. Not for `flat`.
      max_tiled: with more images in a conversation, each is one tile; None for any number.
      single: makes the tile of such an image; `base` when None.
      frames: makes the tile of a video's frame; None where videos are not supported. Its tokens are resized to half
        the rows and columns, bilinear, and a learned row ends the video.

    Source: Liu et al. 2024 (LLaVA-NeXT); LLaVA, mm_utils.py, process_anyres_image, and llava_arch.py; Li et al. 2024
    (LLaVA-OneVision), section 3.2; transformers, models/llava_onevision.
    """

    base: SquareViews
    grid: Grid
    canvases: tuple[Size, ...]
    side: int
    merge: Merge = "spatial_unpad"
    port: bool = False
    max_tiles: int | None = None
    max_tiled: int | None = None
    single: SquareViews | None = None
    frames: SquareViews | None = None

    @property
    def interpolates(self) -> bool:
        """Whether tokens of a canvas or of a frame may be resized."""
        return self.merge != "flat" and (self.max_tiles is not None or self.frames is not None)

    def images(self, pictures: Sequence[Image.Image]) -> list[PreparedImage]:
        """Prepares all images of a conversation, whose number determines whether they are divided into tiles."""
        seen = []
        for picture in pictures:
            tiles = self.tiles(picture, len(pictures))
            laid_out = self._laid_out(height_and_width(picture), len(pictures))
            seen.append(self._prepared(tiles, self.base, laid_out))
        return seen

    def _prepared(self, tiles: list[Image.Image], made_by: SquareViews, laid_out: LaidOut) -> PreparedImage:
        layout, interpolation = laid_out
        count = len(tiles) * math.prod(self.grid)
        return PreparedImage(made_by.pixels.tiles(tiles), count, layout, interpolation=interpolation)

    def _is_tiled(self, num_pictures: int) -> bool:
        """Whether each of so many images of a conversation is divided."""
        return bool(self.canvases) and (self.max_tiled is None or num_pictures <= self.max_tiled)

    def tiles(self, picture: Image.Image, num_pictures: int = 1) -> list[Image.Image]:
        """The tiles of one of `num_pictures` images, in 8 bits."""
        if not self._is_tiled(num_pictures):
            return [(self.single or self.base).tile(picture)]
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
        counts = [self._most_tokens(size) for size in self.canvases]
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
        if not self._is_tiled(len(sizes)):
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
        return [self._laid_out(size, len(sizes)).layout for size in sizes]

    def _laid_out(self, size: Size, num_pictures: int) -> LaidOut:
        """The tokens of one of `num_pictures` images."""
        whole, ends = np.arange(math.prod(self.grid)), self.merge == "spatial_unpad"
        if not self._is_tiled(num_pictures):
            return LaidOut(np.append(whole, NEWLINE) if ends else whole)
        tokens = self._mosaic(best_resolution(size, self.canvases))
        if ends:
            tokens = unpadded(tokens, size, rounded=self.port)
        fitted = self._fitted((tokens.shape[0], tokens.shape[1])) if self.merge != "flat" else None
        canvas = LaidOut(tokens) if fitted is None else resized_grid(tokens, fitted)
        return _joined([LaidOut(whole), _flat(canvas, ends=ends)])

    def _mosaic(self, canvas: Size) -> Int[np.ndarray, "rows cols"]:
        """Rows of the visual table of a canvas's tokens as they are in the image; for `flat` in one row."""
        (rows, cols), count = self.grid, math.prod(self.grid)
        down, across = canvas[0] // self.side, canvas[1] // self.side
        tokens = count + np.arange(down * across * count)
        if self.merge == "flat":
            return tokens[None]
        return tokens.reshape(down, across, rows, cols).swapaxes(1, 2).reshape(down * rows, across * cols)

    def _fitted(self, shape: Grid) -> Grid | None:
        """Rows and columns to which those of a canvas without padding are resized; None where they stay."""
        if self.max_tiles is None:
            return None
        ratio = math.sqrt(math.prod(shape) / (self.max_tiles * math.prod(self.grid)))
        return (max(int(shape[0] // ratio), 1), max(int(shape[1] // ratio), 1)) if ratio > OVER else None

    def _most_tokens(self, canvas: Size) -> int:
        """The most positions of an image on a canvas, over all paddings: resized grids may take fewer than others."""
        rows, cols = self._mosaic(canvas).shape
        shapes = [(rows, cols)]
        if self.merge == "spatial_unpad":
            shapes = [(rows - 2 * border, cols) for border in range((rows + 1) // 2)]
            shapes += [(rows, cols - 2 * border) for border in range((cols + 1) // 2)]
        if self.merge != "flat":
            shapes = [self._fitted(shape) or shape for shape in shapes]
        ends = self.merge == "spatial_unpad"
        return math.prod(self.grid) + max(down * (across + ends) for down, across in shapes)

    def video(
        self, frames: Sequence[Image.Image], fps: float | int | None, max_tokens: int | None = None
    ) -> list[PreparedImage]:
        """A video as one entry, frame after frame."""
        del fps  # the frame rate is not used
        kept = self.kept_frames(len(frames), height_and_width(frames[0]), max_tokens)
        assert self.frames is not None  # or `kept_frames` has raised
        tiles = [self.frames.tile(frames[number]) for number in kept]
        return [self._prepared(tiles, self.frames, self._video_laid_out(len(tiles)))]

    def video_layouts(self, num_frames: int, size: Size, max_tokens: int | None = None) -> list[Layout]:
        """The layout of its single entry."""
        return [self._video_laid_out(self.video_load(num_frames, size, max_tokens)).layout]

    def _video_laid_out(self, num_frames: int) -> LaidOut:
        (rows, cols), count = self.grid, math.prod(self.grid)
        if self.merge == "flat":
            return LaidOut(np.arange(num_frames * count))
        starts = count * np.arange(num_frames)
        half = (-(-rows // 2), -(-cols // 2))
        grids = [resized_grid(np.arange(start, start + count).reshape(rows, cols), half) for start in starts.tolist()]
        newline = [LaidOut(np.array([NEWLINE]))] if self.merge == "spatial_unpad" else []
        return _joined([*(_flat(grid) for grid in grids), *newline])

    def video_load(self, num_frames: int, size: Size, max_tokens: int | None = None) -> int:
        """Number of frames: fewer, evenly spaced, where all would exceed `max_tokens`.

        Raises:
          PictureMismatch: videos are not supported.
          InfeasibleBudget: one frame takes more than `max_tokens`.
        """
        del size
        if self.frames is None:
            raise PictureMismatch(NO_VIDEOS)
        if max_tokens is None:
            return num_frames
        ends = int(self.merge == "spatial_unpad")
        of_frame = len(self._video_laid_out(1).layout) - ends
        if max_tokens < of_frame + ends:
            raise too_few(max_tokens, of_frame + ends, "a video")
        return min(num_frames, (max_tokens - ends) // of_frame)

    def kept_frames(self, num_frames: int, size: Size, max_tokens: int | None = None) -> Sequence[int]:
        """See `Views`: the middle of each of equal parts of the video."""
        count = self.video_load(num_frames, size, max_tokens)
        return range(num_frames) if count == num_frames else SegmentSampler(count).chosen(num_frames, 1).tolist()


def resized_grid(tokens: Int[np.ndarray, "rows cols"], shape: Grid) -> LaidOut:
    """A grid of tokens with fewer rows and columns, bilinear without antialiasing: each is the mean of four.

    Args:
      tokens: rows of the visual table.
      shape: rows and columns, at most those of `tokens`.

    Returns:
      The layout [rows, columns] of the nearest tokens, and the interpolation [rows, columns, 4].

    Source: torch, `interpolate(mode="bilinear", align_corners=False)`.
    """
    (near_rows, rows, of_rows), (near_cols, cols, of_cols) = (
        _samples(*counts) for counts in zip(tokens.shape, shape, strict=True)
    )
    index = tokens[rows[:, None, :, None], cols[None, :, None, :]]
    weights = of_rows[:, None, :, None] * of_cols[None, :, None, :]
    flat = (*shape, 4)
    mixed = Interpolation(index.reshape(flat), weights.reshape(flat).astype(np.float32))
    return LaidOut(tokens[near_rows][:, near_cols], mixed)


def _samples(
    size_in: int, size_out: int
) -> tuple[Int[np.ndarray, "out"], Int[np.ndarray, "out 2"], Float[np.ndarray, "out 2"]]:
    """Of each output along one axis the nearest input, and two inputs with their weights."""
    centres = (np.arange(size_out) + 0.5) * size_in / size_out
    places = np.maximum(centres - 0.5, 0)
    low = places.astype(int)
    share = places - low
    return (
        centres.astype(int),
        np.stack([low, np.minimum(low + 1, size_in - 1)], axis=-1),
        np.stack([1 - share, share], axis=-1),
    )


def _flat(grid: LaidOut, *, ends: bool = False) -> LaidOut:
    """A grid row after row, each with the learned row behind it if it `ends`."""
    layout, mixed = grid
    if ends:
        layout = np.pad(layout, ((0, 0), (0, 1)), constant_values=NEWLINE)
    if mixed is None:
        return LaidOut(layout.reshape(-1))
    index, weights = np.asarray(mixed.index), np.asarray(mixed.weights)
    if ends:
        newline = rows_alone(np.full(len(layout), NEWLINE))
        index = np.concatenate([index, np.asarray(newline.index)[:, None]], axis=1)
        weights = np.concatenate([weights, np.asarray(newline.weights)[:, None]], axis=1)
    return LaidOut(layout.reshape(-1), Interpolation(index.reshape(-1, 4), weights.reshape(-1, 4)))


def _joined(parts: Sequence[LaidOut]) -> LaidOut:
    """One after another."""
    layout = np.concatenate([part.layout for part in parts])
    if all(part.interpolation is None for part in parts):
        return LaidOut(layout)
    mixed = [part.interpolation or rows_alone(part.layout) for part in parts]
    index, weights = (
        np.concatenate([np.asarray(getattr(one, name)) for one in mixed]) for name in ("index", "weights")
    )
    return LaidOut(layout, Interpolation(index, weights))


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
