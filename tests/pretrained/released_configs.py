"""Released configs at their real sizes, as sparse as the files are, and stand-ins for what their checkpoints hold.

Source: config.json of each repository on the Hugging Face hub, named before each; a test compares them with
published numbers of parameters where there are any.
"""

from typing import Any

import numpy as np

Shapes = dict[str, tuple[int, ...]]


def tensors(shapes: Shapes) -> dict[str, np.ndarray]:
    """Stand-ins that take no memory."""
    return {key: np.broadcast_to(np.zeros((), np.float32), shape) for key, shape in shapes.items()}


def _text(kind: str, width: int, mlp_dim: int, depth: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": mlp_dim, "num_hidden_layers": depth}
    return {"model_type": kind, **sizes, "num_attention_heads": heads, "num_key_value_heads": kv_heads, **more}


_CLIP_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_CLIP_336 = {**_CLIP_LARGE, "model_type": "clip_vision_model", "image_size": 336, "patch_size": 14}


def _llava(text: dict[str, Any], *, newline: bool = False) -> tuple[dict[str, Any], Shapes]:
    """llava-hf/llava-1.5-*-hf and llava-v1.6-*-hf."""
    width = text["hidden_size"]
    config = {"model_type": "llava_next" if newline else "llava", "text_config": text, "vision_config": _CLIP_336}
    shapes = {
        "multi_modal_projector.linear_2.weight": (width, width),
        "language_model.model.embed_tokens.weight": (text["vocab_size"], width),
        "language_model.lm_head.weight": (text["vocab_size"], width),
        "vision_tower.vision_model.embeddings.class_embedding": (1024,),
    }
    return config, shapes | ({"image_newline": (width,)} if newline else {})


_VICUNA = {"vocab_size": 32_064, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}
_MISTRAL = {"vocab_size": 32_064, "rms_norm_eps": 1e-5, "sliding_window": None, "rope_theta": 1e6}


def _mobilevlm(width: int, mlp_dim: int, depth: int, heads: int) -> tuple[dict[str, Any], Shapes]:
    """mtgv/MobileVLM_V2-*."""
    config = _text("mobilevlm", width, mlp_dim, depth, heads, heads, vocab_size=32_000, rms_norm_eps=1e-5)
    tower = {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_vision_select_layer": -2}
    return {**config, **tower, "mm_projector_type": "ldpnetv2"}, {"model.embed_tokens.weight": (32_000, width)}


_QWEN_VL = {
    "model_type": "qwen",
    "seq_length": 2048,
    "intermediate_size": 22_016,
    "visual": {
        "heads": 16,
        "image_size": 448,
        "image_start_id": 151_857,
        "layers": 48,
        "mlp_ratio": 4.9231,
        "output_dim": 4096,
        "patch_size": 14,
        "width": 1664,
    },
}
_QWEN2_TOWER = {"depth": 32, "num_heads": 16, "in_chans": 3, "patch_size": 14, "spatial_merge_size": 2}
_QWEN_VL_KEYS = ("visual.patch_embed.proj.weight", "model.embed_tokens.weight")


def _qwen2_vl(kind: str, *sizes: int, tied: bool = False, tower: dict[str, Any]) -> tuple[dict[str, Any], Shapes]:
    """Qwen/Qwen2-VL-* and Qwen2.5-VL-*, with the language model's settings beside the rest."""
    *sizes, vocab = sizes
    rope = {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
    more = {"vocab_size": vocab, "rms_norm_eps": 1e-6, "use_sliding_window": False, "tie_word_embeddings": tied}
    config = {**_text(kind, *sizes, **more, **rope), "vision_config": {**_QWEN2_TOWER, **tower}}
    keys = (*_QWEN_VL_KEYS, *(() if tied else ("lm_head.weight",)))
    return config, dict.fromkeys(keys, (1,))


def _merged(width: int) -> dict[str, Any]:
    return {"embed_dim": 1280, "mlp_ratio": 4, "hidden_size": width}


def _windowed(width: int, mlp_dim: int) -> dict[str, Any]:
    return {"hidden_size": 1280, "intermediate_size": mlp_dim, "out_hidden_size": width}


_SIGLIP_LARGE = {"model_name": "siglip_large_patch16_384", "image_size": 384}
_SIGLIP_LARGE |= {"select_feature": "same", "select_layer": -1}
_SAM_B = {"model_name": "sam_b_downsample", "image_size": 1024, "select_feature": "same", "select_layer": -1}
_HALF = [0.5, 0.5, 0.5]
_CLIP_MEAN, _CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
_HYBRID = {
    "concat_type": "tuple",
    "high_res_cfg": {**_SAM_B, "pixel_mean": _CLIP_MEAN, "pixel_std": _CLIP_STD},
    "low_res_cfg": {**_SIGLIP_LARGE, "pixel_mean": _HALF, "pixel_std": _HALF},
}


def _deepseek_vl(text: dict[str, Any], vision: tuple[str, dict[str, Any]], projector: str) -> tuple[Any, Shapes]:
    """deepseek-ai/deepseek-vl-1.3b-base and deepseek-vl-7b-base."""
    aligner = {"projector_type": projector, "depth": 2, "input_dim": 1024, "n_embed": text["hidden_size"]}
    config = {
        "model_type": "multi_modality",
        "language_config": {**text, "vocab_size": 102_400, "max_position_embeddings": 16_384},
        "vision_config": {"cls": vision[0], "params": vision[1]},
        "aligner_config": {"cls": "MlpProjector", "params": aligner},
    }
    return config, {"language_model.model.norm.weight": (1,)}


def _deepseek_vl2(text: dict[str, Any]) -> tuple[dict[str, Any], Shapes]:
    """deepseek-ai/deepseek-vl2-tiny, deepseek-vl2-small and deepseek-vl2."""
    experts = {"n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1}
    tower = {"layers": 27, "mlp_ratio": 3.7362, "patch_size": 14, "width": 1152, "image_size": 384}
    config = {
        "model_type": "deepseek_vl_v2",
        "vision_config": tower,
        "projector_config": {"n_embed": text["hidden_size"], "depth": 2},
        "language_config": {**text, **experts, "max_position_embeddings": 4096},
    }
    return config, {"language.model.norm.weight": (1,), "image_newline": (1,), "view_seperator": (1,)}


_INTERN_300M = {
    **_CLIP_LARGE,
    "image_size": 448,
    "qkv_bias": True,
    "qk_normalization": False,
    "norm_type": "layer_norm",
}
_DYNAMIC = {"rope_theta": 1e6, "rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 32_768}
_QWEN25 = {"vocab_size": 151_674, "rms_norm_eps": 1e-6, "use_sliding_window": False, **_DYNAMIC}
_INTERNLM = {"vocab_size": 92_553, "rms_norm_eps": 1e-5, "bias": False, **_DYNAMIC}


def _internvl(text: dict[str, Any], vision: dict[str, Any] = _INTERN_300M) -> tuple[dict[str, Any], Shapes]:
    """OpenGVLab/InternVL2_5-* and InternVL3-*."""
    config = {"model_type": "internvl_chat", "vision_config": vision, "llm_config": text, "ps_version": "v2"}
    return config, {"language_model.model.norm.weight": (1,)}


_AIMV2_LARGE = (1024, 2816, 24, 8)
_AIMV2_HUGE = (1536, 4096, 24, 12)
_QWEN_TEXT = {"rms_norm_eps": 1e-6, "use_sliding_window": False, "rope_theta": 1e6, "max_position_embeddings": 32_768}


def _ovis2(text: dict[str, Any], tower: tuple[int, int, int, int]) -> tuple[dict[str, Any], Shapes]:
    """AIDC-AI/Ovis2-*."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    backbone = {"model_type": "aimv2", **dict(zip(names, tower, strict=True)), "image_size": 448, "patch_size": 14}
    tokenizer = {"backbone_config": backbone, "vocab_size": 65_536, "hidden_stride": 2}
    config = {"model_type": "ovis", "hidden_size": text["hidden_size"], "llm_config": text}
    return {**config, "visual_tokenizer_config": tokenizer}, {"llm.model.norm.weight": (1,)}


def _ovis2_5(text: dict[str, Any]) -> tuple[dict[str, Any], Shapes]:
    """AIDC-AI/Ovis2.5-2B and Ovis2.5-9B."""
    config = {"model_type": "ovis2_5", "hidden_size": text["hidden_size"], "llm_config": text}
    return {**config, "vit_config": {"model_type": "siglip2_navit"}}, {"llm.model.norm.weight": (1,)}


_QWEN3 = {**_QWEN_TEXT, "head_dim": 128, "vocab_size": 151_936}

# Preset (`family.name`) -> the released config, and keys and shapes of its checkpoint that it is read with.
SYSTEMS: dict[str, tuple[dict[str, Any], Shapes]] = {
    "llava.llava_1_5_7b": _llava(_text("llama", 4096, 11_008, 32, 32, 32, **_VICUNA)),
    "llava.llava_1_5_13b": _llava(_text("llama", 5120, 13_824, 40, 40, 40, **_VICUNA)),
    "llava.llava_1_6_vicuna_7b": _llava(_text("llama", 4096, 11_008, 32, 32, 32, **_VICUNA), newline=True),
    "llava.llava_1_6_vicuna_13b": _llava(_text("llama", 5120, 13_824, 40, 40, 40, **_VICUNA), newline=True),
    "llava.llava_1_6_mistral_7b": _llava(_text("mistral", 4096, 14_336, 32, 32, 8, **_MISTRAL), newline=True),
    "llava.mobilevlm_v2_1_7b": _mobilevlm(2048, 5632, 24, 16),
    "llava.mobilevlm_v2_3b": _mobilevlm(2560, 6912, 32, 32),
    "llava.mobilevlm_v2_7b": _mobilevlm(4096, 11_008, 32, 32),
    "qwen_vl.qwen_vl": (_QWEN_VL, {"transformer.wte.weight": (1,), "transformer.visual.proj": (1,)}),
    "qwen_vl.qwen2_vl_2b": _qwen2_vl("qwen2_vl", 1536, 8960, 28, 12, 2, 151_936, tied=True, tower=_merged(1536)),
    "qwen_vl.qwen2_vl_7b": _qwen2_vl("qwen2_vl", 3584, 18_944, 28, 28, 4, 152_064, tower=_merged(3584)),
    "qwen_vl.qwen2_vl_72b": _qwen2_vl("qwen2_vl", 8192, 29_568, 80, 64, 8, 152_064, tower=_merged(8192)),
    "qwen_vl.qwen2_5_vl_3b": _qwen2_vl(
        "qwen2_5_vl", 2048, 11_008, 36, 16, 2, 151_936, tied=True, tower=_windowed(2048, 3420)
    ),
    "qwen_vl.qwen2_5_vl_7b": _qwen2_vl("qwen2_5_vl", 3584, 18_944, 28, 28, 4, 152_064, tower=_windowed(3584, 3420)),
    "qwen_vl.qwen2_5_vl_72b": _qwen2_vl("qwen2_5_vl", 8192, 29_568, 80, 64, 8, 152_064, tower=_windowed(8192, 3456)),
    "deepseek_vl.deepseek_vl_1_3b": _deepseek_vl(
        _text("llama", 2048, 5632, 24, 16, 16), ("CLIPVisionTower", _SIGLIP_LARGE), "mlp_gelu"
    ),
    "deepseek_vl.deepseek_vl_7b": _deepseek_vl(
        _text("llama", 4096, 11_008, 30, 32, 32), ("HybridVisionTower", _HYBRID), "low_high_hybrid_split_mlp_gelu"
    ),
    "deepseek_vl.deepseek_vl2_tiny": _deepseek_vl2(
        _text("deepseek_v2", 1280, 6848, 12, 10, 10, vocab_size=129_280, moe_intermediate_size=896)
        | {"n_routed_experts": 64, "use_mla": False, "kv_lora_rank": None, "q_lora_rank": None}
    ),
    "deepseek_vl.deepseek_vl2_small": _deepseek_vl2(
        _text("deepseek_v2", 2048, 10_944, 27, 16, 16, vocab_size=102_400, moe_intermediate_size=1408)
        | {"n_routed_experts": 64, "q_lora_rank": None}
    ),
    "deepseek_vl.deepseek_vl2_base": _deepseek_vl2(
        _text("deepseek_v2", 2560, 12_288, 30, 32, 32, vocab_size=129_280, moe_intermediate_size=1536)
        | {"n_routed_experts": 72, "q_lora_rank": None, "topk_method": "noaux_tc", "scoring_func": "sigmoid"}
        | {"norm_topk_prob": True, "routed_scaling_factor": 2.0, "n_group": 1, "topk_group": 1}
    ),
    "internvl.internvl2_5_1b": _internvl(_text("qwen2", 896, 4864, 24, 14, 2, **_QWEN25)),
    "internvl.internvl2_5_2b": _internvl(_text("internlm2", 2048, 8192, 24, 16, 8, **_INTERNLM)),
    "internvl.internvl2_5_4b": _internvl(_text("qwen2", 2048, 11_008, 36, 16, 2, **_QWEN25)),
    "internvl.internvl2_5_8b": _internvl(_text("internlm2", 4096, 14_336, 32, 32, 8, **_INTERNLM)),
    "internvl.internvl3_1b": _internvl(_text("qwen2", 896, 4864, 24, 14, 2, **_QWEN25)),
    "internvl.internvl3_2b": _internvl(_text("qwen2", 1536, 8960, 28, 12, 2, **_QWEN25)),
    "internvl.internvl3_8b": _internvl(_text("qwen2", 3584, 18_944, 28, 28, 4, **_QWEN25)),
    "internvl.internvl3_14b": _internvl(_text("qwen2", 5120, 13_824, 48, 40, 8, **_QWEN25)),
    "ovis.ovis2_1b": _ovis2(
        _text("qwen2", 896, 4864, 24, 14, 2, vocab_size=151_936, tie_word_embeddings=True, **_QWEN_TEXT), _AIMV2_LARGE
    ),
    "ovis.ovis2_2b": _ovis2(
        _text("qwen2", 1536, 8960, 28, 12, 2, vocab_size=151_936, tie_word_embeddings=True, **_QWEN_TEXT), _AIMV2_LARGE
    ),
    "ovis.ovis2_4b": _ovis2(
        _text("qwen2", 2048, 11_008, 36, 16, 2, vocab_size=151_936, tie_word_embeddings=True, **_QWEN_TEXT), _AIMV2_HUGE
    ),
    "ovis.ovis2_8b": _ovis2(_text("qwen2", 3584, 18_944, 28, 28, 4, vocab_size=152_064, **_QWEN_TEXT), _AIMV2_HUGE),
    "ovis.ovis2_16b": _ovis2(_text("qwen2", 5120, 13_824, 48, 40, 8, vocab_size=152_064, **_QWEN_TEXT), _AIMV2_HUGE),
    "ovis.ovis2_5_2b": _ovis2_5(_text("qwen3", 2048, 6144, 28, 16, 8, tie_word_embeddings=True, **_QWEN3)),
    "ovis.ovis2_5_9b": _ovis2_5(_text("qwen3", 4096, 12_288, 36, 32, 8, **_QWEN3)),
}
