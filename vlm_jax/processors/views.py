"""What an encoder is given of the pictures of a conversation, and the places that they take of a sequence."""

import abc
import dataclasses
import os
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from vlm_jax.budget import InfeasibleBudget
from vlm_jax.processors.tiling import Size
from vlm_jax.types import Grid, PackedPatches, TwoSizes

# Of every place in order: row r of the picture's own visual tokens as r, the learned row k as -1 - k.
Layout = Int[np.ndarray, "_"]
Images = Float[np.ndarray, "B I height width channels"] | PackedPatches | TwoSizes


class PictureMismatch(ValueError):
    """Pictures that differ from what a conversation or its model expects; the message names both."""


def check_list(given: object, what: str) -> None:
    """Raises unless given a list; a bare picture, array or string would be iterated.

    Args:
      given: what a caller gave as pictures, or as videos.
      what: its name in messages.

    Raises:
      PictureMismatch: it is not a list.
    """
    if isinstance(given, Sequence) and not isinstance(given, str | bytes):
        return
    shown = repr(given) if given is None or isinstance(given, str | os.PathLike) else f"one {type(given).__name__}"
    fix = (
        "leave it out or give []" if given is None else f"write [{given!r}]" if isinstance(given, str) else "write […]"
    )
    raise PictureMismatch(f"{what}: expected a list, got {shown}; {fix}")


@dataclasses.dataclass(frozen=True)
class PreparedImage:
    """A picture, a video, or a part of either that stands in one place of the text.

    Attributes:
      pixels: normalised tiles [tiles, height, width, channels], or patches [patches, values].
      num_rows: rows of the visual table that they become.
      layout: what fills its places.
      grid: (frames, rows, columns) of the patches; None of tiles.
      positions: (time, row, column) of every token before a reducer, from 0, where text has positions of three axes.
      low: the same tiles at a lower resolution, for an encoder that reads both.
    """

    pixels: Float[np.ndarray, "..."]
    num_rows: int
    layout: Int[np.ndarray, "n"]
    grid: tuple[int, int, int] | None = None
    positions: Int[np.ndarray, "m 3"] | None = None
    low: Float[np.ndarray, "tiles height width channels"] | None = None


@runtime_checkable
class Views(Protocol):
    """How a system looks at the pictures of a conversation; one class for each way.

    Sizes are (height, width) in pixels. The *load* of a picture is what it takes of a row's images: tiles, or
    places of packed patches; loads of one row add up.
    """

    @property
    def channels(self) -> int:
        """Channels of the pictures that it takes: 1 for mode L, 3 for RGB."""
        ...

    def images(self, pictures: Sequence[Image.Image]) -> list[PreparedImage]:
        """All pictures of a conversation."""
        ...

    def layouts(self, sizes: Sequence[Size]) -> list[Layout]:
        """The layouts of `images`, from sizes alone."""
        ...

    def loads(self, sizes: Sequence[Size]) -> list[int]:
        """The load of each picture of a conversation."""
        ...

    def video(
        self, frames: Sequence[Image.Image], fps: float | int | None, max_tokens: int | None = None
    ) -> list[PreparedImage]:
        """A video, one entry for every place that it has in the text.

        Args:
          frames: as sampled.
          fps: frames a second of them, None where it is unknown.
          max_tokens: most places of the video, by fewer pixels or fewer frames; as the release has it when None.

        Raises:
          PictureMismatch: the system takes no videos.
          InfeasibleBudget: the video takes more with the fewest.
        """
        ...

    def video_layouts(self, num_frames: int, size: Size, max_tokens: int | None = None) -> list[Layout]:
        """The layouts of `video`, from the number and the size of its frames; raises as `video` does."""
        ...

    def video_load(self, num_frames: int, size: Size, max_tokens: int | None = None) -> int:
        """The load of a video."""
        ...

    def within(self, max_tokens: int) -> "Views":
        """The same with no more than `max_tokens` places for a picture, by fewer tiles or pixels.

        Raises:
          InfeasibleBudget: the smallest picture takes more; the message says how many.
        """
        ...

    def retokened(self, tokens: Grid | int) -> "Views":
        """The same for an encoder and connector that give another number of tokens for a view.

        Args:
          tokens: rows and columns of a view's tokens, or, where they form no grid, their number; a layout of rows
            and columns is then replaced by one without.
        """
        ...

    def join(self, rows: Sequence[Sequence[PreparedImage]], capacity: int | None = None) -> Images | None:
        """The images of a batch.

        Args:
          rows: of every row of the batch, its pictures in order.
          capacity: load that every row has room for; the largest of the rows when None.

        Returns:
          None where the capacity is 0.
        """
        ...


