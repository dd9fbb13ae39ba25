"""Norms against their formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax.layers.norm import Norm


def given(kind, x, **fields):
    layer = Norm(kind, 1e-3, **fields)
    params = nn.meta.unbox(jax.jit(layer.init)(jax.random.key(0), x))["params"]
    one = kind != "rms_from_one"  # whose scale is added to 1
    assert all((leaf == (name == "scale" and one)).all() for name, leaf in params.items())
    rng = np.random.default_rng(1)
    params = {name: leaf + jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) for name, leaf in params.items()}
    return jax.jit(layer.apply)({"params": params}, x), {name: np.float64(leaf) for name, leaf in params.items()}


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 4, 5)])
def test_layer_norm(reference, shape):
    x = np.random.default_rng(0).normal(3.0, 2.0, size=shape).astype(np.float32)
    out, p = given("layer", jnp.asarray(x))
    np.testing.assert_allclose(out, reference.layer_norm(x, p["scale"], p["bias"], 1e-3), atol=1e-5)


@pytest.mark.parametrize(("kind", "shape"), [("rms", (5,)), ("rms", (2, 3, 4, 5)), ("rms_from_one", (2, 5))])
def test_rms_norm(reference, kind, shape):
    x = np.random.default_rng(0).normal(3.0, 2.0, size=shape).astype(np.float32)
    out, p = given(kind, jnp.asarray(x))
    assert set(p) == {"scale"}
    scale = p["scale"] + (kind == "rms_from_one")
    np.testing.assert_allclose(out, reference.rms_norm(x, scale, 1e-3), atol=1e-5)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_statistics_are_float32_whatever_the_dtype(reference, kind):
    # Around 300 bfloat16 has steps of 2, and a sum of 4096 squares is beyond its precision.
    x = jnp.asarray(np.random.default_rng(0).normal(300.0, 4.0, size=(2, 4096)), jnp.bfloat16)
    out, p = given(kind, x, dtype=jnp.bfloat16)
    assert out.dtype == jnp.bfloat16
    x = np.float64(x)
    if kind == "layer":
        expected = reference.layer_norm(x, p["scale"], p["bias"], 1e-3)
    else:
        expected = reference.rms_norm(x, p["scale"], 1e-3)
    np.testing.assert_allclose(np.float32(out), expected, rtol=0.01, atol=0.01)
