"""Encoders whose packed patches are in blocks: order, windows, selected layers, errors, released sizes."""

import functools

import jax
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax.encoders.qwen_vit import QwenViT
from vlm_jax.encoders.rice_vit import RiceViT
from vlm_jax.encoders.siglip2_navit import Siglip2NaViT
from vlm_jax.processors.patches import pack_patches

from ..advice import tried

SIZES = {"patch_size": 2, "width": 16, "depth": 4, "num_heads": 2, "mlp_dim": 24}
WINDOWS = {"window_size": 8, "full_layers": (1, 3)}
GRIDS = [(1, 6, 4), (2, 4, 10)]
KINDS = {
    "qwen2_vl": QwenViT(**SIZES, activation="quick_gelu", gated=False, norm="layer"),
    "qwen2_5_vl": QwenViT(**SIZES, **WINDOWS),
    "rice_vit": RiceViT(**SIZES),
    "siglip2_navit": Siglip2NaViT(**SIZES, table_side=5),
    "siglip2_navit in windows": Siglip2NaViT(**SIZES, **WINDOWS, table_side=None),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def packed_for(encoder, grids=GRIDS, seed=0, **more):
    count = int(np.prod(grids, axis=1).sum())
    patches = np.random.default_rng(seed).normal(size=(count, encoder.patch_dim)).astype(np.float32)
    return pack(encoder, patches, grids, **more)


def pack(encoder, patches, grids, **more):
    form = encoder.patch_format
    return pack_patches(
        patches, grids, merge_size=form.merge_size, window=form.window, class_tokens=form.class_tokens, **more
    )


@functools.cache
def params_of(kind):
    encoder = KINDS[kind]
    shapes = nn.meta.unbox(jax.eval_shape(encoder.init, jax.random.key(0), packed_for(encoder)))
    random = np.random.default_rng(0)
    return jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32) * 0.3, shapes)


@functools.cache
def encode(kind):
    return jax.jit(functools.partial(KINDS[kind].apply, collect=True))


@every_kind
def test_features_come_in_the_processors_order_with_their_mask(kind):
    """Each image of a pack gets what it gets alone."""
    encoder = KINDS[kind]
    packed = packed_for(encoder, length=192)
    together = encode(kind)(params_of(kind), packed)
    assert together.tokens.shape == (1, 192, encoder.features)
    assert together.grid == (2, 96) and together.block == encoder.merge_size == 2
    np.testing.assert_array_equal(together.mask[0], np.arange(192) < 104)
    assert together.hidden.shape == (encoder.depth + 1, 1, 192, encoder.width)
    patches = packed_for(encoder).patches[0]
    if packed.order is not None:
        patches = patches[packed_for(encoder).order[0]]
    start = 0
    for grid in [(1, 6, 4), (1, 4, 10), (1, 4, 10)]:  # a video's frames are images of their own
        stop = start + grid[1] * grid[2]
        alone = pack(encoder, patches[start:stop], [grid], length=192)
        features = encode(kind)(params_of(kind), alone)
        expected = together.tokens[0, start:stop]
        np.testing.assert_allclose(features.tokens[0, : len(expected)], expected, atol=1e-4)
        np.testing.assert_allclose(features.hidden[:, 0, : stop - start], together.hidden[:, 0, start:stop], atol=1e-4)
        start = stop


@every_kind
def test_the_grid_is_known_before_init(kind):
    encoder = KINDS[kind]
    rows, cols = encoder.grid(12, 20)
    packed = packed_for(encoder, [(1, 6, 10)])
    features = jax.eval_shape(encoder.apply, params_of(kind), packed)
    assert features.tokens.shape[1] == packed.segment_ids.size
    assert np.sum(packed.segment_ids > 0) == rows * cols + encoder.class_tokens
    for size in ((12, 18), (6, 20), (0, 4)):
        with pytest.raises(ValueError, match=f"{size[0]}x{size[1]} pixels .* multiple of 4"):
            encoder.grid(*size)


