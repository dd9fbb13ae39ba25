"""Token maps against what each connector is known to read, and against a Jacobian by finite axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax.analysis.token_maps import connection, draw_token_maps, token_maps
from vlm_jax.connectors import CONNECTORS
from vlm_jax.reducers.random_drop import RandomDrop
from vlm_jax.types import VisualFeatures, VisualTokens

from ..advice import tried

GRID, WIDTH, FEATURES = (4, 6), 5, 8


def features(grid=GRID, masked=()):
    tokens = jax.random.normal(jax.random.key(1), (2, grid[0] * grid[1], WIDTH))
    mask = np.ones(tokens.shape[:2], bool)
    mask[1, list(masked)] = False
    return VisualFeatures(tokens, jnp.asarray(mask), grid)


def connector(kind, given, **fields):
    module = CONNECTORS[kind](features=FEATURES, **fields)
    params = module.init(jax.random.key(0), given, deterministic=True)["params"]
    return connection(module, params)


def rows_sum_to(maps, mask):
    np.testing.assert_allclose(maps.sum(-1), mask, atol=1e-6)


def test_an_mlp_reads_one_feature_a_token_and_a_masked_one_none():
    given = features(masked=[3, 7])
    maps = np.asarray(token_maps(connector("mlp", given), given))
    assert maps.shape == (2, 24, 24) and maps.dtype == np.float32
    np.testing.assert_allclose(maps, np.asarray(given.mask)[:, :, None] * np.eye(24)[None], atol=1e-6)


@pytest.mark.parametrize("output_grid", [(2, 3), (3, 4)])  # windows that divide, and that overlap
def test_a_pool_reads_its_windows_evenly_and_masked_features_not_at_all(output_grid):
    given = features(masked=[0, 1, 6, 7, 8])
    maps = np.asarray(token_maps(connector("pool", given, output_grid=output_grid), given))
    for image, mask in enumerate(np.asarray(given.mask).reshape(2, *GRID)):
        for i in range(output_grid[0]):
            for j in range(output_grid[1]):
                # PyTorch's AdaptiveAvgPool2d: from floor(i * in / out) to ceil((i + 1) * in / out).
                window = np.zeros(GRID)
                top, bottom = i * 4 // output_grid[0], -(-(i + 1) * 4 // output_grid[0])
                left, right = j * 6 // output_grid[1], -(-(j + 1) * 6 // output_grid[1])
                window[top:bottom, left:right] = mask[top:bottom, left:right]
                expected = window.ravel() / max(window.sum(), 1)
                found = maps[image, i * output_grid[1] + j]
                np.testing.assert_allclose(found, expected, atol=1e-6, err_msg=f"{image, i, j}")


def test_a_pixel_shuffle_reads_exactly_its_squares():
    given = features(masked=[1])
    maps = np.asarray(token_maps(connector("pixel_shuffle", given, factor=2), given))
    rows, cols = np.divmod(np.arange(24), 6)
    square = rows // 2 * 3 + cols // 2
    expected = square[None, :] == np.arange(6)[:, None]
    np.testing.assert_array_equal(maps[0] > 0, expected)
    expected[0, 1] = False
    np.testing.assert_array_equal(maps[1] > 0, expected)
    rows_sum_to(maps, np.ones((2, 6)))


def test_a_resampler_against_the_whole_jacobian():
    given = features(masked=[2, 23])
    connect = connector("resampler", given, num_queries=6, num_heads=2)
    maps = np.asarray(token_maps(connect, given, tokens_at_once=4))

    def tokens_of(x, image):
        alone = VisualFeatures(x[None], given.mask[image][None], GRID)
        return connect(alone).tokens[0]

    for image in range(2):
        jacobian = np.asarray(jax.jacfwd(tokens_of)(given.tokens[image], image))  # [M, D, N, D_v]
        norms = np.sqrt(np.square(jacobian).sum((1, 3)))
        np.testing.assert_allclose(maps[image], norms / norms.sum(1, keepdims=True), atol=1e-6)
    np.testing.assert_array_equal(maps[1][:, [2, 23]], 0)
    assert (maps[0] > 0).all()


def test_a_weighted_mean_shows_its_weights():
    given = features()
    weights = jax.nn.softmax(jax.random.normal(jax.random.key(3), (7, 24)))
    kernel = jax.random.normal(jax.random.key(4), (WIDTH, FEATURES))

    def connect(x):
        tokens = jnp.einsum("mn,bnd,de->bme", weights, x.tokens, kernel)
        return VisualTokens(tokens, jnp.ones(tokens.shape[:2], bool))

    maps = token_maps(connect, given)
    np.testing.assert_allclose(maps, np.broadcast_to(weights, (2, 7, 24)), atol=1e-6)


def test_a_reducer_before_the_connector_shows_the_features_it_keeps():
    given = features(masked=[5])
    reducer = RandomDrop(9)
    reduced = reducer.apply({}, given, deterministic=True)
    module = CONNECTORS["mlp"](features=FEATURES)
    params = module.init(jax.random.key(0), reduced, deterministic=True)["params"]
    maps = np.asarray(token_maps(connection(module, params, reducer), given))
    assert maps.shape == (2, 9, 24)
    for image in range(2):
        kept = [
            int(np.flatnonzero((np.asarray(given.tokens[image]) == token).all(-1)).item())
            for token in np.asarray(reduced.tokens[image])
        ]
        np.testing.assert_allclose(maps[image], np.eye(24)[kept], atol=1e-6)
        assert image == 0 or 5 not in kept


class Scale(nn.Module):
    """A reducer with a parameter."""

    @nn.compact
    def __call__(self, features, *, deterministic):
        scale = self.param("scale", nn.initializers.ones, (24,))
        return VisualFeatures(features.tokens * scale[None, :, None], features.mask, features.grid)


def test_parameters_of_a_reducer_are_used():
    given = features()
    module = CONNECTORS["pool"](features=FEATURES, output_grid=(1, 1))
    params = module.init(jax.random.key(0), given, deterministic=True)["params"]
    scale = np.arange(24, dtype=np.float32)
    connect = connection(module, params, Scale(), {"scale": jnp.asarray(scale)})
    maps = np.asarray(token_maps(connect, given))
    np.testing.assert_allclose(maps[:, 0], np.tile(scale / scale.sum(), (2, 1)), atol=1e-6)


def test_as_many_projections_as_the_width_are_exact():
    given = features()
    connect = connector("resampler", given, num_queries=3, num_heads=2)
    exact = token_maps(connect, given)
    np.testing.assert_allclose(token_maps(connect, given, num_projections=FEATURES), exact, atol=1e-6)


def test_projections_are_seeded_and_their_squares_are_right_on_average():
    # Feature 0 moves the outputs along one axis, feature 1 all of them alike: 3 times as strongly.
    def connect(x):
        tokens = x.tokens[:, 0, :1] * jnp.eye(1, FEATURES) + 3 * x.tokens[:, 1, :1] * jnp.full(
            (1, FEATURES), FEATURES**-0.5
        )
        return VisualTokens(tokens[:, None], jnp.ones((len(tokens), 1), bool))

    given = features((1, 2))
    first = token_maps(connect, given, num_projections=3, seed=0)
    np.testing.assert_array_equal(token_maps(connect, given, num_projections=3, seed=0), first)
    assert (token_maps(connect, given, num_projections=3, seed=1) != first).any()
    np.testing.assert_allclose(token_maps(connect, given)[0, 0], [0.25, 0.75], atol=1e-6)
    # The share of a root is r / (1 + r) of the root's ratio r, so averages of many draws come near it.
    draws = np.stack([token_maps(connect, given, num_projections=6, seed=seed)[0, 0] for seed in range(60)])
    np.testing.assert_allclose(draws.mean(0), [0.25, 0.75], atol=0.02)


@pytest.mark.parametrize("count", [0, FEATURES + 1])
def test_a_number_of_projections_out_of_range_is_refused(count):
    given = features()
    with pytest.raises(ValueError, match=f"1 to {FEATURES} projections of tokens of width 8, got {count}"):
        token_maps(connector("mlp", given), given, num_projections=count)


def page(height=40, width=60, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


@pytest.mark.parametrize(("patch_size", "edges"), [(None, (59.5, 39.5)), (9, (53.5, 35.5))])
def test_the_figure_lays_every_map_over_the_page(patch_size, edges):
    maps = np.random.default_rng(1).dirichlet(np.ones(24), 5).astype(np.float32)
    maps[3] = 0
    figure = draw_token_maps(page(), maps, GRID, patch_size=patch_size)
    assert len(figure.axes) == 5
    for token, axes in enumerate(figure.axes):
        picture, overlay = axes.images
        assert picture.get_array().shape == (40, 60)
        np.testing.assert_array_equal(overlay.get_array(), maps[token].reshape(GRID))
        assert overlay.get_extent() == [-0.5, edges[0], edges[1], -0.5]
        assert axes.get_title() == f"{token}: {maps[token].max():.0%}"
        peak = maps[token].max()
        np.testing.assert_allclose(overlay.get_alpha(), 0.65 * maps[token].reshape(GRID) / (peak or 1), atol=1e-6)


def test_the_figure_can_show_some_tokens_of_a_grey_page():
    maps = np.eye(24, dtype=np.float32)
    figure = draw_token_maps(page(channels=1), maps, GRID, tokens=[4, 20])
    assert [axes.get_title() for axes in figure.axes] == ["4: 100%", "20: 100%"]


def test_maps_of_another_grid_are_refused():
    with pytest.raises(
        ValueError, match=tried("over the {24} features of a {4}x{6} grid, got {9}; pass the grid of the features")
    ):
        draw_token_maps(page(), np.zeros((2, 9), np.float32), GRID)
    assert len(draw_token_maps(page(), np.zeros((2, 9), np.float32), (3, 3), tokens=[1]).axes) == 1
