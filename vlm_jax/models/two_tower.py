"""An image tower and a text tower in one embedding space."""

from typing import cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vlm_jax.decoders.text_tower import TextTower
from vlm_jax.encoders.encoder import Encoder
from vlm_jax.layers.dense import with_axes
from vlm_jax.types import PackedPatches, VisualFeatures, struct

_NORM_EPSILON = 1e-8


@struct
class Embeddings:
    """Inputs of the two-tower losses.

    Attributes:
      image: image embeddings of norm 1, float32.
      text: text embeddings of norm 1, float32; row i is the pair of row i of the images.
      scale: factor of the cosine similarities: the exponential of the stored parameter.
      bias: added to the scaled similarities; 0 for a model without one.
    """

    image: Float[Array, "B E"]
    text: Float[Array, "B2 E"]
    scale: Float[Array, ""]
    bias: Float[Array, ""]

    def logits(self) -> Float[Array, "B B2"]:
        """Scaled similarity of every image with every text."""
        similarity = jnp.dot(self.image, self.text.T, precision=jax.lax.Precision.HIGHEST)
        return self.scale * similarity + self.bias


def normalise(x: Float[Array, "B E"]) -> Float[Array, "B E"]:
    """Rows of norm 1, in float32. Source: big_vision, models/proj/image_text/two_towers.py."""
    x = x.astype(jnp.float32)
    return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + _NORM_EPSILON)


class TwoTower(nn.Module):
    """CLIP and SigLIP: two encoders, and the scale and bias of their similarities.

    Attributes:
      image: an entry of `encoders.ENCODERS` with a pooled vector.
      text: a `decoders.text_tower.TextTower` with a pooled vector of the same width.
      initial_log_scale: initial value of the scale, which is stored as a logarithm.
      initial_bias: initial value of the bias; None for a model without one.

    Source: Radford et al. 2021 (CLIP), figure 3; Zhai et al. 2023 (SigLIP), algorithm 1.
    """

    image: Encoder
    text: TextTower
    initial_log_scale: float
    initial_bias: float | None = None

    def setup(self):
        constant = nn.initializers.constant
        self.log_scale = self.param("log_scale", with_axes(constant(self.initial_log_scale)), (), jnp.float32)
        if self.initial_bias is not None:
            self.bias = self.param("bias", with_axes(constant(self.initial_bias)), (), jnp.float32)

    def encode_image(self, images: Float[Array, "B height width channels"] | PackedPatches) -> Float[Array, "B E"]:
        """The image tower's pooled vectors, not normalised.

        Raises:
          ValueError: the image tower does not pool.
        """
        pooled = cast(VisualFeatures, self.image(images)).pooled
        if pooled is None:
            raise ValueError("the image tower returns no pooled vector; set its `pooling`")
        return pooled

    def encode_text(self, tokens: Int[Array, "B T"]) -> Float[Array, "B E"]:
        """The text tower's pooled vectors, not normalised."""
        return self.text(tokens).pooled

    def __call__(
        self, images: Float[Array, "B height width channels"] | PackedPatches, tokens: Int[Array, "B2 T"]
    ) -> Embeddings:
        """Embeddings of B images and B2 texts.

        Raises:
          ValueError: the image tower does not pool, or the towers' vectors have different widths.
        """
        image, text = normalise(self.encode_image(images)), normalise(self.encode_text(tokens))
        if image.shape[-1] != text.shape[-1]:
            raise ValueError(
                f"the towers' vectors have widths {image.shape[-1]} (images) and {text.shape[-1]} (texts); set "
                "projection_dim of both to one number"
            )
        bias = jnp.zeros((), jnp.float32) if self.initial_bias is None else self.bias
        return Embeddings(image, text, jnp.exp(self.log_scale), bias)
