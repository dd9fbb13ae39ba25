"""A decoder whose blocks are of several kinds, with heads of different widths, windows and rotary positions."""

import collections
import dataclasses
import string

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
from vlm_jax.layers.block import RematPolicy, TransformerStack
from vlm_jax.layers.dense import Dense, Embed
from vlm_jax.layers.layer_input import LayerInputs
from vlm_jax.layers.mlp import Activation
from vlm_jax.layers.norm import Norm, NormKind
from vlm_jax.layers.rope import Rope
from vlm_jax.layers.router import unbalanced
from vlm_jax.ranges import Count, Depth, Natural, NonNegative, Positive, Size
from vlm_jax.types import Drop, Dtype, Fields, Positions, VisualPlaces


@dataclasses.dataclass(frozen=True)
class BlockKind:
    """The attention of the blocks of one kind.

    Attributes:
      head_dim: coordinates of a head.
      num_kv_heads: key and value heads.
      rope: how positions become rotary angles.
      window: keys that a query attends to at most, its own included; None for all.
      value_is_key: as in `MultiHeadAttention`.
      reads_groups: whether positions of one group attend to each other in both directions; see `types.Batch`.
      mlp_dim: hidden width of the feed-forward; the decoder's when None.
      shares_with: index of the kind of whose last block these blocks read the keys and values; None for their own.
    """

    head_dim: Size
    num_kv_heads: Size
    rope: Rope
    window: Count | None = None
    value_is_key: bool = False
    reads_groups: bool = True
    mlp_dim: Size | None = None
    shares_with: Natural | None = None


