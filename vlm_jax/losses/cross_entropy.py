"""Cross entropy of token predictions, weighted per position: from logits, or by chunks from hidden states."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class TokenLoss(NamedTuple):
    """Weighted means over positions; 0 where all weights are 0.

    Attributes:
      value: cross entropy plus `z_loss`.
      accuracy: share of positions whose largest logit is the target's.
      z_loss: the z-loss times its weight.
    """

    value: Float[Array, ""]
    accuracy: Float[Array, ""]
    z_loss: Float[Array, ""]


def total_weight(weights: Float[Array, "*batch"]) -> Float[Array, ""]:
    """What a weighted sum over positions is divided by: sum(weights), above 0 where all are 0."""
    return jnp.maximum(weights.sum(), 1e-6)


def cross_entropy(
    logits: Float[Array, "*batch V"], targets: Int[Array, "*batch"], weights: Float[Array, "*batch"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted mean of -log softmax(logits)[target], in float32.

    Returns:
      The mean over the weights (0 where all are 0), and the weighted accuracy: the share of positions whose
      largest logit is the target's.
    """
    losses, correct, _ = _per_position(logits, targets)
    total = total_weight(weights)
    return (losses * weights).sum() / total, (correct * weights).sum() / total


def chunked_cross_entropy(
    hidden: Float[Array, "B T D"],
    logits_of: Callable[[Float[Array, "B t D"]], Float[Array, "B t V"]],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    chunk: int,
    z_loss: float = 0.0,
) -> TokenLoss:
    """`cross_entropy` of `logits_of(hidden)`, of which the forward and the backward pass hold one chunk only.

    Logits are computed twice, unless one chunk has all positions. Chunk j of n has the positions j, j + n, j + 2n and
    so on: where devices share T, each has an equal part of every chunk.

    Args:
      hidden: final hidden states of the decoder.
      logits_of: the head, of positions independent of each other. Arrays that it closes over get gradients, summed
        over chunks in float32.
      targets: ids; any valid id without weight.
      weights: weight per position.
      chunk: positions of a row in a chunk; T needs not be a multiple of it.
      z_loss: weight of the mean of logsumexp(logits)^2.

    Raises:
      ValueError: `chunk` is not positive.

    Source: z-loss as in Chowdhery et al. 2022 (PaLM), section 5.
    """
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1 position, got {chunk}")
    weights = weights.astype(jnp.float32)
    size, length = targets.shape
    num_chunks = -(-length // chunk)
    if num_chunks <= 1:
        sums = _sums(logits_of(hidden), targets, weights)
    else:
        apply, closed = jax.closure_convert(
            logits_of, jax.ShapeDtypeStruct((size, chunk, hidden.shape[-1]), hidden.dtype)
        )
        wide = [array.astype(jnp.promote_types(array.dtype, jnp.float32)) for array in closed]

        @jax.checkpoint
        def of_chunk(wide, part):
            hidden, targets, weights = part
            narrow = [array.astype(given.dtype) for array, given in zip(wide, closed, strict=True)]
            return _sums(apply(hidden, *narrow), targets, weights)

        def add(sums, part):
            return jax.tree.map(jnp.add, sums, of_chunk(wide, part)), None

        zero = jnp.zeros((), jnp.float32)
        parts = tuple(_chunks(array, num_chunks, chunk) for array in (hidden, targets, weights))
        sums, _ = jax.lax.scan(add, (zero, zero, zero), parts)
    total = total_weight(weights)
    loss, accuracy, squared = (each / total for each in sums)  # sum(loss * weight) / sum(weight)
    penalty = z_loss * squared if z_loss else jnp.zeros(())  # squared may be infinite
    return TokenLoss(loss + penalty, accuracy, penalty)


def _chunks(x: Float[Array, "B T *rest"] | Int[Array, "B T"], num_chunks: int, chunk: int) -> Array:
    """[B, T, ..] -> [num_chunks, B, chunk, ..], padded with 0; consecutive positions are in different chunks."""
    padding = num_chunks * chunk - x.shape[1]
    x = jnp.pad(x, ((0, 0), (0, padding), *((0, 0) for _ in x.shape[2:])))
    return jnp.moveaxis(x.reshape(x.shape[0], chunk, num_chunks, *x.shape[2:]), 2, 0)


def _sums(
    logits: Float[Array, "*batch V"], targets: Int[Array, "*batch"], weights: Float[Array, "*batch"]
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Weighted sums of the cross entropy, of hits, and of the squared logsumexp."""
    losses, correct, logsumexp = _per_position(logits, targets)
    return (losses * weights).sum(), (correct * weights).sum(), (jnp.square(logsumexp) * weights).sum()


def _per_position(
    logits: Float[Array, "*batch V"], targets: Int[Array, "*batch"]
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"], Float[Array, "*batch"]]:
    """Cross entropy, 1.0 for hits, and logsumexp, in float32."""
    logits = logits.astype(jnp.float32)
    ids = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    # A sum and not a gather: its gradient needs no scatter, and a vocabulary over several devices stays there.
    picked = jnp.where(ids == targets[..., None], logits, 0.0).sum(-1)
    logsumexp = jax.nn.logsumexp(logits, axis=-1)
    correct = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
    return logsumexp - picked, correct, logsumexp
