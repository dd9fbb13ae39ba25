"""Encoder inputs from the images of a conversation, and the layout of their visual tokens in a sequence."""

import abc
import dataclasses
import os
from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from vlm_jax.budget import InfeasibleBudget
from vlm_jax.processors.tiling import Size
from vlm_jax.types import Grid, Interpolation, PackedPatches, TwoSizes, WholesAndTiles

# For every position in order: the image's visual token r as r, the learned row k as -1 - k.
Layout = Int[np.ndarray, "_"]
Images = Float[np.ndarray, "B I height width channels"] | PackedPatches | TwoSizes | WholesAndTiles


NO_VIDEOS = "this system does not support videos; pass single frames as images"

OwnViews = TypeVar("OwnViews", bound="Tiles")


class PictureMismatch(ValueError):
    """Images that do not match a conversation or its model; the message names both."""


def check_list(given: object, what: str) -> None:
    """Raises unless given a list; a bare image, array or string would be iterated.

    Args:
      given: a caller's images, videos or texts.
      what: its name in errors.

    Raises:
      PictureMismatch: it is not a list.
    """
    if isinstance(given, Sequence) and not isinstance(given, str | bytes):
        return
    shown = repr(given) if given is None or isinstance(given, str | os.PathLike) else f"one {type(given).__name__}"
    fix = (
        "leave it out or pass []" if given is None else f"write [{given!r}]" if isinstance(given, str) else "write […]"
    )
    raise PictureMismatch(f"{what}: expected a list, got {shown}; {fix}")


@dataclasses.dataclass(frozen=True)
class ItemSize:
    """The size of one image or of a video's frames, in pixels; None for the release's limits.

    Attributes:
      min_pixels, max_pixels: of an image, or of a frame.
      resized_height, resized_width: instead of them, the size itself, rounded to whole blocks.
      total_pixels: maximum of all frames of a video together.

    Raises:
      PictureMismatch: values that exclude each other.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    resized_height: int | None = None
    resized_width: int | None = None
    total_pixels: int | None = None

    def __post_init__(self):
        if (self.resized_height is None) != (self.resized_width is None):
            raise PictureMismatch("resized_height and resized_width: expected both, got one")
        if self.resized is not None and (self.min_pixels or self.max_pixels):
            raise PictureMismatch("resized_height and resized_width exclude min_pixels and max_pixels; pass one pair")
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise PictureMismatch(f"min_pixels={self.min_pixels} is more than max_pixels={self.max_pixels}")

    @property
    def resized(self) -> Size | None:
        """(height, width), where they are given."""
        if self.resized_height is None or self.resized_width is None:
            return None
        return self.resized_height, self.resized_width


def check_whole(value: object, name: str) -> None:
    """Raises a `PictureMismatch` unless a setting of an item is None or a whole number from 1 to 2**31 - 1."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31):
        raise PictureMismatch(f"{name}: expected a whole number above 0, got {value!r}")


class Share(NamedTuple):
    """What one place of an image or of a video takes.

    Attributes:
      layout: its positions in the sequence.
      load: tiles, or sequence length of packed patches.
    """

    layout: Layout
    load: int


