"""Pictures to the images of a batch: tiles of one size, or packed patches at native resolution.

What is looked at is a clip, a sequence of frames; a picture is a clip of one frame. Both kinds of
views say, before any model runs, how many visual tokens a clip takes: `count` reads shapes alone.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

from vlm_jax.config import ConfigError
from vlm_jax.processors.image import FILTERS, normalize, resize, to_channels
from vlm_jax.processors.patches import pack_patches, patchify
from vlm_jax.types import Grid, PackedPatches, PatchFormat

Clip = Sequence[UInt8[np.ndarray, "_ _ _"]]


@dataclasses.dataclass(frozen=True)
class Pixels:
    """How a picture's pixels reach the encoder.

    Attributes:
      channels: 1 (grey) or 3 (RGB).
      mean: per channel, on the scale [0, 1], taken off the rescaled pixels.
      std: per channel, divides what remains.
      filter: resampling filter, a key of `image.FILTERS`.
    """

    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    filter: str

    def __post_init__(self):
        if self.channels not in (1, 3):
            raise ConfigError(f"config.data.channels: images have 1 or 3 channels, got {self.channels}")
        for key in ("mean", "std"):
            if len(getattr(self, key)) != self.channels:
                raise ConfigError(
                    f"config.processor.{key}: one number a channel, {self.channels}, expected; got {getattr(self, key)}"
                )
        if min(self.std) <= 0:
            raise ConfigError(f"config.processor.std: positive numbers expected, got {self.std}")
        if self.filter not in FILTERS:
            raise ConfigError(f"config.processor.filter: '{self.filter}' is not one of {', '.join(FILTERS)}")

    def __call__(
        self, image: UInt8[np.ndarray, "height width given"], size: tuple[int, int]
    ) -> Float[np.ndarray, "new_height new_width channels"]:
        """A picture converted, resized to (height, width) and normalised."""
        return normalize(resize(to_channels(image, self.channels), size, self.filter), self.mean, self.std)


@dataclasses.dataclass(frozen=True)
class TiledViews:
    """Every frame as rows x columns of tiles, and a thumbnail of the whole; each is an image of the batch.

    Attributes:
      pixels: what is done to pixels.
      tile_size: (height, width) in pixels of a tile.
      num_tokens: M, visual tokens of a tile.
      tiles: rows and columns of tiles that a frame is resized to and cut into.
      thumbnail: whether the whole frame, at the size of a tile, follows its tiles.

    Source: Chen et al. 2024 (InternVL 1.5), section 3.2, for tiles row by row and the thumbnail after them.
    """

    pixels: Pixels
    tile_size: tuple[int, int]
    num_tokens: int
    tiles: Grid = (1, 1)
    thumbnail: bool = False

    @property
    def per_frame(self) -> int:
        """Images of the batch that one frame becomes."""
        return self.tiles[0] * self.tiles[1] + self.thumbnail

    def count(self, clip: Clip) -> int:
        """Visual tokens of a clip."""
        return len(clip) * self.per_frame * self.num_tokens

    def picture(
        self, image: UInt8[np.ndarray, "height width given"]
    ) -> Float[np.ndarray, "tile_height tile_width channels"]:
        """A whole picture as one view."""
        return self.pixels(image, self.tile_size)

    def __call__(self, clips: Sequence[Clip]) -> Float[np.ndarray, "1 I tile_height tile_width channels"]:
        """The views of all frames of all clips, in order, as a batch of one."""
        return np.stack([view for clip in clips for frame in clip for view in self._views(frame)])[None]

    def _views(self, frame: UInt8[np.ndarray, "height width given"]) -> list[np.ndarray]:
        (rows, cols), (height, width) = self.tiles, self.tile_size
        whole = self.pixels(frame, (rows * height, cols * width))
        tiles = whole.reshape(rows, height, cols, width, -1).swapaxes(1, 2).reshape(-1, height, width, whole.shape[-1])
        return [*tiles, *([self.picture(frame)] if self.thumbnail else [])]


@dataclasses.dataclass(frozen=True)
class NativeViews:
    """Every clip at a resolution of its own, its patches packed into one sequence of a fixed length.

    A frame of a clip is resized so that it has at most `max_blocks` blocks of merge_size x merge_size
    patches, with the aspect of the first. Temporal patches join `temporal_patch_size` frames.

    Attributes:
      pixels: what is done to pixels.
      format: how patches are cut and packed.
      length: places of the sequence.
      max_blocks: most blocks of a frame (of frames that share a patch, together).
      min_blocks: fewest; a smaller frame is enlarged.
      block_tokens: visual tokens of a block.
    """

    pixels: Pixels
    format: PatchFormat
    length: int
    max_blocks: int
    min_blocks: int = 1
    block_tokens: int = 1

    def grid(self, height: int, width: int) -> Grid:
        """Rows and columns of blocks that a frame of so many pixels is resized to."""
        return fit_blocks(height, width, self.format.block_size, self.min_blocks, self.max_blocks)

    def count(self, clip: Clip) -> int:
        """Visual tokens of a clip."""
        rows, cols = self.grid(*clip[0].shape[:2])
        return self.format.num_slots(len(clip)) * rows * cols * self.block_tokens

    def picture(self, image: UInt8[np.ndarray, "height width given"]) -> Float[np.ndarray, "height2 width2 channels"]:
        """A whole picture as it is cut into patches."""
        return self._frames([image])[0]

    def __call__(self, clips: Sequence[Clip]) -> PackedPatches:
        """The patches of all clips, in order, as a batch of one."""
        form = self.format
        cut = [
            patchify(
                self._frames(clip),
                patch_size=form.patch_size,
                temporal_patch_size=form.temporal_patch_size,
                merge_size=form.merge_size,
                channels_last=form.channels_last,
            )
            for clip in clips
        ]
        patches, grids = zip(*cut, strict=True)
        settings = {"merge_size": form.merge_size, "window": form.window, "length": self.length}
        return pack_patches(np.concatenate(patches), grids, **settings)

    def _frames(self, clip: Clip) -> Float[np.ndarray, "frames height width channels"]:
        rows, cols = self.grid(*clip[0].shape[:2])
        unit = self.format.block_size
        return np.stack([self.pixels(frame, (rows * unit, cols * unit)) for frame in clip])


Views = TiledViews | NativeViews


def fit_blocks(height: int, width: int, unit: int, min_blocks: int, max_blocks: int) -> Grid:
    """Rows and columns of squares of `unit` pixels that a picture is resized to, about keeping its aspect.

    Sides are rounded to whole blocks. A picture of more than max_blocks shrinks, and one of fewer than
    min_blocks grows, to the sides sqrt(blocks * aspect) rounded down or up. Unlike in the source the
    result never has more than max_blocks blocks, however long and thin the picture, and sides are
    computed in integers.

    Source: transformers, Qwen2VLImageProcessor, smart_resize.
    """
    rows, cols = max(1, round(height / unit)), max(1, round(width / unit))
    if rows * cols < min_blocks:
        rows, cols = (_ceil_sqrt(a * min_blocks, b) for a, b in ((height, width), (width, height)))
    if rows * cols > max_blocks:
        rows = min(max(1, math.isqrt(height * max_blocks // width)), max_blocks)
        cols = min(max(1, math.isqrt(width * max_blocks // height)), max_blocks // rows)
    return rows, cols


def _ceil_sqrt(numerator: int, denominator: int) -> int:
    """The smallest integer whose square is at least the fraction, which is positive."""
    return math.isqrt(-(-numerator // denominator) - 1) + 1


def packed_length(blocks: int, format: PatchFormat) -> int:
    """Places that any images of `blocks` blocks in all fit into.

    With windows, `pack` fills rows of whole windows first-fit: any two rows hold more blocks together
    than one has room for, so that the rows are fewer than 2 * blocks / room.
    """
    if format.window is None:
        return blocks * format.merge_size**2
    room = format.window**2
    return max(1, -(-2 * blocks // room) - 1) * room * format.merge_size**2


def uniform_frames(count: int, wanted: int) -> list[int]:
    """Which of `count` frames stand for the clip: the middles of `wanted` equal parts, in order.

    Fewer frames than are wanted are repeated.

    Source: Wang et al. 2016 (TSN), section 3.1, at the middle of each segment as in testing.
    """
    return [(2 * part + 1) * count // (2 * wanted) for part in range(wanted)]
