"""FastV, PyramidDrop, DART and SparseVLM in a decoder, against NumPy blocks over rows that really get shorter."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax.config import ConfigError
from vlm_jax.costs.flops import count_flops
from vlm_jax.decoders import dropping
from vlm_jax.decoders.deepseek import Deepseek
from vlm_jax.decoders.transformer import Transformer
from vlm_jax.layers.rope import Rope
from vlm_jax.processors.reduction import visual_places
from vlm_jax.reducers.dart import DART
from vlm_jax.reducers.fastv import FastV
from vlm_jax.reducers.pyramid_drop import PyramidDrop
from vlm_jax.reducers.sparsevlm import SparseVLM
from vlm_jax.types import Batch, Drop, VisualPlaces

from ..parameters import drawn
from . import blocks, definitions

VOCAB, WIDTH, DEPTH, HEADS, KV, THETA, EPSILON = 12, 16, 3, 2, 1, 100.0, 1e-6
TOKENS = 6  # of an image
FASTV = FastV(3, TOKENS, DEPTH, layer=1).drops()
PYRAMID = PyramidDrop(2, TOKENS, DEPTH).drops()
UNLIKE = DART(3, TOKENS, DEPTH, layer=1, image_pivots=1, text_pivots=2).drops()
RATED = SparseVLM(3, TOKENS, DEPTH, layers=(0,)).drops()
PLUS = SparseVLM(2, TOKENS, DEPTH, layers=(0, 1), version="2.0", num_heads=1).drops()
AT_ONCE = PyramidDrop(2, TOKENS, DEPTH, layers=(0, 2)).drops()
every_drops = pytest.mark.parametrize("drops", [FASTV, PYRAMID], ids=["fastv", "pyramid_drop"])
every_rule = pytest.mark.parametrize(
    "drops", [FASTV, PYRAMID, UNLIKE, RATED, PLUS], ids=["fastv", "pyramid_drop", "dart", "sparsevlm", "sparsevlm-plus"]
)


def decoder(drops=(), **fields):
    return Transformer(VOCAB, WIDTH, DEPTH, HEADS, KV, 24, rope=Rope(THETA), drops=drops, **fields)


def run_tokens(module, tokens, *rest, **kwargs):
    hidden, cache = module(module.embed(tokens), *rest, token_ids=tokens, **kwargs)
    return module.logits(hidden), cache


@functools.cache
def params():
    tokens = jnp.zeros((1, 4), jnp.int32)
    boxed = jax.eval_shape(
        functools.partial(decoder().init, method=run_tokens), jax.random.key(0), tokens, tokens, tokens
    )
    return jax.tree.map(lambda p: 1.5 * p, nn.meta.unbox(drawn(boxed)))  # so that attention has favourites


# Two images of six tokens, text before, between and after; -1 is text. The second row begins with padding.
LAYOUT = np.array(
    [
        [-1, *range(6), -1, -1, *range(6, 12), -1, -1, -1, -1],
        [-1, -1, -1, -1, -1, *range(6), *range(6, 12), -1, -1],
    ]
)
LENGTH = LAYOUT.shape[1]


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(5)
    segments = np.ones_like(LAYOUT)
    segments[1, :3] = 0
    positions = np.maximum(np.cumsum(segments, 1) - 1, 0)
    return Batch(
        tokens=jnp.asarray(rng.integers(0, VOCAB, size=LAYOUT.shape), jnp.int32),
        positions=jnp.asarray(positions, jnp.int32),
        segment_ids=jnp.asarray(segments, jnp.int32),
        visual_index=jnp.asarray(LAYOUT, jnp.int32),
        images=jnp.zeros((2, 2, 1, 1, 1)),
    )


@functools.cache
def jitted(drops, **fields):
    module = decoder(drops, **fields)

    @jax.jit
    def run(own, places, *args):
        return module.apply(own, *args, method=run_tokens, places=places)[0]

    # What is learned is in the places alone, so rows with it and without share a program.
    return lambda own, batch: run(own, places_of(batch), batch.tokens, batch.positions, batch.segment_ids)


def places_of(batch, tokens=TOKENS):
    """Of rows with two images each."""
    return jax.tree.map(jnp.asarray, visual_places(batch, [[tokens] * 2] * len(batch.tokens), 2, tokens))


def causal(length, window):
    """0 where a token sees another: itself and those before it, `window` in all."""
    distance = np.subtract.outer(np.arange(length), np.arange(length))
    return np.where((distance >= 0) & (distance < (window or length)), 0, -np.inf)


def by_hand(batch, row, drops, ranking, windows=(None,) * DEPTH):
    """Final states of the positions that are left, with those positions, of one row."""
    own = jax.tree.map(np.float64, params()["params"])
    left = np.flatnonzero(np.asarray(batch.segment_ids[row]))
    x = own["embedding"]["embedding"][np.asarray(batch.tokens[row])][left]
    positions = np.asarray(batch.positions[row])
    counts = dict.fromkeys((0, 1), TOKENS)
    before, given = x, own["embedding"]["embedding"][np.asarray(batch.tokens[row])]
    images = {
        image: [p for p in left if batch.visual_index[row, p] // TOKENS == image and LAYOUT[row, p] >= 0]
        for image in counts
    }
    for layer in range(DEPTH + 1):
        for drop in (drop for drop in drops if drop.layer == layer):
            ranked_by = jax.tree.map(lambda leaf, i=drop.ranked_by: leaf[i], own["blocks"]["layers"])
            source = x if drop.ranked_by == layer else before
            q, k, _ = blocks.heads(source, ranked_by, HEADS, KV, EPSILON, positions[left], THETA)
            weights = blocks.weights(q, k, causal(len(left), windows[drop.ranked_by]))
            attended = weights.mean(0)
            received = dict(zip(left, attended[[list(left).index(r) for r in ranking]].mean(0), strict=True))
            norms = dict(zip(left, np.abs(k).sum((1, 2)), strict=True))
            states = dict(zip(left, blocks.norm(x, own["final_norm"], EPSILON), strict=True))
            keep = set(left)
            for image in counts:
                tokens = [p for p in left if batch.visual_index[row, p] // TOKENS == image and LAYOUT[row, p] >= 0]
                assert len(tokens) == counts[image]
                counts[image] = drop.num_kept
                last = max(images[image])
                end = min(place for place in ranking if place > last)
                text = [p for p in left if last < p <= end and LAYOUT[row, p] < 0]
                if drop.pivots is not None:
                    chosen = definitions.dart(states, norms, tokens, text, drop.num_kept, drop.pivots)
                elif drop.rating is not None:
                    rates = np.isin(left, definitions.raters(given, images[image], text))
                    of_heads = weights[:, rates].mean(1)
                    if drop.rating.without_rotary:
                        apart = np.subtract.outer(positions[left], positions[left])[..., None]
                        half = q.shape[-1] // 2
                        ones = 2 * np.cos(apart / THETA ** (np.arange(half) / half)).sum(-1) / (2 * half) ** 0.5
                        of_heads = (weights / ones)[:, rates].mean(1)
                        best = np.argsort(-of_heads[:, np.isin(left, tokens)].sum(1))[: drop.rating.num_heads]
                        of_heads = of_heads[best]
                    scores = dict(zip(left, of_heads.mean(0), strict=True))
                    chosen = definitions.highest(scores, tokens, drop.num_kept)
                    if drop.rating.recycles:
                        order = sorted(tokens, key=lambda p: -scores[p])
                        merged, chosen = definitions.recycled(dict(zip(left, x, strict=True)), order, drop.num_kept)
                        for place, state in merged.items():
                            x[left == place] = state
                else:
                    chosen = definitions.highest(received, tokens, drop.num_kept)
                keep -= set(tokens) - set(chosen)
            chosen = [i for i, p in enumerate(left) if p in keep]
            left, x = left[chosen], x[chosen]
        if layer < DEPTH:
            before = x
            p = jax.tree.map(lambda leaf, i=layer: leaf[i], own["blocks"]["layers"])
            q, k, v = blocks.heads(x, p, HEADS, KV, EPSILON, positions[left], THETA)
            x = blocks.feed_forward(blocks.attend(x, p, q, k, v, causal(len(left), windows[layer])), p, EPSILON)
    return blocks.norm(x, own["final_norm"], EPSILON) @ own["embedding"]["embedding"].T, left


@every_rule
def test_a_prompt_keeps_what_its_last_token_looks_at(batch, drops):
    logits = jitted(drops)(params(), batch)
    assert logits.shape == (2, LENGTH, VOCAB)
    for row in range(2):
        expected, left = by_hand(batch, row, drops, [LENGTH - 1])
        assert len(left) == (batch.segment_ids[row] > 0).sum() - 2 * (TOKENS - drops[-1].num_kept)
        np.testing.assert_allclose(logits[row, left], expected, atol=2e-4)
        dropped = sorted(set(np.flatnonzero(batch.segment_ids[row])) - set(left))
        np.testing.assert_array_equal(logits[row, np.array(dropped)], 0)


@every_drops
def test_layers_with_windows_rank_and_read_what_lies_in_them(batch, drops):
    windows = (14, 5, None)
    logits = jitted(drops, windows=windows)(params(), batch)
    for row in range(2):
        expected, left = by_hand(batch, row, drops, [LENGTH - 1], windows)
        np.testing.assert_allclose(logits[row, left], expected, atol=2e-4)
    assert (
        by_hand(batch, 0, drops, [LENGTH - 1])[1].tolist()
        != by_hand(batch, 0, drops, [LENGTH - 1], windows)[1].tolist()
    )


@every_rule
def test_a_learned_row_keeps_what_the_ends_of_its_instructions_look_at(batch, drops):
    weights = np.zeros((2, LENGTH), np.float32)
    weights[0, [7, 15, 16]], weights[1, [17]] = 1, 1  # the positions before the learned ones
    learned = dataclasses.replace(batch, loss_weights=jnp.asarray(weights), targets=batch.tokens)
    logits = jitted(drops)(params(), learned)
    for row, ranking in enumerate(([7, 15], [17])):
        expected, left = by_hand(batch, row, drops, ranking)
        np.testing.assert_allclose(logits[row, left], expected, atol=2e-4)


def test_a_visual_token_before_an_answer_stays(batch):
    """Row 1 has an image at positions 5 to 10, of which three tokens stay: those that say an answer."""
    for before in ([5, 7, 9], [6, 8, 10]):
        weights = np.zeros((2, LENGTH), np.float32)
        weights[1, before] = 1
        learned = dataclasses.replace(batch, loss_weights=jnp.asarray(weights), targets=batch.tokens)
        logits = jitted(FASTV)(params(), learned)
        assert [place for place in range(5, 11) if np.abs(logits[1, place]).max() > 0] == before


@every_rule
def test_padding_changes_nothing(batch, drops):
    hidden = batch.segment_ids == 0
    other = dataclasses.replace(
        batch, tokens=jnp.where(hidden, 3, batch.tokens), positions=jnp.where(hidden, 7, batch.positions)
    )
    got, want = jitted(drops)(params(), other), jitted(drops)(params(), batch)
    np.testing.assert_allclose(np.where(hidden[..., None], 0, got), np.where(hidden[..., None], 0, want), atol=1e-5)


def test_masked_tokens_go_before_real_ones(batch):
    """Of the first image's tokens three are padding: with three kept, those are the real ones."""
    masked = np.array(batch.segment_ids)
    masked[0, [1, 3, 6]] = 0
    logits = jitted(FASTV)(params(), dataclasses.replace(batch, segment_ids=jnp.asarray(masked)))
    assert (np.abs(logits[0, [2, 4, 5]]).max(-1) > 0).all()
    np.testing.assert_array_equal(logits[0, [1, 3, 6]], 0)


