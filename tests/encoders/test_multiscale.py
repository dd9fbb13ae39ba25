"""S² around an encoder whose features can be written down; official numbers are in golden."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax.encoders.multiscale import MultiScale, merge_chessboard, split_chessboard
from vlm_jax.types import VisualFeatures

from ..advice import tried


class Means(nn.Module):
    """The mean of every window of 2x2 pixels; first, the largest pixels of the whole piece.

    Attributes:
      prefix: number of tokens before the grid.
      note: told the shape of the images of every call.
    """

    prefix: int = 0
    note: Callable | None = None
    num_blocks = 0

    @property
    def features(self):
        return 3

    def grid(self, height, width):
        return height // 2, width // 2

    def __call__(self, images):
        if self.note is not None:
            self.note(images.shape)
        grid = self.grid(*images.shape[1:3])
        x = images.reshape(len(images), grid[0], 2, grid[1], 2, 3).mean((2, 4)).reshape(len(images), -1, 3)
        front = jnp.repeat(images.max((1, 2))[:, None], self.prefix, axis=1)
        x = jnp.concatenate([front, x], axis=1)
        return VisualFeatures(x, jnp.ones(x.shape[:2], bool), (1, x.shape[1]) if self.prefix else grid)


def images(height=8, width=8):
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, height, width, 3)), jnp.float32)


def test_pieces_come_in_row_column_image_order_and_go_back():
    x = images(4, 6)
    pieces = split_chessboard(x, (2, 3))
    assert pieces.shape == (12, 2, 2, 3)
    np.testing.assert_array_equal(pieces[2 * 2 + 1], x[1, :2, 4:])
    np.testing.assert_array_equal(merge_chessboard(pieces, (2, 3)), x)
    with pytest.raises(ValueError, match="4x6 pixels cannot be cut into 3x3 equal pieces"):
        split_chessboard(x, (3, 3))


def test_channels_are_joined_on_the_grid_of_one_scale():
    x = jnp.broadcast_to(jnp.arange(2.0)[:, None, None, None], (2, 8, 12, 3))
    for index, grid in ((0, (4, 6)), (1, (8, 12))):
        module = MultiScale(Means(), scales=(1, 2.0), resize_output_to=index)
        out = module.apply({}, x)
        assert out.grid == module.grid(8, 12) == grid and module.features == 6
        assert out.tokens.shape == (2, grid[0] * grid[1], 6) and out.mask.all()
        np.testing.assert_allclose(out.tokens[0], 0, atol=1e-6)
        np.testing.assert_allclose(out.tokens[1], 1, atol=1e-6)


def test_area_pooling_of_the_larger_scale_keeps_its_places():
    x = images()
    out = MultiScale(Means(), scales=(1, 1)).apply({}, x).tokens
    np.testing.assert_array_equal(out[..., :3], out[..., 3:])
    # 24x24 pixels in pieces of 4: the pooled features are means of 6x6 pixels of the enlarged image.
    large = MultiScale(Means(), scales=(), image_sizes=((24, 24),), max_split_size=4)
    small = MultiScale(Means(), scales=(), image_sizes=((8, 8), (24, 24)), max_split_size=4).apply({}, x).tokens
    pooled = large.apply({}, x).tokens.reshape(2, 4, 3, 4, 3, 3).mean((2, 4)).reshape(2, 16, 3)
    np.testing.assert_allclose(small[..., 3:], pooled, atol=1e-6)


def test_tokens_in_front_are_averaged_over_the_pieces():
    x = images()
    out = MultiScale(Means(prefix=2), scales=(1,), max_split_size=4).apply({}, x)
    assert out.grid == (1, 18) and out.tokens.shape == (2, 18, 3)
    expected = split_chessboard(x, (2, 2)).max((1, 2)).reshape(4, 2, 3).mean(0)
    np.testing.assert_allclose(out.tokens[:, 0], expected, atol=1e-6)
    np.testing.assert_array_equal(out.tokens[:, 0], out.tokens[:, 1])
    np.testing.assert_allclose(out.tokens[:, 2:], Means().apply({}, x).tokens, atol=1e-6)


def test_pieces_of_one_size_go_through_the_encoder_together():
    seen = []
    MultiScale(Means(note=seen.append), scales=(1, 2, 3)).apply({}, images())
    assert seen == [(2 * (1 + 4 + 9), 8, 8, 3)]
    seen = []
    MultiScale(Means(note=seen.append), scales=(0.5, 1, 2)).apply({}, images())
    assert seen == [(2, 4, 4, 3), (2 * (1 + 4), 8, 8, 3)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scales": ()}, tried("give either scales or image_sizes, got {()} and {()}")),
        ({"scales": (1,), "image_sizes": ((8, 8),)}, "give either scales or image_sizes"),
        ({"scales": (1, 2), "resize_output_to": 2}, "one of the 2 scales, got 2"),
        (
            {"scales": (), "image_sizes": ((8, 8), (18, 8), (25, 25)), "max_split_size": 8},
            tried(
                "of at most {8}x{8} pixels do not divide every scale: {25x25 pixels in 4x4 pieces}; change the scale or"
            ),
        ),
    ],
)
def test_sizes_that_do_not_fit_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        MultiScale(Means(), **fields).grid(8, 8)
    with pytest.raises(ValueError, match=message):
        MultiScale(Means(), **fields).apply({}, images())


def test_an_empty_image_is_refused():
    with pytest.raises(ValueError, match="0x8 pixels"):
        MultiScale(Means(), scales=(1, 2)).grid(0, 8)


def test_sizes_that_are_given_as_said_fit():
    assert MultiScale(Means(), scales=(1,)).grid(8, 8) == MultiScale(Means(), scales=(), image_sizes=((8, 8),)).grid(
        8, 8
    )
    whole = {"scales": (), "image_sizes": ((8, 8), (16, 8), (24, 24)), "max_split_size": 8}
    assert MultiScale(Means(), **whole).grid(8, 8)
    assert MultiScale(Means(), **{**whole, "image_sizes": ((8, 8), (25, 25)), "max_split_size": 25}).grid(8, 8)
