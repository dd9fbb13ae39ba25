"""The interface of `vlm_jax.reducers`, for every entry of the table, and the numbers of the controls."""

import jax
import numpy as np
import pytest

from vlm_jax import reducers
from vlm_jax.reducers import REDUCERS
from vlm_jax.reducers.downsample_image import DownsampleImage
from vlm_jax.reducers.random_drop import RandomDrop
from vlm_jax.testing.reducers import *  # noqa: F403
from vlm_jax.testing.reducers import numbered, reduce

from .kinds import defined


def test_random_draws_every_subset_of_its_size_alike():
    """Chi-square of how often each of 12 features is kept, over 2000 images, against 5 of 12."""
    features = numbered((3, 4), batch=2000)
    tokens = reduce(RandomDrop(5), features, key=jax.random.key(1), deterministic=False).tokens
    counts = np.bincount(np.asarray(tokens)[..., 1].astype(int).reshape(-1), minlength=12)
    assert counts.sum() == 10_000
    # Sampled without replacement, the statistic is 11 * (1 - 5/12) on average; 30 is far beyond it.
    assert ((counts - 10_000 / 12) ** 2 / (10_000 / 12)).sum() < 30


def test_random_draws_anew_with_every_key():
    features = numbered((8, 8))
    run = [reduce(RandomDrop(16), features, key=jax.random.key(k), deterministic=False).tokens for k in (1, 1, 2)]
    np.testing.assert_array_equal(run[0], run[1])
    assert not np.array_equal(run[0], run[2])
    assert not np.array_equal(run[0][0, :, 1], run[0][1, :, 1])  # nor do two images share a subset


def test_random_keeps_the_same_of_every_image_where_nothing_is_to_be_random():
    places = reduce(RandomDrop(16), numbered((8, 8))).tokens[..., 1]
    np.testing.assert_array_equal(places, np.broadcast_to(places[:1], places.shape))


def test_random_drops_masked_features_first():
    rng = np.random.default_rng(0)
    mask = rng.permuted(np.tile(np.arange(64) < 20, (3, 1)), axis=1)
    mask[2] = np.arange(64) < 10  # fewer than are kept
    for deterministic in (True, False):
        out = reduce(RandomDrop(16), numbered((8, 8), mask=mask), key=jax.random.key(0), deterministic=deterministic)
        np.testing.assert_array_equal(out.mask.sum(1), [16, 16, 10])
        places = np.asarray(out.tokens)[..., 1].astype(int)
        np.testing.assert_array_equal(out.mask, np.take_along_axis(mask, places, axis=1))


@pytest.mark.parametrize(
    ("budget", "grid", "size", "expected"),
    [
        (16, (8, 8), (48, 48), (24, 24)),
        (8, (8, 8), (48, 48), (12, 24)),  # 2x4 and 4x2 are equally near: the flatter wins
        (6, (8, 8), (48, 48), (12, 18)),
        (8, (4, 8), (56, 112), (28, 56)),
        (64, (8, 8), (48, 48), (48, 48)),
    ],
)
def test_downsample_image_shrinks_each_side_with_its_patches(budget, grid, size, expected):
    reducer = DownsampleImage(**DownsampleImage.for_budget(budget, grid, 0))
    assert reducer.image_size(*size, grid) == expected


def test_downsample_image_passes_features_on():
    features = numbered((2, 4), mask=np.arange(24).reshape(3, 8) % 5 > 0)
    out = reduce(DownsampleImage((2, 4)), features)
    np.testing.assert_array_equal(out.tokens, features.tokens)
    np.testing.assert_array_equal(out.mask, features.mask)


def test_every_reducer_of_the_folder_is_in_the_table():
    listed = [cls for cls in REDUCERS.values() if cls is not None]
    unlisted = [cls for cls in defined(reducers, "reduced_grid") if cls not in listed]
    missing = [cls.__name__ for cls in unlisted if not any(issubclass(kind, cls) for kind in listed)]
    assert not missing, f"add {missing} to REDUCERS in vlm_jax/reducers/__init__.py"
    assert [kind for kind, cls in REDUCERS.items() if cls is None] == ["none"]
    assert all(cls.kind == kind for kind, cls in REDUCERS.items() if cls is not None)
