"""Pixel preprocessing of images: colours, resizing and normalisation."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float
from PIL import Image

from vlm_jax.processors.image import ANTIALIAS, CorruptImage, height_and_width, normalize, resize_in_fixed_point
from vlm_jax.processors.naflex import interpolate
from vlm_jax.processors.thin import MAX_LENGTH, Axis, is_large, resized_part
from vlm_jax.processors.tiling import Size


@dataclasses.dataclass(frozen=True)
class Pixels:
    """Settings of a release's, or a config's, image processor.

    Attributes:
      mean: per channel, in [0, 1], subtracted from the rescaled pixels; one for grey, three for RGB.
      std: per channel, divides the result.
      resample: Pillow's filter.
      resizes_as: by `pillow`; as `torch` for 8-bit pixels, with the filter of that name; or as `tensorflow`, bilinear
        with antialiasing, and truncated: the preprocessing of big_vision.
    """

    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    resample: Image.Resampling = Image.Resampling.BICUBIC
    resizes_as: Literal["pillow", "torch", "tensorflow"] = "pillow"

    def __post_init__(self):
        if self.resizes_as == "tensorflow" and self.resample != Image.Resampling.BILINEAR:
            raise ValueError(f"resample: expected BILINEAR as in TensorFlow, got {self.resample.name}")

    @property
    def channels(self) -> int:
        """1 for grey, 3 for RGB."""
        return len(self.mean)

    @property
    def mean_colour(self) -> tuple[int, ...]:
        """The mean in 8 bits, truncated."""
        return tuple(int(255 * value) for value in self.mean)

    def blank(self, size: Size) -> Image.Image:
        """A black image of (height, width)."""
        return Image.new("L" if self.channels == 1 else "RGB", (size[1], size[0]))

    def resized(self, picture: Image.Image, size: Size) -> Image.Image:
        """The image stretched to (height, width)."""
        wanted = (size[1], size[0])
        if picture.size == wanted:
            return picture
        if min(size) < 1:
            raise CorruptImage(f"a picture of {picture.height}x{picture.width} pixels is too thin for these views")
        if self.resizes_as == "tensorflow":
            pixels = interpolate(self.array(picture), size, "bilinear_antialias")
            return Image.fromarray(pixels[:, :, 0] if self.channels == 1 else pixels)
        in_parts = is_large((size[1], picture.height), picture)  # after the first pass
        if self.resample in ANTIALIAS and (in_parts or max(picture.size) > MAX_LENGTH):
            rows, columns = (
                Axis(0, own, new, (0, new)) for own, new in zip(height_and_width(picture), size, strict=True)
            )
            return resized_part(picture, rows, columns, self.resample, as_torch=self.resizes_as == "torch")
        if self.resizes_as == "torch":
            return Image.fromarray(resize_in_fixed_point(np.asarray(picture), size, self.resample))
        return picture.resize(wanted, self.resample)

    def array(self, picture: Image.Image) -> np.ndarray:
        """uint8 [height, width, channels]."""
        pixels = np.asarray(picture)
        return pixels[:, :, None] if pixels.ndim == 2 else pixels

    def tiles(self, pictures: Sequence[Image.Image]) -> Float[np.ndarray, "tiles height width channels"]:
        """Normalised pixels of images of one size."""
        return np.stack([normalize(self.array(picture), self.mean, self.std) for picture in pictures])
