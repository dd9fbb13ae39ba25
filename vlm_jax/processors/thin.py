"""Parts of resized images without the whole: for thin pictures, which padding or scaling would make enormous.

A picture of 300,000 by 1 pixels is padded to 90 billion before it is shrunk, or enlarged to 113 million before its
middle is cut out. Here only the pixels that are kept are computed, bit for bit as from the whole.
"""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
import scipy.sparse
from PIL import Image

from vlm_jax.interpolation import fixed_point_bits, window_weights
from vlm_jax.processors.image import ANTIALIAS

MAX_PIXELS = 1 << 24  # of an image that is made whole
MAX_LENGTH = 1 << 20  # of a side, for which Pillow makes all weights at once
PILLOW_BITS = 22
_CHUNK = 1 << 20  # values that are computed at once
_WEIGHTS = 1 << 18  # weights of an axis that are held at once


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of a part of a resized canvas.

    Attributes:
      start: where the picture begins on the canvas, in pixels.
      canvas: length of the canvas.
      size: length after resizing.
      window: [start, stop) of the part after resizing.
    """

    start: int
    canvas: int
    size: int
    window: tuple[int, int]

    def blocks(self) -> Iterator["Axis"]:
        """The same with parts of the window, so short that few weights are needed for each."""
        first, last = self.window
        length = last - first if self.canvas == self.size else max(1, _WEIGHTS * self.size // (8 * self.canvas))
        for begin in range(first, last, max(1, length)):
            yield dataclasses.replace(self, window=(begin, min(begin + length, last)))

    def relative_to(self, axis: "Axis") -> tuple[int, int]:
        """[start, stop) of this window in that of another axis."""
        return self.window[0] - axis.window[0], self.window[1] - axis.window[0]


def is_large(size: tuple[int, ...], picture: Image.Image) -> bool:
    """Whether an image of `size` is so much larger than the picture that only parts of it are to be made."""
    pixels = size[0] * size[1]
    return pixels > MAX_PIXELS and pixels > 2 * picture.width * picture.height


def resized_part(
    picture: Image.Image,
    rows: Axis,
    columns: Axis,
    resample: Image.Resampling,
    *,
    colour: tuple[int, ...] = (0, 0, 0),
    as_torch: bool = False,
) -> Image.Image:
    """A part of a canvas with the picture on it, after the canvas is resized.

    Args:
      picture: in mode RGB or L.
      rows, columns: the vertical and the horizontal axis.
      resample: a filter with antialiasing, one of `image.ANTIALIAS`.
      colour: of the canvas.
      as_torch: whether weights are those of torch for 8-bit pixels, else of Pillow.
    """
    colours = np.asarray(colour if picture.mode == "RGB" else colour[:1], np.int64)
    shape = (rows.window[1] - rows.window[0], columns.window[1] - columns.window[0], len(colours))
    made = np.empty(shape, np.uint8)
    tall, wide = (
        functools.partial(_Weights.of, resample=resample, bits=_bits(axis, resample, as_torch), length=length)
        for axis, length in ((rows, picture.height), (columns, picture.width))
    )
    # The weights of the picture's shorter side are held, and few of the longer one's at a time.
    if picture.height > picture.width:
        across = wide(columns)
        for axis in rows.blocks():
            made[slice(*axis.relative_to(rows))] = _block(picture, tall(axis), across, colours)
    else:
        down = tall(rows)
        for axis in columns.blocks():
            made[:, slice(*axis.relative_to(columns))] = _block(picture, down, wide(axis), colours)
    return Image.fromarray(made[:, :, 0] if made.shape[2] == 1 else made)


def _bits(axis: Axis, resample: Image.Resampling, as_torch: bool) -> int:
    return fixed_point_bits(axis.canvas, axis.size, ANTIALIAS[resample]) if as_torch else PILLOW_BITS


def _block(picture: Image.Image, down: "_Weights", across: "_Weights", colours: np.ndarray) -> np.ndarray:
    """One block of the part: that of the canvas alone, then the columns that the picture reaches."""
    line = across.along(colours)
    whole = down.along(line)
    (left, right), (top, bottom) = across.used(), down.used()
    if left >= right or top >= bottom:
        return whole
    first, last = across.reached(left, right)
    width = max(1, 4 * _CHUNK // ((bottom - top) * len(colours)))
    for start in range(first, last, width):
        window = (start, min(start + width, last))
        made = np.empty((bottom - top, window[1] - start, len(colours)), np.uint8)
        chunk = max(1, _CHUNK // (max(right - left, made.shape[1]) * len(colours)))
        for begin in range(0, len(made), chunk):
            box = (left, top + begin, right, min(top + begin + chunk, bottom))
            lines = np.asarray(picture.crop(box)).reshape(box[3] - box[1], right - left, len(colours))
            made[begin : begin + chunk] = across.placed(lines.swapaxes(0, 1), left, colours, window).swapaxes(0, 1)
        whole[:, slice(*window)] = down.placed(made, top, line[slice(*window)], (0, len(whole)))
    return whole


@dataclasses.dataclass(frozen=True)
class _Weights:
    """Weights of one axis.

    Attributes:
      axis: the axis.
      length: of the picture along it.
      bits: the power of 2 that weights are multiplied by.
      matrix: int32 [outputs of the window, pixels of the picture]; None where the canvas is not resized.
      total: int64 [outputs]: the sum of the weights of all pixels of the canvas.
    """

    axis: Axis
    length: int
    bits: int
    matrix: scipy.sparse.csr_array | None
    total: np.ndarray

    @classmethod
    def of(cls, axis: Axis, *, length: int, resample: Image.Resampling, bits: int) -> "_Weights":
        if axis.canvas == axis.size:
            return cls(axis, length, 0, None, np.ones(axis.window[1] - axis.window[0], np.int64))
        parts, totals = [], []
        for block in axis.blocks():
            part = window_weights(axis.canvas, axis.size, ANTIALIAS[resample], bits, block.window)
            totals.append(np.asarray(part.sum(axis=1), np.int64))
            parts.append(part[:, axis.start : axis.start + length])
        matrix = scipy.sparse.csr_array(scipy.sparse.vstack(parts))
        return cls(axis, length, bits, matrix, np.concatenate(totals))

    def used(self) -> tuple[int, int]:
        """[start, stop) of the picture's pixels that reach the part."""
        if self.matrix is None:
            begin, end = (one - self.axis.start for one in self.axis.window)
            return max(begin, 0), min(end, self.length)
        if not self.matrix.nnz:
            return 0, 0
        return int(self.matrix.indices.min()), int(self.matrix.indices.max()) + 1

    def reached(self, start: int, stop: int) -> tuple[int, int]:
        """[start, stop) of the part's pixels that these of the picture reach."""
        if self.matrix is None:
            origin = self.axis.start - self.axis.window[0]
            return origin + start, origin + stop
        found = np.flatnonzero(np.diff(self.matrix.indptr))
        return int(found[0]), int(found[-1]) + 1

    def along(self, canvas: np.ndarray) -> np.ndarray:
        """The part of a canvas whose lines along this axis are all equal to the given one."""
        return _rounded(self.total.reshape(-1, *[1] * canvas.ndim) * canvas.astype(np.int64), self.bits)

    def placed(self, lines: np.ndarray, start: int, outside: np.ndarray, window: tuple[int, int]) -> np.ndarray:
        """Lines from `start` on of the picture, resized with the canvas beside them."""
        if self.matrix is None:
            origin = self.axis.start + start - self.axis.window[0]
            made = np.broadcast_to(outside, (window[1] - window[0], *lines.shape[1:])).astype(np.uint8)
            begin, end = max(origin, window[0]), min(origin + len(lines), window[1])
            made[begin - window[0] : end - window[0]] = lines[begin - origin : end - origin]
            return made
        used = self.matrix[slice(*window), start : start + len(lines)]
        beside = self.total[slice(*window)] - np.asarray(used.sum(axis=1), np.int64)
        sums = (used @ lines.reshape(len(lines), -1).astype(np.int32)).reshape(-1, *lines.shape[1:])  # as in Pillow
        return _rounded(sums + beside[:, None, None] * outside.astype(np.int64), self.bits)


def _rounded(sums: np.ndarray, bits: int) -> np.ndarray:
    return np.clip((sums + ((1 << bits) >> 1)) >> bits, 0, 255).astype(np.uint8)
