"""A guide: what a reducer that chooses by the question is told about an image and its question."""

import jax.numpy as jnp
from flax import linen as nn

from vlm_jax import axes
from vlm_jax.decoders.text_tower import TextTower
from vlm_jax.layers.dense import Dense
from vlm_jax.layers.norm import Norm
from vlm_jax.ranges import NonNegative
from vlm_jax.types import Dtype, Guidance, Question, VisualFeatures


class Guide(nn.Module):
    """The parts of a CLIP that embed its image tower's patches and texts in one space.

    Patches are embedded as CLIP embeds the class token: the tower's last norm, then the projection, which are applied
    to the features of the layer that the system reads.

    Attributes:
      text: the text tower, with its projection.
      norm_epsilon: epsilon of the image tower's last norm.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Source: Zhang et al. 2025 (CDPruner), section 3.2; multimodal_encoder/clip_encoder.py, forward.
    """

    text: TextTower
    norm_epsilon: NonNegative = 1e-5
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self):
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        width = self.text.projection_dim
        assert width is not None
        self.image_norm = Norm("layer", self.norm_epsilon, **settings)
        self.image_projection = Dense(width, (axes.EMBED, axes.CLASSES), use_bias=False, **settings)

    def __call__(self, features: VisualFeatures, question: Question) -> Guidance:
        """Embeds the features, and every segment of each image's question."""
        tokens = question.tokens
        image = self.image_projection(self.image_norm(features.tokens))
        text = self.text(tokens.reshape(-1, tokens.shape[-1])).pooled
        return Guidance(image, text.reshape(*tokens.shape[:2], -1), question.mask)
