"""Applies the sections of a run's config to a release."""

import dataclasses
from collections.abc import Mapping

from vlm_jax.config import ConfigError, check_keys, convert, hints_of, parse, parse_kind
from vlm_jax.models.classifier import Classifier
from vlm_jax.models.two_tower import TwoTower
from vlm_jax.models.vlm import VLM
from vlm_jax.pretrained.budgets import with_budget
from vlm_jax.ranges import Count
from vlm_jax.system import System
from vlm_jax.types import Config, Fields


@dataclasses.dataclass(frozen=True)
class ReleaseProcessorSettings:
    """`config.processor` of a release: values other than None replace the release's own settings.

    Attributes:
      max_pixels: maximum pixels of an image; more is treated as a decompression bomb.
      max_length: maximum tokens of a conversation.
      enable_thinking: whether the model may think before an answer, in training and evaluation, where its chat template
        has this variable.
    """

    max_pixels: Count | None = None
    max_length: Count | None = None
    enable_thinking: bool | None = None


@dataclasses.dataclass(frozen=True)
class ImageTextReleaseSettings:
    """`config.processor` of a released two-tower model or classifier.

    Attributes:
      max_pixels: maximum pixels of an image; more is treated as a decompression bomb. None for the release's.
    """

    max_pixels: Count | None = None


@dataclasses.dataclass(frozen=True)
class ClassHead:
    """`config.decoder` of kind `class_head`: a linear layer on the encoder's pooled vector, drawn anew on a release.

    Attributes:
      names: the classes; the captions of the data are among them.
    """

    names: tuple[str, ...]

    def __post_init__(self):
        if not self.names or len(set(self.names)) < len(self.names):
            raise ConfigError(f"config.decoder.names: expected different names of classes, got {self.names}")


def configured(system: System, config: Config) -> System:
    """The system of a release with the sections of a run's config.

    Args:
      system: of `config.release`.
      config: with `token_budget` and the sections `reducer`, `connector`, `encoder`, `decoder` and `processor`, from
        a ConfigDict or the `config.json` of a workdir. Values other than None of `encoder` and `decoder` replace fields
        of these modules, such as `remat`.

    Raises:
      ConfigError: an unknown key, or a setting that the release does not support.
      InfeasibleBudget: the budget cannot be met.
    """
    for section in ("reducer", "connector", "encoder", "decoder", "processor"):
        if not isinstance(config[section], Mapping):
            raise ConfigError(f"config.{section}: expected a section, got {config[section]!r}")
    config = {**config, **{part: _given(config[part]) for part in ("encoder", "decoder")}}
    if isinstance(system.model, TwoTower | Classifier):
        return _image_text(system, config)
    connector = config["connector"] if config["connector"].get("kind") else None
    system = with_budget(system, config["token_budget"], reducer=config["reducer"], connector=connector)
    model = system.model
    assert isinstance(model, VLM)
    for part, own in (("encoder", model.encoder), ("decoder", model.decoder)):
        assert own is not None  # `with_budget` refuses a model without
        fields = _fields(config[part], type(own), f"config.{part}")
        changed: Fields = {part: own.clone(**fields)} if fields else {}
        model = model.clone(**changed) if changed else model
    settings = parse(ReleaseProcessorSettings, config["processor"], "config.processor")
    changes: Fields = {"max_pixels": settings.max_pixels, "max_length": settings.max_length}
    given = {key: value for key, value in changes.items() if value is not None}
    processor = dataclasses.replace(system.processor.thinking(settings.enable_thinking), **given)
    return dataclasses.replace(system, model=model, make_processor=lambda: processor)


def _given(section: Config) -> Fields:
    """The section without keys whose value is None, which leave the release's own settings."""
    return {key: value for key, value in section.items() if value is not None}


def _fields(section: Config, module: type, path: str) -> Fields:
    """The section's values as fields of a module."""
    hints = hints_of(module)
    check_keys(section, hints, path)
    return {key: convert(value, hints[key], f"{path}.{key}") for key, value in section.items()}


def _image_text(system: System, config: Config) -> System:
    """A released two-tower model or classifier with the sections of a run's config.

    Raises:
      ConfigError: an unknown key, or a section that such a model does not have.
    """
    model, name = system.model, type(system.model).__name__
    if config["token_budget"] is not None:
        raise ConfigError(f"config.token_budget: a {name} has no visual tokens to count; set it to None")
    for section in ("reducer", "connector"):
        if config[section].get("kind", "none") not in (None, "none"):
            raise ConfigError(f"config.{section}.kind: a {name} has no {section}; set it to None")
    changes = dataclasses.asdict(parse(ImageTextReleaseSettings, config["processor"], "config.processor"))
    given = {key: value for key, value in changes.items() if value is not None}
    processor = dataclasses.replace(system.any_processor, **given)
    system = dataclasses.replace(system, make_processor=lambda: processor)
    if isinstance(model, TwoTower):
        for part, own, section in (("image", model.image, "encoder"), ("text", model.text, "decoder")):
            fields = _fields(config[section], type(own), f"config.{section}")
            changed: Fields = {part: own.clone(**fields)} if fields else {}
            model = model.clone(**changed) if changed else model
        return dataclasses.replace(system, model=model)
    assert isinstance(model, Classifier) and system.release is not None
    fields = _fields(config["encoder"], type(model.encoder), "config.encoder")
    model = model.clone(encoder=model.encoder.clone(**fields)) if fields else model
    if not config["decoder"]:
        return dataclasses.replace(system, model=model)
    names = parse_kind({"class_head": ClassHead}, config["decoder"], "config.decoder").names
    named: Fields = {"id2label": {str(i): name for i, name in enumerate(names)}}
    named["label2id"] = {name: int(i) for i, name in named["id2label"].items()}
    if "num_classes" in system.release.config:  # vision_transformer's and big_vision's key
        named["num_classes"] = len(names)
    release = system.release.with_other("head", named)
    return dataclasses.replace(system, model=model.clone(num_classes=len(names)), release=release)
