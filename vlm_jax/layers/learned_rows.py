"""Learned vectors of the decoder's width inserted among visual tokens: an image newline, a separator."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vlm_jax import axes
from vlm_jax.layers.dense import with_axes
from vlm_jax.types import Dtype


class LearnedRows(nn.Module):
    """One parameter for each name, stacked in the order of the names.

    Attributes:
      names: for example ("image_newline", "view_separator").
      features: the decoder's width D.
      dtype: dtype of the rows.
      param_dtype: dtype of the stored parameters.

    Source: Liu et al. 2024 (LLaVA-NeXT), image_newline; Wu et al. 2024 (DeepSeek-VL2), section 2.
    """

    names: tuple[str, ...]
    features: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self) -> Float[Array, "rows D"]:
        init = with_axes(nn.initializers.normal(self.features**-0.5), axes.EMBED)
        rows = [self.param(name, init, (self.features,), self.param_dtype) for name in self.names]
        return jnp.stack(rows).astype(self.dtype)