@pytest.mark.parametrize(
    "drops", [FASTV, PYRAMID, AT_ONCE, UNLIKE], ids=["fastv", "pyramid_drop", "before_any_layer", "dart"]
)
def test_the_cache_gives_the_logits_of_the_whole(batch, drops):
    """Prompts of all but two positions, then those one by one, against one row in which they rank nothing."""
    end = LENGTH - 2
    first = jax.tree.map(lambda leaf: leaf[:, :end], dataclasses.replace(batch, images=None))
    first = dataclasses.replace(first, images=batch.images)
    module = decoder(drops)

    @jax.jit
    def prefill(own, batch, places):
        cache = module.init_cache(2, LENGTH + 1, places=places)
        args = (batch.tokens, batch.positions, batch.segment_ids, cache)
        return module.apply(own, *args, method=run_tokens, places=places)

    logits, cache = prefill(params(), first, places_of(first))
    slots = [part.segment_ids.shape[-1] for part in cache.parts]
    assert slots == [LENGTH + 1 - 2 * (TOKENS - kept) for kept in (TOKENS, *(drop.num_kept for drop in drops))]
    keys = [(stack.key, part) for part in cache.parts for stack in part.layers]
    assert all(key.shape[-1] == part.segment_ids.shape[-1] for key, part in keys)
    assert sum(key.shape[0] for key, _ in keys) == DEPTH
    weights = np.zeros((2, LENGTH), np.float32)
    weights[:, end - 1 :] = 1  # as if what follows were the answer
    learned = dataclasses.replace(batch, loss_weights=jnp.asarray(weights), targets=batch.tokens)
    expected = jitted(drops)(params(), learned)
    np.testing.assert_allclose(logits[:, -1], expected[:, end - 1], atol=2e-4)
    step = jax.jit(functools.partial(module.apply, method=run_tokens))
    for place in (end, end + 1):
        piece = (x[:, place : place + 1] for x in (batch.tokens, batch.positions, batch.segment_ids))
        logits, cache = step(params(), *piece, cache)
        np.testing.assert_allclose(logits[:, 0], expected[:, place], atol=2e-4)


