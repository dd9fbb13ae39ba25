"""Convolutions against NumPy, and what a depthwise one may not be asked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.layers.conv import Conv, reached


@pytest.mark.parametrize("padding", [0, 1, "SAME"])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("depthwise", [False, True])
def test_conv_by_hand(padding, stride, depthwise):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 7, 6, 4)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 1 if depthwise else 4, 4)).astype(np.float32)
    bias = rng.normal(size=4).astype(np.float32)
    layer = Conv(4, 3, stride, padding, use_bias=True, depthwise=depthwise)
    got = jax.jit(layer.apply)({"params": {"kernel": kernel, "bias": bias}}, x)

    front, sizes = [], []
    for size in x.shape[1:3]:
        if padding == "SAME":  # as TensorFlow: the larger half after
            count = -(-size // stride)
            front.append(max((count - 1) * stride + 3 - size, 0) // 2)
        else:
            count = (size + 2 * padding - 3) // stride + 1
            front.append(padding)
        sizes.append(count)
    padded = np.zeros((2, 13, 12, 4))
    padded[:, front[0] : front[0] + 7, front[1] : front[1] + 6] = x
    assert got.shape == (2, *sizes, 4)
    for i, j in np.ndindex(*sizes):
        window = padded[:, i * stride : i * stride + 3, j * stride : j * stride + 3]
        expected = np.einsum("brcd,rcd->bd", window, kernel[:, :, 0]) if depthwise else None
        if not depthwise:
            expected = np.einsum("brcd,rcde->be", window, kernel)
        np.testing.assert_allclose(got[:, i, j], expected + bias, atol=1e-4)


def test_a_depthwise_window_keeps_the_channels():
    with pytest.raises(ValueError, match="features: a depthwise convolution keeps the 4 channels, got 8"):
        Conv(8, 3, depthwise=True).init(jax.random.key(0), jnp.zeros((1, 3, 3, 4)))


@pytest.mark.parametrize(("window", "stride"), [(3, 1), (3, 2), (5, 3)])
def test_reached_is_where_a_convolution_of_ones_is_not_zero(window, stride):
    mask = np.random.default_rng(0).uniform(size=(2, 9, 8)) < 0.1
    layer = Conv(1, window, stride, window // 2)
    ones = {"params": {"kernel": np.ones((window, window, 1, 1), np.float32)}}
    expected = layer.apply(ones, jnp.asarray(mask[..., None], jnp.float32))[..., 0] > 0
    np.testing.assert_array_equal(reached(jnp.asarray(mask), window, stride), expected)


@pytest.mark.parametrize("padding", [1, "SAME"])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_gradients_of_a_depthwise_convolution_are_those_of_xlas_grouped_one(padding, stride):
    rng = np.random.default_rng(1)
    x, weights = rng.normal(size=(2, 7, 8, 4)).astype(np.float32), rng.normal(size=4).astype(np.float32)
    layer = Conv(4, 3, stride, padding, depthwise=True)
    kernel = rng.normal(size=(3, 3, 1, 4)).astype(np.float32)
    margin = padding if padding == "SAME" else [(padding, padding)] * 2

    def ours(x, kernel):
        return jnp.sum(jnp.sin(layer.apply({"params": {"kernel": kernel}}, x)) * weights[None, None, None])

    def grouped(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), margin, dimension_numbers=numbers, feature_group_count=4
        )
        return jnp.sum(jnp.sin(y) * weights[None, None, None])

    got, want = (jax.jit(jax.grad(function, argnums=(0, 1)))(x, kernel) for function in (ours, grouped))
    for mine, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5)
