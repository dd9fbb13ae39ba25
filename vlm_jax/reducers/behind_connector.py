"""Reducers on a connector's tokens: image by image, also where several images of any size share a row."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vlm_jax.budget import InfeasibleGrid
from vlm_jax.layers.squares import squares
from vlm_jax.reducers.reducer import Reducer, pick
from vlm_jax.types import Grid, PackedImages, VisualFeatures, VisualTokens


def token_features(tokens: VisualTokens, features: VisualFeatures, token_grid: Grid | None) -> VisualFeatures:
    """A connector's tokens as a reducer takes them, with the mean saliency and the mean keys of their blocks.

    Args:
      tokens: what the connector made of the features.
      features: what it was given.
      token_grid: its `token_grid` of their grid; tokens without places have neither saliency nor keys.
    """
    found = VisualFeatures(tokens.tokens, tokens.mask, token_grid or (1, tokens.mask.shape[1]))
    if token_grid is None or features.saliency is None or features.keys is None:
        return found
    batch, count, heads, dim = features.keys.shape
    values = jnp.concatenate([features.saliency[..., None], features.keys.reshape(batch, count, -1)], axis=-1)
    means = block_means(dataclasses.replace(features, tokens=values), token_grid)
    return dataclasses.replace(
        found, saliency=means[..., 0], keys=means[..., 1:].reshape(batch, means.shape[1], heads, dim)
    )


def block_means(features: VisualFeatures, token_grid: Grid) -> Float[Array, "B M D"]:
    """Mean of the real features of the block that each token stands for; 0 where none is real.

    Blocks are squares where squares of one side give the grid, else equal shares of rows and columns.

    Raises:
      InfeasibleGrid: packed features, which come in blocks, that the tokens are no squares of.
    """
    grid, mask = features.grid, features.mask
    side = -(-grid[0] // token_grid[0])
    if token_grid == (-(-grid[0] // side), -(-grid[1] // side)):
        cut, real = squares(features, side, "reducer")
        return cut.sum(axis=2) / jnp.maximum(real.sum(axis=2), 1)[..., None]
    if features.block > 1:
        raise InfeasibleGrid(
            f"a reducer on tokens: {token_grid[0]}x{token_grid[1]} tokens are no squares of packed features on a "
            f"{grid[0]}x{grid[1]} grid; use a connector of squares (concat, pixel_shuffle, visual_vocabulary)"
        )
    rows, cols = (np.arange(size) * out // size for size, out in zip(grid, token_grid, strict=True))
    place = (rows[:, None] * token_grid[1] + cols[None]).reshape(-1)
    member = jnp.asarray(place[:, None] == np.arange(token_grid[0] * token_grid[1])[None], jnp.float32)
    total = jnp.einsum("nm,bnd->bmd", member, jnp.where(mask[..., None], features.tokens, 0))
    return total / jnp.maximum(mask.astype(jnp.float32) @ member, 1)[..., None]


def reduce_packed(
    reducer: Reducer, features: VisualFeatures, images: PackedImages, *, deterministic: bool
) -> VisualTokens:
    """What a reducer leaves of every image of packed rows, one image behind the other without a gap.

    Args:
      reducer: acts on each image as on any other, whatever shares its row.
      features: the tokens of whole rows.
      images: where the images lie in them.
      deterministic: as in `Reducer`.

    Returns:
      Tokens in the order of the images: token m of image i is number m + num_left of all images before; `kept`
      counts the tokens of the row.
    """
    (batch, length), num_images = features.mask.shape, images.starts.shape[1]
    longest = min(images.longest, length)
    starts, counts = jnp.asarray(images.starts), jnp.asarray(images.counts)
    place = starts[..., None] + jnp.arange(longest)[None, None]
    index = jnp.minimum(place, length - 1).reshape(batch, -1)
    real = jnp.arange(longest)[None, None] < counts[..., None]

    def of_images(x):
        return pick(x, index).reshape(batch * num_images, longest, *x.shape[2:])

    apart = VisualFeatures(
        of_images(features.tokens),
        of_images(features.mask) & real.reshape(-1, longest),
        (1, longest),
        saliency=None if features.saliency is None else of_images(features.saliency),
        keys=None if features.keys is None else of_images(features.keys),
    )
    left = reducer(apart, deterministic=deterministic)
    if left.kept is None:
        raise ValueError(f"{reducer.kind}: expected a reducer that says which tokens it keeps")
    table = np.asarray([reducer.num_left(count) if count else 0 for count in range(longest + 1)])
    most = left.mask.shape[1]
    if table.max() > most:
        raise ValueError(f"{reducer.kind} left {most} tokens of {longest}, but its num_left says {table.max()}")
    numbers = jnp.asarray(table)[jnp.minimum(counts, longest)]
    total = num_images * most if reducer.rule == "as_released" else min(num_images * most, length)
    first = jnp.cumsum(numbers, axis=1) - numbers
    place = jnp.arange(most)[None, None]
    target = jnp.where(place < numbers[..., None], first[..., None] + place, total).reshape(batch, -1)
    kept = (left.kept.reshape(batch, num_images, most) + starts[..., None]).reshape(batch, -1)
    row = jnp.arange(batch)[:, None]

    def in_row(x):
        x = x.reshape(batch, num_images * most, *x.shape[2:])
        return jnp.zeros((batch, total, *x.shape[2:]), x.dtype).at[row, target].set(x, mode="drop")

    return VisualTokens(in_row(left.tokens), in_row(left.mask), in_row(kept.reshape(left.kept.shape)))


def positions_of_kept(
    visual_positions: Int[Array, "B R"] | Int[Array, "B R 3"], kept: Int[Array, "B2 M"], rows: Int[Array, "B T"]
) -> Int[Array, "B T"] | Int[Array, "B T 3"]:
    """Positions that tokens had before a reducer, of the rows of the visual table that stand at each place.

    Args:
      visual_positions: of all tokens before the reducer, tile after tile.
      kept: which of the tokens of its tile, or of the packed row, each token is; tiles lie one after another.
      rows: which token stands at each place.
    """
    batch = visual_positions.shape[0]
    tiles = kept.shape[0] // batch
    first = jnp.arange(tiles)[None, :, None] * (visual_positions.shape[1] // tiles)
    numbers = (kept.reshape(batch, tiles, -1) + first).reshape(batch, -1)
    return pick(jnp.asarray(visual_positions), jnp.take_along_axis(numbers, rows, axis=1))
