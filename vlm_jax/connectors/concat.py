"""Qwen2-VL's patch merger: each feature is normalised, k x k neighbours are concatenated and projected by an MLP."""

import jax.numpy as jnp
from flax import linen as nn

from vlm_jax.connectors.solving import WholeSquares
from vlm_jax.layers.mlp import Mlp
from vlm_jax.layers.norm import Norm, NormKind
from vlm_jax.layers.squares import squares
from vlm_jax.ranges import NonNegative, Side, Size
from vlm_jax.types import Dtype, VisualFeatures, VisualTokens


class Concat(WholeSquares, nn.Module):
    """Norm, concatenation of factor x factor neighbours, linear, GELU, linear; the hidden width is that of the square.

    It takes the features of single images and of packed ones, which are in blocks of neighbours.

    Attributes:
      features: the decoder's width D.
      factor: side of a square in features, solved from the budget; divides rows and columns.
      norm: `layer` in Qwen2-VL, `rms` in Qwen2.5-VL.
      norm_epsilon: its epsilon.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Source: Wang et al. 2024 (Qwen2-VL), section 2.1; transformers, models/qwen2_vl, PatchMerger.
    """

    kind = "concat"

    features: Size
    factor: Side
    norm: NormKind = "layer"
    norm_epsilon: NonNegative = 1e-6
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, features: VisualFeatures, *, deterministic: bool) -> VisualTokens:
        del deterministic  # no randomness
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        count = self.num_tokens(features.grid)
        x, mask = squares(features, self.factor, self.kind)
        x = Norm(self.norm, self.norm_epsilon, name="norm", **settings)(x).reshape(x.shape[0], count, -1)
        tokens = Mlp(x.shape[-1], "gelu", out_dim=self.features, name="mlp", **settings)(x)
        return VisualTokens(tokens, mask.any(-1))
