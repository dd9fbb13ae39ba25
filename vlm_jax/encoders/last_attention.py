"""Blocks run with a look at the attention of the last one, for reducers that rank features by it."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.layers.attention import Context
from vlm_jax.layers.block import TransformerStack
from vlm_jax.layers.saliency import Saliency, attention_saliency, segment_saliency


class Attended(NamedTuple):
    """What the blocks give, with the attention of the last.

    Attributes:
      x: output of the last block.
      saliency: attention that each token gets, float32.
      keys: of each token and head.
    """

    x: Float[Array, "B T D"]
    saliency: Float[Array, "B T"]
    keys: Float[Array, "B T K H"]


def run_with_saliency(
    stack: TransformerStack, x: Float[Array, "B T D"], context: Context, kind: Saliency, *, class_token: bool
) -> Attended:
    """Runs all blocks of a stack.

    Args:
      stack: of one block at least.
      x: embedded tokens.
      context: of every block.
      kind: `heads` for the mean over the heads' attention, `joined` for that of all heads as a single one.
      class_token: whether the first token is a class token, from which attention is then counted; else it is the mean
        over the tokens of the same image.
    """
    last = stack.depth - 1
    x, _ = stack.run(x, context, 0, last)
    x, _, heads = stack.attend(x, context, last)
    x = stack.feed_forward(x, last)
    looking = heads.joined() if kind == "joined" else heads
    if class_token:
        saliency = attention_saliency(looking, context, jnp.zeros(x.shape[:2]).at[:, 0].set(1))
    else:
        saliency = segment_saliency(looking, context)
    return Attended(x, saliency, heads.key)
