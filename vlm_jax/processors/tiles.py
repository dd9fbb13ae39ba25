"""Views that divide an image into tiles, by its aspect ratio (InternVL, DeepSeek-VL2, Ovis 2) or in a fixed grid."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from vlm_jax.processors.image import height_and_width
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.tiling import (
    Order,
    Size,
    best_resolution,
    closest_ratio,
    covering_grid,
    ratio_candidates,
    split,
)
from vlm_jax.processors.video import SegmentSampler
from vlm_jax.processors.views import Layout, PreparedImage, Tiles, too_few
from vlm_jax.types import Grid


def cut(picture: Image.Image, height: int, width: int) -> list[Image.Image]:
    """Divides an image into tiles of height x width pixels, in row-major order; its sides must be multiples."""
    return [
        picture.crop((left, top, left + width, top + height))
        for top in range(0, picture.height, height)
        for left in range(0, picture.width, width)
    ]


def padded(picture: Image.Image, pixels: Pixels, size: Size) -> Image.Image:
    """The image within (height, width), centred, with the mean colour beside it; as `ImageOps.pad` of Pillow."""
    height, width = size
    own, wanted = picture.width / picture.height, width / height
    if own > wanted:
        height = round(picture.height / picture.width * width)
    elif own < wanted:
        width = round(picture.width / picture.height * height)
    canvas = Image.new(picture.mode, (size[1], size[0]), pixels.mean_colour)
    if min(width, height) > 0:  # else it is too thin to be seen
        corner = (round((canvas.width - width) * 0.5), round((canvas.height - height) * 0.5))
        canvas.paste(pixels.resized(picture, (height, width)), corner)
    return canvas


@dataclasses.dataclass(frozen=True)
class FixedTilesViews(Tiles):
    """Every image, or frame of a video, as rows x columns of tiles, and a thumbnail of the whole image.

    Attributes:
      pixels: resizing and normalisation.
      size: (height, width) of a tile, in pixels.
      num_tokens: visual tokens of a tile.
      grid: rows and columns of tiles into which the resized image is divided.
      thumbnail: whether the whole image, at the size of a tile, follows its tiles.

    Source: Chen et al. 2024 (InternVL 1.5), section 3.2, for tiles row by row and the thumbnail after them.
    """

    pixels: Pixels
    size: Size
    num_tokens: int
    grid: Grid = (1, 1)
    thumbnail: bool = False

    @property
    def num_tiles(self) -> int:
        """Number of tiles of an image."""
        return math.prod(self.grid) + self.thumbnail

    @property
    def tile_tokens(self) -> int:
        """Visual tokens of a tile."""
        return self.num_tokens

    @property
    def tile_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of a tile."""
        return (*self.size, self.pixels.channels)

    def images(self, pictures: Sequence[Image.Image]) -> list[PreparedImage]:
        """Prepares every image independently."""
        return [self._prepared([picture]) for picture in pictures]

    def within(self, max_tokens: int) -> "FixedTilesViews":
        """These views: the number of tokens is fixed."""
        if self.num_tiles * self.num_tokens > max_tokens:
            raise too_few(max_tokens, self.num_tiles * self.num_tokens)
        return self

    def retokened(self, tokens: Grid | int) -> "FixedTilesViews":
        """The same views with another number of tokens per tile."""
        return dataclasses.replace(self, num_tokens=_count(tokens))

    def layouts(self, sizes: Sequence[Size]) -> list[Layout]:
        """Tile after tile."""
        return [np.arange(self.num_tiles * self.num_tokens)] * len(sizes)

    def loads(self, sizes: Sequence[Size]) -> list[int]:
        """The same number of tiles for every image."""
        return [self.num_tiles] * len(sizes)

    def video(
        self, frames: Sequence[Image.Image], fps: float | int | None, max_tokens: int | None = None
    ) -> list[PreparedImage]:
        """A video as one entry, frame after frame."""
        del fps  # the frame rate is not used
        self.video_layouts(len(frames), height_and_width(frames[0]), max_tokens)
        return [self._prepared(frames)]

    def video_layouts(self, num_frames: int, size: Size, max_tokens: int | None = None) -> list[Layout]:
        """The layout of its single entry."""
        del size
        count = num_frames * self.num_tiles * self.num_tokens
        if max_tokens is not None and count > max_tokens:
            raise too_few(max_tokens, count, "a video")
        return [np.arange(count)]

    def video_load(self, num_frames: int, size: Size, max_tokens: int | None = None) -> int:
        """Tiles of all frames."""
        del size, max_tokens
        return num_frames * self.num_tiles

    def _prepared(self, frames: Sequence[Image.Image]) -> PreparedImage:
        (rows, cols), (height, width) = self.grid, self.size
        tiles = []
        for frame in frames:
            whole = self.pixels.resized(frame, (rows * height, cols * width))
            tiles += cut(whole, height, width)
            tiles += [self.pixels.resized(frame, self.size)] if self.thumbnail else []
        count = len(tiles) * self.num_tokens
        return PreparedImage(self.pixels.tiles(tiles), count, np.arange(count))


