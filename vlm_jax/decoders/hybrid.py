"""Decoders of layers of two kinds: full attention, and Gated DeltaNet, which keeps a state of fixed size."""

from typing import Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vlm_jax import axes
from vlm_jax.config import ConfigError
from vlm_jax.decoders.cache import Cache
from vlm_jax.decoders.dropping import DropsTokens, Rows, restore
from vlm_jax.decoders.head import LinearHead
from vlm_jax.decoders.periods import Stack, stacks_of
from vlm_jax.layers.attention import Context, KeyValue
from vlm_jax.layers.block import LayerCache, RematPolicy, TransformerStack
from vlm_jax.layers.dense import Dense, Embed
from vlm_jax.layers.gated_delta import GatedDelta
from vlm_jax.layers.mlp import Activation
from vlm_jax.layers.norm import Norm
from vlm_jax.layers.rope import Rope
from vlm_jax.layers.router import unbalanced
from vlm_jax.ranges import Depth, NonNegative, Size
from vlm_jax.types import Drop, Dtype, Fields, Positions, VisualPlaces

Mixer = Literal["attention", "delta"]


class Hybrid(DropsTokens, LinearHead, nn.Module):
    """A causal language model over embeddings whose layers mix tokens by attention or by the gated delta rule.

    Layers at one place of the period of kinds are one stack, and the periods are scanned.

    Attributes:
      vocab_size: rows of the embedding table.
      width: residual width D.
      depth: number of blocks.
      num_heads, num_kv_heads: heads of attention.
      mlp_dim: hidden width of the gated feed-forward; with experts of the shared one, which has a gate.
      mixers: kind of every layer.
      num_key_heads, num_value_heads, key_dim, value_dim, window: as in `GatedDelta`.
      activation: of the gates and after convolutions, a name of `layers.mlp.ACTIVATIONS`.
      head_dim: of attention; width / num_heads when None.
      rotary_width: rotated coordinates of a head, its first ones; all of them when None.
      rope: how positions become rotary angles.
      norm_epsilon: epsilon of every RMSNorm.
      qkv_bias, out_bias: biases of attention, as in `Transformer`.
      expert_dim, num_experts, num_selected: as in `Transformer`; weights of a token's experts are normalised.
      tie_embeddings: computes logits with the embedding table instead of a separate head.
      drops: where visual tokens are dropped, first to last. For reducers; `build` sets it.
      remat, unroll: as in `TransformerStack`.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Raises:
      ValueError: `mixers` of another number than the layers, or numbers of experts without experts.
      ConfigError: tokens are ranked by a layer without attention.

    Source: Yang et al. 2025 (Gated DeltaNet), section 3.4; transformers, models/qwen3_5, for gated attention,
    and models/qwen3_5_moe, for experts.
    """

    vocab_size: Size
    width: Size
    depth: Depth
    num_heads: Size
    num_kv_heads: Size
    mlp_dim: Size
    mixers: tuple[Mixer, ...]
    num_key_heads: Size
    num_value_heads: Size
    key_dim: Size
    value_dim: Size
    activation: Activation = "silu"
    head_dim: Size | None = None
    rotary_width: Size | None = None
    rope: Rope = Rope()
    norm_epsilon: NonNegative = 1e-6
    qkv_bias: bool = False
    out_bias: bool = False
    window: Size = 4
    expert_dim: Size | None = None
    num_experts: Size = 1
    num_selected: Size = 1
    tie_embeddings: bool = True
    drops: tuple[Drop, ...] = ()
    remat: RematPolicy = "none"
    unroll: Depth = 1
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def __post_init__(self):
        if len(self.mixers) != self.depth:
            raise ValueError(f"mixers: expected one for each of {self.depth} layers, got {len(self.mixers)}")
        if self.expert_dim is None and (self.num_experts, self.num_selected) != (1, 1):
            raise ValueError("num_experts and num_selected are of experts, and there are none; set expert_dim")
        wrong = [drop.ranked_by for drop in self.drops if self.mixers[drop.ranked_by] != "attention"]
        if wrong:
            known = [number for number, kind in enumerate(self.mixers) if kind == "attention"]
            raise ConfigError(
                f"config.reducer: visual tokens are ranked by the attention of layers {wrong}, which are gated delta "
                f"layers, without attention; choose layers of the reducer such that they are ranked by some of {known}"
            )
        super().__post_init__()

    def setup(self):
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        stddev = self.width**-0.5 if self.tie_embeddings else 1.0  # as in `Transformer`
        self.embedding = Embed(self.vocab_size, self.width, stddev, **settings)
        for name, layers in self.stacks():
            block = self._block(self.mixers[layers[0]])
            setattr(self, name, TransformerStack(len(layers), {**block, **settings}, self.remat, self.unroll))
        self.final_norm = Norm("rms_from_one", self.norm_epsilon, **settings)
        if not self.tie_embeddings:
            self.head = Dense(self.vocab_size, (axes.EMBED, axes.VOCAB), use_bias=False, adapts=False, **settings)

    def stacks(self) -> tuple[Stack, ...]:
        """One stack for every place of the period of kinds: `delta_0_every_4` and so on, see `stacks_of`."""
        return stacks_of(self.mixers)

    def _block(self, kind: Mixer) -> Fields:
        """Arguments of `TransformerBlock`."""
        return {
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "mlp_dim": self.mlp_dim,
            "activation": self.activation,
            "gated": True,
            "norm": "rms_from_one",
            "norm_epsilon": self.norm_epsilon,
            "qkv_bias": self.qkv_bias,
            "use_bias": self.out_bias,
            "mlp_bias": False,
            "qk_norm": "rms_from_one",
            "gated_attention": True,
            "delta": self._delta() if kind == "delta" else None,
            "experts": self._experts(),
        }

    def _experts(self) -> Fields | None:
        """Arguments of a `MixtureOfExperts`."""
        if self.expert_dim is None:
            return None
        router = unbalanced(self.num_experts, self.num_selected)
        return {"hidden_dim": self.expert_dim, "shared_dim": self.mlp_dim, "shared_gate": True, "router": router}

    def _delta(self) -> Fields:
        """Arguments of a `GatedDelta`."""
        return {
            "num_key_heads": self.num_key_heads,
            "num_value_heads": self.num_value_heads,
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
            "window": self.window,
            "activation": self.activation,
        }

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Looks up token ids."""
        return self.embedding(tokens)

    def empty_layers(self, name: str, depth: int, batch_size: int, slots: int, dtype: Dtype) -> LayerCache:
        """Keys and values, or states, of `depth` layers of a stack."""
        if name.startswith("delta"):
            return GatedDelta(**self._delta(), parent=None).empty(depth, batch_size, dtype)
        head_dim = self.head_dim or self.width // self.num_heads
        return KeyValue.empty(depth, batch_size, slots, self.num_kv_heads, head_dim, dtype)

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

        `branch_ids` is for sequences without a cache; `group_ids` must be None where a layer is a gated delta layer.
        With `places` visual tokens are dropped at `drops`; the cache must then be empty and created for these places.
        `levels` are added to the outputs of the first blocks, at positions that are left: D channels for each block,
        concatenated.

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
            groups=rows.group_ids,
        )

    def rotary_dim(self) -> int:
        """Rotated coordinates of a head, its first ones."""
        return self.rotary_width or self.head_dim or self.width // self.num_heads
