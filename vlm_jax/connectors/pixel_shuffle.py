"""Connector of InternVL, DeepSeek-VL2 and Idefics3: squares of neighbours become one token of factor**2 the width."""

from typing import Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from vlm_jax.connectors.solving import CoveringSquares
from vlm_jax.layers.mlp import Mlp
from vlm_jax.layers.norm import Norm, NormKind
from vlm_jax.layers.squares import in_rows, squares
from vlm_jax.ranges import Depth, NonNegative, Side, Size
from vlm_jax.types import Dtype, VisualFeatures, VisualTokens

Version = Literal["v1", "v2"]


def shuffle(
    features: VisualFeatures, factor: int, version: Version
) -> tuple[Float[Array, "B M E"], Bool[Array, "B M"]]:
    """Space to depth: features of factor**2 times the width, in (row, column, channel) order, and their mask.

    Raises:
      InfeasibleGrid: the features are in blocks that cannot be divided into squares, or that `v1` cannot transpose.
    """
    x, mask = squares(features, factor, "pixel_shuffle")
    x, mask = x.reshape(*x.shape[:2], -1), mask.any(-1)
    if version == "v1":
        rows, cols = (-(-size // factor) for size in in_rows(features, "pixel_shuffle v1").grid)
        order = jnp.arange(rows * cols).reshape(rows, cols).T.reshape(-1)
        x, mask = x[:, order], mask[:, order]
    return x, mask


class PixelShuffle(CoveringSquares, nn.Module):
    """Space to depth, norm, linear, GELU, linear.

    | release | fields |
    |---|---|
    | InternVL, ps_version `v2` | the defaults |
    | InternVL, ps_version `v1` or none | version `v1` |
    | DeepSeek-VL2 | no norm |
    | Idefics3, SmolVLM | no norm, depth 1, no use_bias |

    Squares at the bottom and the right of a grid that the factor does not divide are padded with zeros, as
    in DeepSeek-VL2, whose 27x27 features give 14x14 tokens; InternVL has no such grids.

    Attributes:
      features: the decoder's width D.
      factor: side of a square in features, solved from the budget.
      version: with `v1` the tokens are in column-major order.
      norm: kind of the norm before the MLP, or None.
      norm_epsilon: its epsilon.
      mlp_dim: hidden width of the MLP; D when None.
      depth: linear layers of the MLP.
      use_bias: biases on them.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Source: Chen et al. 2024 (InternVL 1.5), section 3.1; internvl_chat, modeling_internvl_chat.py; Wu et
    al. 2024 (DeepSeek-VL2), section 2; DeepSeek-VL2, MlpProjector, which unfolds channels first: its
    weights' rows are reordered when they are loaded; Laurençon et al. 2024 (Idefics3), section 4.1; transformers,
    models/idefics3, Idefics3Connector.
    """

    kind = "pixel_shuffle"

    features: Size
    factor: Side
    version: Version = "v2"
    norm: NormKind | None = "layer"
    norm_epsilon: NonNegative = 1e-5
    mlp_dim: Size | None = None
    depth: Depth = 2
    use_bias: bool = True
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, features: VisualFeatures, *, deterministic: bool) -> VisualTokens:
        del deterministic  # no randomness
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x, mask = shuffle(features, self.factor, self.version)
        if self.norm is not None:
            x = Norm(self.norm, self.norm_epsilon, name="norm", **settings)(x)
        mlp = Mlp(
            self.mlp_dim or self.features,
            "gelu",
            out_dim=self.features,
            use_bias=self.use_bias,
            depth=self.depth,
            name="mlp",
            **settings,
        )
        return VisualTokens(mlp(x), mask)
