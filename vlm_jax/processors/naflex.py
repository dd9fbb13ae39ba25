"""big_vision's image operations: resizing by matrices, and the image size for a maximum sequence length.

Pillow, which `image.resize` calls, always antialiases; TensorFlow, which preprocessed the training data of SigLIP
and SigLIP 2, only on request.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Num

from vlm_jax.interpolation import ResizeKind, interpolation_window

Span = tuple[int, int]  # [start, stop)

_MAX_VALUES = 1 << 24  # of an image, its result or the weights of an axis, that are computed at once
_REACH = 2048  # about as many samples along an axis are read at once otherwise
_SMALLEST, _LARGEST, _STEP = 1e-6, 100.0, 1e-5  # of the resize ratio


def interpolate(
    image: Num[np.ndarray, "height width channels"],
    size: tuple[int, int],
    kind: ResizeKind,
    *,
    window: tuple[Span, Span] | None = None,
    convert: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Num[np.ndarray, "window_height window_width channels"]:
    """Resizes to (height, width) pixels in float32, and returns the image's dtype.

    Args:
      image: pixels of any range; integers are clipped to their dtype's range and truncated.
      size: height and width of the result, in pixels.
      kind: SigLIP's square images are `bilinear`, NaFlex's `bilinear_antialias`.
      window: [start, stop) of the rows and of the columns of the result that are wanted; all when None.
      convert: a function of pixels of any part of the image, called before resizing; the result has its dtype.

    Source: big_vision, pp/ops_image.py, get_resize.
    """
    whole = tuple((0, side) for side in size)
    (top, bottom), (left, right) = window or whole
    values = image.size, math.prod(size) * image.shape[2], *map(math.prod, zip(image.shape, size, strict=False))
    if max(values) <= _MAX_VALUES:
        return _block(image, size, kind, whole, convert)[top:bottom, left:right]
    rows, cols = (list(_blocks(*ends)) for ends in zip(image.shape, size, ((top, bottom), (left, right)), strict=False))
    return np.concatenate(
        [np.concatenate([_block(image, size, kind, (down, across), convert) for across in cols], 1) for down in rows]
    )


def _blocks(size_in: int, size_out: int, window: Span) -> Iterator[Span]:
    """Parts of a window, which few samples reach."""
    length = max(1, int(_REACH * min(1.0, size_out / size_in)) - 6)
    for start in range(*window, length):
        yield start, min(start + length, window[1])


def _block(
    image: np.ndarray,
    size: tuple[int, int],
    kind: ResizeKind,
    window: tuple[Span, ...],
    convert: Callable[[np.ndarray], np.ndarray] | None,
) -> np.ndarray:
    (rows, down), (cols, across) = (
        interpolation_window(old, new, kind, part) for old, new, part in zip(image.shape, size, window, strict=False)
    )
    given = image[slice(*down), slice(*across)]
    given = given if convert is None else convert(given)
    resized = np.einsum("ih,hwc,jw->ijc", rows, given.astype(np.float32), cols, optimize=True)
    if np.issubdtype(given.dtype, np.integer):
        limits = np.iinfo(given.dtype)
        return np.clip(resized, limits.min, limits.max).astype(given.dtype)
    return resized.astype(given.dtype)


def size_for_sequence(height: int, width: int, patch_size: int, max_patches: int) -> tuple[float, tuple[int, int]]:
    """The largest ratio at which an image has at most `max_patches` patches, and the resized size.

    Each side is the ratio times the image's, rounded up to whole patches. The ratio is found by bisection
    to 1e-5, as in the release, so that all sizes are the same.

    Args:
      height, width: of the image, in pixels.
      patch_size: side of a patch, in pixels.
      max_patches: at least 1.

    Raises:
      ValueError: max_patches below 1.

    Source: Tschannen et al. 2025 (SigLIP 2), section 2.4.2; big_vision, pp/proj/image_text/ops_naflex.py.
    """
    if max_patches < 1:
        raise ValueError(f"expected max_patches of at least 1, got {max_patches}")

    def patches(ratio: float) -> tuple[int, int]:
        return max(math.ceil(ratio * height / patch_size), 1), max(math.ceil(ratio * width / patch_size), 1)

    low, high = _SMALLEST, _LARGEST
    while high - low >= _STEP:
        middle = (low + high) / 2
        rows, cols = patches(middle)
        low, high = (middle, high) if rows * cols <= max_patches else (low, middle)
    rows, cols = patches(low)
    return low, (rows * patch_size, cols * patch_size)
