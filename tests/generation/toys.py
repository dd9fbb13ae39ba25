"""A model whose next token is written in a table, so that answers are known before they are generated."""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vlm_jax.decoders.cache import Cache
from vlm_jax.layers.attention import KeyValue
from vlm_jax.types import PADDING_SEGMENT, Batch


class Toy(nn.Module):
    """Logits are the row of `table` that belongs to the newest token, or tell its position.

    Attributes:
      vocab_size: rows and columns of the table.
      tells_position: the next token is the newest one's position, and the table is not read.
    """

    vocab_size: int
    tells_position: bool = False

    @property
    def decoder(self):
        """As the engine asks for the vocabulary."""
        return self

    def setup(self):
        self.table = self.param("table", nn.initializers.zeros, (self.vocab_size, self.vocab_size))

    def _logits(self, token, position):
        if self.tells_position:
            return nn.one_hot(position if position.ndim == 1 else position[:, -1], self.vocab_size)
        return self.table[token]

    def prefill(self, batch, cache_length, cache_dtype=None):
        """The logits after the last token of every row."""
        size, length = batch.tokens.shape
        last = jnp.max(jnp.where(batch.segment_ids == PADDING_SEGMENT, 0, jnp.arange(length)[None]), axis=1)
        token, position = (jnp.asarray(array)[jnp.arange(size), last] for array in (batch.tokens, batch.positions))
        kept = KeyValue.empty(1, size, cache_length, 1, 1, cache_dtype or jnp.float32)
        cache = Cache.empty((kept,), size, cache_length)
        return self._logits(token, position), cache.with_segments(jnp.asarray(batch.segment_ids))

    def extend(self, tokens, positions, cache):
        """The logits after one more token."""
        return self._logits(tokens[:, -1], positions[:, -1]), cache.with_segments(jnp.ones_like(tokens))


def says(sequence, vocab):
    """The table of a model that goes through `sequence`, over and over."""
    table = np.zeros((vocab, vocab), np.float32)
    for this, following in zip(sequence, [*sequence[1:], sequence[0]], strict=True):
        table[this, following] = 1
    return {"table": table}


def prompts(*rows, side="left", axes=None):
    """Token lists as one batch, padded with token 0."""
    length = max(map(len, rows))
    tokens, segments, positions = (np.zeros((len(rows), length), np.int32) for _ in range(3))
    for row, ids in enumerate(rows):
        start = length - len(ids) if side == "left" else 0
        tokens[row, start : start + len(ids)] = ids
        segments[row, start : start + len(ids)] = 1
        positions[row, start : start + len(ids)] = np.arange(len(ids))
    if axes:
        positions = np.repeat(positions[..., None], axes, axis=-1)
    return Batch(tokens, positions, segments, np.full_like(tokens, -1))
