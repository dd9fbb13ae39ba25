"""Small folders of released systems, with random weights, for `vlm_jax.from_pretrained`."""

import copy
import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import linen as nn
from tokenizers import decoders, models, pre_tokenizers

from tests.golden.conftest import DATA
from tests.processors.vocabularies import tiktoken_ranks
from vlm_jax.checkpoints.hub import open_checkpoint
from vlm_jax.checkpoints.params import export_params
from vlm_jax.checkpoints.saving import save_checkpoint
from vlm_jax.pretrained import FAMILIES, Pretrained, from_pretrained
from vlm_jax.pretrained.family import marker

VOCABULARY = 320
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
SIGLIP = {name: value for name, value in CLIP.items() if name != "model_type"}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
}
LLAMA, QWEN2 = {**TEXT, "model_type": "llama"}, {**TEXT, "model_type": "qwen2"}
SAM = {
    "hidden_size": 16,
    "output_channels": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 4,
    "window_size": 2,
    "global_attn_indexes": [1],
}
QWEN_TOWER = {"num_heads": 4, "patch_size": 4, "hidden_size": 32}
QWEN_TEXT = {**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
QWEN_FILES = {
    "preprocessor_config.json": {
        "patch_size": 4,
        "merge_size": 2,
        "size": {"shortest_edge": 256, "longest_edge": 1024},
    }
}
QWEN_TAGS = ("<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>")
OCR_EXPERTS = {"n_routed_experts": 4, "n_shared_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
TIMM = {"width": 16, "depth": 3, "num_heads": 2, "mlp_dim": 24, "patch_size": 4}
HEAD = {"tie_word_embeddings": False}
CROP = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}


def template(image: str) -> str:
    """A chat template in the manner of releases, which says what the model is trained to say."""
    return (
        "{% for m in messages %}{{ m['role'] | upper }}:{% if m['role'] == 'assistant' %}{% generation %}"
        "{% for c in m['content'] %} {{ c['text'] }}{% endfor %}</s>{% endgeneration %}{% else %}"
        "{% for c in m['content'] %}{% if c['type'] == 'image' %}" + image + "\n"
        "{% elif c['type'] == 'video' %}" + image.replace("image", "video") + "\n{% else %}{{ c['text'] }}{% endif %}"
        "{% endfor %}{% endif %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )


@dataclasses.dataclass(frozen=True)
class Folder:
    """Contents of a small folder of a release.

    Attributes:
      config: its settings; where `golden` is given, what changes in those of that folder.
      golden: a folder of tests/golden/data, for its config and the names of its tensors.
      whole: the golden folder as it is, weights and files; `files` are added.
      names: of some tensors, with their shapes, from which the family determines the prefix of the others.
      added: tokens of the tokenizer in addition to bytes.
      image: what the chat template writes for an image; None where the release has a template in its code.
      files: of the processor.
      options: of `Processor.example`, to keep images small.
    """

    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    golden: str | None = None
    whole: bool = False
    names: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    added: tuple[str, ...] = ()
    image: str | None = None
    files: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_LANGUAGE = {"language_model.model.embed_tokens.weight": (1, 1), "language_model.lm_head.weight": (1, 1)}
_LLAVA = {
    "vision_tower.vision_model.embeddings.class_embedding": (16,),
    "multi_modal_projector.linear_2.weight": (32, 32),
    **_LANGUAGE,
}
_QWEN = {"visual.patch_embed.proj.weight": (1,), "model.embed_tokens.weight": (1, 1), "lm_head.weight": (1, 1)}
_DEEPSEEK = {
    "model.vision_model.embeddings.patch_embedding.weight": (1,),
    "model.language_model.embed_tokens.weight": (1, 1),
    "lm_head.weight": (1, 1),
}
_IDEFICS3 = {
    "model.vision_model.embeddings.patch_embedding.weight": (1,),
    "model.connector.modality_projection.proj.weight": (1,),
    "model.text_model.embed_tokens.weight": (1, 1),
    "lm_head.weight": (1, 1),
}
_GEMMA3 = {
    "model.vision_tower.embeddings.patch_embedding.weight": (1,),
    "model.multi_modal_projector.mm_input_projection_weight": (1, 1),
    "model.language_model.embed_tokens.weight": (1, 1),
}
_PALIGEMMA = {
    "model.vision_tower.embeddings.patch_embedding.weight": (1,),
    "model.multi_modal_projector.linear.weight": (1, 1),
    "model.language_model.embed_tokens.weight": (1, 1),
}
_BIG_VISION = {  # tensors that tell the sizes
    "img/embedding/kernel": (4, 4, 3, 16),
    "img/pos_embedding": (1, 16, 16),
    "img/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel": (3, 16, 24),
    "img/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel": (3, 16, 2, 8),
    "llm/embedder/input_embedding": (VOCABULARY, 32),
    "llm/layers/mlp/linear": (3, 24, 32),
    "llm/layers/attn/q_einsum/w": (3, 4, 32, 8),
    "llm/layers/attn/kv_einsum/w": (3, 2, 2, 32, 8),
    "llm/layers/post_attention_norm/scale": (3, 32),
}
_GEMMA4 = {
    "model.vision_tower.patch_embedder.position_embedding_table": (2, 1, 1),
    "model.embed_vision.embedding_projection.weight": (1, 1),
    "model.language_model.embed_tokens.weight": (1, 1),
}
_MINICPM = {
    "model.vision_tower.embeddings.patch_embedding.weight": (1,),
    "model.merger.mlp.0.pre_norm.weight": (1,),
    "model.language_model.embed_tokens.weight": (1, 1),
    "lm_head.weight": (1, 1),
}
_OCR2 = {
    "model.qwen2_model.query_768.weight": (4, 1),
    "model.qwen2_model.query_1024.weight": (9, 1),
    "model.embed_tokens.weight": (1, 1),
    "lm_head.weight": (1, 1),
}
_SPLIT_TAGS = ("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<row_1_col_1>", "<row_1_col_2>")
_SPLIT_FILES = {
    "preprocessor_config.json": {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}},
    "processor_config.json": {"image_seq_len": 4},
}
FOLDERS = {
    "llava": Folder(
        {"model_type": "llava", "vision_config": CLIP, "text_config": LLAMA, "image_token_index": 259, **HEAD},
        names=_LLAVA,
        added=("<image>",),
        image="<image>",
        files={"preprocessor_config.json": CROP},
    ),
    "llava_llama": Folder({"vocab_size": VOCABULARY}, golden="llava15"),
    "llava_next": Folder(
        {
            "model_type": "llava_next",
            "vision_config": CLIP,
            "text_config": LLAMA,
            "image_token_index": 259,
            "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]],
            **HEAD,
        },
        names={**_LLAVA, "image_newline": (32,)},
        added=("<image>",),
        image="<image>",
        files={
            "preprocessor_config.json": {**CROP, "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]]},
        },
    ),
    "llava_onevision": Folder(
        {
            "model_type": "llava_onevision",
            "vision_config": {**SIGLIP, "model_type": "siglip_vision_model"},
            "text_config": QWEN2,
            **HEAD,
        },
        names={
            "vision_tower.vision_model.embeddings.patch_embedding.weight": (1,),
            "multi_modal_projector.linear_2.weight": (32, 32),
            "image_newline": (32,),
            **_LANGUAGE,
        },
        added=("<image>", "<video>"),
        image="<image>",
        files={
            "preprocessor_config.json": {
                "size": {"height": 16, "width": 16},
                "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]],
            },
        },
    ),
    "mobilevlm": Folder({"vocab_size": VOCABULARY}, golden="mobilevlm_v2"),
    "qwen2_vl": Folder(
        {
            "model_type": "qwen2_vl",
            "vision_config": {**QWEN_TOWER, "depth": 2, "embed_dim": 32, "mlp_ratio": 2},
            **QWEN_TEXT,
            **HEAD,
        },
        names=_QWEN,
        added=QWEN_TAGS,
        image="<|vision_start|><|image_pad|><|vision_end|>",
        files=QWEN_FILES,
    ),
    "qwen2_5_vl": Folder(
        {
            "model_type": "qwen2_5_vl",
            "vision_config": {
                **QWEN_TOWER,
                "depth": 3,
                "intermediate_size": 40,
                "out_hidden_size": 32,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
            **QWEN_TEXT,
            **HEAD,
        },
        names=_QWEN,
        added=QWEN_TAGS,
        image="<|vision_start|><|image_pad|><|vision_end|>",
        files=QWEN_FILES,
    ),
    "qwen2_5_omni": Folder(
        {
            "model_type": "qwen2_5_omni",
            "thinker_config": {
                "model_type": "qwen2_5_omni_thinker",
                "vision_config": {
                    **QWEN_TOWER,
                    "depth": 3,
                    "intermediate_size": 40,
                    "out_hidden_size": 32,
                    "window_size": 16,
                    "fullatt_block_indexes": [1],
                },
                "text_config": {**QWEN_TEXT, "model_type": "qwen2_5_omni_text"},
                **HEAD,
            },
        },
        names={f"thinker.{key}": shape for key, shape in _QWEN.items()},
        added=("<|vision_bos|>", "<|IMAGE|>", "<|VIDEO|>", "<|vision_eos|>"),
        image="<|vision_bos|><|IMAGE|><|vision_eos|>",
        files=QWEN_FILES,
    ),
    "qwen3_vl": Folder(
        {
            "model_type": "qwen3_vl",
            "vision_config": {
                **QWEN_TOWER,
                "depth": 3,
                "hidden_size": 16,
                "intermediate_size": 24,
                "out_hidden_size": 32,
                "num_position_embeddings": 25,
                "deepstack_visual_indexes": [0, 2],
            },
            "text_config": {**QWEN_TEXT, "model_type": "qwen3_vl_text", "head_dim": 8},
            **HEAD,
        },
        names={
            "model.visual.patch_embed.proj.weight": (1,),
            "model.language_model.embed_tokens.weight": (1, 1),
            "lm_head.weight": (1, 1),
        },
        added=QWEN_TAGS,
        image="<|vision_start|><|image_pad|><|vision_end|>",
        files=QWEN_FILES,
    ),
    "qwen3_5": Folder(
        {
            "model_type": "qwen3_5",
            "vision_config": {
                **QWEN_TOWER,
                "depth": 3,
                "hidden_size": 16,
                "intermediate_size": 24,
                "out_hidden_size": 32,
                "num_position_embeddings": 25,
            },
            "text_config": {
                **QWEN_TEXT,
                "model_type": "qwen3_5_text",
                "head_dim": 16,
                "layer_types": ["full_attention", "full_attention", "linear_attention"],
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 8,
                "partial_rotary_factor": 0.5,
            },
            **HEAD,
        },
        names={
            "model.visual.patch_embed.proj.weight": (1,),
            "model.language_model.embed_tokens.weight": (1, 1),
            "lm_head.weight": (1, 1),
        },
        added=QWEN_TAGS,
        image="<|vision_start|><|image_pad|><|vision_end|>",
        files=QWEN_FILES,
    ),
    "minicpmv4_6": Folder(
        {
            "model_type": "minicpmv4_6",
            "vision_config": {**SIGLIP, "patch_size": 2},
            "insert_layer_id": 1,
            "text_config": {
                **TEXT,
                "model_type": "qwen3_5_text",
                "head_dim": 16,
                "rms_norm_eps": 1e-2,  # what a head of Gated DeltaNet reads here is small, and its norm sharp
                "layer_types": ["full_attention", "full_attention", "linear_attention"],
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 8,
                "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5},
            },
            **HEAD,
        },
        names=_MINICPM,
        added=(
            "<|image_pad|>",
            "<|video_pad|>",
            "<image>",
            "</image>",
            "<slice>",
            "</slice>",
            "<image_id>",
            "</image_id>",
        ),
        image="<|image_pad|>",
        files={"preprocessor_config.json": {"patch_size": 2, "scale_resolution": 24, "max_slice_nums": 2}},
    ),
    "qwen3_5_moe": Folder(
        {
            "model_type": "qwen3_5_moe",
            "vision_config": {
                **QWEN_TOWER,
                "depth": 3,
                "hidden_size": 16,
                "intermediate_size": 24,
                "out_hidden_size": 32,
                "num_position_embeddings": 25,
            },
            "text_config": {
                **QWEN_TEXT,
                "model_type": "qwen3_5_moe_text",
                "rms_norm_eps": 1e-2,  # what a head of Gated DeltaNet reads here is small, and its norm sharp
                "head_dim": 16,
                "layer_types": ["full_attention", "full_attention", "linear_attention"],
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 8,
                "partial_rotary_factor": 0.5,
                "moe_intermediate_size": 12,
                "shared_expert_intermediate_size": 20,
                "num_experts": 4,
                "num_experts_per_tok": 2,
            },
            **HEAD,
        },
        names={
            "model.visual.patch_embed.proj.weight": (1,),
            "model.language_model.embed_tokens.weight": (1, 1),
            "lm_head.weight": (1, 1),
        },
        added=QWEN_TAGS,
        image="<|vision_start|><|image_pad|><|vision_end|>",
        files=QWEN_FILES,
    ),
    "llavaonevision1_5": Folder(
        {
            "model_type": "llavaonevision1_5",
            "vision_config": {**QWEN_TOWER, "depth": 2, "intermediate_size": 40, "text_hidden_size": 32},
            "text_config": {**TEXT, "model_type": "LLaVAOneVision1_5_text", "head_dim": 8},
        },
        names=_QWEN,
        added=QWEN_TAGS,
        image="<|vision_start|><|image_pad|><|vision_end|>",
        files=QWEN_FILES,
    ),
    "gemma3": Folder(
        {
            "model_type": "gemma3",
            "vision_config": {**SIGLIP, "image_size": 32, "vision_use_head": False},
            "text_config": {
                **TEXT,
                "model_type": "gemma3_text",
                "head_dim": 8,
                "sliding_window": 6,
                "sliding_window_pattern": 2,
            },
            "mm_tokens_per_image": 16,
        },
        names=_GEMMA3,
        added=("<start_of_image>", "<image_soft_token>", "<end_of_image>"),
        image="<start_of_image>",
        files={
            "preprocessor_config.json": {
                "size": {"height": 32, "width": 32},
                "do_pan_and_scan": True,
                "pan_and_scan_min_crop_size": 8,
            },
            "processor_config.json": {"image_seq_length": 16},
        },
    ),
    "paligemma": Folder(
        {
            "model_type": "paligemma",
            "vision_config": {**SIGLIP, "vision_use_head": False},
            "text_config": {
                **TEXT,
                "model_type": "gemma2",
                "head_dim": 8,
                "query_pre_attn_scalar": 10,
                "sliding_window": 6,
                "attn_logit_softcapping": 2.0,
                "final_logit_softcapping": 8.0,
            },
            "projection_dim": 32,
        },
        names=_PALIGEMMA,
        added=("<image>",),
        files={"preprocessor_config.json": {"size": {"height": 16, "width": 16}, "image_seq_length": 16}},
    ),
    "paligemma_big_vision": Folder(
        {"model_name": "proj.paligemma.paligemma"},
        names={f"params/{name}": shape for name, shape in _BIG_VISION.items()},
    ),
    "gemma4": Folder(
        {
            "model_type": "gemma4",
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "patch_size": 2,
                "position_embedding_size": 64,
                "standardize": True,
                "use_clipped_linears": True,
            },
            "text_config": {
                **TEXT,
                "model_type": "gemma4_text",
                "head_dim": 8,
                "global_head_dim": 12,
                "num_global_key_value_heads": 1,
                "attention_k_eq_v": True,
                "sliding_window": 6,
                "layer_types": ["sliding_attention", "full_attention", "full_attention"],
                "num_kv_shared_layers": 1,
                "hidden_size_per_layer_input": 8,
                "vocab_size_per_layer_input": VOCABULARY + 4,
                "final_logit_softcapping": 20.0,
                "use_bidirectional_attention": "vision",
            },
        },
        names=_GEMMA4,
        added=("<|image>", "<|image|>", "<image|>", "<|video|>"),
        image="<|image|>",
        files={"preprocessor_config.json": {"patch_size": 2, "max_soft_tokens": 70}},
        options={"max_visual_tokens": 12},
    ),
    "idefics3": Folder(
        {
            "model_type": "idefics3",
            "vision_config": {**SIGLIP, "image_size": 20},
            "text_config": LLAMA,
            "scale_factor": 2,
            **HEAD,
        },
        names=_IDEFICS3,
        added=_SPLIT_TAGS,
        image="<image>",
        files=_SPLIT_FILES,
    ),
    "smolvlm": Folder(
        {"model_type": "smolvlm", "vision_config": SIGLIP, "text_config": LLAMA, "scale_factor": 1, **HEAD},
        names=_IDEFICS3,
        added=(*_SPLIT_TAGS, "<global-img>", "<video>"),
        image="<image>",
        files={**_SPLIT_FILES, "processor_config.json": {"image_seq_len": 16}},
    ),
    "internvl_chat": Folder(
        {"llm_config.vocab_size": VOCABULARY, "max_dynamic_patch": 3},
        golden="internvl2_qwen2",
        added=("<img>", "</img>", "<IMG_CONTEXT>", "<|im_start|>", "<|im_end|>"),
    ),
    "internvl": Folder(
        {
            "model_type": "internvl",
            "vision_config": {**SIGLIP, "image_size": [16, 16], "patch_size": [4, 4]},
            "text_config": QWEN2,
            "image_seq_length": 4,
            **HEAD,
        },
        names={"vision_tower.embeddings.cls_token": (16,), "multi_modal_projector.linear_2.weight": (32, 32)}
        | _LANGUAGE,
        added=("<img>", "</img>", "<IMG_CONTEXT>"),
        image="<IMG_CONTEXT>",
        files={
            "preprocessor_config.json": {"size": {"height": 16, "width": 16}, "max_patches": 3},
            "processor_config.json": {"image_seq_length": 4},
        },
    ),
    "deepseek_vl": Folder(
        {"model_type": "deepseek_vl", "vision_config": SIGLIP, "text_config": LLAMA, **HEAD},
        names={"model.aligner.linear1.weight": (1,), **_DEEPSEEK},
        added=("<image_placeholder>",),
        image="<image_placeholder>",
        files={
            "preprocessor_config.json": {"size": {"height": 16, "width": 16}, "min_size": 4},
            "processor_config.json": {"num_image_tokens": 16},
        },
    ),
    "deepseek_vl_hybrid": Folder(
        {
            "model_type": "deepseek_vl_hybrid",
            "vision_config": SIGLIP,
            "high_res_vision_config": SAM,
            "text_config": LLAMA,
            **HEAD,
        },
        names={
            "model.aligner.vision_proj.weight": (1,),
            "model.high_res_vision_model.vision_encoder.patch_embed.projection.weight": (1,),
            "model.high_res_vision_alpha": (1,),
            **_DEEPSEEK,
        },
        added=("<image_placeholder>",),
        image="<image_placeholder>",
        files={
            "preprocessor_config.json": {
                "size": {"height": 16, "width": 16},
                "high_res_size": {"height": 64, "width": 64},
                "min_size": 4,
                "image_mean": [0.5, 0.5, 0.5],
                "image_std": [0.5, 0.5, 0.5],
            },
            "processor_config.json": {"num_image_tokens": 16},
        },
    ),
    "deepseek_ocr": Folder(
        golden="deepseek_ocr", whole=True, files={"processor_config.json": {"crop_threshold": 16, "max_crops": 2}}
    ),
    "deepseek_ocr2": Folder(
        {
            "model_type": "deepseek_ocr2",
            "vision_config": {
                "sam_config": {**SAM, "patch_size": 2, "image_size": 24, "downsample_channels": [12, 16]},
                "encoder_config": {**TEXT, "hidden_size": 16},
            },
            "text_config": {**TEXT, **OCR_EXPERTS, "mlp_layer_types": ["dense", "sparse", "sparse"]},
            **HEAD,
        },
        names=_OCR2,
        added=("<image>",),
        image="<image>",
        files={
            "preprocessor_config.json": {"size": {"height": 24, "width": 24}, "tile_size": 16},
            "processor_config.json": {"patch_size": 2},
        },
    ),
    "DeepseekOCR2": Folder(
        {
            "architectures": ["DeepseekOCR2ForCausalLM"],
            "vision_config": {
                "image_size": 192,
                "width": {
                    "sam_vit_b": {"width": 16, "layers": 2, "heads": 2, "global_attn_indexes": [1]},
                    "qwen2-0-5b": {"dim": 64},
                },
            },
            "projector_config": {"input_dim": 64, "n_embed": 32},
            **{**TEXT, **OCR_EXPERTS, "num_key_value_heads": 4, "use_mla": False, "first_k_dense_replace": 1},
        },
        names={
            **_OCR2,
            "model.sam_model.neck.0.weight": (8, 16, 1, 1),
            "model.sam_model.net_2.weight": (12, 8, 3, 3),
            "model.qwen2_model.model.model.layers.0.input_layernorm.weight": (64,),
            "model.qwen2_model.model.model.layers.0.mlp.gate_proj.weight": (24, 64),
            "model.qwen2_model.model.model.layers.0.self_attn.k_proj.weight": (64, 64),
        },
        added=("<image>", "<｜▁pad▁｜>"),
        files={"processor_config.json": {"base_size": 192, "image_size": 128, "crop_threshold": 16, "max_crops": 2}},
    ),
    "deepseek_vl_v2": Folder(golden="deepseek_vl2_tiny", whole=True),
    "multi_modality": Folder(
        {"language_config.vocab_size": VOCABULARY},
        golden="deepseek_vl_siglip",
        added=("<image_placeholder>",),
        files={
            "processor_config.json": {"num_image_tokens": 144},
            "preprocessor_config.json": {"image_size": 96, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        },
    ),
    "ovis": Folder(golden="ovis2", whole=True),
    "ovis2": Folder(
        golden="ovis2_hf",
        whole=True,
        added=("<image>", "<IMG_ATOM>"),
        image="<image>",
        files={
            "preprocessor_config.json": {"size": {"height": 84, "width": 84}},
            "processor_config.json": {"image_seq_length": 9},
        },
    ),
    "ovis2_5": Folder(golden="ovis2_5", whole=True, options={"max_visual_tokens": 18}),
    "prismatic": Folder(
        {
            "model_type": "prismatic",
            "llm_backbone_id": "llama2-7b-pure",
            "use_fused_vision_backbone": True,
            "timm_model_ids": ["dinov2", "siglip"],
            "timm_override_act_layers": [None, None],
            "image_sizes": [16, 16],
            "text_config": LLAMA,
            "model_registry": {
                "dinov2": {**TIMM, "class_token": True, "num_registers": 2, "layer_scale": 1e-5},
                "siglip": TIMM,
            },
        },
        names={"language_model.model.embed_tokens.weight": (1, 1), "language_model.lm_head.weight": (1, 1)},
        files={
            "preprocessor_config.json": {
                "means": [[0.5] * 3, [0.4] * 3],
                "stds": [[0.5] * 3, [0.6] * 3],
                "image_resize_strategy": "resize-naive",
            },
        },
    ),
    "qwen": Folder({"vocab_size": 512, "visual.image_start_id": 478}, golden="qwen_vl_v1"),
}


def make(name: str, folder: Path) -> Pretrained:
    """Writes the folder of a system of `FOLDERS` and loads it."""
    case = FOLDERS[name]
    source = None if case.golden is None else DATA / case.golden
    if source is not None and case.whole:
        for file in source.iterdir():
            if file.name not in ("cases.npz", "cases.md", "golden.json"):
                shutil.copy(file, folder / file.name)
    for file, content in case.files.items():
        (folder / file).write_text(json.dumps(content))
    if case.image is not None:
        (folder / "chat_template.jinja").write_text(template(case.image))
    if name == "qwen":
        (folder / "qwen.tiktoken").write_bytes(tiktoken_ranks())
    elif not (folder / "tokenizer.json").exists():
        write_tokenizer(folder, case.added)
    if case.whole:
        return from_pretrained(folder)
    config: dict[str, Any] = dict(case.config)
    tensors: dict[str, Any] = {key: np.zeros(shape, np.float32) for key, shape in case.names.items()}
    if source is not None:
        config, tensors = _changed(source, case.config), dict(open_checkpoint(source))
    (folder / "config.json").write_text(json.dumps(config))
    families: Any = FAMILIES
    description = families[marker(config)](config, tensors, dtype=jnp.float32, param_dtype=jnp.float32)
    draw = np.random.default_rng(0)

    def drawn(path, leaf):
        scale = jax.tree_util.keystr(path).endswith("['scale']")
        return (draw.normal(size=leaf.shape) * 0.2 + scale).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(drawn, nn.meta.unbox(description.boxed_shapes()))
    save_checkpoint(folder, export_params(description.rules, params))
    return from_pretrained(folder)


def write_clip(folder: Path, config: dict[str, Any]) -> None:
    """Writes a CLIP with random weights, for reducers that choose by the question, with a tokenizer of bytes.

    Args:
      folder: that exists.
      config: with `vision_config`, `text_config` and `projection_dim`.
    """
    (folder / "config.json").write_text(json.dumps(config))
    families: Any = FAMILIES
    description = families["clip"](config, {}, dtype=jnp.float32, param_dtype=jnp.float32)
    rng = np.random.default_rng(7)
    shapes = nn.meta.unbox(description.boxed_shapes())
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    save_checkpoint(folder, export_params(description.rules, params))
    write_tokenizer(folder, ())
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ends = [("<s>", 256), ("</s>", 257)]
    backend.post_processor = tokenizers.processors.TemplateProcessing("<s> $A </s>", special_tokens=ends)
    backend.save(str(folder / "tokenizer.json"))


def clip_config(vision: Mapping[str, Any], length: int) -> dict[str, Any]:
    """The config of a small CLIP with this tower, and a text tower of so many positions."""
    text = {key: vision[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads")}
    text |= {"num_hidden_layers": 1, "vocab_size": VOCABULARY, "max_position_embeddings": length, "eos_token_id": 257}
    own = {key: value for key, value in vision.items() if key not in ("model_type", "architectures")}
    return {"model_type": "clip", "vision_config": own, "text_config": text, "projection_dim": 6}


def _changed(source: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    config = json.loads((source / "config.json").read_text())
    for file, key in (("vision_tower_config.json", "vision_tower_config"), ("tiny_registry.json", "model_registry")):
        if (source / file).exists():
            config[key] = json.loads((source / file).read_text())
    config = copy.deepcopy(config)
    for key, value in changes.items():
        *parts, last = key.split(".")
        section = config
        for part in parts:
            section = section[part]
        section[last] = value
    return config


def write_tokenizer(folder: Path, added: tuple[str, ...]) -> None:
    """Bytes, and tokens that releases add."""
    alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(alphabet, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<pad>", *added])
    backend.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 256)])
    backend.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