def even_shares(layout: Layout, load: int, count: int) -> list[Share]:
    """The shares of `count` places that are laid out alike, as the first of them."""
    return [Share(layout[: len(layout) // count], load // count)] * count


def shared(layouts: Sequence[Layout], load: int) -> list[Share]:
    """The shares of places that take the same load."""
    return [Share(layout, load // len(layouts)) for layout in layouts]


def refuse_sizes(size: "ItemSize") -> None:
    """Raises a `PictureMismatch` for any setting of an item of a system whose images have fixed sizes."""
    given = [field.name for field in dataclasses.fields(size) if getattr(size, field.name) is not None]
    if given:
        raise PictureMismatch(f"{given[0]}: this system's images have fixed sizes; remove the key from the item")


@dataclasses.dataclass(frozen=True)
class PreparedImage:
    """An image, a video, or a part of a video at one position of the text.

    Attributes:
      pixels: normalised tiles [tiles, height, width, channels], or patches [patches, values].
      num_rows: number of rows of the visual table for them.
      layout: its positions in the sequence.
      grid: (frames, rows, columns) of the patches; None for tiles.
      positions: (time, row, column) of every token before a reducer, from 0, where text has positions of three axes.
      low: the same tiles at a lower resolution, for an encoder that takes both.
      parts: where `pixels` is the image as a whole, its tiles at another size; None without them.
      interpolation: the rows of which each token of `layout` is a weighted mean, learned rows as there; None where
        each is the row of `layout`.
      tiles: its tiles as images of their own, where they have places of their own in the text and differ in size; the
        other fields are then of all of them. Else empty.
    """

    pixels: Float[np.ndarray, "..."]
    num_rows: int
    layout: Int[np.ndarray, "n"]
    grid: tuple[int, int, int] | None = None
    positions: Int[np.ndarray, "m 3"] | None = None
    low: Float[np.ndarray, "tiles height width channels"] | None = None
    parts: Float[np.ndarray, "parts part_height part_width channels"] | None = None
    interpolation: Interpolation | None = None
    tiles: tuple["PreparedImage", ...] = ()

    def in_tiles(self, count: int) -> list["PreparedImage"]:
        """Each of its `count` tiles as an image of its own; those of one size are all laid out as the first."""
        if self.tiles:
            return list(self.tiles)
        rows, end = self.num_rows // count, len(self.layout) // count
        lows = [None] * count if self.low is None else [tile[None] for tile in self.low]
        return [
            dataclasses.replace(self, pixels=tile[None], num_rows=rows, layout=self.layout[:end], low=low)
            for tile, low in zip(self.pixels, lows, strict=True)
        ]


@runtime_checkable
class Views(Protocol):
    """Preprocessing of the images of a conversation.

    Sizes are (height, width) in pixels. The *load* of an image is its number of tiles, or the sequence length of its
    packed patches; loads of one row are added.
    """

    @property
    def channels(self) -> int:
        """Channels of the input images: 1 for mode L, 3 for RGB."""
        ...

    @property
    def frames_per_part(self) -> int:
        """Frames of a part of a video that has a position of its own in the text."""
        ...

    @property
    def interpolates(self) -> bool:
        """Whether tokens may be weighted means of rows of the visual table: all batches then say of which."""
        ...

    def images(self, pictures: Sequence[Image.Image]) -> list[PreparedImage]:
        """Prepares all images of a conversation."""
        ...

    def layouts(self, sizes: Sequence[Size]) -> list[Layout]:
        """The layouts of `images`, from only the sizes."""
        ...

    def loads(self, sizes: Sequence[Size]) -> list[int]:
        """The load of each image of a conversation."""
        ...

    def tile_grids(self, sizes: Sequence[Size]) -> list[Grid | None]:
        """Rows and columns of each image whose tiles have places of their own in the text.

        Its tiles come row by row, then one of the whole image, or before them, as in the text. None for an image with
        one place.
        """
        ...

    def shares(self, sizes: Sequence[Size]) -> list[list[Share]]:
        """What each place of every image takes, in the order of the text; together its layout and its load."""
        ...

    def video(
        self, frames: Sequence[Image.Image], fps: float | int | None, max_tokens: int | None = None
    ) -> list[PreparedImage]:
        """A video, as one entry for each of its positions in the text.

        Args:
          frames: the sampled frames.
          fps: their frames per second, None if unknown.
          max_tokens: maximum visual tokens of the video, by fewer pixels or frames; the release's limit when None.

        Raises:
          PictureMismatch: the system does not support videos.
          InfeasibleBudget: the video exceeds `max_tokens` even with the fewest.
        """
        ...

    def video_layouts(self, num_frames: int, size: Size, max_tokens: int | None = None) -> list[Layout]:
        """The layouts of `video`, from the number and the size of its frames; raises as `video`."""
        ...

    def video_load(self, num_frames: int, size: Size, max_tokens: int | None = None) -> int:
        """The load of a video."""
        ...

    def video_shares(self, num_frames: int, size: Size, max_tokens: int | None = None) -> list[Share]:
        """What each place of a video takes: its `video_layouts`, and the parts of its `video_load`."""
        ...

    def frame_grid(self, num_frames: int, size: Size, max_tokens: int | None = None) -> Grid | None:
        """As an entry of `tile_grids`, for each frame of a video, whose tiles have places of their own in the text."""
        ...

    def kept_frames(self, num_frames: int, size: Size, max_tokens: int | None = None) -> Sequence[int]:
        """Indices of the frames that `video` keeps, in order."""
        ...

    def within(self, max_tokens: int) -> "Views":
        """The same views with at most `max_tokens` visual tokens per image, by fewer tiles or pixels.

        Raises:
          InfeasibleBudget: the smallest image takes more; the message has the number.
        """
        ...

    def retokened(self, tokens: Grid | int) -> "Views":
        """The same views for an encoder and connector with another number of tokens per view.

        Args:
          tokens: rows and columns of a view's tokens, or, where they form no grid, their number; a layout with rows
            and columns is then replaced by one without.
        """
        ...

    def sized(self, size: ItemSize) -> "Views":
        """The same views with an item's own size.

        Raises:
          PictureMismatch: the sizes of the system's images are fixed, or a limit contradicts the release's.
        """
        ...

    def join(
        self, rows: Sequence[Sequence[PreparedImage]], capacity: int | None = None, pictures: int | None = None
    ) -> Images | None:
        """The images of a batch.

        Args:
          rows: for every row of the batch, its images in order.
          capacity: padded load of every row; the largest of the rows when None.
          pictures: with a capacity, the most images of a row, for views that pad these apart; None for any number.

        Returns:
          None where the capacity is 0.
        """
        ...


def too_few(max_tokens: int, needed: int, what: str = "an image") -> InfeasibleBudget:
    """The error for an image, or a video, that takes at least `needed` visual tokens."""
    return InfeasibleBudget(f"{what} takes at least {needed} visual tokens, more than the {max_tokens} allowed")


class Tiles(abc.ABC):
    """Base of views of tiles: without videos, and with batches padded with blank tiles."""

    @property
    @abc.abstractmethod
    def tile_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of a tile."""

    @property
    def channels(self) -> int:
        """As in `Views`."""
        return self.tile_shape[2]

    @property
    def frames_per_part(self) -> int:
        """1: a frame is an image."""
        return 1

    @property
    def interpolates(self) -> bool:
        """False: every token is a row."""
        return False

    @property
    @abc.abstractmethod
    def tile_tokens(self) -> int:
        """Visual tokens of a tile."""

    @abc.abstractmethod
    def layouts(self, sizes: Sequence[Size]) -> list[Layout]:
        """As in `Views`."""

    @abc.abstractmethod
    def loads(self, sizes: Sequence[Size]) -> list[int]:
        """As in `Views`."""

    def tile_grids(self, sizes: Sequence[Size]) -> list[Grid | None]:
        """Nones: an image has one place."""
        return [None] * len(sizes)

    def shares(self, sizes: Sequence[Size]) -> list[list[Share]]:
        """Tiles that have places of their own are alike."""
        every = zip(self.tile_grids(sizes), self.layouts(sizes), self.loads(sizes), strict=True)
        return [even_shares(layout, load, 1 if grid is None else load) for grid, layout, load in every]

    def video(
        self, frames: Sequence[Image.Image], fps: float | int | None, max_tokens: int | None = None
    ) -> list[PreparedImage]:
        """Raises `PictureMismatch`: videos are not supported."""
        del frames, fps, max_tokens
        raise PictureMismatch(NO_VIDEOS)

    def video_layouts(self, num_frames: int, size: Size, max_tokens: int | None = None) -> list[Layout]:
        """Raises `PictureMismatch`: videos are not supported."""
        del num_frames, size, max_tokens
        raise PictureMismatch(NO_VIDEOS)

    def video_load(self, num_frames: int, size: Size, max_tokens: int | None = None) -> int:
        """Raises `PictureMismatch`: videos are not supported."""
        return len(self.video_layouts(num_frames, size, max_tokens))

    def video_shares(self, num_frames: int, size: Size, max_tokens: int | None = None) -> list[Share]:
        """The places of a video are alike."""
        layouts = self.video_layouts(num_frames, size, max_tokens)
        return shared(layouts, self.video_load(num_frames, size, max_tokens))

    def frame_grid(self, num_frames: int, size: Size, max_tokens: int | None = None) -> Grid | None:
        """None: a frame has one place."""
        del num_frames, size, max_tokens
        return None

    def kept_frames(self, num_frames: int, size: Size, max_tokens: int | None = None) -> Sequence[int]:
        """All frames."""
        del size, max_tokens
        return range(num_frames)

    def sized(self: OwnViews, size: ItemSize) -> OwnViews:
        """Raises `PictureMismatch` for any setting: the sizes of tiles are fixed."""
        refuse_sizes(size)
        return self

    def groups(self, load: int) -> tuple[int, ...]:
        """Number of visual tokens of each view of an image of this load."""
        return (self.tile_tokens,) * load

    def join(
        self, rows: Sequence[Sequence[PreparedImage]], capacity: int | None = None, pictures: int | None = None
    ) -> Images | None:
        """The tiles of every row, one after another, and blank ones up to the capacity."""
        del pictures  # tiles are padded together
        return joined_tiles([[image.pixels for image in row] for row in rows], self.tile_shape, capacity)


def joined_tiles(
    rows: Sequence[Sequence[Float[np.ndarray, "_ height width channels"]]],
    tile_shape: tuple[int, int, int],
    capacity: int | None,
) -> Float[np.ndarray, "B I height width channels"] | None:
    """Tiles of every row, one after another, and blank ones up to the capacity, or the maximum of the rows."""
    if capacity is None:
        capacity = max(sum(map(len, parts)) for parts in rows)
    if not capacity:
        return None
    joined = np.zeros((len(rows), capacity, *tile_shape), np.float32)
    for row, parts in zip(joined, rows, strict=True):
        if parts:
            np.concatenate(parts, out=row[: sum(map(len, parts))])
    return joined


class NoViews(Tiles):
    """Views of a text-only model."""

    @property
    def tile_shape(self) -> tuple[int, int, int]:
        """(0, 0, 0)."""
        return 0, 0, 3

    @property
    def tile_tokens(self) -> int:
        """0."""
        return 0

    def images(self, pictures: Sequence[Image.Image]) -> list[PreparedImage]:
        """Raises `PictureMismatch` for any image."""
        if pictures:
            raise PictureMismatch(f"this model takes only text, got {len(pictures)} images")
        return []

    def within(self, max_tokens: int) -> "NoViews":
        """These views."""
        del max_tokens
        return self

    def retokened(self, tokens: Grid | int) -> "NoViews":
        """These views."""
        del tokens
        return self

    def layouts(self, sizes: Sequence[Size]) -> list[Layout]:
        """Raises `PictureMismatch` for any image."""
        if sizes:
            raise PictureMismatch(f"this model takes only text, got sizes of {len(sizes)} images")
        return []

    def loads(self, sizes: Sequence[Size]) -> list[int]:
        """Raises `PictureMismatch` for any image."""
        return [0 for _ in self.layouts(sizes)]
