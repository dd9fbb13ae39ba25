"""Tiles in fewer pixels, for an encoder that then makes fewer patches of each."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from PIL import Image

from vlm_jax.interpolation import interpolation_weights
from vlm_jax.processors.tiling import Size
from vlm_jax.processors.views import Layout, PreparedImage, Tiles, Views
from vlm_jax.types import Grid


@runtime_checkable
class TiledViews(Views, Protocol):
    """Views of tiles of one size."""

    def within(self, max_tokens: int) -> "TiledViews": ...

    def retokened(self, tokens: Grid | int) -> "TiledViews": ...

    @property
    def tile_shape(self) -> tuple[int, int, int]: ...

    @property
    def tile_tokens(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class DownsampledViews(Tiles):
    """The tiles of other views, each resized to fewer pixels once it is normalised.

    Number of tiles, what each shows and how they are laid out are decided at the tiles' full size, as without it. A
    tile is resized with a triangle filter that is widened by the factor (bilinear, antialiased), which leaves every
    value between those that were there.

    Attributes:
      base: makes the tiles, and lays out the tokens that are left of each: it is retokened already.
      size: (height, width) that tiles are resized to, in pixels.
    """

    base: TiledViews
    size: Size

    @property
    def tile_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of a tile."""
        return (*self.size, self.base.tile_shape[2])

    @property
    def tile_tokens(self) -> int:
        """Visual tokens of a tile."""
        return self.base.tile_tokens

    @property
    def interpolates(self) -> bool:
        """As `base`."""
        return self.base.interpolates

    def images(self, pictures: Sequence[Image.Image]) -> list[PreparedImage]:
        """The pictures of a conversation."""
        return [self._smaller(image) for image in self.base.images(pictures)]

    def layouts(self, sizes: Sequence[Size]) -> list[Layout]:
        """Those of `base`."""
        return self.base.layouts(sizes)

    def loads(self, sizes: Sequence[Size]) -> list[int]:
        """Those of `base`."""
        return self.base.loads(sizes)

    def tile_grids(self, sizes: Sequence[Size]) -> list[Grid | None]:
        """Those of `base`."""
        return self.base.tile_grids(sizes)

    def video(
        self, frames: Sequence[Image.Image], fps: float | int | None, max_tokens: int | None = None
    ) -> list[PreparedImage]:
        """A video as `base` cuts it."""
        return [self._smaller(image) for image in self.base.video(frames, fps, max_tokens)]

    def video_layouts(self, num_frames: int, size: Size, max_tokens: int | None = None) -> list[Layout]:
        """Those of `base`."""
        return self.base.video_layouts(num_frames, size, max_tokens)

    def video_load(self, num_frames: int, size: Size, max_tokens: int | None = None) -> int:
        """That of `base`."""
        return self.base.video_load(num_frames, size, max_tokens)

    def frame_grid(self, num_frames: int, size: Size, max_tokens: int | None = None) -> Grid | None:
        """That of `base`."""
        return self.base.frame_grid(num_frames, size, max_tokens)

    def kept_frames(self, num_frames: int, size: Size, max_tokens: int | None = None) -> Sequence[int]:
        """Those of `base`."""
        return self.base.kept_frames(num_frames, size, max_tokens)

    def within(self, max_tokens: int) -> "DownsampledViews":
        """With fewer tiles, where `base` can do with fewer."""
        return dataclasses.replace(self, base=self.base.within(max_tokens))

    def retokened(self, tokens: Grid | int) -> "DownsampledViews":
        """With other tokens for a tile of the same pixels."""
        return dataclasses.replace(self, base=self.base.retokened(tokens))

    def _smaller(self, image: PreparedImage) -> PreparedImage:
        return dataclasses.replace(image, pixels=resized(image.pixels, self.size))


def resized(
    tiles: Float[np.ndarray, "tiles height width channels"], size: Size
) -> Float[np.ndarray, "tiles new_height new_width channels"]:
    """Tiles at another size in pixels: bilinear, antialiased; float32."""
    count, height, width, channels = tiles.shape
    rows, cols = (
        interpolation_weights(*ends, "bilinear_antialias") for ends in zip((height, width), size, strict=True)
    )
    narrow = (rows @ tiles.reshape(count, height, -1)).reshape(count * size[0], width, channels)
    return (cols @ narrow).reshape(count, *size, channels)
