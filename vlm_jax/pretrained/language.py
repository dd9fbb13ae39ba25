"""Released language models: the decoder of a text config, its rules, and text-only checkpoints."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from vlm_jax.checkpoints.rules import SourceTensor, prefixed
from vlm_jax.config import did_you_mean
from vlm_jax.models.vlm import VLM
from vlm_jax.pretrained.deepseek import deepseek_v2
from vlm_jax.pretrained.family import (
    REQUIRED,
    Description,
    Family,
    LanguageModel,
    Names,
    PretrainedError,
    with_defaults,
)
from vlm_jax.pretrained.gemma import gemma, gemma2, gemma3
from vlm_jax.pretrained.gemma4_text import gemma4
from vlm_jax.pretrained.internlm2 import internlm2
from vlm_jax.pretrained.llama import (
    llama,
    llava_onevision15,
    mistral,
    qwen2,
    qwen2_5_omni,
    qwen2_vl,
    qwen3,
    qwen3_moe,
    qwen3_vl,
)
from vlm_jax.pretrained.qwen import qwen
from vlm_jax.pretrained.qwen3_5_text import qwen3_5_moe_text, qwen3_5_text
from vlm_jax.types import Batch, Config, Dtype

# Model type of a released config -> its function, with the arguments of `language_model`.
LANGUAGE_MODELS: dict[str, Callable[..., LanguageModel]] = {
    "LLaVAOneVision1_5_text": llava_onevision15,
    "deepseek_v2": deepseek_v2,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "gemma4_text": gemma4,
    "internlm2": internlm2,
    "llama": llama,
    "mistral": mistral,
    "qwen": qwen,
    "qwen2": qwen2,
    "qwen2_5_omni_text": qwen2_5_omni,
    "qwen2_5_vl": qwen2_vl,
    "qwen2_5_vl_text": qwen2_vl,
    "qwen2_vl": qwen2_vl,
    "qwen2_vl_text": qwen2_vl,
    "qwen3": qwen3,
    "qwen3_5_moe_text": qwen3_5_moe_text,
    "qwen3_5_text": qwen3_5_text,
    "qwen3_moe": qwen3_moe,
    "qwen3_vl_moe_text": qwen3_vl,
    "qwen3_vl_text": qwen3_vl,
}
SYSTEMS = ("qwen", "qwen2_5_vl", "qwen2_vl")  # with the config of a full system


def language_model(
    config: Config,
    checkpoint: Mapping[str, SourceTensor],
    where: str,
    *,
    names: Names = Names(),  # noqa: B008 (immutable)
    dtype: Dtype,
    param_dtype: Dtype,
) -> LanguageModel:
    """The language model of a released text config.

    Args:
      config: the section, with its `model_type`.
      checkpoint: shows whether a tied head is stored.
      where: name of the section for errors.
      names: prefixes of the released keys.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Raises:
      PretrainedError: an unsupported language model or setting.
    """
    kind = with_defaults(config, {"model_type": REQUIRED}, where)["model_type"]
    if kind not in LANGUAGE_MODELS:
        raise PretrainedError(
            f"{where}.model_type: unsupported language model '{kind}'{did_you_mean(kind, LANGUAGE_MODELS)}"
        )
    return LANGUAGE_MODELS[kind](config, checkpoint, where, names=names, dtype=dtype, param_dtype=param_dtype)


def alone(describe: Callable[..., LanguageModel], names: Names) -> Family:
    """The family of text-only checkpoints of a language model: a `VLM` with only a decoder."""

    def family(
        config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
    ) -> Description:
        where = config["model_type"]
        found = describe(config, checkpoint, where, names=names, dtype=dtype, param_dtype=param_dtype)
        row = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        rules = prefixed(found.rules, target="decoder/")
        return Description(VLM(None, None, found.decoder), (Batch(row, row, row, row),), rules, found.ignore)

    return family


FAMILIES: dict[str, Family] = {
    kind: alone(describe, Names()) for kind, describe in LANGUAGE_MODELS.items() if kind not in SYSTEMS
}
describe_qwen = alone(qwen, Names("transformer."))
