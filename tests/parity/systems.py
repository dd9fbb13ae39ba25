"""Tiny random systems of transformers, saved with their processors, and ours from the same folder."""

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

import vlm_jax

from .language import EXPERTS
from .processors import (
    INDICATORS,
    VISION,
    deepseek_ocr2_processor,
    deepseek_vl_hybrid_processor,
    deepseek_vl_processor,
    gemma3_processor,
    gemma4_processor,
    idefics3_processor,
    internvl_processor,
    llava_next_processor,
    llava_onevision_processor,
    llava_processor,
    minicpm_v_processor,
    ovis2_processor,
    paligemma_processor,
    qwen,
    qwen2_5_omni_processor,
    save,
    smolvlm_processor,
)

SAM = {
    "hidden_size": 16,
    "output_channels": 8,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 20,
    "patch_size": 4,
    "window_size": 2,
    "global_attn_indexes": [1, 3],
}


OVIS = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "vocab_size": 21,
    "hidden_stride": 2,
    "num_visual_indicator_tokens": 5,
}


TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": None,
    "bos_token_id": None,
}


def randomised(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=float("norm" in name and name.endswith("weight")), std=0.3)
    model.generation_config.eos_token_id = None
    return model.eval()


SIGLIP = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 4,
}


CLIP = {**SIGLIP, "model_type": "clip_vision_model", **VISION}


def llava(folder):
    processor = llava_processor()
    config = transformers.LlavaConfig(
        vision_config=CLIP,
        text_config={"model_type": "llama", "vocab_size": len(processor.tokenizer), **TEXT},
        image_token_id=processor.image_token_id,
    )
    return saved(folder, processor, transformers.LlavaForConditionalGeneration(config))


def llava_next(folder):
    processor = llava_next_processor()
    config = transformers.LlavaNextConfig(
        vision_config=CLIP,
        text_config={"model_type": "mistral", "vocab_size": len(processor.tokenizer), **TEXT},
        image_token_id=processor.image_token_id,
        image_grid_pinpoints=processor.image_processor.image_grid_pinpoints,
    )
    return saved(folder, processor, transformers.LlavaNextForConditionalGeneration(config))


def llava_onevision(folder):
    processor = llava_onevision_processor()
    vocabulary = processor.tokenizer
    config = transformers.LlavaOnevisionConfig(
        vision_config={**SIGLIP, "model_type": "siglip_vision_model", "image_size": 20},
        text_config={"model_type": "qwen2", "vocab_size": len(vocabulary), **TEXT},
        image_token_id=vocabulary.convert_tokens_to_ids("<image>"),
        video_token_id=vocabulary.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=processor.image_processor.image_grid_pinpoints,
        vision_aspect_ratio=processor.vision_aspect_ratio,
    )
    return saved(folder, processor, transformers.LlavaOnevisionForConditionalGeneration(config))


def deepseek_vl(folder, tower=SIGLIP, **sections):
    hybrid = bool(sections)
    processor = deepseek_vl_hybrid_processor(12, 20) if hybrid else deepseek_vl_processor(12)
    text = {"model_type": "llama", "vocab_size": len(processor.tokenizer), **TEXT}
    name = "DeepseekVLHybrid" if hybrid else "DeepseekVL"
    model = getattr(transformers, f"{name}ForConditionalGeneration")
    config = model.config_class(
        vision_config=tower, text_config=text, image_token_id=processor.image_token_id, **sections
    )
    return saved(folder, processor, model(config))


def deepseek_vl_hybrid(folder):
    return deepseek_vl(folder, high_res_vision_config=SAM)


def calmed(model):
    """With smaller weights of the vision tower, whose attention over thousands of patches else multiplies rounding."""
    with torch.no_grad():
        for parameter in model.model.vision_tower.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.3)
    return model


