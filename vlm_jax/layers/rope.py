"""Rotary position embeddings, half-split as in Llama: coordinate i is rotated with coordinate i + H/2."""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vlm_jax.ranges import Natural, Positive
from vlm_jax.types import Positions

Scaling = Literal["none", "linear", "dynamic", "dynamic_prompt", "llama3", "yarn", "longrope", "proportional"]

# The fields that each scaling reads in addition to theta and the sections.
_READS: dict[str, tuple[str, ...]] = {
    "none": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_length"),
    "dynamic_prompt": ("original_length",),
    "llama3": ("factor", "original_length", "low_frequency_factor", "high_frequency_factor"),
    "yarn": ("factor", "original_length", "beta_fast", "beta_slow", "truncate", "attention_factor"),
    "longrope": ("factor", "original_length", "short_factors", "long_factors", "attention_factor"),
    "proportional": ("factor", "rotated_share"),
}
_NEEDED = ("original_length", "short_factors", "long_factors")  # without meaningful defaults


@dataclasses.dataclass(frozen=True)
class Rope:
    """Computes rotary angles from positions.

    Attributes:
      theta: base of the wavelengths.
      scaling: how wavelengths grow for sequences longer than in training: `none`; `linear`, all equally;
        `dynamic`, NTK by the current length of the sequence; `dynamic_prompt`, NTK by powers of two and the
        length of the prompt, as in Qwen; `llama3`; `yarn`; `longrope`; `proportional`, all equally, where only the
        shortest wavelengths rotate.
      factor: ratio of sequence lengths to those of training.
      original_length: positions of a sequence in training.
      low_frequency_factor, high_frequency_factor: of `llama3`; wavelengths above original_length / low are
        stretched, those below original_length / high are not, and those between partly.
      beta_fast, beta_slow: of `yarn`, the same bounds in rotations over original_length.
      truncate: of `yarn`, whether its bounds are rounded to whole coordinates.
      short_factors, long_factors: of `longrope`, per wavelength, for sequences up to original_length, and longer ones.
      attention_factor: of `yarn` and `longrope`, factor of rotated queries and keys; by the paper's formula when None.
      rotated_share: of `proportional`, share of the wavelengths that rotate, rounded down; the angles of the others
        are 0.
      sections: of M-RoPE, numbers of wavelengths for the temporal position, the row, the column, and so
        on in this order; empty where positions have one axis.
      interleaved: of M-RoPE, whether row and column take every third wavelength from the second and from the third
        on, up to three times their sections, and the temporal position all others, as in Qwen3-VL.

    Raises:
      ValueError: the scaling lacks a field that it needs, or a field is set that it does not read.

    Source: Su et al. 2021 (RoFormer), eq. 15; Chen et al. 2023 for `linear`; bloc97 2023 for `dynamic`; Bai et al. 2023
    (Qwen) for `dynamic_prompt`; Dubey et al. 2024 for `llama3`; Peng et al. 2023, eq. 17 to 23, for `yarn`; Ding et
    al. 2024 for `longrope`; Wang et al. 2024 (Qwen2-VL) for M-RoPE; Bai et al. 2025 (Qwen3-VL), section
    2.1, and transformers, models/qwen3_vl, for `interleaved`; transformers, modeling_rope_utils.py.
    """

    theta: Positive = 10_000.0
    scaling: Scaling = "none"
    factor: Positive = 1.0
    original_length: Natural = 0
    low_frequency_factor: Positive = 1.0
    high_frequency_factor: Positive = 4.0
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    truncate: bool = True
    short_factors: tuple[Positive, ...] = ()
    long_factors: tuple[Positive, ...] = ()
    attention_factor: Positive | None = None
    rotated_share: Positive = 1.0
    sections: tuple[Natural, ...] = ()
    interleaved: bool = False

    def __post_init__(self):
        reads = (*_READS[self.scaling], "theta", "scaling", "sections", "interleaved")
        given = [field.name for field in dataclasses.fields(self) if getattr(self, field.name) != field.default]
        wrong = [f"{name} is needed" for name in _NEEDED if name in reads and name not in given]
        wrong += [f"{name} is not read" for name in given if name not in reads]
        if self.interleaved and len(self.sections) != 3:
            wrong.append("three sections are needed for interleaved axes")
        if wrong:
            raise ValueError(f"rotary scaling {self.scaling}: {', '.join(wrong)}")

    @property
    def by_length(self) -> bool:
        """Whether angles depend on the length of the position's sequence."""
        return self.scaling in ("dynamic", "dynamic_prompt", "longrope")

    @property
    def by_prompt(self) -> bool:
        """Whether the length is that of the prompt during generation."""
        return self.scaling == "dynamic_prompt"

    @property
    def magnitude(self) -> float:
        """Factor of rotated queries and keys."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.scaling == "yarn":
            return yarn_magnitude(self.factor)
        if self.scaling == "longrope" and self.factor > 1:
            return math.sqrt(1 + math.log(self.factor) / math.log(self.original_length))
        return 1.0

    def check(self, head_dim: int) -> None:
        """Raises a `ValueError` where sections or factors do not fit `head_dim` rotated coordinates."""
        if self.sections and sum(self.sections) != head_dim // 2:
            raise ValueError(
                f"M-RoPE sections {self.sections} are for {sum(self.sections)} angles, not {head_dim // 2}"
            )
        if self.scaling == "longrope" and {len(self.short_factors), len(self.long_factors)} != {head_dim // 2}:
            raise ValueError(
                f"longrope: expected {head_dim // 2} factors, one for each angle, got {len(self.short_factors)} for "
                f"short sequences and {len(self.long_factors)} for long ones"
            )

    def angles(
        self, positions: Positions, head_dim: int, lengths: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T half"]:
        """Angles in radians, float32, of the first half of a head's coordinates.

        Args:
          positions: one per token, or one per axis of M-RoPE.
          head_dim: number of rotated coordinates.
          lengths: length of each token's sequence; for scalings `by_length`.

        Raises:
          ValueError: as `check`, or positions of several axes without sections.
        """
        self.check(head_dim)
        if positions.ndim == 3 and not self.sections:
            raise ValueError("positions have three axes, but a Rope without sections takes one; set sections")
        frequencies = jnp.asarray(self._frequencies(head_dim, lengths))
        if positions.ndim == 2:
            positions = positions[..., None]
        else:
            positions = positions[..., self._axes(head_dim // 2)]
        return positions.astype(jnp.float32) * frequencies.reshape((1,) * (3 - frequencies.ndim) + frequencies.shape)

    def _axes(self, count: int) -> np.ndarray:
        """Of every wavelength the axis of M-RoPE."""
        if not self.interleaved:
            return np.repeat(np.arange(len(self.sections)) % 3, self.sections)
        found = np.zeros(count, int)
        for axis in (1, 2):
            found[axis : 3 * self.sections[axis] : 3] = axis
        return found

    def _frequencies(self, dim: int, lengths: jax.Array | None) -> np.ndarray | jax.Array:
        """Radians per position, [half] or [B, T, half]."""
        if not self.by_length:
            return _FIXED[self.scaling](self, frequencies(dim, self.theta))
        assert lengths is not None
        lengths = lengths[..., None]
        if self.scaling == "longrope":
            short, long = (
                np.asarray(factors, np.float32)[None, None] for factors in (self.short_factors, self.long_factors)
            )
            return frequencies(dim, self.theta)[None, None] / jnp.where(lengths > self.original_length, long, short)
        if self.scaling == "dynamic":
            share = jnp.maximum(lengths, self.original_length).astype(jnp.float32) / self.original_length
            growth = self.factor * share - (self.factor - 1)
        else:
            growth = prompt_growth(lengths, self.original_length).astype(jnp.float32)
        return 1.0 / (self.theta * growth ** (dim / (dim - 2))) ** _exponents(dim)[None, None]


def _exponents(dim: int) -> np.ndarray:
    return np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)


def frequencies(dim: int, theta: float) -> Float[np.ndarray, "half"]:
    """theta ** (-2 i / dim) for i < dim / 2, float32.

    Rounded where torch rounds: at position 100,000 a different rounding changes an angle by 0.01.
    """
    wavelengths = np.float64(theta) ** _exponents(dim).astype(np.float64)
    return np.float32(1.0) / wavelengths.astype(np.float32)


def _linear(rope: Rope, plain: np.ndarray) -> np.ndarray:
    return plain / np.float32(rope.factor)


def _llama3(rope: Rope, plain: np.ndarray) -> np.ndarray:
    turns = rope.original_length * plain / np.float32(2 * math.pi)
    low, high = rope.low_frequency_factor, rope.high_frequency_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return ((1 - kept) * plain / rope.factor + kept * plain).astype(np.float32)


def _yarn(rope: Rope, plain: np.ndarray) -> np.ndarray:
    dim = 2 * len(plain)

    def coordinate(turns: float) -> float:
        """The index of the wavelength with so many rotations over the original length."""
        return dim * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = coordinate(rope.beta_fast), coordinate(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    stretched = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / width, 0, 1)
    return (stretched * plain / rope.factor + (1 - stretched) * plain).astype(np.float32)


def _proportional(rope: Rope, plain: np.ndarray) -> np.ndarray:
    # As transformers rounds it, from the share of all coordinates.
    count = int(rope.rotated_share * (2 * len(plain)) // 2)
    return np.where(np.arange(len(plain)) < count, plain, np.float32(0)) / np.float32(rope.factor)


# Scalings that do not depend on the length of a sequence.
_FIXED: dict[str, Callable[[Rope, np.ndarray], np.ndarray]] = {
    "none": lambda rope, plain: plain,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "proportional": _proportional,
}


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """0.1 * weight * ln(factor) + 1. Source: Peng et al. 2023, eq. 22; DeepSeek's `mscale` is the weight."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def prompt_growth(lengths: Int[Array, "*batch"], original: int) -> Int[Array, "*batch"]:
    """Qwen's NTK factor: 1 up to `original`, then 2**(k + 1) - 1 up to original * 2**k.

    Source: Qwen/Qwen-VL-Chat, modeling_qwen.py, `ntk_alpha`.
    """
    doublings = sum((lengths > original << k).astype(jnp.int32) for k in range(32 - original.bit_length()))
    return 2 ** (jnp.asarray(doublings) + 1) - 1


def sequence_lengths(positions: Positions, segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """For every token, 1 + the last position of its segment."""
    last = positions if positions.ndim == 2 else positions.max(axis=-1)
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return jnp.max(jnp.where(same, last[:, None, :], 0), axis=-1) + 1


def rope_angles(positions: Int[Array, "B T"], head_dim: int, theta: float) -> Float[Array, "B T half"]:
    """Angles of plain rotary positions, see `Rope.angles`."""
    return Rope(theta).angles(positions, head_dim)


def rotate(
    x: Float[Array, "B T N H"], angles: Float[Array, "B T half"], magnitude: float = 1.0
) -> Float[Array, "B T N H"]:
    """Rotates every pair (x[i], x[i + half]) by its angle; computed in float32, returned in x's dtype.

    Coordinates from 2 * half on are unchanged.
    """
    half = angles.shape[-1]
    first, second, rest = jnp.split(x.astype(jnp.float32), [half, 2 * half], axis=-1)
    cos, sin = (magnitude * wave(angles)[:, :, None, :] for wave in (jnp.cos, jnp.sin))
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1).astype(x.dtype)
