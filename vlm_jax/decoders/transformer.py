"""The decoder-only transformer of the Llama and Gemma families: RoPE, grouped heads, RMSNorm, a gated feed-forward."""

import math
from typing import Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vlm_jax import axes
from vlm_jax.decoders.cache import Cache
from vlm_jax.decoders.dropping import DropsTokens, Rows, restore
from vlm_jax.decoders.head import LinearHead
from vlm_jax.decoders.periods import Stack
from vlm_jax.layers.attention import Context, KeyValue
from vlm_jax.layers.block import RematPolicy, TransformerStack
from vlm_jax.layers.dense import Dense, Embed
from vlm_jax.layers.mlp import Activation
from vlm_jax.layers.norm import Norm
from vlm_jax.layers.rope import Rope
from vlm_jax.layers.router import unbalanced
from vlm_jax.ranges import Count, Depth, NonNegative, Positive, Size
from vlm_jax.types import Drop, Dtype, Fields, Positions, VisualPlaces


class Transformer(DropsTokens, LinearHead, nn.Module):
    """A causal language model over embeddings, so that visual tokens can be interleaved with text.

    Attributes:
      vocab_size: rows of the embedding table.
      width: residual width D.
      depth: number of blocks.
      num_heads: query heads.
      num_kv_heads: key and value heads; divides num_heads.
      mlp_dim: hidden width of the gated feed-forward.
      activation: of its gate, a name of `layers.mlp.ACTIVATIONS`.
      head_dim: width / num_heads when None.
      rope: how positions become rotary angles.
      local_rope: the same in blocks with a window, as in Gemma 3; as `rope` when None.
      log_length: queries at later positions are scaled by log(position) / log(log_length), as in Qwen; None for none.
      norm: kind of every RMSNorm.
      norm_epsilon: their epsilon.
      post_norm: an RMSNorm of the attention's and of the feed-forward's output too, as in Gemma 2.
      qkv_bias: biases on query, key and value, as in Qwen2.
      out_bias, mlp_bias: biases on the attention output, and on the feed-forward's layers.
      windows: attention window of each block in positions, its own included, or None; empty where no block has one.
      qk_norm: an RMSNorm of every head's queries and keys before RoPE, as in Qwen3.
      qk_scale: factor of the attention logits; head_dim ** -0.5 when None.
      attention_softcap: bound of the attention logits, as in Gemma 2, see `softcap.capped`; None for none.
      logit_softcap: the same of the vocabulary logits.
      groups_exceed_windows: `groups_exceed_window` of `Context`.
      embedding_scale: factor of embedded text, not of visual tokens, as in Gemma; None for none.
      expert_dim: hidden width of an expert, of mixtures of experts in place of the feed-forwards; None for none.
      num_experts: experts to choose from.
      num_selected: experts of a token.
      normalize_weights: divides the scores of a token's experts by their sum.
      tie_embeddings: computes logits with the embedding table instead of a separate head.
      drops: where visual tokens are dropped, first to last. For reducers; `build` sets it.
      remat, unroll: as in `TransformerStack`.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Raises:
      ValueError: heads that do not divide, numbers of experts without experts, or a `local_rope` that no block has or
        whose magnitude is not that of `rope`.

    Source: Touvron et al. 2023 (Llama), section 2.2; Yang et al. 2025 (Qwen3), section 2, for experts; Gemma Team 2024
    (Gemma 2), section 2, for softcaps; Gemma Team 2025 (Gemma 3), section 2, for blocks of two kinds.
    """

    vocab_size: Size
    width: Size
    depth: Depth
    num_heads: Size
    num_kv_heads: Size
    mlp_dim: Size
    activation: Activation = "silu"
    head_dim: Size | None = None
    rope: Rope = Rope()
    local_rope: Rope | None = None
    log_length: Count | None = None
    norm: Literal["rms", "rms_from_one"] = "rms"
    norm_epsilon: NonNegative = 1e-6
    post_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    qk_scale: Positive | None = None
    attention_softcap: Positive | None = None
    logit_softcap: Positive | None = None
    groups_exceed_windows: bool = False
    embedding_scale: Positive | None = None
    windows: tuple[Count | None, ...] = ()
    expert_dim: Size | None = None
    num_experts: Size = 1
    num_selected: Size = 1
    normalize_weights: bool = True
    tie_embeddings: bool = True
    drops: tuple[Drop, ...] = ()
    remat: RematPolicy = "none"
    unroll: Depth = 1
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_kv_heads} heads of keys do not divide {self.num_heads} heads of queries")
        of_experts = self.num_experts, self.num_selected, self.normalize_weights
        if self.expert_dim is None and of_experts != (1, 1, True):
            raise ValueError(
                "num_experts, num_selected and normalize_weights are not read without experts; set expert_dim"
            )
        if self.local_rope is not None and not any(self.windows):
            raise ValueError("local_rope is for blocks with a window, and none has one; set windows, or only rope")
        if self.local_rope is not None and self.local_rope.magnitude != self.rope.magnitude:
            raise ValueError(
                f"local_rope: expected the attention factor of rope, {self.rope.magnitude}, got "
                f"{self.local_rope.magnitude}"
            )
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        # Initialised at the scale that every block adds to the residual stream; a table that also gives
        # the logits is initialised so that these start near 1.
        stddev = self.width**-0.5 if self.tie_embeddings else 1.0
        self.embedding = Embed(self.vocab_size, self.width, stddev, **settings)
        self.blocks = TransformerStack(
            self.depth,
            {
                "num_heads": self.num_heads,
                "num_kv_heads": self.num_kv_heads,
                "head_dim": self.head_dim,
                "mlp_dim": self.mlp_dim,
                "activation": self.activation,
                "gated": True,
                "norm": self.norm,
                "norm_epsilon": self.norm_epsilon,
                "post_norm": self.post_norm,
                "qkv_bias": self.qkv_bias,
                "qk_norm": self.norm if self.qk_norm else None,
                "qk_scale": self.qk_scale,
                "use_bias": self.out_bias,
                "mlp_bias": self.mlp_bias,
                "experts": self._experts(),
                **settings,
            },
            remat=self.remat,
            unroll=self.unroll,
            windows=self.windows,
            ropes=() if self.local_rope is None else tuple(int(window is not None) for window in self.windows),
        )
        self.final_norm = Norm(self.norm, self.norm_epsilon, **settings)
        if not self.tie_embeddings:
            self.head = Dense(self.vocab_size, (axes.EMBED, axes.VOCAB), use_bias=False, adapts=False, **settings)

    def _experts(self) -> Fields | None:
        """Arguments of a `MixtureOfExperts`."""
        if self.expert_dim is None:
            return None
        router = unbalanced(self.num_experts, self.num_selected, normalize=self.normalize_weights)
        return {"hidden_dim": self.expert_dim, "shared_dim": 0, "router": router}

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Looks up token ids."""
        x = self.embedding(tokens)
        return x if self.embedding_scale is None else x * jnp.asarray(self.embedding_scale, x.dtype)

    def stacks(self) -> tuple[Stack, ...]:
        """One stack of all layers."""
        return (Stack("blocks", range(self.depth)),)

    def empty_layers(self, name: str, depth: int, batch_size: int, slots: int, dtype: Dtype) -> KeyValue:
        """Keys and values of `depth` layers."""
        del name
        return KeyValue.empty(depth, batch_size, slots, self.num_kv_heads, self.rotary_dim(), dtype)

    def __call__(
        self,
        embeddings: Float[Array, "B T D"],
        positions: Positions,
        segment_ids: Int[Array, "B T"],
        cache: Cache | None = None,
        branch_ids: Int[Array, "B T"] | None = None,
        places: VisualPlaces | None = None,
        levels: Float[Array, "B T F"] | None = None,
        group_ids: Int[Array, "B T"] | None = None,
        token_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Runs T positions, after those in the cache when there is one.

        `branch_ids` is for sequences without a cache, `group_ids` for those without one or with an empty one; see
        `types.Batch`. With `places` visual tokens are dropped at `drops`; the cache must then be empty and created for
        these places. `levels` are added to the outputs of the first blocks, at positions that are left: D channels for
        each block, concatenated.

        Returns:
          Normalised hidden states, zeros at positions that were dropped, and the cache with T more slots written.
        """
        del token_ids  # an embedding is all that its blocks read
        rows, cache = self.run_layers(embeddings, positions, segment_ids, cache, branch_ids, places, levels, group_ids)
        x = self.final_norm(rows.x)
        return x if places is None else restore(x, rows, embeddings.shape[1]), cache

    def context(self, rows: Rows) -> Context:
        """The attention context of a sequence without a cache."""
        return Context(
            "causal",
            rows.segment_ids,
            rows.segment_ids,
            rows.branch_ids,
            rows.angles,
            magnitude=self.rope.magnitude,
            query_scale=rows.query_scale,
            groups=rows.group_ids,
            groups_exceed_window=self.groups_exceed_windows,
            softcap=self.attention_softcap,
        )

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """Of all blocks, or of blocks without and with a window."""
        return (self.rope,) if self.local_rope is None else (self.rope, self.local_rope)

    def query_scale(self, positions: Positions) -> Float[Array, "B T"] | None:
        """Log-n scaling. Source: Su 2023; Bai et al. 2023 (Qwen), section 2.4."""
        if self.log_length is None:
            return None
        places = (positions if positions.ndim == 2 else positions.max(axis=-1)) + 1
        return jnp.log(jnp.maximum(places, self.log_length).astype(jnp.float32)) / math.log(self.log_length)

    def rotary_dim(self) -> int:
        """Rotated coordinates of a head: all of them."""
        return self.head_dim or self.width // self.num_heads
