"""Interpolation compared with torch's own, on odd sizes up and down."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings

from vlm_jax.layers.resize import resize, resize_axis
from vlm_jax.processors.image import resize_in_fixed_point

SIZES = [((7, 9), (5, 12)), ((12, 10), (3, 4)), ((3, 4), (11, 8)), ((15, 15), (96, 96)), ((1, 2), (3, 5))]


@pytest.mark.parametrize("kind", ["bilinear", "bicubic", "bilinear_antialias", "bicubic_antialias", "area"])
@pytest.mark.parametrize(("before", "after"), SIZES)
def test_two_axes_as_torch(kind, before, after):
    x = np.random.default_rng(0).normal(size=(2, *before, 3)).astype(np.float32)
    mode, _, antialias = kind.partition("_")
    extra = {} if mode == "area" else {"align_corners": False, "antialias": bool(antialias)}
    expected = functional.interpolate(torch.from_numpy(x.transpose(0, 3, 1, 2)), size=after, mode=mode, **extra)
    np.testing.assert_allclose(resize(x, after, kind), expected.numpy().transpose(0, 2, 3, 1), atol=1e-5)


@pytest.mark.parametrize(("before", "after"), [(7, 13), (13, 7), (3, 27)])
def test_one_axis_as_torch(before, after):
    x = np.random.default_rng(0).normal(size=(before, 4)).astype(np.float32)
    expected = functional.interpolate(torch.from_numpy(x.T[None]), size=after, mode="linear")[0].numpy().T
    np.testing.assert_allclose(resize_axis(x, 0, after, "bilinear"), expected, atol=1e-5)


@pytest.mark.parametrize(("before", "after"), [(4, 7), (7, 4), (2, 9)])
def test_corner_linear_is_torch_with_aligned_corners(before, after):
    """And so scipy's zoom of order 1, whose first and last samples stay in place."""
    x = np.random.default_rng(0).normal(size=(before, 4)).astype(np.float32)
    expected = functional.interpolate(torch.from_numpy(x.T[None]), size=after, mode="linear", align_corners=True)
    np.testing.assert_allclose(resize_axis(x, 0, after, "corner_linear"), expected[0].numpy().T, atol=1e-5)


@pytest.mark.parametrize(("table", "side"), [(5, 4), (4, 7), (26, 26), (27, 27), (32, 32), (3, 50)])
def test_cells_are_those_of_idefics3(table, side):
    """Also of the released sizes, whose grid is that of the table: corners are on the edges of cells."""
    sizes = {"image_size": table, "patch_size": 1, "hidden_size": 1, "num_channels": 1, "num_attention_heads": 1}
    embeddings = Idefics3VisionEmbeddings(Idefics3VisionConfig(**sizes))
    with torch.no_grad():
        embeddings.position_embedding.weight.copy_(torch.arange(table * table)[:, None])
        embeddings.patch_embedding.weight.zero_()
        embeddings.patch_embedding.bias.zero_()
        whole = torch.ones((1, side, side), dtype=torch.bool)
        expected = embeddings(torch.zeros((1, 1, side, side)), whole).reshape(side, side, 1).numpy()
    rows = np.arange(table * table, dtype=np.float32).reshape(table, table, 1)
    np.testing.assert_array_equal(resize(rows, (side, side), "cell"), expected)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(("before", "after"), [*SIZES, ((360, 640), (252, 448)), ((131, 97), (300, 97))])
def test_pixels_of_8_bits_as_torch(mode, before, after):
    """Bit for bit, and so torchvision's `resize` of a video's frames."""
    image = np.random.default_rng(0).integers(0, 256, (*before, 3), np.uint8)
    channels_first = torch.from_numpy(image.transpose(2, 0, 1).copy())[None]
    expected = functional.interpolate(channels_first, size=after, mode=mode, antialias=True)[0].numpy()
    found = resize_in_fixed_point(image, after, Image.Resampling[mode.upper()])
    np.testing.assert_array_equal(found, expected.transpose(1, 2, 0))
