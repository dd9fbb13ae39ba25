"""Each connector against NumPy, in float64, with masked features left out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from scipy.stats import norm

from vlm_jax.budget import InfeasibleGrid
from vlm_jax.connectors.concat import Concat
from vlm_jax.connectors.hybrid_mlp import HybridMlp
from vlm_jax.connectors.mlp import MlpConnector
from vlm_jax.connectors.pixel_shuffle import PixelShuffle
from vlm_jax.connectors.pool import Pool
from vlm_jax.connectors.resampler import Resampler
from vlm_jax.layers.squares import in_rows, squares
from vlm_jax.types import VisualFeatures

from ..advice import tried
from ..parameters import drawn

WIDTH_IN, WIDTH = 6, 8


def example(grid):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *grid, WIDTH_IN))
    mask = rng.uniform(size=(2, *grid)) < 0.6
    return x, mask


def run(connector, x, mask, **more):
    """The connector's tokens, and its parameters in float64."""
    grid = mask.shape[1:]
    tokens = jnp.asarray(x.reshape(2, -1, WIDTH_IN), jnp.float32)
    features = VisualFeatures(tokens, jnp.asarray(mask.reshape(2, -1)), grid, **more)
    init = functools.partial(connector.init, deterministic=True)
    params = nn.meta.unbox(drawn(jax.eval_shape(init, jax.random.key(0), features)))
    out = jax.jit(functools.partial(connector.apply, deterministic=True))(params, features)
    return np.asarray(out.tokens), jax.tree.map(np.float64, params["params"])


def dense(x, p):
    return x @ p["kernel"] + p.get("bias", 0.0)


def mlp(x, p):
    for name in ("up", "middle_0", "middle_1"):
        if name in p:
            x = dense(x, p[name])
            x = x * norm.cdf(x)
    return dense(x, p["down"])


def layer_norm(x, p, epsilon):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon) * p["scale"] + p["bias"]


def test_pool_with_a_norm_and_one_layer_without_bias():
    x, mask = example((4, 6))
    pool = Pool(WIDTH, (2, 3), norm="rms_from_one", norm_epsilon=1e-3, depth=1, use_bias=False)
    got, p = run(pool, x, np.ones_like(mask))
    mean = x.reshape(2, 2, 2, 3, 2, -1).mean((2, 4)).reshape(2, 6, -1)
    normed = mean / np.sqrt((mean**2).mean(-1, keepdims=True) + 1e-3) * (1 + p["norm"]["scale"])
    np.testing.assert_allclose(got, normed @ p["mlp"]["down"]["kernel"], atol=1e-5)
    assert set(p["mlp"]["down"]) == {"kernel"}


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


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_mlp(depth):
    x, mask = example((2, 3))
    got, p = run(MlpConnector(WIDTH, depth=depth), x, mask)
    expected = mlp(x.reshape(2, 6, -1), p["mlp"])
    real = mask.reshape(2, 6)
    np.testing.assert_allclose(got[real], expected[real], atol=1e-5)


def gelu(x):
    return x * norm.cdf(x)