def too_few(max_tokens: int, needed: int, what: str = "a picture") -> InfeasibleBudget:
    """The error of a picture, or a video, that takes `needed` places at least."""
    return InfeasibleBudget(f"{what} takes {needed} visual tokens at least, more than the {max_tokens} allowed")


class Tiles(abc.ABC):
    """What views of tiles have in common: no videos, and batches that are filled up with blank tiles."""

    @property
    @abc.abstractmethod
    def tile_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of a tile."""

    @property
    def channels(self) -> int:
        """As of `Views`."""
        return self.tile_shape[2]

    @property
    @abc.abstractmethod
    def tile_tokens(self) -> int:
        """Visual tokens of a tile."""

    def video(
        self, frames: Sequence[Image.Image], fps: float | int | None, max_tokens: int | None = None
    ) -> list[PreparedImage]:
        """Raises: no videos."""
        del frames, fps, max_tokens
        raise PictureMismatch("this system takes pictures and no videos; give single frames as images")

    def video_layouts(self, num_frames: int, size: Size, max_tokens: int | None = None) -> list[Layout]:
        """Raises: no videos."""
        del num_frames, size, max_tokens
        raise PictureMismatch("this system takes pictures and no videos; give single frames as images")

    def video_load(self, num_frames: int, size: Size, max_tokens: int | None = None) -> int:
        """Raises: no videos."""
        return len(self.video_layouts(num_frames, size, max_tokens))

    def join(
        self, rows: Sequence[Sequence[PreparedImage]], capacity: int | None = None
    ) -> Float[np.ndarray, "B I height width channels"] | None:
        """The tiles of every row, one after another, and blank ones up to the capacity."""
        return joined_tiles([[image.pixels for image in row] for row in rows], self.tile_shape, capacity)


def joined_tiles(
    rows: Sequence[Sequence[Float[np.ndarray, "_ height width channels"]]],
    tile_shape: tuple[int, int, int],
    capacity: int | None,
) -> Float[np.ndarray, "B I height width channels"] | None:
    """Tiles of every row, one after another, and blank ones up to the capacity, or the most of any row."""
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
        """Of nothing."""
        return 0, 0, 3

    @property
    def tile_tokens(self) -> int:
        """None."""
        return 0

    def images(self, pictures: Sequence[Image.Image]) -> list[PreparedImage]:
        """Raises for any picture."""
        if pictures:
            raise PictureMismatch(f"this model reads text alone, and {len(pictures)} pictures are given")
        return []

    def within(self, max_tokens: int) -> "NoViews":
        """Itself."""
        del max_tokens
        return self

    def retokened(self, tokens: Grid | int) -> "NoViews":
        """Itself."""
        del tokens
        return self

    def layouts(self, sizes: Sequence[Size]) -> list[Layout]:
        """Raises for any picture."""
        if sizes:
            raise PictureMismatch(f"this model reads text alone, and sizes of {len(sizes)} pictures are given")
        return []

    def loads(self, sizes: Sequence[Size]) -> list[int]:
        """Raises for any picture."""
        return [0 for _ in self.layouts(sizes)]
