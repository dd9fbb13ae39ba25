"""Pooling of the tokens of a sequence to one vector."""

from typing import Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from vlm_jax import axes
from vlm_jax.layers.attention import Context, MultiHeadAttention
from vlm_jax.layers.dense import with_axes
from vlm_jax.layers.mlp import Mlp
from vlm_jax.layers.norm import Norm
from vlm_jax.types import Dtype

Reduction = Literal["first", "last", "mean", "max"]


def reduce_tokens(
    x: Float[Array, "B N D"], kind: Reduction, mask: Bool[Array, "B N"] | None = None
) -> Float[Array, "B D"]:
    """One vector of every sequence.

    Args:
      x: tokens.
      kind: `first` and `last` take that token, `mean` and `max` use all tokens.
      mask: True where a token is real, for `mean` and `max`; None where all are.
    """
    if kind == "first":
        return x[:, 0]
    if kind == "last":
        return x[:, -1]
    if mask is None:
        return x.max(axis=1) if kind == "max" else x.astype(jnp.float32).mean(axis=1).astype(x.dtype)
    real = mask[..., None]
    if kind == "max":
        return jnp.where(real, x, jnp.finfo(x.dtype).min).max(axis=1)
    total = jnp.where(real, x, 0).astype(jnp.float32).sum(axis=1)
    return (total / jnp.maximum(mask.sum(axis=1)[:, None], 1)).astype(x.dtype)


class MapHead(nn.Module):
    """Multi-head attention pooling: one learned query attends to all tokens, then a residual feed-forward.

    Attributes:
      num_heads: attention heads.
      mlp_dim: hidden width of the feed-forward.
      activation: a name of `layers.mlp.ACTIVATIONS`.
      norm_epsilon: epsilon of the LayerNorm.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Source: Lee et al. 2019 (Set Transformer), eq. 11; Zhai et al. 2022 (Scaling ViT), section 2;
    big_vision, models/vit.py, MAPHead.
    """

    num_heads: int
    mlp_dim: int
    activation: str
    norm_epsilon: float
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], mask: Bool[Array, "B N"] | None = None) -> Float[Array, "B D"]:
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init = with_axes(nn.initializers.xavier_uniform(), axes.QUERY, axes.EMBED)
        probe = self.param("probe", init, (1, x.shape[-1]), self.param_dtype).astype(self.dtype)
        probe = jnp.broadcast_to(probe[None], (x.shape[0], *probe.shape))
        context = Context("full")
        if mask is not None:
            context = Context("full", jnp.ones((x.shape[0], 1), jnp.int32), mask.astype(jnp.int32))
        attention = MultiHeadAttention(self.num_heads, name="attention", **settings)
        pooled, _ = attention(probe, context, inputs_k=x)
        mlp = Mlp(self.mlp_dim, self.activation, name="mlp", **settings)
        pooled = pooled + mlp(Norm("layer", self.norm_epsilon, name="norm", **settings)(pooled))
        return pooled[:, 0]
