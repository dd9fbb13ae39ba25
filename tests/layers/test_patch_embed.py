"""Patches against a convolution with the same window and stride."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax.layers.patch_embed import PatchEmbed

from ..parameters import drawn


@pytest.mark.parametrize(("size", "use_bias"), [((8, 12), False), ((9, 15), True)])
def test_patches_are_a_convolution(size, use_bias):
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(2, *size, 3)), jnp.float32)
    layer = PatchEmbed(4, 6, use_bias=use_bias)
    params = nn.meta.unbox(drawn(jax.eval_shape(layer.init, jax.random.key(0), images)))["params"]
    assert set(params) == {"kernel", *(["bias"] if use_bias else [])}
    expected = jax.lax.conv_general_dilated(
        images, params["kernel"], (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    expected = expected.reshape(2, -1, 6) + params.get("bias", jnp.zeros(6))[None, None]
    np.testing.assert_allclose(jax.jit(layer.apply)({"params": params}, images), expected, atol=1e-5)


def test_a_kernel_is_drawn_for_all_that_it_reads():
    images = jnp.asarray(np.random.default_rng(0).normal(size=(4, 64, 64, 3)), jnp.float32)
    out, _ = jax.jit(PatchEmbed(8, 256).init_with_output)(jax.random.key(0), images)
    assert 0.9 < float(jnp.std(out)) < 1.1
