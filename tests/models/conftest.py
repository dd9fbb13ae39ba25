"""A tiny vision-language model and a batch with text around its visual slots."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax.connectors.pool import Pool
from vlm_jax.decoders.transformer import Transformer
from vlm_jax.encoders.vit import ViT
from vlm_jax.models.vlm import VLM
from vlm_jax.types import Batch

from ..parameters import drawn

VOCAB, WIDTH, TOKENS = 12, 16, 2


def make_model(**parts):
    """An encoder of 2x4 patches, a pool to 1x2 tokens, a decoder; `parts` replaces any."""
    return VLM(
        **{
            "encoder": ViT(image_size=(8, 16), patch_size=4, width=8, depth=1, num_heads=2, mlp_dim=16),
            "connector": Pool(WIDTH, (1, TOKENS)),
            "decoder": Transformer(VOCAB, WIDTH, depth=2, num_heads=2, num_kv_heads=1, mlp_dim=24),
            **parts,
        }
    )


@pytest.fixture(scope="session")
def model():
    """The model without a reducer."""
    return make_model()


@pytest.fixture(scope="session")
def batch():
    """Two rows of two images each; tokens of both are among the text, not in order."""
    rng = np.random.default_rng(0)
    index = np.array([[0, 1, -1, 2, 3, -1, -1], [-1, 3, 1, -1, -1, 0, 2]])
    return Batch(
        tokens=jnp.asarray(rng.integers(0, VOCAB, size=index.shape), jnp.int32),
        positions=jnp.tile(jnp.arange(7, dtype=jnp.int32)[None], (2, 1)),
        segment_ids=jnp.ones((2, 7), jnp.int32),
        visual_index=jnp.asarray(index, jnp.int32),
        images=jnp.asarray(rng.normal(size=(2, 2, 8, 16, 3)), jnp.float32),
    )


@pytest.fixture(scope="session")
def params(model, batch):
    """Parameters of `model`."""
    return nn.meta.unbox(drawn(jax.eval_shape(model.init, jax.random.key(0), batch)))
