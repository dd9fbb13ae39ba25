"""Composition: the one gather, and what is between images and logits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax.connectors.hybrid_mlp import HybridMlp
from vlm_jax.connectors.pool import Pool
from vlm_jax.connectors.visual_vocabulary import VisualVocabulary
from vlm_jax.encoders.hybrid import Hybrid
from vlm_jax.layers.learned_rows import LearnedRows
from vlm_jax.models.vlm import without_masked
from vlm_jax.reducers.random_drop import RandomDrop
from vlm_jax.types import Batch

from ..advice import tried
from ..parameters import drawn
from .conftest import TOKENS, VOCAB, WIDTH, make_model


def test_every_position_holds_what_the_index_says(model, params, batch):
    embedded = jax.jit(lambda p, b: model.apply(p, b, method="embed")[0])(params, batch)
    visual = jax.jit(lambda p, x: model.apply(p, x, method="visual_tokens"))
    table = np.asarray(params["params"]["decoder"]["embedding"]["embedding"])
    expected = np.zeros((2, 7, WIDTH))
    for row in range(2):
        one = batch.images[row]  # the row's own images, by themselves
        tokens = visual(params, one).tokens.reshape(2 * TOKENS, WIDTH)
        for place, index in enumerate(np.asarray(batch.visual_index[row])):
            word = table[batch.tokens[row, place]]
            expected[row, place] = word if index < 0 else tokens[index]
    np.testing.assert_allclose(embedded, expected, atol=1e-5)


def test_the_parts_follow_each_other(model, params, batch):
    parts = params["params"]
    flat = batch.images.reshape(4, 8, 16, 3)
    features = jax.jit(model.encoder.apply)({"params": parts["encoder"]}, flat)
    connect = jax.jit(functools.partial(model.connector.apply, deterministic=True))
    expected = connect({"params": parts["connector"]}, features)
    got = jax.jit(lambda p, x: model.apply(p, x, method="visual_tokens"))(params, flat)
    np.testing.assert_allclose(got.tokens, expected.tokens, atol=1e-5)
    assert set(parts) == {"encoder", "connector", "decoder"}  # and nothing of its own


def test_text_alone_needs_no_encoder(model, params, batch):
    text = dataclasses.replace(batch, images=None, visual_index=jnp.full((2, 7), -1))
    only = {"params": {"decoder": params["params"]["decoder"]}}
    logits = jax.jit(model.apply)(only, text)
    assert logits.shape == (2, 7, VOCAB)
    table = params["params"]["decoder"]["embedding"]["embedding"]
    embedded = jnp.take(table, batch.tokens, axis=0)
    decoder = {"params": params["params"]["decoder"]}
    hidden, _ = jax.jit(model.decoder.apply)(decoder, embedded, batch.positions, batch.segment_ids)
    np.testing.assert_allclose(logits, jnp.einsum("btd,vd->btv", hidden, table), atol=1e-5)


def test_without_a_decoder_a_batch_gives_visual_tokens(model, params, batch):
    half = model.clone(decoder=None)
    found = jax.jit(half.apply)(params, batch)
    expected = jax.jit(lambda p, x: model.apply(p, x, method="visual_tokens"))(
        params, batch.images.reshape(4, 8, 16, 3)
    )
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    with pytest.raises(ValueError, match="no decoder: expected a batch with images"):
        half.apply(params, dataclasses.replace(batch, images=None))
    with pytest.raises(
        ValueError, match=tried("only an encoder and a connector: call it, or visual_tokens, for visual tokens")
    ):
        half.apply(params, batch, 7, method="prefill")


def test_images_reach_the_logits_of_their_own_row(model, params, batch):
    run = jax.jit(model.apply)
    before, after = (
        run(params, batch),
        run(params, dataclasses.replace(batch, images=batch.images.at[1].set(0))),
    )
    np.testing.assert_allclose(before[0], after[0], atol=1e-5)
    # Row 1 begins with text, which cannot see the image after it.
    np.testing.assert_allclose(before[1, :1], after[1, :1], atol=1e-5)
    assert (np.abs(before - after)[1, 1:].max(-1) > 1e-3).all()


def test_branches_reach_the_decoder(model, params, batch):
    run = jax.jit(model.apply)
    branches = jnp.array([[0, 0, 0, 0, 0, 1, 2], [0] * 7])
    branched = run(params, dataclasses.replace(batch, branch_ids=branches))
    np.testing.assert_allclose(branched[:, :6], run(params, batch)[:, :6], atol=1e-5)
    alone = dataclasses.replace(
        batch,
        tokens=batch.tokens.at[0, 5].set(batch.tokens[0, 6]),
        positions=batch.positions.at[0, 5].set(6),
    )
    np.testing.assert_allclose(branched[0, 6], run(params, alone)[0, 5], atol=2e-5)


class Liar(Pool):
    """Gives one token fewer than it says."""

    def num_tokens(self, grid):
        return super().num_tokens(grid) + 1


def test_a_connector_that_gives_another_count_than_it_says_is_caught(batch):
    model = make_model(connector=Liar(WIDTH, (1, TOKENS)))
    with pytest.raises(ValueError, match=r"Liar gave 2 tokens for a \(2, 4\) grid, but its num_tokens gives 3"):
        jax.eval_shape(model.init, jax.random.key(0), batch)


def test_a_reducer_stands_before_the_connector(params, batch):
    model = make_model(reducer=RandomDrop(2))
    flat = batch.images.reshape(4, 8, 16, 3)

    @jax.jit
    def run(params, key):
        fixed = model.apply(params, flat, method="visual_tokens").tokens
        drawn = model.apply(params, flat, deterministic=False, rngs={"reduce": key}, method="visual_tokens").tokens
        return fixed, drawn

    fixed, drawn = run(params, jax.random.key(7))
    parts = params["params"]
    features = jax.jit(model.encoder.apply)({"params": parts["encoder"]}, flat)
    reduced = RandomDrop(2).apply({}, features, deterministic=True)
    connect = jax.jit(functools.partial(model.connector.apply, deterministic=True))
    expected = connect({"params": parts["connector"]}, reduced).tokens
    np.testing.assert_allclose(fixed, expected, atol=1e-5)
    assert np.abs(drawn - fixed).max() > 1e-3


@pytest.mark.parametrize("prompt", [3, 6])
def test_prefill_and_extend_give_the_logits_of_the_whole(model, params, batch, prompt):
    # What follows the prompt is text.
    index = jnp.where(jnp.arange(7)[None] < prompt, batch.visual_index, -1)
    batch = dataclasses.replace(batch, visual_index=index)
    expected = jax.jit(model.apply)(params, batch)
    first = dataclasses.replace(
        batch,
        **{k: getattr(batch, k)[:, :prompt] for k in ("tokens", "positions", "segment_ids", "visual_index")},
    )
    logits, cache = jax.jit(lambda p, b: model.apply(p, b, 7, method="prefill"))(params, first)
    np.testing.assert_allclose(logits, expected[:, prompt - 1], atol=2e-5)
    extend = jax.jit(lambda p, *args: model.apply(p, *args, method="extend"))
    logits, _ = extend(params, batch.tokens[:, prompt:], batch.positions[:, prompt:], cache)
    np.testing.assert_allclose(logits, expected[:, -1], atol=2e-5)


def test_embeddings_keep_the_decoders_dtype(batch):
    model = make_model(decoder=make_model().decoder.clone(dtype=jnp.bfloat16))
    params = jax.eval_shape(model.init, jax.random.key(0), batch)
    embedded = jax.eval_shape(lambda p: model.apply(nn.meta.unbox(p), batch, method="embed")[0], params)
    assert embedded.dtype == jnp.bfloat16


@pytest.mark.parametrize("images", ["square", "none of a row"])
def test_learned_rows_come_first(params, batch, images):
    model = make_model(learned_rows=LearnedRows(("newline", "separator"), WIDTH))
    rows = np.random.default_rng(1).normal(size=(2, WIDTH)).astype(np.float32)
    whole = {"params": {**params["params"], "learned_rows": {"newline": rows[0], "separator": rows[1]}}}
    index = np.where(batch.visual_index < 0, -1, batch.visual_index + 2)
    index[0, 2], index[1, 0] = 1, 0
    if images != "square":
        index[1] = [0, 1, -1, -1, -1, -1, -1]
    shifted = dataclasses.replace(batch, visual_index=jnp.asarray(index))
    embed = jax.jit(lambda model, params, batch: model.apply(params, batch, method="embed")[0], static_argnums=0)
    found = np.asarray(embed(model, whole, shifted))
    expected = np.array(
        embed(make_model(), params, dataclasses.replace(batch, visual_index=jnp.asarray(index - 2).clip(-1)))
    )
    expected[index == 0], expected[index == 1] = rows
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_connector_may_hold_the_learned_rows(params, batch):
    connector = VisualVocabulary(WIDTH, vocab_size=7, factor=2, num_indicators=3)
    model = make_model(connector=connector, learned_rows="connector")
    drawn_params = nn.meta.unbox(drawn(jax.eval_shape(model.init, jax.random.key(0), batch)))
    index = jnp.where(batch.visual_index < 0, -1, batch.visual_index)
    embed = jax.jit(lambda params, batch: model.apply(params, batch, method="embed")[0])
    found = np.asarray(embed(drawn_params, dataclasses.replace(batch, visual_index=index)))
    table = np.asarray(drawn_params["params"]["connector"]["table"]["embedding"])
    for row in range(3):
        assert (index == row).any()
        np.testing.assert_array_equal(found[index == row], np.tile(table[4 + row], (int((index == row).sum()), 1)))


def test_masked_tokens_take_no_position_but_on_three_axes(batch):
    row = jnp.array([[0, 1, 1, 1, 1, 2, 2]])
    seen = jnp.array([[0, 1, 0, 0, 1, 2, 2]])  # two visual tokens are masked
    positions = jnp.array([[0, 0, 1, 2, 3, 0, 1]])
    one = Batch(row, positions, row, jnp.full_like(row, -1))
    np.testing.assert_array_equal(without_masked(one, seen)[0, [1, 4, 5, 6]], [0, 1, 0, 1])
    three = dataclasses.replace(one, positions=jnp.stack([positions, positions + 1, positions], axis=-1))
    np.testing.assert_array_equal(without_masked(three, seen), three.positions)


def test_a_reducer_refuses_the_features_of_two_encoders(model, batch):
    pair = Hybrid(model.encoder, model.encoder, low_size=8, combine="tuple")
    reduced = model.clone(encoder=pair, connector=HybridMlp(WIDTH), reducer=RandomDrop(num_kept=1))
    with pytest.raises(ValueError, match="random acts on the features of one encoder, and Hybrid returns those of two"):
        jax.eval_shape(reduced.init, jax.random.key(0), batch)
