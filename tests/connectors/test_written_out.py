"""Each connector against NumPy, in float64, with masked features left out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from scipy.stats import norm

from vlm_jax.connectors.mlp import MlpConnector
from vlm_jax.connectors.pixel_shuffle import PixelShuffle
from vlm_jax.connectors.pool import Pool
from vlm_jax.connectors.resampler import Resampler
from vlm_jax.types import VisualFeatures

from ..parameters import drawn

WIDTH_IN, WIDTH = 6, 8


def example(grid):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *grid, WIDTH_IN))
    mask = rng.uniform(size=(2, *grid)) < 0.6
    return x, mask


def run(connector, x, mask):
    """The connector's tokens, and its parameters in float64."""
    grid = mask.shape[1:]
    tokens = jnp.asarray(x.reshape(2, -1, WIDTH_IN), jnp.float32)
    features = VisualFeatures(tokens, jnp.asarray(mask.reshape(2, -1)), grid)
    init = functools.partial(connector.init, deterministic=True)
    params = nn.meta.unbox(drawn(jax.eval_shape(init, jax.random.key(0), features)))
    out = jax.jit(functools.partial(connector.apply, deterministic=True))(params, features)
    return np.asarray(out.tokens), jax.tree.map(np.float64, params["params"])


def dense(x, p):
    return x @ p["kernel"] + p.get("bias", 0.0)


def mlp(x, p):
    hidden = dense(x, p["up"])
    return dense(hidden * norm.cdf(hidden), p["down"])


def layer_norm(x, p, epsilon):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon) * p["scale"] + p["bias"]


def test_mlp():
    x, mask = example((2, 3))
    got, p = run(MlpConnector(WIDTH), x, mask)
    expected = mlp(x.reshape(2, 6, -1), p["mlp"])
    real = mask.reshape(2, 6)
    np.testing.assert_allclose(got[real], expected[real], atol=1e-5)


@pytest.mark.parametrize(("grid", "output"), [((4, 6), (2, 3)), ((5, 7), (2, 3)), ((3, 4), (3, 4))])
def test_pool_averages_the_real_features_of_a_window(grid, output):
    x, mask = example(grid)
    got, p = run(Pool(WIDTH, output), x, mask)
    for b, i, j in np.ndindex(2, *output):
        rows, cols = (
            slice(k * size // out, int(np.ceil((k + 1) * size / out)))
            for k, size, out in zip((i, j), grid, output, strict=True)
        )
        real = x[b, rows, cols][mask[b, rows, cols]]
        mean = real.mean(axis=0) if len(real) else np.zeros(WIDTH_IN)
        np.testing.assert_allclose(got[b, i * output[1] + j], mlp(mean, p["mlp"]), atol=1e-5)


def test_pixel_shuffle_lays_the_features_of_a_square_side_by_side():
    x, mask = example((4, 6))
    got, p = run(PixelShuffle(WIDTH, 2), x, mask)
    for b, i, j in np.ndindex(2, 2, 3):
        square = [(2 * i + r, 2 * j + c) for r in range(2) for c in range(2)]
        long = np.concatenate([x[b, r, c] * mask[b, r, c] for r, c in square])
        expected = mlp(layer_norm(long, p["norm"], 1e-5), p["mlp"])
        np.testing.assert_allclose(got[b, i * 3 + j], expected, atol=1e-5)


def sincos(row, col):
    """One place; WIDTH is 8, so there are two frequencies: 1 and 1 / 10000."""
    omega = np.array([1.0, 1e-4])
    return np.concatenate([np.sin(col * omega), np.cos(col * omega), np.sin(row * omega), np.cos(row * omega)])


@pytest.mark.parametrize(
    ("count", "places"),
    [
        (6, [(0.5 + 2 * i, 0.5 + 2 * j) for i in range(2) for j in range(3)]),  # 2x3 over 4x6
        (5, [((i + 0.5) * 4 / 5 - 0.5, (i + 0.5) * 6 / 5 - 0.5) for i in range(5)]),  # the diagonal
    ],
)
def test_resampler_queries_read_the_real_features(count, places):
    grid, heads = (4, 6), 2
    x, mask = example(grid)
    got, p = run(Resampler(WIDTH, count, num_heads=heads), x, mask)
    values = layer_norm(dense(x.reshape(2, -1, WIDTH_IN), p["kv_proj"]), p["kv_norm"], 1e-6)
    keys = values + np.array([sincos(row, col) for row in range(grid[0]) for col in range(grid[1])])
    queries = layer_norm(p["queries"], p["query_norm"], 1e-6) + np.array([sincos(*place) for place in places])
    for b in range(2):
        real = mask[b].reshape(-1)
        q, k, v = (
            dense(y, p["attention"][name]).reshape(len(y), heads, -1)
            for name, y in (("query", queries), ("key", keys[b][real]), ("value", values[b][real]))
        )
        weights = np.exp(np.einsum("qhd,khd->hqk", q, k) / np.sqrt(WIDTH / heads))
        read = np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v)
        np.testing.assert_allclose(got[b], dense(read.reshape(count, -1), p["attention"]["out"]), atol=1e-5)


def test_resampler_heads_are_128_wide_unless_told():
    x, mask = example((2, 2))

    def tokens(num_heads):
        return run(Resampler(256, 3, num_heads=num_heads), x, mask)[0]

    np.testing.assert_array_equal(tokens(None), tokens(2))
    assert np.abs(tokens(None) - tokens(1)).max() > 1e-3
