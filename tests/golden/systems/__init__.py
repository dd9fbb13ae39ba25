"""The systems that are compared with golden arrays.

A module here has `outputs(folder: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]`, which
reads sizes and settings from the folder and returns every output of its manifest. What it cannot return
stands in `NOT_COMPARED: dict[str, str]`, regular expression of whole names -> reason.
"""

from types import ModuleType

from tests.golden.systems import (
    big_vision_preprocess,
    big_vision_siglip,
    big_vision_vit,
    deepseek_vl,
    deepseek_vl2,
    deepseek_vl2_units,
    deepseek_vl_parts,
    internvl,
    internvl_pixel_shuffle,
    llava,
    mobilevlm_projectors,
    open_clip,
    open_clip_losses,
    ovis2,
    ovis2_5,
    qwen_vl_resampler,
    qwen_vl_visual,
    s2,
    vision_transformer,
)

# The `system` of a manifest -> the module; several systems may share one.
SYSTEMS: dict[str, ModuleType] = {
    "bv_preprocess": big_vision_preprocess,
    "bv_siglip": big_vision_siglip,
    "bv_siglip2": big_vision_siglip,
    "bv_siglip2_naflex": big_vision_siglip,
    "bv_vit_gap_sincos_scan": big_vision_vit,
    "bv_vit_map_learn": big_vision_vit,
    "bv_vit_tok_rep": big_vision_vit,
    "deepseek_vl2_base": deepseek_vl2,
    "deepseek_vl2_ext": deepseek_vl2,
    "deepseek_vl2_small": deepseek_vl2,
    "deepseek_vl2_tiny": deepseek_vl2,
    "deepseek_vl2_units": deepseek_vl2_units,
    "deepseek_vl_hybrid": deepseek_vl,
    "deepseek_vl_parts": deepseek_vl_parts,
    "deepseek_vl_siglip": deepseek_vl,
    "internvl12_llama": internvl,
    "internvl15_internlm2": internvl,
    "internvl2_qwen2": internvl,
    "internvl_pixel_shuffle": internvl_pixel_shuffle,
    "llava15": llava,
    "llava16_anyres": llava,
    "llava_s2": llava,
    "mobilevlm_projectors": mobilevlm_projectors,
    "mobilevlm_v1": llava,
    "mobilevlm_v2": llava,
    "open_clip_losses": open_clip_losses,
    "open_clip_rn": open_clip,
    "open_clip_vit": open_clip,
    "open_clip_vit_gelu": open_clip,
    "ovis2": ovis2,
    "ovis2_5": ovis2_5,
    "ovis2_5_window": ovis2_5,
    "ovis2_hf": ovis2,
    "qwen_vl_v1": qwen_vl_visual,
    "qwen_vl_v1_resampler": qwen_vl_resampler,
    "qwen_vl_v1_visual_2head": qwen_vl_visual,
    "qwen_vl_v1_visual_q256": qwen_vl_visual,
    "s2_siglip": s2,
    "s2_simple": s2,
    "vit_jax_gap": vision_transformer,
    "vit_jax_hybrid": vision_transformer,
    "vit_jax_posemb": vision_transformer,
    "vit_jax_token": vision_transformer,
    "vit_jax_token_rep": vision_transformer,
}
