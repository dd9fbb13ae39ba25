"""Two encoders that can be written down, combined in every way; official numbers are in golden."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax.encoders.hybrid import Hybrid
from vlm_jax.layers.resize import resize
from vlm_jax.types import VisualFeatures


class Pixels(nn.Module):
    """Every `step`-th pixel, its channels repeated `copies` times."""

    step: int
    copies: int = 1
    num_blocks = 0

    @property
    def features(self):
        return 3 * self.copies

    def grid(self, height, width):
        return height // self.step, width // self.step

    def __call__(self, images):
        x = jnp.tile(images[:, :: self.step, :: self.step], self.copies)
        x = x.reshape(len(x), -1, self.features)
        return VisualFeatures(x, jnp.ones(x.shape[:2], bool), self.grid(*images.shape[1:3]))


IMAGES = jnp.asarray(np.random.default_rng(0).uniform(size=(2, 8, 12, 3)), jnp.float32)
HIGH = Pixels(4).apply({}, IMAGES).tokens
LOW = Pixels(2).apply({}, resize(IMAGES, (4, 6), "bilinear_antialias")).tokens


@pytest.mark.parametrize(
    ("combine", "expected", "grid", "features"),
    [
        ("feature", np.concatenate([HIGH, LOW], -1), (2, 3), 6),
        ("sequence", np.concatenate([HIGH, LOW], 1), (1, 12), 3),
        ("sum", HIGH + LOW, (2, 3), 3),
    ],
)
def test_features_are_combined(combine, expected, grid, features):
    module = Hybrid(Pixels(4), Pixels(2), low_size=4, combine=combine)
    out = module.apply({}, IMAGES)
    np.testing.assert_allclose(out.tokens, expected, atol=1e-6)
    assert out.grid == module.grid(8, 12) == grid
    assert module.features == features and out.mask.shape == expected.shape[:2]
    assert out.first_dim == (3 if combine == "feature" else None)


def test_a_tuple_holds_both_whatever_their_sizes():
    module = Hybrid(Pixels(4), Pixels(1, copies=2), low_size=4, combine="tuple")
    high, low = module.apply({}, IMAGES)
    np.testing.assert_array_equal(high.tokens, HIGH)
    assert high.grid == module.grid(8, 12) == (2, 3) and low.grid == (4, 6) and module.features == 9


def test_each_encoder_has_its_own_statistics():
    high, low = ((0.5, 0.25, 0.1), (0.5, 0.2, 0.3)), ((0.1, 0.2, 0.3), (2.0, 1.0, 0.5))
    module = Hybrid(Pixels(4), Pixels(2), 4, "tuple", high_statistics=high, low_statistics=low)
    for out, plain, (mean, std) in zip(module.apply({}, IMAGES), (HIGH, LOW), (high, low), strict=True):
        np.testing.assert_allclose(out.tokens, (np.asarray(plain) - np.array(mean)) / np.array(std), atol=1e-5)


@pytest.mark.parametrize(("size", "expected"), [((8, 12), (4, 6)), ((15, 10), (6, 4)), ((7, 16), (4, 9))])
def test_the_shorter_side_of_the_small_image_is_given(size, expected):
    assert Hybrid(Pixels(1), Pixels(1), low_size=4, combine="tuple").low_image_size(*size) == expected


@pytest.mark.parametrize(
    ("combine", "low", "message"),
    [
        ("feature", Pixels(1), r"needs equal grids, got \(2, 3\) \(high\) and \(4, 6\) \(low\)"),
        ("sum", Pixels(1), "needs equal grids"),
        ("sum", Pixels(2, copies=2), r"needs equal widths, got 3 \(high\) and 6 \(low\)"),
        ("sequence", Pixels(2, copies=2), "needs equal widths"),
    ],
)
def test_encoders_that_do_not_fit_are_named(combine, low, message):
    module = Hybrid(Pixels(4), low, low_size=4, combine=combine)
    with pytest.raises(ValueError, match=message):
        module.grid(8, 12)
    with pytest.raises(ValueError, match=message):
        module.apply({}, IMAGES)


def test_an_unknown_way_to_combine_is_refused():
    with pytest.raises(Exception, match="combine"):
        Hybrid(Pixels(4), Pixels(2), low_size=4, combine="mean").apply({}, IMAGES)
