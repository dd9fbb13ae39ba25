"""Composes systems from a family's encoder and connector and a language model."""

import dataclasses
import re
import warnings
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.checkpoints.rules import Rule, SourceTensor, prefixed
from vlm_jax.config import did_you_mean
from vlm_jax.connectors.connector import Connector
from vlm_jax.encoders.encoder import Encoder
from vlm_jax.layers.learned_rows import LearnedRows
from vlm_jax.models.vlm import VLM
from vlm_jax.pretrained.family import (
    REQUIRED,
    Description,
    LanguageModel,
    Names,
    PretrainedError,
    Resize,
    find_prefix,
    with_defaults,
)
from vlm_jax.pretrained.language import LANGUAGE_MODELS, language_model
from vlm_jax.types import Batch, Config, Dtype, Fields, Instruction, PackedPatches

# Language models of released systems that are not read: their systems' encoders and connectors are.
NOT_READ = frozenset(("minicpm", "minicpm3", "mpt", "opt", "persimmon", "phi", "phi3", "t5"))


def visual_half(
    encoder: Encoder,
    connector: Connector,
    images: jax.ShapeDtypeStruct | PackedPatches,
    rules: tuple[Rule, ...],
    ignore: tuple[str, ...] = (),
    *,
    instruction: Instruction | None = None,
    resize: Resize | None = None,
) -> Description:
    """An encoder and a connector: a `VLM` without a decoder.

    Args:
      encoder, connector: of the release.
      images: shape of one image, or of its packed patches, with a batch axis.
      rules, ignore, resize: as in `Description`.
      instruction: shapes of one, where the connector takes one.
    """
    batch = dataclasses.replace(smallest_batch(images), instruction=instruction)
    return Description(VLM(encoder, connector), (batch,), rules, ignore, resize)


def with_language(
    visual: Description,
    text: Config,
    checkpoint: Mapping[str, SourceTensor],
    where: str,
    *,
    names: Names,
    beside: tuple[str, ...],
    learned_rows: Mapping[str, str] | str | None = None,
    **dtypes: Dtype,
) -> Description:
    """The full system as a `VLM`; only encoder and connector where the checkpoint has no supported language model.

    So a tower and its projector can be loaded without a language model, and also a system whose
    language model is not in `LANGUAGE_MODELS`; its tensors are then kept but not loaded.

    Args:
      visual: from `visual_half`.
      text: the released config of the language model, with its `model_type`.
      checkpoint: provides the keys.
      where: name of the text section for errors, such as of a language model that there is not.
      names: prefixes of the released keys of the language model.
      beside: patterns of the keys outside of the encoder and the connector.
      learned_rows: our name -> released key of the vectors that come first in the visual table, or
        `connector` where the connector has them.
      **dtypes: `dtype` and `param_dtype`.
    """
    there = any(re.fullmatch(pattern, key) for pattern in beside for key in checkpoint)
    kind = with_defaults(text, {"model_type": REQUIRED}, where)["model_type"]
    if kind not in LANGUAGE_MODELS and kind not in NOT_READ:
        raise PretrainedError(f"{where}.model_type: no language model '{kind}'{did_you_mean(kind, LANGUAGE_MODELS)}")
    if there and kind in NOT_READ:
        warnings.warn(
            f"{where}.model_type: the language model '{kind}' is not read; only encoder and connector are loaded",
            stacklevel=2,
        )
    if not there or kind in NOT_READ:
        return Description(visual.module, visual.inputs, visual.rules, (*beside, *visual.ignore))
    language = language_model(text, checkpoint, where, names=names, **dtypes)
    return composed(visual, language, learned_rows, **dtypes)


def composed(
    visual: Description, language: LanguageModel, learned_rows: Mapping[str, str] | str | None = None, **dtypes: Dtype
) -> Description:
    """The parts as one `VLM`; arguments as in `with_language`."""
    rules = [*visual.rules, *prefixed(language.rules, target="decoder/")]
    rows: LearnedRows | str | None = learned_rows if isinstance(learned_rows, str) else None
    if isinstance(learned_rows, Mapping):
        rows = LearnedRows(tuple(learned_rows), language.decoder.width, **dtypes)
        rules += [Rule(released, f"learned_rows/{name}") for name, released in learned_rows.items()]
    module = visual.module.clone(decoder=language.decoder, learned_rows=rows)
    ignore = (*visual.ignore, *language.ignore)
    return Description(module, visual.inputs, tuple(rules), ignore)


def smallest_batch(images: jax.ShapeDtypeStruct | PackedPatches) -> Batch:
    """Shapes of one example of one token, with one image."""
    if not isinstance(images, PackedPatches):
        images = jax.ShapeDtypeStruct((1, *images.shape), images.dtype)
    row = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return Batch(row, row, row, row, images=images)


def text_names(checkpoint: Mapping[str, SourceTensor]) -> Names:
    """Prefixes of the keys of a language model of transformers, which depend on its version."""
    return Names(find_prefix(checkpoint, "embed_tokens.weight"), find_prefix(checkpoint, "lm_head.weight"))


def text_section(config: Config, checkpoint: Mapping[str, SourceTensor], *, kind: str, tied: bool) -> Fields:
    """The `text_config` of a system of transformers, with the head settings of the full config.

    Transformers ties the head where the full config or the section sets it, and the checkpoint
    has no head that differs from the table.

    Args:
      config: the full config.
      checkpoint: provides the head.
      kind: default `model_type` of the section.
      tied: default `tie_word_embeddings` of the full config.
    """
    section = {"model_type": kind, **(config.get("text_config") or {})}
    tied = config.get("tie_word_embeddings", tied) or section.get("tie_word_embeddings", False)
    names = text_names(checkpoint)
    table, head = checkpoint.get(f"{names.trunk}embed_tokens.weight"), checkpoint.get(f"{names.head}lm_head.weight")
    if tied and table is not None and head is not None:
        tied = np.array_equal(table[...], head[...])
    return {**section, "tie_word_embeddings": tied}
