"""The Q-Former: learned queries and an optional instruction attend to each other, and queries to the features."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vlm_jax import axes
from vlm_jax.connectors.solving import Queries
from vlm_jax.layers.attention import Context, MultiHeadAttention
from vlm_jax.layers.dense import Dense, Embed, with_axes
from vlm_jax.layers.mlp import Activation, Mlp
from vlm_jax.layers.norm import Norm
from vlm_jax.layers.scan import scan_layers
from vlm_jax.layers.squares import masked
from vlm_jax.ranges import Count, Depth, Natural, NonNegative, Size
from vlm_jax.types import Config, Dtype, Instruction, VisualFeatures, VisualTokens

# Queries, and the instruction or None: the carry of the layers.
Stream = tuple[Float[Array, "B M D"], Float[Array, "B T D"] | None]


class QueryTransformer(nn.Module, kw_only=True):
    """BERT with cross-attention to visual features in layers 0, n, 2 n, ..

    Queries and instruction share self-attention. Only queries attend to the features; the two have
    separate feed-forwards.

    Attributes:
      width: residual width.
      depth: number of layers.
      num_heads: attention heads.
      mlp_dim: hidden width of the feed-forwards.
      cross_attention_every: n.
      activation: a name of `layers.mlp.ACTIVATIONS`.
      norm_epsilon: epsilon of every LayerNorm.
      vocab_size: ids of the instruction's vocabulary; None for a model without instructions (BLIP-2).
      max_length: rows of the instruction's position table.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Source: Li et al. 2023 (BLIP-2), section 3.1; Dai et al. 2023 (InstructBLIP), section 2.3; transformers,
    models/blip_2 and models/instructblip.
    """

    width: Size
    depth: Depth
    num_heads: Size
    mlp_dim: Size
    cross_attention_every: Depth = 2
    activation: Activation = "gelu"
    norm_epsilon: NonNegative = 1e-12
    vocab_size: Size | None = None
    max_length: Count = 512
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, queries: Float[Array, "B M D"], features: VisualFeatures, instruction: Instruction | None = None
    ) -> Float[Array, "B M D"]:
        """The queries after the last layer.

        Raises:
          ValueError: an instruction without vocab_size, vocab_size without one, or one longer than max_length.
        """
        return self.read(queries, features, instruction)

    def read(
        self, queries: Float[Array, "B M D"], features: VisualFeatures, instruction: Instruction | None
    ) -> Float[Array, "B M D"]:
        """`__call__` of this class; to be called inside a subclass's compact `__call__`."""
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = Norm("layer", self.norm_epsilon, name="norm", **settings)
        text = self._embed(instruction)
        stream = (norm(queries), None if text is None else norm(text))
        everyone = jnp.ones(queries.shape[:2], jnp.int32)
        positions = everyone
        if instruction is not None:
            positions = jnp.concatenate([everyone, instruction.mask.astype(jnp.int32)], axis=1)
        contexts = (
            Context("full", jnp.ones_like(positions), positions),
            Context("full", everyone, features.mask.astype(jnp.int32)),
        )
        layer = {
            "num_heads": self.num_heads,
            "mlp_dim": self.mlp_dim,
            "activation": self.activation,
            "norm_epsilon": self.norm_epsilon,
            **settings,
        }
        groups, rest = divmod(self.depth, self.cross_attention_every)
        if groups:
            scanned = scan_layers(QFormerGroup, groups, in_axes=(nn.broadcast, nn.broadcast))
            stream, _ = scanned(self.cross_attention_every, layer, name="groups")(stream, masked(features), contexts)
        if rest:
            stream, _ = QFormerGroup(rest, layer, name="rest")(stream, masked(features), contexts)
        return stream[0]

    def _embed(self, instruction: Instruction | None) -> Float[Array, "B T D"] | None:
        if (instruction is None) != (self.vocab_size is None):
            given, fix = ("no", "pass one") if instruction is None else ("an", "leave it out")
            raise ValueError(f"qformer: vocab_size is {self.vocab_size}, but got {given} instruction; {fix}")
        if instruction is None or self.vocab_size is None:
            return None
        length = instruction.tokens.shape[1]
        if length > self.max_length:
            raise ValueError(f"qformer: max_length is {self.max_length}, but got an instruction of {length} tokens")
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        words = Embed(self.vocab_size, self.width, 0.02, name="words", **settings)(instruction.tokens)
        init = with_axes(nn.initializers.normal(0.02), axes.POSITION, axes.EMBED)
        table = self.param("positions", init, (self.max_length, self.width), self.param_dtype)
        return words + table[:length].astype(self.dtype)[None]


