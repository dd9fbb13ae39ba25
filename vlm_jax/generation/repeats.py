"""N-grams that a row has already, so that none of them is generated again."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from vlm_jax.types import Array, struct

ENDLESS = np.iinfo(np.int32).max  # the window of all tokens


@struct
class Repeats:
    """The tokens of every row, and how far each place is like the row's end.

    Attributes:
      tokens: of the row, from its first one on.
      matches: at each place the number of tokens before it that equal, one by one, those at the end of the row.
      lengths: of the rows.
    """

    tokens: Int[Array, "B H"]
    matches: Int[Array, "B H"]
    lengths: Int[Array, "B"]

    def followed_by(self, token: Int[Array, "B"], where: Bool[Array, "B"]) -> "Repeats":
        """With one more token in the rows that `where` marks."""
        rows = jnp.arange(len(token))
        place = jnp.where(where, self.lengths, self.tokens.shape[1])
        tokens = self.tokens.at[rows, place].set(token, mode="drop")
        before = jnp.arange(self.tokens.shape[1])[None] > 0
        same = (jnp.roll(tokens, 1, axis=1) == token[:, None]) & before
        matches = jnp.where(same, jnp.roll(self.matches, 1, axis=1) + 1, 0)
        return Repeats(tokens, jnp.where(where[:, None], matches, self.matches), self.lengths + where)

    def excluded(
        self,
        ngram: Int[Array | np.ndarray, "*rows"] | np.int32,
        window: Int[Array | np.ndarray, "*rows"] | np.int32,
        vocab_size: int,
        allowed: Int[Array | np.ndarray, "*rows W"] | None = None,
    ) -> Bool[Array, "B V"]:
        """The tokens that would end an n-gram that begins among the last `window` tokens of a row.

        Args:
          ngram: number n of its tokens, one for all rows or one for each; with a window, 1 excludes nothing.
          window: in tokens, likewise; `ENDLESS` for none.
          vocab_size: V.
          allowed: ids that are not excluded, for all rows or for each.

        Source: Paulus et al. 2018, section 2.5; transformers, NoRepeatNGramLogitsProcessor; DeepSeek-OCR,
        process/ngram_norepeat.py, for the window and what is allowed.
        """
        before, window = jnp.reshape(jnp.asarray(ngram) - 1, (-1, 1)), jnp.reshape(jnp.asarray(window), (-1, 1))
        place, lengths = jnp.arange(self.tokens.shape[1])[None], self.lengths[:, None]
        found = (place < lengths) & (self.matches >= before) & (place - before >= lengths - window)
        found &= (before > 0) | (window == ENDLESS)
        rows = jnp.arange(len(self.tokens))[:, None]
        index = jnp.where(found, self.tokens, vocab_size)
        excluded = jnp.zeros((len(self.tokens), vocab_size), bool).at[rows, index].set(True, mode="drop")
        if allowed is None:
            return excluded
        return excluded.at[rows, jnp.atleast_2d(jnp.asarray(allowed))].set(False, mode="drop")


def repeats_of(tokens: Int[Array, "B T"], real: Bool[Array, "B T"], room: int) -> Repeats:
    """Those of prompts, padded on any side, with room for so many more tokens.

    Args:
      tokens: ids; those of padding are unused.
      real: True at each token of a prompt.
      room: of a row, for the tokens behind its prompt.
    """
    size, length = tokens.shape
    empty = jnp.zeros((size, length + room), jnp.int32)
    start = Repeats(empty, empty, jnp.zeros(size, jnp.int32))

    def add(repeats: Repeats, column: tuple[jax.Array, jax.Array]) -> tuple[Repeats, None]:
        return repeats.followed_by(*column), None

    columns = jnp.asarray(tokens, jnp.int32).T, jnp.asarray(real).T
    return jax.lax.scan(add, start, columns)[0]
