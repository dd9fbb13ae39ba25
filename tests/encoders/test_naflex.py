"""NaFlex: positions for any grid, and patches that see their own image only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax.encoders.naflex import NaflexViT, interpolate_table
from vlm_jax.layers.resize import resize
from vlm_jax.types import PackedPatches

VIT = NaflexViT(patch_size=2, table_grid=(3, 4), width=8, depth=2, num_heads=2, mlp_dim=12, pooling="gap")
RANDOM = np.random.default_rng(0)


def places(rows, cols):
    grid = np.stack(np.meshgrid(np.arange(rows), np.arange(cols), indexing="ij"), axis=-1).reshape(1, -1, 2)
    return grid, np.broadcast_to([rows, cols], grid.shape)


def packed(*images, padding=0):
    """One row of images, each (rows, cols, patches), and padding."""
    grids = [places(rows, cols) for rows, cols, _ in images]
    patches = [patches[None] for *_, patches in images]
    segments = [np.full((1, rows * cols), i) for i, (rows, cols, _) in enumerate(images, 1)]
    if padding:
        patches.append(RANDOM.normal(size=(1, padding, 12)))
        grids.append((np.zeros((1, padding, 2)),) * 2)
        segments.append(np.zeros((1, padding)))
    joined = (np.concatenate(x, axis=1) for x in (patches, *zip(*grids, strict=True), segments))
    dtypes = (np.float32, np.int32, np.int32, np.int32)
    return PackedPatches(*(jnp.asarray(x, dtype) for x, dtype in zip(joined, dtypes, strict=True)))


@pytest.mark.parametrize("grid", [(3, 4), (1, 1), (2, 7), (5, 3)])
def test_the_table_is_interpolated_to_any_grid(grid):
    table = RANDOM.normal(size=(3, 4, 5)).astype(np.float32)
    positions, sizes = (jnp.asarray(x) for x in places(*grid))
    found = interpolate_table(jnp.asarray(table), positions, sizes)
    expected = resize(table, grid, "bilinear_antialias").reshape(1, -1, 5)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_images_in_one_sequence_and_padding_do_not_see_each_other():
    images = [(rows, cols, RANDOM.normal(size=(rows * cols, 12))) for rows, cols in ((2, 3), (4, 1))]
    params = nn.meta.unbox(jax.jit(VIT.init)(jax.random.key(0), packed(images[0])))
    apply = jax.jit(VIT.apply)
    together = apply(params, packed(*images, padding=2))
    assert together.grid == (1, 12)
    np.testing.assert_array_equal(together.mask[0], [True] * 10 + [False] * 2)
    alone = [apply(params, packed(image)) for image in images]
    np.testing.assert_allclose(together.tokens[0, :6], alone[0].tokens[0], atol=1e-5)
    np.testing.assert_allclose(together.tokens[0, 6:10], alone[1].tokens[0], atol=1e-5)
    one = apply(params, packed(images[0], padding=3))
    np.testing.assert_allclose(one.pooled, alone[0].tokens.mean(1), atol=1e-5)


def test_the_grid_is_whole_patches():
    assert VIT.grid(6, 2) == (3, 1)
    with pytest.raises(ValueError, match="multiples of 2 pixels, got 5x4"):
        VIT.grid(5, 4)
