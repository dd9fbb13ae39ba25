"""What a decoder of blocks of several kinds refuses; its numbers are compared with transformers in `tests/parity`."""

import jax
import jax.numpy as jnp
import pytest

from vlm_jax.decoders.mixed import MixedTransformer

from ..advice import tried
from ..contracts.kinds import small


def test_an_order_that_does_not_fit():
    for order in ((0,), (0, 2), (0, 0, 0)):
        with pytest.raises(ValueError, match=r"order: expected for each of 2 blocks the index of one of 2 kinds"):
            small(MixedTransformer, order=order)
    with pytest.raises(ValueError, match="2 heads of keys do not divide 3 heads of queries"):
        small(MixedTransformer, num_heads=3)


def test_numbers_of_experts_without_experts():
    with pytest.raises(
        ValueError,
        match=tried("experts need their hidden width, not only num_experts and num_selected; set expert_dim"),
    ):
        small(MixedTransformer, num_experts=4)
    assert small(MixedTransformer, num_experts=4, expert_dim=8).expert_dim == 8


def test_groups_are_read_by_the_kinds_that_say_so():
    """A later position of a group reaches an earlier one through the blocks of that kind alone."""
    tokens, positions = jnp.arange(6)[None] % 5, jnp.arange(6)[None]
    groups = jnp.array([[0, 1, 1, 1, 0, 0]])

    def run(decoder, tokens):
        ones = jnp.ones_like(tokens)
        return decoder(decoder.embed(tokens), positions, ones, group_ids=groups)[0]

    decoder = small(MixedTransformer)
    kinds = decoder.kinds
    params = decoder.init(jax.random.key(0), tokens, method=run)
    for reads, reached in (((True, False), True), ((False, False), False)):
        own = tuple(
            type(kind)(kind.head_dim, kind.num_kv_heads, kind.rope, kind.window, kind.value_is_key, read)
            for kind, read in zip(kinds, reads, strict=True)
        )
        found = [decoder.clone(kinds=own).apply(params, t, method=run) for t in (tokens, tokens.at[0, 3].set(7))]
        assert bool((jnp.abs(found[0] - found[1])[0, 1] > 1e-6).any()) == reached
        assert not (jnp.abs(found[0] - found[1])[0, 0] > 1e-6).any()
