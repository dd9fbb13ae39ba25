"""Pictures: files to uint8 pixels, pixels to another size, uint8 to normalised float32.

Inside the package a picture is a uint8 array [height, width, channels] with 1 channel (grey) or
3 (RGB, sRGB as stored).
"""

import io
import os
from collections.abc import Sequence
from typing import Literal

import numpy as np
from etils import epath
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

Filter = Literal["box", "bilinear", "bicubic", "lanczos"]
FILTERS: dict[str, Image.Resampling] = {
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class CorruptImage(ValueError):
    """A file that holds no usable image; the message names the file and says why."""


def open_image(
    source: str | os.PathLike | bytes,
    *,
    channels: int = 3,
    max_pixels: int = 100_000_000,
    name: str = "bytes",
) -> UInt8[np.ndarray, "height width channels"]:
    """Reads an image file of any format that Pillow knows, upright and in 8 bits.

    The EXIF orientation is applied, palettes are resolved, transparency is laid over white, 16-bit
    grey keeps its upper 8 bits, CMYK becomes RGB without a colour profile. Of an animation the
    first frame is taken.

    Args:
      source: a path, local or `gs://`, or the file's bytes.
      channels: 1 for grey (ITU-R 601 luma), 3 for RGB.
      max_pixels: height * width that the header may claim; more is taken for a decompression bomb.
        Whatever it says, Pillow itself refuses more than twice its `Image.MAX_IMAGE_PIXELS`.
      name: stands for the file in messages when `source` is bytes.

    Raises:
      FileNotFoundError: there is no such file.
      CorruptImage: the file cannot be decoded, or is too large.
    """
    if isinstance(source, bytes):
        data = source
    else:
        name = os.fspath(source)
        data = epath.Path(source).read_bytes()
    try:
        with Image.open(io.BytesIO(data)) as picture:
            width, height = picture.size
            if width * height > max_pixels:
                raise CorruptImage(
                    f"{name}: its header claims {height}x{width} pixels, more than max_pixels={max_pixels}"
                )
            picture.load()
            return _pixels(_eight_bits(ImageOps.exif_transpose(picture)), channels)
    except CorruptImage:
        raise
    except Exception as error:  # Pillow's decoders raise a dozen kinds on broken bytes
        reason = "no known image format" if isinstance(error, UnidentifiedImageError) else error
        raise CorruptImage(f"{name}: {type(error).__name__}: {reason}") from error


def _eight_bits(picture: Image.Image) -> Image.Image:
    """The picture in mode L or RGB."""
    if picture.mode.startswith("I"):  # 16-bit grey, in whichever container Pillow put it
        return Image.fromarray((np.clip(np.asarray(picture), 0, 65535) >> 8).astype(np.uint8))
    if picture.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture)
        return picture.convert("RGB")
    return picture.convert("L" if picture.mode in ("1", "L") else "RGB")


def _pixels(picture: Image.Image, channels: int) -> UInt8[np.ndarray, "height width channels"]:
    pixels = np.array(picture)
    return to_channels(pixels[:, :, None] if pixels.ndim == 2 else pixels, channels)


def to_channels(
    image: UInt8[np.ndarray, "height width given"], channels: int
) -> UInt8[np.ndarray, "height width channels"]:
    """Grey to RGB by repetition, RGB to grey by ITU-R 601 luma; `image` itself if nothing changes.

    Raises:
      ValueError: `channels`, or the image's own number of channels, is neither 1 nor 3.
    """
    given = image.shape[2]
    if given not in (1, 3) or channels not in (1, 3):
        raise ValueError(f"images have 1 or 3 channels, got one of shape {image.shape} to make {channels} of")
    if given == channels:
        return image
    if channels == 3:
        return np.repeat(image, 3, axis=2)
    return np.asarray(Image.fromarray(image).convert("L"))[:, :, None]


def resize(
    image: UInt8[np.ndarray, "height width channels"], size: tuple[int, int], filter: str
) -> UInt8[np.ndarray, "new_height new_width channels"]:
    """Resizes to (height, width) pixels with one of `FILTERS`, antialiased when it shrinks.

    The aspect is not kept: the image is stretched to the size. `image` itself if it has the size.
    """
    if image.shape[:2] == tuple(size):
        return image
    grey = image.shape[2] == 1
    picture = Image.fromarray(image[:, :, 0] if grey else image)
    resized = np.asarray(picture.resize((size[1], size[0]), FILTERS[filter]))
    return resized[:, :, None] if grey else resized


def normalize(
    image: UInt8[np.ndarray, "height width channels"], mean: Sequence[float | int], std: Sequence[float | int]
) -> Float[np.ndarray, "height width channels"]:
    """float32 of (image / 255 - mean) / std, with mean and std per channel on the scale [0, 1]."""
    scale = 1.0 / (255.0 * np.asarray(std, np.float64))
    shift = np.asarray(mean, np.float64) / np.asarray(std, np.float64)
    pixels = image.astype(np.float32)
    pixels *= scale.astype(np.float32)
    pixels -= shift.astype(np.float32)
    return pixels
