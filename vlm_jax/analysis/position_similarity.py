"""Cosine similarity of a vision transformer's position embeddings."""

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from vlm_jax.types import Array


def position_similarity(table: Float[Array, "R C D"]) -> Float[np.ndarray, "R C R C"]:
    """Cosine similarity of the embedding at (row, column) with the embedding at every other position.

    Args:
      table: position embeddings of the patches, from `probe.position_embeddings`.

    Returns:
      float32 in [-1, 1]; an embedding's similarity with itself is 1.

    Raises:
      ValueError: an embedding is zero.

    Source: Dosovitskiy et al. 2021, section 4.5 and figure 7 (centre).
    """
    table = np.asarray(table, np.float64)
    norms = np.linalg.norm(table, axis=-1, keepdims=True)
    zero = np.argwhere(norms[..., 0] == 0)
    if zero.size:
        row, col = (int(i) for i in zero[0])
        raise ValueError(
            f"expected nonzero embeddings, got zeros at row {row}, column {col} "
            f"({len(zero)} of {norms.size} are zero); is the table trained?"
        )
    unit = table / norms
    return np.einsum("rcd,ijd->rcij", unit, unit).astype(np.float32)


def draw_position_similarity(similarity: Float[Array, "R C R C"]) -> Figure:
    """A tile for every patch, in the layout of the patches: its similarity with all of them."""
    similarity = np.asarray(similarity)
    rows, cols = similarity.shape[:2]
    # One image with gaps between the tiles: one axis per tile takes minutes on a large grid.
    mosaic = np.full((rows, rows + 1, cols, cols + 1), np.nan, np.float32)
    mosaic[:, :rows, :, :cols] = similarity.transpose(0, 2, 1, 3)
    mosaic = mosaic.reshape(rows * (rows + 1), cols * (cols + 1))[:-1, :-1]
    figure = Figure(figsize=(1.4 + 5.2 * min(1.0, cols / rows), 0.8 + 5.2 * min(1.0, rows / cols)))
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    drawn = axes.imshow(mosaic, vmin=-1, vmax=1, cmap="viridis", interpolation="none")
    for axis, count in ((axes.yaxis, rows), (axes.xaxis, cols)):
        shown = np.arange(0, count, -(-count // 14))
        axis.set_ticks(shown * (count + 1) + (count - 1) / 2, [str(i + 1) for i in shown])
    axes.set(xlabel="patch column", ylabel="patch row", title="Position embedding similarity")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(drawn, ax=axes, label="cosine similarity", shrink=0.8)
    return figure
