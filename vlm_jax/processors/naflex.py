"""big_vision's image operations: resizing by matrices, and the image size for a maximum sequence length.

Pillow, which `image.resize` calls, always antialiases; TensorFlow, which preprocessed the training data of SigLIP
and SigLIP 2, only on request.
"""

import math

import numpy as np
from jaxtyping import Num

from vlm_jax.interpolation import ResizeKind, interpolation_weights

_SMALLEST, _LARGEST, _STEP = 1e-6, 100.0, 1e-5  # of the resize ratio


def interpolate(
    image: Num[np.ndarray, "height width channels"], size: tuple[int, int], kind: ResizeKind
) -> Num[np.ndarray, "new_height new_width channels"]:
    """Resizes to (height, width) pixels in float32, and returns the image's dtype.

    Args:
      image: pixels of any range; integers are clipped to their dtype's range and truncated.
      size: height and width of the result, in pixels.
      kind: SigLIP's square images are `bilinear`, NaFlex's `bilinear_antialias`.

    Source: big_vision, pp/ops_image.py, get_resize.
    """
    rows, cols = (interpolation_weights(old, new, kind) for old, new in zip(image.shape, size, strict=False))
    resized = np.einsum("ih,hwc,jw->ijc", rows, image.astype(np.float32), cols, optimize=True)
    if np.issubdtype(image.dtype, np.integer):
        limits = np.iinfo(image.dtype)
        return np.clip(resized, limits.min, limits.max).astype(image.dtype)
    return resized.astype(image.dtype)


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