class QFormer(Queries, QueryTransformer, kw_only=True):
    """Learned queries through a `QueryTransformer`, and a linear layer to the decoder's width.

    Attributes:
      features: the decoder's width D.
      num_queries: number of tokens, solved from the budget.
      num_used: only the first `num_used` queries are used, the others serve larger budgets (`matryoshka`);
        all when None.
    """

    kind = "qformer"

    features: Size
    num_queries: Size
    num_used: Natural | None = None

    @nn.compact
    def __call__(  # type: ignore[override]
        self, features: VisualFeatures, *, deterministic: bool, instruction: Instruction | None = None
    ) -> VisualTokens:
        """Tokens of every image; takes one `instruction` per image where vocab_size is set, as in InstructBLIP.

        Raises:
          ValueError: an instruction without vocab_size, vocab_size without one, or one longer than max_length.
        """
        del deterministic  # no randomness
        init = with_axes(nn.initializers.truncated_normal(0.02), axes.QUERY, axes.EMBED)
        queries = self.param("queries", init, (self.num_queries, self.width), self.param_dtype)
        batch = features.tokens.shape[0]
        queries = queries[: self.num_used].astype(self.dtype)
        queries = jnp.broadcast_to(queries[None], (batch, *queries.shape))
        queries = self.read(queries, features, instruction)
        names, settings = (axes.CHANNELS_IN, axes.EMBED), {"dtype": self.dtype, "param_dtype": self.param_dtype}
        tokens = Dense(self.features, names, name="projection", **settings)(queries)
        return VisualTokens(tokens, jnp.broadcast_to(features.mask.any(1, keepdims=True), tokens.shape[:2]))


class QFormerGroup(nn.Module):
    """A layer with cross-attention and the layers up to the next one.

    Attributes:
      num_layers: number of layers.
      layer: keyword arguments of `QFormerLayer`.
    """

    num_layers: int
    layer: Config

    @nn.compact
    def __call__(self, stream: Stream, memory: jax.Array, contexts: tuple[Context, Context]) -> tuple[Stream, None]:
        for i in range(self.num_layers):
            stream = QFormerLayer(reads_features=i == 0, name=f"layer_{i}", **self.layer)(stream, memory, contexts)
        return stream, None


class QFormerLayer(nn.Module):
    """Self-attention, cross-attention of the queries, feed-forwards; a norm after each residual sum.

    Attributes:
      num_heads, mlp_dim, activation, norm_epsilon: as in `QueryTransformer`.
      reads_features: whether the layer has cross-attention.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.
    """

    num_heads: int
    mlp_dim: int
    activation: str
    norm_epsilon: float
    reads_features: bool
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, stream: Stream, memory: Float[Array, "B N E"], contexts: tuple[Context, Context]) -> Stream:
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def attend(name, x, context, **inputs):
            y, _ = MultiHeadAttention(self.num_heads, name=name, **settings)(x, context, **inputs)
            return norm(name, x + y)

        def feed_forward(name, x):
            return norm(name, x + Mlp(self.mlp_dim, self.activation, name=name, **settings)(x))

        def norm(name, x):
            return Norm("layer", self.norm_epsilon, name=f"{name}_norm", **settings)(x)

        queries, text = stream
        count = queries.shape[1]
        everything = queries if text is None else jnp.concatenate([queries, text], axis=1)
        everything = attend("attention", everything, contexts[0])
        queries = everything[:, :count]
        if self.reads_features:
            queries = attend("cross_attention", queries, contexts[1], inputs_k=memory)
        queries = feed_forward("mlp", queries)
        return queries, None if text is None else feed_forward("text_mlp", everything[:, count:])
