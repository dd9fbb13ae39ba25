"""Real sizes by shape only: no parameter is made.

The numbers are counts of other implementations at the same settings, on torch's meta device unless a
comment names a published table; `tests/parity` counts models of transformers again, compared with ours.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax.pretrained import FAMILIES
from vlm_jax.pretrained.loader import choose_family

_QWEN_7B = {"hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "vocab_size": 152_064}
_QWEN_7B |= {"num_attention_heads": 28, "num_key_value_heads": 4, "rope_theta": 1e6, "use_sliding_window": False}
_QWEN_7B |= {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "tie_word_embeddings": False}
_QWEN_TOWER = {"depth": 32, "num_heads": 16, "in_chans": 3, "patch_size": 14, "spatial_merge_size": 2}
_QWEN_KEYS = {key: (1,) for key in ("visual.patch_embed.proj.weight", "model.embed_tokens.weight", "lm_head.weight")}
_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
_CLIP_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}

# Released configs, as sparse as the files are, and the published numbers of parameters.
RELEASES = {
    "ViT-L/16 with 1000 classes": (
        {
            "model_name": "ViT-L_16",
            "patches": {"size": [16, 16]},
            "hidden_size": 1024,
            "transformer": {"mlp_dim": 4096, "num_heads": 16, "num_layers": 24},
            "classifier": "token",
            "num_classes": 1000,
        },
        {"Transformer/posembed_input/pos_embedding": (1, 197, 1024)},
        304_326_632,  # `num_params` in torchvision's documentation of vit_l_16; so counts transformers 5.23
    ),
    "CLIP ViT-L/14 at 336": (
        {
            "model_type": "clip",
            "projection_dim": 768,
            "vision_config": {"image_size": 224, "patch_size": 14},
            "vision_config_dict": {**_LARGE, "image_size": 336},  # wins, as in transformers
            "text_config_dict": _CLIP_TEXT,
        },
        {},
        427_944_193,
    ),
    "CLIP ViT-L/14 at 336, of open_clip": (
        {
            "embed_dim": 768,
            "quick_gelu": True,
            "vision_cfg": {"image_size": 336, "layers": 24, "width": 1024, "patch_size": 14},
            "text_cfg": {"width": 768, "heads": 12, "layers": 12},
        },
        {},
        427_944_193,
    ),
    "CLIP RN50": (
        {
            "embed_dim": 1024,
            "quick_gelu": True,
            "vision_cfg": {"image_size": 224, "layers": [3, 4, 6, 3], "width": 64},
            "text_cfg": {"width": 512, "heads": 8, "layers": 12},
        },
        {},
        # open_clip_torch 3.3.0: 38,316,896 in ModifiedResNet, 63,690,240 in TextTransformer, and the scale;
        # means and variances of 26,624 channels are buffers next to them.
        38_316_896 + 63_690_240 + 1 + 2 * 26_624,
    ),
    "InternViT-300M at 448": (
        {
            "model_type": "intern_vit_6b",
            **_LARGE,
            "image_size": 448,
            "qkv_bias": True,
            "qk_normalization": False,
            "norm_type": "layer_norm",
        },
        {},
        304_012_288,  # InternVLVisionModel of transformers 5.23
    ),
    "InternViT-6B at 448, V1-5": (
        {"model_type": "intern_vit_6b", "num_hidden_layers": 45, "image_size": 448},
        {},
        5_536_496_000,  # likewise; 5,540 M in the model card
    ),
    # Language models: the number of parameters of each model card, to the last one; so counts transformers 5.23.
    "Llama-2 7B": (
        {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32_000},
        {},
        6_738_415_616,
    ),
    "Qwen2.5-3B": (
        {"model_type": "qwen2", "hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36}
        | {"num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True}
        | {"use_sliding_window": False, "sliding_window": 32_768, "max_window_layers": 36, "rope_theta": 1e6},
        {},
        3_085_938_688,
    ),
    "Qwen2.5-7B": (
        {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28}
        | {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152_064, "tie_word_embeddings": False}
        | {"use_sliding_window": False, "sliding_window": 131_072, "max_window_layers": 28, "rope_theta": 1e6},
        {},
        7_615_616_512,
    ),
    "Qwen3-8B": (
        {"model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936}
        | {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 36, "rope_theta": 1e6},
        {},
        8_190_735_360,
    ),
    # DeepSeek-VL2's language models: see the live count in tests/parity/test_deepseek_v2.py.
    "DeepSeek-VL2-tiny": (
        {"model_type": "deepseek_v2", "hidden_size": 1280, "intermediate_size": 6848, "moe_intermediate_size": 896}
        | {"num_hidden_layers": 12, "num_attention_heads": 10, "num_key_value_heads": 10, "vocab_size": 129_280}
        | {"n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1}
        | {"use_mla": False, "kv_lora_rank": None, "q_lora_rank": None},
        {},
        2_934_734_080,
    ),
    "DeepSeek-VL2-small": (
        {"model_type": "deepseek_v2", "hidden_size": 2048, "intermediate_size": 10_944, "moe_intermediate_size": 1408}
        | {"num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 102_400}
        | {"n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1}
        | {"q_lora_rank": None},
        {},
        15_706_484_224,
    ),
    "DeepSeek-VL2": (
        {"model_type": "deepseek_v2", "hidden_size": 2560, "intermediate_size": 12_288, "moe_intermediate_size": 1536}
        | {"n_routed_experts": 72, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1}
        | {"vocab_size": 129_280, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "q_lora_rank": None},
        {},
        27_033_548_328,
    ),
    # Whole systems, as their files describe them: those of Qwen with the language model's settings next to the rest.
    "Qwen2-VL 7B": (
        {"model_type": "qwen2_vl", **_QWEN_7B}
        | {"vision_config": {**_QWEN_TOWER, "embed_dim": 1280, "mlp_ratio": 4, "hidden_size": 3584}},
        _QWEN_KEYS,
        8_291_375_616,
    ),
    "Qwen2.5-VL 7B": (
        {"model_type": "qwen2_5_vl", **_QWEN_7B}
        | {"vision_config": {**_QWEN_TOWER, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584}},
        _QWEN_KEYS,
        8_292_166_656,
    ),
    "LLaVA-1.5 7B": (
        {
            "model_type": "llava",
            "text_config": {"model_type": "llama", "vocab_size": 32_064, "rms_norm_eps": 1e-5},
            "vision_config": {**_LARGE, "model_type": "clip_vision_model", "image_size": 336, "patch_size": 14},
        },
        {
            "multi_modal_projector.linear_2.weight": (4096, 4096),
            "language_model.model.embed_tokens.weight": (32_064, 4096),
            "language_model.lm_head.weight": (32_064, 4096),
            "vision_tower.vision_model.embeddings.class_embedding": (1024,),
        },
        7_063_427_072 - 12_596_224 - 2048,  # all but CLIP's last block and norm, which it does not use
    ),
    "SigLIP so400m/14 at 384": (
        {
            "model_type": "siglip",
            "vision_config": {**_SO400M, "image_size": 384, "patch_size": 14},
            "text_config": _SO400M,
        },
        {},
        877_960_498,
    ),
    "SigLIP so400m/14 at 384, of big_vision": (
        {
            "model_name": "proj.image_text.two_towers",
            "model": {
                "image": {"variant": "So400m/14", "pool_type": "map"},
                "text": {"variant": "So400m", "vocab_size": 32_000},
                "out_dim": [None, 1152],
                "temperature_init": 10.0,
                "bias_init": -10.0,
            },
        },
        {"params/img/pos_embedding": (1, 729, 1152), "params/txt/pos_embedding": (1, 64, 1152)},
        877_960_498,
    ),
}


def count(module, *inputs):
    boxed = jax.eval_shape(lambda *x: module.init(jax.random.key(0), *x), *inputs)
    return sum(leaf.size for leaf in jax.tree.leaves(nn.meta.unbox(boxed)))


@pytest.mark.parametrize("name", RELEASES)
def test_parameters_of_releases(name):
    config, tables, published = RELEASES[name]
    tables = {key: np.broadcast_to(np.zeros((), np.float32), shape) for key, shape in tables.items()}
    family = choose_family(config, FAMILIES)
    description = family(config, tables, dtype=jnp.float32, param_dtype=jnp.float32)
    assert count(description.module, *description.inputs) == published
