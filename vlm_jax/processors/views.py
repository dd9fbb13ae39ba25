"""What a model is given of a picture or a video: its pixels, and the places that it takes of a sequence."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from vlm_jax.budget import InfeasibleBudget
from vlm_jax.processors.image import normalize, resize_in_fixed_point
from vlm_jax.processors.tiling import Size
from vlm_jax.types import PackedPatches, TwoSizes

# Of every place in order: row r of the picture's own visual tokens as r, the learned row k as -1 - k.
Layout = Int[np.ndarray, "n"]
Images = Float[np.ndarray, "B I height width channels"] | PackedPatches | TwoSizes


class PictureMismatch(ValueError):
    """Other pictures than a conversation speaks of or its model reads, or what is no list; the message names both."""


def check_list(given: object, what: str) -> None:
    """Refuses what is no list, such as one picture or file, whose rows or letters would be taken for several.

    Args:
      given: what a caller gave as pictures, or as videos.
      what: its name in messages.

    Raises:
      PictureMismatch: it is none.
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
      positions: (time, row, column) of every place, from 0, where text has positions of three axes.
      low: the same tiles at a lower resolution, for an encoder that sees both.
    """

    pixels: Float[np.ndarray, "..."]
    num_rows: int
    layout: Layout
    grid: tuple[int, int, int] | None = None
    positions: Int[np.ndarray, "n 3"] | None = None
    low: Float[np.ndarray, "tiles height width channels"] | None = None


@runtime_checkable
class Views(Protocol):
    """How a system looks at the pictures of a conversation; one class a way, configured by a release's files."""

    def images(self, pictures: Sequence[Image.Image]) -> list[PreparedImage]:
        """All pictures of a conversation, in RGB."""
        ...

    def layouts(self, sizes: Sequence[Size]) -> list[Layout]:
        """The same of their sizes alone, (height, width) in pixels, before anything runs."""
        ...

    def video(
        self, frames: Sequence[Image.Image], fps: float | int | None, max_tokens: int | None = None
    ) -> list[PreparedImage]:
        """A video, for every place that it has in the text.

        Args:
          frames: in RGB, as sampled.
          fps: frames a second of them, None where it is unknown.
          max_tokens: most places of the video, by fewer pixels or fewer frames; as the release has it when None.

        Raises:
          PictureMismatch: the system takes no videos.
          InfeasibleBudget: the video takes more with the fewest.
        """
        ...

    def within(self, max_tokens: int) -> "Views":
        """The same with no more than so many places for a picture, as far as the system can see with fewer.

        Raises:
          InfeasibleBudget: it takes more for the smallest; the message says how many.
        """
        ...

    def join(self, examples: Sequence[Sequence[PreparedImage]]) -> Images | None:
        """The images of a batch; None where nothing is seen in it."""
        ...


@dataclasses.dataclass(frozen=True)
class Pixels:
    """How pixels of tiles reach the encoder.

    Attributes:
      mean: per channel, on the scale [0, 1].
      std: per channel.
      resample: Pillow's filter.
      as_torch: resized as torch does pixels of 8 bits, by the filter of that name; else by Pillow itself.
    """

    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    resample: Image.Resampling = Image.Resampling.BICUBIC
    as_torch: bool = False

    @property
    def mean_colour(self) -> tuple[int, ...]:
        """The mean in 8 bits, truncated."""
        return tuple(int(255 * value) for value in self.mean)

    def resized(self, picture: Image.Image, size: Size) -> Image.Image:
        """The picture stretched to (height, width)."""
        wanted = (size[1], size[0])
        if picture.size == wanted:
            return picture
        if self.as_torch:
            return Image.fromarray(resize_in_fixed_point(np.asarray(picture), size, self.resample))
        return picture.resize(wanted, self.resample)

    def tiles(self, pictures: Sequence[Image.Image]) -> Float[np.ndarray, "tiles height width channels"]:
        """Normalised pixels of pictures of one size."""
        return np.stack([normalize(np.asarray(picture), self.mean, self.std) for picture in pictures])


def too_few(max_tokens: int, needed: int, what: str = "a picture") -> InfeasibleBudget:
    """The error of a picture, or a video, that takes `needed` places at least."""
    return InfeasibleBudget(f"{what} takes {needed} visual tokens at least, more than the {max_tokens} allowed")


class Tiles:
    """What views of tiles have in common: no videos, and batches that are filled up with blank tiles."""

    def video(
        self, frames: Sequence[Image.Image], fps: float | int | None, max_tokens: int | None = None
    ) -> list[PreparedImage]:
        """Refuses."""
        del frames, fps, max_tokens
        raise PictureMismatch("this system takes pictures and no videos; give single frames as images")

    def join(
        self, examples: Sequence[Sequence[PreparedImage]]
    ) -> Float[np.ndarray, "B I height width channels"] | None:
        """The tiles of every example, one after another, and blank ones up to the most of any."""
        return joined_tiles([[seen.pixels for seen in example] for example in examples])


def joined_tiles(
    examples: Sequence[Sequence[Float[np.ndarray, "_ height width channels"]]],
) -> Float[np.ndarray, "B I height width channels"] | None:
    """Tiles of every example, one after another, and blank ones up to the most of any; None where there is none."""
    shape = next((part.shape[1:] for parts in examples for part in parts), None)
    if shape is None:
        return None
    joined = np.zeros((len(examples), max(sum(map(len, parts)) for parts in examples), *shape), np.float32)
    for row, parts in zip(joined, examples, strict=True):
        if parts:
            np.concatenate(parts, out=row[: sum(map(len, parts))])
    return joined


class NoViews(Tiles):
    """A model without eyes."""

    def images(self, pictures: Sequence[Image.Image]) -> list[PreparedImage]:
        """Refuses any picture."""
        if pictures:
            raise PictureMismatch(f"this model reads text alone, and {len(pictures)} pictures are given")
        return []

    def within(self, max_tokens: int) -> "NoViews":
        """Itself."""
        del max_tokens
        return self

    def layouts(self, sizes: Sequence[Size]) -> list[Layout]:
        """Refuses any picture."""
        if sizes:
            raise PictureMismatch(f"this model reads text alone, and sizes of {len(sizes)} pictures are given")
        return []
