"""Reducers before the connector against their papers' definitions, with padding and without."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.reducers.divprune import DivPrune
from vlm_jax.reducers.fastervlm import FasterVLM
from vlm_jax.reducers.holov import HoloV
from vlm_jax.reducers.prumerge import PruMerge
from vlm_jax.reducers.uniform_stride import UniformStride
from vlm_jax.reducers.visionzip import VisionZip
from vlm_jax.reducers.vispruner import VisPruner, num_rounds
from vlm_jax.types import VisualFeatures

from . import definitions

BATCH, COUNT, WIDTH, HEADS, DIM = 3, 20, 6, 2, 4
KEPT = 7


def features(seed=0, real=(COUNT,) * BATCH):
    """Images of which `real` features are real, at places that are drawn."""
    rng = np.random.default_rng(seed)
    mask = rng.permuted(np.arange(COUNT)[None] < np.asarray(real)[:, None], axis=1)
    return VisualFeatures(
        jnp.asarray(rng.normal(size=(BATCH, COUNT, WIDTH)), jnp.float32),
        jnp.asarray(mask),
        (4, 5),
        saliency=jnp.asarray(rng.uniform(size=(BATCH, COUNT)), jnp.float32),
        keys=jnp.asarray(rng.normal(size=(BATCH, COUNT, HEADS, DIM)), jnp.float32),
    )


def stride(image):
    tokens, _, _ = image
    return {i: tokens[i] for i in definitions.evenly(range(len(tokens)), KEPT)}


def divprune(image):
    tokens, _, _ = image
    return {i: tokens[i] for i in definitions.divprune(tokens, KEPT)}


def fastervlm(image):
    tokens, saliency, _ = image
    return {i: tokens[i] for i in definitions.highest(saliency, range(len(tokens)), KEPT)}


def vispruner(image):
    tokens, saliency, _ = image
    return {i: tokens[i] for i in definitions.vispruner(tokens, saliency, KEPT, 3)}


def holov(image):
    tokens, saliency, _ = image
    return {i: tokens[i] for i in definitions.holov(tokens, saliency, KEPT, 6, 0.7)}


def holov_of_one(image):
    tokens, saliency, _ = image
    return {i: tokens[i] for i in definitions.holov(tokens, saliency, KEPT, len(tokens), 0.09)}


REDUCERS = {
    "uniform_stride": (UniformStride(KEPT), stride),
    "divprune": (DivPrune(KEPT), divprune),
    "visionzip": (
        VisionZip(KEPT, contextual_share=3 / 7),
        lambda image: definitions.visionzip(*image, KEPT, 3),
    ),
    "prumerge": (PruMerge(KEPT, num_neighbors=4), lambda image: definitions.prumerge(*image, KEPT, 4)),
    "prumerge+": (
        PruMerge(KEPT, num_neighbors=4, spatial_share=3 / 7),
        lambda image: definitions.prumerge(*image, KEPT, 4, 3),
    ),
    "fastervlm": (FasterVLM(KEPT), fastervlm),
    "vispruner": (VisPruner(KEPT), vispruner),
    "holov": (HoloV(KEPT, num_crops=6, variety=0.7), holov),
    "holov, more crops than features": (HoloV(KEPT, num_crops=99), holov_of_one),
    "prumerge, all neighbours": (PruMerge(KEPT), lambda image: definitions.prumerge(*image, KEPT, 99)),
}
AS_THEY_ARE = ("uniform_stride", "divprune", "fastervlm", "vispruner", "holov", "holov, more crops than features")
every_reducer = pytest.mark.parametrize("name", REDUCERS)


@functools.cache
def jitted(name):
    reducer = REDUCERS[name][0]
    return jax.jit(lambda features: reducer.apply({}, features, deterministic=True))


def defined(name, found):
    """Tokens by the definition of every image's real features, in order."""
    rows = []
    for b in range(BATCH):
        real = np.flatnonzero(found.mask[b])
        image = (np.float64(x[b])[real] for x in (found.tokens, found.saliency, found.keys))
        tokens = REDUCERS[name][1](tuple(image))
        rows.append(np.stack([tokens[place] for place in sorted(tokens)]))
    return np.stack(rows)


@every_reducer
@pytest.mark.parametrize("real", [(20, 20, 20), (15, 9, 8)], ids=str)
def test_what_is_left_is_what_the_paper_says(name, real):
    found = features(real=real)
    out = jitted(name)(found)
    assert out.grid == (1, KEPT) and out.mask.all()
    np.testing.assert_allclose(out.tokens, defined(name, found), atol=1e-5)


