"""Rotary settings of released text configs, old (`rope_theta`, `rope_scaling`) and new (`rope_parameters`)."""

from collections.abc import Mapping

from vlm_jax.layers.rope import Rope, yarn_magnitude
from vlm_jax.pretrained.family import PretrainedError, check_supported
from vlm_jax.types import Config, Fields

# transformers, modeling_rope_utils.py.
ROPE_DEFAULTS: Fields = {
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "rope_parameters": None,
    "original_max_position_embeddings": None,
    "partial_rotary_factor": None,
}
_PLAIN = ("default", "mrope")
_WHOLE = {"partial_rotary_factor": (None, 1.0)}


def released_rope(
    settings: Config, where: str, head_dim: int, sections: tuple[int, ...] = (), *, interleaved: bool = False
) -> Rope:
    """The rotary settings of a text config.

    Args:
      settings: the section with `ROPE_DEFAULTS`; a scaling needs `max_position_embeddings`.
      where: name of the section for errors.
      head_dim: rotated coordinates of a head.
      sections: default M-RoPE sections.
      interleaved: whether axes of M-RoPE take turns.

    Raises:
      PretrainedError: an unsupported scaling, scalings per kind of layer, partially rotated heads, missing keys,
        or values that are not numbers or do not fit the heads.
    """
    check_supported(settings, _WHOLE, where)
    key, found = _settings_of(settings, where)
    where, kind = f"{where}.{key}", found["rope_type"]
    check_supported(found, {"rope_type": (*_PLAIN, *_SCALED), **_WHOLE}, where)
    try:
        rope = Rope(
            theta=float(found.get("rope_theta", settings["rope_theta"])),
            sections=tuple(found.get("mrope_section", sections)),
            interleaved=interleaved,
            **({} if kind in _PLAIN else {"scaling": kind, **_SCALED[kind](found, settings)}),
        )
        rope.check(head_dim)
    except KeyError as error:
        raise PretrainedError(f"{where}: '{kind}' needs the key {error}") from error
    except TypeError as error:
        given = {"rope_theta": settings["rope_theta"], **found}
        raise PretrainedError(f"{where}: expected numbers and lists of numbers for '{kind}', got {given}") from error
    except ValueError as error:
        raise PretrainedError(f"{where}: {error}") from error
    return rope


def released_logit_scale(settings: Config, where: str) -> float:
    """DeepSeek's factor of the attention logits besides the root of the width; arguments as in `released_rope`."""
    _, found = _settings_of(settings, where)
    weight = _optional(found, "mscale_all_dim")
    if found["rope_type"] in _PLAIN or not weight:
        return 1.0
    return yarn_magnitude(_factor(found, settings), weight) ** 2


def _settings_of(settings: Config, where: str) -> tuple[str, Fields]:
    """The key of the rotary settings, and these with their `rope_type`."""
    key = "rope_scaling" if settings["rope_scaling"] else "rope_parameters"
    found = settings[key] or {}
    if not isinstance(found, Mapping):
        raise PretrainedError(f"{where}.{key}: expected a set of settings or null, got {found!r}")
    if any(isinstance(value, Mapping) for value in found.values()):
        raise PretrainedError(f"{where}.{key}: expected one set of settings, got one per {', '.join(found)}")
    return key, {**found, "rope_type": found.get("rope_type", found.get("type", "default"))}


def _linear(found: Config, settings: Config) -> Fields:
    del settings
    return {"factor": float(found["factor"])}


def _dynamic(found: Config, settings: Config) -> Fields:
    return {"factor": float(found["factor"]), "original_length": settings["max_position_embeddings"]}


def _llama3(found: Config, settings: Config) -> Fields:
    return {
        "factor": float(found["factor"]),
        "original_length": _original(found, settings),
        "low_frequency_factor": float(found["low_freq_factor"]),
        "high_frequency_factor": float(found["high_freq_factor"]),
    }


def _yarn(found: Config, settings: Config) -> Fields:
    factor, magnitude = _factor(found, settings), _optional(found, "attention_factor")
    weight, weight_all = _optional(found, "mscale"), _optional(found, "mscale_all_dim")
    if magnitude is None and weight and weight_all:
        magnitude = yarn_magnitude(factor, weight) / yarn_magnitude(factor, weight_all)
    return {
        "factor": factor,
        "original_length": _original(found, settings),
        "beta_fast": float(found.get("beta_fast") or 32),
        "beta_slow": float(found.get("beta_slow") or 1),
        "truncate": found.get("truncate", True),
        "attention_factor": magnitude,
    }


def _longrope(found: Config, settings: Config) -> Fields:
    return {
        "factor": _factor(found, settings),
        "original_length": _original(found, settings),
        "short_factors": tuple(map(float, found["short_factor"])),
        "long_factors": tuple(map(float, found["long_factor"])),
        "attention_factor": _optional(found, "attention_factor"),
    }


_SCALED = {
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def _original(found: Config, settings: Config) -> int:
    """Positions in training: from the section, from its rotary settings, or the model's maximum."""
    key = "original_max_position_embeddings"
    return int(settings.get(key) or found.get(key) or settings["max_position_embeddings"])


def _optional(found: Config, key: str) -> float | None:
    value = found.get(key)
    return None if value is None else float(value)


def _factor(found: Config, settings: Config) -> float:
    """Ratio of sequence lengths to those of training, computed if it is missing."""
    return float(found.get("factor") or settings["max_position_embeddings"] / _original(found, settings))
