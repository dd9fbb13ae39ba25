"""Images: files to uint8 pixels, resizing, and uint8 to normalised float32.

In the package `data` an image is a uint8 array [height, width, channels] with 1 channel (grey) or
3 (RGB, sRGB as stored); the processors of released systems use Pillow's RGB images.
"""

import contextlib
import functools
import io
import os
from collections.abc import Iterator, Sequence
from typing import IO, cast

import numpy as np
from jaxtyping import Float, UInt8
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from vlm_jax.interpolation import AntialiasKind, fixed_point_weights
from vlm_jax.paths import regular
from vlm_jax.sources import SourceError, located

FILTERS: dict[str, Image.Resampling] = {
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

# Of Pillow's formats, those of pictures, whose decoders start no program (EPS starts Ghostscript).
FORMATS = (
    *("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "PSD", "QOI", "SGI", "TGA"),
    *("TIFF", "WEBP"),
)

# Entries of Pillow's `info` of a PNG that can state an orientation.
ORIENTED = frozenset({"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"})

FIXED_POINT: dict[Image.Resampling, AntialiasKind] = {
    Image.Resampling.BILINEAR: "bilinear_antialias",
    Image.Resampling.BICUBIC: "bicubic_antialias",
    Image.Resampling.LANCZOS: "lanczos_antialias",
}
ANTIALIAS: dict[Image.Resampling, AntialiasKind] = {
    **FIXED_POINT,
    Image.Resampling.BOX: "box_antialias",
}
_CHUNK = 1 << 22  # values that are computed at once


class CorruptImage(ValueError):
    """A file without a usable image; the message has the file and the reason."""


def open_image(
    source: str | os.PathLike | bytes,
    *,
    channels: int = 3,
    max_pixels: int = 100_000_000,
    name: str = "bytes",
) -> UInt8[np.ndarray, "height width channels"]:
    """Reads an image file of one of `FORMATS`, upright and in 8 bits.

    The EXIF orientation is applied, palettes are resolved, transparency is blended with white, 16-bit
    grey keeps its upper 8 bits, CMYK is converted to RGB without a colour profile. The first frame of an
    animation is used.

    Args:
      source: a location as in `sources.located`, or the file's bytes.
      channels: 1 for grey (ITU-R 601 luma), 3 for RGB.
      max_pixels: maximum height * width in the header; more is treated as a decompression bomb.
        Pillow itself always rejects more than twice its `Image.MAX_IMAGE_PIXELS`.
      name: name of the file in errors when `source` is bytes.

    Raises:
      FileNotFoundError: there is no such file.
      CorruptImage: the file cannot be decoded, or is too large.
    """
    return _pixels(_opened(resolved(source, name), max_pixels, name), channels)


def resolved(source: str | os.PathLike | bytes, name: str, *, allow_network: bool = False) -> str | os.PathLike | bytes:
    """The path or the bytes of a picture's or a video's location; see `sources.located`.

    Raises:
      CorruptImage: a malformed URL, or a download that is not allowed or failed; the message has `name`.
    """
    if not isinstance(source, str):
        return source
    try:
        return located(source, allow_network=allow_network)
    except SourceError as error:
        raise CorruptImage(f"{name}: {error}") from error


def image_size(
    source: str | os.PathLike | bytes, *, max_pixels: int = 100_000_000, name: str = "bytes"
) -> tuple[int, int]:
    """(height, width) of the upright picture that `open_image` would read, from the file's header.

    An orientation that a PNG file states behind its pixels is not seen.

    Raises:
      FileNotFoundError: there is no such file.
      CorruptImage: the header cannot be read, or the picture is too large.
    """
    source = resolved(source, name)
    name = name if isinstance(source, bytes) else os.fspath(source)
    with _file(source) as file, _reading(file, name) as picture:
        _check_size(picture, max_pixels, name)
        width, height = picture.size
        if picture.format == "TIFF":  # Pillow gives its size upright
            return height, width
        known = picture.format != "PNG" or not ORIENTED.isdisjoint(picture.info)  # else Pillow would decode it to look
        return (width, height) if known and _orientation(picture) >= 5 else (height, width)


def to_picture(
    source: Image.Image | np.ndarray | str | os.PathLike | bytes,
    *,
    max_pixels: int = 100_000_000,
    name: str = "picture",
    mode: str = "RGB",
    allow_network: bool = False,
) -> Image.Image:
    """Any image as a Pillow image in one mode: upright, in 8 bits, transparency blended with white.

    Args:
      source: a file as in `open_image`, a Pillow image, or pixels [height, width] or
        [height, width, channels] of dtype uint8 with 1, 3 or 4 channels.
      max_pixels: maximum number of pixels.
      name: name of the image in errors.
      mode: RGB, or L for grey (ITU-R 601 luma).
      allow_network: whether a web address is downloaded.

    Raises:
      FileNotFoundError: there is no such file.
      CorruptImage: the file cannot be decoded, the image is too large or empty, the array is not an image, or
        the source is of another type.
    """
    if not isinstance(source, Image.Image | np.ndarray | str | os.PathLike | bytes):
        raise CorruptImage(
            f"{name}: expected a file's path or bytes, a Pillow image or a NumPy array, got "
            + ("None" if source is None else f"a value of type {type(source).__name__}")
        )
    if isinstance(source, np.ndarray):
        if (
            source.dtype != np.uint8
            or source.ndim not in (2, 3)
            or (source.ndim == 3 and source.shape[2] not in (1, 3, 4))
        ):
            raise CorruptImage(
                f"{name}: expected uint8 pixels [height, width] or [height, width, 1, 3 or 4], got {source.dtype} "
                f"{list(source.shape)}"
            )
        if not source.size:  # Pillow would raise another error
            raise CorruptImage(f"{name}: expected pixels, got none in {source.shape[0]}x{source.shape[1]}")
        source = Image.fromarray(source[:, :, 0] if source.ndim == 3 and source.shape[2] == 1 else source)
    if isinstance(source, Image.Image):
        picture = _decoded(source, max_pixels, name)
    else:
        picture = _opened(resolved(source, name, allow_network=allow_network), max_pixels, name)
    return picture if picture.mode == mode else picture.convert(mode)


def _opened(source: str | os.PathLike | bytes, max_pixels: int, name: str) -> Image.Image:
    name = name if isinstance(source, bytes) else os.fspath(source)
    with _file(source) as file, _reading(file, name) as picture:
        return _decoded(picture, max_pixels, name)


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _file(source: str | os.PathLike | bytes) -> io.IOBase:
    """The file at a path, or of bytes."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    return cast(io.IOBase, regular(source, CorruptImage).open("rb"))


@contextlib.contextmanager
def _reading(file: io.IOBase, name: str) -> Iterator[Image.Image]:
    """A file of which Pillow has read the header; what Pillow raises becomes CorruptImage."""
    try:
        with Image.open(cast(IO[bytes], file), formats=_formats()) as picture:
            yield picture
    except CorruptImage:
        raise
    except Exception as error:  # Pillow's decoders raise many types for invalid bytes
        is_unknown = isinstance(error, UnidentifiedImageError)
        reason = f"unknown image format; expected one of {', '.join(FORMATS)}" if is_unknown else error
        raise CorruptImage(f"{name}: {type(error).__name__}: {reason}") from error


def _check_size(picture: Image.Image, max_pixels: int, name: str) -> None:
    width, height = picture.size
    if not width * height:
        raise CorruptImage(f"{name}: expected pixels, got none in {height}x{width}")
    if width * height > max_pixels:
        raise CorruptImage(f"{name}: its header claims {height}x{width} pixels, more than max_pixels={max_pixels}")


def _orientation(picture: Image.Image) -> int:
    """Of EXIF: 1 is upright, and from 5 on rows and columns change places."""
    stated = picture.getexif().get(ExifTags.Base.Orientation, 1)
    return stated if isinstance(stated, int) and 1 <= stated <= 8 else 1  # it may be of any type


def _decoded(picture: Image.Image, max_pixels: int, name: str) -> Image.Image:
    """Upright, in mode L or RGB. A file's header is read before its pixels are."""
    _check_size(picture, max_pixels, name)
    wide = isinstance(picture, ImageFile.ImageFile) and any("16" in str(tile[3]) for tile in picture.tile)
    if picture.mode not in ("P", "PA"):
        picture.palette = None  # a grey TGA may have a map of colours; loading would give it to the pixels
    try:
        picture.load()
        clear = picture.info.get("transparency")
        if wide and picture.mode == "RGB" and isinstance(clear, tuple):
            picture.info["transparency"] = tuple(value >> 8 for value in clear)  # Pillow's pixels have 8 bits
        turned = _orientation(picture) != 1  # else Pillow would make a copy
        return _eight_bits(ImageOps.exif_transpose(picture) if turned else picture)
    except (OSError, ValueError, SyntaxError) as error:
        raise CorruptImage(f"{name}: {type(error).__name__}: {error}") from error


def _eight_bits(picture: Image.Image) -> Image.Image:
    """The image in mode L or RGB; in bands of rows, so that no second copy of a large one is held."""
    if picture.mode.startswith("I"):  # grey of 16 bits, or of 32 that hold 16 or 8
        return _upper_bits(picture)
    if picture.mode == "F":
        raise ValueError("floating-point pixels have an unknown range")
    if picture.has_transparency_data:
        return _on_white(picture)
    mode = "L" if picture.mode in ("1", "L") else "RGB"
    return picture if picture.mode == mode else picture.convert(mode)


def _bands(picture: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    """(left, top, right, bottom) of parts of an image."""
    height = max(1, _CHUNK // (4 * picture.width))
    for top in range(0, picture.height, height):
        yield 0, top, picture.width, min(top + height, picture.height)


def _upper_bits(picture: Image.Image) -> Image.Image:
    """Grey of more bits in 8 bits, in mode L."""
    clear, shift = picture.info.get("transparency"), 8
    if picture.mode == "I" and picture.format is None and max(map(int, cast(tuple, picture.getextrema()))) <= 255:
        shift = 0
    made = Image.new("L", picture.size)
    for band in _bands(picture):
        values = np.clip(np.asarray(picture.crop(band)), 0, 65535)
        pixels = (values >> shift).astype(np.uint8)
        if isinstance(clear, int):
            pixels[values == clear] = 255
        made.paste(Image.fromarray(pixels), band)
    return made


def _on_white(picture: Image.Image) -> Image.Image:
    """A transparent image blended with white, in mode RGB."""
    made = Image.new("RGB", picture.size)
    for band in _bands(picture):
        part = picture.crop(band).convert("RGBA")
        white = Image.new("RGBA", part.size, (255, 255, 255, 255))
        made.paste(Image.alpha_composite(white, part).convert("RGB"), band)
    return made


def _pixels(picture: Image.Image, channels: int) -> UInt8[np.ndarray, "height width channels"]:
    pixels = np.array(picture)
    return to_channels(pixels[:, :, None] if pixels.ndim == 2 else pixels, channels)


def to_channels(
    image: UInt8[np.ndarray, "height width given"], channels: int
) -> UInt8[np.ndarray, "height width channels"]:
    """Grey to RGB by repetition, RGB to grey by ITU-R 601 luma; `image` itself if nothing changes.

    Raises:
      ValueError: `channels`, or the image's number of channels, is not 1 or 3.
    """
    given = image.shape[2]
    if given not in (1, 3) or channels not in (1, 3):
        raise ValueError(f"expected 1 or 3 channels, got an image of shape {image.shape} to convert to {channels}")
    if given == channels:
        return image
    if channels == 3:
        return np.repeat(image, 3, axis=2)
    return np.asarray(Image.fromarray(image).convert("L"))[:, :, None]


def resize_in_fixed_point(
    image: UInt8[np.ndarray, "height width channels"], size: tuple[int, int], resample: Image.Resampling
) -> UInt8[np.ndarray, "new_height new_width channels"]:
    """Resizes to (height, width) like torch's `interpolate` of 8-bit pixels, and so torchvision's `resize`.

    Columns first, then rows, each rounded to 8 bits. Pillow's weights are more precise, and its order may differ.

    Args:
      image: the image.
      size: in pixels.
      resample: one of `FIXED_POINT`.

    Source: PyTorch, aten/src/ATen/native/cpu/UpSampleKernelAVXAntialias.h.
    """
    for axis in (1, 0):
        if image.shape[axis] == size[axis]:
            continue
        weights, bits = fixed_point_weights(image.shape[axis], size[axis], FIXED_POINT[resample])
        lines = np.moveaxis(image, axis, 0)
        resized = np.empty((size[axis], *lines.shape[1:]), np.uint8)
        chunk = max(1, _CHUNK // (max(len(lines), size[axis]) * lines.shape[2]))
        for start in range(0, lines.shape[1], chunk):
            part = lines[:, start : start + chunk]
            sums = weights @ part.reshape(len(lines), -1).astype(np.int32)
            rounded = np.clip((sums + (1 << (bits - 1))) >> bits, 0, 255).astype(np.uint8)
            resized[:, start : start + chunk] = rounded.reshape(-1, *part.shape[1:])
        image = np.moveaxis(resized, 0, axis)
    return image


def normalize(
    image: UInt8[np.ndarray, "height width channels"], mean: Sequence[float | int], std: Sequence[float | int]
) -> Float[np.ndarray, "height width channels"]:
    """float32 of (image / 255 - mean) / std, with mean and std per channel in [0, 1]."""
    height, width, channels = image.shape
    scale, shift = scale_and_shift(mean, std)
    # Whole rows at a time: NumPy's inner loop over three channels would be slower than the arithmetic.
    pixels = image.reshape(height, width * channels).astype(np.float32)
    pixels *= np.tile(scale, width)
    pixels -= np.tile(shift, width)
    return pixels.reshape(image.shape)


def scale_and_shift(
    mean: Sequence[float | int], std: Sequence[float | int]
) -> tuple[Float[np.ndarray, "channels"], Float[np.ndarray, "channels"]]:
    """float32 factors of `pixels * scale - shift`, which is (pixels / 255 - mean) / std."""
    scale = 1.0 / (255.0 * np.asarray(std, np.float64))
    shift = np.asarray(mean, np.float64) / np.asarray(std, np.float64)
    return scale.astype(np.float32), shift.astype(np.float32)


def height_and_width(picture: Image.Image) -> tuple[int, int]:
    """(height, width), as for arrays; Pillow's size is (width, height)."""
    return picture.height, picture.width


def padded(picture: Image.Image, size: tuple[int, int], colour: tuple[int, ...]) -> Image.Image:
    """The image centred on a canvas of (width, height); an odd pixel of padding is right or below."""
    if picture.size == size:
        return picture
    canvas = Image.new("RGB", size, colour)
    canvas.paste(picture, ((size[0] - picture.width) // 2, (size[1] - picture.height) // 2))
    return canvas


def square_padded(picture: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """The image centred on a square of its longer side; an odd pixel of padding is right or below.

    Source: LLaVA, mm_utils.py, expand2square.
    """
    side = max(picture.size)
    return padded(picture, (side, side), colour)