@every_kind
def test_a_batch_holds_several_sequences(kind):
    encoder = KINDS[kind]
    parts = [packed_for(encoder, [grid], seed=seed, length=64) for seed, grid in enumerate([(1, 4, 6), (1, 8, 4)])]
    batch = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    tokens = encode(kind)(params_of(kind), batch).tokens
    for i, part in enumerate(parts):
        alone = encode(kind)(params_of(kind), part)
        np.testing.assert_allclose(tokens[i][alone.mask[0]], alone.tokens[0][alone.mask[0]], atol=1e-4)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "siglip2_navit in windows"])
@pytest.mark.parametrize("select", [0, 2, -1, -2])
def test_select_layer_gives_a_hidden_state(kind, select):
    whole = KINDS[kind]
    selected = whole.clone(select_layer=select)
    packed, params = packed_for(whole), params_of(kind)
    hidden = encode(kind)(params, packed).hidden[select]
    built = select % 5
    layers = jax.tree.map(lambda leaf: leaf[:built], params["params"].get("blocks"))
    kept = {"params": {**params["params"], "blocks": layers}}
    shapes = nn.meta.unbox(jax.eval_shape(selected.init, jax.random.key(0), packed))["params"]
    assert ("blocks" in shapes) == (built > 0)
    tokens = jax.jit(selected.apply)(kept, packed).tokens
    np.testing.assert_allclose(tokens.reshape(hidden.shape)[0, :104], hidden[0, :104], atol=1e-4)


def test_levels_are_hidden_states_beside_the_attention():
    """Those that are collected, of towers with whole and with windowed layers, which reducers look into."""
    kind = "siglip2_navit in windows"
    packed, params = packed_for(KINDS[kind]), params_of(kind)
    hidden = encode(kind)(params, packed).hidden
    found = jax.jit(KINDS[kind].clone(levels=(0, 2, -1), saliency="heads").apply)(params, packed)
    assert found.saliency is not None
    expected = np.concatenate([hidden[0], hidden[2], hidden[4]], axis=-1)
    np.testing.assert_allclose(found.levels[0, :104], expected[0, :104], atol=1e-4)


def test_saliency_is_the_attention_of_the_class_token():
    encoder = KINDS["rice_vit"].clone(depth=1, use_rope=False)
    packed = packed_for(encoder, [(1, 2, 4), (1, 2, 2)])
    shapes = nn.meta.unbox(jax.eval_shape(encoder.init, jax.random.key(0), packed))["params"]
    random = np.random.default_rng(1)
    params = jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32), shapes)
    x = np.concatenate([packed.patches[0, :12] @ params["patch_embed"]["kernel"], params["class_token"].repeat(2, 0)])
    block = jax.tree.map(lambda leaf: leaf[0], params["blocks"]["layers"])
    for norm in (params["pre_norm"], block["attention_norm"]):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * norm["scale"] + norm["bias"]
    query, key = (
        (x @ block["attention"][name]["kernel"] + block["attention"][name]["bias"]).reshape(14, 2, 8)
        for name in ("query", "key")
    )
    expected = np.zeros(14)
    for own, patches in ((12, range(8)), (13, range(8, 12))):
        logits = np.einsum("hd,khd->hk", query[own], key[[*patches, own]]) / np.sqrt(8)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        expected[list(patches)] = (weights / weights.sum(-1, keepdims=True)).mean(0)[:-1]
    found = jax.jit(encoder.clone(saliency="heads").apply)({"params": params}, packed)
    np.testing.assert_allclose(found.saliency[0, :12], expected[:12], atol=1e-5)


def test_class_tokens_need_their_places_and_whole_images():
    encoder = KINDS["rice_vit"]
    packed = packed_for(KINDS["siglip2_navit"])
    with pytest.raises(
        ValueError, match=tried("packed with {no places} for class tokens; pack with class_tokens={True}")
    ):
        encoder.init(jax.random.key(0), packed)
    assert jax.eval_shape(encoder.init, jax.random.key(0), packed_for(encoder))
    windows = tried("no layer can have windows; leave window_size and full_layers out")
    with pytest.raises(ValueError, match=windows):
        _ = encoder.clone(**WINDOWS).patch_format
    assert encoder.patch_format.window is None


