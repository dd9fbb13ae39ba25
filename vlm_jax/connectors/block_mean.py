"""Means of k x k neighbours, a norm and one linear layer: the pooler and the projection of Gemma 4."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlm_jax import axes
from vlm_jax.connectors.solving import WholeSquares
from vlm_jax.layers.dense import Dense, with_axes
from vlm_jax.layers.norm import unit_rms
from vlm_jax.layers.squares import squares
from vlm_jax.ranges import NonNegative, Positive, Side, Size
from vlm_jax.types import Dtype, VisualFeatures, VisualTokens


class BlockMean(WholeSquares, nn.Module):
    """The mean of factor x factor neighbours, an RMSNorm without a scale, and a linear layer without a bias.

    It takes the features of single images and of packed ones, which are in blocks of neighbours. Means are float32.

    Attributes:
      features: the decoder's width D.
      factor: side of a square in features, solved from the budget; divides rows and columns.
      scale: factor of the means.
      standardize: subtracts `shift` from the scaled means and multiplies by `spread`, which are stored for every
        channel and not learned.
      norm_epsilon: epsilon of the norm.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Source: transformers, models/gemma4, Gemma4VisionPooler, Gemma4VisionModel and Gemma4MultimodalEmbedder.
    """

    kind = "block_mean"

    features: Size
    factor: Side
    scale: Positive = 1.0
    standardize: bool = False
    norm_epsilon: NonNegative = 1e-6
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, features: VisualFeatures, *, deterministic: bool) -> VisualTokens:
        del deterministic  # no randomness
        self.num_tokens(features.grid)  # raises for grids that the factor does not divide
        x, mask = squares(features, self.factor, self.kind)
        count = jnp.maximum(mask.sum(-1), 1).astype(jnp.float32)
        x = self.scale * x.astype(jnp.float32).sum(2) / count[..., None]
        if self.standardize:
            named = {"shift": nn.initializers.zeros, "spread": nn.initializers.ones}
            shift, spread = (
                jax.lax.stop_gradient(
                    self.param(name, with_axes(init, axes.NORM), x.shape[-1:], self.param_dtype).astype(jnp.float32)
                )[None, None]
                for name, init in named.items()
            )
            x = (x - shift) * spread
        x = unit_rms(x.astype(self.dtype), self.norm_epsilon)
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        project = Dense(self.features, (axes.CHANNELS_IN, axes.EMBED), use_bias=False, name="project", **settings)
        return VisualTokens(project(x), mask.any(-1))
