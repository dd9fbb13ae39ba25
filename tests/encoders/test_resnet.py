"""CLIP's ResNet: sizes, and statistics that are not trained; its numbers are tested by tests/golden."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax.encoders.resnet import ModifiedResNet

from ..advice import tried

RESNET = ModifiedResNet((64, 64), layers=(1, 1, 1, 1), base_width=4, num_heads=2, projection_dim=6)


@pytest.mark.parametrize("size", [(64, 64), (32, 96), (95, 63)])
def test_the_grid_is_that_of_the_last_map(size):
    resnet = RESNET.clone(image_size=size)
    image = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    out = jax.eval_shape(lambda x: resnet.init_with_output(jax.random.key(0), x)[0], image)
    assert out.grid == resnet.grid(*size)
    assert out.tokens.shape == (1, out.grid[0] * out.grid[1], resnet.features) and out.pooled.shape == (1, 6)


def test_another_size_than_that_of_training_is_refused():
    with pytest.raises(
        ValueError,
        match=tried("expected a map of {4} positions, as in training, got {9}; resize the images to image_size"),
    ):
        jax.eval_shape(RESNET.init, jax.random.key(0), jnp.zeros((1, 96, 96, 3)))
    assert jax.eval_shape(RESNET.init, jax.random.key(0), jnp.zeros((1, *RESNET.image_size, 3)))
    with pytest.raises(ValueError, match="smaller than one feature of 32"):
        RESNET.grid(64, 16)


def test_statistics_shift_the_features_and_have_no_gradient():
    images = jnp.asarray(np.random.default_rng(0).normal(size=(1, 64, 64, 3)), jnp.float32)
    params = nn.meta.unbox(jax.jit(RESNET.init)(jax.random.key(0), images))
    gradients = jax.jit(jax.grad(lambda p: jnp.square(RESNET.apply(p, images).pooled).sum()))(params)
    norm = gradients["params"]["stage1_block0"]["norm1"]
    assert not norm["mean"].any() and not norm["variance"].any()
    assert norm["scale"].any() and norm["bias"].any()
