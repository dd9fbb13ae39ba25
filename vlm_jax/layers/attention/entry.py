"""The attention function that every model calls; it picks the implementation by the platform of the mesh's devices.

| platform | implementation |
|---|---|
| any, where the mesh divides sequences and there are as many queries as keys | `ring` |
| CPU, and GPU in float32 or with a softcap | `xla`: two products and a float32 softmax |
| CPU, where the attention weights exceed its caches | `blocked`: the same, head by head and in blocks of queries |
| GPU in bfloat16 or float16, without a softcap | `cudnn`: flash, through `jax.nn.dot_product_attention` |
| TPU, at least 128 queries and keys, no bias | `splash`: JAX's Pallas kernel, for segments, whole or causal |
| the same, whole, with at most 256 queries and keys (4 GiB of weights), and heads that 128 does not divide | `xla` |
| the same, with windows, branches, groups, or causal queries after earlier keys | `flash`: our Pallas kernel |
| TPU, else | `xla` |

`xla` and `cudnn` are partitioned by XLA, the others by `partition`. Models do not name a kernel.
"""

import contextlib
import contextvars
import functools
import logging
from collections.abc import Iterator
from typing import Literal, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.layers.attention.context import Context, KeyValue, allowed
from vlm_jax.layers.attention.cudnn import cudnn
from vlm_jax.layers.attention.flash import flash
from vlm_jax.layers.attention.marks import marks_of, with_padding
from vlm_jax.layers.attention.partition import context_shards, partitioned
from vlm_jax.layers.attention.ring import Kernels, Products, Ring, ring
from vlm_jax.layers.attention.splash import splash
from vlm_jax.layers.attention.tiles import LANES, padded
from vlm_jax.layers.attention.xla import TOGETHER_BYTES, blocked, written
from vlm_jax.layers.mesh_axes import active_mesh
from vlm_jax.layers.platform import platform

_log = logging.getLogger(__name__)

Implementation = Literal["xla", "blocked", "cudnn", "splash", "flash", "ring"]
# Queries and keys whose weights cost less than padding narrow heads for a kernel of a TPU, and the most bytes of these
# weights on a device.
FEW, FEW_BYTES = 256, 4 * 2**30


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
    """The implementation for the platform of the mesh; see the module's table."""
    if is_written_out():
        return "xla"
    on = platform()
    chosen, reason = _choice(on, query, key, context, biased)
    if on != "cpu" or chosen == "ring":
        _tell(on, chosen, reason)
    return chosen


@functools.cache
def _tell(on: str, chosen: str, reason: str) -> None:
    _log.info("attention on %s: %s, for %s", on, chosen, reason)


def _choice(on: str, query: jax.Array, key: jax.Array, context: Context, biased: bool) -> tuple[Implementation, str]:
    (batch, length, heads, head_dim), num_keys, shards = query.shape, key.shape[1], context_shards().size
    if biased and on != "gpu":
        return "xla", "a bias of the logits"
    if shards > 1 and length == num_keys >= shards and not biased:
        return "ring", f"sequences over {shards} devices"
    if on == "tpu":
        if min(length, num_keys) < LANES:
            return "xla", f"fewer than {LANES} queries or keys"
        masks = _masks(context, length, num_keys)
        if masks:
            return "flash", masks
        mesh = active_mesh()
        weights = 4 * batch * heads * length * num_keys // (1 if mesh is None else mesh.size)
        few = max(length, num_keys) <= FEW and weights <= FEW_BYTES
        if context.mask_kind == "full" and few and head_dim % LANES:
            return "xla", f"at most {FEW} queries and keys, whose heads of {head_dim} a kernel would pad"
        return "splash", f"{context.mask_kind} attention inside segments"
    if on == "gpu":
        if context.softcap is not None:
            return "xla", "a softcap, which cuDNN's kernel does not support"
        if query.dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 256:
            return "cudnn", f"heads of {head_dim} in {query.dtype}"
        return "xla", f"heads of {head_dim} in {query.dtype}"
    if active_mesh() is None and 4 * batch * heads * length * num_keys > TOGETHER_BYTES:
        return "blocked", "many attention weights"
    return "xla", "few attention weights, or several devices"


