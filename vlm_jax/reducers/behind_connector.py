"""Reducers on a connector's tokens: image by image, including packed rows of several images."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vlm_jax.budget import InfeasibleGrid
from vlm_jax.layers.local_rows import local_rows, row_by_row
from vlm_jax.layers.squares import squares
from vlm_jax.reducers.reducer import Reducer, pick
from vlm_jax.types import Grid, PackedImages, VisualFeatures, VisualTokens


def token_features(tokens: VisualTokens, features: VisualFeatures, token_grid: Grid | None) -> VisualFeatures:
    """A connector's tokens as input of a reducer, with the mean saliency, keys and embeddings of their blocks.

    Args:
      tokens: output of the connector.
      features: input of the connector.
      token_grid: the connector's `token_grid` for the features' grid; None gives none of these.
    """
    found = VisualFeatures(tokens.tokens, tokens.mask, token_grid or (1, tokens.mask.shape[1]))
    if token_grid is not None and features.guidance is not None:
        image = block_means(dataclasses.replace(features, tokens=features.guidance.image), token_grid)
        found = dataclasses.replace(found, guidance=dataclasses.replace(features.guidance, image=image))
    if token_grid is None or features.saliency is None or features.keys is None:
        return found
    batch, count, heads, dim = features.keys.shape
    values = jnp.concatenate([features.saliency[..., None], features.keys.reshape(batch, count, -1)], axis=-1)
    means = block_means(dataclasses.replace(features, tokens=values), token_grid)
    return dataclasses.replace(
        found, saliency=means[..., 0], keys=means[..., 1:].reshape(batch, means.shape[1], heads, dim)
    )


def block_means(features: VisualFeatures, token_grid: Grid) -> Float[Array, "B M D"]:
    """Mean of the unmasked features of the block that each token represents; 0 where all are masked.

    Blocks are squares where equal squares give the grid, else equal parts of the rows and columns.

    Raises:
      InfeasibleGrid: features are packed, in blocks, and the tokens do not represent squares of them.
    """
    grid, mask = features.grid, features.mask
    side = -(-grid[0] // token_grid[0])
    if token_grid == (-(-grid[0] // side), -(-grid[1] // side)):
        cut, real = squares(features, side, "reducer")
        return cut.sum(axis=2) / jnp.maximum(real.sum(axis=2), 1)[..., None]
    if features.block > 1:
        raise InfeasibleGrid(
            f"a reducer on tokens: {token_grid[0]}x{token_grid[1]} tokens are not squares of packed features on a "
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
    """Applies a reducer to every image of packed rows; the results are concatenated without gaps.

    Args:
      reducer: acts on each image independently of the others in its row.
      features: the tokens of whole rows.
      images: positions of the images in them.
      deterministic: as in `Reducer`.

    Returns:
      Tokens in the order of the images: token m of image i has index m + the num_left of all previous images; `kept`
      are indices in the row.
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
        frames=None if images.frames is None else jnp.asarray(images.frames).reshape(-1),
    )
    left = reducer(apart, deterministic=deterministic)
    if left.kept is None:
        raise ValueError(f"{reducer.kind}: expected a reducer that returns the indices of kept tokens (`kept`)")
    table = np.asarray([reducer.num_left(count) if count else 0 for count in range(longest + 1)])
    most = left.mask.shape[1]
    if table.max() > most:
        raise ValueError(f"{reducer.kind} left {most} tokens of {longest}, but its num_left gives {table.max()}")
    numbers = jnp.asarray(table)[jnp.minimum(counts, longest)]
    total = num_images * most if reducer.rule == "as_released" else min(num_images * most, length)
    first = jnp.cumsum(numbers, axis=1) - numbers
    place = jnp.arange(most)[None, None]
    target = jnp.where(place < numbers[..., None], first[..., None] + place, total).reshape(batch, -1)
    kept = (left.kept.reshape(batch, num_images, most) + starts[..., None]).reshape(batch, -1)

    def in_row(x):
        return laid_out(x.reshape(batch, num_images * most, *x.shape[2:]), target, total=total)

    return VisualTokens(in_row(left.tokens), in_row(left.mask), in_row(kept.reshape(left.kept.shape)))


def kept_levels(left: VisualTokens, levels: Float[Array, "B M F"] | None) -> VisualTokens:
    """The tokens that a reducer left, each with the levels of the token whose position it takes.

    Args:
      left: with `kept`.
      levels: of all tokens before the reducer; None where there are none.

    Raises:
      ValueError: the reducer does not tell which tokens are kept.
    """
    if levels is None:
        return left
    if left.kept is None:
        raise ValueError("tokens with levels: expected a reducer that returns the indices of kept tokens (`kept`)")
    return dataclasses.replace(left, levels=pick(levels, left.kept))


@row_by_row
def laid_out(x: jax.Array, target: Int[Array, "B K"], *, total: int) -> jax.Array:
    """Rows of `total` elements with x[b, k] at index target[b, k]; an index from `total` on is left out."""
    row = jnp.arange(x.shape[0])[:, None]
    return jnp.zeros((x.shape[0], total, *x.shape[2:]), x.dtype).at[row, target].set(x, mode="drop")


def positions_of_kept(
    visual_positions: Int[Array, "B R"] | Int[Array, "B R 3"], kept: Int[Array, "B2 M"], rows: Int[Array, "B T"]
) -> Int[Array, "B T"] | Int[Array, "B T 3"]:
    """The positions before a reducer of the rows of the visual table that each sequence index uses.

    Args:
      visual_positions: of all tokens before the reducer, tile after tile.
      kept: index of each token in its tile, or in the packed row; tiles are concatenated.
      rows: index in the visual table for each sequence index.
    """
    batch = visual_positions.shape[0]
    tiles = kept.shape[0] // batch
    first = jnp.arange(tiles)[None, :, None] * (visual_positions.shape[1] // tiles)
    numbers = (kept.reshape(batch, tiles, -1) + first).reshape(batch, -1)
    (numbers,) = local_rows((numbers,), rows)
    return local_rows((jnp.asarray(visual_positions),), numbers)[0]
