"""Groups features into squares of neighbours, in row-major or block order."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vlm_jax.budget import InfeasibleGrid
from vlm_jax.types import VisualFeatures


def masked(features: VisualFeatures) -> Float[Array, "B N D"]:
    """The features, with zeros where masked, since 0 * NaN is NaN."""
    return jnp.where(features.mask[..., None], features.tokens, 0)


def squares(features: VisualFeatures, side: int, kind: str) -> tuple[Float[Array, "B M S D"], Bool[Array, "B M S"]]:
    """The S = side * side neighbours of every square, row by row, and which are real; squares in row-major order.

    Squares at the bottom and the right of a grid that `side` does not divide are padded with zeros;
    masked features are zeros too.

    Args:
      features: in row-major order of their grid or in blocks of neighbours.
      side: rows and columns of a square.
      kind: names the connector in the message.

    Raises:
      InfeasibleGrid: the features are in blocks that cannot be divided into such squares.
    """
    block = features.block
    if block > 1 and block % side:
        raise InfeasibleGrid(
            f"{kind}: features in blocks of {block}x{block} on a {features.grid[0]}x{features.grid[1]} grid cannot "
            f"be divided into squares of {side}x{side}; pack patches with a merge_size that is a multiple of {side}"
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
    """Returns features in row-major order of one grid, and raises for others.

    Raises:
      InfeasibleGrid: they are in blocks, so that the positions in a packed image are not known.
    """
    if features.block != 1:
        raise InfeasibleGrid(
            f"{kind}: features are in blocks of {features.block}x{features.block} on a "
            f"{features.grid[0]}x{features.grid[1]} grid (packed images), but the connector needs the rows of one "
            "image; use a connector that takes blocks (concat, pixel_shuffle, visual_vocabulary)"
        )
    return features
