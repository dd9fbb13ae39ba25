"""The patch merger's levels; its tokens are compared with transformers in `tests/parity/test_qwen_vit.py`."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from vlm_jax.connectors.concat import Concat
from vlm_jax.types import VisualFeatures

from ..advice import tried


def test_levels_come_from_the_encoder():
    connector = Concat(6, 2, levels=2)
    features = VisualFeatures(jnp.zeros((1, 8, 4)), jnp.ones((1, 8), bool), (2, 4))

    def run(features):
        return connector.init_with_output(jax.random.key(0), features, deterministic=True)[0]

    with pytest.raises(
        ValueError,
        match=tried(
            "expected {} levels of features, got {}; set the encoder's levels, and with a reducer reduce to 'tokens'"
        ),
    ):
        jax.eval_shape(run, features)
    found = jax.eval_shape(run, dataclasses.replace(features, levels=jnp.zeros((1, 8, 8))))
    assert found.tokens.shape == (1, 2, 6) and found.levels.shape == (1, 2, 12)
