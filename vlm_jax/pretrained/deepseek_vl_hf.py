"""DeepSeek-VL in the format of transformers: SigLIP, or SAM and SigLIP, the aligner and Llama."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from vlm_jax.checkpoints.maps.clip import siglip_vision_rules
from vlm_jax.checkpoints.maps.sam import HUGGING_FACE, encoder_rules, neck_rules
from vlm_jax.checkpoints.maps.torch_layers import conv, linear
from vlm_jax.checkpoints.rules import Rule, SourceTensor, prefixed
from vlm_jax.connectors.hybrid_mlp import HybridMlp
from vlm_jax.connectors.mlp import MlpConnector
from vlm_jax.encoders.hybrid import Hybrid
from vlm_jax.encoders.sam import SAM
from vlm_jax.encoders.vit import ViT
from vlm_jax.pretrained.composition import text_names, text_section, visual_half, with_language
from vlm_jax.pretrained.family import REQUIRED, Description, find_prefix, with_defaults
from vlm_jax.pretrained.sam import VISION_DEFAULTS, stacks, vision_encoder
from vlm_jax.pretrained.siglip import vision_tower
from vlm_jax.types import Config, Dtype, Fields

# The config does not have these; they are those of the released 7B model's processor.
HIGH_STATISTICS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
LOW_STATISTICS = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
NOT_VISION = (r"(.*\.)?language_model\..*", r"lm_head\..*")
_LLAMA_WIDTH = 4096  # default of the class for the text section
UNUSED = (r"(.*\.)?vision_model\.(vision_model\.)?head\..*",)  # the attention pooling of SigLIP


def describe(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """A `DeepseekVLModel`, or its model for generation: one SigLIP."""
    settings = with_defaults(config, {"vision_config": REQUIRED}, "deepseek_vl")
    dtypes = {"dtype": dtype, "param_dtype": param_dtype}
    encoder = _siglip(settings["vision_config"], "deepseek_vl", dtypes)
    pixels = jax.ShapeDtypeStruct((1, *_size(encoder), 3), jnp.float32)
    prefix = find_prefix(checkpoint, "aligner.linear1.weight")
    aligner = (*linear("aligner.linear1", "mlp/up"), *linear("aligner.linear2", "mlp/down"))
    rules = (
        *prefixed(_siglip_rules(encoder, checkpoint), target="encoder/"),
        *prefixed(aligner, prefix, "connector/"),
    )
    visual = visual_half(encoder, MlpConnector(_text_width(settings), **dtypes), pixels, rules, UNUSED)
    return _whole(visual, config, checkpoint, "deepseek_vl", dtypes)


def describe_hybrid(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """A `DeepseekVLHybridModel`, or its model for generation: two towers, for images in [0, 1]."""
    where, dtypes = "deepseek_vl_hybrid", {"dtype": dtype, "param_dtype": param_dtype}
    required = {"vision_config": REQUIRED, "high_res_vision_config": REQUIRED}
    settings = with_defaults(config, required, where)
    low = _siglip(settings["vision_config"], where, dtypes)
    section = settings["high_res_vision_config"]
    neck_dim = with_defaults(section, VISION_DEFAULTS, f"{where}.high_res_vision_config")["output_channels"]
    rows, cols = low.grid(*_size(low))
    high = vision_encoder(
        section,
        f"{where}.high_res_vision_config",
        downsample_dims=(2 * neck_dim, 4 * neck_dim),
        downsample_from=(4 * rows, 4 * cols),
        high_res_branch=True,
        **dtypes,
    )
    encoder = Hybrid(high, low, min(_size(low)), "tuple", HIGH_STATISTICS, LOW_STATISTICS)
    names = {"high_res_vision_proj": "high", "vision_proj": "low", "proj": "mlp/down"}
    aligner = [rule for released, ours in names.items() for rule in linear(f"aligner.{released}", ours)]
    prefix = find_prefix(checkpoint, "aligner.vision_proj.weight")
    rules = (
        *prefixed(_sam_rules(high, checkpoint), target="encoder/high/"),
        *prefixed(_siglip_rules(low, checkpoint), target="encoder/low/"),
        *prefixed(aligner, prefix, "connector/"),
    )
    pixels = jax.ShapeDtypeStruct((1, *high.image_size, 3), jnp.float32)
    visual = visual_half(encoder, HybridMlp(_text_width(settings), **dtypes), pixels, rules, UNUSED)
    return _whole(visual, config, checkpoint, where, dtypes)


def _whole(
    visual: Description,
    config: Config,
    checkpoint: Mapping[str, SourceTensor],
    where: str,
    dtypes: Fields,
) -> Description:
    text, names = text_section(config, checkpoint, kind="llama", tied=True), text_names(checkpoint)
    return with_language(visual, text, checkpoint, f"{where}.text_config", names=names, beside=NOT_VISION, **dtypes)


def _siglip(section: Config, where: str, dtypes: Fields) -> ViT:
    return vision_tower(section, f"{where}.vision_config", pooling="none", **dtypes)


def _text_width(settings: Config) -> int:
    return (settings.get("text_config") or {}).get("hidden_size", _LLAMA_WIDTH)


def _siglip_rules(module: ViT, checkpoint: Mapping[str, SourceTensor]) -> tuple[Rule, ...]:
    prefix = find_prefix(checkpoint, "embeddings.patch_embedding.weight")
    return prefixed(siglip_vision_rules(module.width), source=prefix)


def _sam_rules(module: SAM, checkpoint: Mapping[str, SourceTensor]) -> tuple[Rule, ...]:
    whole = find_prefix(checkpoint, "high_res_vision_alpha")
    neck = ("conv1", "layer_norm1", "conv2", "layer_norm2")
    branch = (
        *neck_rules(
            tuple(f"high_res_vision_neck.{name}" for name in neck),  # type: ignore[arg-type]
            "high_res_neck",
            module.width,
            module.neck_dim,
        ),
        *conv("high_res_vision_proj.conv1", "downsample_0"),
        *conv("high_res_vision_proj.conv2", "downsample_1"),
        Rule("high_res_vision_alpha", "high_res_scale"),
    )
    encoder = encoder_rules(
        HUGGING_FACE,
        grid=module.patch_grid(*module.image_size),
        width=module.width,
        neck_dim=module.neck_dim,
        runs=stacks(module),
        qkv_bias=module.qkv_bias,
    )
    prefix = find_prefix(checkpoint, "patch_embed.projection.weight")
    return (*prefixed(encoder, source=prefix), *prefixed(branch, source=whole))


def _size(module: ViT) -> tuple[int, int]:
    assert module.image_size is not None  # a SigLIP config always has it
    return module.image_size
