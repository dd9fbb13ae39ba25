"""Adaptive average pooling to a chosen grid, then an MLP."""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from vlm_jax.connectors.solving import OutputGrid
from vlm_jax.layers.mlp import Mlp
from vlm_jax.layers.norm import Norm, NormKind
from vlm_jax.layers.squares import in_rows
from vlm_jax.ranges import Depth, NonNegative, Size
from vlm_jax.types import Dtype, Grid, VisualFeatures, VisualTokens


def averaging_matrix(size_in: int, size_out: int) -> np.ndarray:
    """[size_out, size_in] float32 of zeros and ones: which inputs each output averages.

    Output i averages inputs floor(i * in / out) to ceil((i + 1) * in / out) - 1, so that windows
    overlap where the sizes do not divide.

    Source: PyTorch, AdaptiveAvgPool2d.
    """
    index = np.arange(size_out)
    start, stop = index * size_in // size_out, -(-(index + 1) * size_in // size_out)
    columns = np.arange(size_in)
    return ((columns >= start[:, None]) & (columns < stop[:, None])).astype(np.float32)


def average_windows(
    x: Float[Array, "B N D"], features: VisualFeatures, output_grid: Grid, kind: str
) -> tuple[Float[Array, "B r c D"], Bool[Array, "B r c"]]:
    """Means of the unmasked values in the windows of `output_grid`, and which windows have any; else 0.

    Args:
      x: values in the order of `features`.
      features: provides the mask and the grid.
      output_grid: rows and columns of windows; windows repeat where it is larger than the grid.
      kind: name of the connector for errors.

    Raises:
      InfeasibleGrid: the features are not in row-major order.
    """
    grid = in_rows(features, kind).grid
    rows, cols = (averaging_matrix(*sizes) for sizes in zip(grid, output_grid, strict=True))
    mask = features.mask.reshape(-1, *grid)
    x = jnp.where(features.mask[..., None], x, 0).reshape(*mask.shape, -1)
    total = jnp.einsum("ir,jc,brcd->bijd", rows.astype(x.dtype), cols.astype(x.dtype), x)
    count = jnp.einsum("ir,jc,brc->bij", rows, cols, mask.astype(jnp.float32))
    return total / jnp.maximum(count, 1)[..., None].astype(x.dtype), count > 0


class Pool(OutputGrid, nn.Module):
    """Averages the unmasked features of every window of the grid, then linear, GELU, linear.

    | release | fields |
    |---|---|
    | Gemma 3 | norm `rms_from_one`, depth 1, no use_bias |

    Attributes:
      features: the decoder's width D.
      output_grid: rows and columns of the tokens, solved from the budget.
      norm: kind of a norm of the means, or None.
      norm_epsilon: its epsilon.
      depth: linear layers of the MLP.
      use_bias: biases on them.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Source: Yao et al. 2024 (DeCo), section 3.2; averaging as PyTorch's AdaptiveAvgPool2d; transformers, models/gemma3,
    Gemma3MultiModalProjector.
    """

    kind = "pool"

    features: Size
    output_grid: tuple[Size, Size]
    norm: NormKind | None = None
    norm_epsilon: NonNegative = 1e-6
    depth: Depth = 2
    use_bias: bool = True
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, features: VisualFeatures, *, deterministic: bool) -> VisualTokens:
        del deterministic  # no randomness
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        mean, mask = average_windows(features.tokens, features, self.output_grid, self.kind)
        batch, *_, width = mean.shape
        x = mean.reshape(batch, -1, width)
        if self.norm is not None:
            x = Norm(self.norm, self.norm_epsilon, name="norm", **settings)(x)
        shape = {"out_dim": self.features, "use_bias": self.use_bias, "depth": self.depth}
        tokens = Mlp(self.features, "gelu", name="mlp", **shape, **settings)(x)
        return VisualTokens(tokens, mask.reshape(batch, -1))
