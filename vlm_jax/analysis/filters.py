"""Principal components of the patch embedding filters of a vision transformer."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from vlm_jax.types import Array


class FilterComponents(NamedTuple):
    """Principal components, largest first; float32.

    Attributes:
      components: unit vectors, as images of p x p pixels and c channels.
      singular_values: of the D x (p * p * c) matrix of the filters.
      explained_variance: squared singular values over D - 1 when centred, over D when not.
      explained_share: of the sum of all squared singular values, in [0, 1].
    """

    components: Float[np.ndarray, "k p p c"]
    singular_values: Float[np.ndarray, " k"]
    explained_variance: Float[np.ndarray, " k"]
    explained_share: Float[np.ndarray, " k"]


def filter_components(kernel: Float[Array, "p p c D"], count: int, *, centred: bool = True) -> FilterComponents:
    """The first `count` principal components of the D filters of a first layer.

    The sign of a component is chosen so that its entry of largest magnitude is
    positive.

    Args:
      kernel: the filters, from `probe.first_filters`.
      count: number of components; at most min(D, p * p * c).
      centred: subtracts the mean filter first, as in principal component analysis.

    Raises:
      ValueError: count is out of range.

    Source: Dosovitskiy et al. 2021, section 4.5 and figure 7 (left).
    """
    kernel = np.asarray(kernel, np.float64)
    *shape, num_filters = kernel.shape
    filters = kernel.reshape(-1, num_filters).T
    if not 1 <= count <= min(filters.shape):
        raise ValueError(
            f"expected 1 to {min(filters.shape)} components of {num_filters} filters with "
            f"{filters.shape[1]} entries, got {count}"
        )
    if centred:
        filters = filters - filters.mean(axis=0)
    _, values, components = np.linalg.svd(filters, full_matrices=False)
    largest = np.take_along_axis(components, np.abs(components).argmax(1)[:, None], axis=1)
    components = components * np.where(largest < 0, -1.0, 1.0)
    squares = values**2
    variance = squares / max(num_filters - centred, 1)
    share = squares / max(squares.sum(), np.finfo(np.float64).tiny)
    kept = [x[:count].astype(np.float32) for x in (components, values, variance, share)]
    return FilterComponents(kept[0].reshape(count, *shape), *kept[1:])


def draw_filters(filters: FilterComponents) -> Figure:
    """Every component as an image: grey is 0, and the largest entry of each is at full contrast.

    Three channels are drawn as red, green and blue; for other numbers the mean is drawn in grey.
    """
    pictures = filters.components
    pictures = pictures if pictures.shape[-1] == 3 else pictures.mean(-1, keepdims=True)
    peaks = np.abs(pictures).max(axis=(1, 2, 3), keepdims=True)
    pictures = 0.5 + 0.5 * pictures / np.maximum(peaks, np.finfo(np.float32).tiny)
    cols = min(7, len(pictures))
    rows = -(-len(pictures) // cols)
    figure = Figure(figsize=(0.95 * cols, 1.05 * rows + 0.5), layout="constrained")
    figure.suptitle("Filter components, with explained share", fontsize=10)
    for index, (picture, share) in enumerate(zip(pictures, filters.explained_share, strict=True)):
        axes = figure.add_subplot(rows, cols, index + 1)
        axes.imshow(picture.squeeze(-1) if picture.shape[-1] == 1 else picture, cmap="gray", vmin=0, vmax=1)
        axes.set_title(f"{share:.1%}", fontsize=7, pad=2)
        axes.set_axis_off()
    return figure
