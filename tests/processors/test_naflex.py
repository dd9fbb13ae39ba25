"""Sizes for a sequence against their definition, and resizing against one written out.

TensorFlow's own arrays are met in tests/golden, as `bv_preprocess`.
"""

import math
import tracemalloc

import numpy as np
import pytest

from vlm_jax.interpolation import interpolation_weights
from vlm_jax.processors.image_text import TensorFlowInputs
from vlm_jax.processors.naflex import interpolate, size_for_sequence


@pytest.mark.parametrize(("height", "width"), [(480, 640), (1, 5000), (37, 37), (2000, 31)])
@pytest.mark.parametrize(("patch", "longest"), [(16, 256), (14, 1), (4, 30)])
def test_the_sequence_is_filled_as_far_as_whole_patches_go(height, width, patch, longest):
    def count(ratio):
        return max(math.ceil(ratio * height / patch), 1) * max(math.ceil(ratio * width / patch), 1)

    ratio, (rows, cols) = size_for_sequence(height, width, patch, longest)
    assert rows % patch == cols % patch == 0 and rows * cols // patch**2 == count(ratio) <= longest
    assert count(ratio + 2e-5) > longest
    assert rows == max(math.ceil(ratio * height / patch), 1) * patch


def test_a_sequence_without_patches_is_refused():
    with pytest.raises(ValueError, match="max_patches of at least 1, got 0"):
        size_for_sequence(10, 10, 2, 0)


def test_rows_and_columns_are_read_half_way_between_pixels():
    image = np.asarray([[[0], [100]], [[201], [255]]], np.uint8)
    out = interpolate(image, (2, 4), "bilinear")
    np.testing.assert_array_equal(out[..., 0], [[0, 25, 75, 100], [201, 214, 241, 255]])  # fractions are cut off
    floats = interpolate(image.astype(np.float32), (1, 2), "bilinear_antialias")
    np.testing.assert_allclose(floats[..., 0], [[100.5, 177.5]])
    assert out.dtype == np.uint8 and floats.dtype == np.float32


def test_what_overshoots_stays_in_the_range_of_its_dtype():
    image = np.zeros((1, 8, 1), np.uint8)
    image[:, 4:] = 255
    out = interpolate(image, (1, 16), "bicubic")
    assert out.max() == 255 and out.min() == 0 and (np.diff(out[0, :, 0].astype(int))[7:9] >= 0).all()


def test_the_crop_of_a_thin_image_takes_no_memory_of_its_whole_result():
    """The shorter side becomes 1024 pixels, so that the longer one would be 122880."""
    image = np.random.default_rng(0).integers(0, 256, (1, 120, 3), np.uint8)
    size = (1024, 120 * 1024)
    tracemalloc.start()
    found = TensorFlowInputs((224, 224), shortest_edge=1024)._one(image)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    left = (size[1] - 224) // 2
    weights = interpolation_weights(120, size[1], "bilinear")[left : left + 224]
    row = np.trunc(weights @ image[0].astype(np.float32))
    np.testing.assert_allclose(found, np.broadcast_to(row / 127.5 - 1, (224, 224, 3)), atol=1e-6)
    assert peak < 32 * 2**20
