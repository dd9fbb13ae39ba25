"""What reducers ask of an encoder, against NumPy blocks: attention that is received, and merged tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax.costs.flops import count_flops
from vlm_jax.encoders.naflex import NaflexViT
from vlm_jax.encoders.vit import ViT
from vlm_jax.layers.token_merging import Merged, merge, merge_schedule
from vlm_jax.types import PackedPatches

from ..advice import tried
from ..parameters import drawn
from . import blocks, definitions

HEADS, DEPTH, PATCHES, EPSILON = 2, 3, 20, 1e-6
PREFIX = {0: {}, 1: {"class_token": True}, 4: {"class_token": True, "num_registers": 3}}
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 20, 3)), jnp.float32)


def vit(**fields):
    return ViT(
        image_size=(16, 20),
        patch_size=4,
        width=8,
        depth=DEPTH,
        num_heads=HEADS,
        mlp_dim=12,
        final_norm="none",
        **fields,
    )


@functools.cache
def params(**fields):
    return nn.meta.unbox(drawn(jax.eval_shape(vit(**fields).init, jax.random.key(0), IMAGES)))


@functools.cache
def hidden(prefix):
    """The blocks' parameters, and what enters the first: [B, T, D]."""
    module = vit(**PREFIX[prefix])
    own = params(**PREFIX[prefix])
    states = jax.jit(functools.partial(module.apply, collect=True))(own, IMAGES).hidden
    layers = [
        jax.tree.map(lambda leaf, i=i: np.float64(leaf[i]), own["params"]["blocks"]["layers"]) for i in range(DEPTH)
    ]
    return layers, np.float64(states)


@pytest.mark.parametrize(("prefix", "kind"), [(0, "heads"), (0, "joined"), (1, "heads"), (1, "joined"), (4, "heads")])
def test_saliency_is_the_attention_that_is_received_in_the_last_block(prefix, kind):
    module, own = vit(**PREFIX[prefix], saliency=kind), params(**PREFIX[prefix])
    out = jax.jit(module.apply)(own, IMAGES)
    plain = jax.jit(vit(**PREFIX[prefix]).apply)(own, IMAGES)
    np.testing.assert_allclose(out.tokens, plain.tokens, atol=1e-5)  # the features are what they were
    layers, states = hidden(prefix)
    for image in range(2):
        q, k, _ = blocks.heads(states[-2][image], layers[-1], HEADS, HEADS, EPSILON)
        np.testing.assert_allclose(out.keys[image], k[prefix:], atol=1e-5)
        if kind == "joined":
            q, k = (x.reshape(len(x), 1, -1) for x in (q, k))
        attended = blocks.weights(q, k, 0).mean(0)
        expected = attended[0] if prefix else attended.mean(0)
        np.testing.assert_allclose(out.saliency[image], expected[prefix:], atol=1e-6)


def test_attention_is_that_of_the_last_block_that_is_built():
    module, own = vit(class_token=True, saliency="heads", select_layer=-2), params(class_token=True)
    cut = jax.tree.map(lambda leaf: leaf[: DEPTH - 1], own["params"]["blocks"])
    out = jax.jit(module.apply)({"params": {**own["params"], "blocks": cut}}, IMAGES)
    layers, states = hidden(1)
    q, k, _ = blocks.heads(states[-3][0], layers[-2], HEADS, HEADS, EPSILON)
    np.testing.assert_allclose(out.saliency[0], blocks.weights(q, k, 0).mean(0)[0, 1:], atol=1e-6)
    np.testing.assert_allclose(out.tokens[0], states[-2][0, 1:], atol=1e-5)


def merged_by_hand(image, counts, prefix):
    """The tokens left, in order of their places, through NumPy blocks."""
    layers, states = hidden(prefix)
    x = states[0][image]
    size, place = np.ones(len(x)), np.arange(len(x))
    for p, count in zip(layers, counts, strict=True):
        q, k, v = blocks.heads(x, p, HEADS, HEADS, EPSILON)
        x = blocks.attend(x, p, q, k, v, np.log(size))
        if count:
            x, size, place = definitions.tome_merge(x, size, place, k.mean(1), count, prefix)
        x = blocks.feed_forward(x, p, EPSILON)
    assert size.sum() == PATCHES + prefix
    return x[np.argsort(place)][prefix:]


