"""What a decoder of blocks of several kinds refuses; its numbers are compared with transformers in `tests/parity`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax.config import ConfigError
from vlm_jax.decoders.dropping import Rows
from vlm_jax.decoders.mixed import BlockKind, MixedTransformer
from vlm_jax.layers.attention import Context, KeyValue, SharedKeyValue
from vlm_jax.layers.block import TransformerBlock
from vlm_jax.layers.rope import Rope
from vlm_jax.types import NO_ID, Drop, VisualPlaces

from ..advice import tried
from ..contracts.kinds import SIZES, small
from ..parameters import drawn

KINDS = (
    BlockKind(8, 1, Rope(10.0), 3),
    BlockKind(12, 2, Rope(100.0)),
    BlockKind(8, 1, Rope(10.0), 3, mlp_dim=20, shares_with=0),
    BlockKind(12, 2, Rope(100.0), shares_with=1),
)
SHARED = {
    "kinds": KINDS,
    "order": (0, 1, 0, 3, 2, 3),
    "depth": 6,
    "qk_scale": 0.2,
    "own_input_dim": 6,
    "own_input_rows": SIZES["vocab_size"],
    "placeholder": 2,
}


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


def test_keys_to_share_are_of_an_earlier_kind():
    """Of one with keys of its own and as wide heads, whose last block is before all that read it."""
    for fields, told in (
        (
            {"kinds": (*KINDS[:3], BlockKind(12, 2, Rope(100.0), shares_with=0))},
            r"kinds\[3\].shares_with: expected the in",
        ),
        (
            {"kinds": (*KINDS[:3], BlockKind(12, 2, Rope(100.0), shares_with=4))},
            "of heads of 12, that some block has, got 4",
        ),
        (
            {"order": (0, 2, 3, 0, 1, 3)},
            "order: expected every block of kind 0 before those of kind 2, which share its",
        ),
        ({"placeholder": SIZES["vocab_size"]}, "placeholder: expected a row of"),
    ):
        with pytest.raises(ValueError, match=told):
            small(MixedTransformer, **{**SHARED, **fields})
    advice = tried("choose a reducer that keeps positions, or layers up to {}")
    with pytest.raises(ConfigError, match=advice):
        small(MixedTransformer, **SHARED, drops=(Drop(4, 2, 3, renumbers=True),))
    assert small(MixedTransformer, **SHARED, drops=(Drop(1, 2, 0, renumbers=True), Drop(4, 2, 3))).drops


def run_tokens(decoder, tokens, positions, segments, visual, cache=None, places=None):
    """Visual tokens are embedded as their ids, whose rows of the second table they do not read."""
    ids = jnp.where(visual, NO_ID, tokens)
    return decoder(decoder.embed(tokens), positions, segments, cache, places=places, token_ids=ids)


def test_what_only_some_blocks_read_must_be_given():
    decoder, params = shared(())
    given = (jnp.zeros((1, 4), jnp.int32),) * 2
    x = jnp.zeros((1, 4, decoder.width))
    with pytest.raises(ValueError, match="token_ids: expected the ids of the text, and NO_ID at visual tokens"):
        decoder.apply(params, x, *given)
    block = TransformerBlock(4, 8, "silu", "rms", 1e-6, own_input_dim=6)
    with pytest.raises(ValueError, match="own_input: expected 6 channels for every position, got None"):
        block.apply(block.init(jax.random.key(0), x, None, Context("causal")), x, None, Context("causal"))
    block = TransformerBlock(4, 8, "silu", "rms", 1e-6, shares_keys=True)
    with pytest.raises(ValueError, match="shares_keys: expected a SharedKeyValue of an earlier layer as cache"):
        block.apply(block.init(jax.random.key(0), x, None, Context("causal")), x, None, Context("causal"))


TOKENS = 5  # of the image
ROWS = np.array([[-1, *range(TOKENS), -1, -1, -1], [-1, -1, *range(TOKENS), -1, -1]])


@pytest.fixture(scope="module")
def rows():
    """Tokens, positions, segments, which are visual, and places; the second row begins with padding."""
    segments = np.ones_like(ROWS)
    segments[1, 0] = 0
    positions = np.maximum(np.cumsum(segments, 1) - 1, 0)
    tokens = np.random.default_rng(4).integers(0, SIZES["vocab_size"], size=ROWS.shape)
    index = np.stack([np.flatnonzero(row >= 0) for row in ROWS])[:, None]
    ranking = np.zeros(ROWS.shape, bool)
    ranking[:, -2] = True
    given = (jnp.asarray(x, jnp.int32) for x in (tokens, positions, segments))
    return *given, jnp.asarray(ROWS >= 0), VisualPlaces(jnp.asarray(index, jnp.int32), jnp.asarray(ranking))


@functools.cache
def shared(drops):
    decoder = small(MixedTransformer, **SHARED, drops=drops)
    given = (jnp.zeros((1, 4), jnp.int32),) * 4
    boxed = jax.eval_shape(functools.partial(decoder.init, method=run_tokens), jax.random.key(0), *given)
    return decoder, nn.meta.unbox(drawn(boxed))


AFTER = (Drop(3, 3, 2), Drop(5, 1, 4))  # behind the last keys, and between two blocks that read them
BETWEEN = (Drop(2, 3, 1),)  # between the last keys of the one kind and of the other
ITSELF = (Drop(3, 2, 3),)  # by what the first block that shares would attend to


@pytest.mark.parametrize("drops", [AFTER, BETWEEN, ITSELF], ids=["after", "between", "itself"])
def test_shared_keys_and_own_inputs_are_dropped_with_their_tokens(drops, rows):
    *given, places = rows
    decoder, params = shared(drops)
    found, _ = decoder.apply(params, *given, places=places, method=run_tokens)
    for row in range(len(ROWS)):
        left = {
            layer: np.flatnonzero(np.asarray(kept)) for layer, kept in left_after(decoder, params, rows, row).items()
        }
        expected = by_hand(decoder, params, [np.asarray(x[row]) for x in given], left)
        kept = left[decoder.depth]
        np.testing.assert_allclose(found[row, kept], expected, atol=2e-5)


def left_after(decoder, params, rows, row):
    """By layer which tokens are left from it on: of a decoder with the first drops alone, those that are not zeros."""
    *given, places = rows
    found = {0: np.asarray(given[2][row] > 0)}
    for number, drop in enumerate(decoder.drops, 1):
        less = decoder.clone(drops=decoder.drops[:number])
        hidden, _ = less.apply(params, *given, places=places, method=run_tokens)
        found[drop.layer] = np.asarray((hidden[row] != 0).any(-1) & (given[2][row] > 0))
        assert found[drop.layer].sum() == found[0].sum() - TOKENS + drop.num_kept
    return {**found, decoder.depth: found[max(found)]}


def by_hand(decoder, params, given, left):
    """Final states of the tokens that are left of one row, block by block."""
    tokens, positions, _, visual = given
    bound = decoder.bind(params)
    ids = jnp.where(visual, NO_ID, tokens)[None]
    x = bound.embed(jnp.asarray(tokens)[None])
    inputs, here, keys = bound.layer_inputs(x, ids), np.arange(len(tokens)), {}
    for layer, index in enumerate(decoder.order):
        if layer in left:
            keep = np.searchsorted(here, left[layer])
            x, here = x[:, keep], left[layer]
            keys = {kind: SharedKeyValue(pair.key[:, keep], pair.value[:, keep]) for kind, pair in keys.items()}
        kind, (name, place) = decoder.kinds[index], decoder._stack_of(layer)
        stack = getattr(bound, name)
        block = TransformerBlock(**stack.block)
        own = jax.tree.map(lambda leaf, place=place: leaf[place], params["params"][name]["layers"])
        ones = jnp.ones((1, len(here)), jnp.int32)
        empty = KeyValue(
            jnp.zeros((1, kind.num_kv_heads, kind.head_dim, 0)), jnp.zeros((1, kind.num_kv_heads, 0, kind.head_dim))
        )
        rows = Rows(
            x,
            jnp.asarray(positions)[None, here],
            None,
            bound._angles(jnp.asarray(positions)[None, here], None),
            None,
            ones,
            None,
            ones,
        )
        context = stack.context_of(place, decoder.context_in(name, decoder.context(rows)))
        past = empty if kind.shares_with is None else keys[kind.shares_with]
        x, fresh = block.apply({"params": own}, x, past, context, own_input=inputs[:, here, layer])
        if kind.shares_with is None:
            keys[index] = SharedKeyValue.of(fresh, None, x.dtype)
    return bound.final_norm(x)[0]


@pytest.mark.parametrize("drops", [(), AFTER, BETWEEN, ITSELF], ids=["none", "after", "between", "itself"])
def test_cached_equals_uncached_with_drops(drops, rows):
    """The prompt, and then the last token alone."""
    *given, places = rows
    decoder, params = shared(drops)
    expected, _ = decoder.apply(params, *given, places=places if drops else None, method=run_tokens)
    prompt = VisualPlaces(places.index, places.ranking[:, :-1]) if drops else None
    cache = decoder.init_cache(len(ROWS), ROWS.shape[1] + 1, places=prompt)
    first, last = ([x[:, part] for x in given] for part in (slice(0, -1), slice(-1, None)))
    _, cache = decoder.apply(params, *first, cache, places=prompt, method=run_tokens)
    found, _ = decoder.apply(params, *last, cache, method=run_tokens)
    np.testing.assert_allclose(found, expected[:, -1:], atol=2e-5)
