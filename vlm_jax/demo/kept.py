"""Which visual tokens of a prompt's image a reducer keeps."""

from functools import partial

import jax
import numpy as np
from jaxtyping import Float, Int

from vlm_jax.demo.regions import token_boxes
from vlm_jax.encoders.causal_queries import CausalQueries
from vlm_jax.models.vlm import VLM, flat_images
from vlm_jax.processors.mosaic import MosaicViews
from vlm_jax.processors.native import NativeViews
from vlm_jax.processors.tiling import Size
from vlm_jax.processors.views import Tiles
from vlm_jax.sharding.rules import generation_mesh, in_mesh
from vlm_jax.system import System
from vlm_jax.types import Batch, Grid, Params


def kept_boxes(
    full: System, reduced: System, params: Params, batch: Batch, size: Size
) -> Float[np.ndarray, "kept 4"] | None:
    """The parts of a picture that the tokens which a reducer keeps are computed from.

    Args:
      full: the system without the reducer.
      reduced: the system with it.
      params: of both.
      batch: one prompt with one image, of the reduced system.
      size: (height, width) of the picture, in pixels.

    Returns:
      Boxes as of `regions.token_boxes`, without those of padding; a merged token has the box whose position it takes.
      None where there is no reducer, or its tokens are not of one place each: queries, or fewer pixels.
    """
    grids = _grids(full, reduced)
    kept = None if grids is None else kept_tokens(reduced, params, batch)
    if grids is None or kept is None:
        return None
    boxes = token_boxes(full.processor.views, size, *grids)
    found = boxes[kept]
    return found[~np.isnan(found[:, 0])]


def kept_tokens(system: System, params: Params, batch: Batch) -> Int[np.ndarray, "kept"] | None:
    """Indices of the kept tokens among those before the reducer, tile after tile, ascending.

    Of a reducer in the decoder these are the tokens in its last layers; arguments as of `kept_boxes`.
    """
    model, reduction = system.model, system.processor.reduction
    if not isinstance(model, VLM) or model.reducer is None or reduction is None or batch.images is None:
        return None
    mesh = generation_mesh(params)
    if model.reducer.reduces_in == "decoder":
        index = np.asarray(batch.visual_index[0])
        left = np.asarray(in_mesh(_remaining, mesh)(model, params, batch))[0] & (index >= model.num_learned_rows)
        return np.unique(index[left] - model.num_learned_rows)
    kept, mask = in_mesh(_kept, mesh)(model, params, batch)
    if kept is None:
        return None
    count = reduction.before.tile_tokens if isinstance(reduction.before, Tiles) else 0  # packed: of the whole row
    tiles = np.arange(len(kept))[:, None] * count
    return np.unique((np.asarray(kept) + tiles)[np.asarray(mask)])


@partial(jax.jit, static_argnums=0)
def _remaining(model: VLM, params: Params, batch: Batch) -> jax.Array:
    """Whether each position reaches the last layer: hidden states of others are zeros."""
    return (model.apply({"params": params}, batch, method="hidden") != 0).any(axis=-1)  # type: ignore[union-attr]


@partial(jax.jit, static_argnums=0)
def _kept(model: VLM, params: Params, batch: Batch) -> tuple[jax.Array | None, jax.Array]:
    assert batch.images is not None
    images = flat_images(batch.images)
    tokens = model.apply({"params": params}, images, batch.instruction, method="visual_tokens")
    return tokens.kept, tokens.mask  # type: ignore[union-attr]


def _grids(full: System, reduced: System) -> tuple[Grid, Grid] | None:
    """Rows and columns of a tile's features, and of the tokens that the reducer chooses from."""
    model, other = full.model, reduced.model
    assert isinstance(model, VLM) and isinstance(other, VLM) and model.encoder is not None
    views = full.processor.views
    if other.reducer is None or model.connector is None:
        return None
    if isinstance(views, NativeViews):
        return None if views.block_tokens != 1 else ((1, 1), (1, 1))
    if not isinstance(views, Tiles) or (isinstance(views, MosaicViews) and views.mosaic is not None):
        return None
    if isinstance(model.encoder, CausalQueries):
        return None  # the features are in an order that the model learns, not at places of the image
    patches = model.encoder.grid(*views.tile_shape[:2])
    acts_on_features = other.reducer.reduces_in != "decoder" and other.reduce == "features"
    tokens = patches if acts_on_features else model.connector.token_grid(patches)
    return None if tokens is None else (patches, tokens)
