"""SAM's parts against closed forms, its costs, and its real size; its numbers are in golden and parity."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax.costs.flops import count_flops
from vlm_jax.encoders.sam import (
    SAM,
    RelativeAttention,
    SamBlock,
    block_runs,
    merge_windows,
    partition_windows,
    relative_positions,
)
from vlm_jax.interpolation import interpolation_weights

TINY = SAM(
    image_size=(20, 24),
    patch_size=4,
    width=8,
    depth=4,
    num_heads=2,
    mlp_dim=12,
    neck_dim=6,
    global_blocks=(1, 2),
    window_size=2,
    downsample_dims=(5, 7),
    downsample_from=(9, 10),
    high_res_branch=True,
)


def pixels(height, width, batch=2):
    return jnp.asarray(np.random.default_rng(0).normal(size=(batch, height, width, 3)), jnp.float32)


@functools.cache
def params():
    """Random parameters: the tables of distances and the branch's scale are zero when fresh."""
    shapes = nn.meta.unbox(jax.eval_shape(TINY.init, jax.random.key(0), pixels(20, 24)))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.4, leaf.dtype), shapes)


@functools.cache
def encode(**fields):
    return jax.jit(functools.partial(TINY.clone(**fields).apply, params()), static_argnames="collect")


def test_the_base_encoder_has_the_published_number_of_parameters():
    module = SAM((1024, 1024), 16, 768, 12, 12, 3072, 256, (2, 5, 8, 11))
    shapes = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1024, 1024, 3), jnp.float32))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 89_670_912
    assert module.grid(1024, 1024) == (64, 64) and module.features == 256


@pytest.mark.parametrize(
    ("depth", "global_blocks", "expected"),
    [
        (12, (2, 5, 8, 11), "ww g ww g ww g ww g"),
        (5, (1, 2, 3), "w g gg w"),
        (3, (), "www"),
        (2, (0, 1), "g g"),
    ],
)
def test_blocks_are_stacked_by_kind_and_the_first_global_one_stands_alone(depth, global_blocks, expected):
    runs = block_runs(depth, global_blocks)
    assert " ".join(("w" if run.windowed else "g") * (run.stop - run.start) for run in runs) == expected
    assert [i for run in runs for i in range(run.start, run.stop)] == list(range(depth))


def test_windows_are_cut_row_by_row_and_put_back():
    x = jnp.arange(2 * 5 * 7 * 3, dtype=jnp.float32).reshape(2, 5, 7, 3)
    windows = partition_windows(x, 4)
    assert windows.shape == (8, 4, 4, 3)
    np.testing.assert_array_equal(windows[1, :, :3], x[0, :4, 4:])
    assert not windows[1, :, 3].any()
    np.testing.assert_array_equal(windows[6, 0], x[1, 4, :4])
    np.testing.assert_array_equal(merge_windows(windows, (5, 7)), x)


def test_a_table_of_distances_is_read_at_query_minus_key():
    table = jnp.arange(7, dtype=jnp.float32)[:, None]
    np.testing.assert_array_equal(
        relative_positions(table, 4, 4)[..., 0] - 3, np.arange(4)[:, None] - np.arange(4)[None]
    )
    # Half as many keys: each represents two places, and the last is at no distance from query 2.
    np.testing.assert_array_equal(relative_positions(table, 4, 2)[:, 1, 0], [0, 1, 2, 3])
    # A linear table stays linear where it is interpolated, away from the clamped ends.
    np.testing.assert_allclose(relative_positions(table, 7, 7)[3, 1:6, 0], 3 + np.arange(2, -3, -1) * 7 / 13, atol=1e-5)


def test_relative_attention_is_the_softmax_of_its_formula():
    module = RelativeAttention(num_heads=2, table_grid=(3, 4))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, 8)), jnp.float32)
    shapes = nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), x))["params"]
    rng = np.random.default_rng(1)
    drawn = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), shapes)
    p = jax.tree.map(np.asarray, drawn)
    query, key, value = (
        (np.asarray(x) @ p[name]["kernel"] + p[name]["bias"]).reshape(2, 3, 4, 2, 4)
        for name in ("query", "key", "value")
    )
    expected = np.zeros((2, 3, 4, 2, 4))
    for b, r, c, h in np.ndindex(2, 3, 4, 2):
        q = query[b, r, c, h]
        logits = np.array(
            [
                [
                    q @ key[b, i, j, h] / 2 + q @ p["row_distances"][r - i + 2] + q @ p["column_distances"][c - j + 3]
                    for j in range(4)
                ]
                for i in range(3)
            ]
        )
        weights = np.exp(logits - logits.max())
        expected[b, r, c, h] = np.einsum("ij,ijd->d", weights / weights.sum(), value[b, :, :, h])
    expected = expected.reshape(2, 3, 4, 8) @ p["out"]["kernel"] + p["out"]["bias"]
    np.testing.assert_allclose(module.apply({"params": drawn}, x), expected, atol=1e-4)


