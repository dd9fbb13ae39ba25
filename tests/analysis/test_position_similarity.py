"""Similarity of position embeddings against sklearn."""

import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_similarity

from vlm_jax.analysis.position_similarity import draw_position_similarity, position_similarity

TABLE = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)


def test_against_sklearn():
    expected = cosine_similarity(TABLE.reshape(12, 5)).reshape(3, 4, 3, 4)
    found = position_similarity(TABLE)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_zero_embedding_is_refused():
    table = TABLE.copy()
    table[1, 2] = 0
    with pytest.raises(ValueError, match=r"row 1, column 2 \(1 of 12 are zero\)"):
        position_similarity(table)


def test_the_figure_has_a_tile_for_every_patch_where_the_patch_is():
    similarity = position_similarity(TABLE)
    axes = draw_position_similarity(similarity).axes[0]
    mosaic = axes.images[0].get_array()
    assert mosaic.shape == (3 * 4 - 1, 4 * 5 - 1)
    for row in range(3):
        for col in range(4):
            tile = mosaic[4 * row : 4 * row + 3, 5 * col : 5 * col + 4]
            np.testing.assert_array_equal(tile, similarity[row, col])
    gaps = np.ma.getmaskarray(mosaic)
    assert gaps[3].all() and gaps[:, 4].all() and gaps.sum() == mosaic.size - 144
    assert axes.images[0].get_clim() == (-1, 1)
    np.testing.assert_array_equal(axes.get_yticks(), [1, 5, 9])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "3", "4"]
