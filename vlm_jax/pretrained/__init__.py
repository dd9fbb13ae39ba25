"""Released checkpoints by their own configs: `vlm_jax.from_pretrained`, and the table of families.

One file per family converts the released config, with defaults for missing keys, to a
module, its rules and the keys that it ignores (`family.Description`). A package outside of vlm_jax adds its families by
`register_family`; see `vlm_jax.plugins`.
"""

import os
from collections.abc import Mapping

from jax.sharding import Mesh

from vlm_jax.plugins import Registry, lacking_of_function
from vlm_jax.pretrained import (
    big_vision,
    big_vision_paligemma,
    blip,
    clip,
    deepseek_ocr,
    deepseek_ocr2,
    deepseek_vl,
    deepseek_vl2,
    deepseek_vl_hf,
    dinov2,
    dinov3,
    gemma3,
    gemma4,
    idefics2,
    idefics3,
    internvl,
    internvl_hf,
    language,
    llava,
    llava_hf,
    llava_onevision15,
    minicpm_v4_6,
    open_clip,
    ovis,
    paligemma,
    prismatic,
    qwen2_5_omni,
    qwen2_vl,
    qwen3_5,
    qwen3_vl,
    qwen_vl,
    sam,
    siglip,
    vision_transformer,
    vit,
)
from vlm_jax.pretrained.budgets import Section
from vlm_jax.pretrained.family import Family
from vlm_jax.pretrained.loader import load
from vlm_jax.pretrained.pretrained import Pretrained
from vlm_jax.pretrained.processing import (
    IMAGE_TEXT_PROCESSORS,
    PROCESSORS,
    MakesImageTextProcessor,
    MakesProcessor,
)
from vlm_jax.types import Config

# Model type of a released config (`family.marker`) -> its family.
_OWN: Mapping[str, Family] = {
    "big_vision.proj.image_text.text_transformer": big_vision.describe_text,
    "big_vision.proj.image_text.two_towers": big_vision.describe_two_towers,
    big_vision_paligemma.MARKER: big_vision_paligemma.describe,
    "big_vision.vit": big_vision.describe_vit,
    "blip-2": blip.describe,
    "blip_2_qformer": blip.describe_qformer,
    "blip_2_vision_model": blip.describe_vision,
    "clip": clip.describe,
    "clip_text_model": clip.describe_text,
    "clip_vision_model": clip.describe_vision,
    "open_clip": open_clip.describe,
    "paligemma": paligemma.describe,
    "qwen": qwen_vl.describe,
    "siglip": siglip.describe,
    "siglip_text_model": siglip.describe_text,
    "siglip_vision_model": siglip.describe_vision,
    "siglip2": siglip.describe,
    "siglip2_text_model": siglip.describe_text,
    "siglip2_vision_model": siglip.describe_vision,
    "vit": vit.describe,
    "vit_jax": vision_transformer.describe,
    "DeepseekOCR2": deepseek_ocr2.describe_release,
    "deepseek_ocr": deepseek_ocr.describe,
    "deepseek_ocr2": deepseek_ocr2.describe,
    "deepseek_vl": deepseek_vl_hf.describe,
    "deepseek_vl_hybrid": deepseek_vl_hf.describe_hybrid,
    "deepseek_vl_v2": deepseek_vl2.describe,
    "dinov2": dinov2.describe,
    "dinov2_with_registers": dinov2.describe_with_registers,
    "dinov3_vit": dinov3.describe,
    "gemma3": gemma3.describe,
    "gemma4": gemma4.describe,
    "gemma4_vision": gemma4.describe_vision,
    "idefics2": idefics2.describe,
    "idefics2_vision": idefics2.describe_vision,
    "idefics3": idefics3.describe,
    "idefics3_vision": idefics3.describe_vision,
    "instructblip": blip.describe,
    "instructblip_qformer": blip.describe_qformer,
    "instructblip_vision_model": blip.describe_vision,
    "intern_vit_6b": internvl.describe_vision,
    "internvl": internvl_hf.describe,
    "internvl_chat": internvl.describe,
    "llava": llava_hf.describe,
    "llava_llama": llava.describe,
    "llava_next": llava_hf.describe,
    "llava_onevision": llava_hf.describe,
    "llavaonevision1_5": llava_onevision15.describe,
    "minicpmv4_6": minicpm_v4_6.describe,
    "minicpmv4_6_vision": minicpm_v4_6.describe_vision,
    "mobilevlm": llava.describe,
    "multi_modality": deepseek_vl.describe,
    "openvla": prismatic.describe,
    "ovis": ovis.describe_ovis2,
    "ovis2": ovis.describe_ovis2_hf,
    "ovis2_5": ovis.describe_ovis2_5,
    "prismatic": prismatic.describe,
    "qwen2_vl": qwen2_vl.describe,
    "qwen2_vl_vision": qwen2_vl.describe,
    "qwen2_5_omni": qwen2_5_omni.describe,
    "qwen2_5_omni_thinker": qwen2_5_omni.describe,
    "qwen2_5_omni_vision_encoder": qwen2_5_omni.describe,
    "qwen2_5_vl": qwen2_vl.describe,
    "qwen2_5_vl_vision": qwen2_vl.describe,
    "qwen3_5": qwen3_5.describe,
    "qwen3_5_moe": qwen3_5.describe,
    "qwen3_5_moe_vision": qwen3_5.describe,
    "qwen3_5_vision": qwen3_5.describe,
    "qwen3_vl": qwen3_vl.describe,
    "qwen3_vl_moe": qwen3_vl.describe,
    "qwen3_vl_moe_vision": qwen3_vl.describe,
    "qwen3_vl_vision": qwen3_vl.describe,
    "rice_vit": llava_onevision15.describe,
    "sam": sam.describe,
    "smolvlm": idefics3.describe,
    "smolvlm_vision": idefics3.describe_vision,
    "sam_vision_model": sam.describe,
    **language.FAMILIES,
}