class MixedTransformer(DropsTokens, LinearHead, nn.Module):
    """A causal language model over embeddings whose blocks differ in their attention.

    Blocks at one place of the period of kinds are one stack, and the periods are scanned.

    Attributes:
      vocab_size: rows of the embedding table.
      width: residual width D.
      depth: number of blocks.
      num_heads: query heads of every block.
      mlp_dim: hidden width of the gated feed-forward.
      kinds: of blocks.
      order: of each block the index of its kind.
      activation: of the gate, a name of `layers.mlp.ACTIVATIONS`.
      norm: kind of every norm, of those of queries and keys too.
      norm_epsilon: their epsilon.
      post_norm: a norm of the attention's and of the feed-forward's output too.
      value_norm: as in `MultiHeadAttention`.
      output_scale: as in `TransformerBlock`.
      use_bias: biases on the projections of the attention.
      expert_dim: hidden width of an expert, of mixtures of experts beside the feed-forwards; None for none.
      num_experts: experts to choose from.
      num_selected: experts of a token, whose weights are normalised.
      own_input_dim: channels P of an input of every block's own, see `LayerInputs`; None for none.
      own_input_rows: ids that have rows in its table.
      placeholder: the id whose row visual tokens read there.
      qk_scale: factor of the attention logits; head_dim ** -0.5 when None.
      embedding_scale: factor of embedded text, not of visual tokens; None for none.
      logit_softcap: the vocabulary logits are c * tanh(logits / c); None for the logits themselves.
      tie_embeddings: computes logits with the embedding table instead of a separate head.
      drops: where visual tokens are dropped, first to last. For reducers; `build` sets it.
      remat, unroll: as in `TransformerStack`.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Raises:
      ValueError: an order that has not one kind of `kinds` for each block, heads that do not divide, numbers of
        experts without experts, a table of own inputs without the placeholder, or kinds that cannot share keys.
      ConfigError: drops that renumber positions between keys and the blocks that share them.

    Source: Gemma Team 2025 (Gemma 3), section 2, for local and global blocks; transformers, models/gemma4,
    Gemma4TextModel, for heads of their own.
    """

    vocab_size: Size
    width: Size
    depth: Depth
    num_heads: Size
    mlp_dim: Size
    kinds: tuple[BlockKind, ...]
    order: tuple[Natural, ...]
    activation: Activation = "gelu_tanh"
    norm: NormKind = "rms_float32"
    norm_epsilon: NonNegative = 1e-6
    post_norm: bool = True
    value_norm: bool = True
    output_scale: bool = True
    use_bias: bool = False
    expert_dim: Size | None = None
    num_experts: Size = 1
    num_selected: Size = 1
    own_input_dim: Size | None = None
    own_input_rows: Size = 1
    placeholder: Natural = 0
    qk_scale: Positive | None = 1.0
    embedding_scale: Positive | None = None
    logit_softcap: Positive | None = None
    tie_embeddings: bool = True
    drops: tuple[Drop, ...] = ()
    remat: RematPolicy = "none"
    unroll: Depth = 1
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def __post_init__(self):
        if len(self.order) != self.depth or not all(0 <= index < len(self.kinds) for index in self.order):
            raise ValueError(
                f"order: expected for each of {self.depth} blocks the index of one of {len(self.kinds)} kinds, got "
                f"{self.order}"
            )
        if self.expert_dim is None and (self.num_experts, self.num_selected) != (1, 1):
            raise ValueError("experts need their hidden width, not only num_experts and num_selected; set expert_dim")
        for kind in self.kinds:
            if self.num_heads % kind.num_kv_heads:
                raise ValueError(f"{kind.num_kv_heads} heads of keys do not divide {self.num_heads} heads of queries")
        if self.own_input_dim is not None and self.placeholder >= self.own_input_rows:
            raise ValueError(f"placeholder: expected a row of {self.own_input_rows}, got {self.placeholder}")
        self._check_sharing()
        super().__post_init__()

    def _check_sharing(self):
        """Raises where keys are shared that are not there, or whose positions differ."""
        for index, kind in enumerate(self.kinds):
            if kind.shares_with is None or index not in self.order:
                continue
            source = self.kinds[kind.shares_with] if kind.shares_with < len(self.kinds) else None
            places = [place for place, own in enumerate(self.order) if own == kind.shares_with]
            if source is None or source.shares_with is not None or source.head_dim != kind.head_dim or not places:
                raise ValueError(
                    f"kinds[{index}].shares_with: expected the index of a kind with keys of its own, of heads of "
                    f"{kind.head_dim}, that some block has, got {kind.shares_with}"
                )
            if places[-1] > self.order.index(index):
                raise ValueError(
                    f"order: expected every block of kind {kind.shares_with} before those of kind {index}, which share "
                    f"its keys, got {self.order}"
                )
            wrong = [drop.layer for drop in self.drops if drop.renumbers and drop.layer > places[-1]]
            if wrong:
                raise ConfigError(
                    f"config.reducer: visual tokens are dropped before layers {wrong} with new positions, but layers "
                    f"from {self.order.index(index)} on read keys of layer {places[-1]}, which have the old ones; "
                    "choose a reducer that keeps positions, or layers up to "
                    f"{places[-1]}"
                )

    def setup(self):
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        stddev = self.width**-0.5 if self.tie_embeddings else 1.0  # as in `Transformer`
        self.embedding = Embed(self.vocab_size, self.width, stddev, **settings)
        for name, layers in self.stacks():
            kind = self._kind(name)
            stack = TransformerStack(
                len(layers),
                {**self._block(kind), **settings},
                self.remat,
                self.unroll,
                windows=() if kind.window is None else (kind.window,) * len(layers),
            )
            setattr(self, name, stack)
        if self.own_input_dim is not None:
            self.layer_inputs = LayerInputs(
                self.own_input_rows,
                self.depth,
                self.own_input_dim,
                self.placeholder,
                self.norm,
                self.norm_epsilon,
                **settings,
            )
        self.final_norm = Norm(self.norm, self.norm_epsilon, **settings)
        if not self.tie_embeddings:
            self.head = Dense(self.vocab_size, (axes.EMBED, axes.VOCAB), use_bias=False, adapts=False, **settings)

    def stacks(self) -> tuple[Stack, ...]:
        """One stack for every place of the period of kinds: `local_0_every_6` and so on, see `stacks_of`."""
        return stacks_of([self._kind_names[index] for index in self.order])

    @property
    def _kind_names(self) -> list[str]:
        """A name of every kind; of alike ones further ones have a letter."""
        found, seen = [], collections.Counter[str]()
        for kind in self.kinds:
            name = "global" if kind.window is None else "local"
            name += "" if kind.shares_with is None else "_shared"
            found.append(f"{name}_{string.ascii_lowercase[seen[name]]}" if seen[name] else name)
            seen[name] += 1
        return found

    def source_of(self, name: str) -> str | None:
        """The stack with the last block of the kind whose keys a stack's blocks share."""
        source = self._kind(name).shares_with
        if source is None:
            return None
        last = max(place for place, index in enumerate(self.order) if index == source)
        return self._stack_of(last)[0]

    def _index(self, name: str) -> int:
        """The index of the kind of a stack's blocks."""
        return next(self.order[layers[0]] for found, layers in self.stacks() if found == name)

    def _kind(self, name: str) -> BlockKind:
        return self.kinds[self._index(name)]

    def _block(self, kind: BlockKind) -> Fields:
        """Arguments of `TransformerBlock`."""
        return {
            "num_heads": self.num_heads,
            "num_kv_heads": kind.num_kv_heads,
            "head_dim": kind.head_dim,
            "mlp_dim": self.mlp_dim if kind.mlp_dim is None else kind.mlp_dim,
            "activation": self.activation,
            "gated": True,
            "norm": self.norm,
            "norm_epsilon": self.norm_epsilon,
            "post_norm": self.post_norm,
            "qkv_bias": self.use_bias,
            "use_bias": self.use_bias,
            "mlp_bias": False,
            "qk_norm": self.norm,
            "qk_scale": self.qk_scale,
            "value_norm": self.value_norm,
            "value_is_key": kind.value_is_key,
            "shares_keys": kind.shares_with is not None,
            "own_input_dim": self.own_input_dim,
            "output_scale": self.output_scale,
            "experts_beside": self._experts(),
        }

    def _experts(self) -> Fields | None:
        """Arguments of an `ExpertsBeside`."""
        if self.expert_dim is None:
            return None
        router = unbalanced(self.num_experts, self.num_selected)
        return {"hidden_dim": self.expert_dim, "router": router}

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Looks up token ids."""
        x = self.embedding(tokens)
        return x if self.embedding_scale is None else x * jnp.asarray(self.embedding_scale, x.dtype)

    def empty_layers(self, name: str, depth: int, batch_size: int, slots: int, dtype: Dtype) -> KeyValue:
        """Keys and values of `depth` blocks of a stack."""
        kind = self._kind(name)
        return KeyValue.empty(depth, batch_size, slots, kind.num_kv_heads, kind.head_dim, dtype)

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
        inputs = self._own_inputs(embeddings, token_ids)
        rows, cache = self.run_layers(
            embeddings, positions, segment_ids, cache, branch_ids, places, levels, group_ids, inputs
        )
        x = self.final_norm(rows.x)
        return x if places is None else restore(x, rows, embeddings.shape[1]), cache

    def _own_inputs(
        self, embeddings: Float[Array, "B T D"], token_ids: Int[Array, "B T"] | None
    ) -> Float[Array, "B T L P"] | None:
        """Of every block; None where blocks have none."""
        if self.own_input_dim is None:
            return None
        if token_ids is None:
            raise ValueError(
                "token_ids: expected the ids of the text, and NO_ID at visual tokens, since every block reads a row of "
                "a table beside the embeddings, got None"
            )
        return self.layer_inputs(embeddings, token_ids)

    def context(self, rows: Rows) -> Context:
        """The attention context of a sequence without a cache, with the angles of all kinds."""
        segments = rows.segment_ids
        return Context("causal", segments, segments, rows.branch_ids, rows.angles, groups=rows.group_ids)

    def context_in(self, name: str, context: Context) -> Context:
        """The context of a stack: the angles of its kind, and groups where it reads them."""
        index = self._index(name)
        kind = self.kinds[index]
        first = sum(other.head_dim // 2 for other in self.kinds[:index])
        assert context.angles is not None
        return dataclasses.replace(
            context,
            angles=context.angles[..., first : first + kind.head_dim // 2],
            magnitude=kind.rope.magnitude,
            groups=context.groups if kind.reads_groups else None,
        )

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """Of every kind of blocks."""
        return tuple(kind.rope for kind in self.kinds)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of every block in positions, or None."""
        return tuple(self.kinds[index].window for index in self.order)

    def _angles(self, positions: Positions, lengths: Int[Array, "B T"] | None) -> Float[Array, "B T A"]:
        """The rotary angles of each kind, concatenated."""
        found = [kind.rope.angles(positions, kind.head_dim, lengths) for kind in self.kinds]
        return jnp.concatenate(found, axis=-1)

    def rotary_dim(self) -> int:
        """Rotated coordinates of the widest heads."""
        return max(kind.head_dim for kind in self.kinds)
