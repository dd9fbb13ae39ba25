"""Kernels on a mesh of 8 fake devices, compared with the softmax written out on one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.layers.attention import Context, attention
from vlm_jax.sharding.mesh import MeshSettings, make_mesh
from vlm_jax.sharding.rules import use_mesh


def drawn_heads(batch, queries, keys, heads, kv_heads, dim, value_dim=None):
    """Queries, keys and values."""
    rng = np.random.default_rng(0)
    shapes = (batch, queries, heads, dim), (batch, keys, kv_heads, dim), (batch, keys, kv_heads, value_dim or dim)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def compare(
    implementation: Any,
    context: Context,
    arrays: list[jax.Array],
    mesh: dict[str, int],
    expected: Context | None = None,
) -> None:
    """Outputs of real positions, and gradients, equal those of `xla` on one device, of `expected` or the same context.

    Args:
      implementation: of `attention`.
      context: of the attention.
      arrays: queries, keys and values.
      mesh: sizes of the axes.
      expected: a context with an equal mask.
    """
    real = np.ones(arrays[0].shape[:2]) if context.query_segments is None else np.asarray(context.query_segments) > 0
    share = np.random.default_rng(1).normal(size=real.shape) * real

    def run(implementation, context, mesh):
        def loss(arrays, context):
            out = attention(*arrays, context, implementation=implementation)
            return jnp.sum(jnp.sin(out) * jnp.asarray(share, jnp.float32)[..., None, None]), out

        devices = jax.devices()[: int(np.prod(list(mesh.values())))]
        with use_mesh(make_mesh(MeshSettings(**{"data": 1, **mesh}), devices)):
            (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays, context)
        return np.asarray(out) * real[..., None, None], grads

    out, grads = run(implementation, context, mesh)
    wanted, wanted_grads = run("xla", expected or context, {})
    np.testing.assert_allclose(out, wanted, atol=1e-5)
    for name, found, gradient in zip("qkv", grads, wanted_grads, strict=True):
        np.testing.assert_allclose(found, gradient, atol=1e-5, err_msg=name)


@pytest.fixture(scope="session")
def kernels():
    """`compare` and `drawn_heads`."""
    return compare, drawn_heads
