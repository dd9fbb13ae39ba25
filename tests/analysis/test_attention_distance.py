"""Mean attention distance against loops over pixels, and against cases whose answer is known."""

import math

import numpy as np
import pytest

from vlm_jax.analysis.attention_distance import (
    draw_attention_distance,
    mean_attention_distance,
    patch_distances,
)

from ..advice import tried


def test_distances_are_between_the_centres_of_patches():
    distances = patch_distances((3, 4), 14)
    for query in range(12):
        for key in range(12):
            expected = 14 * math.dist(divmod(query, 4), divmod(key, 4))
            assert distances[query, key] == pytest.approx(expected)


@pytest.mark.parametrize("renormalise", [False, True])
def test_attention_to_oneself_is_at_distance_0(renormalise):
    weights = np.broadcast_to(np.eye(6, dtype=np.float32), (2, 3, 4, 6, 6))
    distance = mean_attention_distance(weights, (2, 3), 16, renormalise=renormalise)
    np.testing.assert_array_equal(distance, np.zeros((2, 4)))


@pytest.mark.parametrize(("grid", "patch_size"), [((2, 2), 8), ((5, 3), 16)])
def test_uniform_attention_gives_the_mean_distance_of_two_patches(grid, patch_size):
    places = [(row, col) for row in range(grid[0]) for col in range(grid[1])]
    expected = patch_size * np.mean([math.dist(a, b) for a in places for b in places])
    weights = np.full((1, 2, 3, len(places), len(places)), 1 / len(places), np.float32)
    distance = mean_attention_distance(weights, grid, patch_size, renormalise=False)
    np.testing.assert_allclose(distance, np.full((1, 3), expected), rtol=1e-6)


def test_tokens_before_the_patches_are_dropped_with_and_without_renormalising():
    # 2 tokens before the 2 patches, which are 10 pixels apart. Patch 0 gives itself 0.1, patch 1 0.3
    # and the rest 0.6; patch 1 gives all to patch 0. What the dropped tokens attend to does not count.
    weights = np.array([[0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0], [0.2, 0.4, 0.1, 0.3], [0, 0, 1.0, 0]])
    weights = weights[None, None, None].astype(np.float32)
    plain = mean_attention_distance(weights, (1, 2), 10, renormalise=False)
    assert plain.item() == pytest.approx((3 + 10) / 2)
    renormalised = mean_attention_distance(weights, (1, 2), 10, renormalise=True)
    assert renormalised.item() == pytest.approx((7.5 + 10) / 2)


def test_images_are_averaged_and_layers_and_heads_are_not():
    weights = np.zeros((2, 2, 2, 2, 2), np.float32)
    weights[..., 0, 0] = weights[..., 1, 1] = 1
    weights[1, 0, 1] = [[0, 1], [1, 0]]  # layer 1, head 1 looks across, in one of two images
    distance = mean_attention_distance(weights, (2, 1), 4, renormalise=True)
    np.testing.assert_allclose(distance, [[0, 0], [0, 2]])


def test_a_patch_without_weight_left_is_finite():
    weights = np.zeros((1, 1, 1, 3, 3), np.float32)
    weights[..., 0] = 1  # all to the class token
    assert mean_attention_distance(weights, (1, 2), 4, renormalise=True).item() == 0


def test_weights_of_another_grid_are_refused():
    weights = np.zeros((1, 1, 1, 3, 3), np.float32)
    with pytest.raises(
        ValueError, match=tried("got weights of shape {(1, 1, 1, 3, 3)}; pass the grid of the images that the weights")
    ):
        mean_attention_distance(weights, (2, 2), 4, renormalise=True)
    assert mean_attention_distance(weights, (1, 2), 4, renormalise=True).shape == (1, 1)


def test_the_figure_has_a_dot_for_every_head_above_its_layer():
    distances = np.arange(6, dtype=np.float32).reshape(3, 2)
    axes = draw_attention_distance(distances, "Here").axes[0]
    dots = axes.collections[0].get_offsets()
    np.testing.assert_array_equal(dots, [[1, 0], [1, 1], [2, 2], [2, 3], [3, 4], [3, 5]])
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[1, 0.5], [2, 2.5], [3, 4.5]])
    assert axes.get_title() == "Here" and "pixels" in axes.get_ylabel()
