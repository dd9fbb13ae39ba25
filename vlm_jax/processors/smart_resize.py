"""Image sizes for models with native resolution: whole blocks, within limits of pixels."""

import math

from vlm_jax.processors.image import CorruptImage
from vlm_jax.processors.tiling import Size

MAX_ASPECT = 200


def check_aspect(size: Size) -> None:
    """Raises a `CorruptImage` where one side is more than 200 times the other."""
    height, width = size
    if max(size) / min(size) > MAX_ASPECT:
        raise CorruptImage(f"an image of {height}x{width} pixels: one side is more than {MAX_ASPECT} times the other")


def qwen_size(size: Size, factor: int, min_pixels: int, max_pixels: int) -> Size:
    """Multiples of `factor` close to the image's size, with approximately its aspect ratio.

    Args:
      size: (height, width) of the image, in pixels.
      factor: side of a block, in pixels.
      min_pixels, max_pixels: of the result; a single row or column of blocks may be longer.

    Raises:
      CorruptImage: one side is more than 200 times the other.

    Source: Wang et al. 2024 (Qwen2-VL); transformers, smart_resize.
    """
    height, width = size
    check_aspect(size)
    rows, cols = round(height / factor), round(width / factor)
    if rows * cols * factor**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, cols = (max(1, math.floor(side / shrink / factor)) for side in size)
    elif rows * cols * factor**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, cols = (math.ceil(side * grow / factor) for side in size)
    return rows * factor, cols * factor


def ovis_size(size: Size, factor: int, min_pixels: int, max_pixels: int) -> Size:
    """The same for Ovis 2.5, which first resizes small and thin images to a side of one block and an aspect of 200.

    A side may be 0 for thin images with many pixels, which cannot be processed.

    Source: AIDC-AI/Ovis2.5, modeling_ovis2_5.py, VisualTokenizer.smart_resize.
    """
    height, width = size
    if min(size) < factor:
        if height < width:
            height, width = factor, round(factor / height * width)
        else:
            height, width = round(factor / width * height), factor
    elif max(size) / min(size) > MAX_ASPECT:
        height, width = (MAX_ASPECT * width, width) if height > width else (height, MAX_ASPECT * height)
    rows, cols = round(height / factor), round(width / factor)
    if rows * cols * factor**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, cols = (math.floor(side / shrink / factor) for side in (height, width))
    elif rows * cols * factor**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, cols = (math.ceil(side * grow / factor) for side in (height, width))
    return rows * factor, cols * factor


def bounded_size(size: Size, factor: int, min_pixels: int, max_pixels: int) -> Size:
    """The same with a strict limit: never more than `max_pixels`, for any aspect ratio.

    An image with too many blocks is shrunk, and one with fewer than min_pixels is enlarged, to sides of
    sqrt(blocks * aspect) rounded down or up; sides are computed in integers.
    """
    (height, width), least, most = size, -(-min_pixels // factor**2), max_pixels // factor**2
    rows, cols = max(1, round(height / factor)), max(1, round(width / factor))
    if rows * cols < least:
        rows, cols = (_ceil_sqrt(a * least, b) for a, b in ((height, width), (width, height)))
    if rows * cols > most:
        rows = min(max(1, math.isqrt(height * most // width)), most)
        cols = min(max(1, math.isqrt(width * most // height)), most // rows)
    return rows * factor, cols * factor


def _ceil_sqrt(numerator: int, denominator: int) -> int:
    """The smallest integer whose square is at least the fraction, which is positive."""
    return math.isqrt(-(-numerator // denominator) - 1) + 1
