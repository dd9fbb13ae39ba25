"""JAX's Pallas kernel for TPU: whole or causal sequences with segments, on one device."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm_jax.layers.attention.tiles import blocks_of, padded, widened
from vlm_jax.types import PADDING_SEGMENT


def splash(
    query: Float[Array, "B T Q H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None,
    *,
    causal: bool,
    scale: float,
    softcap: float | None = None,
    interpret: bool = False,
) -> Float[Array, "B T Q V"]:
    """Attention inside segments; lengths and widths are padded to whole tiles.

    Args:
      query: queries; as many as keys where the mask is causal.
      key: keys.
      value: values.
      segments: of queries and keys; None where there is one.
      causal: whether a position reads no later one.
      scale: factor of the logits.
      softcap: as in `Context`.
      interpret: runs the kernel as JAX operations, on any platform.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as module

    num_queries, num_keys = query.shape[1], key.shape[1]
    of_queries, of_keys = blocks_of(num_queries), blocks_of(num_keys)
    shape = of_queries.padded, of_keys.padded
    mask = module.CausalMask(shape) if causal else module.FullMask(shape)
    tall, wide = of_queries.size, of_keys.size
    kernel = module.make_splash_mha_single_device(
        module.MultiHeadMask([mask] * query.shape[2]),
        block_sizes=module.BlockSizes(
            block_q=tall, block_kv=wide, block_q_dkv=tall, block_kv_dkv=wide, block_q_dq=tall, block_kv_dq=wide
        ),
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )
    query = query * jnp.asarray(scale, query.dtype)
    query = padded(widened(query), of_queries.padded, axis=1)
    of_value = value.shape[-1]
    key, value = (padded(widened(x), of_keys.padded, axis=1) for x in (key, value))
    heads_first = [x.transpose(0, 2, 1, 3) for x in (query, key, value)]
    if segments is None and of_keys.padded > num_keys and not causal:  # a causal query does not reach the padding
        segments = jnp.ones((len(query), num_queries), jnp.int32), jnp.ones((len(key), num_keys), jnp.int32)
    if segments is None:
        out = jax.vmap(kernel)(*heads_first)
    else:
        fill = functools.partial(padded, axis=1, value=PADDING_SEGMENT)
        lengths = of_queries.padded, of_keys.padded
        ids = module.SegmentIds(*(fill(ids, length) for ids, length in zip(segments, lengths, strict=True)))
        out = jax.vmap(kernel)(*heads_first, ids)
    return jnp.asarray(out).transpose(0, 2, 1, 3)[:, :num_queries, :, :of_value].astype(query.dtype)
