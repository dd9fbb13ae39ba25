"""TokenPacker: a coarse map of queries, each of which attends to its own square of fine features."""

import dataclasses

import jax.numpy as jnp
from flax import linen as nn

from vlm_jax import axes
from vlm_jax.connectors.solving import WholeSquares
from vlm_jax.layers.attention import Context, MultiHeadAttention
from vlm_jax.layers.dense import Dense
from vlm_jax.layers.mlp import Mlp
from vlm_jax.layers.norm import Norm
from vlm_jax.layers.resize import resize
from vlm_jax.layers.squares import in_rows, masked, squares
from vlm_jax.ranges import NonNegative, Side, Size
from vlm_jax.types import Dtype, VisualFeatures, VisualTokens


class TokenPacker(WholeSquares, nn.Module):
    """Bilinear down-sampling, attention from each point to its square, linear, GELU, linear.

    Keys and values are computed from `VisualFeatures.levels`, concatenated hidden states of the encoder, where
    it returns them (`levels` of its config; 12, 16, 22 and 23 of a CLIP with 24 blocks in the release), else
    from the features. Masked features have weight 0 in the down-sampling and in the attention.

    Attributes:
      features: the decoder's width D.
      factor: side of a square in features, solved from the budget; divides rows and columns.
      num_heads: attention heads; max(D_v // 128, 1) when None, as in the release.
      norm_epsilon: epsilon of every LayerNorm.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Source: Li et al. 2024 (TokenPacker), section 3.2; TokenPacker, multimodal_projector/builder.py.
    """

    kind = "token_packer"

    features: Size
    factor: Side
    num_heads: Size | None = None
    norm_epsilon: NonNegative = 1e-6
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, features: VisualFeatures, *, deterministic: bool) -> VisualTokens:
        del deterministic  # no randomness
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        count = self.num_tokens(in_rows(features, "token_packer").grid)
        batch, _, width = features.tokens.shape

        def norm(name, x):
            return Norm("layer", self.norm_epsilon, name=name, **settings)(x)

        query = Dense(width, (axes.CHANNELS_IN, axes.EMBED), use_bias=False, name="query_proj", **settings)
        rows, cols = features.grid
        real = masked(features).reshape(batch, rows, cols, width)
        coarse = resize(real, (rows // self.factor, cols // self.factor), "bilinear")
        # Where some are masked the weights sum to less than 1; the norm compensates for it.
        points = norm("query_norm", query(coarse.reshape(batch, count, width)))
        levels = features if features.levels is None else dataclasses.replace(features, tokens=features.levels)
        fine, mask = squares(levels, self.factor, "token_packer")
        fine = fine.reshape(batch * count, self.factor**2, -1)
        keys, values = (
            norm(f"{name}_norm", Mlp(width, "gelu", out_dim=width, name=f"{name}_mlp", **settings)(fine))
            for name in ("key", "value")
        )
        segments = mask.reshape(batch * count, -1).astype(jnp.int32)
        context = Context("full", jnp.ones((batch * count, 1), jnp.int32), segments)
        attention = MultiHeadAttention(self.num_heads or max(width // 128, 1), name="attention", **settings)
        packed, _ = attention(points.reshape(batch * count, 1, width), context, inputs_k=keys, inputs_v=values)
        mlp = Mlp(self.features, "gelu", out_dim=self.features, name="mlp", **settings)
        return VisualTokens(mlp(packed.reshape(batch, count, width)), mask.any(-1))