def test_levels_that_are_not_computed_are_refused():
    encoder = KINDS["siglip2_navit"].clone(select_layer=2)
    packed = packed_for(encoder)
    with pytest.raises(ValueError, match=tried("with the hidden states 0 to {}; choose among these")):
        encoder.clone(levels=(3,)).init(jax.random.key(0), packed)
    with pytest.raises(ValueError, match=r"levels: expected numbers of hidden states in ascending order, got \(2, 1\)"):
        encoder.clone(levels=(2, 1)).init(jax.random.key(0), packed)
    run = functools.partial(encoder.clone(levels=(1, 2)).init_with_output, jax.random.key(0))
    assert jax.eval_shape(run, packed)[0].levels.shape == (1, packed.patches.shape[1], 2 * encoder.width)


def test_select_layer_beyond_the_depth_is_refused():
    encoder = KINDS["qwen2_5_vl"].clone(select_layer=5)
    with pytest.raises(ValueError, match="4 blocks have the hidden states 0 to 4"):
        encoder.init(jax.random.key(0), packed_for(encoder))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_size": 4}, "expected patches of 96 values .* got 24"),
        ({"window_size": 12}, "windows of 36 .window=3 .* got 16"),
        ({"window_size": 3}, r"window_size: expected at least 4 pixels"),
    ],
)
def test_patches_of_another_encoder_are_refused(fields, message):
    packed = packed_for(KINDS["qwen2_5_vl"])
    with pytest.raises(ValueError, match=message):
        KINDS["qwen2_5_vl"].clone(**fields).init(jax.random.key(0), packed)


def test_patches_packed_without_windows_or_blocks_are_refused():
    patches = np.zeros((6, 24), np.float32)
    with pytest.raises(ValueError, match=tried("{6} patches cannot be merged by {2}x{2}; pack with this merge_size")):
        KINDS["qwen2_vl"].init(jax.random.key(0), pack_patches(patches, [(1, 2, 3)]))
    with pytest.raises(
        ValueError,
        match=tried(
            "layers {[0, 2]} attend inside windows, but the patches were packed without windows: pass `window`"
        ),
    ):
        KINDS["qwen2_5_vl"].init(jax.random.key(0), pack_patches(patches[:4], [(1, 2, 2)], merge_size=2))
    for kind, window in (("qwen2_vl", None), ("qwen2_5_vl", KINDS["qwen2_5_vl"].window)):
        packed = pack_patches(patches[:4], [(1, 2, 2)], merge_size=2, window=window)
        assert jax.eval_shape(KINDS[kind].init, jax.random.key(0), packed)


def test_an_image_is_resized_and_states_are_left_out_as_said():
    encoder = KINDS["qwen2_vl"]
    with pytest.raises(ValueError, match=tried("an image of {6}x{4} pixels cannot be divided into blocks of {2}x{2}")):
        encoder.grid(6, 4)
    assert encoder.grid(8, 4) == (4, 2)
    told = tried("saliency is of the last layer, without collected states: leave out `collect`")
    encoder, packed = encoder.clone(saliency="heads"), packed_for(encoder)
    with pytest.raises(ValueError, match=told):
        jax.eval_shape(functools.partial(encoder.init, collect=True), jax.random.key(0), packed)
    assert jax.eval_shape(encoder.init, jax.random.key(0), packed)


def count(encoder):
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), packed_for(encoder, [(1, 2, 2)]))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_released_sizes():
    """Parameters under `visual.` of Qwen2.5-VL and Qwen2-VL, without those of the merger."""
    sizes = {"patch_size": 14, "width": 1280, "depth": 32, "num_heads": 16}
    windows = {"window_size": 112, "full_layers": (7, 15, 23, 31)}
    square = 4 * 1280
    merger = square * square + square  # its first layer; the second depends on the decoder's width
    assert count(QwenViT(**sizes, **windows, mlp_dim=3420)) == 676_550_144 - merger - 1280 - (square + 1) * 3584
    qwen2 = QwenViT(**sizes, mlp_dim=5120, activation="quick_gelu", gated=False, norm="layer")
    assert count(qwen2) == 675_759_104 - merger - 2 * 1280 - (square + 1) * 3584
