"""Rotary settings of released text configs, old (`rope_theta`, `rope_scaling`) and new (`rope_parameters`)."""

from collections.abc import Mapping
from typing import Any

from vlm_jax.layers.rope import Rope, yarn_magnitude
from vlm_jax.pretrained.family import PretrainedError, check_supported

# transformers, modeling_rope_utils.py.
ROPE_DEFAULTS: dict[str, Any] = {"rope_theta": 10_000.0, "rope_scaling": None, "rope_parameters": None}
_PLAIN = ("default", "mrope")


def released_rope(settings: Mapping[str, Any], where: str, sections: tuple[int, ...] = ()) -> Rope:
    """The rotary settings of a text config.

    Args:
      settings: the section with `ROPE_DEFAULTS` in place; `max_position_embeddings` is wanted where there is a scaling.
      where: names the section in messages.
      sections: of M-RoPE, where the release does not say.

    Raises:
      PretrainedError: a scaling that is not computed here, one for each kind of layer, or keys that it lacks.
    """
    key = "rope_scaling" if settings["rope_scaling"] else "rope_parameters"
    found: dict[str, Any] = dict(settings[key] or {})
    where = f"{where}.{key}"
    if any(isinstance(value, Mapping) for value in found.values()):
        raise PretrainedError(f"{where}: expected one set of settings, got one for each of {', '.join(found)}")
    kind = found.get("rope_type", found.get("type", "default"))
    check_supported(
        {**found, "rope_type": kind}, {"rope_type": (*_PLAIN, *_SCALED), "partial_rotary_factor": (None, 1.0)}, where
    )
    fields = {
        "theta": float(found.get("rope_theta", settings["rope_theta"])),
        "sections": tuple(found.get("mrope_section", sections)),
    }
    try:
        return Rope(**fields) if kind in _PLAIN else Rope(scaling=kind, **fields, **_SCALED[kind](found, settings))
    except KeyError as error:
        raise PretrainedError(f"{where}: '{kind}' needs the key {error}") from error
    except ValueError as error:
        raise PretrainedError(f"{where}: {error}") from error


def _linear(found: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    del settings
    return {"factor": float(found["factor"])}


def _dynamic(found: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"factor": float(found["factor"]), "original_length": settings["max_position_embeddings"]}


def _llama3(found: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "factor": float(found["factor"]),
        "original_length": _original(found, settings),
        "low_frequency_factor": float(found["low_freq_factor"]),
        "high_frequency_factor": float(found["high_freq_factor"]),
    }


def _yarn(found: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    factor, magnitude = _factor(found, settings), found.get("attention_factor")
    weight, weight_all = found.get("mscale"), found.get("mscale_all_dim")
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


def _longrope(found: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "factor": _factor(found, settings),
        "original_length": _original(found, settings),
        "short_factors": tuple(found["short_factor"]),
        "long_factors": tuple(found["long_factor"]),
        "attention_factor": found.get("attention_factor"),
    }


_SCALED = {
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def _original(found: Mapping[str, Any], settings: Mapping[str, Any]) -> int:
    """Positions in training: beside the rotary settings, among them, or those of the model."""
    key = "original_max_position_embeddings"
    return settings.get(key) or found.get(key) or settings["max_position_embeddings"]


def _factor(found: Mapping[str, Any], settings: Mapping[str, Any]) -> float:
    """By how much sequences are longer, which releases may leave to be divided."""
    return float(found.get("factor") or settings["max_position_embeddings"] / _original(found, settings))
