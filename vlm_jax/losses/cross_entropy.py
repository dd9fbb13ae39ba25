"""Cross entropy of token predictions, weighted per position."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(
    logits: Float[Array, "*batch V"], targets: Int[Array, "*batch"], weights: Float[Array, "*batch"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted mean of -log softmax(logits)[target], in float32.

    Returns:
      The mean over the weights (0 where all are 0), and the weighted accuracy: the share of positions whose
      largest logit is the target's.
    """
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - picked
    total = jnp.maximum(weights.sum(), 1e-6)
    correct = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
    return (losses * weights).sum() / total, (correct * weights).sum() / total
