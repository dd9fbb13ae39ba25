"""Greedy generation: one compiled program for the prompt and the loop over new tokens."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from vlm_jax.models.vlm import VLM
from vlm_jax.types import Batch


@partial(jax.jit, static_argnames=("model", "max_new_tokens", "eos_id", "pad_id"))
def generate(
    model: VLM, params: dict[str, Any], batch: Batch, *, max_new_tokens: int, eos_id: int, pad_id: int
) -> Int[Array, "B G"]:
    """The most likely next token, again and again, until every row has ended.

    Args:
      model: the model; static.
      params: its parameters, {part: tree}.
      batch: left-padded prompts.
      max_new_tokens: G, the longest answer with its end token.
      eos_id: ends a row.
      pad_id: fills a row after its end.

    Returns:
      New tokens of every row, the end token included where it was reached.
    """
    variables = {"params": {part: params[part] for part in ("encoder", "connector", "decoder")}}
    batch_size, prompt_length = batch.tokens.shape
    cache_length = prompt_length + max_new_tokens
    prefilled: Any = model.apply(variables, batch, cache_length, method="prefill")
    logits, cache = prefilled
    # A masked visual token, which is padding for the cache, takes no position.
    masked = (batch.segment_ids != 0) & (cache.segment_ids[:, :prompt_length] == 0)
    positions = batch.positions[:, -1:] + 1 - jnp.sum(masked, axis=1, keepdims=True)
    tokens = jnp.full((batch_size, max_new_tokens), pad_id, jnp.int32)

    def going_on(carry):
        step, _, _, ended, _ = carry
        return (step < max_new_tokens) & ~ended.all()

    def step_on(carry):
        step, logits, cache, ended, tokens = carry
        token = jnp.where(ended, pad_id, jnp.argmax(logits, axis=-1).astype(jnp.int32))
        tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], (0, step))
        ended = ended | (token == eos_id)
        logits, cache = model.apply(variables, token[:, None], positions + step, cache, method="extend")
        return step + 1, logits, cache, ended, tokens

    start = (jnp.zeros((), jnp.int32), logits, cache, jnp.zeros(batch_size, bool), tokens)
    return jax.lax.while_loop(going_on, step_on, start)[-1]
