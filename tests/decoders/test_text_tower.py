"""Text towers: which token speaks for a text, and what a token may see."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax.decoders.text_tower import TextTower

TOWER = TextTower(
    vocab_size=9,
    context_length=6,
    width=8,
    depth=2,
    num_heads=2,
    mlp_dim=12,
    causal=True,
    pooling="end",
    end_token=7,
)
TOKENS = jnp.asarray([[3, 8, 7, 1, 7, 1], [7, 2, 4, 8, 1, 1]])


@functools.cache
def params():
    return nn.meta.unbox(jax.jit(TOWER.init)(jax.random.key(0), TOKENS))


@pytest.mark.parametrize(
    ("pooling", "index"), [("end", [2, 0]), ("highest", [1, 3]), ("first", [0, 0]), ("last", [5, 5])]
)
def test_the_token_that_speaks_for_a_text(pooling, index):
    out = jax.jit(TOWER.clone(pooling=pooling).apply)(params(), TOKENS)
    np.testing.assert_array_equal(out.pooled, out.tokens[np.arange(2), np.asarray(index)])


@pytest.mark.parametrize("causal", [True, False])
def test_later_tokens_are_seen_unless_causal(causal):
    apply = jax.jit(TOWER.clone(causal=causal).apply)
    first, second = apply(params(), TOKENS), apply(params(), TOKENS.at[:, -1].set(5))
    same = np.abs(first.tokens[:, :-1] - second.tokens[:, :-1]).max() < 1e-6
    assert same == causal


def test_shorter_texts_are_taken_and_longer_ones_refused():
    whole, part = jax.jit(TOWER.apply)(params(), TOKENS), jax.jit(TOWER.apply)(params(), TOKENS[:, :4])
    np.testing.assert_allclose(whole.tokens[:, :4], part.tokens, atol=1e-5)
    with pytest.raises(ValueError, match=r"texts of at most 6 tokens .*got 7"):
        jax.eval_shape(TOWER.apply, params(), jnp.zeros((1, 7), jnp.int32))
