"""Normalisations; statistics are in float32 for any input dtype."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vlm_jax import axes
from vlm_jax.layers.dense import with_axes
from vlm_jax.types import Dtype

NormKind = Literal["layer", "rms", "rms_from_one", "rms_float32"]


class Norm(nn.Module):
    """LayerNorm (`layer`, scale and bias) or RMSNorm (`rms`, `rms_from_one`, `rms_float32`, scale) over the last axis.

    RMSNorm casts to `dtype` before it scales, as in Llama's reference code; `rms_float32` scales in float32 and casts
    then, as in Gemma 4's; `rms_from_one` does so by 1 + scale, as in Gemma's before.

    Attributes:
      kind: `layer`, `rms`, `rms_from_one` or `rms_float32`.
      epsilon: added to the variance.
      axis_name: logical name of the normalised axis.
      dtype: dtype of the output.
      param_dtype: dtype of the stored scale and bias.

    Source: Ba et al. 2016, eq. 4; Zhang and Sennrich 2019, eq. 4; google-deepmind/gemma, gemma/gm/nn/_layers.py,
    RMSNorm.
    """

    kind: NormKind
    epsilon: float
    axis_name: str = axes.NORM
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        shape = (1,) * (x.ndim - 1) + (-1,)
        width = (x.shape[-1],)
        init = nn.initializers.zeros if self.kind == "rms_from_one" else nn.initializers.ones
        scale = self.param("scale", with_axes(init, self.axis_name), width, self.param_dtype)
        if self.kind == "rms_from_one":
            return _rms(x, 1 + scale.astype(jnp.float32).reshape(shape), self.epsilon).astype(self.dtype)
        if self.kind == "rms_float32":
            return _rms(x, scale.astype(jnp.float32).reshape(shape), self.epsilon).astype(self.dtype)
        if self.kind == "rms":
            return _rms(x, scale.astype(self.dtype).reshape(shape), self.epsilon)
        bias = self.param("bias", with_axes(nn.initializers.zeros, self.axis_name), width, self.param_dtype)
        scale, bias = (leaf.astype(jnp.float32).reshape(shape) for leaf in (scale, bias))
        return _layer(x, scale, bias, self.epsilon).astype(self.dtype)


def unit_rms(x: Float[Array, "*batch D"], epsilon: float) -> Float[Array, "*batch D"]:
    """RMSNorm over the last axis without a learned scale; computed in float32, returned in x's dtype."""
    return _rms(x, jnp.ones((), jnp.float32), epsilon).astype(x.dtype)


# Both are recomputed in the backward pass, which stores only their input.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(2,))
def _rms(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    x = x.astype(jnp.float32)
    return (x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)).astype(scale.dtype) * scale


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(3,))
def _layer(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    x = x.astype(jnp.float32)
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + epsilon) * scale + bias
