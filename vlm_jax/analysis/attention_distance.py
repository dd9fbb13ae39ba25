"""Mean attention distance of the heads of a vision transformer, in pixels."""

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from vlm_jax.types import Array, Grid


def patch_distances(grid: Grid, patch_size: int) -> Float[np.ndarray, "N N"]:
    """Euclidean distances in pixels between the centres of all patches, in row-major order."""
    rows, cols = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    return patch_size * np.hypot(rows[:, None] - rows[None, :], cols[:, None] - cols[None, :])


def mean_attention_distance(
    weights: Float[Array, "L B heads T T"], grid: Grid, patch_size: int, *, renormalise: bool
) -> Float[np.ndarray, "L heads"]:
    """Distance from a patch to the patches it attends to, weighted by attention, in pixels.

    It is averaged over all query patches and all images. Tokens before the patches (a class token,
    registers) are dropped both as queries and as keys. The paper does not say whether the remaining
    weights are renormalised to sum to 1.

    Args:
      weights: attention after the softmax, as `probe.attention_weights` gives it; the last
        rows * cols tokens are the patches in row-major order.
      grid: rows and columns of patches.
      patch_size: side of a patch in pixels.
      renormalise: divides each patch's weights by their sum over the patches; without it, attention
        to a dropped token counts as distance 0.

    Returns:
      float32, by layer and head.

    Raises:
      ValueError: fewer tokens than patches.

    Source: Dosovitskiy et al. 2021, appendix D.7 and figure 11 (figure 7, right, of the text).
    """
    count = grid[0] * grid[1]
    weights = np.asarray(weights)
    if weights.shape[-1] < count:
        raise ValueError(
            f"expected at least {count} tokens for a {grid[0]}x{grid[1]} grid, got weights of shape "
            f"{weights.shape}; pass the grid of the images that the weights were computed from"
        )
    weights = weights[..., -count:, -count:]
    distances = patch_distances(grid, patch_size)
    reached = np.einsum("lbhqk,qk->lbhq", weights, distances)
    if renormalise:
        reached = reached / np.maximum(weights.sum(-1, dtype=np.float64), np.finfo(np.float32).tiny)
    return reached.mean(axis=(1, 3)).astype(np.float32)


def draw_attention_distance(distances: Float[Array, "L heads"], title: str) -> Figure:
    """A plot of all heads by layer, with a line through the means of the layers."""
    distances = np.asarray(distances)
    depth, heads = distances.shape
    figure = Figure(figsize=(max(4.0, 1.5 + 0.35 * depth), 3.6), layout="constrained")
    axes = figure.add_subplot()
    layers = np.arange(1, depth + 1)
    axes.plot(layers, distances.mean(1), color="0.6", linewidth=1.5, label="mean of the heads", zorder=1)
    axes.scatter(np.repeat(layers, heads), distances.ravel(), s=18, color="tab:blue", label="one head", zorder=2)
    axes.set(xlabel="layer", ylabel="mean attention distance (pixels)", title=title)
    axes.set_ylim(0, 1.05 * float(distances.max()) or 1.0)
    axes.set_xticks(layers[:: max(1, depth // 12)])
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="best")
    return figure
