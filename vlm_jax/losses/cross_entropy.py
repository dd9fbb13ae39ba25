"""Cross entropy of token predictions, weighted per position."""

from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm_jax.losses.vocabulary_blocks import Blocks, PerPosition, losses_in_blocks, softcapped


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


def cross_entropy(
    logits: Float[Array, "*batch V"], targets: Int[Array, "*batch"], weights: Float[Array, "*batch"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted mean of -log softmax(logits)[target], in float32.

    Returns:
      The mean over the weights (0 where all are 0), and the weighted accuracy: the share of positions whose
      largest logit is the target's.
    """
    found = _weighted(*_per_position(logits, targets), weights, 0.0)
    return found.value, found.accuracy


def head_cross_entropy(
    hidden: Float[Array, "B T D"],
    kernel: Float[Array, "V D"] | Float[Array, "D V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    blocks: Blocks,
    z_loss: float = 0.0,
) -> TokenLoss:
    """`cross_entropy` of the logits hidden @ kernel, of which both passes hold one block of the vocabulary at a time.

    Logits are computed twice, unless one block has the whole vocabulary.

    Args:
      hidden: final hidden states of the decoder.
      kernel: kernel of the head.
      targets: ids; any valid id without weight.
      weights: weight per position.
      blocks: the kernel's layout, and the size of a block.
      z_loss: weight of the mean of logsumexp(logits)^2.

    Source: z-loss as in Chowdhery et al. 2022 (PaLM), section 5.
    """
    return _weighted(*head_losses(hidden, kernel, targets, blocks=blocks), weights, z_loss)


def head_losses(
    hidden: Float[Array, "B T D"],
    kernel: Float[Array, "V D"] | Float[Array, "D V"],
    targets: Int[Array, "B T"],
    *,
    blocks: Blocks,
) -> PerPosition:
    """Cross entropy, 1.0 where the largest logit is the target's, and logsumexp of every position, in float32.

    Arguments are those of `head_cross_entropy`.
    """
    if blocks.count(kernel.shape[blocks.vocab_axis]) > 1:
        return cast(PerPosition, losses_in_blocks(hidden, kernel, targets, blocks))
    product = "btd,vd->btv" if blocks.vocab_axis == 0 else "btd,dv->btv"
    logits = jnp.einsum(product, hidden.astype(blocks.dtype), kernel.astype(blocks.dtype))
    return _per_position(softcapped(logits.astype(jnp.float32), blocks.softcap), targets)


def _weighted(
    losses: Float[Array, "*batch"],
    correct: Float[Array, "*batch"],
    logsumexp: Float[Array, "*batch"],
    weights: Float[Array, "*batch"],
    z_loss: float,
) -> TokenLoss:
    """Sums over positions of value times weight, divided by the sum of the weights."""
    total = jnp.maximum(weights.sum(), 1e-6)
    penalty = z_loss * (jnp.square(logsumexp) * weights).sum() / total if z_loss else jnp.zeros(())
    return TokenLoss((losses * weights).sum() / total + penalty, (correct * weights).sum() / total, penalty)


def _per_position(
    logits: Float[Array, "*batch V"], targets: Int[Array, "*batch"]
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"], Float[Array, "*batch"]]:
    """Cross entropy, 1.0 where the largest logit is the target's, and logsumexp, in float32."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    logsumexp = jax.nn.logsumexp(logits, axis=-1)
    correct = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
    return logsumexp - picked, correct, logsumexp
