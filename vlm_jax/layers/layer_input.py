"""Inputs of every block's own, from the ids and the embeddings of the tokens, and what a block adds for its input."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vlm_jax import axes
from vlm_jax.layers.dense import Dense, Embed
from vlm_jax.layers.mlp import ACTIVATIONS
from vlm_jax.layers.norm import Norm, NormKind
from vlm_jax.types import NO_ID, Dtype


class LayerInputs(nn.Module):
    """P channels for each of L blocks: (norm(a projection of the embedding) + a row of a table) / sqrt(2).

    The norm is of each block's channels. A visual token has no id: it looks up the row of `placeholder`, which gets no
    gradient from it, as in transformers, where that is the id of padding.

    Attributes:
      num_rows: rows of the table.
      depth: blocks L.
      features: channels P of a block.
      placeholder: the row of a visual token.
      norm: kind of the norm.
      norm_epsilon: its epsilon.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Source: transformers, models/gemma4, Gemma4TextModel.get_per_layer_inputs and project_per_layer_inputs.
    """

    num_rows: int
    depth: int
    features: int
    placeholder: int
    norm: NormKind
    norm_epsilon: float
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, embeddings: Float[Array, "B T D"], token_ids: Int[Array, "B T"]) -> Float[Array, "B T L P"]:
        """The channels of all blocks.

        Args:
          embeddings: of text and of visual tokens.
          token_ids: ids of the text, and `NO_ID` for visual tokens.
        """
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        shape, width = (*token_ids.shape, self.depth, self.features), self.depth * self.features
        project = Dense(width, (axes.EMBED, axes.MLP), use_bias=False, name="project", **settings)
        projected = project(embeddings) * jnp.asarray(embeddings.shape[-1] ** -0.5, self.dtype)
        normed = Norm(self.norm, self.norm_epsilon, name="norm", **settings)(projected.reshape(shape))
        visual = token_ids == NO_ID
        table = Embed(self.num_rows, width, self.features**-0.5, name="table", **settings)
        rows = table(jnp.where(visual, self.placeholder, token_ids))
        rows = jnp.where(visual[..., None], jax.lax.stop_gradient(rows), rows)
        rows = rows * jnp.asarray(self.features**0.5, self.dtype)
        return (normed + rows.reshape(shape)) * jnp.asarray(2**-0.5, self.dtype)


class GatedInput(nn.Module):
    """out(act(gate(x)) * given): what a block adds to x for its own input.

    Attributes:
      features: channels P of the input.
      activation: a name of `layers.mlp.ACTIVATIONS`.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Source: transformers, models/gemma4, Gemma4TextDecoderLayer.
    """

    features: int
    activation: str
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], given: Float[Array, "B T P"] | None) -> Float[Array, "B T D"]:
        """`given` are the channels of this block, which only initialisation goes without.

        Raises:
          ValueError: no channels.
        """
        settings = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}
        gate = Dense(self.features, (axes.EMBED, axes.MLP), name="gate", **settings)(x)
        out = Dense(x.shape[-1], (axes.MLP, axes.EMBED), name="out", **settings)
        if given is None:
            if not self.is_initializing():
                raise ValueError(f"own_input: expected {self.features} channels for every position, got None")
            given = jnp.zeros_like(gate)
        return out(ACTIVATIONS[self.activation](gate) * given)
