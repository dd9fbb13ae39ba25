"""Two towers in one space; their numbers are tested by tests/golden and tests/parity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax.decoders.text_tower import TextTower
from vlm_jax.encoders.vit import ViT
from vlm_jax.models.two_tower import TwoTower, normalise

_SIZES = {"width": 8, "depth": 1, "num_heads": 2, "mlp_dim": 12}
IMAGE = ViT(image_size=(8, 8), patch_size=4, pooling="gap", **_SIZES)
TEXT = TextTower(vocab_size=9, context_length=5, causal=False, pooling="last", **_SIZES)
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 8, 3)), jnp.float32)
TOKENS = jnp.asarray([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]])


@pytest.mark.parametrize("bias", [None, -10.0])
def test_logits_are_scaled_cosines_and_a_bias(bias):
    model = TwoTower(IMAGE, TEXT, initial_log_scale=float(np.log(10)), initial_bias=bias)
    out, boxed = jax.jit(model.init_with_output)(jax.random.key(0), IMAGES, TOKENS)
    assert ("bias" in nn.meta.unbox(boxed)["params"]) == (bias is not None)
    for embeddings in (out.image, out.text):
        np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)
    cosines = np.einsum("id,td->it", out.image, out.text)
    np.testing.assert_allclose(out.logits(), 10 * cosines + (bias or 0), atol=1e-5)
    image = model.apply(boxed, IMAGES, method="encode_image")
    np.testing.assert_allclose(normalise(image), out.image, atol=1e-6)


def test_an_image_tower_has_to_pool():
    model = TwoTower(IMAGE.clone(pooling="none"), TEXT, initial_log_scale=0.0)
    with pytest.raises(ValueError, match="set its `pooling`"):
        jax.eval_shape(model.init, jax.random.key(0), IMAGES, TOKENS)


def test_a_zero_vector_stays_zero():
    np.testing.assert_array_equal(normalise(jnp.zeros((1, 4))), np.zeros((1, 4)))
