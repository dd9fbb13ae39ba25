"""Normalisations; statistics in float32 whatever the dtype of the input."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vlm_jax import axes
from vlm_jax.layers.dense import named

NormKind = Literal["layer", "rms"]


class Norm(nn.Module):
    """LayerNorm (`layer`, scale and bias) or RMSNorm (`rms`, scale) over the last axis.

    RMSNorm casts to `dtype` before it scales, as Llama's reference does.

    Attributes:
      kind: `layer` or `rms`.
      epsilon: added to the variance.
      axis_name: logical name of the normalised axis.
      dtype: dtype of the output.
      param_dtype: dtype of the stored scale and bias.

    Source: Ba et al. 2016, eq. 4; Zhang and Sennrich 2019, eq. 4.
    """

    kind: NormKind
    epsilon: float
    axis_name: str = axes.NORM
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        shape = (1,) * (x.ndim - 1) + (-1,)
        width = (x.shape[-1],)
        scale = self.param("scale", named(nn.initializers.ones, self.axis_name), width, self.param_dtype)
        x32 = x.astype(jnp.float32)
        if self.kind == "rms":
            variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
            normed = (x32 * jax.lax.rsqrt(variance + self.epsilon)).astype(self.dtype)
            return normed * scale.astype(self.dtype).reshape(shape)
        mean = jnp.mean(x32, axis=-1, keepdims=True)
        centred = x32 - mean
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        bias = self.param("bias", named(nn.initializers.zeros, self.axis_name), width, self.param_dtype)
        y = centred * jax.lax.rsqrt(variance + self.epsilon) * scale.astype(jnp.float32).reshape(shape)
        return (y + bias.astype(jnp.float32).reshape(shape)).astype(self.dtype)
