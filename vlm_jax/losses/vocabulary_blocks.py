"""Cross entropy per position from hidden states and the head's kernel, by blocks of the vocabulary.

The forward pass keeps a running maximum and sum; the backward pass computes a block's logits again, writes its part of
the kernel's gradient in place, and adds its part of the hidden states' gradient in float32.
Source: the online softmax of Milakov and Gimelshein 2018, section 3; recomputed logits as in Wijmans et al. 2024 (Cut
Cross-Entropy), section 4, with blocks over the vocabulary only.
"""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm_jax.types import Dtype

PerPosition = tuple[Float[Array, "B T"], Float[Array, "B T"], Float[Array, "B T"]]


class Blocks(NamedTuple):
    """How a kernel is cut into blocks.

    Attributes:
      vocab_axis: 0 for a kernel [V, D], 1 for [D, V].
      size: ids of one shard in a block.
      shards: equal contiguous parts of the vocabulary, one per device that has a part; every block has ids of each.
      dtype: dtype of the product, as in the head.
      softcap: logits are softcap * tanh(product / softcap); None for the product itself.
    """

    vocab_axis: int
    size: int
    shards: int = 1
    dtype: Dtype = jnp.float32
    softcap: float | None = None

    def count(self, vocab_size: int) -> int:
        """Number of blocks.

        Raises:
          ValueError: an empty block, or a vocabulary that is not a multiple of the shards.
        """
        if self.size < 1 or self.shards < 1 or vocab_size % self.shards:
            raise ValueError(
                f"blocks: expected at least 1 id in a block and a vocabulary of equal shards, got size {self.size} and "
                f"{self.shards} shards of {vocab_size} ids"
            )
        return -(-(vocab_size // self.shards) // self.size)


class _Block(NamedTuple):
    """One block: float32 logits (-inf for ids of an earlier block), ids, where the id is the target, kernel, start.

    `fresh` is False for ids of an earlier block.
    """

    logits: Float[Array, "B T S v"]
    ids: Int[Array, "1 1 S v"]
    fresh: Any
    hit: Any
    kernel: Float[Array, "..."]
    start: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def losses_in_blocks(
    hidden: Float[Array, "B T D"], kernel: Float[Array, "_ _"], targets: Int[Array, "B T"], blocks: Blocks
) -> PerPosition:
    """Cross entropy, 1.0 where the largest logit is the target's, and logsumexp of every position, in float32."""
    grouped, vocab_size = _grouped(kernel, blocks), kernel.shape[blocks.vocab_axis]

    def add(index, carry):
        maximum, total, picked, best = carry
        block = _block(index, hidden, grouped, targets, blocks)
        top = block.logits.max((2, 3))
        first = jnp.where(block.logits == top[..., None, None], block.ids, vocab_size).min((2, 3))
        best = jnp.where(top > maximum, first, jnp.where(top == maximum, jnp.minimum(best, first), best))
        highest = jnp.maximum(maximum, top)
        total = total * jnp.exp(maximum - highest) + jnp.exp(block.logits - highest[..., None, None]).sum((2, 3))
        return highest, total, picked + jnp.where(block.hit, block.logits, 0.0).sum((2, 3)), best

    zero = jnp.zeros(targets.shape, jnp.float32)
    carry = (zero - jnp.inf, zero, zero, jnp.full(targets.shape, vocab_size, jnp.int32))
    maximum, total, picked, best = jax.lax.fori_loop(0, blocks.count(vocab_size), add, carry)
    logsumexp = maximum + jnp.log(total)
    return logsumexp - picked, (best == targets).astype(jnp.float32), logsumexp


def _forward(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, blocks: Blocks
) -> tuple[PerPosition, tuple[jax.Array, ...]]:
    out = cast(PerPosition, losses_in_blocks(hidden, kernel, targets, blocks))
    return out, (hidden, kernel, targets, out[2])


def _backward(blocks: Blocks, kept: tuple[jax.Array, ...], given: PerPosition) -> tuple[jax.Array, jax.Array, None]:
    hidden, kernel, targets, logsumexp = kept
    of_loss, _, of_logsumexp = given
    grouped, letters, axis = _grouped(kernel, blocks), _letters(blocks), blocks.vocab_axis + 1
    narrow = hidden.astype(blocks.dtype)

    def add(index, carry):
        of_hidden, of_kernel = carry
        block = _block(index, hidden, grouped, targets, blocks)
        shares = jnp.exp(block.logits - logsumexp[..., None, None])
        error = shares * (of_loss + of_logsumexp)[..., None, None] - jnp.where(block.hit, of_loss[..., None, None], 0.0)
        if blocks.softcap is not None:  # the derivative of tanh; logits of an earlier block are -inf, and have no error
            error *= jnp.where(block.fresh, 1 - jnp.square(block.logits / blocks.softcap), 0.0)
        error = error.astype(blocks.dtype)
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        of_hidden += product(f"btsv,{letters}->btd", error, block.kernel)
        part = product(f"btsv,btd->{letters}", error, narrow).astype(kernel.dtype)
        part += jax.lax.dynamic_slice_in_dim(of_kernel, block.start, blocks.size, axis)  # of ids of an earlier block
        return of_hidden, jax.lax.dynamic_update_slice_in_dim(of_kernel, part, block.start, axis)

    carry = jnp.zeros(hidden.shape, jnp.float32), jnp.zeros_like(grouped)
    count = blocks.count(kernel.shape[blocks.vocab_axis])
    of_hidden, of_kernel = jax.lax.fori_loop(0, count, add, carry)
    return of_hidden.astype(hidden.dtype), of_kernel.reshape(kernel.shape), None


losses_in_blocks.defvjp(_forward, _backward)


def softcapped(logits: Float[Array, "*batch V"], softcap: float | None) -> Float[Array, "*batch V"]:
    """softcap * tanh(logits / softcap); the logits themselves where it is None."""
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _letters(blocks: Blocks) -> str:
    return "svd" if blocks.vocab_axis == 0 else "dsv"


def _grouped(kernel: Float[Array, "_ _"], blocks: Blocks) -> Float[Array, "_ _ _"]:
    """[V, D] -> [S, V / S, D], or [D, V] -> [D, S, V / S]."""
    axis, shape = blocks.vocab_axis, kernel.shape
    return kernel.reshape(*shape[:axis], blocks.shards, shape[axis] // blocks.shards, *shape[axis + 1 :])


def _block(index: jax.Array, hidden: jax.Array, grouped: jax.Array, targets: jax.Array, blocks: Blocks) -> _Block:
    """Block `index`; the last one starts earlier where the blocks do not divide a shard."""
    axis = blocks.vocab_axis + 1
    per_shard = grouped.shape[axis]
    start = jnp.minimum(index * blocks.size, per_shard - blocks.size)
    kernel = jax.lax.dynamic_slice_in_dim(grouped, start, blocks.size, axis).astype(blocks.dtype)
    logits = jnp.einsum(f"btd,{_letters(blocks)}->btsv", hidden.astype(blocks.dtype), kernel).astype(jnp.float32)
    logits = softcapped(logits, blocks.softcap)
    within = (start + jnp.arange(blocks.size))[None, None, None]
    fresh = within >= index * blocks.size
    ids = per_shard * jnp.arange(blocks.shards)[None, None, :, None] + within
    return _Block(
        jnp.where(fresh, logits, -jnp.inf), ids, fresh, fresh & (ids == targets[..., None, None]), kernel, start
    )
