"""The decoder-only transformer of the Llama family: RoPE, grouped heads, RMSNorm, SwiGLU."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vlm_jax import axes
from vlm_jax.decoders.cache import Cache
from vlm_jax.layers.attention import Context
from vlm_jax.layers.block import RematPolicy, TransformerStack
from vlm_jax.layers.dense import Dense, Embed
from vlm_jax.layers.norm import Norm
from vlm_jax.layers.rope import rope_angles


class Transformer(nn.Module):
    """A causal language model over embeddings, so that visual tokens can stand among the text.

    Attributes:
      vocab_size: rows of the embedding table.
      width: residual width D.
      depth: number of blocks.
      num_heads: query heads.
      num_kv_heads: key and value heads; divides num_heads.
      mlp_dim: hidden width of the gated feed-forward.
      head_dim: width / num_heads when None.
      rope_theta: base of the rotary angles.
      norm_epsilon: epsilon of every RMSNorm.
      tie_embeddings: logits by the embedding table instead of a head of their own.
      remat, unroll: as in `TransformerStack`.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Source: Touvron et al. 2023 (Llama), section 2.2.
    """

    vocab_size: int
    width: int
    depth: int
    num_heads: int
    num_kv_heads: int
    mlp_dim: int
    head_dim: int | None = None
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-6
    tie_embeddings: bool = True
    remat: RematPolicy = "none"
    unroll: int = 1
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self):
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        # Drawn at the scale that every block adds to the residual stream; a table that also gives
        # the logits is drawn so that these start near 1.
        stddev = self.width**-0.5 if self.tie_embeddings else 1.0
        self.embedding = Embed(self.vocab_size, self.width, stddev, **settings)
        self.blocks = TransformerStack(
            self.depth,
            {
                "num_heads": self.num_heads,
                "num_kv_heads": self.num_kv_heads,
                "head_dim": self.head_dim,
                "mlp_dim": self.mlp_dim,
                "activation": "silu",
                "gated": True,
                "norm": "rms",
                "norm_epsilon": self.norm_epsilon,
                "qkv_bias": False,
                "use_bias": False,
                **settings,
            },
            remat=self.remat,
            unroll=self.unroll,
        )
        self.final_norm = Norm("rms", self.norm_epsilon, **settings)
        if not self.tie_embeddings:
            self.head = Dense(self.vocab_size, (axes.EMBED, axes.VOCAB), use_bias=False, **settings)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Looks token ids up."""
        return self.embedding(tokens)

    def init_cache(self, batch_size: int, length: int) -> Cache:
        """An empty cache for `length` positions a row, in `dtype`."""
        head_dim = self.head_dim or self.width // self.num_heads
        return Cache.empty(self.depth, batch_size, length, self.num_kv_heads, head_dim, self.dtype)

    def __call__(
        self,
        embeddings: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        cache: Cache | None = None,
        branch_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Runs T positions, after those in the cache when there is one.

        `branch_ids` is for sequences without a cache; see `types.Batch`.

        Returns:
          Normalised hidden states, and the cache with T more slots written.
        """
        angles = rope_angles(positions, self.head_dim or self.width // self.num_heads, self.rope_theta)
        if cache is None:
            context = Context("causal", segment_ids, segment_ids, branch_ids, angles)
            x, _, _ = self.blocks(embeddings, context)
        else:
            offset, cache = cache.length, cache.with_segments(segment_ids)
            context = Context("causal", segment_ids, cache.segment_ids, None, angles, offset)
            x, layers, _ = self.blocks(embeddings, context, cache=cache.layers)
            cache = dataclasses.replace(cache, layers=layers)
        return self.final_norm(x), cache

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Vocabulary logits in float32."""
        out = self.embedding.attend(hidden) if self.tie_embeddings else self.head(hidden)
        return out.astype(jnp.float32)
