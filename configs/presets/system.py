"""What the presets of whole released systems have in common: their form, and how a config takes one.

A preset says what a release is made of and how its processor treats pixels, never how it is trained:

    config = base.get_config()
    system.take(config, llava.llava_1_5_7b())
    config.processor.tokenizer = "path/to/tokenizer.json"

Its parameters are those that `vlm_jax.from_pretrained` gives for the release, under the same paths. A run lays
out rows of its own: without the rows that a release learns beside its images (`image_newline`), with tiles
as `config.processor.tiles` says, and with positions on one axis.
"""

from typing import Any

from ml_collections import ConfigDict

REPLACED = ("encoder", "connector", "decoder")


def released(
    token_budget: int,
    vision: ConfigDict,
    connector: dict[str, Any],
    decoder: dict[str, Any],
    special_tokens: dict[str, str] | None = None,
    **processor: Any,
) -> ConfigDict:
    """A preset.

    Args:
      token_budget: visual tokens of one image, or of a tile; the most of one where its size is its own.
      vision: encoder and pixels, as of `vision_encoders`.
      connector: its section; what the budget decides is left out.
      decoder: its section, as of `language_models`.
      special_tokens: of the release's tokenizer; as `config.processor.special_tokens`.
      **processor: more keys of that section.
    """
    preset = ConfigDict({"token_budget": token_budget, "token_budget_per": "tile"})
    preset.encoder, preset.processor = vision.encoder, vision.processor
    preset.connector, preset.decoder = ConfigDict(connector), ConfigDict(decoder)
    preset.processor.update({"special_tokens": special_tokens or {}, **processor})
    return preset


def take(config: ConfigDict, preset: ConfigDict) -> None:
    """Puts a preset into a config: sections of parts are replaced, other keys are updated."""
    for key in REPLACED:
        if key in preset:
            config[key] = preset[key]
    config.update({key: value for key, value in preset.items() if key not in REPLACED})
