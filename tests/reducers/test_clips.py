"""Reducers of videos against their papers' definitions at a budget: clips of several lengths, and of one in frames."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.layers.density_peaks import distances, nearest_centers, peak_scores, ranks, together
from vlm_jax.reducers.behind_connector import reduce_packed
from vlm_jax.reducers.dycoke import DyCoke
from vlm_jax.reducers.fastvid import FastVID
from vlm_jax.reducers.holitom import HoliTom
from vlm_jax.reducers.prunevid import PruneVid
from vlm_jax.types import PackedImages, VisualFeatures

from . import clip_definitions as definitions

WIDTH = 6
SCENES = {"long": ((0, 1, 2, 3, 4), (5, 6, 7)), "short": ((0, 1, 2),)}
PLACES = {"long": 6, "short": 4}
FASTVID = {"num_segments": 2, "threshold": 0.0, "anchor_step": 2}
REDUCERS = {
    "dycoke": (DyCoke, lambda clip, s, scenes, k: definitions.dycoke(clip, k)),
    "prunevid": (PruneVid, lambda clip, s, scenes, k: definitions.prunevid(clip, scenes, k, 0.8)),
    "fastvid": (
        functools.partial(FastVID, **FASTVID),
        lambda clip, s, scenes, k: definitions.fastvid(clip, s, cut(clip, scenes), k, 0.4, 2, 0.6),
    ),
    "holitom": (HoliTom, lambda clip, s, scenes, k: definitions.holitom(clip, s, scenes, k, 0.8, 0.6)),
}
every_kind = pytest.mark.parametrize("kind", REDUCERS)


def cut(clip, scenes):
    """The scenes; a single one is cut between the frames whose means are least alike, since there are two segments."""
    if len(scenes) > 1:
        return scenes
    means = clip.mean(1)
    after = 1 + int(np.argmin([definitions.cosine(a, b) for a, b in itertools.pairwise(means)]))
    return scenes[0][:after], scenes[0][after:]


@functools.cache
def made(name):
    """A clip whose scenes have the same tokens at their first places, and a shift of all; with the attention to it."""
    rng = np.random.default_rng(len(name))
    places, clip = PLACES[name], []
    for number, frames in enumerate(SCENES[name]):
        shift = np.roll([3.0, -3.0, 0, 0, 0, 0], 2 * number)
        same = rng.normal(size=(places * 2 // 3, WIDTH))
        for _ in frames:
            noise = 0.05 * rng.normal(size=same.shape)
            clip.append(np.concatenate([same + noise, rng.normal(size=(places - len(same), WIDTH))]) + shift)
    clip = np.float32(clip)
    return clip, np.float32(rng.uniform(size=clip.shape[:2]))


@functools.cache
def packed(garbage=0.0):
    """Both clips, one a row, as packed videos; the rest of the rows is padding."""
    size = made("long")[1].size + 2
    rows = {"tokens": np.full((2, size, WIDTH), garbage, np.float32), "saliency": np.full((2, size), garbage)}
    for row, name in enumerate(SCENES):
        clip, saliency = made(name)
        rows["tokens"][row, : saliency.size] = clip.reshape(-1, WIDTH)
        rows["saliency"][row, : saliency.size] = saliency.reshape(-1)
    counts = np.array([made(name)[1].size for name in SCENES])
    return VisualFeatures(
        jnp.asarray(rows["tokens"]),
        jnp.asarray(np.arange(size)[None] < counts[:, None]),
        (1, size),
        saliency=jnp.asarray(rows["saliency"], jnp.float32),
        keys=jnp.zeros((2, size, 1, 1)),
        frames=jnp.asarray([len(made(name)[0]) for name in SCENES]),
    )


@functools.cache
def jitted(kind, **fields):
    reducer = REDUCERS[kind][0](**fields)
    return jax.jit(lambda features: reducer.apply({}, features, deterministic=True))


@every_kind
@pytest.mark.parametrize("count", [10, 40])
def test_packed_videos_are_reduced_by_the_papers_definitions(kind, count):
    """10 is less than the whole frames of DyCoke, 40 more than the others leave by merging over time."""
    out = jitted(kind, num_kept=count)(packed())
    for row, (name, scenes) in enumerate(SCENES.items()):
        clip, saliency = (np.float64(x) for x in made(name))
        expected = {i: token for i, token in enumerate(clip.reshape(-1, WIDTH))}
        if saliency.size > count:
            expected = REDUCERS[kind][1](clip, saliency, tuple(map(list, scenes)), count)
        assert len(expected) == min(count, saliency.size)
        np.testing.assert_array_equal(out.mask[row], np.arange(count) < len(expected))
        np.testing.assert_array_equal(out.kept[row, : len(expected)], sorted(expected))
        found = np.stack([expected[i] for i in sorted(expected)])
        np.testing.assert_allclose(out.tokens[row, : len(found)], found, atol=2e-5)


@every_kind
def test_what_padding_of_a_video_holds_changes_nothing(kind):
    run = jitted(kind, num_kept=10)
    expected, got = run(packed()), run(packed(np.nan))
    np.testing.assert_array_equal(got.kept, expected.kept)
    np.testing.assert_array_equal(got.tokens, expected.tokens)


@every_kind
def test_frames_that_are_images_are_reduced_as_a_packed_video(kind):
    clip, saliency = made("long")
    count, places = saliency.shape
    twice = VisualFeatures(
        jnp.asarray(np.concatenate([clip, clip[::-1]])),
        jnp.ones((2 * count, places), bool),
        (2, 3),
        saliency=jnp.asarray(np.concatenate([saliency, saliency[::-1]])),
        keys=jnp.zeros((2 * count, places, 1, 1)),
    )
    out = jitted(kind, num_kept=5, frames=count)(twice)
    assert out.grid == (1, 5) and out.tokens.shape == (2 * count, 5, WIDTH)
    one = dataclasses.replace(packed(), mask=packed().mask.at[1].set(False))
    expected = jitted(kind, num_kept=5 * count)(one)
    index = np.asarray(out.kept[:count]) + places * np.arange(count)[:, None]
    np.testing.assert_array_equal(index.reshape(-1), expected.kept[0])
    np.testing.assert_allclose(out.tokens[:count].reshape(-1, WIDTH), expected.tokens[0], atol=1e-6)


def test_videos_of_one_packed_row_are_reduced_apart():
    alone, size = jitted("dycoke", num_kept=10)(packed()), packed().mask.shape[1]
    counts = packed().mask.sum(axis=1)
    order = np.concatenate([np.arange(counts[0]), size + np.arange(counts[1])])
    row = VisualFeatures(packed().tokens.reshape(1, -1, WIDTH)[:, order], jnp.ones((1, 60), bool), (1, 60))
    images = PackedImages(jnp.asarray([[0, counts[0]]]), counts[None], int(counts[0]), packed().frames[None])
    left = jax.jit(lambda row: reduce_packed(DyCoke(10), row, images, deterministic=True))(row)
    np.testing.assert_array_equal(left.kept[0], np.concatenate([alone.kept[0], counts[0] + alone.kept[1]]))
    np.testing.assert_array_equal(left.tokens[0], alone.tokens.reshape(-1, WIDTH))


def test_clips_are_whole():
    features = dataclasses.replace(packed(), frames=None)
    with pytest.raises(ValueError, match="a multiple of 3 images, the frames of a clip, got 2 images"):
        jitted("dycoke", num_kept=2, frames=3)(features)


def test_released_dycoke_loses_an_odd_last_frame_and_compares_few_frames_in_pairs():
    """By hand: frames 0 and 1 of 3 are a pair, whose second keeps int((1 - 0.5) * 4) = 2; frame 2 is lost."""
    out = jitted("dycoke", num_kept=1, rule="as_released", merging_ratio=0.5)(packed())
    clip = np.float64(made("short")[0])
    similar = [definitions.cosine(a, b) for a, b in zip(clip[0], clip[1], strict=True)]
    expected = [0, 1, 2, 3, *(4 + np.argsort(similar)[:2])]
    np.testing.assert_array_equal(out.kept[1][out.mask[1]], expected)


def test_clusters_do_not_depend_on_padding():
    x = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)

    @jax.jit
    def run(x, mask):
        distance, pairs = distances(jnp.where(mask[:, None], x, 0)), together(jnp.zeros(len(x), int), mask)
        rank = ranks(peak_scores(distance, pairs, 4), pairs)
        return jnp.argsort(rank)[:3], nearest_centers(distance, pairs, rank < 3, rank)

    centers, joined = run(x, jnp.ones(9, bool))
    places = np.array([0, 2, 3, 5, 6, 7, 9, 10, 11])
    wide = np.full((12, 4), np.nan, np.float32)
    wide[places] = x
    mask = np.isin(np.arange(12), places)
    padded, found = run(jnp.asarray(wide), jnp.asarray(mask))
    np.testing.assert_array_equal(padded, places[np.asarray(centers)])
    np.testing.assert_array_equal(found[places], places[np.asarray(joined)])
    assert (np.asarray(found)[~mask] == 12).all()
    nearest = np.linalg.norm(x[:, None] - x[np.asarray(centers)][None], axis=-1).argmin(axis=1)
    np.testing.assert_array_equal(joined, np.asarray(centers)[nearest])
    scores = definitions.peaks(np.float64(x), 4)
    np.testing.assert_array_equal(centers, np.argsort(-scores)[:3])
