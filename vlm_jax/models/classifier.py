"""An encoder with a linear classification head."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vlm_jax import axes
from vlm_jax.encoders.vit import ViT
from vlm_jax.layers.dense import Dense


class Classifier(nn.Module):
    """Logits of an image from the encoder's pooled vector, or of every token without pooling.

    Attributes:
      encoder: of images of one size.
      num_classes: outputs of the head.

    Source: Dosovitskiy et al. 2021, section 3.1.
    """

    encoder: ViT
    num_classes: int

    @nn.compact
    def __call__(
        self, images: Float[Array, "B height width channels"]
    ) -> Float[Array, "B classes"] | Float[Array, "B N classes"]:
        """Float32 logits."""
        features = self.encoder(images)
        x = features.tokens if features.pooled is None else features.pooled
        dtypes = {"dtype": self.encoder.dtype, "param_dtype": self.encoder.param_dtype}
        head = Dense(self.num_classes, (axes.EMBED, axes.CLASSES), name="head", **dtypes)
        return head(x).astype(jnp.float32)
