"""Interpolation as in the released systems, by one small weight matrix per axis.

| kind | equivalent call |
|---|---|
| `bilinear`, `bicubic` | torch `interpolate(align_corners=False)`; bicubic: a = -0.75, clamped at the edge |
| `bilinear_antialias`, `bicubic_antialias` | the same with `antialias=True`; bicubic then has a = -0.5 |
| `area` | torch `interpolate(mode="area")`, which is adaptive average pooling |
| `overlap` | TensorFlow's `image.resize(method="area")`: samples weighted by their overlap with the window |
| `corner_linear` | scipy `ndimage.zoom(order=1)`: first and last sample are fixed |
| `cell` | transformers' Idefics3: the sample in whose cell the output's first corner is |

`bilinear` and `bilinear_antialias` also equal TensorFlow's `image.resize`. `cell` is exact, where transformers rounds
by the device: a corner on an edge of cells may there fall into the cell before it, as with 25 samples of 25 on a CPU.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Literal, get_args

import numpy as np
import scipy.sparse
from jaxtyping import Float

ResizeKind = Literal[
    "bilinear", "bicubic", "bilinear_antialias", "bicubic_antialias", "area", "overlap", "corner_linear", "cell"
]

AntialiasKind = Literal["bilinear_antialias", "bicubic_antialias", "box_antialias", "lanczos_antialias"]


def interpolation_weights(size_in: int, size_out: int, kind: ResizeKind) -> Float[np.ndarray, "out in"]:
    """The float32 matrix that resizes `size_in` samples to `size_out`; every row sums to 1.

    Raises:
      ValueError: unknown kind, or a size below 1.
    """
    if kind not in _WEIGHTS:
        raise ValueError(f"unknown interpolation '{kind}'; expected one of {', '.join(get_args(ResizeKind))}")
    if min(size_in, size_out) < 1:
        raise ValueError(f"cannot resize {size_in} samples to {size_out}: both must be at least 1")
    if size_in == size_out:
        return np.eye(size_in, dtype=np.float32)
    return _WEIGHTS[kind](size_in, size_out, np.arange(size_out), np.arange(size_in)).astype(np.float32)


def interpolation_window(
    size_in: int, size_out: int, kind: ResizeKind, outputs: tuple[int, int]
) -> tuple[Float[np.ndarray, "window reached"], tuple[int, int]]:
    """Some rows of `interpolation_weights`, without the columns that are zero in all of them.

    Args:
      size_in, size_out, kind: as in `interpolation_weights`.
      outputs: [start, stop) of the rows.

    Returns:
      The float32 matrix, and [start, stop) of its columns.
    """
    start, stop = outputs
    step = size_in / size_out
    margin = 3 * max(step, 1.0) + 2  # more than the radius of any kernel
    first, last = max(0, math.floor(start * step - margin)), min(size_in, math.ceil(stop * step + margin))
    if size_in == size_out:
        return np.eye(stop - start, dtype=np.float32), outputs
    found = _WEIGHTS[kind](size_in, size_out, np.arange(start, stop), np.arange(first, last))
    return found.astype(np.float32), (first, last)


@functools.lru_cache(maxsize=16)  # shared by all frames of a video, and by videos of one size
def fixed_point_weights(size_in: int, size_out: int, kind: AntialiasKind) -> tuple[scipy.sparse.csr_array, int]:
    """`interpolation_weights` in integers, as in torch for antialiased 8-bit pixels.

    Args:
      size_in: number of samples.
      size_out: number of samples after resizing.
      kind: one with antialiasing.

    Returns:
      The int32 matrix [out, in] times 2 to a power, and the power.
    """
    bits = fixed_point_bits(size_in, size_out, kind)
    return window_weights(size_in, size_out, kind, bits, (0, size_out)), bits


def fixed_point_bits(size_in: int, size_out: int, kind: AntialiasKind) -> int:
    """The largest power of 2 by which the weights can be multiplied so that they have 16 bits.

    Source: PyTorch, aten/src/ATen/native/cpu/UpSampleKernel.cpp, _compute_index_ranges_int16_weights.
    """
    largest = max(_taps(size_in, size_out, kind, part)[1].max() for part in _phases(size_in, size_out, kind))
    return next((bits for bits in range(22) if int(0.5 + largest * 2 ** (bits + 1)) >= 2**15), 22)


def window_weights(
    size_in: int, size_out: int, kind: AntialiasKind, bits: int, window: tuple[int, int]
) -> scipy.sparse.csr_array:
    """The int32 matrix [stop - start, in] of a window of the samples after resizing, times 2 to the power `bits`.

    Args:
      size_in, size_out, kind: as in `fixed_point_weights`.
      bits: 22 in Pillow.
      window: [start, stop) of the samples after resizing.

    Source: Pillow, src/libImaging/Resample.c, precompute_coeffs.
    """
    outputs = np.arange(*window)
    taps, weights = _taps(size_in, size_out, kind, outputs)
    whole = np.trunc(weights * 2**bits + np.copysign(0.5, weights)).astype(np.int32)
    rows = np.broadcast_to(np.arange(len(outputs))[:, None], taps.shape)
    kept = whole != 0
    shape = (len(outputs), size_in)
    return scipy.sparse.csr_array((whole[kept], (rows[kept], taps[kept])), shape=shape)


def _taps(size_in: int, size_out: int, kind: AntialiasKind, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices and weights of the samples that each of the outputs is made of."""
    kernel, radius = _KERNELS[kind]
    step = size_in / size_out
    stretch = max(step, 1.0)
    centres = (outputs + 0.5) * step - 0.5
    taps = np.floor(centres - radius * stretch).astype(int)[:, None] + np.arange(math.ceil(2 * radius * stretch) + 2)
    weights = np.where((taps >= 0) & (taps < size_in), kernel((taps - centres[:, None]) / stretch), 0.0)
    return np.clip(taps, 0, size_in - 1), weights / weights.sum(axis=1, keepdims=True)


