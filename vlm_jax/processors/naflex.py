"""big_vision's image operations: resizing by matrices, and the size at which an image fills a sequence of patches.

Pillow, which `image.resize` calls, antialiases always; TensorFlow, which made the training data of SigLIP
and SigLIP 2, only where it is told to.
"""

import math

import numpy as np
from jaxtyping import Num

from vlm_jax.interpolation import ResizeKind, interpolation_weights

_SMALLEST, _LARGEST, _STEP = 1e-6, 100.0, 1e-5  # of the ratio that is searched for


def interpolate(
    image: Num[np.ndarray, "height width channels"], size: tuple[int, int], kind: ResizeKind
) -> Num[np.ndarray, "new_height new_width channels"]:
    """Resizes to (height, width) pixels in float32, and returns the image's dtype.

    Args:
      image: pixels of any range; whole numbers are cut off to their dtype's range and lose their fractions.
      size: height and width to give, in pixels.
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
    """The largest ratio at which an image has no more than `max_patches` patches, and its size then.

    Each side is the ratio times the image's, rounded up to whole patches. The ratio is found by halving an
    interval, to 1e-5, as the release finds it: sizes are to be its own at every edge.

    Args:
      height, width: of the image, in pixels.
      patch_size: side of a patch, in pixels.
      max_patches: at least 1.

    Raises:
      ValueError: max_patches below 1.

    Source: Tschannen et al. 2025 (SigLIP 2), section 2.4.2; big_vision, pp/proj/image_text/ops_naflex.py.
    """
    if max_patches < 1:
        raise ValueError(f"a sequence has 1 patch at least, got max_patches={max_patches}")

    def patches(ratio: float) -> tuple[int, int]:
        return max(math.ceil(ratio * height / patch_size), 1), max(math.ceil(ratio * width / patch_size), 1)

    low, high = _SMALLEST, _LARGEST
    while high - low >= _STEP:
        middle = (low + high) / 2
        rows, cols = patches(middle)
        low, high = (middle, high) if rows * cols <= max_patches else (low, middle)
    rows, cols = patches(low)
    return low, (rows * patch_size, cols * patch_size)
