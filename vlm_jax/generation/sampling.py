"""How the next token is chosen from its logits."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Whole = int | np.integer
Number = Whole | float | np.floating


class GenerationError(ValueError):
    """A request that cannot be generated, or logits that no token can be chosen from; the message names it."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of the choice; as they stand, the most likely token.

    Attributes:
      temperature: what logits are divided by before a token is drawn; 0 takes the most likely one.
      top_k: draws among so many of the most likely tokens, and what ties with the last; None for all.
      top_p: draws among the most likely tokens that together have this probability; None for all.
      repetition_penalty: divides the positive logits of tokens that a row has already, prompt included, and
        multiplies the negative ones.
      seed: of the draws; the same seed gives the same tokens.

    Raises:
      GenerationError: what is no number, one outside its range, or one that nothing would read.
    """

    temperature: Number = 0.0
    top_k: Whole | None = None
    top_p: Number | None = None
    repetition_penalty: Number = 1.0
    seed: Whole = 0

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
        if not 0 <= self.seed < 2**32:
            wrong.append(f"seed: expected 0 to 2**32 - 1, got {self.seed}")
        for name in ("top_k", "top_p"):
            if self.temperature == 0 and getattr(self, name) is not None:
                wrong.append(f"{name}: is for draws, and temperature 0 draws none; give a temperature")
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
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kind):
                wrong.append(f"{name}: expected {form}, got {value!r}")
        if wrong:
            raise GenerationError("\n".join(wrong))

    def values(self) -> dict[str, Any]:
        """The settings that are in use, as scalars; another number under the same names compiles nothing anew."""
        used: dict[str, Any] = {}
        if self.temperature > 0:
            used |= {"temperature": _representable(self.temperature), "seed": np.uint32(self.seed)}
        if self.top_k is not None:
            used["top_k"] = np.int32(min(self.top_k, np.iinfo(np.int32).max))
        if self.top_p is not None and self.top_p < 1:
            used["top_p"] = np.float32(self.top_p)
        if self.repetition_penalty != 1:
            used["repetition_penalty"] = _representable(self.repetition_penalty)
        return used


def _representable(number: Number) -> np.float32:
    """The nearest float32 above 0; what is less than its smallest normal number, devices take for 0."""
    limits = np.finfo(np.float32)
    return np.float32(np.clip(float(number), limits.tiny, limits.max))


def sample_tokens(
    logits: Float[Array, "B V"],
    values: Mapping[str, Any],
    seen: Bool[Array, "B V"] | None,
    rows: Int[Array, "B"],
    step: Int[Array, ""],
) -> Int[Array, "B"]:
    """The next token of every row.

    Args:
      logits: float32.
      values: those of `Sampling.values`.
      seen: tokens that a row has already, for the repetition penalty.
      rows: what a row's draws go by, so that they do not depend on which others stand beside it.
      step: number of the token.
    """
    if seen is not None:
        logits = penalised(logits, seen, values["repetition_penalty"])
    if "temperature" not in values:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits - logits.max(axis=-1, keepdims=True)  # so that no temperature makes the largest infinite
    logits = filtered(logits / values["temperature"], values.get("top_k"), values.get("top_p"))

    def draw(row, logits):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(values["seed"]), row), step)
        return jax.random.categorical(key, logits).astype(jnp.int32)

    return jax.vmap(draw)(rows, logits)


def penalised(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, ""] | np.float32
) -> Float[Array, "B V"]:
    """Source: Keskar et al. 2019 (CTRL), section 4.1, with transformers' treatment of negative logits."""
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def filtered(
    logits: Float[Array, "B V"],
    top_k: Int[Array, ""] | np.int32 | None,
    top_p: Float[Array, ""] | np.float32 | None,
) -> Float[Array, "B V"]:
    """Minus infinity where a token may not be drawn; first `top_k`, then `top_p` among those that are left.

    Of equal logits `top_k` keeps all, and `top_p` as many as it needs, as transformers' logits processors do.

    Source: Fan et al. 2018, section 5.4; Holtzman et al. 2020, section 3.1.
    """
    if top_k is None and top_p is None:
        return logits
    rising = jnp.sort(logits, axis=-1)
    if top_k is not None:
        place = jnp.maximum(logits.shape[-1] - top_k, 0)
        least = jax.lax.dynamic_slice_in_dim(rising, place, 1, axis=1)
        logits, rising = (jnp.where(values < least, -jnp.inf, values) for values in (logits, rising))
    if top_p is not None:
        # Those that together have no more than 1 - top_p are left out; of the ties at the edge as many as are too many.
        kept = jnp.cumsum(jax.nn.softmax(rising, axis=-1), axis=-1) > 1 - top_p
        count = jnp.maximum(kept.sum(-1, keepdims=True), 1)
        least = jnp.take_along_axis(rising, logits.shape[-1] - count, axis=-1)
        tied, surplus = logits == least, (logits >= least).sum(-1, keepdims=True) - count
        left_out = (logits < least) | (tied & (jnp.cumsum(tied, axis=-1) <= surplus))
        logits = jnp.where(left_out, -jnp.inf, logits)
    return logits
