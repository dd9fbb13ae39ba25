"""The multi-head module around `attention`: projections, norms, rotary positions and the cache."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vlm_jax import axes
from vlm_jax.layers.attention.context import Context, KeyValue
from vlm_jax.layers.attention.entry import attention
from vlm_jax.layers.dense import Dense
from vlm_jax.layers.norm import Norm, NormKind, unit_rms
from vlm_jax.layers.rope import rotate
from vlm_jax.types import Dtype, Tree

HEADS = "heads"  # the collection for a layer's queries and keys, written only where it is mutable


def last(held: Tree, sown: Tree) -> Tree:
    """Reduction for `sow` that keeps the last value."""
    del held
    return sown


class MultiHeadAttention(nn.Module):
    """Projections around `attention`: self-attention, or cross-attention when `inputs_kv` is given.

    Attributes:
      num_heads: query heads Q.
      num_kv_heads: key and value heads K; Q when None.
      head_dim: H; width / Q when None.
      use_bias: biases on the query, key and value projections.
      key_bias: a bias on the key projection; `use_bias` when None.
      out_bias: a bias on the output projection.
      qk_norm: normalises queries and keys before RoPE, or None.
      qk_norm_over: whether `qk_norm` is per head, or over all heads at once, as in InternViT.
      value_norm: an RMSNorm without a scale of every head's values.
      value_is_key: values are the projected keys before their norm and RoPE, without a projection of their own.
      norm_epsilon: epsilon of the norms.
      qk_scale: factor of the attention logits; H ** -0.5 when None.
      gated: multiplies what the heads return by the sigmoid of another projection, before the output projection.
      out_dim: width of the output; the input's when None.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    use_bias: bool = True
    key_bias: bool | None = None
    out_bias: bool = True
    qk_norm: NormKind | None = None
    qk_norm_over: Literal["head", "width"] = "head"
    value_norm: bool = False
    value_is_key: bool = False
    norm_epsilon: float = 1e-6
    qk_scale: float | None = None
    gated: bool = False
    out_dim: int | None = None
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Context,
        *,
        inputs_k: Float[Array, "B S E"] | None = None,
        inputs_v: Float[Array, "B S E"] | None = None,
        cache: KeyValue | None = None,
    ) -> tuple[Float[Array, "B T F"], KeyValue | None]:
        """Attends from `x` to `inputs_k` (itself when None) and, before it, to the cache.

        Returns:
          The output, and with a cache the new keys and values, in its layout and dtype, to be written to it.
        """
        inputs_k = x if inputs_k is None else inputs_k
        inputs_v = inputs_k if inputs_v is None else inputs_v
        kv_heads = self.num_kv_heads or self.num_heads
        if self.head_dim is None and x.shape[-1] % self.num_heads:
            raise ValueError(
                f"{self.num_heads} heads do not divide a width of {x.shape[-1]}; set num_heads to a divisor of it"
            )
        head_dim = self.head_dim or x.shape[-1] // self.num_heads
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = functools.partial(Dense, **settings)
        key_bias = self.use_bias if self.key_bias is None else self.key_bias
        of_keys = (kv_heads * head_dim, (axes.EMBED, axes.KV_HEADS))
        query = dense(self.num_heads * head_dim, (axes.EMBED, axes.HEADS), self.use_bias, name="query")(x)
        key = dense(*of_keys, key_bias, name="key")(inputs_k)
        value = key if self.value_is_key else dense(*of_keys, self.use_bias, name="value")(inputs_v)
        query, key, value = (y.reshape(*y.shape[:-1], -1, head_dim) for y in (query, key, value))
        if self.qk_norm is not None:
            norm = {
                "kind": self.qk_norm,
                "epsilon": self.norm_epsilon,
                "axis_name": axes.HEAD_DIM if self.qk_norm_over == "head" else axes.NORM,
                **settings,
            }

            def normed(heads, name):
                flat = heads if self.qk_norm_over == "head" else heads.reshape(*heads.shape[:-2], -1)
                return Norm(name=name, **norm)(flat).reshape(heads.shape)

            query, key = normed(query, "query_norm"), normed(key, "key_norm")
        if self.value_norm:
            value = unit_rms(value, self.norm_epsilon)
        if context.angles is not None:
            query, key = (rotate(x, context.angles, context.magnitude) for x in (query, key))
        if context.query_scale is not None:
            query = query * context.query_scale[:, :, None, None].astype(query.dtype)
        if not self.is_initializing():
            # What ranks tokens by these scales them by H ** -0.5.
            queries = query if self.qk_scale is None else query * (self.qk_scale * head_dim**0.5)
            for name, heads_of in (("queries", queries), ("keys", key)):
                self.sow(HEADS, name, heads_of, init_fn=tuple, reduce_fn=last)
        past = fresh = None
        if cache is not None:
            key, value = key.astype(cache.key.dtype), value.astype(cache.value.dtype)
            fresh = KeyValue(key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3))
            key, value = key.astype(self.dtype), value.astype(self.dtype)
            past = cache if cache.key.shape[-1] else None
        out = attention(query, key, value, context, past=past, scale=self.qk_scale).reshape(*x.shape[:-1], -1)
        if self.gated:
            gate = dense(self.num_heads * head_dim, (axes.EMBED, axes.HEADS), self.use_bias, name="gate")(x)
            out = out * jax.nn.sigmoid(gate)
        width = self.out_dim or x.shape[-1]
        return Dense(width, (axes.HEADS, axes.EMBED), use_bias=self.out_bias, name="out", **settings)(out), fresh
