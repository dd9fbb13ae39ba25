"""Reducers on the tokens of packed rows, image by image, and what a model gives at the full budget."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax.connectors.concat import Concat
from vlm_jax.decoders.transformer import Transformer
from vlm_jax.encoders.qwen_vit import QwenViT
from vlm_jax.models.vlm import VLM
from vlm_jax.processors.patches import pack_patches
from vlm_jax.reducers.behind_connector import block_means, positions_of_kept, reduce_packed
from vlm_jax.reducers.divprune import DivPrune
from vlm_jax.reducers.holov import HoloV
from vlm_jax.reducers.prumerge import PruMerge
from vlm_jax.reducers.random_drop import RandomDrop
from vlm_jax.reducers.uniform_stride import UniformStride
from vlm_jax.reducers.visionzip import VisionZip
from vlm_jax.reducers.vispruner import VisPruner
from vlm_jax.types import Batch, PackedImages, VisualFeatures

from ..parameters import drawn
from . import blocks, definitions

KEPT, LENGTH = 7, 48
COUNTS = np.array([[20, 5, 12], [9, 7, 0]])
STARTS = np.cumsum(COUNTS, axis=1) - COUNTS
IMAGES = PackedImages(jnp.asarray(STARTS), jnp.asarray(COUNTS), 20)
REDUCERS = {
    "divprune": (DivPrune(KEPT), lambda t, s, k: {i: t[i] for i in definitions.divprune(t, KEPT)}),
    "visionzip": (VisionZip(KEPT, contextual_share=3 / 7), lambda t, s, k: definitions.visionzip(t, s, k, KEPT, 3)),
    "prumerge": (PruMerge(KEPT, num_neighbors=4), lambda t, s, k: definitions.prumerge(t, s, k, KEPT, 4)),
    "vispruner": (VisPruner(KEPT), lambda t, s, k: {i: t[i] for i in definitions.vispruner(t, s, KEPT, 3)}),
    "holov": (HoloV(KEPT, num_crops=5), lambda t, s, k: {i: t[i] for i in definitions.holov(t, s, KEPT, 5, 0.09)}),
}


def rows(seed=0):
    rng = np.random.default_rng(seed)
    mask = np.arange(LENGTH)[None] < COUNTS.sum(1)[:, None]
    return VisualFeatures(
        jnp.asarray(rng.normal(size=(2, LENGTH, 6)), jnp.float32),
        jnp.asarray(mask),
        (1, LENGTH),
        saliency=jnp.asarray(rng.uniform(size=(2, LENGTH)), jnp.float32),
        keys=jnp.asarray(rng.normal(size=(2, LENGTH, 2, 4)), jnp.float32),
    )


@pytest.mark.parametrize("kind", REDUCERS)
def test_every_picture_of_a_packed_row_is_reduced_by_the_papers_definition(kind):
    reducer, define = REDUCERS[kind]
    found = rows()
    out = jax.jit(lambda found: reduce_packed(reducer.clone(), found, IMAGES, deterministic=True))(found)
    for row in range(2):
        tokens, places = [], []
        for start, count in zip(STARTS[row], COUNTS[row], strict=True):
            own = [np.float64(x[row, start : start + count]) for x in (found.tokens, found.saliency, found.keys)]
            left = {i: own[0][i] for i in range(count)} if count <= KEPT else define(*own)
            assert len(left) == reducer.num_left(int(count))
            places += [start + i for i in sorted(left)]
            tokens += [left[i] for i in sorted(left)]
        np.testing.assert_array_equal(np.flatnonzero(out.mask[row]), np.arange(len(tokens)))
        np.testing.assert_array_equal(out.kept[row, : len(places)], places)
        np.testing.assert_allclose(out.tokens[row, : len(tokens)], np.stack(tokens), atol=1e-5)


def test_what_is_seen_of_features_is_averaged_over_the_block_of_each_token():
    values = np.random.default_rng(1).normal(size=(1, 16, 3)).astype(np.float32)
    packed = VisualFeatures(jnp.asarray(values), jnp.ones((1, 16), bool), (2, 8), block=2)
    np.testing.assert_allclose(block_means(packed, (1, 4))[0], values[0].reshape(4, 4, 3).mean(1), atol=1e-6)
    in_rows = VisualFeatures(jnp.asarray(values), jnp.ones((1, 16), bool), (4, 4))
    expected = values[0].reshape(2, 2, 2, 2, 3).mean((1, 3)).reshape(4, 3)
    np.testing.assert_allclose(block_means(in_rows, (2, 2))[0], expected, atol=1e-6)


def test_kept_tokens_have_the_positions_of_their_places_on_three_axes():
    """Two tiles of four tokens, of which two are kept of each; by hand."""
    own = np.stack([np.arange(8), 10 + np.arange(8), 20 + np.arange(8)], -1)[None]
    kept, places = jnp.asarray([[1, 3], [0, 2]]), jnp.asarray([[0, 1, 2, 3]])
    got = positions_of_kept(jnp.asarray(own), kept, places)
    np.testing.assert_array_equal(got[0, :, 0], [1, 3, 4, 6])
    np.testing.assert_array_equal(got[0], own[0][[1, 3, 4, 6]])


TOWER = {"patch_size": 2, "width": 8, "depth": 2, "num_heads": 2, "mlp_dim": 12, "temporal_patch_size": 1}
GRIDS = ((4, 4), (2, 6))  # in patches: 4 and 3 tokens


def model(reducer=None, saliency="none"):
    encoder = QwenViT(**TOWER, saliency=saliency)
    decoder = Transformer(12, 16, 2, 2, 1, 24)
    return VLM(encoder, Concat(16, 2), decoder, reducer=reducer, reduce="tokens")


@functools.cache
def batch():
    rng = np.random.default_rng(2)
    patches = rng.normal(size=(sum(rows * cols for rows, cols in GRIDS), 12)).astype(np.float32)
    packed = pack_patches(patches, [(1, *grid) for grid in GRIDS], merge_size=2, length=32)
    images = PackedImages(np.array([[0, 4]], np.int32), np.array([[4, 3]], np.int32), 4)
    index = np.array([[-1, 0, 1, 2, 3, -1, 4, 5, 6, -1]], np.int32)
    length = index.shape[1]
    return Batch(
        tokens=np.arange(length, dtype=np.int32)[None],
        positions=np.arange(length, dtype=np.int32)[None],
        segment_ids=np.ones((1, length), np.int32),
        visual_index=index,
        images=dataclasses.replace(packed, images=images),
    )


@functools.cache
def params():
    return nn.meta.unbox(drawn(jax.eval_shape(model().init, jax.random.key(0), batch())))


@pytest.mark.parametrize(
    "reducer", [RandomDrop(4), UniformStride(4), DivPrune(4), VisionZip(4), PruMerge(4)], ids=lambda r: r.kind
)
def test_at_the_full_budget_no_logit_of_a_packed_model_changes(reducer):
    own = params()
    expected = jax.jit(model().apply)(own, batch())
    saliency = reducer.required_fields().get("encoder", {}).get("saliency", "none")
    got = jax.jit(model(reducer, saliency).apply)(own, batch())
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_saliency_of_packed_patches_is_the_mean_over_their_own_image():
    encoder = QwenViT(**TOWER, saliency="heads", use_rope=False)
    own = {"params": params()["params"]["encoder"]}
    packed = batch().images
    out = jax.jit(encoder.apply)(own, packed)
    hidden = jax.jit(functools.partial(QwenViT(**TOWER, use_rope=False).apply, collect=True))(own, packed).hidden
    layer = jax.tree.map(lambda leaf: np.float64(leaf[-1]), own["params"]["blocks"]["layers"])
    for start, stop in ((0, 16), (16, 28)):
        q, k, _ = blocks.heads(np.float64(hidden[-2][0, start:stop]), layer, 2, 2, 1e-6)
        np.testing.assert_allclose(out.keys[0, start:stop], k, atol=1e-5)
        expected = blocks.weights(q, k, 0).mean((0, 1))
        np.testing.assert_allclose(out.saliency[0, start:stop], expected, atol=1e-6)
    np.testing.assert_array_equal(out.saliency[0, 28:], 0)
