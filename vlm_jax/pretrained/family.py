"""What a family file of this folder gives: a released config turned into a module and its rules."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from flax import linen as nn

from vlm_jax.checkpoints.rules import Rule, SourceTensor
from vlm_jax.decoders.decoder import Decoder
from vlm_jax.types import Config, Dtype, Fields, Params, Tree


class PretrainedError(ValueError):
    """A released config that cannot be turned into a module; the message names the key and the fix."""


# (params, side) -> the released config and the parameters at that size, and stand-ins for the released
# tensors whose shapes then are others.
Resize = Callable[[Params, int], tuple[Fields, Params, dict[str, SourceTensor]]]


@dataclasses.dataclass(frozen=True)
class Description:
    """A released checkpoint in terms of this package.

    Attributes:
      module: the Linen module; nothing in it has parameters yet.
      inputs: shapes of the positional arguments of its `__call__` (`jax.ShapeDtypeStruct`s and trees of
        them), through which the shapes of its parameters are found.
      rules: which released tensors make which parameters; targets are paths in `params`.
      ignore: regular expressions for whole released keys that the module has no use for. They are
        carried along unread and written back by `save_pretrained`.
      resize: makes the release one for square images of another side in pixels; None where it works at
        any size or at one only.
    """

    module: nn.Module
    inputs: tuple[Tree, ...]
    rules: tuple[Rule, ...]
    ignore: tuple[str, ...] = ()
    resize: Resize | None = None

    def boxed_shapes(self) -> Params:
        """Shapes of the parameters, in the boxes that name their axes."""

        def init(*inputs: Tree) -> Tree:
            return self.module.init(jax.random.key(0), *inputs)["params"]

        return jax.eval_shape(init, *self.inputs)


@runtime_checkable
class Family(Protocol):
    """`describe(config, checkpoint, dtype=.., param_dtype=..)`, one for every released schema.

    `config` is the released dict, with the defaults that released files leave out still missing.
    `checkpoint` serves for its keys and shapes, where the config does not tell: the prefix that a saved
    class puts before its names, or the length of a position table.
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
    """What stands before the released keys of a language model.

    Attributes:
      trunk: before `embed_tokens.weight`, `layers.0...` and their like.
      head: before `lm_head.weight`, or what the family calls its head.
    """

    trunk: str = "model."
    head: str = ""


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """The language model of a released config.

    Attributes:
      decoder: the Linen module; nothing in it has parameters yet.
      rules: which released tensors make which parameters; targets are relative to the decoder's.
      ignore: regular expressions for whole released keys of it that the decoder has no use for.
    """

    decoder: Decoder
    rules: tuple[Rule, ...]
    ignore: tuple[str, ...] = ()


def find_prefix(keys: Iterable[str], ending: str) -> str:
    """What stands before `ending` in the one key that ends so; `""` where no key does.

    Raises:
      PretrainedError: several keys end so, under different prefixes.
    """
    found = sorted({key.removesuffix(ending) for key in keys if key == ending or key.endswith("." + ending)})
    if len(found) > 1:
        raise PretrainedError(f"expected one tensor named ..{ending}, found it under {', '.join(map(repr, found))}")
    return found[0] if found else ""


def beside(*prefixes: str) -> tuple[str, ...]:
    """The pattern of the keys of a system that its read parts have no use for.

    Args:
      prefixes: what the keys of a part start with, one for every part; nothing where there is no more
        than the part.
    """
    return () if "" in prefixes else (f"(?!{'|'.join(map(re.escape, prefixes))}).*",)


def with_defaults(config: Config, defaults: Config, where: str) -> Fields:
    """The config with the class defaults that released files leave out.

    Args:
      config: the released section.
      defaults: key -> default; `REQUIRED` where the release must give the key.
      where: names the section in messages.

    Raises:
      PretrainedError: a required key is missing.
    """
    missing = [key for key, value in defaults.items() if value is REQUIRED and key not in config]
    if missing:
        raise PretrainedError(f"{where}: expected the key{'s' * (len(missing) > 1)} {', '.join(missing)}, not there")
    return {**defaults, **config}


REQUIRED: Any = object()


# What released configs call an activation -> a name of `layers.mlp.ACTIVATIONS`.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def marker(config: Config) -> str:
    """What a released config calls its kind of model.

    `model_type` of Hugging Face files; `open_clip` for a `model_cfg` or a `vision_cfg`; `vit_jax` for the
    config of vision_transformer, which has a `classifier`; else big_vision's `model_name`.

    Raises:
      PretrainedError: the config has none of these.
    """
    if "model_type" in config:
        return str(config["model_type"])
    if "model_cfg" in config or "vision_cfg" in config:
        return "open_clip"
    if "classifier" in config and "patches" in config:
        return "vit_jax"
    if "model_name" in config:
        return f"big_vision.{config['model_name']}"
    raise PretrainedError(
        "the config does not say what it describes: expected the key model_type (Hugging Face), model_cfg "
        "(open_clip), classifier (vision_transformer) or model_name (big_vision), got " + ", ".join(sorted(config))
    )


# Where released configs of systems keep the one of their language model.
_TEXT_SECTIONS = ("text_config", "llm_config", "language_config")


def text_section(config: Config) -> Config:
    """A system's config of its language model; empty where it has none of its own."""
    return next((config[key] for key in _TEXT_SECTIONS if isinstance(config.get(key), Mapping)), {})


def one_layer(value: int | Sequence[int], where: str) -> int:
    """The number of a hidden state, where releases may also list several.

    Raises:
      PretrainedError: several.
    """
    if isinstance(value, int):
        return value
    raise PretrainedError(f"{where}: expected the number of one hidden state, got {value!r}; several are not joined")


def one_side(value: int | Sequence[int], where: str) -> int:
    """The side of a square, which releases give once or for both axes.

    Raises:
      PretrainedError: the axes differ.
    """
    sides = {value} if isinstance(value, int) else set(value)
    if len(sides) != 1:
        raise PretrainedError(f"{where}: expected a square, got {value}")
    return sides.pop()


def square_root(count: int, where: str) -> int:
    """The side of a square table with so many rows.

    Raises:
      PretrainedError: it is no square.
    """
    side = math.isqrt(count)
    if side * side != count:
        raise PretrainedError(f"{where}: expected the rows of a square grid, got {count}")
    return side


def check_supported(config: Config, expected: Mapping[str, tuple[object, ...]], where: str) -> None:
    """Refuses settings whose maths nothing here computes.

    Args:
      config: a section with its defaults in place.
      expected: key -> the values that can be computed.
      where: names the section in messages.

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