@every_drops
def test_fewer_operations_are_done(batch, drops):
    """Exactly those of shorter rows, and of the weights that rank."""

    def cost(drops):
        places = {"places": places_of(batch)} if drops else {}
        args = (batch.tokens, batch.positions, batch.segment_ids)
        return count_flops(lambda own: decoder(drops).apply(own, *args, method=run_tokens, **places)[0], params())

    head_dim = WIDTH // HEADS
    products = 2 * WIDTH * head_dim * (2 * HEADS + 2 * KV) + 3 * 2 * WIDTH * 24
    expected = 2 * LENGTH * 2 * WIDTH * VOCAB
    lengths = [LENGTH] * DEPTH
    for drop in drops:
        lengths[drop.layer :] = [LENGTH - 2 * (TOKENS - drop.num_kept)] * (DEPTH - drop.layer)
    for length in lengths:
        expected += 2 * (length * products + 2 * 2 * length * length * WIDTH)
    for drop in drops:
        length = lengths[drop.layer - 1]
        expected += 2 * (2 * length * length * WIDTH)  # logits of the one layer that is written out
        expected += 2 * 2 * length * length  # their mean over those that rank
        if drop.ranked_by == drop.layer:
            expected += 2 * length * 2 * WIDTH * head_dim * (HEADS + KV)
    assert cost(drops) == expected
    assert cost(drops) < cost(())


