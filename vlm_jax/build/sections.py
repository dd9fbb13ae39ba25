"""Checks of a whole config's types and ranges, before any part of it is built."""

import dataclasses
from typing import Any, Literal

from vlm_jax.build.image_text import CaptionSettings, Similarity
from vlm_jax.build.settings import ImageTextSettings, PixelSettings, ProcessorSettings, RowSettings
from vlm_jax.config import ConfigError, RunConfig, check_keys, check_section, choose_kind, convert, hints_of, keys_of
from vlm_jax.connectors import CONNECTORS
from vlm_jax.data import SOURCES
from vlm_jax.decoders import DECODERS
from vlm_jax.decoders.text_tower import TextTower
from vlm_jax.encoders import COMPOSITE_ENCODERS, ENCODERS, PACKED_ENCODERS
from vlm_jax.encoders.encoder import ImageEncoder
from vlm_jax.pretrained.configured import ClassHead, ReleaseProcessorSettings
from vlm_jax.ranges import Seed, Size
from vlm_jax.reducers import REDUCERS

Dtypes = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class RunKeys:
    """The keys of a config that are no sections.

    Attributes:
      seed: of initial parameters, the data's order and random draws of the training.
      release: a released folder, or its name on the hub, from which parts, processor and template are taken; None: the
        sections describe everything.
      dtype: of activations; None until it is chosen.
      param_dtype: of the parameters of frozen parts; those of a part that any stage trains are float32.
      token_budget: visual tokens that reach the decoder; None for those of the release, or a model without.
      token_budget_per: what has so many: an image with all its tiles (or a clip with its frames), a frame, or a tile.
      schedule: stages in the order in which they run.
    """

    seed: Seed
    release: str | None
    dtype: Dtypes | None
    param_dtype: Dtypes | None
    token_budget: Size | None
    token_budget_per: Literal["image", "frame", "tile"]
    schedule: tuple[str, ...]


SECTIONS = ("data", "row", "processor", "encoder", "reducer", "connector", "decoder", "lora", "stages", "optimizer",
            "loop", "mesh", "evaluation")  # fmt: skip
# Every key of a run's config; the last sections are read by the trainer and the evaluation.
KEYS = (*(field.name for field in dataclasses.fields(RunKeys)), *SECTIONS)
TOWERS: dict[str, type] = {"text_tower": TextTower, "class_head": ClassHead}
# The classes of `processor` by kind of decoder; of any other decoder the last.
PROCESSORS: dict[str, type] = {"text_tower": ImageTextSettings, "class_head": PixelSettings}


def check_sections(config: RunConfig) -> None:
    """Checks that a config has every key, and that sections are sections.

    Raises:
      ConfigError: it does not; the message has the path.
    """
    check_section(config, "config")
    check_keys(config, KEYS, "config")
    missing = [key for key in KEYS if key not in config]
    if missing:
        raise ConfigError("\n".join(f"config.{key}: missing; see configs/base.py" for key in missing))
    for key in SECTIONS:
        check_section(config[key], f"config.{key}")
    for label, stage in config.stages.items():
        check_section(stage, f"config.stages.{label}")
    own = {key: config[key] for key in KEYS if key not in SECTIONS}
    check_values(RunKeys, own, "config")


def check_values(cls: Any, section: RunConfig, path: str, *, unset: bool = False) -> None:
    """Checks the values of a section against the fields of a class, without making one.

    Args:
      cls: a settings class or a module; keys that are no fields of it are not looked at.
      section: of a config.
      path: of the section.
      unset: whether None is allowed for every key.

    Raises:
      ConfigError: a value of another type or outside its range.
    """
    check_section(section, path)
    hints, known = hints_of(cls), keys_of(cls)
    for key, value in section.items():
        if key not in known or (unset and value is None):
            continue
        if hints[key] is ImageEncoder:
            check_kind({**ENCODERS, **COMPOSITE_ENCODERS}, value, f"{path}.{key}")
        elif unset and hasattr(value, "items"):
            convert({name: item for name, item in value.items() if item is not None}, hints[key], f"{path}.{key}")
        else:
            convert(value, hints[key], f"{path}.{key}")


def check_kind(table: Any, section: RunConfig, path: str, *, unset: bool = False) -> None:
    """`check_values` with the class for a section's `kind`; raises alike for an unknown kind."""
    cls = choose_kind(table, section, path)
    if cls is not None:  # a kind without keys
        check_values(cls, section, path, unset=unset)


def check_model(config: RunConfig, *, unset: bool = False) -> None:
    """Checks every value of a config that `build` reads; fields of a release's own modules when it is opened.

    Args:
      config: a run's config.
      unset: whether a key may be None until it is chosen, as in `train.finetuning`.

    Raises:
      ConfigError: an unknown or missing key, a value of another type or outside its range.
    """
    check_sections(config)
    check_kind(SOURCES, config.data, "config.data", unset=unset)
    if config.release is not None:
        _check_released(config, unset)
        return
    kind = config.decoder.get("kind")
    encoders = {**ENCODERS, **COMPOSITE_ENCODERS, **PACKED_ENCODERS}
    check_kind(encoders, config.encoder, "config.encoder")
    check_kind({**DECODERS, **TOWERS}, config.decoder, "config.decoder")
    check_values(PROCESSORS.get(kind, ProcessorSettings), config.processor, "config.processor")
    if kind not in TOWERS:
        check_values(RowSettings, config.row, "config.row")
        check_kind(REDUCERS, config.reducer, "config.reducer")
        check_kind(CONNECTORS, config.connector, "config.connector")
        return
    if kind == "text_tower":
        check_values(CaptionSettings, config.row, "config.row")
        check_kind({"similarity": Similarity}, config.connector, "config.connector")
    if "kind" in config.reducer:
        check_kind(REDUCERS, config.reducer, "config.reducer")


def _check_released(config: RunConfig, unset: bool) -> None:
    """The sections that change a release, where a kind of None is the release's own."""
    for key, table in (("reducer", REDUCERS), ("connector", CONNECTORS)):
        kind = config[key].get("kind")
        if kind is not None:
            check_kind({"none": None} if kind == "none" else table, config[key], f"config.{key}", unset=unset)
    check_values(ReleaseProcessorSettings, config.processor, "config.processor", unset=unset)
    check_values(RowSettings, config.row, "config.row", unset=unset)
