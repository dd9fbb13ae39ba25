"""The kinds' own numbers, computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vlm_jax_example.connector import Middle
from vlm_jax_example.family import rules
from vlm_jax_example.reducer import Central

from vlm_jax.types import VisualFeatures


def numbered(grid):
    """An image whose features hold their own number."""
    count = grid[0] * grid[1]
    return VisualFeatures(jnp.arange(count, dtype=jnp.float32)[None, :, None], jnp.ones((1, count), bool), grid)


@pytest.mark.parametrize(
    ("output_grid", "expected"), [((1, 1), [10]), ((2, 2), [5, 7, 13, 15]), ((4, 4), list(range(16)))]
)
def test_the_middle_of_every_window_is_taken(output_grid, expected):
    """With an identity in place of the MLP's kernels, tokens are the GELU of what was taken."""
    connector = Middle(1, output_grid)
    one = {"kernel": jnp.ones((1, 1)), "bias": jnp.zeros(1)}
    params = {"params": {"mlp": {"up": one, "down": one}}}
    tokens = connector.apply(params, numbered((4, 4)), deterministic=True).tokens
    np.testing.assert_allclose(tokens[0, :, 0], jax.nn.gelu(jnp.asarray(expected, jnp.float32), approximate=False))


@pytest.mark.parametrize(("num_kept", "expected"), [(4, [5, 6, 9, 10]), (6, [1, 2, 5, 6, 9, 10]), (1, [5])])
def test_features_near_the_centre_are_kept(num_kept, expected):
    out = Central(num_kept).apply({}, numbered((4, 4)), deterministic=True)
    np.testing.assert_array_equal(out.kept, [expected])
    np.testing.assert_array_equal(out.tokens[0, :, 0], expected)


def test_kernels_are_transposed_torch_weights():
    (rule,) = [rule for rule in rules() if rule.source == "blocks.{layer}.fc1.weight"]
    assert rule.target == "blocks/layers/mlp/up/kernel"
    weight = np.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(rule.op(weight)[0], weight.T)
