"""The dense head against NumPy: every feature answers for the cell that it is in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax.encoders.vit import ViT
from vlm_jax.models.cell_reader import CellReader

from ..parameters import drawn

ENCODER = ViT(image_size=(16, 24), patch_size=4, width=8, depth=1, num_heads=2, mlp_dim=16)  # 4x6 patches


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 24, 3)), jnp.float32)


@pytest.mark.parametrize("cells", [(2, 2), (1, 3)])
def test_every_feature_is_read_by_two_linear_heads(images, cells):
    reader = CellReader(ENCODER, cells, 5)
    params = nn.meta.unbox(drawn(jax.eval_shape(reader.init, jax.random.key(0), images)))["params"]
    logits, boxes = jax.jit(reader.apply)({"params": params}, images)
    features = np.float64(jax.jit(ENCODER.apply)({"params": params["encoder"]}, images).tokens).reshape(2, 4, 6, 8)
    height, width = 4 // cells[0], 6 // cells[1]  # of a cell, in patches
    assert logits.shape == (2, *cells, height * width, 5) and boxes.shape == (2, *cells, height * width, 4)
    for image, row, col in np.ndindex(2, 4, 6):
        place = (image, row // height, col // width, row % height * width + col % width)
        for got, head in ((logits, "classes"), (boxes, "boxes")):
            kernel, bias = (np.float64(params[head][name]) for name in ("kernel", "bias"))
            np.testing.assert_allclose(got[place], features[image, row, col] @ kernel + bias, atol=1e-5)


def test_answers_are_float32_when_the_encoder_computes_in_bfloat16(images):
    reader = CellReader(ENCODER.clone(dtype=jnp.bfloat16), (2, 2), 5)
    outputs = jax.eval_shape(reader.init_with_output, jax.random.key(0), images)[0]
    assert {out.dtype for out in outputs} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("cells", [(3, 2), (2, 4), (8, 6)])
def test_cells_that_do_not_divide_the_grid_are_refused(images, cells):
    with pytest.raises(ValueError, match=f"{cells[0]}x{cells[1]} cells do not divide the encoder's 4x6 grid"):
        jax.eval_shape(CellReader(ENCODER, cells, 5).init, jax.random.key(0), images)