def test_levels_are_dropped_with_their_tokens(batch):
    rng = np.random.default_rng(7)
    x, levels = (rng.normal(size=(*LAYOUT.shape, width)).astype(np.float32) for width in (WIDTH, 2 * WIDTH))
    every = jnp.broadcast_to(jnp.arange(LENGTH)[None], LAYOUT.shape)
    angles = jnp.zeros((*LAYOUT.shape, 1))
    rows = dropping.Rows(
        jnp.asarray(x), batch.positions, None, angles, None, batch.segment_ids, None, every, jnp.asarray(levels)
    )
    saliency = jnp.asarray(rng.uniform(size=LAYOUT.shape).astype(np.float32))
    left, _ = dropping.drop(rows, places_of(batch), saliency, jnp.full((2, 2), 2), 2, LENGTH - 8)
    for row in range(2):
        places = [np.flatnonzero((x[row] == own).all(-1))[0] for own in np.asarray(left.x[row])]
        assert len(set(places)) == LENGTH - 8
        np.testing.assert_array_equal(left.levels[row], levels[row][places])


def test_levels_follow_tokens_that_move(batch):
    """As released, merged tokens come after the kept ones. Blocks that add nothing leave embeddings and levels."""
    drops = SparseVLM(1, TOKENS, DEPTH, layers=(0,), rule="as_released", counts=(4,)).drops()
    rng = np.random.default_rng(7)
    x, levels = (rng.normal(size=(*LAYOUT.shape, width)).astype(np.float32) for width in (WIDTH, DEPTH * WIDTH))
    added = ("out", "down")
    still = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 0 * leaf if any(one.key in added for one in path) else leaf, params()
    )

    @jax.jit
    def run(x, levels, places):
        args = (x, batch.positions, batch.segment_ids, None, None, places, levels)
        return decoder(drops).apply(still, *args, method="run_layers")[0]

    rows = run(jnp.asarray(x), jnp.asarray(levels), places_of(batch))
    moved = 0
    for row, index in enumerate(np.asarray(rows.index)):
        real = np.asarray(rows.segment_ids[row]) > 0
        assert (
            real.sum() == np.sum(batch.segment_ids[row]) - 2
        )  # of each image 4 stay, and one that is merged with no other
        expected = x[row] + levels[row].reshape(LENGTH, DEPTH, WIDTH).sum(axis=1)
        np.testing.assert_allclose(rows.x[row][real], expected[index[real]], atol=1e-4)
        moved += (np.diff(index[real]) < 0).sum()
    assert moved