@pytest.mark.parametrize("prefix", PREFIX)
@pytest.mark.parametrize("counts", [(4, 4, 4), (10, 0, 2)], ids=str)
def test_merging_is_what_the_paper_says(prefix, counts):
    out = jax.jit(vit(**PREFIX[prefix], merged=counts).apply)(params(**PREFIX[prefix]), IMAGES)
    assert out.grid == (1, PATCHES - sum(counts)) and out.mask.all()
    for image in range(2):
        np.testing.assert_allclose(out.tokens[image], merged_by_hand(image, counts, prefix), atol=2e-5)


def test_merging_costs_what_shorter_sequences_cost():
    own, counts = params(class_token=False), (4, 4, 4)
    embedding = 2 * 2 * PATCHES * 4 * 4 * 3 * 8
    expected, length = embedding, PATCHES
    for count in counts:
        attention = 2 * 4 * length * 8 * 8 + 2 * 2 * length * length * 8
        matching = 2 * -(-length // 2) * (length // 2) * 4
        length -= count
        expected += 2 * (attention + matching + 2 * 2 * length * 8 * 12)
    assert count_flops(vit(merged=counts).apply, own, IMAGES) == expected
    assert expected < count_flops(vit().apply, own, IMAGES)


@pytest.mark.parametrize("fields", [{"merged": (4, 4, 4)}, {"saliency": "heads"}], ids=str)
@pytest.mark.parametrize("remat", ["none", "full"])
def test_gradients_are_finite_and_reach_every_parameter(fields, remat):
    module = vit(class_token=True, remat=remat, **fields)

    def loss(own):
        return jnp.sum(jnp.sin(module.apply(own, IMAGES).tokens + jnp.arange(8)[None, None]))

    grads = jax.jit(jax.grad(loss))(params(class_token=True))
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        where = jax.tree_util.keystr(path)
        assert np.isfinite(grad).all(), where
        assert np.abs(grad).max() > 1e-6 or where.endswith("['key']['bias']"), where


@pytest.mark.parametrize("fields", [{"merged": (4, 4, 4)}, {"saliency": "heads"}], ids=str)
def test_bfloat16_is_near_to_float32(fields):
    exact, low = (
        jax.jit(vit(class_token=True, dtype=dtype, **fields).apply)(params(class_token=True), IMAGES)
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert low.tokens.dtype == jnp.bfloat16
    if "saliency" in fields:
        np.testing.assert_allclose(low.saliency, exact.saliency, atol=0.01)
    else:  # a pair that is nearly as near as another may be merged instead
        near = np.abs(np.float32(low.tokens) - exact.tokens).max(-1) < 0.1
        assert near.mean() > 0.5 and np.isfinite(np.float32(low.tokens)).all()


@pytest.mark.parametrize(
    ("fields", "asked"),
    [
        ({"keep_class_token": True, "class_token": True}, {"merged": (4, 4, 4)}),
        ({"select_layer": 0}, {"merged": (4, 4, 4)}),
        ({"select_layer": 0}, {"saliency": "heads"}),
    ],
    ids=str,
)
def test_an_encoder_that_cannot_say_so_refuses(fields, asked):
    with pytest.raises(
        ValueError,
        match=tried("with `saliency` or `merged`, leave out `collect` and levels, with `merged` also keep_class"),
    ):
        jax.eval_shape(vit(**fields, **asked).init, jax.random.key(0), IMAGES)
    allowed = {"select_layer": -1} if "select_layer" in fields else {"class_token": True}
    assert jax.eval_shape(vit(**allowed, **asked).init, jax.random.key(0), IMAGES)


NAFLEX = {"patch_size": 2, "table_grid": (4, 4), "width": 8, "depth": 2, "num_heads": 2, "mlp_dim": 12}


def packed(real, length, seed=3):
    """One image of `real` patches in a row of `length`, noise after it."""
    rng = np.random.default_rng(seed)
    patches = rng.normal(size=(1, length, 12)).astype(np.float32)
    patches[:, real:] = np.random.default_rng(length).normal(size=(1, length - real, 12))
    positions = np.stack(np.divmod(np.arange(length), 4), -1)[None] * (np.arange(length) < real)[None, :, None]
    sizes = np.where((np.arange(length) < real)[None, :, None], (-(-real // 4), 4), 0)
    segments = (np.arange(length) < real).astype(np.int32)[None]
    return PackedPatches(patches, positions.astype(np.int32), sizes.astype(np.int32), segments)


@functools.cache
def naflex():
    return nn.meta.unbox(drawn(jax.eval_shape(NaflexViT(**NAFLEX).init, jax.random.key(0), packed(8, 8))))


def test_padding_is_merged_first_and_changes_nothing():
    """12 patches, of which 3 and then 2 are merged; 4 of padding after, of which 2 and then 1 are."""
    alone = jax.jit(NaflexViT(**NAFLEX, merged=(3, 2)).apply)(naflex(), packed(12, 12))
    # Every other one of the padding is in the first set and goes: 2 of 4, and then 1 of 2.
    padded = jax.jit(NaflexViT(**NAFLEX, merged=(5, 3)).apply)(naflex(), packed(12, 16))
    np.testing.assert_array_equal(padded.mask[0], [True] * 7 + [False])
    np.testing.assert_allclose(padded.tokens[0, :7], alone.tokens[0], atol=1e-5)


def test_padding_receives_and_gives_no_attention():
    run = jax.jit(NaflexViT(**NAFLEX, saliency="heads").apply)
    alone, padded = run(naflex(), packed(12, 12)), run(naflex(), packed(12, 16))
    np.testing.assert_allclose(padded.saliency[0, :12], alone.saliency[0], atol=1e-6)
    np.testing.assert_array_equal(padded.saliency[0, 12:], 0)
    np.testing.assert_allclose(alone.saliency.sum(), 1, atol=1e-5)


def test_segments_are_not_merged_with_each_other():
    """Two images in one row: what is nearest to the first token is of the other image."""
    key = jnp.asarray([[1, 0], [0, 1], [0, 1], [1, 0]], jnp.float32)[None, :, None]
    x = jnp.arange(4, dtype=jnp.float32)[None, :, None]
    tokens = Merged(x, jnp.ones((1, 4)), jnp.arange(4)[None], jnp.array([[1, 1, 2, 2]]))
    out = merge(tokens, key + 0.1, 1, num_prefix=0)
    assert out.segments.tolist() in ([[1, 1, 2]], [[2, 1, 2]])
    np.testing.assert_allclose(sorted(out.x[0, :, 0].tolist()), [0.5, 2, 3], atol=1e-6)
    free = merge(Merged(x, tokens.size, tokens.place, None), key + 0.1, 1, num_prefix=0)
    np.testing.assert_allclose(sorted(free.x[0, :, 0].tolist()), [1, 1.5, 2], atol=1e-6)


@pytest.mark.parametrize(
    ("count", "kept", "layers", "expected"),
    [
        (64, 16, 3, (16, 16, 16)),
        (64, 8, 3, (32, 16, 8)),
        (64, 63, 3, (1, 0, 0)),
        (576, 64, 23, None),
        (64, 7, 3, None),
        (5, 5, 0, ()),
        (5, 4, 0, None),
    ],
)
def test_a_schedule_is_even_and_never_more_than_half(count, kept, layers, expected):
    got = merge_schedule(count, kept, layers)
    if count == 576:  # 22 or 23 in every block, the last ones less
        assert got is not None and sum(got) == 512 and got == tuple(sorted(got, reverse=True)) and got[0] == 23
    else:
        assert got == expected
