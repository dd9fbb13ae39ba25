"""Angles by the length of a prompt, in every decoder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.decoders import DECODERS
from vlm_jax.decoders.mixed import BlockKind
from vlm_jax.layers.rope import Rope

from ..contracts.kinds import SIZES, small
from ..parameters import drawn


def logits(decoder, tokens, positions, segments, cache=None):
    hidden, cache = decoder(decoder.embed(tokens), positions, segments, cache)
    return decoder.logits(hidden), cache


def with_rope(kind, rope):
    """The fields of a decoder whose layers all have one rope."""
    return {"kinds": (BlockKind(8, 1, rope), BlockKind(12, 1, rope))} if kind == "mixed" else {"rope": rope}


@pytest.mark.parametrize("kind", DECODERS)
def test_a_prompt_that_is_continued_keeps_its_angles(kind):
    """Prompts of two and of four tokens, the first padded on the left, and one token more."""
    decoder = small(DECODERS[kind], **with_rope(kind, Rope(50.0, "dynamic_prompt", original_length=2)))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, SIZES["vocab_size"], size=(2, 5)), jnp.int32)
    positions = jnp.array([[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]])
    segments = jnp.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    init = functools.partial(decoder.init, method=logits)
    params = drawn(jax.eval_shape(init, jax.random.key(0), tokens, positions, segments))

    def continued(cache):
        run = jax.jit(functools.partial(decoder.apply, params, method=logits))
        _, cache = run(tokens[:, :4], positions[:, :4], segments[:, :4], cache)
        return run(tokens[:, 4:], positions[:, 4:], segments[:, 4:], cache)

    cache = decoder.init_cache(2, 6)
    np.testing.assert_array_equal(cache.prompt_length, [0, 0])
    got, cache = continued(cache)
    np.testing.assert_array_equal(cache.prompt_length, [2, 4])
    # Angles grow beyond 2, 4 and 8 positions; were they of the length so far, both rows would be a step further.
    # Where they grow beyond 3 and 6, sequences of three and of five have those of the prompts.
    other = decoder.clone(**with_rope(kind, Rope(50.0, "dynamic_prompt", original_length=3)))
    expected, _ = jax.jit(functools.partial(other.apply, params, method=logits))(tokens, positions, segments)
    np.testing.assert_allclose(got[:, 0], expected[:, 4], atol=2e-5)
    followed, _ = jax.jit(functools.partial(decoder.apply, params, method=logits))(tokens, positions, segments)
    assert (np.abs(followed[:, 4] - expected[:, 4]).max(-1) > 1e-4).all()
