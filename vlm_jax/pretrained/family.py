"""The interface of family files, which convert a released config to a module and its rules."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from flax import linen as nn

from vlm_jax.checkpoints.rules import Rule, SourceTensor
from vlm_jax.decoders.decoder import Decoder
from vlm_jax.layers.mlp import Activation
from vlm_jax.types import Config, Dtype, Fields, Params, Tree


class PretrainedError(ValueError):
    """A released config that cannot be converted to a module; the message has the key and the fix."""


# (params, side) -> the released config and the parameters at that size, and placeholders for the released
# tensors whose shapes change.
Resize = Callable[[Params, int], tuple[Fields, Params, dict[str, SourceTensor]]]


@dataclasses.dataclass(frozen=True)
class Description:
    """The module and rules of a released checkpoint.

    Attributes:
      module: the Linen module, unbound.
      inputs: shapes of the positional arguments of its `__call__` (`jax.ShapeDtypeStruct`s and trees of
        them), for computing the shapes of its parameters.
      rules: conversion from released tensors to parameters; targets are paths in `params`.
      ignore: regular expressions for whole released keys that the module does not use. They are
        kept unread and written back by `save_pretrained`.
      resize: converts the release to square images of another side in pixels; None where it supports
        any size or only one.
    """

    module: nn.Module
    inputs: tuple[Tree, ...]
    rules: tuple[Rule, ...]
    ignore: tuple[str, ...] = ()
    resize: Resize | None = None

    def boxed_shapes(self) -> Params:
        """Shapes of the parameters, in boxes with their axis names."""

        def init(*inputs: Tree) -> Tree:
            return self.module.init(jax.random.key(0), *inputs)["params"]

        return jax.eval_shape(init, *self.inputs)


@runtime_checkable
class Family(Protocol):
    """`describe(config, checkpoint, dtype=.., param_dtype=..)`, one per released schema.

    `config` is the released dict, without defaults for missing keys.
    `checkpoint` provides keys and shapes that are not in the config: the prefix of a saved
    class's names, or the length of a position table.
    """

    def __call__(
        self,
        config: Config,
        checkpoint: Mapping[str, SourceTensor],
        *,
        dtype: Dtype,
        param_dtype: Dtype,
    ) -> Description: ...


class Names(NamedTuple):
    """Prefixes of the released keys of a language model.

    Attributes:
      trunk: before `embed_tokens.weight`, `layers.0...` and so on.
      head: before `lm_head.weight`, or the family's name of the head.
    """

    trunk: str = "model."
    head: str = ""


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """The language model of a released config.

    Attributes:
      decoder: the Linen module, unbound.
      rules: conversion from released tensors to parameters; targets are relative to the decoder.
      ignore: regular expressions for whole released keys that the decoder does not use.
    """

    decoder: Decoder
    rules: tuple[Rule, ...]
    ignore: tuple[str, ...] = ()


def find_prefix(keys: Iterable[str], ending: str) -> str:
    """The prefix of the key that ends with `ending`; `""` where there is none.

    Raises:
      PretrainedError: several keys with different prefixes end with it.
    """
    found = sorted({key.removesuffix(ending) for key in keys if key == ending or key.endswith("." + ending)})
    if len(found) > 1:
        raise PretrainedError(f"expected one tensor named ..{ending}, found it under {', '.join(map(repr, found))}")
    return found[0] if found else ""


def beside(*prefixes: str) -> tuple[str, ...]:
    """The pattern of the keys of a system outside of its loaded parts.

    Args:
      prefixes: the prefix of the keys of each part; none where there is only one
        part.
    """
    return () if "" in prefixes else (f"(?!{'|'.join(map(re.escape, prefixes))}).*",)


def with_defaults(config: Config, defaults: Config, where: str) -> Fields:
    """The config with class defaults for missing keys.

    Args:
      config: the released section.
      defaults: key -> default; `REQUIRED` where the release must have the key.
      where: name of the section for errors.

    Raises:
      PretrainedError: a required key is missing or null.
    """
    missing = [key for key, value in defaults.items() if value is REQUIRED and config.get(key) is None]
    if missing:
        raise PretrainedError(f"{where}: expected the key{'s' * (len(missing) > 1)} {', '.join(missing)}, not found")
    # A section that is null is an absent one, as in transformers.
    absent = {key for key, value in config.items() if value is None and isinstance(defaults.get(key), dict)}
    found = {**defaults, **{key: value for key, value in config.items() if key not in absent}}
    for key, default in defaults.items():
        if key in _SQUARES and key in config:
            found[key] = one_side(found[key], f"{where}.{key}")
        elif isinstance(default, float) and isinstance(found[key], int):
            found[key] = float(found[key])
    return found


_SQUARES = ("image_size", "patch_size")  # in configs a number, or two equal ones
REQUIRED: Any = object()


# Activation in released configs -> a name of `layers.mlp.ACTIVATIONS`.
ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


# Classes whose released configs have the model type of another system -> their own.
_BY_CLASS = {"DeepseekOCRForCausalLM": "deepseek_ocr"}


def marker(config: Config) -> str:
    """The model type of a released config.

    `model_type` of Hugging Face files, unless their class is in `_BY_CLASS`; `open_clip` for a `model_cfg` or a
    `vision_cfg`; `vit_jax` for the config of vision_transformer, which has a `classifier`; else big_vision's
    `model_name`.

    Raises:
      PretrainedError: the config has none of these.
    """
    classes = config.get("architectures")
    if isinstance(classes, list) and (own := [name for cls, name in _BY_CLASS.items() if cls in classes]):
        return own[0]
    if "model_type" in config:
        return str(config["model_type"])
    if "model_cfg" in config or "vision_cfg" in config:
        return "open_clip"
    if "classifier" in config and "patches" in config:
        return "vit_jax"
    if "model_name" in config:
        return f"big_vision.{config['model_name']}"
    raise PretrainedError(
        "the config has no model type: expected the key model_type (Hugging Face), model_cfg "
        "(open_clip), classifier (vision_transformer) or model_name (big_vision), got " + ", ".join(sorted(config))
    )


# Keys of the language model's section in released configs of systems.
_TEXT_SECTIONS = ("text_config", "llm_config", "language_config")


# Sections with a whole system, in released configs that have other parts beside it.
_SYSTEM_SECTIONS = ("thinker_config",)


def system_section(config: Config) -> Config:
    """The section with encoder and language model, where a config has other parts beside them; else the config."""
    return next((config[key] for key in _SYSTEM_SECTIONS if isinstance(config.get(key), Mapping)), config)


def text_section(config: Config) -> Config:
    """The language model's section of a system's config; empty if there is none."""
    config = system_section(config)
    return next((config[key] for key in _TEXT_SECTIONS if isinstance(config.get(key), Mapping)), {})


def one_layer(value: int | Sequence[int], where: str) -> int:
    """The index of a hidden state, for settings that may also be lists.

    Raises:
      PretrainedError: a list of several.
    """
    if isinstance(value, int):
        return value
    raise PretrainedError(f"{where}: expected the index of one hidden state, got {value!r}; several are not supported")


def one_side(value: int | Sequence[int] | None, where: str) -> int:
    """The side of a square, given as one number or for both axes.

    Raises:
      PretrainedError: the axes differ, or there is none.
    """
    sides = {value} if isinstance(value, int) else set(value or ())
    if len(sides) != 1:
        raise PretrainedError(f"{where}: expected a square, got {value}")
    return sides.pop()


def square_root(count: int, where: str) -> int:
    """The side of a square table with `count` rows.

    Raises:
      PretrainedError: count is not a square number.
    """
    side = math.isqrt(count)
    if side * side != count:
        raise PretrainedError(f"{where}: expected the rows of a square grid, got {count}")
    return side


def check_supported(config: Config, expected: Mapping[str, tuple[object, ...]], where: str) -> None:
    """Raises for unsupported settings.

    Args:
      config: a section with its defaults.
      expected: key -> the supported values.
      where: name of the section for errors.

    Raises:
      PretrainedError: lists every key with another value.
    """
    wrong = [
        f"{where}.{key}: expected {' or '.join(map(repr, values))}, got {config[key]!r}"
        for key, values in expected.items()
        if key in config and config[key] not in values
    ]
    if wrong:
        raise PretrainedError("\n".join(wrong))