@every_drops
def test_the_lowered_program_does_fewer_operations(batch, drops):
    long = dataclasses.replace(
        batch,
        **{key: jnp.tile(getattr(batch, key), (1, 8)) for key in ("tokens", "positions", "segment_ids")},
        visual_index=jnp.asarray(np.concatenate([np.arange(8 * LENGTH - 8), [-1] * 8])[None].repeat(2, 0)),
    )
    tokens = (8 * LENGTH - 8) // 2

    def cost(drops):
        def run(own):
            args = (long.tokens, long.positions, long.segment_ids)
            module = decoder(drops, unroll=DEPTH)  # the compiler counts a loop's body once
            return module.apply(own, *args, method=run_tokens, places=places_of(long, tokens))[0]

        return jax.jit(run).lower(params()).cost_analysis()["flops"]

    assert cost(tuple(drop._replace(num_kept=2) for drop in drops)) < 0.8 * cost(())


@every_drops
def test_gradients_are_finite_and_reach_every_parameter(batch, drops):
    def loss(own):
        return jnp.sum(jnp.sin(jitted(drops, remat="full")(own, batch) + jnp.arange(VOCAB)[None, None]))

    for path, grad in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params())):
        assert np.isfinite(grad).all() and np.abs(grad).max() > 1e-6, jax.tree_util.keystr(path)


@every_drops
def test_bfloat16_is_finite_and_near(batch, drops):
    exact, low = jitted(drops)(params(), batch), jitted(drops, dtype=jnp.bfloat16)(params(), batch)
    assert np.isfinite(low).all()
    np.testing.assert_allclose(low[:, -1], exact[:, -1], atol=0.4)  # some other token may have been kept


def test_schedules_are_those_of_the_papers():
    assert FastV(288, 576, 32).drops() == (Drop(2, 288, 1),)
    plus = SparseVLM(64, 576, 32, version="2.0").drops()
    assert [(drop.layer, drop.ranked_by, drop.num_left(576)) for drop in plus] == [
        (3, 2, 277),
        (7, 6, 133),
        (16, 15, 64),
    ]
    # Of 576 tokens 300 stay, and int(0.3 * 276) + 1 = 83 become 9; of 309, 200 and 33 as 4; of 204, 110 and 29 as 3.
    named = SparseVLM(64, 576, 32, rule="as_released").drops()
    assert [drop.num_left(576) for drop in named] == [309, 204, 113]
    assert DART(64, 576, 32).drops() == (Drop(2, 64, 1, pivots=(4, 4)),)
    (released,) = DART(1, 576, 32, rule="as_released", ratio=0.778).drops()
    assert released.num_left(576) == 4 + 8 * 15  # 576 * 0.222 / 8 is 15.98
    halves = PyramidDrop(72, 576, 32).drops()
    assert halves == (Drop(8, 288, 8), Drop(16, 144, 16), Drop(24, 72, 24))
    assert PyramidDrop(4, 16, 3).drops() == (Drop(1, 8, 1), Drop(2, 4, 2))
    assert PyramidDrop(4, 99, 8, num_shown=16, layers=(6, 2)).drops() == (Drop(2, 8, 2), Drop(6, 4, 6))


