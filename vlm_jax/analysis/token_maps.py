"""Influence of patches on visual tokens, for any connector and any reducer before it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure

from vlm_jax.types import Array, Grid, Params, VisualFeatures, VisualTokens

Connect = Callable[[VisualFeatures], VisualTokens]


def connection(
    connector: nn.Module,
    params: Params,
    reducer: nn.Module | None = None,
    reducer_params: Params | None = None,
) -> Connect:
    """The deterministic function from features to tokens, with an optional reducer."""

    def connect(features: VisualFeatures) -> VisualTokens:
        if reducer is not None:
            reduced = reducer.apply({"params": reducer_params or {}}, features, deterministic=True)
            features = cast(VisualFeatures, reduced)
        return cast(VisualTokens, connector.apply({"params": params}, features, deterministic=True))

    return connect


def token_maps(
    connect: Connect,
    features: VisualFeatures,
    *,
    num_projections: int | None = None,
    seed: int = 0,
    tokens_at_once: int = 8,
) -> Float[Array, "B M N"]:
    """The influence of each feature n on each token m, normalised to sum to 1 per token.

    The influence of n on m is the Frobenius norm of the Jacobian d token_m / d feature_n [D, D_v] at
    these features; a row of influences is divided by its sum. So a token that is a fixed linear map of
    a weighted mean of features shows the weights. The selection of a connector or reducer (features kept,
    dropped or merged) is treated as constant, since it has no derivative.

    Random projection: the squared norm of a block is the sum of the squared norms of its products
    with any orthonormal basis of the D outputs. The sum over P random ones, times D / P, has the same
    expectation; the normalised roots have an error of order 1 / P, which is 0 at P = D.

    Args:
      connect: function from features to tokens, as from `connection`; images must be independent.
      features: of one or several images; `hidden` and `pooled` are constant.
      num_projections: P, 1 to D; None computes all D outputs. Each costs one backward pass per token.
      seed: seed of the projections.
      tokens_at_once: backward passes that run in parallel; memory grows with it.

    Returns:
      float32, each row the map of one token, which sums to 1; 0 for a masked token, for one
      independent of all features, and for a feature without influence.

    Raises:
      ValueError: num_projections is out of range.

    Source: Luo et al. 2016 (effective receptive fields), section 2, who define the influence of an input as the
    derivative of the output; here both are vectors, hence the norm. Hutchinson 1990
    for the estimate, with orthonormal instead of independent directions.
    """
    width = jax.eval_shape(connect, features).tokens.shape[-1]
    if num_projections is None:
        directions = jnp.eye(width)
    elif 1 <= num_projections <= width:
        drawn = jax.random.normal(jax.random.key(seed), (width, num_projections))
        directions = jnp.linalg.qr(drawn)[0].T * (width / num_projections) ** 0.5
    else:
        raise ValueError(f"expected 1 to {width} projections of tokens of width {width}, got {num_projections}")

    @jax.jit
    def run(features: VisualFeatures, directions: jax.Array) -> jax.Array:
        def forward(tokens):
            result = connect(dataclasses.replace(features, tokens=tokens))
            return result.tokens, result.mask

        tokens, pull, mask = jax.vjp(forward, features.tokens, has_aux=True)

        def squared_norms(token):
            def add(total, direction):
                here = jax.nn.one_hot(token, tokens.shape[1])[None, :, None] * direction[None, None, :]
                (gradient,) = pull(jnp.broadcast_to(here, tokens.shape).astype(tokens.dtype))
                return total + jnp.square(gradient.astype(jnp.float32)).sum(-1), None

            return jax.lax.scan(add, jnp.zeros(features.mask.shape), directions)[0]

        squares = jax.lax.map(squared_norms, jnp.arange(tokens.shape[1]), batch_size=tokens_at_once)
        influence = jnp.where(mask[..., None], jnp.sqrt(squares).transpose(1, 0, 2), 0)
        total = influence.sum(-1, keepdims=True)
        return influence / jnp.where(total > 0, total, 1)

    return run(features, directions)


def draw_token_maps(
    image: UInt8[np.ndarray, "height width channels"],
    maps: Float[Array, "M N"],
    grid: Grid,
    *,
    patch_size: int | None = None,
    tokens: Sequence[int] | None = None,
) -> Figure:
    """The image once per token, with the token's map overlaid in red.

    The colour scale ends at the largest share of each token, which is in its title; a masked
    token has an empty map.

    Args:
      image: the image, in grey or in colour.
      maps: the maps of one image's tokens, from `token_maps`.
      grid: rows and columns of the N features.
      patch_size: side of a patch in pixels, where the image is not a whole number of patches; None
        stretches the grid over the image.
      tokens: which tokens to draw; all when None.

    Raises:
      ValueError: the maps are not of that grid.
    """
    maps = np.asarray(maps)
    rows, cols = grid
    if maps.shape[1] != rows * cols:
        raise ValueError(
            f"expected maps over the {rows * cols} features of a {rows}x{cols} grid, got {maps.shape[1]}; "
            "pass the grid of the features that token_maps was called with"
        )
    height, width = image.shape[:2]
    bottom, right = (height, width) if patch_size is None else (rows * patch_size, cols * patch_size)
    chosen = range(len(maps)) if tokens is None else tokens
    across = max(1, round(float(np.sqrt(len(chosen) * height / width))))
    down = -(-len(chosen) // across)
    side = min(2.2, 14.0 / max(across, down))
    figure = Figure(figsize=(side * across, (side * height / width + 0.22) * down + 0.4), layout="constrained")
    figure.suptitle("Influence of patches on each visual token (token, largest share)", fontsize=9)
    page = 0.5 + image.mean(-1) / 510  # a pale grey image, so that the map's colour is visible
    for place, token in enumerate(chosen):
        shares = maps[token].reshape(grid)
        peak = float(shares.max())
        axes = figure.add_subplot(down, across, place + 1)
        axes.imshow(page, cmap="gray", vmin=0, vmax=1)
        axes.imshow(
            shares,
            cmap="Reds",
            vmin=-(peak or 1.0),  # from the middle of the colour map, without its dark end
            vmax=1.5 * (peak or 1.0),
            alpha=0.65 * shares / (peak or 1.0),
            extent=(-0.5, right - 0.5, bottom - 0.5, -0.5),
            interpolation="nearest",
        )
        axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
        axes.set_title(f"{token}: {peak:.0%}", fontsize=7, pad=2)
        axes.set_xticks([])
        axes.set_yticks([])
    return figure
