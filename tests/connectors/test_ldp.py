"""MobileVLM's projectors where images have masked features; whole images are tested by tests/golden."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from scipy.stats import norm

from vlm_jax.connectors.ldp import LDP, squeezed_dim
from vlm_jax.connectors.ldp_v2 import LDPv2
from vlm_jax.types import VisualFeatures

from ..parameters import drawn

WIDTH_IN, WIDTH = 6, 16


@functools.cache
def params_of(connector):
    features = VisualFeatures(jnp.zeros((1, 4, WIDTH_IN)), jnp.ones((1, 4), bool), (2, 2))
    init = functools.partial(connector.init, deterministic=True)
    return nn.meta.unbox(drawn(jax.eval_shape(init, jax.random.key(0), features)))


def run(connector, x, mask):
    features = VisualFeatures(
        jnp.asarray(x.reshape(len(x), -1, WIDTH_IN), jnp.float32), jnp.asarray(mask.reshape(len(x), -1)), mask.shape[1:]
    )
    out = jax.jit(functools.partial(connector.apply, deterministic=True))(params_of(connector), features)
    return np.asarray(out.tokens), np.asarray(out.mask)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_ldp_takes_masked_features_for_the_outside_of_the_image(stride):
    """An image in the corner gives what it gives alone, where no window half outside of it is counted in."""
    x = np.random.default_rng(0).normal(size=(1, 8, 9, WIDTH_IN))
    mask = np.zeros((1, 8, 9), bool)
    mask[:, :5, :7] = True
    rows, cols = -(-5 // stride), -(-7 // stride)
    alone, _ = run(LDP(WIDTH, stride), x[:, :5, :7], mask[:, :5, :7])
    corner, real = run(LDP(WIDTH, stride), x, mask)
    corner = corner.reshape(-(-8 // stride), -(-9 // stride), WIDTH)[:rows, :cols]
    np.testing.assert_allclose(corner.reshape(-1, WIDTH), alone[0], atol=1e-5)
    assert real.all()


def test_ldp_v2_averages_real_features_and_convolves_windows():
    rng = np.random.default_rng(1)
    x, mask = rng.normal(size=(2, 5, 4, WIDTH_IN)), rng.uniform(size=(2, 5, 4)) < 0.2
    connector = LDPv2(WIDTH, (3, 4))
    got, real = run(connector, x, mask)
    p = jax.tree.map(np.float64, params_of(connector)["params"])
    hidden = x @ p["mlp"]["up"]["kernel"] + p["mlp"]["up"]["bias"]
    y = hidden * norm.cdf(hidden) @ p["mlp"]["down"]["kernel"] + p["mlp"]["down"]["bias"]
    windows = [slice(0, 2), slice(1, 4), slice(3, 5)]  # of 5 rows
    for b in range(2):
        means, seen = np.zeros((5, 6, WIDTH)), np.zeros((5, 6), bool)  # with a border of one
        for i, j in np.ndindex(3, 4):
            inside = mask[b, windows[i], j]
            seen[i + 1, j + 1] = inside.any()
            means[i + 1, j + 1] = y[b, windows[i], j][inside].mean(0) if inside.any() else 0
        for i, j in np.ndindex(3, 4):
            around = (means[i : i + 3, j : j + 3] * p["positions"]["kernel"][:, :, 0]).sum((0, 1))
            expected = means[i + 1, j + 1] + around + p["positions"]["bias"]
            np.testing.assert_allclose(got[b, i * 4 + j], expected, atol=1e-5)
            assert real[b, i * 4 + j] == seen[i : i + 3, j : j + 3].any()


def test_squeezed_dim():
    """The widths of MobileVLM's 1.7B and 3B, of a tiny release, and one where the nearest multiple is too low."""
    assert [squeezed_dim(width) for width in (2048, 2560, 64, 48, 44)] == [512, 640, 16, 16, 16]