def _masks(context: Context, num_queries: int, num_keys: int) -> str:
    """Masks that are neither segments nor causal over as many queries as keys, in words."""
    earlier = context.mask_kind == "causal" and num_queries != num_keys
    masks = {"a window": context.window is not None, "branches": context.branches is not None}
    masks |= {"groups": context.groups is not None, "queries after earlier keys": earlier}
    return " and ".join(name for name, given in masks.items() if given)


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

    Raises:
      ValueError: a forced implementation without a bias, a mask or a softcap that is given, or blocks without a bias
        or a mask.

    Source: Vaswani et al. 2017, section 3.2.1; Ainslie et al. 2023 for grouped heads; Gemma Team 2024 (Gemma 2),
    section 2, for the softcap.
    """
    scale = cast(float, query.shape[-1] ** -0.5) if scale is None else scale
    if context.key_bias is not None:
        shape = (query.shape[0], query.shape[2], query.shape[1], context.key_bias.shape[1])
        of_keys = jnp.broadcast_to(context.key_bias[:, None, None], shape)
        bias = of_keys if bias is None else bias + of_keys
    if context.block is not None:
        if past is not None or bias is not None:
            raise ValueError(f"attention in blocks of {context.block} takes no cache and no bias")
        return _in_blocks(query, key, value, context, scale, implementation)
    if past is not None:
        implementation = "xla"
    implementation = implementation or choose_implementation(query, key, context, biased=bias is not None)
    if implementation == "cudnn":
        if context.softcap is not None:
            raise ValueError("cudnn attention takes no softcap; leave `implementation` None")
        return cudnn(query, key, value, context, bias, scale=scale)
    if implementation == "xla":
        mask = allowed(context, query.shape[1], key.shape[1] + (0 if past is None else past.key.shape[-1]))
        return written(query, key, value, past, mask, bias, scale, context.softcap)
    if bias is not None:
        raise ValueError(f"{implementation} attention takes no bias; leave `implementation` None")
    masks = _masks(context, query.shape[1], key.shape[1])
    if implementation == "splash" and masks:
        raise ValueError(f"splash attention takes no mask of {masks}; leave `implementation` None")
    return _IMPLEMENTATIONS[implementation](query, key, value, context, scale)


def _in_blocks(query, key, value, context, scale, implementation):
    """Blocks as rows of a batch; every device folds the positions that it has."""
    length, masks = context.block, _masks(context, query.shape[1], key.shape[1])
    if masks or context.mask_kind != "full":
        raise ValueError(f"attention in blocks of {length} is full: expected no mask of {masks or context.mask_kind}")
    if query.shape[1] % length or key.shape[1] != query.shape[1]:
        raise ValueError(
            f"attention in blocks of {length}: expected as many keys as queries, a multiple of the block, got "
            f"{query.shape[1]} queries and {key.shape[1]} keys"
        )

    def of_device(query, key, value, segments):
        inner = Context("full", *segments, block=length, softcap=context.softcap).of_blocks()
        rows, keys, values = (x.reshape(-1, length, *x.shape[2:]) for x in (query, key, value))
        out = attention(rows, keys, values, inner, scale=scale, implementation=implementation)
        return out.reshape(*query.shape[:3], -1)

    segments = context.query_segments, context.key_segments
    if is_written_out():
        return of_device(query, key, value, segments)
    return partitioned(of_device, query, key, value, segments, unit=length)


def _blocked(query, key, value, context, scale):
    mask = allowed(context, query.shape[1], key.shape[1])
    causal = context.mask_kind == "causal" and context.groups is None
    return blocked(query, key, value, mask, causal, scale, context.softcap)


def _splash(query, key, value, context, scale):
    segments = None if context.query_segments is None else (context.query_segments, context.key_segments)
    causal = context.mask_kind == "causal"
    settings = {"causal": causal, "scale": scale, "softcap": context.softcap, "interpret": platform() != "tpu"}
    kernel = functools.partial(splash, **settings)
    return partitioned(kernel, query, key, value, segments)


def _flash(query, key, value, context, scale):
    marks = marks_of(context, query.shape[0], query.shape[1], key.shape[1])
    interpret, softcap = platform() != "tpu", context.softcap
    kernel = functools.partial(_heads_first, lambda *arrays: flash(*arrays, interpret, softcap))
    return partitioned(kernel, query * jnp.asarray(scale, query.dtype), key, value, marks)


def _ring(query, key, value, context, scale):
    """Ring attention; a sequence that the ring does not divide is padded."""
    axis, size = context_shards()
    length = query.shape[1]
    if axis is None or key.shape[1] != length:
        raise ValueError(
            "ring attention: expected a mesh whose axis context is more than 1, and as many keys as queries, got "
            f"{size} shards, {length} queries and {key.shape[1]} keys"
        )
    whole = -(-length // size) * size
    marks = with_padding(marks_of(context, query.shape[0], length, length), whole, whole)
    cap = {"softcap": context.softcap}
    local = Kernels(interpret=False, **cap) if platform() == "tpu" else Products(**cap)
    kernel = functools.partial(_heads_first, functools.partial(ring, over=Ring(axis, size, local)))
    query = query * jnp.asarray(scale, query.dtype)
    query, key, value = (padded(x, whole, axis=1) for x in (query, key, value))
    return partitioned(kernel, query, key, value, marks, unit=1)[:, :length]


def _heads_first(kernel, query, key, value, marks):
    out = kernel(*(x.transpose(0, 2, 1, 3) for x in (query, key, value)), marks)
    return out.transpose(0, 2, 1, 3)


_IMPLEMENTATIONS = {"blocked": _blocked, "splash": _splash, "flash": _flash, "ring": _ring}
