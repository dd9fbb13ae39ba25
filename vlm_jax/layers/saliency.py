"""How much attention every token gets, written out for the one layer that is asked."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.layers.attention import Context, allowed


class Heads(NamedTuple):
    """Queries and keys of one layer, after its norms and rotations."""

    query: Float[Array, "B T Q H"]
    key: Float[Array, "B S K H"]

    def joined(self) -> "Heads":
        """All heads side by side as a single one; queries and keys must have as many."""
        return Heads(*(x.reshape(*x.shape[:2], 1, -1) for x in self))


def attention_saliency(heads: Heads, context: Context, weights: Float[Array, "B T"]) -> Float[Array, "B S"]:
    """Softmax attention that each key gets: the mean over heads, and over queries by `weights`; float32.

    Args:
      heads: of the layer; query head q reads key head q // (Q // K).
      context: mask of the layer, without a cache. A key that a query may not read gets nothing of it.
      weights: how much each query counts; 0 throughout gives 0.
    """
    query, key = (x.astype(jnp.float32) for x in heads)
    batch, length, count, dim = query.shape
    grouped = query.reshape(batch, length, key.shape[2], -1, dim) * dim**-0.5
    logits = jnp.einsum("btkgh,bskh->bkgts", grouped, key)
    mask = allowed(context, length, key.shape[1])
    if mask is not None:
        mask = mask[:, None, None]
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    attended = jax.nn.softmax(logits, axis=-1)
    if mask is not None:
        attended = jnp.where(mask, attended, 0)
    shares = weights / jnp.maximum(weights.sum(axis=1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    return jnp.einsum("bts,bt->bs", attended.sum(axis=(1, 2)) / count, shares)
