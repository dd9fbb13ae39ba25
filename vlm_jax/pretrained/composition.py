"""A whole system: the visual half that a family file describes, and the language model behind it."""

import dataclasses
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.checkpoints.rules import Rule, SourceTensor, prefixed
from vlm_jax.connectors.connector import Connector
from vlm_jax.encoders.encoder import Encoder
from vlm_jax.layers.learned_rows import LearnedRows
from vlm_jax.models.vlm import VLM
from vlm_jax.pretrained.family import Description, LanguageModel, Names, Resize, find_prefix
from vlm_jax.pretrained.language import LANGUAGE_MODELS, language_model
from vlm_jax.types import Batch, Config, Dtype, Fields, Instruction, PackedPatches


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
      images: shape of one image, or of its packed patches, with the axis of the batch.
      rules, ignore, resize: as of `Description`.
      instruction: shapes of one, where the connector reads one.
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
    """The whole system as a `VLM`; the visual half alone where the checkpoint holds no more of what is read here.

    So a tower and its projector without a language model are loaded as they are, and so is a system whose
    language model is none of `LANGUAGE_MODELS`; its tensors are then carried along.

    Args:
      visual: as of `visual_half`.
      text: the released config of the language model, with its `model_type`.
      checkpoint: for its keys.
      where: names the text section in messages.
      names: what stands before the released keys of the language model.
      beside: patterns of the keys that are not of the visual half.
      learned_rows: our name -> released key of the vectors that stand first in the visual table, or
        `connector` where the connector holds them.
      **dtypes: `dtype` and `param_dtype`.
    """
    there = any(re.fullmatch(pattern, key) for pattern in beside for key in checkpoint)
    if not there or text["model_type"] not in LANGUAGE_MODELS:
        return Description(visual.module, visual.inputs, visual.rules, (*beside, *visual.ignore))
    language = language_model(text, checkpoint, where, names=names, **dtypes)
    return composed(visual, language, learned_rows, **dtypes)


def composed(
    visual: Description, language: LanguageModel, learned_rows: Mapping[str, str] | str | None = None, **dtypes: Dtype
) -> Description:
    """The parts as one `VLM`; arguments as of `with_language`."""
    rules = [*visual.rules, *prefixed(language.rules, target="decoder/")]
    rows: LearnedRows | str | None = learned_rows if isinstance(learned_rows, str) else None
    if isinstance(learned_rows, Mapping):
        rows = LearnedRows(tuple(learned_rows), language.decoder.width, **dtypes)
        rules += [Rule(released, f"learned_rows/{name}") for name, released in learned_rows.items()]
    module = visual.module.clone(decoder=language.decoder, learned_rows=rows)
    ignore = (*visual.ignore, *language.ignore)
    return Description(module, visual.inputs, tuple(rules), ignore)


def smallest_batch(images: jax.ShapeDtypeStruct | PackedPatches) -> Batch:
    """Shapes of one example of one position, with one image."""
    if not isinstance(images, PackedPatches):
        images = jax.ShapeDtypeStruct((1, *images.shape), images.dtype)
    row = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return Batch(row, row, row, row, images=images)


def text_names(checkpoint: Mapping[str, SourceTensor]) -> Names:
    """What stands before the keys of a language model of transformers, which changed with its versions."""
    return Names(find_prefix(checkpoint, "embed_tokens.weight"), find_prefix(checkpoint, "lm_head.weight"))


def text_section(config: Config, checkpoint: Mapping[str, SourceTensor], *, kind: str, tied: bool) -> Fields:
    """The `text_config` of a system of transformers, with what the whole config says about the head.

    Transformers ties the head where the whole config or the section says so, and where the checkpoint does
    not hold a head that differs from the table.

    Args:
      config: the whole config.
      checkpoint: for the head.
      kind: `model_type` of the section where it does not say.
      tied: `tie_word_embeddings` of the whole config where it does not say.
    """
    section = {"model_type": kind, **(config.get("text_config") or {})}
    tied = config.get("tie_word_embeddings", tied) or section.get("tie_word_embeddings", False)
    names = text_names(checkpoint)
    table, head = checkpoint.get(f"{names.trunk}embed_tokens.weight"), checkpoint.get(f"{names.head}lm_head.weight")
    if tied and table is not None and head is not None:
        tied = np.array_equal(table[...], head[...])
    return {**section, "tie_word_embeddings": tied}
