"""The interface of `vlm_jax.encoders`, for every entry of the table."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax import encoders
from vlm_jax.encoders import COMPOSITE_ENCODERS, ENCODERS, PACKED_ENCODERS
from vlm_jax.sharding.rules import distribute, shardings, use_mesh

from ..parameters import drawn
from .kinds import SIZES, cloned, defined, leaves, small

PICTURE_ENCODERS = {**ENCODERS, **COMPOSITE_ENCODERS}
every_kind = pytest.mark.parametrize("kind", PICTURE_ENCODERS)


def pictures(height, width, batch=2, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(batch, height, width, 3)), jnp.float32)


@functools.cache
def made(kind):
    encoder = small(PICTURE_ENCODERS[kind])
    return encoder, drawn(jax.eval_shape(encoder.init, jax.random.key(0), pictures(*SIZES["image_size"])))


@functools.cache
def encode(kind, **fields):
    encoder, boxed = made(kind)
    return jax.jit(functools.partial(cloned(encoder, **fields).apply, nn.meta.unbox(boxed)))


@every_kind
@pytest.mark.parametrize("size", [SIZES["image_size"], (64, 32), (64, 40), (32, 71)], ids=str)
def test_the_grid_is_known_before_init(kind, size):
    encoder, boxed = made(kind)
    grid = encoder.grid(*size)
    assert all(type(side) is int and side >= 1 for side in grid)
    try:
        features = jax.eval_shape(encoder.apply, boxed, pictures(*size))
    except ValueError as error:  # an encoder may insist on the size of its training, if it says so
        assert size != SIZES["image_size"] and "image_size" in str(error)
    else:
        assert features.grid == grid
        assert features.tokens.shape == (2, grid[0] * grid[1], encoder.features)
        assert features.mask.shape == features.tokens.shape[:2]


@every_kind
def test_features_are_real_finite_and_of_their_own_image(kind):
    images = pictures(*SIZES["image_size"])
    out = encode(kind)(images)
    assert out.mask.all() and np.isfinite(out.tokens).all()
    other = encode(kind)(images.at[1].set(0))
    np.testing.assert_allclose(other.tokens[0], out.tokens[0], atol=1e-5)
    assert np.abs(other.tokens[1] - out.tokens[1]).max() > 1e-2


@every_kind
@pytest.mark.parametrize("size", [(0, 16), (16, 1)], ids=str)
def test_an_image_without_a_patch_is_refused_by_size(kind, size):
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]}"):
        made(kind)[0].grid(*size)


@every_kind
def test_every_parameter_has_a_finite_gradient(kind):
    encoder, boxed = made(kind)
    images = pictures(*SIZES["image_size"])

    def loss(params):
        out = encoder.apply(params, images)
        total = jnp.sum(jnp.sin(out.tokens + jnp.arange(encoder.features)[None, None]))
        return total if out.pooled is None else total + jnp.sum(jnp.sin(out.pooled))

    for path, grad in leaves(jax.jit(jax.grad(loss))(boxed)).items():
        assert np.isfinite(grad).all(), path
        # Softmax does not see what is added to all keys alike, so a key's bias is without effect;
        # a release's running statistics are loaded, and never trained.
        if path.endswith(("['mean']", "['variance']")):
            assert not grad.any(), path
        elif not path.endswith("['key']['bias']"):
            assert np.abs(grad).max() > 1e-6, path


@every_kind
def test_bfloat16_is_near_to_float32(kind):
    images = pictures(*SIZES["image_size"])
    exact, low = encode(kind)(images).tokens, encode(kind, dtype=jnp.bfloat16)(images).tokens
    assert low.dtype == jnp.bfloat16
    assert np.linalg.norm(np.float32(low) - exact) / np.linalg.norm(exact) < 0.03


@every_kind
def test_sharded_equals_unsharded(kind, mesh):
    encoder, boxed = made(kind)
    images = pictures(*SIZES["image_size"], batch=8)
    placed = jax.device_put(nn.meta.unbox(boxed), shardings(boxed, mesh))
    assert not all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(placed))
    with use_mesh(mesh):
        got = jax.jit(encoder.apply)(placed, distribute(images, mesh))
    pairs = [encode(kind)(images[start : start + 2]).tokens for start in range(0, 8, 2)]
    np.testing.assert_allclose(got.tokens, np.concatenate(pairs), atol=1e-5)


def test_every_encoder_of_the_folder_is_in_the_table():
    listed = {*PICTURE_ENCODERS.values(), *PACKED_ENCODERS.values()}
    missing = [cls.__name__ for cls in defined(encoders, "grid") if cls not in listed]
    assert not missing, f"add {missing} to a table in vlm_jax/encoders/__init__.py"
