"""An encoder behind another one, whose features are its embedded patches, as in DeepSeek-OCR."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vlm_jax import axes
from vlm_jax.encoders.encoder import ImageEncoder
from vlm_jax.types import Grid, VisualFeatures


class Cascade(nn.Module):
    """Features of both encoders, channels of the second one first: its blocks see what the first one compressed.

    Attributes:
      first: the encoder of the image.
      second: that of the map of its features: a `ViT` of their width with `embeds_patches` off.

    Source: Wei et al. 2025 (DeepSeek-OCR), section 3.2; DeepSeek-OCR, modeling_deepseekocr.py, DeepseekOCRModel.
    """

    first: ImageEncoder
    second: ImageEncoder

    @property
    def features(self) -> int:
        """Width D_v of the features: those of both."""
        return self.second.features + self.first.features

    @property
    def num_blocks(self) -> int:
        """None: each encoder has its own."""
        return 0

    def grid(self, height: int, width: int) -> Grid:
        """Rows and columns of the features of an image of `height` x `width` pixels: those of `first`."""
        return self.first.grid(height, width)

    @nn.compact
    def __call__(self, images: Float[Array, "B height width channels"]) -> VisualFeatures:
        """Encodes normalised pixels."""
        first = self.first(images)
        second = self.second(first.tokens.reshape(len(images), *first.grid, -1))
        tokens = jnp.concatenate([second.tokens, first.tokens], axis=-1)
        tokens = nn.with_logical_constraint(tokens, (axes.BATCH, axes.LENGTH, axes.ACTIVATION_EMBED))
        return VisualFeatures(tokens, first.mask & second.mask, first.grid, first_dim=second.tokens.shape[-1])