def _phases(size_in: int, size_out: int, kind: AntialiasKind) -> Iterator[np.ndarray]:
    """Outputs that have all the weights of the others: those near both ends, and one period between."""
    near = math.ceil((_KERNELS[kind][1] * max(size_in / size_out, 1.0) + 1) * size_out / size_in)
    first = min(size_out, near + size_out // math.gcd(size_in, size_out))
    last = max(first, size_out - near)
    chunk = max(1, (1 << 16) // max(1, math.ceil(size_in / size_out)))
    for start, stop in ((0, first), (last, size_out)):
        yield from (np.arange(begin, min(begin + chunk, stop)) for begin in range(start, stop, chunk))


def _triangle(distance: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(distance), 0)


def _cubic(a: float) -> Callable[[np.ndarray], np.ndarray]:
    """Keys' cubic convolution kernel. Source: Keys 1981, eq. 4."""

    def kernel(distance: np.ndarray) -> np.ndarray:
        d = np.abs(distance)
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        return np.where(d <= 1, near, np.where(d < 2, far, 0.0))

    return kernel


# (size in, size out, indices of outputs, indices of inputs) -> matrix [outputs, inputs].
_Matrix = Callable[[int, int, np.ndarray, np.ndarray], np.ndarray]


def _sampled(kernel: Callable, radius: int) -> _Matrix:
    """The kernel at every half-pixel centre; samples outside are clamped to the edge."""

    def weights(size_in: int, size_out: int, outputs: np.ndarray, inputs: np.ndarray) -> np.ndarray:
        centres = (outputs + 0.5) * (size_in / size_out) - 0.5
        offsets = np.arange(1 - radius, radius + 1)
        taps = np.floor(centres).astype(int)[:, None] + offsets
        matrix = np.zeros((len(outputs), len(inputs)))
        rows = np.broadcast_to(np.arange(len(outputs))[:, None], taps.shape)
        np.add.at(matrix, (rows, np.clip(taps, 0, size_in - 1) - inputs[0]), kernel(centres[:, None] - taps))
        return matrix

    return weights


def _antialiased(kernel: Callable) -> _Matrix:
    """The kernel stretched by the step if that is larger than 1; normalised inside the input."""

    def weights(size_in: int, size_out: int, outputs: np.ndarray, inputs: np.ndarray) -> np.ndarray:
        step = size_in / size_out
        centres = (outputs + 0.5) * step - 0.5
        matrix = kernel((centres[:, None] - inputs) / max(step, 1.0))
        return matrix / matrix.sum(axis=1, keepdims=True)

    return weights


def _area(size_in: int, size_out: int, outputs: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """Window i is from floor(i * in / out) to ceil((i + 1) * in / out)."""
    starts = outputs * size_in // size_out
    stops = -(-(outputs + 1) * size_in // size_out)
    inside = (inputs >= starts[:, None]) & (inputs < stops[:, None])
    return inside / inside.sum(axis=1, keepdims=True)


def _overlap(size_in: int, size_out: int, outputs: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """Window i is from i * in / out to (i + 1) * in / out, including fractions."""
    step = size_in / size_out
    starts = outputs[:, None] * step
    covered = np.minimum(starts + step, inputs + 1) - np.maximum(starts, inputs)
    return np.maximum(covered, 0) / step


def _corner_linear(size_in: int, size_out: int, outputs: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    return _triangle(np.linspace(0, size_in - 1, size_out)[outputs][:, None] - inputs)


def _cell(size_in: int, size_out: int, outputs: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    return (outputs * size_in // size_out)[:, None] == inputs


def _box(distance: np.ndarray) -> np.ndarray:
    return ((distance > -0.5) & (distance <= 0.5)).astype(float)


def _lanczos(distance: np.ndarray) -> np.ndarray:
    return np.where(np.abs(distance) < 3, np.sinc(distance) * np.sinc(distance / 3), 0.0)


# Kernels for antialiasing, and their radius in samples.
_KERNELS: dict[AntialiasKind, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    "bilinear_antialias": (_triangle, 1),
    "bicubic_antialias": (_cubic(-0.5), 2),
    "box_antialias": (_box, 0.5),
    "lanczos_antialias": (_lanczos, 3),
}

_WEIGHTS: dict[str, _Matrix] = {
    "bilinear": _sampled(_triangle, 1),
    "bicubic": _sampled(_cubic(-0.75), 2),
    "bilinear_antialias": _antialiased(_triangle),
    "bicubic_antialias": _antialiased(_cubic(-0.5)),
    "area": _area,
    "overlap": _overlap,
    "corner_linear": _corner_linear,
    "cell": _cell,
}
