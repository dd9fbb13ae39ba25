"""Qwen-VL's resampler: one cross-attention from learned queries to all features."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vlm_jax import axes
from vlm_jax.budget import grid_of_size
from vlm_jax.connectors.solving import Queries
from vlm_jax.layers.attention import Context, MultiHeadAttention
from vlm_jax.layers.dense import Dense, with_axes
from vlm_jax.layers.norm import Norm
from vlm_jax.layers.position_embedding import sincos_2d
from vlm_jax.layers.resize import resize
from vlm_jax.layers.squares import in_rows, masked
from vlm_jax.ranges import Natural, NonNegative, Size
from vlm_jax.types import Dtype, Grid, VisualFeatures, VisualTokens


class Resampler(Queries, nn.Module):
    """One cross-attention layer from `num_queries` learned queries to the features.

    Sin-cos positions are added to queries and keys, never to values. Queries have the positions of
    a grid where their number forms one, else of points along the diagonal. With `released`
    the layer is exactly Qwen-VL's, for a square number of queries.

    Attributes:
      features: the decoder's width D.
      num_queries: number of tokens, solved from the budget.
      num_heads: attention heads; max(D // 128, 1) when None, as in Qwen-VL.
      num_used: only the first `num_used` queries are used, the others serve larger budgets (`matryoshka`);
        all when None.
      released: positions are a stored table of the queries' grid, which is interpolated for the keys;
        features of the decoder's width are not projected; a norm and a projection follow.
      norm_epsilon: epsilon of every LayerNorm.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Source: Bai et al. 2023 (Qwen-VL), section 2.1; Qwen-VL-Chat, visual.py, Resampler.
    """

    kind = "resampler"

    features: Size
    num_queries: Size
    num_heads: Size | None = None
    released: bool = False
    norm_epsilon: NonNegative = 1e-6
    num_used: Natural | None = None
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def query_positions(self, grid: Grid) -> jnp.ndarray:
        """[num_queries, D] sin-cos embeddings of the queries' positions, stretched over `grid`."""
        query_grid = grid_of_size(self.num_queries, (max(grid), max(grid)))
        if query_grid is not None:
            return jnp.asarray(sincos_2d(query_grid, self.features, table_grid=grid))
        # Point i of the diagonal has column i of a row of points and row i of a column of points.
        count, half = self.num_queries, self.features // 2
        columns = sincos_2d((1, count), self.features, table_grid=grid)[:, :half]
        rows = sincos_2d((count, 1), self.features, table_grid=grid)[:, half:]
        return jnp.asarray(np.concatenate([columns, rows], axis=1))

    def _stored_positions(self, grid: Grid) -> tuple[jax.Array, jax.Array]:
        """The stored table [num_queries, D], and the same at the feature grid; neither is trained."""
        side = math.isqrt(self.num_queries)
        if side * side != self.num_queries:
            raise ValueError(f"released positions need a square number of queries, got {self.num_queries}")

        def init(key: jax.Array, shape: tuple[int, int], dtype: Dtype) -> jax.Array:
            del key
            return jnp.asarray(sincos_2d((side, side), shape[1], last=False), dtype)

        shape = (self.num_queries, self.features)
        table = self.param("positions", with_axes(init, axes.QUERY, axes.EMBED), shape, self.param_dtype)
        table = jax.lax.stop_gradient(table.astype(jnp.float32))
        return table, resize(table.reshape(side, side, -1), grid, "bicubic").reshape(-1, self.features)

    @nn.compact
    def __call__(self, features: VisualFeatures, *, deterministic: bool) -> VisualTokens:
        del deterministic  # no randomness
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = {"kind": "layer", "epsilon": self.norm_epsilon, **settings}
        batch = features.tokens.shape[0]
        init = with_axes(nn.initializers.truncated_normal(0.02), axes.QUERY, axes.EMBED)
        queries = self.param("queries", init, (self.num_queries, self.features), self.param_dtype)
        kv = masked(in_rows(features, "resampler"))
        if not self.released or kv.shape[-1] != self.features:
            kv = Dense(self.features, (axes.CHANNELS_IN, axes.EMBED), use_bias=False, name="kv_proj", **settings)(kv)
        kv = Norm(name="kv_norm", **norm)(kv)
        q = Norm(name="query_norm", **norm)(queries[None, : self.num_used])
        if self.released:
            query_positions, key_positions = self._stored_positions(features.grid)
        else:
            query_positions = self.query_positions(features.grid)
            key_positions = jnp.asarray(sincos_2d(features.grid, self.features))
        q = q + query_positions.astype(self.dtype)[None, : self.num_used]
        keys = kv + key_positions.astype(self.dtype)[None]
        query_segments = jnp.ones((batch, q.shape[1]), jnp.int32)
        context = Context("full", query_segments, features.mask.astype(jnp.int32))
        num_heads = self.num_heads or max(self.features // 128, 1)
        attention = MultiHeadAttention(num_heads, name="attention", **settings)
        q = jnp.broadcast_to(q, (batch, *q.shape[1:]))
        tokens, _ = attention(q, context, inputs_k=keys, inputs_v=kv)
        if self.released:
            tokens = Norm(name="post_norm", **norm)(tokens)
            names = (axes.EMBED, axes.CLASSES)
            tokens = Dense(self.features, names, use_bias=False, name="projection", **settings)(tokens)
        return VisualTokens(tokens, jnp.broadcast_to(features.mask.any(1, keepdims=True), tokens.shape[:2]))