def attention_flops(size, window):
    """FLOPs of a block's attention alone: what is left of it when the parts that see one place are gone."""

    def whole(table):
        block = SamBlock(2, (table, table), 4, "gelu", 1e-6, window_size=window)
        x = jax.ShapeDtypeStruct((1, size, size, 8), jnp.float32)
        shapes = jax.eval_shape(block.init, jax.random.key(0), x)
        return count_flops(block.apply, shapes, x)

    places = size * size
    linear_layers = 2 * places * 8 * (3 * 8 + 8 + 2 * 4)
    return whole(size if window is None else window) - linear_layers


def test_attention_in_windows_costs_what_its_windows_cost():
    windowed = {size: attention_flops(size, 7) for size in (7, 14, 28, 56)}
    assert windowed[7] > 0
    for size, flops in windowed.items():
        assert flops == windowed[7] * (size // 7) ** 2  # linear in the number of patches
    whole = {size: attention_flops(size, None) for size in (7, 14, 28)}
    assert whole[7] == windowed[7]
    assert whole[28] > 14 * whole[14]  # nearly 16 times for 4 times the patches


def test_a_window_sees_nothing_outside_itself():
    block = SamBlock(2, (3, 3), 4, "gelu", 1e-6, window_size=3)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 6, 8)), jnp.float32)
    boxed = block.init(jax.random.key(0), x)
    moved = block.apply(boxed, x.at[0, 4, 1, 0].add(3.0))[0] - block.apply(boxed, x)[0]
    changed = np.abs(moved[0]).max(-1) > 1e-6
    assert changed[3:, :3].all()
    assert not changed[:3].any() and not changed[:, 3:].any()


def test_down_sampling_sets_the_grid_whatever_the_image():
    for size in ((20, 24), (28, 12)):
        features = encode()(pixels(*size))
        assert features.grid == TINY.grid(*size) == (3, 3)  # 9x10, then 5x5, then 3x3
        assert features.tokens.shape == (2, 9, 7) and TINY.features == 7


def test_the_neck_is_resized_bilinearly_and_without_antialias():
    fields = {"downsample_dims": (), "high_res_branch": False}
    neck = encode(downsample_from=None, **fields)(pixels(20, 24))
    assert neck.grid == (5, 6)
    rows, cols = interpolation_weights(5, 2, "bilinear"), interpolation_weights(6, 3, "bilinear")
    expected = np.einsum("bijd,ri,cj->brcd", neck.tokens.reshape(2, 5, 6, 6), rows, cols)
    found = encode(downsample_from=(2, 3), **fields)(pixels(20, 24))
    np.testing.assert_allclose(found.tokens, expected.reshape(2, 6, 6), atol=1e-5)


def test_the_high_resolution_branch_is_what_its_scale_adds():
    images = pixels(20, 24)
    both, alone = encode()(images).tokens, encode(high_res_branch=False)(images).tokens
    doubled = {"params": {**params()["params"], "high_res_scale": 2 * params()["params"]["high_res_scale"]}}
    twice = jax.jit(TINY.apply)(doubled, images).tokens
    assert np.abs(both - alone).max() > 1e-2
    np.testing.assert_allclose(twice - alone, 2 * (both - alone), atol=1e-4)


def test_hidden_states_are_the_inputs_of_all_blocks_and_the_last_output():
    images = pixels(20, 24)
    features = encode()(images, collect=True)
    assert features.hidden.shape == (5, 2, 30, 8)
    # Block 1 is the first global one, and a run by itself.
    settings = {"num_heads": 2, "mlp_dim": 12, "activation": "gelu", "norm_epsilon": 1e-6}
    block = SamBlock(table_grid=(5, 6), **settings)
    own = jax.tree.map(lambda leaf: leaf[0], params()["params"]["run_1"])
    out, _ = block.apply({"params": own}, features.hidden[1].reshape(2, 5, 6, 8))
    np.testing.assert_allclose(features.hidden[2], out.reshape(2, 30, 8), atol=1e-5)
    np.testing.assert_array_equal(features.tokens, encode()(images).tokens)


@pytest.mark.parametrize("fields", [{"remat": "full"}, {"unroll": 4}], ids=str)
def test_remat_and_unrolling_change_no_gradient(fields):
    images = pixels(20, 24)

    def gradient(module):
        return jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(module.apply(p, images).tokens))))(params())

    for plain, other in zip(*map(jax.tree.leaves, (gradient(TINY), gradient(TINY.clone(**fields)))), strict=True):
        np.testing.assert_allclose(plain, other, atol=1e-4)


def test_what_cannot_be_built_is_named():
    with pytest.raises(ValueError, match=r"global blocks \[4\] do not exist: there are 4 blocks"):
        block_runs(4, (1, 4))
    with pytest.raises(ValueError, match="3x24 pixels is smaller than one patch of 4"):
        TINY.patch_grid(3, 24)
    with pytest.raises(ValueError, match="global_blocks is empty"):
        jax.eval_shape(TINY.clone(global_blocks=()).init, jax.random.key(0), pixels(20, 24))
