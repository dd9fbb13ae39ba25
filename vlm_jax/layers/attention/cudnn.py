"""cuDNN's flash attention on NVIDIA GPUs, through JAX, which also partitions it by batch and heads."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.layers.attention.context import Context, allowed
from vlm_jax.layers.attention.tiles import padded


def cudnn(
    query: Float[Array, "B T Q H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    context: Context,
    bias: Float[Array, "B Q T S"] | None,
    *,
    scale: float,
) -> Float[Array, "B T Q V"]:
    """Attention with every mask of `context`.

    The kernel skips what a causal mask leaves out; segments, branches, groups and windows are an array [B, T, S].

    Args:
      query: queries in bfloat16 or float16.
      key: keys.
      value: values; they are padded to the width of the keys, which the kernel needs.
      context: the mask.
      bias: added to the scaled logits, or None.
      scale: factor of the logits.
    """
    length, num_keys, width = query.shape[1], key.shape[1], value.shape[3]
    causal = length == num_keys and context.mask_kind == "causal" and context.window is None and context.groups is None
    mask = allowed(dataclasses.replace(context, mask_kind="full") if causal else context, length, num_keys)
    value = padded(value, key.shape[3], axis=3)
    if (length % 2 or num_keys % 2) and not (mask is None and bias is None):  # its backward pass needs even lengths
        even, even_keys = length + length % 2, num_keys + num_keys % 2
        query, key, value = (padded(x, n, axis=1) for x, n in ((query, even), (key, even_keys), (value, even_keys)))
        mask = jnp.ones((1, length, num_keys), bool) if mask is None else mask
        mask = padded(padded(mask, even, axis=1), even_keys, axis=2)
        bias = None if bias is None else padded(padded(bias, even, axis=2), even_keys, axis=3)
    mask = None if mask is None else mask[:, None]
    bias = None if bias is None else bias.astype(query.dtype)
    out = jax.nn.dot_product_attention(
        query, key, value, bias, mask, scale=scale, is_causal=causal, implementation="cudnn"
    )
    return out[:, :length, :, :width]
