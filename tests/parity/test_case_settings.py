"""Settings of items and of folders that change an answer, compared with the code of transformers that reads them."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from vlm_jax.generation.sampling import penalised
from vlm_jax.processors.native import NativeViews
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.smart_resize import qwen_size
from vlm_jax.processors.views import ItemSize
from vlm_jax.types import PatchFormat

# The defaults of the image processor, and those of qwen-vl-utils for an image with a size of its own.
RELEASED, OWN = (56 * 56, 28 * 28 * 1280), (4 * 28 * 28, 16384 * 28 * 28)
VIEWS = NativeViews(Pixels(), PatchFormat(14, 2, 2), qwen_size, *RELEASED)
SIZES = [(480, 640), (31, 3000), (1000, 1000), (29, 28), (4000, 3000)]


@pytest.mark.parametrize("penalty", [0.5, 1.05, 1.5, 10.0])
def test_the_repetition_penalty(penalty):
    draw = np.random.default_rng(0)
    logits, rows = draw.normal(size=(2, 12)).astype(np.float32), np.array([[3, 3, 1], [0, 11, 5]])
    wanted = RepetitionPenaltyLogitsProcessor(penalty)(torch.from_numpy(rows), torch.from_numpy(logits))
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, rows, True, axis=1)
    found = penalised(jnp.asarray(logits), jnp.asarray(seen), np.float32(penalty))
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "keys", [{}, {"min_pixels": 200_000}, {"max_pixels": 100_000}, {"min_pixels": 3136, "max_pixels": 50_176}]
)
def test_limits_of_pixels_of_an_item(size, keys):
    least, most = keys.get("min_pixels", RELEASED[0]), keys.get("max_pixels", RELEASED[1])
    assert VIEWS.sized(ItemSize(**keys)).size(size) == smart_resize(*size, 28, least, most)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resized", [(280, 420), (50, 3000), (1, 1), (5000, 5000)])
def test_the_size_of_an_item(size, resized):
    """qwen-vl-utils resizes as if the image had this size, within limits of its own."""
    keys = dict(zip(("resized_height", "resized_width"), resized, strict=True))
    assert VIEWS.sized(ItemSize(**keys)).size(size) == smart_resize(*resized, 28, *OWN)
