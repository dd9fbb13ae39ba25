"""JAX's Pallas kernel for TPU: whole or causal sequences with segments, on one device."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.layers.attention.context import Context
from vlm_jax.layers.attention.tiles import blocks_of, padded, widened
from vlm_jax.types import PADDING_SEGMENT


def splash(
    query: Float[Array, "B T Q H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    context: Context,
    *,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "B T Q V"]:
    """Attention of the mask kind and segments of `context`; lengths and widths are padded to whole tiles.

    Args:
      query: queries; as many as keys where the mask is causal.
      key: keys.
      value: values.
      context: mask kind and segments.
      scale: factor of the logits.
      interpret: runs the kernel as JAX operations, on any platform.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as module

    num_queries, num_keys = query.shape[1], key.shape[1]
    of_queries, of_keys = blocks_of(num_queries), blocks_of(num_keys)
    shape = of_queries.padded, of_keys.padded
    mask = module.CausalMask(shape) if context.mask_kind == "causal" else module.FullMask(shape)
    tall, wide = of_queries.size, of_keys.size
    kernel = module.make_splash_mha_single_device(
        module.MultiHeadMask([mask] * query.shape[2]),
        block_sizes=module.BlockSizes(
            block_q=tall, block_kv=wide, block_q_dkv=tall, block_kv_dkv=wide, block_q_dq=tall, block_kv_dq=wide
        ),
        interpret=interpret,
    )
    query = query * jnp.asarray(scale, query.dtype)
    query = padded(widened(query), of_queries.padded, axis=1)
    of_value = value.shape[-1]
    key, value = (padded(widened(x), of_keys.padded, axis=1) for x in (key, value))
    heads_first = [x.transpose(0, 2, 1, 3) for x in (query, key, value)]
    segments = _segments(context, num_queries, num_keys, query.shape[0])
    if segments is None:
        out = jax.vmap(kernel)(*heads_first)
    else:
        fill = functools.partial(padded, axis=1, value=PADDING_SEGMENT)
        ids = module.SegmentIds(fill(segments[0], of_queries.padded), fill(segments[1], of_keys.padded))
        out = jax.vmap(kernel)(*heads_first, ids)
    return jnp.asarray(out).transpose(0, 2, 1, 3)[:, :num_queries, :, :of_value].astype(query.dtype)


def _segments(context: Context, num_queries: int, num_keys: int, batch: int) -> tuple[jax.Array, jax.Array] | None:
    """Segments of queries and keys, padding excluded; None where there is neither padding nor a second segment."""
    if context.query_segments is not None and context.key_segments is not None:
        return context.query_segments, context.key_segments
    if blocks_of(num_keys).padded == num_keys or context.mask_kind == "causal":
        return None  # padding is behind every causal query
    return jnp.ones((batch, num_queries), jnp.int32), jnp.ones((batch, num_keys), jnp.int32)
