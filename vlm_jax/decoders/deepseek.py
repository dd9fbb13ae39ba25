"""DeepSeek's decoders: latent or multi-head attention, dense layers first, then mixtures of experts."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vlm_jax import axes
from vlm_jax.decoders.cache import Cache
from vlm_jax.decoders.dropping import DropsTokens, Rows, restore
from vlm_jax.decoders.head import LinearHead
from vlm_jax.decoders.periods import Stack, stacks_of
from vlm_jax.layers.attention import Context, KeyValue
from vlm_jax.layers.block import LayerCache, RematPolicy, TransformerStack
from vlm_jax.layers.dense import Dense, Embed
from vlm_jax.layers.latent_attention import LatentKeyValue
from vlm_jax.layers.mlp import Activation
from vlm_jax.layers.norm import Norm
from vlm_jax.layers.rope import Rope
from vlm_jax.layers.router import Scoring, Selection
from vlm_jax.layers.scan import LOSSES
from vlm_jax.ranges import Depth, Natural, NonNegative, Positive, Size
from vlm_jax.types import Drop, Dtype, Fields, Positions, VisualPlaces

# Fields that are not read: those of the other attention, and of groups without a group-limited selection.
_OF_LATENT = ("query_latent_dim", "content_dim", "rope_dim", "value_dim", "logit_scale", "attention_bias")
_OF_PLAIN = ("num_kv_heads",)
_OF_GROUPS = ("num_groups", "num_selected_groups")


class Deepseek(DropsTokens, LinearHead, nn.Module):
    """A causal language model over embeddings whose feed-forwards are mixtures of experts.

    Consecutive layers of one kind are one scanned stack: first the dense ones, then
    the mixtures.

    Attributes:
      vocab_size: rows of the embedding table.
      width: residual width D.
      depth: number of blocks.
      num_heads: query heads.
      mlp_dim: hidden width of the dense layers' feed-forward.
      activation: of the gates, a name of `layers.mlp.ACTIVATIONS`.
      latent_dim: width of the keys' and values' bottleneck; None for plain attention, with heads of width / num_heads.
      expert_dim: hidden width of an expert.
      num_experts: experts to choose from.
      num_selected: experts of a token.
      num_shared: experts shared by all tokens, implemented as one feed-forward.
      num_dense: first layers, without experts.
      expert_every: of the others, the layers whose index it divides have experts.
      num_kv_heads: key and value heads of plain attention; num_heads when None.
      query_latent_dim, content_dim, rope_dim, value_dim, logit_scale: as in `LatentAttention`.
      attention_bias: `use_bias` of `LatentAttention`.
      scoring, selection, num_groups, num_selected_groups: as in `Router`.
      normalize_weights, weight_scale: `normalize` (of more than one expert) and `scale` of `Router`.
      balance_weight, balance_over: as in `Router`.
      rope: how positions become rotary angles.
      norm_epsilon: epsilon of the RMSNorms of the blocks and of the last one.
      tie_embeddings: computes logits with the embedding table instead of a separate head.
      drops: where visual tokens are dropped, first to last. For reducers; `build` sets it.
      remat, unroll: as in `TransformerStack`.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Raises:
      ValueError: a field is set that its attention or selection does not read.

    Source: DeepSeek-AI 2024 (DeepSeek-V2), section 2; Wu et al. 2024 (DeepSeek-VL2), section 2.
    """

    vocab_size: Size
    width: Size
    depth: Depth
    num_heads: Size
    mlp_dim: Size
    latent_dim: Size | None
    expert_dim: Size
    num_experts: Size
    num_selected: Size
    activation: Activation = "silu"
    num_shared: Natural = 2
    num_dense: Natural = 1
    expert_every: Depth = 1
    num_kv_heads: Size | None = None
    query_latent_dim: Size | None = None
    content_dim: Size = 128
    rope_dim: Size = 64
    value_dim: Size = 128
    logit_scale: Positive = 1.0
    attention_bias: bool = False
    scoring: Scoring = "softmax"
    selection: Selection = "greedy"
    num_groups: Size = 1
    num_selected_groups: Size = 1
    normalize_weights: bool = False
    weight_scale: Positive = 1.0
    balance_weight: NonNegative = 0.001
    balance_over: Literal["sequence", "batch"] = "sequence"
    rope: Rope = Rope()
    norm_epsilon: NonNegative = 1e-6
    tie_embeddings: bool = False
    drops: tuple[Drop, ...] = ()
    remat: RematPolicy = "none"
    unroll: Depth = 1
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def __post_init__(self):
        latent, greedy = self.latent_dim is not None, self.selection == "greedy"
        unread = dict.fromkeys(_OF_PLAIN if latent else _OF_LATENT, f"{'latent' if latent else 'plain'} attention")
        unread |= dict.fromkeys(_OF_GROUPS if greedy else (), "greedy selection")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        wrong = [f"{name} is not read by {by}" for name, by in unread.items() if getattr(self, name) != defaults[name]]
        if wrong:
            raise ValueError(f"Deepseek: {', '.join(wrong)}; leave these fields out")
        super().__post_init__()

    def setup(self):
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        stddev = self.width**-0.5 if self.tie_embeddings else 1.0  # as in `Transformer`
        self.embedding = Embed(self.vocab_size, self.width, stddev, **settings)
        for name, layers in self.stacks():
            block = self._block(sparse=name.startswith("sparse"))
            setattr(self, name, TransformerStack(len(layers), {**block, **settings}, self.remat, self.unroll))
        self.final_norm = Norm("rms", self.norm_epsilon, **settings)
        if not self.tie_embeddings:
            self.head = Dense(self.vocab_size, (axes.EMBED, axes.VOCAB), use_bias=False, adapts=False, **settings)

    def stacks(self) -> tuple[Stack, ...]:
        """Consecutive layers of one kind, whose balance losses are collected: `dense_0`, `sparse_1`, and so on."""
        kinds = ["sparse" if i >= self.num_dense and i % self.expert_every == 0 else "dense" for i in range(self.depth)]
        return stacks_of(kinds, interleaved=False)

    def _block(self, *, sparse: bool) -> Fields:
        """Arguments of `TransformerBlock`."""
        latent = experts = None
        if self.latent_dim is not None:
            latent = {
                "latent_dim": self.latent_dim,
                "query_latent_dim": self.query_latent_dim,
                "content_dim": self.content_dim,
                "rope_dim": self.rope_dim,
                "value_dim": self.value_dim,
                "logit_scale": self.logit_scale,
                "use_bias": self.attention_bias,
            }
        if sparse:
            router = {
                "num_experts": self.num_experts,
                "num_selected": self.num_selected,
                "scoring": self.scoring,
                "selection": self.selection,
                "num_groups": self.num_groups,
                "num_selected_groups": self.num_selected_groups,
                "normalize": self.normalize_weights and self.num_selected > 1,
                "scale": self.weight_scale,
                "balance_weight": self.balance_weight,
                "balance_over": self.balance_over,
            }
            shared_dim = self.num_shared * self.expert_dim
            experts = {"hidden_dim": self.expert_dim, "shared_dim": shared_dim, "router": router}
        return {
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "mlp_dim": self.mlp_dim,
            "activation": self.activation,
            "gated": True,
            "norm": "rms",
            "norm_epsilon": self.norm_epsilon,
            "qkv_bias": False,
            "use_bias": False,
            "latent": latent,
            "experts": experts,
        }

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Looks up token ids."""
        return self.embedding(tokens)

    def empty_layers(self, name: str, depth: int, batch_size: int, slots: int, dtype: Dtype) -> LayerCache:
        """Latents, or keys and values, of `depth` layers."""
        del name
        rows = (depth, batch_size, slots)
        if self.latent_dim is not None:
            sizes = (self.latent_dim, self.rope_dim)
            return LatentKeyValue(*(jnp.zeros((*rows, size), dtype) for size in sizes))
        return KeyValue.empty(*rows, self.num_kv_heads or self.num_heads, self.rotary_dim(), dtype)

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

        Raises:
          ValueError: tokens are dropped and the balance loss is collected.
        """
        asked = self.is_mutable_collection(LOSSES) and not self.is_initializing()
        if places is not None and asked and self.balance_weight:
            raise ValueError(
                "a decoder with experts has no balance loss where visual tokens are dropped between its layers; set "
                "config.decoder.balance_weight to 0, or choose a reducer that acts before the decoder"
            )
        del token_ids  # an embedding is all that its blocks read
        rows, cache = self.run_layers(embeddings, positions, segment_ids, cache, branch_ids, places, levels, group_ids)
        x = self.final_norm(rows.x)
        return x if places is None else restore(x, rows, embeddings.shape[1]), cache

    def context(self, rows: Rows) -> Context:
        """The attention context of a sequence without a cache."""
        segments = rows.segment_ids
        return Context(
            "causal",
            segments,
            segments,
            rows.branch_ids,
            rows.angles,
            magnitude=self.rope.magnitude,
            groups=rows.group_ids,
        )

    def rotary_dim(self) -> int:
        """Rotated coordinates of a head; all of them in multi-head attention."""
        return self.rope_dim if self.latent_dim is not None else self.width // self.num_heads