@pytest.mark.parametrize(
    ("reducer", "message"),
    [
        (FastV(4, 16, 2), r"config\.reducer: fastv drops tokens before layers \[2\]; with 2 decoder layers, .* 1 to 1"),
        (FastV(4, 16, 3, layer=0), r"before layers \[0\]"),
        (PyramidDrop(4, 16, 3, layers=()), r"before layers \[\]"),
        (PyramidDrop(4, 16, 3, layers=(2, 2)), r"before layers \[2, 2\]; .* distinct layers"),
        (FastV(4, 16, 3, num_shown=3), r"config\.reducer\.num_shown: expected at least the 4 tokens to keep .* got 3"),
    ],
)
def test_drops_that_cannot_be_made_are_refused(reducer, message):
    with pytest.raises(ConfigError, match=message):
        reducer.required_fields()


def places_by_hand(lengths):
    """Of `LAYOUT`, the second row's first image has four tokens only; rows are as long as what is left wants."""
    index = np.array([[range(1, 7), range(9, 15)], [[5, 6, 7, 8, LENGTH, LENGTH], range(11, 17)]])
    ranking = np.arange(LENGTH)[None].repeat(2, 0) == LENGTH - 1
    return VisualPlaces(jnp.asarray(index), jnp.asarray(ranking), lengths)


@pytest.mark.parametrize(
    ("latent", "drops"),
    [(None, PYRAMID), (6, (Drop(1, 2, 1, renumbers=True),))],
    ids=["plain", "latent-renumbered"],
)
def test_rows_without_padding_lose_no_real_token_and_the_cache_gives_what_the_whole_gives(latent, drops):
    """Layers of both kinds; images of several sizes; positions that stay and that are numbered again."""
    module = Deepseek(
        VOCAB, WIDTH, 1 + len(drops), HEADS, 24, latent, 8, 4, 2, content_dim=6 if latent else 128,
        rope_dim=4 if latent else 64, value_dim=5 if latent else 128, rope=Rope(THETA), drops=drops,
    )  # fmt: skip
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(2, LENGTH + 2, WIDTH)), jnp.float32)
    segments, positions = jnp.ones(x.shape[:2], jnp.int32), jnp.tile(jnp.arange(LENGTH + 2)[None], (2, 1))
    own = nn.meta.unbox(drawn(jax.eval_shape(module.init, jax.random.key(0), x, positions, segments)))
    lost = np.array([[sum(max(n - d.num_kept, 0) for n in row) for d in drops] for row in ((6, 6), (4, 6))])
    places = places_by_hand(tuple(int(LENGTH - n) for n in lost.min(0)))

    @jax.jit
    def prefill(own, places, *args):
        return module.apply(own, *args, module.init_cache(2, LENGTH + 2, places=places), places=places)

    piece = jax.jit(module.apply)
    hidden, cache = prefill(own, places, x[:, :LENGTH], positions[:, :LENGTH], segments[:, :LENGTH])
    stepped = [hidden]
    for place in range(LENGTH, LENGTH + 2):
        hidden, cache = piece(own, *(leaf[:, place : place + 1] for leaf in (x, positions, segments)), cache)
        stepped.append(hidden)
    longer = dataclasses.replace(
        places,
        index=jnp.where(places.index == LENGTH, LENGTH + 2, places.index),
        ranking=jnp.pad(places.ranking, ((0, 0), (0, 2))),
        lengths=tuple(length + 2 for length in places.lengths),
    )
    whole = jax.jit(lambda *args: module.apply(*args, places=longer)[0])(own, x, positions, segments)
    np.testing.assert_allclose(np.concatenate(stepped, axis=1), whole, atol=2e-4)
    left = (np.abs(whole).max(-1) > 0).sum(1)
    np.testing.assert_array_equal(left, LENGTH + 2 - lost[:, -1])
    text = np.asarray(LAYOUT) < 0
    assert (np.abs(whole[:, :LENGTH]).max(-1) > 0)[text].all()
