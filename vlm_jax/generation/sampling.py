"""Sampling of the next token from its logits."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.generation.repeats import ENDLESS
from vlm_jax.types import Config, Fields, Tree

Whole = int | np.integer
Number = Whole | float | np.floating


class GenerationError(ValueError):
    """A request that cannot be generated, or NaN logits; the message names the cause."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling settings; the defaults select the most likely token.

    Attributes:
      temperature: divisor of the logits before sampling; 0 selects the most likely token.
      top_k: samples among the `top_k` most likely tokens and ties with the last; None for all.
      top_p: samples among the most likely tokens that together have this probability; None for all.
      repetition_penalty: divides the positive logits of tokens that occur in the row, prompt included, and
        multiplies the negative ones.
      seed: random seed; the same seed gives the same tokens.
      no_repeat_ngram: a token that would end an n-gram of this many tokens that the row has already, prompt and its
        placeholders of visual tokens included, is never chosen; 0 for none. As `no_repeat_ngram_size` of transformers.
      no_repeat_window: only n-grams that begin among so many last tokens count, and n-grams of one token do not; None
        for all. As in DeepSeek-OCR's processor of logits for vLLM.
      no_repeat_except: ids of tokens that may end an n-gram again, such as the tags of a table's cells.

    Raises:
      GenerationError: a setting that is not a number, is out of range, or is unused at temperature 0.
    """

    temperature: Number = 0.0
    top_k: Whole | None = None
    top_p: Number | None = None
    repetition_penalty: Number = 1.0
    seed: Whole = 0
    no_repeat_ngram: Whole = 0
    no_repeat_window: Whole | None = None
    no_repeat_except: tuple[Whole, ...] = ()

    def __post_init__(self):
        self._check_types()
        wrong = []
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            wrong.append(f"temperature: expected 0 or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            wrong.append(f"top_k: expected 1 or more, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            wrong.append(f"top_p: expected more than 0 and at most 1, got {self.top_p}")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            wrong.append(f"repetition_penalty: expected more than 0, got {self.repetition_penalty}")
        if not 0 <= self.no_repeat_ngram < 2**31:
            wrong.append(f"no_repeat_ngram: expected 0 to 2**31 - 1, got {self.no_repeat_ngram}")
        if self.no_repeat_window is not None and not 0 < self.no_repeat_window < 2**31:
            wrong.append(f"no_repeat_window: expected 1 to 2**31 - 1, got {self.no_repeat_window}")
        if self.no_repeat_window is not None and not self.no_repeat_ngram:
            wrong.append(f"no_repeat_window: expected None without no_repeat_ngram, got {self.no_repeat_window}")
        if self.no_repeat_except and not self.no_repeat_ngram:
            wrong.append(f"no_repeat_except: expected () without no_repeat_ngram, got {self.no_repeat_except}")
        if not all(0 <= index < 2**31 for index in self.no_repeat_except):
            wrong.append(f"no_repeat_except: expected ids of 0 to 2**31 - 1, got {self.no_repeat_except}")
        if not 0 <= self.seed < 2**32:
            wrong.append(f"seed: expected 0 to 2**32 - 1, got {self.seed}")
        for name in ("top_k", "top_p"):
            if self.temperature == 0 and getattr(self, name) is not None:
                wrong.append(f"{name}: is unused at temperature 0; set a temperature above 0")
        if wrong:
            raise GenerationError("\n".join(wrong))

    def _check_types(self) -> None:
        wrong = []
        for name, kind, form in (
            ("temperature", Number, "a number"),
            ("top_k", Whole | None, "a whole number or None"),
            ("top_p", Number | None, "a number or None"),
            ("repetition_penalty", Number, "a number"),
            ("seed", Whole, "a whole number"),
            ("no_repeat_ngram", Whole, "a whole number"),
            ("no_repeat_window", Whole | None, "a whole number or None"),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kind):
                wrong.append(f"{name}: expected {form}, got {value!r}")
        listed = self.no_repeat_except
        if not isinstance(listed, tuple) or any(isinstance(i, bool) or not isinstance(i, Whole) for i in listed):
            wrong.append(f"no_repeat_except: expected a tuple of ids, got {listed!r}")
        if wrong:
            raise GenerationError("\n".join(wrong))

    def values(self) -> Fields:
        """The settings in use, as scalars and a list of ids; other values of the same settings need no compilation.

        Rows of one batch may have values of their own for the same settings, see `row_values`.
        """
        used: Fields = {}
        if self.temperature > 0:
            used |= {"temperature": _representable(self.temperature), "seed": np.uint32(self.seed)}
        if self.top_k is not None:
            used["top_k"] = np.int32(min(self.top_k, np.iinfo(np.int32).max))
        if self.top_p is not None and self.top_p < 1:
            used["top_p"] = np.float32(self.top_p)
        if self.repetition_penalty != 1:
            used["repetition_penalty"] = _representable(self.repetition_penalty)
        if self.no_repeat_ngram:
            used["no_repeat_ngram"] = np.int32(self.no_repeat_ngram)
            used["no_repeat_window"] = np.int32(ENDLESS if self.no_repeat_window is None else self.no_repeat_window)
        if self.no_repeat_except:
            used["no_repeat_except"] = np.array(self.no_repeat_except, np.int32)
        return used


def row_values(samplings: Sequence[Sampling], size: int) -> Fields:
    """The settings in use of every row, as arrays [size, ...]; rows after the last setting repeat it.

    Raises:
      GenerationError: the rows do not use the same settings.
    """
    rows = [sampling.values() for sampling in samplings]
    for row, values in enumerate(rows):
        if values.keys() != rows[0].keys():
            raise GenerationError(
                f"sampling: row 0 uses {', '.join(rows[0]) or 'no settings'}, row {row} {', '.join(values) or 'none'}; "
                "put rows that use other settings into a separate batch"
            )
    if len({len(sampling.no_repeat_except) for sampling in samplings}) > 1:
        raise GenerationError(
            "sampling: expected equally many ids in no_repeat_except of every row, got "
            f"{', '.join(str(len(sampling.no_repeat_except)) for sampling in samplings)}"
        )
    rows += rows[-1:] * (size - len(rows))
    return {name: np.stack([values[name] for values in rows]) for name in rows[0]}


def _representable(number: Number) -> np.float32:
    """The nearest normal float32 above 0, since devices may flush subnormal numbers to 0."""
    limits = np.finfo(np.float32)
    return np.float32(np.clip(float(number), limits.tiny, limits.max))


def sample_tokens(
    logits: Float[Array, "B V"],
    values: Config,
    seen: Bool[Array, "B V"] | None,
    rows: Int[Array, "B"],
    step: Int[Array, ""],
) -> Int[Array, "B"]:
    """The next token of every row.

    Args:
      logits: float32.
      values: the result of `Sampling.values` or `row_values`.
      seen: tokens that occur in a row, for the repetition penalty.
      rows: seeds of the rows, so that samples do not depend on the other rows of the batch.
      step: index of the token.
    """
    if seen is not None:
        logits = penalised(logits, seen, values["repetition_penalty"])
    if "temperature" not in values:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits - logits.max(axis=-1, keepdims=True)  # so that no temperature makes the largest logit infinite
    logits = filtered(logits / _column(values["temperature"]), values.get("top_k"), values.get("top_p"))

    def draw(seed, row, logits):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), step)
        return jax.random.categorical(key, logits).astype(jnp.int32)

    return jax.vmap(draw)(jnp.broadcast_to(values["seed"], rows.shape), rows, logits)


def _column(values: Tree) -> Tree:
    """One value, or one for every row, as [1 or B, 1]."""
    return jnp.reshape(values, (-1, 1))


def penalised(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array | np.ndarray, "*rows"] | np.float32
) -> Float[Array, "B V"]:
    """Repetition penalty. Source: Keskar et al. 2019 (CTRL), section 4.1; negative logits as in transformers."""
    penalty = _column(penalty)
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def filtered(
    logits: Float[Array, "B V"],
    top_k: Int[Array | np.ndarray, "*rows"] | np.int32 | None,
    top_p: Float[Array | np.ndarray, "*rows"] | np.float32 | None,
) -> Float[Array, "B V"]:
    """Logits with minus infinity for excluded tokens; first `top_k`, then `top_p` among the remaining ones.

    Each is one value, or one for every row.

    Of equal logits `top_k` keeps all, and `top_p` as many as it needs, as in transformers' logits processors.

    Source: Fan et al. 2018, section 5.4; Holtzman et al. 2020, section 3.1.
    """
    if top_k is None and top_p is None:
        return logits
    rising = jnp.sort(logits, axis=-1)
    if top_k is not None:
        place = jnp.maximum(logits.shape[-1] - _column(top_k), 0)
        least = jnp.take_along_axis(rising, jnp.broadcast_to(place, (len(logits), 1)), axis=-1)
        logits, rising = (jnp.where(values < least, -jnp.inf, values) for values in (logits, rising))
    if top_p is not None:
        # Excludes the least likely tokens with a total of at most 1 - top_p; among ties at the threshold, the surplus.
        kept = jnp.cumsum(jax.nn.softmax(rising, axis=-1), axis=-1) > 1 - _column(top_p)
        count = jnp.maximum(kept.sum(-1, keepdims=True), 1)
        least = jnp.take_along_axis(rising, logits.shape[-1] - count, axis=-1)
        tied, surplus = logits == least, (logits >= least).sum(-1, keepdims=True) - count
        left_out = (logits < least) | (tied & (jnp.cumsum(tied, axis=-1) <= surplus))
        logits = jnp.where(left_out, -jnp.inf, logits)
    return logits