def _count(tokens: Grid | int) -> int:
    return tokens if isinstance(tokens, int) else math.prod(tokens)


class FrameTiles(Tiles):
    """Base of views of square tiles in which a frame of a video is one tile, with a place of its own.

    Attributes:
      pixels: resizing and normalisation.
      side: side of a tile, in pixels.
      num_tokens: visual tokens of a tile.
      video_pixels: resizing and normalisation of a video's frames; `pixels` when None.
    """

    pixels: Pixels
    side: int
    num_tokens: int
    video_pixels: Pixels | None

    @property
    def tile_tokens(self) -> int:
        """Visual tokens of a tile."""
        return self.num_tokens

    @property
    def tile_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of a tile."""
        return self.side, self.side, self.pixels.channels

    @property
    def frame_pixels(self) -> Pixels:
        """Resizing and normalisation of frames."""
        return self.video_pixels or self.pixels

    def frame_tile(self, frame: Image.Image) -> Image.Image:
        """The tile of a frame, in 8 bits."""
        return self.frame_pixels.resized(frame, (self.side, self.side))

    def video_layouts(self, num_frames: int, size: Size, max_tokens: int | None = None) -> list[Layout]:
        """One layout per selected frame."""
        return [np.arange(self.num_tokens)] * self.video_load(num_frames, size, max_tokens)

    def video_load(self, num_frames: int, size: Size, max_tokens: int | None = None) -> int:
        """Number of selected frames: fewer, evenly spaced, where all would exceed `max_tokens`."""
        del size
        if max_tokens is None:
            return num_frames
        if max_tokens < self.num_tokens:
            raise too_few(max_tokens, self.num_tokens, "a video")
        return min(num_frames, max_tokens // self.num_tokens)

    def kept_frames(self, num_frames: int, size: Size, max_tokens: int | None = None) -> Sequence[int]:
        """See `Views`: the middle of each of equal parts of the video."""
        count = self.video_load(num_frames, size, max_tokens)
        if count == num_frames:
            return range(num_frames)
        return SegmentSampler(count).chosen(num_frames, 1).tolist()

    def video(
        self, frames: Sequence[Image.Image], fps: float | int | None, max_tokens: int | None = None
    ) -> list[PreparedImage]:
        """Every selected frame as one tile and a separate entry; see `video_load`."""
        del fps  # the frame rate is not used
        kept = self.kept_frames(len(frames), height_and_width(frames[0]), max_tokens)
        return [self._prepared([self.frame_tile(frames[number])], self.frame_pixels) for number in kept]

    def _prepared(self, tiles: list[Image.Image], pixels: Pixels) -> PreparedImage:
        count = len(tiles) * self.num_tokens
        return PreparedImage(pixels.tiles(tiles), count, np.arange(count))


@dataclasses.dataclass(frozen=True)
class InternVLViews(FrameTiles):
    """Tiles of the grid whose aspect ratio is closest to the image's, then the whole image if there are several.

    Attributes:
      pixels: resizing and normalisation.
      side: side of a tile, in pixels.
      num_tokens: visual tokens of a tile.
      min_tiles, max_tiles: of an image, without the thumbnail.
      thumbnail: whether the whole image follows.
      order: order of equally good grids; see `tiling.ratio_candidates`.
      video_pixels: resizing and normalisation of a video's frames; `pixels` when None.

    Source: Chen et al. 2024 (InternVL 1.5), section 3.2; InternVL, dynamic_preprocess.
    """

    pixels: Pixels
    side: int
    num_tokens: int
    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True
    order: Order = "release"
    video_pixels: Pixels | None = None

    def grid(self, size: Size) -> Grid:
        """Rows and columns of tiles of an image of `size`."""
        candidates = ratio_candidates(self.min_tiles, self.max_tiles, self.order)
        return closest_ratio(size, candidates, (self.side, self.side))

    def tiles(self, picture: Image.Image) -> list[Image.Image]:
        """The tiles of an image, in 8 bits."""
        rows, cols = self.grid(height_and_width(picture))
        tiles = cut(self.pixels.resized(picture, (rows * self.side, cols * self.side)), self.side, self.side)
        if self.thumbnail and len(tiles) > 1:
            tiles.append(self.pixels.resized(picture, (self.side, self.side)))
        return tiles

    def images(self, pictures: Sequence[Image.Image]) -> list[PreparedImage]:
        """Prepares every image independently."""
        return [self._prepared(self.tiles(picture), self.pixels) for picture in pictures]

    def within(self, max_tokens: int) -> "InternVLViews":
        """The same views with fewer tiles, including the whole image."""
        counts = {
            most: (most + (self.thumbnail and most > 1)) * self.num_tokens for most in range(1, self.max_tiles + 1)
        }
        kept = [most for most, count in counts.items() if count <= max_tokens]
        if not kept:
            raise too_few(max_tokens, counts[1])
        return dataclasses.replace(self, min_tiles=min(self.min_tiles, kept[-1]), max_tiles=kept[-1])

    def retokened(self, tokens: Grid | int) -> "InternVLViews":
        """The same views with another number of tokens per tile."""
        return dataclasses.replace(self, num_tokens=_count(tokens))

    def layouts(self, sizes: Sequence[Size]) -> list[Layout]:
        """Tile after tile."""
        return [np.arange(count * self.num_tokens) for count in self.loads(sizes)]

    def loads(self, sizes: Sequence[Size]) -> list[int]:
        """Tiles of each image, including the whole image."""
        counts = [math.prod(self.grid(size)) for size in sizes]
        return [count + (self.thumbnail and count > 1) for count in counts]


@dataclasses.dataclass(frozen=True)
class DeepSeekVL2Views(Tiles):
    """The whole image as a tile, and the tiles of the best of several canvases, in two dimensions.

    Every row of tokens ends with the learned row 0, and the learned row 1 separates the whole image and the tiles.

    Attributes:
      pixels: resizing and normalisation; padding has the mean colour.
      side: side of a tile, in pixels.
      tokens: rows and columns of tokens of a tile, or, where they form no grid, their number: rows then do not end
        with a learned row.
      canvases: (height, width) in pixels, in the release's order.
      max_tiled: with more images in a conversation, each is one tile.
      whole_first: whether the whole image's tokens precede the tiles'.

    Source: Wu et al. 2024 (DeepSeek-VL2), section 3.1; processing_deepseek_vl_v2.py, tokenize_with_images.
    """

    pixels: Pixels
    side: int
    tokens: Grid | int
    canvases: tuple[Size, ...]
    max_tiled: int = 2
    whole_first: bool = True

    def grid(self, size: Size, num_pictures: int) -> Grid:
        """Rows and columns of tiles of one of `num_pictures` images."""
        if num_pictures > self.max_tiled:
            return 1, 1
        height, width = best_resolution(size, self.canvases)
        return height // self.side, width // self.side

    def tiles(self, picture: Image.Image, num_pictures: int) -> list[Image.Image]:
        """The tiles of one of `num_pictures` images, in 8 bits."""
        rows, cols = self.grid(height_and_width(picture), num_pictures)
        # The canvas of the whole image is a single tile.
        whole = padded(picture, self.pixels, (self.side, self.side))
        if rows * cols == 1:
            return [whole, whole]
        return [whole, *cut(padded(picture, self.pixels, (rows * self.side, cols * self.side)), self.side, self.side)]

    def images(self, pictures: Sequence[Image.Image]) -> list[PreparedImage]:
        """Prepares all images of a conversation, whose number determines whether they are divided into tiles."""
        layouts = self.layouts([height_and_width(picture) for picture in pictures])
        seen = []
        for picture, layout in zip(pictures, layouts, strict=True):
            tiles = self.tiles(picture, len(pictures))
            seen.append(PreparedImage(self.pixels.tiles(tiles), len(tiles) * _count(self.tokens), layout))
        return seen

    def retokened(self, tokens: Grid | int) -> "DeepSeekVL2Views":
        """The same views with other tokens per tile."""
        return dataclasses.replace(self, tokens=tokens)

    def loads(self, sizes: Sequence[Size]) -> list[int]:
        """Tiles of each image, including the whole image."""
        return [1 + math.prod(self.grid(size, len(sizes))) for size in sizes]

    @property
    def tile_tokens(self) -> int:
        """Visual tokens of a tile."""
        return _count(self.tokens)

    @property
    def tile_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of a tile."""
        return self.side, self.side, self.pixels.channels

    def within(self, max_tokens: int) -> "DeepSeekVL2Views":
        """The same views with only the canvases that take at most `max_tokens`."""
        counts = [len(self.layout((rows // self.side, cols // self.side))) for rows, cols in self.canvases]
        kept = tuple(size for size, count in zip(self.canvases, counts, strict=True) if count <= max_tokens)
        if not kept:
            raise too_few(max_tokens, min(counts))
        return dataclasses.replace(self, canvases=kept)

    def layouts(self, sizes: Sequence[Size]) -> list[Layout]:
        """Rows of tokens with the learned row after each."""
        return [self.layout(self.grid(size, len(sizes))) for size in sizes]

    def layout(self, grid: Grid) -> Layout:
        """The layout of an image whose canvas has `grid` rows and columns of tiles."""
        (rows, cols), count = grid, _count(self.tokens)
        newline, separator = -1, -2
        whole, mosaic = np.arange(count), count + np.arange(rows * cols * count)
        parts = [whole, mosaic]
        if not isinstance(self.tokens, int):
            down, across = self.tokens
            mosaic = mosaic.reshape(rows, cols, down, across).swapaxes(1, 2).reshape(rows * down, cols * across)
            lines = (whole.reshape(self.tokens), mosaic)
            parts = [np.pad(part, ((0, 0), (0, 1)), constant_values=newline).reshape(-1) for part in lines]
        first, second = parts if self.whole_first else parts[::-1]
        return np.concatenate([first, [separator], second])


@dataclasses.dataclass(frozen=True)
class Ovis2Views(Tiles):
    """The fewest parts that keep 90% of the pixels, each on a square canvas, after the whole image if several.

    Learned rows: 0 starts an image, 1 ends the first tile, 2 separates columns, 3 separates rows, 4 ends the image.

    Attributes:
      pixels: resizing and normalisation. Canvases are padded with 0 after it.
      side: side of a canvas, in pixels.
      num_tokens: visual tokens of a tile.
      max_parts: maximum number of parts; with 1 only the whole image is used.
      port: tiles as in transformers: the image is stretched to one canvas for all parts, with rows and columns
        exchanged.

    Source: Ovis 2, modeling_ovis.py, BaseVisualTokenizer.preprocess_image; transformers,
    models/ovis2/image_processing_ovis2.py.
    """

    pixels: Pixels
    side: int
    num_tokens: int
    max_parts: int = 9
    port: bool = False

    def grid(self, size: Size) -> Grid:
        """Rows and columns of parts."""
        rows, cols = _covering_grid(size, self.side, self.max_parts)
        return (cols, rows) if self.port else (rows, cols)

    def images(self, pictures: Sequence[Image.Image]) -> list[PreparedImage]:
        """Prepares every image independently."""
        seen = []
        for picture, layout in zip(
            pictures, self.layouts([height_and_width(picture) for picture in pictures]), strict=True
        ):
            tiles = self.stretched(picture) if self.port else self.fitted(picture)
            seen.append(PreparedImage(tiles, len(tiles) * self.num_tokens, layout))
        return seen

    def fitted(self, picture: Image.Image) -> np.ndarray:
        """Tiles as in the release: every part keeps its aspect ratio."""
        size = height_and_width(picture)
        parts = [picture.crop(box) for box in split(size, self.grid(size))]
        parts = parts if len(parts) == 1 else [picture, *parts]
        tiles = np.zeros((len(parts), self.side, self.side, 3), np.float32)
        for tile, part in zip(tiles, parts, strict=True):
            # Divides before multiplying, as in the release, because truncation depends on it.
            width = self.side if part.width >= part.height else int(part.width / part.height * self.side)
            height = self.side if part.height >= part.width else int(part.height / part.width * self.side)
            left, top = (self.side - width) // 2, (self.side - height) // 2
            shown = self.pixels.tiles([self.pixels.resized(part, (height, width))])[0]
            tile[top : top + height, left : left + width] = shown
        return tiles

    def stretched(self, picture: Image.Image) -> np.ndarray:
        """Tiles as in transformers."""
        rows, cols = self.grid(height_and_width(picture))
        tiles = cut(self.pixels.resized(picture, (rows * self.side, cols * self.side)), self.side, self.side)
        whole = [self.pixels.resized(picture, (self.side, self.side))] if len(tiles) > 1 else []
        return self.pixels.tiles([*whole, *tiles])

    def retokened(self, tokens: Grid | int) -> "Ovis2Views":
        """The same views with another number of tokens per tile."""
        return dataclasses.replace(self, num_tokens=_count(tokens))

    def loads(self, sizes: Sequence[Size]) -> list[int]:
        """Tiles of each image: its parts, and the whole image if there are several."""
        counts = [math.prod(self.grid(size)) for size in sizes]
        return [count + (count > 1) for count in counts]

    @property
    def tile_tokens(self) -> int:
        """Visual tokens of a tile."""
        return self.num_tokens

    @property
    def tile_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of a tile."""
        return self.side, self.side, self.pixels.channels

    def within(self, max_tokens: int) -> "Ovis2Views":
        """The same views with fewer parts."""
        counts = {most: len(self.layout((1, most))) for most in range(1, self.max_parts + 1)}
        kept = [most for most, count in counts.items() if count <= max_tokens]
        if not kept:
            raise too_few(max_tokens, counts[1])
        return dataclasses.replace(self, max_parts=kept[-1])

    def layouts(self, sizes: Sequence[Size]) -> list[Layout]:
        """Tiles in row-major order, separated by learned rows."""
        return [self.layout(self.grid(size)) for size in sizes]

    def layout(self, grid: Grid) -> Layout:
        """The layout of an image of `grid` rows and columns of parts."""
        start, after_first, column, row, end = (np.array([-1 - k]) for k in range(5))
        tile = np.arange(self.num_tokens)
        rows, cols = grid
        places = [start, tile, after_first]
        if rows * cols > 1:
            for part in range(rows * cols):
                places.append(tile + (part + 1) * self.num_tokens)
                if part % cols < cols - 1:
                    places.append(column)
                elif part < rows * cols - 1:
                    places.append(row)
        return np.concatenate([*places, end])


@functools.lru_cache(1024)
def _covering_grid(size: Size, side: int, max_parts: int) -> Grid:
    return covering_grid(size, side, max_parts)
