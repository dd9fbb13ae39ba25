"""Merges squares of neighbouring tokens between two blocks of a vision transformer, as in MiniCPM-V 4.6."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vlm_jax.layers.attention import Context, MultiHeadAttention
from vlm_jax.layers.mlp import Mlp
from vlm_jax.layers.norm import Norm
from vlm_jax.types import Dtype


class SquareMerger(nn.Module):
    """Attention inside every square, then one token of each: the mean of the square, plus an MLP of all of it.

    Attributes:
      square: tokens of a square.
      num_heads: attention heads.
      mlp_dim: hidden width of the MLP.
      norm_epsilon: epsilon of both norms.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Source: transformers, models/minicpmv4_6, MiniCPMV4_6ViTWindowAttentionMerger.
    """

    square: int
    num_heads: int
    mlp_dim: int
    norm_epsilon: float
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], segment_ids: Int[Array, "B N"]) -> Float[Array, "B M D"]:
        """Merges the tokens.

        Args:
          x: tokens, those of a square after one another.
          segment_ids: of every token; 0 is padding. A square is of one segment.
        """
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = {"kind": "layer", "epsilon": self.norm_epsilon, **settings}
        context = Context("full", segment_ids, segment_ids, block=self.square)
        attend = MultiHeadAttention(self.num_heads, name="attention", **settings)
        x = x + attend(Norm(name="attention_norm", **norm)(x), context)[0]
        batch, length, width = x.shape
        squares = x.reshape(batch, length // self.square, self.square, width)
        joined = squares.reshape(batch, length // self.square, self.square * width)
        mlp = Mlp(self.mlp_dim, "gelu_tanh", out_dim=width, name="mlp", **settings)
        return squares.mean(axis=2) + mlp(Norm(name="mlp_norm", **norm)(joined))
