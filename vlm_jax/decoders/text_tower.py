"""The text tower of two-tower models: CLIP's, SigLIP's and big_vision's."""

from typing import Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vlm_jax import axes
from vlm_jax.layers.attention import Context
from vlm_jax.layers.block import RematPolicy, TransformerStack
from vlm_jax.layers.dense import Dense, Embed, with_axes
from vlm_jax.layers.mlp import Activation
from vlm_jax.layers.norm import Norm
from vlm_jax.layers.pooling import MapHead, reduce_tokens
from vlm_jax.ranges import Count, Depth, Natural, NonNegative, Size
from vlm_jax.types import Dtype, struct

TextPooling = Literal["first", "last", "mean", "max", "map", "highest", "end"]


@struct
class TextFeatures:
    """What a text tower returns.

    Attributes:
      tokens: normalised outputs of the last block.
      pooled: the text's own embedding, not normalised.
      hidden: inputs of every block and the output of the last, only with `collect`.
    """

    tokens: Float[Array, "B T D"]
    pooled: Float[Array, "B E"]
    hidden: Float[Array, "L B T D"] | None = None


class TextTower(nn.Module):
    """Token and position embeddings, `depth` pre-norm blocks, a norm, one vector per text.

    Texts are padded to one length, and padding is not masked, as in the releases'
    training.

    Attributes:
      vocab_size: rows of the embedding table.
      context_length: rows of the position table, the maximum text length.
      width: residual width D.
      depth: number of blocks.
      num_heads: attention heads.
      mlp_dim: hidden width of the feed-forward.
      causal: causal attention (CLIP) or full attention (SigLIP).
      pooling: one token (`first`, `last`, that with the `highest` id, or the first
        `end_token`), or the `mean`, `max` or attention pooling (`map`) of all.
      end_token: id of the token that `end` selects; every text must contain it.
      projection_dim: width of the linear layer after the pooling, or None for none.
      projection_bias: a bias on the projection.
      activation: a name of `layers.mlp.ACTIVATIONS`.
      norm_epsilon: epsilon of every LayerNorm.
      remat, unroll: as in `TransformerStack`.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Source: Radford et al. 2021 (CLIP), section 2.4; Zhai et al. 2023 (SigLIP), section 4; big_vision,
    models/proj/image_text/text_transformer.py.
    """

    vocab_size: Size
    context_length: Count
    width: Size
    depth: Depth
    num_heads: Size
    mlp_dim: Size
    causal: bool
    pooling: TextPooling
    end_token: Natural | None = None
    projection_dim: Size | None = None
    projection_bias: bool = True
    activation: Activation = "gelu_tanh"
    norm_epsilon: NonNegative = 1e-6
    remat: RematPolicy = "none"
    unroll: Depth = 1
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self):
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.embedding = Embed(self.vocab_size, self.width, 0.02, **settings)
        init = with_axes(nn.initializers.normal(0.01), axes.POSITION, axes.EMBED)
        self.positions = self.param("positions", init, (self.context_length, self.width), self.param_dtype)
        block = {
            "num_heads": self.num_heads,
            "mlp_dim": self.mlp_dim,
            "activation": self.activation,
            "norm": "layer",
            "norm_epsilon": self.norm_epsilon,
            **settings,
        }
        self.blocks = TransformerStack(self.depth, block, self.remat, self.unroll)
        self.final_norm = Norm("layer", self.norm_epsilon, **settings)
        if self.pooling == "map":
            self.head = MapHead(self.num_heads, self.mlp_dim, self.activation, self.norm_epsilon, **settings)
        if self.projection_dim is not None:
            names = (axes.EMBED, axes.CLASSES)
            self.projection = Dense(self.projection_dim, names, use_bias=self.projection_bias, **settings)

    def __call__(self, tokens: Int[Array, "B T"], *, collect: bool = False) -> TextFeatures:
        """Encodes token ids; `collect` also returns every block's input in `hidden`.

        Raises:
          ValueError: the texts are longer than the position table.
        """
        length = tokens.shape[1]
        if length > self.context_length:
            raise ValueError(f"expected texts of at most {self.context_length} tokens (context_length), got {length}")
        x = self.embedding(tokens) + self.positions[:length].astype(self.dtype)[None]
        x, _, hidden = self.blocks(x, Context("causal" if self.causal else "full"), collect=collect)
        x = self.final_norm(x)
        pooled = self._pool(x, tokens)
        if self.projection_dim is not None:
            pooled = self.projection(pooled)
        return TextFeatures(x, pooled, hidden)

    def vocabulary_logits(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Similarity of tokens to every row of the embedding table, float32."""
        return self.embedding.attend(x).astype(jnp.float32)

    def _pool(self, x: Float[Array, "B T D"], tokens: Int[Array, "B T"]) -> Float[Array, "B D"]:
        if self.pooling == "map":
            return self.head(x)
        if self.pooling in ("highest", "end"):
            wanted = tokens if self.pooling == "highest" else jnp.asarray(tokens == self.end_token, jnp.int32)
            index = jnp.argmax(wanted, axis=1)[:, None, None]
            return jnp.take_along_axis(x, index, axis=1)[:, 0]
        return reduce_tokens(x, self.pooling)