FAMILIES = Registry("register_family", _OWN, lacking_of_function(Family))


def register_family(
    model_type: str,
    describe: Family,
    *,
    processor: MakesProcessor | None = None,
    image_text_processor: MakesImageTextProcessor | None = None,
) -> None:
    """Adds a family of another package to `FAMILIES`.

    Args:
      model_type: of its released configs (`family.marker`).
      describe: as `family.Family`; `vlm_jax.testing.families` tests it.
      processor: makes the processor of a system with conversations from a folder and its config; None for a tower.
      image_text_processor: makes that of a two-tower model or a classifier.

    Raises:
      PluginError: the model type is taken, or a function takes other arguments.
    """
    FAMILIES.register(model_type, describe)
    if processor is not None:
        PROCESSORS.register(model_type, processor)
    if image_text_processor is not None:
        IMAGE_TEXT_PROCESSORS.register(model_type, image_text_processor)


def from_pretrained(
    source: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    image_size: int | None = None,
    config: Config | None = None,
    token_budget: int | None = None,
    reducer: Section | None = None,
    connector: Section | None = None,
    adapter: str | os.PathLike[str] | None = None,
) -> Pretrained:
    """Loads a released checkpoint under its own names.

    Args:
      source: a folder with `config.json` and safetensors (one file or shards) or an `.npz`; such a file
        itself; `organisation/name` on the Hugging Face hub; a folder that `cli.convert` wrote; or the workdir
        of a run started with `config.release`.
      dtype: dtype of parameters and computation: float32, bfloat16 or float16.
      mesh: devices to load to, each reading its own shards; the default device when None.
      image_size: side in pixels of the square images, for which position tables are interpolated as in
        the release's own loader, and to which `processor` resizes; as released when None.
      config: the released settings, for an `.npz` without a `config.json`; one of PaliGemma needs none.
      token_budget, reducer, connector: visual tokens of an image; as in `budgets.with_budget`. The release's own
        when None.
      adapter: a folder of `peft` with a LoRA adapter for the release, or its name on the hub, which is merged.

    Returns:
      The module with its parameters, and the release for writing it back.

    Raises:
      PretrainedError: no family for the config, or unsupported settings.
      CheckpointFileError: files missing, damaged, or in a format that can run code; or an adapter that does not fit.
      CheckpointMismatch: unused and missing keys and wrong shapes, all in one message.
      InfeasibleBudget, ConfigError: as `budgets.with_budget`, before any tensor is read.
    """
    budget = (token_budget, reducer, connector)
    options = {"image_size": image_size, "config": config, "budget": budget, "adapter": adapter}
    return load(source, FAMILIES, dtype=dtype, mesh=mesh, **options)
