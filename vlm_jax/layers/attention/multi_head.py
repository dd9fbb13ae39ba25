"""The multi-head module around `attention`: projections, norms, rotary positions and the cache."""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vlm_jax import axes
from vlm_jax.layers.attention.context import Context, KeyValue, SharedKeyValue
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
      shares_keys: keys and values are those of an earlier layer, given as a `SharedKeyValue`, without projections and
        a cache of their own.
      norm_epsilon: epsilon of the norms.
      qk_scale: factor of the attention logits; H ** -0.5 when None.
      gated: multiplies what the heads return by the sigmoid of another projection, before the output projection.
      clips: `clips` of the linear layers; see `Dense`.
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
    shares_keys: bool = False
    norm_epsilon: float = 1e-6
    qk_scale: float | None = None
    gated: bool = False
    clips: bool = False
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
        cache: KeyValue | SharedKeyValue | None = None,
    ) -> tuple[Float[Array, "B T F"], KeyValue | None]:
        """Attends from `x` to `inputs_k` (itself when None) and, before it, to the cache.

        Returns:
          The output, and with a cache of its own the new keys and values, in its layout and dtype, to be written to it.

        Raises:
          ValueError: heads that do not divide the width, or keys to share that are not given.
        """
        inputs_k = x if inputs_k is None else inputs_k
        inputs_v = inputs_k if inputs_v is None else inputs_v
        if self.head_dim is None and x.shape[-1] % self.num_heads:
            raise ValueError(
                f"{self.num_heads} heads do not divide a width of {x.shape[-1]}; set num_heads to a divisor of it"
            )
        head_dim = self.head_dim or x.shape[-1] // self.num_heads
        query = self._projected(x, self.num_heads, self.use_bias, "query", head_dim)
        query = self._normed(query, "query_norm")
        if context.angles is not None:
            query = rotate(query, context.angles, context.magnitude)
        past = fresh = None
        if self.shares_keys:
            given = self._given(cache, query)
            key, value, past = given.key, given.value, given.past
        else:
            key, value = self._own_keys(inputs_k, inputs_v, head_dim, context)
        if context.query_scale is not None:
            query = query * context.query_scale[:, :, None, None].astype(query.dtype)
        if not self.is_initializing():
            # What ranks tokens by these scales them by H ** -0.5.
            queries = query if self.qk_scale is None else query * (self.qk_scale * head_dim**0.5)
            for name, heads_of in (("queries", queries), ("keys", key)):
                self.sow(HEADS, name, heads_of, init_fn=tuple, reduce_fn=last)
        if isinstance(cache, KeyValue):
            key, value = key.astype(cache.key.dtype), value.astype(cache.value.dtype)
            fresh = KeyValue(key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3))
            key, value = key.astype(self.dtype), value.astype(self.dtype)
            past = cache if cache.key.shape[-1] else None
        out = attention(query, key, value, context, past=past, scale=self.qk_scale).reshape(*x.shape[:-1], -1)
        if self.gated:
            gate = self._dense(self.num_heads * head_dim, (axes.EMBED, axes.HEADS), self.use_bias, name="gate")(x)
            out = out * jax.nn.sigmoid(gate)
        width = self.out_dim or x.shape[-1]
        return self._dense(width, (axes.HEADS, axes.EMBED), self.out_bias, name="out")(out), fresh

    @property
    def _dense(self) -> Callable[..., Dense]:
        """Makes a linear layer."""
        return functools.partial(Dense, clips=self.clips, dtype=self.dtype, param_dtype=self.param_dtype)

    def _projected(
        self, x: Float[Array, "B T D"], heads: int, use_bias: bool, name: str, head_dim: int
    ) -> Float[Array, "B T N H"]:
        """A projection of x by heads."""
        axis = axes.HEADS if name == "query" else axes.KV_HEADS
        y = self._dense(heads * head_dim, (axes.EMBED, axis), use_bias, name=name)(x)
        return y.reshape(*y.shape[:-1], -1, head_dim)

    def _normed(self, heads: Float[Array, "B T N H"], name: str) -> Float[Array, "B T N H"]:
        """Heads with their norm, where there is one."""
        if self.qk_norm is None:
            return heads
        per_head = self.qk_norm_over == "head"
        norm = Norm(
            self.qk_norm,
            self.norm_epsilon,
            axes.HEAD_DIM if per_head else axes.NORM,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )
        return norm(heads if per_head else heads.reshape(*heads.shape[:-2], -1)).reshape(heads.shape)

    def _own_keys(
        self, inputs_k: Float[Array, "B S E"], inputs_v: Float[Array, "B S E"], head_dim: int, context: Context
    ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Normalised, rotated keys, and values."""
        heads = self.num_kv_heads or self.num_heads
        key_bias = self.use_bias if self.key_bias is None else self.key_bias
        key = self._projected(inputs_k, heads, key_bias, "key", head_dim)
        value = key if self.value_is_key else self._projected(inputs_v, heads, self.use_bias, "value", head_dim)
        key = self._normed(key, "key_norm")
        if self.value_norm:
            value = unit_rms(value, self.norm_epsilon)
        return key if context.angles is None else rotate(key, context.angles, context.magnitude), value

    def _given(self, cache: KeyValue | SharedKeyValue | None, query: Float[Array, "B T Q H"]) -> SharedKeyValue:
        """The keys and values to share; zeros at initialisation, where parameters alone are made."""
        if isinstance(cache, SharedKeyValue):
            return cache
        if not self.is_initializing():
            raise ValueError("shares_keys: expected a SharedKeyValue of an earlier layer as cache, got none")
        batch, length, _, head_dim = query.shape
        zeros = jnp.zeros((batch, length, self.num_kv_heads or self.num_heads, head_dim), self.dtype)
        return SharedKeyValue(zeros, zeros)