def deepseek_ocr2(folder):
    """Its tables of positions have another grid than the images."""
    processor = deepseek_ocr2_processor()
    tower = {
        "sam_config": {**SAM, "num_hidden_layers": 2, "image_size": 64, "patch_size": 1, "window_size": 4}
        | {"global_attn_indexes": [1], "downsample_channels": [12, 16]},
        "encoder_config": {**TEXT, "hidden_size": 16, "vocab_size": 1},
    }
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    config = transformers.DeepseekOcr2Config(
        vision_config=tower,
        text_config={
            "vocab_size": len(processor.tokenizer),
            **TEXT,
            **experts,
            "num_hidden_layers": 3,
            "routed_scaling_factor": 1.5,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
        image_token_id=processor.image_token_id,
    )
    return written(folder, processor, calmed(randomised(transformers.DeepseekOcr2ForConditionalGeneration(config))))


def ovis2(folder):
    processor = ovis2_processor()
    vocabulary = processor.tokenizer
    config = transformers.Ovis2Config(
        vision_config={**OVIS, "image_size": 28, "patch_size": 7},
        text_config={"model_type": "qwen2", "vocab_size": len(vocabulary), **TEXT},
        hidden_size=TEXT["hidden_size"],
        vocab_size=len(vocabulary),
        image_token_id=vocabulary.convert_tokens_to_ids("<IMG_ATOM>"),
        visual_indicator_token_ids=vocabulary.convert_tokens_to_ids(INDICATORS),
    )
    return saved(folder, processor, transformers.Ovis2ForConditionalGeneration(config))


def internvl(folder, **text):
    processor = internvl_processor()
    config = transformers.InternVLConfig(
        vision_config={**SIGLIP, "image_size": [28, 28], "patch_size": [7, 7]},
        text_config={"model_type": "qwen2", "vocab_size": len(processor.tokenizer), **TEXT, **text},
        image_token_id=processor.image_token_id,
    )
    return saved(folder, processor, transformers.InternVLForConditionalGeneration(config))


def internvl_moe(folder):
    """InternVL 3.5 with experts, as its released files for transformers."""
    return internvl(folder, model_type="qwen3_moe", num_hidden_layers=3, head_dim=8, norm_topk_prob=True, **EXPERTS)


GEMMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "query_pre_attn_scalar": 10,
    "sliding_window": 7,  # less than a turn
    "layer_types": [*["sliding_attention"] * 2, "full_attention"] * 2,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    },
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
GEMMA["layer_types"] = GEMMA["layer_types"][: GEMMA["num_hidden_layers"]]


def gemma3(folder):
    """Nine tokens of an image of 6x6 patches, more than the window of local layers."""
    processor = gemma3_processor(tokens=9)
    vocabulary = processor.tokenizer
    ids = {
        f"{name}_token_index": vocabulary.convert_tokens_to_ids(token)
        for name, token in (
            ("image", vocabulary.image_token),
            ("boi", vocabulary.boi_token),
            ("eoi", vocabulary.eoi_token),
        )
    }
    config = transformers.Gemma3Config(
        vision_config={**SIGLIP, "image_size": 24, "vision_use_head": False},
        text_config={"vocab_size": len(vocabulary), **GEMMA},
        mm_tokens_per_image=9,
        **ids,
    )
    return saved(folder, processor, transformers.Gemma3ForConditionalGeneration(config))


def unsaturated(model, named="norm"):
    """With the language model's norms of this name around a factor of 1; they multiply by 1 + weight.

    With factors around 2 logits of attention are about 12, and each step of training multiplies rounding by four: five
    steps of the reference then end 5e-4 apart where its weights differ by their rounding alone, and else 1e-6. With
    experts, whose choice near ties is rounding too, the norms before attention and feed-forward are enough (4e-5).
    """
    with torch.no_grad():
        for name, parameter in model.model.language_model.named_parameters():
            if named in name:
                parameter.sub_(1)
    return model


def paligemma(folder, **text):
    """Sixteen tokens of an image, and Gemma."""
    processor = paligemma_processor()
    text = {"model_type": "gemma", "head_dim": 12, "pad_token_id": None, **text}
    config = transformers.PaliGemmaConfig(
        vision_config={**SIGLIP, "image_size": 24, "patch_size": 6, "vision_use_head": False},
        text_config={**TEXT, **text, "vocab_size": len(processor.tokenizer)},
        projection_dim=TEXT["hidden_size"],
        hidden_size=TEXT["hidden_size"],
        image_token_index=processor.image_token_id,
    )
    return written(folder, processor, unsaturated(randomised(transformers.PaliGemmaForConditionalGeneration(config))))


def paligemma2(folder):
    """The same with Gemma 2: the window of local layers is less than an image, and caps that bend most logits."""
    caps = {"attn_logit_softcapping": 0.3, "final_logit_softcapping": 8.0}
    own = {"num_hidden_layers": 3, "query_pre_attn_scalar": 10, "sliding_window": 7, **caps}
    return paligemma(folder, model_type="gemma2", **own)


GEMMA4 = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "sliding_window": 7,  # less than a turn
    "layer_types": [*["sliding_attention"] * 2, "full_attention"] * 2,
    "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 5000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    },
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 3.0,
    "tie_word_embeddings": False,
    "use_bidirectional_attention": "vision",
    "eos_token_id": None,
    "bos_token_id": None,
}
GEMMA4["layer_types"] = [*GEMMA4["layer_types"][:4], "full_attention"]
GEMMA4_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "patch_size": 2,
    "position_embedding_size": 128,
    "standardize": True,
}