@pytest.mark.parametrize(("first_dim", "depth"), [(None, 2), (2, 2), (4, 1), (None, 4)])
def test_hybrid_mlp_projects_each_encoder_to_half_of_the_width(first_dim, depth):
    """Channels of both, and two sets of features, of which a place counts where both are real."""
    x, mask = example((2, 3))
    connector = HybridMlp(WIDTH, depth=depth)
    got, p = run(connector, x, mask, first_dim=first_dim)
    flat, cut = x.reshape(2, 6, -1), first_dim or 3
    expected = np.concatenate([dense(flat[..., :cut], p["high"]), dense(flat[..., cut:], p["low"])], axis=-1)
    assert p["high"]["kernel"].shape == (cut, WIDTH // 2)
    expected = mlp(gelu(expected), p["mlp"]) if depth > 1 else expected
    real = mask.reshape(2, 6)
    np.testing.assert_allclose(got[real], expected[real], atol=1e-5)

    params = {"params": jax.tree.map(jnp.float32, p)}
    high, low = jnp.split(jnp.asarray(flat, jnp.float32), [cut], axis=-1)
    pair = (
        VisualFeatures(high, jnp.asarray(real), (2, 3)),
        VisualFeatures(low, jnp.ones((2, 6), bool).at[0, 2].set(False), (2, 3)),
    )
    out = connector.apply(params, pair, deterministic=True)
    both = real & np.asarray(pair[1].mask)
    np.testing.assert_array_equal(out.mask, both)
    np.testing.assert_allclose(out.tokens[both], expected[both], atol=1e-5)


def test_hybrid_mlp_refuses_two_grids():
    high, low = (VisualFeatures(jnp.zeros((1, n, 4)), jnp.ones((1, n), bool), (1, n)) for n in (3, 4))
    with pytest.raises(InfeasibleGrid, match=r"hybrid_mlp: .* got 1x3 \(high\) and 1x4 \(low\)"):
        HybridMlp(WIDTH).init(jax.random.key(0), (high, low), deterministic=True)


def square(x, mask, row, col, side):
    """The features of a square laid side by side; zeros where there is none."""
    found = []
    for r, c in np.ndindex(side, side):
        place = (row * side + r, col * side + c)
        inside = place[0] < x.shape[0] and place[1] < x.shape[1]
        found.append(x[place] if inside and mask[place] else np.zeros(x.shape[-1]))
    return np.concatenate(found)


@pytest.mark.parametrize(("grid", "version"), [((4, 6), "v2"), ((4, 6), "v1"), ((5, 3), "v2"), ((5, 3), "v1")])
def test_pixel_shuffle_lays_the_features_of_a_square_side_by_side(grid, version):
    x, mask = example(grid)
    got, p = run(PixelShuffle(WIDTH, 2, version=version), x, mask)
    rows, cols = -(-grid[0] // 2), -(-grid[1] // 2)
    for b, i, j in np.ndindex(2, rows, cols):
        expected = mlp(layer_norm(square(x[b], mask[b], i, j, 2), p["norm"], 1e-5), p["mlp"])
        place = i * cols + j if version == "v2" else j * rows + i
        np.testing.assert_allclose(got[b, place], expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_concat_normalises_every_feature_before_a_square_is_laid_side_by_side(kind):
    x, mask = example((4, 6))
    got, p = run(Concat(WIDTH, 2, norm=kind), x, mask)
    x = np.where(mask[..., None], x, 0)
    if kind == "layer":
        normed = layer_norm(x, p["norm"], 1e-6)
    else:
        normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["norm"]["scale"]
    assert p["mlp"]["up"]["kernel"].shape == (4 * WIDTH_IN, 4 * WIDTH_IN)
    for b, i, j in np.ndindex(2, 2, 3):
        expected = mlp(square(normed[b], np.ones((4, 6), bool), i, j, 2), p["mlp"])
        np.testing.assert_allclose(got[b, i * 3 + j], expected, atol=1e-5)


def test_squares_of_packed_images_are_those_of_each_image():
    """Two images of 4x2 and 2x6 features in blocks of 2, one after the other."""
    rng = np.random.default_rng(0)
    pictures = [rng.normal(size=(1, 4, 2, WIDTH_IN)), rng.normal(size=(1, 2, 6, WIDTH_IN))]
    alone, packed = [], []
    for picture in pictures:
        _, rows, cols, _ = picture.shape
        flat = jnp.asarray(picture.reshape(1, -1, WIDTH_IN), jnp.float32)
        alone.append(squares(VisualFeatures(flat, jnp.ones(flat.shape[:2], bool), (rows, cols)), 2, "concat")[0])
        packed.append(picture.reshape(1, rows // 2, 2, cols // 2, 2, -1).swapaxes(2, 3).reshape(1, -1, WIDTH_IN))
    strip = jnp.asarray(np.concatenate(packed, axis=1), jnp.float32)
    features = VisualFeatures(strip, jnp.ones(strip.shape[:2], bool), (2, 10), block=2)
    np.testing.assert_array_equal(squares(features, 2, "concat")[0], jnp.concatenate(alone, axis=1))
    np.testing.assert_array_equal(squares(features, 1, "concat")[0][:, :, 0], strip)
    told = tried(
        "{concat}: features in blocks of {2}x{2} on a {2}x{10} grid cannot be divided into squares of {4}x{4}; pack"
    )
    with pytest.raises(InfeasibleGrid, match=told):
        squares(features, 4, "concat")
    wide = VisualFeatures(strip[:, :16], features.mask[:, :16], (4, 4), block=4)
    assert squares(wide, 4, "concat")[0].shape == (1, 1, 16, WIDTH_IN)
    with pytest.raises(
        InfeasibleGrid, match=tried("use a connector that takes blocks (concat, pixel_shuffle, visual_vocabulary)")
    ):
        in_rows(features, "pool")
    assert squares(features, 2, "concat")[0].shape == (1, 5, 4, WIDTH_IN)


def test_pixel_shuffle_without_a_norm_and_with_an_mlp_of_its_own():
    x, mask = example((3, 3))
    got, p = run(PixelShuffle(WIDTH, 3, norm=None, mlp_dim=12, depth=3), x, mask)
    assert p["mlp"]["middle_0"]["kernel"].shape == (12, 12)
    for b in range(2):
        np.testing.assert_allclose(got[b, 0], mlp(square(x[b], mask[b], 0, 0, 3), p["mlp"]), atol=1e-5)


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


def test_squares_need_an_image_of_whole_squares():
    connector = Concat(8, factor=2)
    with pytest.raises(InfeasibleGrid, match=tried("choose an image size that gives multiples of {2} patches")):
        connector.num_tokens((3, 4))
    assert connector.num_tokens((4, 4)) == 4
