"""Applies the sections of a run's config to a release."""

import dataclasses
import typing
from collections.abc import Mapping

from vlm_jax.config import ConfigError, check_keys, convert, parse
from vlm_jax.models.vlm import VLM
from vlm_jax.pretrained.budgets import with_budget
from vlm_jax.system import System
from vlm_jax.types import Config, Fields


@dataclasses.dataclass(frozen=True)
class ReleaseProcessorSettings:
    """`config.processor` of a release: values other than None replace the release's own settings.

    Attributes:
      max_pixels: maximum pixels of an image; more is treated as a decompression bomb.
      max_length: maximum tokens of a conversation.
    """

    max_pixels: int | None = None
    max_length: int | None = None


def configured(system: System, config: Config) -> System:
    """The system of a release with the sections of a run's config.

    Args:
      system: of `config.release`.
      config: with `token_budget` and the sections `reducer`, `connector`, `encoder`, `decoder` and `processor`, from
        a ConfigDict or the `config.json` of a workdir.

    Raises:
      ConfigError: an unknown key, or a setting that the release does not support.
      InfeasibleBudget: the budget cannot be met.
    """
    for section in ("reducer", "connector", "encoder", "decoder", "processor"):
        if not isinstance(config[section], Mapping):
            raise ConfigError(f"config.{section}: expected a section, got {config[section]!r}")
    connector = config["connector"] if config["connector"].get("kind") else None
    system = with_budget(system, config["token_budget"], reducer=config["reducer"], connector=connector)
    model = system.model
    assert isinstance(model, VLM)
    for part, own in (("encoder", model.encoder), ("decoder", model.decoder)):
        assert own is not None  # `with_budget` refuses a model without
        hints = typing.get_type_hints(type(own))
        check_keys(config[part], hints, f"config.{part}")
        fields = {key: convert(value, hints[key], f"config.{part}.{key}") for key, value in config[part].items()}
        changed: Fields = {part: own.clone(**fields)} if fields else {}
        model = model.clone(**changed) if changed else model
    changes = dataclasses.asdict(parse(ReleaseProcessorSettings, config["processor"], "config.processor"))
    given = {key: value for key, value in changes.items() if value is not None}
    processor = dataclasses.replace(system.processor, **given)
    return dataclasses.replace(system, model=model, make_processor=lambda: processor)
