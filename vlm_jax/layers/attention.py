"""The attention function that every model calls, and the multi-head module around it.

`attention` takes segment ids and a mask kind and picks the implementation by platform:

| platform | implementation |
|---|---|
| CPU, and GPU in float32 | `xla`: two einsums and a float32 softmax |
| CPU, where the attention weights exceed its caches | `blocked`: the same, head by head and in blocks of queries |
| GPU in bfloat16 or float16 | `cudnn`: flash, through `jax.nn.dot_product_attention` |
| TPU | `splash`: JAX's Pallas kernel, where its tile sizes divide; else `xla` |

Models do not name a kernel.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from vlm_jax import axes
from vlm_jax.layers.dense import Dense
from vlm_jax.layers.norm import Norm, NormKind
from vlm_jax.layers.per_layer import joined
from vlm_jax.layers.platform import platform
from vlm_jax.layers.rope import rotate
from vlm_jax.types import PADDING_SEGMENT, Dtype, Tree, static_field, struct

MaskKind = Literal["full", "causal"]
Implementation = Literal["xla", "blocked", "cudnn", "splash"]

HEADS = "heads"  # the collection for a layer's queries and keys, written only where it is mutable
_SPLASH_TILE = 128  # lanes of a TPU register; splash needs lengths that are multiples of it
# Bytes of attention weights in `blocked`: of one block of queries of a key head, and of what is computed together.
# A few times the size of a core's own cache is as fast as that size.
_BLOCK_BYTES, _TOGETHER_BYTES = 2**20, 2**22
_NUM_BLOCKS = 8  # at most, because each is compiled


class KeyValue(NamedTuple):
    """Cached keys and values of one layer, or of all with a leading layer axis, in the layout of the products."""

    key: Float[Array, "*L B K H S"]
    value: Float[Array, "*L B K S H"]

    AXES = ((axes.LAYERS, axes.BATCH, axes.KV_HEADS, None, None),) * 2  # of all layers
    SLOTS = (-1, -2)  # the axis of positions in each

    @classmethod
    def empty(cls, depth: int, batch_size: int, length: int, num_heads: int, head_dim: int, dtype: Dtype) -> "KeyValue":
        """`length` slots for every row of all layers."""
        shape = (depth, batch_size, num_heads)
        return cls(jnp.zeros((*shape, head_dim, length), dtype), jnp.zeros((*shape, length, head_dim), dtype))

    def part(self, start: int, stop: int | None) -> "KeyValue":
        """The keys and values of layers `start` to `stop` - 1."""
        return KeyValue(*(leaf[start:stop] for leaf in self))

    def joined(self, other: "KeyValue") -> "KeyValue":
        """These layers followed by those of `other`."""
        return KeyValue(*map(joined, self, other))


@struct
class Context:
    """Inputs of attention other than the activations, shared by all layers of a stack.

    Attributes:
      mask_kind: `full` (each position attends to its segment) or `causal` (and to no later position).
      query_segments: segment ids of the queries; None where there is one segment.
      key_segments: segment ids of the keys, cached ones included.
      branches: branch ids of both queries and keys (without a cache); a position attends to
        branch 0 and its own branch. None where there is one branch.
      angles: RoPE angles of the queries' positions, or None.
      magnitude: factor of rotated queries and keys.
      query_scale: factor of every query, or None.
      window: keys that a query of causal attention attends to at most, its own included; None for all.
      key_bias: added to the scaled logits of every key, or None.
    """

    mask_kind: MaskKind = static_field()
    query_segments: Int[Array, "B T"] | None = None
    key_segments: Int[Array, "B S"] | None = None
    branches: Int[Array, "B T"] | None = None
    angles: Float[Array, "B T half"] | None = None
    key_bias: Float[Array, "B S"] | None = None
    magnitude: float = static_field(default=1.0)
    query_scale: Float[Array, "B T"] | None = None
    window: Int[Array, ""] | None = None


def allowed(context: Context, num_queries: int, num_keys: int) -> Bool[Array, "B T S"] | Bool[Array, "1 T S"] | None:
    """The attention mask, True where a query may attend to a key; None where every query may attend to every key."""
    mask = None
    if context.mask_kind == "causal":
        rows = jnp.arange(num_keys - num_queries, num_keys)[:, None]
        mask = (rows >= jnp.arange(num_keys)[None, :])[None]
    if context.query_segments is not None and context.key_segments is not None:
        same = context.query_segments[:, :, None] == context.key_segments[:, None, :]
        mask = same if mask is None else mask & same
    if context.branches is not None:
        keys = context.branches[:, None, :]
        readable = (keys == 0) | (keys == context.branches[:, :, None])
        mask = readable if mask is None else mask & readable
    if context.window is not None:
        if context.mask_kind != "causal" or mask is None:
            raise ValueError(f"an attention window is for causal attention, not {context.mask_kind}")
        order = _order(context, mask)
        of_queries = order[:, num_keys - num_queries :]
        mask &= of_queries[:, :, None] - order[:, None, :] < context.window
    return mask


def _order(context: Context, mask: Bool[Array, "B T S"]) -> Int[Array, "B S"]:
    """Indices of the keys among the unmasked ones, without those of other branches."""
    if context.branches is not None:
        return jnp.sum(mask, axis=2)
    if context.key_segments is None:
        return jnp.arange(mask.shape[2])[None]
    return jnp.cumsum(context.key_segments != PADDING_SEGMENT, axis=1)


_written_out = contextvars.ContextVar("written_out", default=False)


@contextlib.contextmanager
def written_out() -> Iterator[None]:
    """Makes attention traced inside `xla` on every platform, so that its products can be counted."""
    token = _written_out.set(True)
    try:
        yield
    finally:
        _written_out.reset(token)


def is_written_out() -> bool:
    """Whether the current trace is inside `written_out`."""
    return _written_out.get()


def choose_implementation(
    query: jax.Array, key: jax.Array, context: Context, *, biased: bool = False
) -> Implementation:
    """The implementation for the platform of the mesh; see the module's table.

    Splash takes no bias. JAX does not partition a Pallas kernel by itself, so `splash` and `blocked`
    are used only on a mesh of one device.
    """
    if is_written_out():
        return "xla"
    on = platform()
    head_dim = query.shape[-1]
    if on == "gpu" and query.dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 256:
        return "cudnn"
    tiled = query.shape[1] % _SPLASH_TILE == 0 and key.shape[1] % _SPLASH_TILE == 0
    square = query.shape[1] == key.shape[1]
    plain = square and context.branches is None and context.window is None and not biased
    one_device = jax.sharding.get_abstract_mesh().size <= 1  # JAX partitions neither a Pallas kernel nor a loop
    if on == "tpu" and tiled and plain and one_device:
        return "splash"
    num_weights = query.shape[0] * query.shape[2] * query.shape[1] * key.shape[1]
    if on == "cpu" and not biased and one_device and 4 * num_weights > _TOGETHER_BYTES:
        return "blocked"
    return "xla"


def attention(
    query: Float[Array, "B T Q H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    context: Context,
    *,
    past: KeyValue | None = None,
    bias: Float[Array, "B Q T S"] | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T Q V"]:
    """Softmax attention; query head q uses key head q // (Q // K).

    Args:
      query: queries, any float dtype.
      key: keys; K divides Q.
      value: values, of any width up to H.
      context: mask kind and segment ids; the queries are at the positions of the last keys.
      past: cached keys and values before `key` and `value`; `context` counts them among the keys.
      bias: added to the scaled logits, for example relative positions.
      scale: factor of the logits; H ** -0.5 when None.
      implementation: forces one; chosen by platform when None.

    Returns:
      Outputs in the dtype of `query`. A query without any unmasked key gets a finite,
      meaningless value; padding is the only such case.

    Source: Vaswani et al. 2017, section 3.2.1; Ainslie et al. 2023 for grouped heads.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if context.key_bias is not None:
        shape = (query.shape[0], query.shape[2], query.shape[1], context.key_bias.shape[1])
        of_keys = jnp.broadcast_to(context.key_bias[:, None, None], shape)
        bias = of_keys if bias is None else bias + of_keys
    if past is not None:
        implementation = "xla"
    implementation = implementation or choose_implementation(query, key, context, biased=bias is not None)
    if implementation in ("splash", "blocked") and bias is not None:
        raise ValueError(f"{implementation} attention takes no bias; leave `implementation` None")
    if implementation == "splash":
        return _splash(query, key, value, context, scale)
    mask = allowed(context, query.shape[1], key.shape[1] + (0 if past is None else past.key.shape[-1]))
    if implementation == "cudnn":
        mask = None if mask is None else mask[:, None]
        bias = None if bias is None else bias.astype(query.dtype)
        width = value.shape[-1]  # the kernel needs the width of the keys
        value = jnp.pad(value, ((0, 0), (0, 0), (0, 0), (0, key.shape[-1] - width)))
        out = jax.nn.dot_product_attention(query, key, value, bias, mask, scale=scale, implementation="cudnn")
        return out[..., :width]
    if implementation == "blocked":
        return _blocked(query, key, value, mask, context.mask_kind == "causal", scale)
    return _xla(query, key, value, past, mask, bias, scale)


