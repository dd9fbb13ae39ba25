"""Attention written out, as two products and a float32 softmax: whole, or in blocks of queries."""

import functools

import jax
import jax.numpy as jnp

from vlm_jax.softcap import capped

# Bytes of attention weights in `blocked`: of one block of queries of a key head, and of what is computed together.
# A few times the size of a core's own cache is as fast as that size.
BLOCK_BYTES, TOGETHER_BYTES = 2**20, 2**22
_NUM_BLOCKS = 8  # at most, because each is compiled


def blocked(query, key, value, mask, causal, scale, softcap=None):
    """A few key heads of one row at a time, in blocks of queries; causal queries skip the keys after their block."""
    batch, length, heads = query.shape[:3]
    num_keys, kv_heads = key.shape[1:3]
    row_bytes = 4 * (heads // kv_heads) * num_keys  # of the attention weights of one query and one key head
    block = min(length, max(BLOCK_BYTES // row_bytes, -(-length // _NUM_BLOCKS)))
    counts = [count for count in range(1, kv_heads + 1) if kv_heads % count == 0]
    together = max([1, *(count for count in counts if count * block * row_bytes <= TOGETHER_BYTES)])

    def of_heads(arrays, mask):
        (query, key, value), out = arrays, []
        for start in range(0, length, block):
            stop = min(start + block, length)
            seen = num_keys - length + stop if causal else num_keys
            part = None if mask is None else mask[None, start:stop, :seen]
            arrays = query[None, start:stop], key[None, :seen], value[None, :seen]
            out.append(written(*arrays, None, part, None, scale, softcap)[0])
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


def written(query, key, value, past, mask, bias, scale, softcap=None):
    """Heads first, so that each head is one matrix; the backward pass recomputes the attention weights."""
    batch, length, heads, dim = query.shape
    kv_heads = key.shape[2]
    query = (query * jnp.asarray(scale, query.dtype)).reshape(batch, length, kv_heads, -1, dim)
    query = query.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, dim)  # the heads of a group in sequence
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    num_keys = key.shape[2] + (0 if past is None else past.key.shape[-1])
    rows = (batch, kv_heads, -1, length, num_keys)  # of queries, before they are merged with the group axis
    bias = None if bias is None else bias.astype(jnp.float32).reshape(rows)
    out = _weighted_mean(query, key, value, past, mask, bias, rows, softcap)
    out = out.reshape(batch, kv_heads, -1, length, out.shape[-1]).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, length, heads, -1)


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(6, 7))
def _weighted_mean(query, key, value, past, mask, bias, rows, softcap):
    """Means of `past` and `value` [B, K, S, H] with weights from `query` [B, K, G * T, H]."""
    logits = jnp.einsum("bkth,bksh->bkts", query, key, preferred_element_type=jnp.float32)
    if past is not None:
        logits = jnp.concatenate([_matmul(query, past.key), logits], axis=-1)
    logits = capped(logits, softcap)
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
