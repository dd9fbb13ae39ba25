"""What training-free reducers keep of an encoder's features, or of a release's visual tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Float, Int, UInt8
from matplotlib.figure import Figure

from vlm_jax.config import ConfigError, choose, parse
from vlm_jax.pretrained.pretrained import Pretrained
from vlm_jax.reducers import REDUCERS
from vlm_jax.reducers.reducer import Reducer
from vlm_jax.types import Array, Config, Grid, Params, VisualFeatures

# Reducers that choose among features or tokens; the others need a prompt or its question, or change the image.
CHOOSING: dict[str, type[Reducer]] = {
    kind: found
    for kind, found in REDUCERS.items()
    if found is not None and found.reduces_in != "decoder" and found.guided_by is None and kind != "downsample_image"
}


class Kept(NamedTuple):
    """What one reducer keeps of one image.

    Attributes:
      reducer: its kind.
      index: places of the kept features, or of one member of each merged one, in row-major order of `grid`.
      grid: rows and columns that the places count.
    """

    reducer: str
    index: Int[np.ndarray, " K"]
    grid: Grid


def reduced_features(
    encoder: nn.Module,
    params: Params,
    images: Float[Array, "B height width channels"],
    kind: str,
    budget: int,
    *,
    settings: Config | None = None,
    key: Array | None = None,
) -> VisualFeatures:
    """The features that a reducer leaves of an encoder's, without a connector.

    Args:
      encoder: of images of one size.
      params: its parameters, boxed or not; those of the encoder without the reducer.
      images: normalised pixels.
      kind: a key of `CHOOSING`.
      budget: features to leave of each image.
      settings: fields of the reducer.
      key: of what `random` draws, another subset for each image; its fixed one without.

    Raises:
      ConfigError: unknown kind or settings, or an encoder without a field that the reducer needs.
      InfeasibleBudget: the budget cannot be met.
    """
    reducer_class = choose(CHOOSING, kind, "reducer")
    depth = getattr(encoder, "num_blocks", 0)
    solved = reducer_class.for_budget(budget, encoder.grid(*images.shape[1:3]), depth)
    reducer = parse(reducer_class, dict(settings or {}), "reducer", **solved)
    fields = reducer.required_fields().get("encoder", {})
    if missing := [name for name in fields if not hasattr(encoder, name)]:
        raise ConfigError(f"{kind} needs {', '.join(missing)} of an encoder, which {type(encoder).__name__} lacks")
    encoder = encoder.clone(**fields)

    @jax.jit
    def run(params: Params, images: jax.Array) -> VisualFeatures:
        features = encoder.apply({"params": params}, images)
        drawn = {} if key is None else {"rngs": {"reduce": key}}
        return reducer.apply({}, features, deterministic=key is None, **drawn)

    return run(nn.meta.unbox(params), jnp.asarray(images))


def kept_of_tower(
    encoder: nn.Module, params: Params, image: Float[Array, "1 height width channels"], kind: str, budget: int
) -> Kept:
    """What a reducer keeps of an encoder's features of one image; arguments as of `reduced_features`."""
    found = reduced_features(encoder, params, image, kind, budget)
    return Kept(kind, np.asarray(found.kept)[0], encoder.grid(*image.shape[1:3]))


def kept_of_release(
    model: Pretrained, image: Float[Array, "1 height width channels"], kind: str, budget: int
) -> Kept | None:
    """What a reducer keeps of a vision-language model's visual tokens of one tile.

    Args:
      model: with an encoder, a connector and a decoder.
      image: normalised pixels of a tile.
      kind: a key of `CHOOSING`.
      budget: tokens to keep of a tile.

    Returns:
      None where tokens have no place in the image, as those of learned queries.

    Raises:
      ConfigError, InfeasibleBudget: as `Pretrained.with_budget`, or an unknown kind.
    """
    choose(CHOOSING, kind, "reducer")
    module = model.module
    grid = module.connector.token_grid(module.encoder.grid(*image.shape[1:3]))
    if grid is None:
        return None
    fewer = model.with_budget(budget, reducer=kind)
    run = jax.jit(lambda params, image: fewer.module.apply({"params": params}, image, method="visual_tokens"))
    found = run(fewer.params, jnp.asarray(image))
    index = np.arange(grid[0] * grid[1]) if found.kept is None else np.asarray(found.kept)[0]
    return Kept(kind, index, grid)


def draw_kept(image: UInt8[np.ndarray, "height width channels"], kept: Sequence[Kept]) -> Figure:
    """The image once per reducer; what is not kept is pale."""
    across = min(4, len(kept))
    down = -(-len(kept) // across)
    height, width = image.shape[:2]
    figure = Figure(figsize=(2.6 * across, (2.6 * height / width + 0.3) * down), layout="constrained")
    for place, one in enumerate(kept):
        shown = np.zeros(one.grid[0] * one.grid[1])
        shown[one.index] = 1
        pale = np.full((*one.grid, 4), 1.0)
        pale[..., 3] = 0.85 * (1 - shown.reshape(one.grid))
        axes = figure.add_subplot(down, across, place + 1)
        axes.imshow(image)
        axes.imshow(pale, extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation="nearest")
        axes.set_title(f"{one.reducer}: {len(one.index)} of {shown.size}", fontsize=8, pad=3)
        axes.set_axis_off()
    return figure
