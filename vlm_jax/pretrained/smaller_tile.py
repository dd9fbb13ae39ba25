"""The tile in fewer pixels that meets a token budget, and the connector that makes its tokens."""

import itertools
from typing import Any, NamedTuple

from flax import linen as nn

from vlm_jax.budget import InfeasibleGrid
from vlm_jax.config import ConfigError, parse_kind
from vlm_jax.connectors.solving import OutputGrid
from vlm_jax.models.vlm import VLM
from vlm_jax.processors.downsampled import TiledViews
from vlm_jax.reducers import REDUCERS
from vlm_jax.reducers.downsample_image import DownsampleImage
from vlm_jax.types import Config, Grid


class SmallerTile(NamedTuple):
    """A tile in fewer pixels.

    Attributes:
      size: (height, width) in pixels.
      token_grid: rows and columns of its tokens.
      connector: gives these, with the parameters of the release.
    """

    size: tuple[int, int]
    token_grid: Grid
    connector: nn.Module


def smaller_tile(model: VLM, views: TiledViews, grid: Grid, tokens: int, section: Config, path: str) -> SmallerTile:
    """The size at which a tile has so many tokens.

    They form a grid of about the aspect of all tokens, and each stands for as many patches as before.

    Args:
      model: with an encoder and a connector.
      views: of the system, in full size.
      grid: rows and columns of the features of a tile in full size.
      tokens: of a tile.
      section: of the reducer `downsample_image`, with its kind.
      path: of the section, for messages.

    Raises:
      InfeasibleBudget: so many tokens form no such grid; names the nearest numbers that do.
      ConfigError: the encoder or the connector gives as many tokens at any size; names which.
    """
    encoder: Any = model.encoder
    connector: Any = model.connector
    full, what = connector.token_grid(grid), f"{path}.kind: downsample_image"
    if full is None:
        raise ConfigError(
            f"{what} gives the connector fewer features, but the queries of {type(connector).__name__} make "
            f"{connector.num_tokens(grid)} tokens all the same; choose another reducer"
        )
    if views.tile_tokens != connector.num_tokens(grid):
        raise ConfigError(
            f"{what} leaves a grid of tokens, and a tile has {views.tile_tokens}, which are more than its "
            f"{full[0]}x{full[1]} grid (a class token is among them); choose another reducer"
        )
    made = parse_kind(REDUCERS, section, path, **DownsampleImage.for_budget(tokens, full, 0))
    wanted: Grid = made.output_grid
    if isinstance(connector, OutputGrid):
        connector = connector.clone(output_grid=wanted)  # type: ignore[attr-defined]
        smaller: Grid = (max(grid[0] * wanted[0] // full[0], 1), max(grid[1] * wanted[1] // full[1], 1))
    else:
        smaller = _largest_grid(connector, wanted, grid, what)
    height, width = (side * part // whole for side, part, whole in zip(views.tile_shape, smaller, grid, strict=False))
    try:
        found = encoder.grid(height, width)
    except ValueError:
        found = None
    if found != smaller:
        given = "no grid" if found is None else f"{found[0]}x{found[1]}"
        raise ConfigError(
            f"{what} needs a {smaller[0]}x{smaller[1]} grid of features, and {type(encoder).__name__} gives {given} of "
            f"{height}x{width} pixels; choose another reducer"
        )
    return SmallerTile((height, width), wanted, connector)


def _largest_grid(connector: Any, wanted: Grid, grid: Grid, what: str) -> Grid:
    """The most rows and columns of features inside `grid` of which a connector makes `wanted` tokens."""

    def makes_them(smaller: Grid) -> bool:
        try:
            return connector.token_grid(smaller) == wanted and connector.num_tokens(smaller) == wanted[0] * wanted[1]
        except InfeasibleGrid:
            return False

    every = itertools.product(range(1, grid[0] + 1), range(1, grid[1] + 1))
    if found := [smaller for smaller in every if makes_them(smaller)]:
        return max(found)
    raise ConfigError(
        f"{what} leaves no grid inside {grid[0]}x{grid[1]} of which {type(connector).__name__} makes "
        f"{wanted[0]}x{wanted[1]} tokens; choose another reducer"
    )
