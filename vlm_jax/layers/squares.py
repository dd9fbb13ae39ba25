"""Squares of neighbouring features, wherever in the sequence they lie."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vlm_jax.budget import InfeasibleGrid
from vlm_jax.types import VisualFeatures


def masked(features: VisualFeatures) -> Float[Array, "B N D"]:
    """The features, zero where there is none: even 0 times NaN would be NaN."""
    return jnp.where(features.mask[..., None], features.tokens, 0)


def squares(features: VisualFeatures, side: int, kind: str) -> tuple[Float[Array, "B M S D"], Bool[Array, "B M S"]]:
    """The S = side * side neighbours of every square, row by row, and which are real; squares in row-major order.

    Zeros complete the squares at the bottom and the right of a grid that `side` does not divide, and
    stand for masked features.

    Args:
      features: in rows of their grid or in blocks of neighbours.
      side: rows and columns of a square.
      kind: names the connector in the message.

    Raises:
      InfeasibleGrid: the features lie in blocks that cannot be cut into such squares.
    """
    block = features.block
    if block > 1 and block % side:
        raise InfeasibleGrid(
            f"{kind}: features in blocks of {block}x{block} on a {features.grid[0]}x{features.grid[1]} grid cannot "
            f"be cut into squares of {side}x{side}; pack patches with a merge_size that is a multiple of {side}"
        )
    tile = features.grid if block == 1 else (block, block)

    def cut(x: jax.Array) -> jax.Array:
        batch, length, width = x.shape
        rows, cols = (-(-size // side) for size in tile)
        x = x.reshape(-1, *tile, width)
        x = jnp.pad(x, ((0, 0), (0, rows * side - tile[0]), (0, cols * side - tile[1]), (0, 0)))
        x = x.reshape(-1, rows, side, cols, side, width).swapaxes(2, 3)
        return x.reshape(batch, length // (tile[0] * tile[1]) * rows * cols, side * side, width)

    return cut(masked(features)), cut(features.mask[..., None])[..., 0]


def in_rows(features: VisualFeatures, kind: str) -> VisualFeatures:
    """The features, or a refusal where they are not in row-major order of one grid.

    Raises:
      InfeasibleGrid: they lie in blocks, so that the places of a packed image are not known.
    """
    if features.block != 1:
        raise InfeasibleGrid(
            f"{kind}: features come in blocks of {features.block}x{features.block} on a "
            f"{features.grid[0]}x{features.grid[1]} grid, as those of packed images do, and it needs the rows of one "
            "image; use a connector of squares (concat, pixel_shuffle, visual_vocabulary)"
        )
    return features