GEMMA4_AUDIO = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "subsampling_conv_channels": [4, 2],
    "output_proj_dims": 8,
}


def gemma4(folder, text=GEMMA4, vision=GEMMA4_TOWER, audio=None):
    """Values that are stored and not learned are random, too."""
    processor = gemma4_processor()
    vocabulary = processor.tokenizer
    ids = {f"{name}_token_id": vocabulary.convert_tokens_to_ids(f"<|{name}|>") for name in ("image", "video", "audio")}
    config = transformers.Gemma4Config(
        vision_config=vision,
        text_config={"vocab_size": len(vocabulary), "pad_token_id": vocabulary.pad_token_id, **text},
        audio_config=audio,
        tie_word_embeddings=False,  # a tied random head says what it was last told
        **ids,
    )
    model = randomised(transformers.Gemma4ForConditionalGeneration(config))
    for name, stored in model.named_buffers():
        if name.endswith(("layer_scalar", "std_scale")):
            stored.uniform_(0.7, 1.3)
        elif name.endswith("std_bias"):
            stored.normal_(std=0.3)
        elif name.endswith("_min"):
            stored.uniform_(-1.5, -0.3)
        elif name.endswith("_max"):
            stored.uniform_(0.3, 1.5)
    with torch.no_grad():
        model.lm_head.weight[256:] = 0  # their model reads a placeholder in an answer as padding
    save(processor, folder)
    model.save_pretrained(folder)
    return processor, model, vlm_jax.from_pretrained(folder)


def gemma4_moe(folder):
    """Experts beside the feed-forwards, as in 26B-A4B."""
    experts = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 12}
    return gemma4(folder, {**GEMMA4, **experts})


def gemma4_shared(folder):
    """Inputs of every block, shared keys, wide feed-forwards, bounds in the tower, and audio, as in E2B and E4B."""
    text = {
        **GEMMA4,
        "num_hidden_layers": 5,
        "layer_types": ["sliding_attention", "full_attention", *["sliding_attention"] * 2, "full_attention"],
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "num_global_key_value_heads": None,
        "attention_k_eq_v": False,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 512,
        "use_bidirectional_attention": None,
    }
    return gemma4(folder, text, {**GEMMA4_TOWER, "standardize": False, "use_clipped_linears": True}, GEMMA4_AUDIO)


def idefics3(folder, processor=None, name="Idefics3", side=35):
    """Its table of positions has another grid than a tile where the sides differ."""
    processor = processor or idefics3_processor()
    model = getattr(transformers, f"{name}ForConditionalGeneration")
    config = model.config_class(
        vision_config={**SIGLIP, "image_size": side, "patch_size": 7},
        text_config={"model_type": "llama", "vocab_size": len(processor.tokenizer), **TEXT},
        image_token_id=processor.image_token_id,
        scale_factor=2,
    )
    return saved(folder, processor, model(config))


def smolvlm(folder):
    return idefics3(folder, smolvlm_processor(), "SmolVLM", 28)


def qwen_vl(folder, kind, config, model, vision, prepared=lambda model: model, **more):
    processor, _, _ = qwen(kind, folder)
    ids = {
        name: processor.tokenizer.convert_tokens_to_ids(token)
        for name, token in {
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>",
            "vision_end_token_id": "<|vision_end|>",
        }.items()
    }
    text = {
        "vocab_size": len(processor.tokenizer),
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1000.0},
        **TEXT,
        **more,
    }
    vision = {"depth": 2, "num_heads": 2, "patch_size": 4, **vision}
    model = randomised(model(config(text_config=text, vision_config=vision, **ids)))
    return written(folder, processor, prepared(model))


def qwen2_vl(folder):
    vision = {"embed_dim": 16, "mlp_ratio": 2, "hidden_size": 32}
    classes = transformers.Qwen2VLConfig, transformers.Qwen2VLForConditionalGeneration
    return qwen_vl(folder, "qwen2_vl", *classes, vision)


def qwen2_5_vl(folder):
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "out_hidden_size": 32,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    classes = transformers.Qwen2_5_VLConfig, transformers.Qwen2_5_VLForConditionalGeneration
    return qwen_vl(folder, "qwen2_5_vl", *classes, vision)


QWEN3_5 = {
    "rms_norm_eps": 1e-2,  # what a head of Gated DeltaNet reads here is small, and its norm sharp
    "head_dim": 16,
    "num_hidden_layers": 3,
    "full_attention_interval": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "rope_parameters": {
        "rope_type": "default",
        "mrope_section": [1, 1, 2],
        "rope_theta": 1000.0,
        "partial_rotary_factor": 0.5,
    },
}