def _blocked(query, key, value, mask, causal, scale):
    """A few key heads of one row at a time, in blocks of queries; causal queries skip the keys after their block."""
    batch, length, heads = query.shape[:3]
    num_keys, kv_heads = key.shape[1:3]
    row_bytes = 4 * (heads // kv_heads) * num_keys  # of the attention weights of one query and one key head
    block = min(length, max(_BLOCK_BYTES // row_bytes, -(-length // _NUM_BLOCKS)))
    counts = [count for count in range(1, kv_heads + 1) if kv_heads % count == 0]
    together = max([1, *(count for count in counts if count * block * row_bytes <= _TOGETHER_BYTES)])

    def of_heads(arrays, mask):
        (query, key, value), out = arrays, []
        for start in range(0, length, block):
            stop = min(start + block, length)
            seen = num_keys - length + stop if causal else num_keys
            part = None if mask is None else mask[None, start:stop, :seen]
            out.append(_xla(query[None, start:stop], key[None, :seen], value[None, :seen], None, part, None, scale)[0])
        return jnp.concatenate(out)

    def of_row(row):
        *arrays, mask = row
        return jax.lax.map(lambda arrays: of_heads(arrays, mask), tuple(arrays))

    def apart(x):
        """[B, .., heads, H] -> [B, groups of heads, .., heads of a group, H]"""
        return x.reshape(batch, x.shape[1], kv_heads // together, -1, x.shape[-1]).transpose(0, 2, 1, 3, 4)

    mask = mask if mask is None else jnp.broadcast_to(mask, (batch, length, num_keys))
    out = jax.lax.map(of_row, (apart(query), apart(key), apart(value), mask))
    return out.transpose(0, 2, 1, 3, 4).reshape(batch, length, heads, -1)


def _xla(query, key, value, past, mask, bias, scale):
    """Heads first, so that each head is one matrix; the backward pass recomputes the attention weights."""
    batch, length, heads, dim = query.shape
    kv_heads = key.shape[2]
    query = (query * jnp.asarray(scale, query.dtype)).reshape(batch, length, kv_heads, -1, dim)
    query = query.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, dim)  # the heads of a group in sequence
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    num_keys = key.shape[2] + (0 if past is None else past.key.shape[-1])
    rows = (batch, kv_heads, -1, length, num_keys)  # of queries, before they are merged with the group axis
    bias = None if bias is None else bias.astype(jnp.float32).reshape(rows)
    out = _weighted_mean(query, key, value, past, mask, bias, rows)
    out = out.reshape(batch, kv_heads, -1, length, out.shape[-1]).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, length, heads, -1)


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(6,))
def _weighted_mean(query, key, value, past, mask, bias, rows):
    """Means of `past` and `value` [B, K, S, H] with weights from `query` [B, K, G * T, H]."""
    logits = jnp.einsum("bkth,bksh->bkts", query, key, preferred_element_type=jnp.float32)
    if past is not None:
        logits = jnp.concatenate([_matmul(query, past.key), logits], axis=-1)
    if mask is not None or bias is not None:
        logits = logits.reshape(rows)
        if bias is not None:
            logits = logits + bias
        if mask is not None:
            logits = jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
        logits = logits.reshape(*query.shape[:3], rows[-1])
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    total = weights.sum(-1, keepdims=True)
    weights = weights.astype(value.dtype)
    of_past, weights = jnp.split(weights, [rows[-1] - key.shape[2]], axis=-1)
    out = jnp.einsum("bkts,bksh->bkth", weights, value, preferred_element_type=jnp.float32)
    if past is not None:
        out = out + _matmul(of_past, past.value)
    return (out / total).astype(value.dtype)  # fewer divisions than normalising the weights


def _matmul(x, y):
    return jnp.matmul(x, y.astype(x.dtype), preferred_element_type=jnp.float32)


def _splash(query, key, value, context, scale):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape = (query.shape[1], key.shape[1])
    if context.mask_kind == "causal":
        head_mask = splash.CausalMask(shape)
    else:
        head_mask = splash.FullMask(shape)
    kernel = splash.make_splash_mha_single_device(splash.MultiHeadMask([head_mask] * query.shape[2]))
    groups = query.shape[2] // key.shape[2]
    heads_first = [jnp.swapaxes(x, 1, 2) for x in (query * scale, key, value)]
    q, k, v = heads_first[0], *(jnp.repeat(x, groups, axis=1) for x in heads_first[1:])
    if context.query_segments is None:
        out = jax.vmap(kernel)(q, k, v)
    else:
        out = jax.vmap(kernel)(q, k, v, splash.SegmentIds(context.query_segments, context.key_segments))
    return jnp.swapaxes(cast(jax.Array, out), 1, 2).astype(query.dtype)


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
      out_bias: a bias on the output projection.
      qk_norm: normalises queries and keys before RoPE, or None.
      qk_norm_over: whether `qk_norm` is per head, or over all heads at once, as in InternViT.
      norm_epsilon: epsilon of `qk_norm`.
      out_dim: width of the output; the input's when None.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    use_bias: bool = True
    out_bias: bool = True
    qk_norm: NormKind | None = None
    qk_norm_over: Literal["head", "width"] = "head"
    norm_epsilon: float = 1e-6
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
        dense = functools.partial(Dense, use_bias=self.use_bias, **settings)
        of_keys = (kv_heads * head_dim, (axes.EMBED, axes.KV_HEADS))
        query = dense(self.num_heads * head_dim, (axes.EMBED, axes.HEADS), name="query")(x)
        key, value = dense(*of_keys, name="key")(inputs_k), dense(*of_keys, name="value")(inputs_v)
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
        if context.angles is not None:
            query, key = (rotate(x, context.angles, context.magnitude) for x in (query, key))
        if context.query_scale is not None:
            query = query * context.query_scale[:, :, None, None].astype(query.dtype)
        if not self.is_initializing():
            for name, heads_of in (("queries", query), ("keys", key)):
                self.sow(HEADS, name, heads_of, init_fn=tuple, reduce_fn=last)
        past = fresh = None
        if cache is not None:
            key, value = key.astype(cache.key.dtype), value.astype(cache.value.dtype)
            fresh = KeyValue(key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3))
            key, value = key.astype(self.dtype), value.astype(self.dtype)
            past = cache if cache.key.shape[-1] else None
        out = attention(query, key, value, context, past=past).reshape(*x.shape[:-1], -1)
        width = self.out_dim or x.shape[-1]
        return Dense(width, (axes.HEADS, axes.EMBED), use_bias=self.out_bias, name="out", **settings)(out), fresh
