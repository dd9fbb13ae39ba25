"""The interface of `vlm_jax.encoders.PACKED_ENCODERS`, for every entry of the table; with windows and whole images."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax.encoders import PACKED_ENCODERS
from vlm_jax.processors.patches import pack_patches
from vlm_jax.sharding.rules import distribute, shardings, use_mesh

from ..parameters import drawn
from .kinds import leaves, small

SIZES = {"patch_size": 2}
WINDOWS = {"window_size": 8, "full_layers": (1,)}
FIELDS = {
    "axial_vit": [{"merge_size": 2, "table_length": 16, "depth": 1}],
    "merging_vit": [{"depth": 2, "table_side": 5}, {"depth": 2, "table_side": 5, "merges": False}],
    "naflex": [{"table_grid": (3, 5)}],
    "qwen_vit": [{}, WINDOWS],
    "siglip2_navit": [{}, WINDOWS],
}
UNUSED = {("merging_vit", 1): "['merger']"}  # parameters that a mode has, and does not use
KINDS = [
    pytest.param(kind, i, id=f"{kind}-{i}") for kind in PACKED_ENCODERS for i in range(len(FIELDS.get(kind, [{}])))
]
every_kind = pytest.mark.parametrize(("kind", "number"), KINDS)
LENGTH = 64
GRIDS = [(1, 6, 4), (1, 2, 10)]  # of the images of a sequence; padding after
LARGE = [(1, 4, 4), (1, 4, 4)]  # the same for blocks of 4x4


def grids_of(form):
    """Grids that blocks divide."""
    return LARGE if form.merge_size == 4 else GRIDS


def packed_for(encoder, batch=2):
    form, rng = encoder.patch_format, np.random.default_rng(0)
    size = 3 * form.temporal_patch_size * form.patch_size**2
    rows = []
    for i in range(batch):
        grids = grids_of(form)[:: 1 if i % 2 else -1]
        patches = rng.normal(size=(int(np.prod(grids, axis=1).sum()), size)).astype(np.float32)
        packing = {"merge_size": form.merge_size, "window": form.window, "class_tokens": form.class_tokens}
        rows.append(pack_patches(patches, grids, **packing, length=LENGTH))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *rows)


@functools.cache
def made(kind, number):
    encoder = small(PACKED_ENCODERS[kind], **SIZES, **FIELDS.get(kind, [{}])[number])
    return encoder, drawn(jax.eval_shape(encoder.init, jax.random.key(0), packed_for(encoder)))


@functools.cache
def encode(kind, number, **fields):
    encoder, boxed = made(kind, number)
    return jax.jit(functools.partial(encoder.clone(**fields).apply, nn.meta.unbox(boxed)))


def real(features):
    return np.float32(features.tokens)[np.asarray(features.mask)]


@every_kind
def test_features_lie_where_the_mask_says(kind, number):
    encoder = made(kind, number)[0]
    form, out = encoder.patch_format, encode(kind, number)(packed_for(encoder))
    square = (form.merge_size // out.block) ** 2  # patches that became a feature
    length, real_ones = LENGTH // square, int(np.prod(grids_of(form), axis=1).sum()) // square
    assert out.tokens.shape == (2, length, encoder.features) and out.mask.shape == (2, length)
    assert out.grid[0] * out.grid[1] == length
    np.testing.assert_array_equal(out.mask, np.broadcast_to(np.arange(length) < real_ones, (2, length)))
    rows, cols = encoder.grid(form.block_size, form.block_size)
    assert (rows, cols) == (out.block, out.block)
    assert np.isfinite(real(out)).all()


@every_kind
@pytest.mark.parametrize("garbage", [1e30, -7.0])
def test_what_padding_holds_changes_nothing(kind, number, garbage):
    clean = packed_for(made(kind, number)[0])
    dirty = dataclasses.replace(
        clean, patches=np.where(clean.segment_ids[..., None] > 0, clean.patches, np.float32(garbage))
    )
    expected, got = encode(kind, number)(clean), encode(kind, number)(dirty)
    np.testing.assert_array_equal(got.mask, expected.mask)
    np.testing.assert_array_equal(real(got), real(expected))


@every_kind
def test_every_parameter_is_named_and_has_a_finite_gradient(kind, number):
    encoder, boxed = made(kind, number)
    for leaf in jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)):
        assert len(leaf.names) == leaf.value.ndim
    packed = packed_for(encoder)

    def loss(params):
        out = encoder.apply(params, packed)
        waves = jnp.sin(out.tokens + jnp.arange(encoder.features)[None, None])
        return jnp.sum(jnp.where(out.mask[..., None], waves, 0))

    for path, grad in leaves(jax.jit(jax.grad(loss))(nn.meta.unbox(boxed))).items():
        assert np.isfinite(grad).all(), path
        if (unused := UNUSED.get((kind, number))) is not None and unused in path:
            assert not grad.any(), path
        elif not path.endswith("['key']['bias']"):  # where nothing is rotated, softmax does not see it
            assert np.abs(grad).max() > 1e-6, path


@every_kind
def test_bfloat16_is_near_to_float32(kind, number):
    packed = packed_for(made(kind, number)[0])
    exact, low = encode(kind, number)(packed), encode(kind, number, dtype=jnp.bfloat16)(packed)
    assert low.tokens.dtype == jnp.bfloat16
    assert np.linalg.norm(real(low) - real(exact)) / np.linalg.norm(real(exact)) < 0.03


@every_kind
def test_sharded_equals_unsharded(kind, number, mesh):
    encoder, boxed = made(kind, number)
    packed = packed_for(encoder, batch=8)
    placed = jax.device_put(nn.meta.unbox(boxed), shardings(boxed, mesh))
    assert not all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(placed))
    with use_mesh(mesh):
        got = jax.jit(encoder.apply)(placed, distribute(packed, mesh))
    expected = encode(kind, number)(packed)
    np.testing.assert_array_equal(got.mask, expected.mask)
    np.testing.assert_allclose(real(got), real(expected), atol=1e-5)
