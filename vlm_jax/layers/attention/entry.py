"""The attention function that every model calls; it picks the implementation by the platform of the mesh's devices.

| platform | implementation |
|---|---|
| CPU, and GPU in float32 | `xla`: two products and a float32 softmax |
| CPU, where the attention weights exceed its caches | `blocked`: the same, head by head and in blocks of queries |
| GPU in bfloat16 or float16 | `cudnn`: flash, through `jax.nn.dot_product_attention` |
| TPU | `splash`: JAX's Pallas kernel, for whole and causal sequences with segments; else `xla` |

`xla` and `cudnn` are partitioned by XLA, the others by `partition`. Models do not name a kernel.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.layers.attention.context import Context, KeyValue, allowed
from vlm_jax.layers.attention.partition import partitioned
from vlm_jax.layers.attention.splash import splash
from vlm_jax.layers.attention.tiles import LANES
from vlm_jax.layers.attention.xla import TOGETHER_BYTES, blocked, written
from vlm_jax.layers.mesh_axes import active_mesh
from vlm_jax.layers.platform import platform

Implementation = Literal["xla", "blocked", "cudnn", "splash"]


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
    """The implementation for the platform of the mesh; see the module's table. Splash takes no bias."""
    if is_written_out():
        return "xla"
    on = platform()
    head_dim = query.shape[-1]
    if on == "gpu" and query.dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 256:
        return "cudnn"
    long = min(query.shape[1], key.shape[1]) >= LANES
    square = query.shape[1] == key.shape[1] or context.mask_kind == "full"
    plain = square and context.branches is None and context.window is None and not biased
    if on == "tpu" and long and plain:
        return "splash"
    num_weights = query.shape[0] * query.shape[2] * query.shape[1] * key.shape[1]
    if on == "cpu" and not biased and active_mesh() is None and 4 * num_weights > TOGETHER_BYTES:
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
        kernel = functools.partial(splash, scale=scale, interpret=platform() != "tpu")
        return partitioned(kernel, query, key, value, context)
    mask = allowed(context, query.shape[1], key.shape[1] + (0 if past is None else past.key.shape[-1]))
    if implementation == "cudnn":
        mask = None if mask is None else mask[:, None]
        bias = None if bias is None else bias.astype(query.dtype)
        width = value.shape[-1]  # the kernel needs the width of the keys
        value = jnp.pad(value, ((0, 0), (0, 0), (0, 0), (0, key.shape[-1] - width)))
        out = jax.nn.dot_product_attention(query, key, value, bias, mask, scale=scale, implementation="cudnn")
        return out[..., :width]
    if implementation == "blocked":
        return blocked(query, key, value, mask, context.mask_kind == "causal", scale)
    return written(query, key, value, past, mask, bias, scale)
