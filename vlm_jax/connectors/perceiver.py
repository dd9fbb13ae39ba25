"""The perceiver resampler: learned queries attend to the features and to each other in every layer."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vlm_jax import axes
from vlm_jax.connectors.solving import Queries
from vlm_jax.layers.attention import Context, MultiHeadAttention
from vlm_jax.layers.dense import with_axes
from vlm_jax.layers.mlp import Activation, Mlp
from vlm_jax.layers.norm import Norm, NormKind
from vlm_jax.layers.scan import scan_layers
from vlm_jax.layers.squares import masked
from vlm_jax.ranges import Depth, Natural, NonNegative, Size
from vlm_jax.types import Config, Dtype, VisualFeatures, VisualTokens

_MLP_RATIO = 4  # of every layer, in both releases


class Perceiver(Queries, nn.Module):
    """A feed-forward to the decoder's width, `depth` layers of queries attending to features and queries, a norm.

    Every layer has a separate norm for the features, which are never updated. With `norm="layer"`,
    `activation="gelu"` and `gated=False` the layers are those of Flamingo.

    Attributes:
      features: the decoder's width D, which is also that of the queries.
      num_queries: number of tokens, solved from the budget.
      depth: number of layers.
      num_used: only the first `num_used` queries are used, the others serve larger budgets (`matryoshka`);
        all when None.
      num_heads: query heads; max(D // 128, 1) when None.
      num_kv_heads: key and value heads; num_heads when None.
      head_dim: width of a head; D / num_heads when None.
      projection_dim: hidden width of the first feed-forward; 4 D when None.
      norm: kind of every norm.
      activation, gated: of every feed-forward, as in `Mlp`.
      norm_epsilon: epsilon of every norm.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Source: Alayrac et al. 2022 (Flamingo), section 2.1 and figure 5; Laurençon et al. 2024 (Idefics2), section
    3.2; transformers, models/idefics2, Idefics2Connector.
    """

    kind = "perceiver"

    features: Size
    num_queries: Size
    depth: Depth
    num_heads: Size | None = None
    num_kv_heads: Size | None = None
    head_dim: Size | None = None
    projection_dim: Size | None = None
    norm: NormKind = "rms"
    activation: Activation = "silu"
    gated: bool = True
    norm_epsilon: NonNegative = 1e-6
    num_used: Natural | None = None
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, features: VisualFeatures, *, deterministic: bool) -> VisualTokens:
        del deterministic  # no randomness
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        mlp = {"activation": self.activation, "gated": self.gated, "use_bias": False, **settings}
        norm = {"kind": self.norm, "epsilon": self.norm_epsilon, **settings}
        batch = features.tokens.shape[0]
        init = with_axes(nn.initializers.truncated_normal(0.02), axes.QUERY, axes.EMBED)
        queries = self.param("queries", init, (self.num_queries, self.features), self.param_dtype)
        queries = queries[: self.num_used].astype(self.dtype)
        queries = jnp.broadcast_to(queries[None], (batch, *queries.shape))
        hidden_dim = self.projection_dim or _MLP_RATIO * self.features
        keys = Mlp(hidden_dim, out_dim=self.features, name="projection", **mlp)(masked(features))
        everyone = jnp.ones(queries.shape[:2], jnp.int32)
        context = Context("full", everyone, jnp.concatenate([features.mask.astype(jnp.int32), everyone], axis=1))
        attention = {
            "num_heads": self.num_heads or max(self.features // 128, 1),
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "use_bias": False,
            "out_bias": False,
            **settings,
        }
        layers = scan_layers(PerceiverLayer, self.depth, in_axes=(nn.broadcast, nn.broadcast))
        layers = layers(attention, {"hidden_dim": _MLP_RATIO * self.features, **mlp}, norm, name="layers")
        queries, _ = layers(queries, keys, context)
        tokens = Norm(name="final_norm", **norm)(queries)
        return VisualTokens(tokens, jnp.broadcast_to(features.mask.any(1, keepdims=True), tokens.shape[:2]))


class PerceiverLayer(nn.Module):
    """queries + attention(norm(queries), [norm(features), norm(queries)]), then queries + mlp(norm(queries)).

    Attributes:
      attention, mlp, norm: keyword arguments of `MultiHeadAttention`, `Mlp` and `Norm`.
    """

    attention: Config
    mlp: Config
    norm: Config

    @nn.compact
    def __call__(
        self, queries: Float[Array, "B M D"], features: Float[Array, "B N D"], context: Context
    ) -> tuple[Float[Array, "B M D"], None]:
        x = Norm(name="query_norm", **self.norm)(queries)
        keys = jnp.concatenate([Norm(name="feature_norm", **self.norm)(features), x], axis=1)
        attended, _ = MultiHeadAttention(name="attention", **self.attention)(x, context, inputs_k=keys)
        queries = queries + attended
        return queries + Mlp(name="mlp", **self.mlp)(Norm(name="mlp_norm", **self.norm)(queries)), None