def qwen2_5_omni_config(vocabulary):
    """The sections of a thinker."""
    return {
        "text_config": {
            "vocab_size": len(vocabulary),
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1000.0},
            **TEXT,
        },
        "vision_config": {
            "depth": 2,
            "num_heads": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": 32,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        "audio_config": {
            "num_mel_bins": 8,
            "d_model": 16,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 16,
            "output_dim": 32,
        },
        "vision_start_token_id": vocabulary.convert_tokens_to_ids("<|vision_bos|>"),
        **{
            f"{kind}_token_index": vocabulary.convert_tokens_to_ids(f"<|{kind.upper()}|>")
            for kind in ("image", "video", "audio")
        },
    }


def qwen2_5_omni_thinker(folder):
    processor = qwen2_5_omni_processor()
    config = transformers.Qwen2_5OmniThinkerConfig(**qwen2_5_omni_config(processor.tokenizer))
    return saved(folder, processor, transformers.Qwen2_5OmniThinkerForConditionalGeneration(config))


def qwen2_5_omni(folder):
    """The thinker of a whole release, beside tensors of the parts that are not read."""
    processor = qwen2_5_omni_processor()
    config = transformers.Qwen2_5OmniConfig(
        thinker_config=qwen2_5_omni_config(processor.tokenizer), enable_audio_output=False
    )
    model = randomised(transformers.Qwen2_5OmniForConditionalGeneration(config))
    model.thinker.generation_config.eos_token_id = None
    save(processor, folder)
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    beside = {"talker.model.embed_tokens.weight": np.ones((5, 4), np.float32), "token2wav.a": np.ones(3, np.float32)}
    save_file(load_file(path) | beside, path, {"format": "pt"})
    return processor, model.thinker, vlm_jax.from_pretrained(folder)


QWEN3_TOWER = {
    "depth": 3,
    "hidden_size": 16,
    "intermediate_size": 24,
    "out_hidden_size": 32,
    "num_position_embeddings": 25,
    "deepstack_visual_indexes": [0, 2],
}


def qwen3_vl(folder):
    classes = transformers.Qwen3VLConfig, transformers.Qwen3VLForConditionalGeneration
    return qwen_vl(folder, "qwen3_vl", *classes, QWEN3_TOWER, head_dim=8, num_hidden_layers=3)


def qwen3_5(folder):
    classes = transformers.Qwen3_5Config, transformers.Qwen3_5ForConditionalGeneration
    tower = {name: value for name, value in QWEN3_TOWER.items() if name != "deepstack_visual_indexes"}
    return qwen_vl(folder, "qwen3_vl", *classes, tower, **QWEN3_5)


def qwen3_5_moe(folder):
    classes = transformers.Qwen3_5MoeConfig, transformers.Qwen3_5MoeForConditionalGeneration
    tower = {name: value for name, value in QWEN3_TOWER.items() if name != "deepstack_visual_indexes"}
    own = {**QWEN3_5, **EXPERTS, "shared_expert_intermediate_size": 16}
    return qwen_vl(folder, "qwen3_vl", *classes, tower, lambda model: unsaturated(model, "layernorm"), **own)


MINICPM_TOWER = {
    "hidden_size": 8,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 14,
    "patch_size": 2,
}


def minicpm_v(folder, mode="16x", layer=1):
    processor = minicpm_v_processor(mode)
    vocabulary = processor.tokenizer
    config = transformers.MiniCPMV4_6Config(
        vision_config=MINICPM_TOWER,
        text_config={"model_type": "qwen3_5_text", "vocab_size": len(vocabulary), **TEXT, **QWEN3_5},
        insert_layer_id=layer,
        downsample_mode=mode,
        **{f"{kind}_token_id": vocabulary.convert_tokens_to_ids(f"<|{kind}_pad|>") for kind in ("image", "video")},
    )
    return saved(folder, processor, transformers.MiniCPMV4_6ForConditionalGeneration(config))


def minicpm_v_4x(folder):
    """Four times as many tokens: the tower does not merge."""
    return minicpm_v(folder, "4x")


def qwen3_vl_moe(folder):
    classes = transformers.Qwen3VLMoeConfig, transformers.Qwen3VLMoeForConditionalGeneration
    return qwen_vl(folder, "qwen3_vl", *classes, QWEN3_TOWER, head_dim=8, num_hidden_layers=3, **EXPERTS)


def saved(folder, processor, model):
    return written(folder, processor, randomised(model))


def written(folder, processor, model):
    save(processor, folder)
    model.save_pretrained(folder)
    return processor, model, vlm_jax.from_pretrained(folder)