@every_reducer
def test_padding_comes_after_all_that_is_real(name):
    found = features(real=(7, 4, 0))
    out = jitted(name)(found)
    np.testing.assert_array_equal(out.mask.sum(1), [7, 4, 0])
    assert np.isfinite(out.tokens).all() or name in AS_THEY_ARE
    if name in AS_THEY_ARE:  # all seven, as they are
        np.testing.assert_array_equal(out.tokens[0], found.tokens[0][found.mask[0]])


@every_reducer
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -1e30])
def test_what_padding_holds_changes_nothing(name, garbage):
    clean = features(real=(15, 9, 4))
    dirty = jax.tree.map(
        lambda x: (
            jnp.where(clean.mask.reshape(*clean.mask.shape, *(1,) * (x.ndim - 2)), x, garbage).astype(x.dtype)
            if x.dtype != bool
            else x
        ),
        clean,
    )
    expected, got = jitted(name)(clean), jitted(name)(dirty)
    np.testing.assert_array_equal(got.mask, expected.mask)
    hidden = expected.mask[..., None]
    np.testing.assert_array_equal(np.where(hidden, got.tokens, 0), np.where(hidden, expected.tokens, 0))


@every_reducer
def test_gradients_are_finite_and_reach_what_is_kept(name):
    found = features(real=(15, 9, 4))
    reducer = REDUCERS[name][0]

    def loss(tokens):
        given = VisualFeatures(tokens, found.mask, found.grid, saliency=found.saliency, keys=found.keys)
        return jnp.sum(jnp.sin(reducer.apply({}, given, deterministic=True).tokens))

    grads = jax.jit(jax.grad(loss))(found.tokens)
    assert np.isfinite(grads).all()
    assert (np.abs(grads).max(-1) > 1e-6).sum(1).min() >= 4


@every_reducer
def test_bfloat16_keeps_what_float32_keeps(name):
    found = features()
    low = VisualFeatures(
        found.tokens.astype(jnp.bfloat16), found.mask, found.grid, saliency=found.saliency, keys=found.keys
    )
    out, exact = (
        jitted(name)(low),
        jitted(name)(
            VisualFeatures(low.tokens.astype(jnp.float32), low.mask, low.grid, saliency=low.saliency, keys=low.keys)
        ),
    )
    assert out.tokens.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(out.tokens), exact.tokens, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("reducer", [VisionZip(KEPT), PruMerge(KEPT), FasterVLM(KEPT), VisPruner(KEPT), HoloV(KEPT)])
def test_features_without_attention_are_refused(reducer):
    found = features()
    bare = VisualFeatures(found.tokens, found.mask, found.grid)
    with pytest.raises(ValueError, match=r"needs features with saliency and keys: set \{'encoder': \{'saliency'"):
        reducer.apply({}, bare, deterministic=True)


@pytest.mark.parametrize(("kept", "contextual"), [(1, 0), (2, 0), (4, 1), (64, 10), (128, 20), (192, 30)])
def test_visionzip_splits_a_budget_as_its_settings_do(kept, contextual):
    assert VisionZip(kept).num_contextual == contextual


@pytest.mark.parametrize("count", [8, 12, 20])
def test_vispruner_needs_no_more_rounds_than_it_runs(count):
    """By hand: at most 8 leave in a round, and at most the half that is tried."""
    rounds = []
    for left in range(count, 200):
        rounds.append(0)
        while left > count:
            left -= min(8, left - count, -(-left // 2))
            rounds[-1] += 1
    assert num_rounds(199, count) == max(rounds)


@pytest.mark.parametrize(("size", "rows"), [(5, 3), (20, 0)])
def test_holov_as_released_fills_up_with_rows_of_zeros(size, rows):
    """All attention is on the first 5 of 20: a crop of 5 gets the whole share of 8 and has 5, one of 20 has all."""
    found = features()
    saliency = jnp.zeros((BATCH, COUNT)).at[:, :5].set(1.0)
    found = dataclasses.replace(found, saliency=saliency, mask=jnp.ones((BATCH, COUNT), bool))
    out = HoloV(8, num_crops=COUNT // size, rule="as_released").apply({}, found, deterministic=True)
    zeros = np.asarray(out.tokens == 0).all(axis=-1)
    np.testing.assert_array_equal(zeros.sum(axis=1), rows)
    np.testing.assert_array_equal(zeros[:, 8 - rows :], True)
    np.testing.assert_array_equal(np.asarray(out.kept)[zeros], COUNT - 1)
    assert out.mask.all()
