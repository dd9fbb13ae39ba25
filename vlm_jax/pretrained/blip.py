"""BLIP-2 and InstructBLIP of transformers: the vision tower with the Q-Former, or one of them.

The language model of a full checkpoint is kept but not loaded.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.checkpoints.maps.blip import encoder_rules
from vlm_jax.checkpoints.maps.qformer import connector_rules, qformer_rules
from vlm_jax.checkpoints.rules import Rule, SourceTensor, prefixed
from vlm_jax.connectors.qformer import QFormer, QueryTransformer
from vlm_jax.encoders.vit import ViT
from vlm_jax.pretrained.composition import visual_half
from vlm_jax.pretrained.family import Description, PretrainedError, check_supported, find_prefix, with_defaults
from vlm_jax.pretrained.hugging_face import block_fields, vit_fields
from vlm_jax.pretrained.tables import image_shape, num_patches, resizer
from vlm_jax.types import Config, Dtype, Fields, Instruction, VisualFeatures

# transformers, models/blip_2/configuration_blip_2.py and models/instructblip/configuration_instructblip.py.
VISION_DEFAULTS: Fields = {
    "hidden_size": 1408,
    "intermediate_size": 6144,
    "num_hidden_layers": 39,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
}
QFORMER_DEFAULTS: Fields = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
    "cross_attention_frequency": 2,
    "encoder_hidden_size": 1408,
    "use_qformer_text_input": False,
}
DEFAULTS: Fields = {"num_query_tokens": 32}
IGNORE = (r"language_model\..*", r".*position_ids")
_PROJECTION = "language_projection.weight"
_CHANNELS = 3


def vision_tower(config: Config, where: str, **fields: Any) -> ViT:
    """The ViT of a `Blip2VisionConfig`; the class token is one of its features.

    Args:
      config: the released section.
      where: name of the section for errors.
      **fields: more fields of `ViT`.
    """
    settings = with_defaults(config, VISION_DEFAULTS, where)
    return ViT(
        qkv_bias=settings["qkv_bias"],
        class_token=True,
        class_position=True,
        keep_class_token=True,
        **vit_fields(settings, where),
        **fields,
    )


def qformer_fields(config: Config, where: str, *, instruction: bool) -> Fields:
    """Fields of `QueryTransformer` from a `Blip2QFormerConfig` or, with an instruction, `InstructBlipQFormerConfig`."""
    settings = with_defaults(config, QFORMER_DEFAULTS, where)
    check_supported(settings, {"use_qformer_text_input": (False,)}, where)
    text = {"vocab_size": settings["vocab_size"], "max_length": settings["max_position_embeddings"]}
    return {
        **block_fields(settings, where),
        "cross_attention_every": settings["cross_attention_frequency"],
        **(text if instruction else {}),
    }


def _vision_rules(vit: ViT) -> tuple[Rule, ...]:
    return encoder_rules(vit.width, num_patches(vit), qkv_bias=vit.qkv_bias)


def _qformer_rules(module: QueryTransformer) -> tuple[Rule, ...]:
    return qformer_rules(module.depth, module.cross_attention_every, instruction=module.vocab_size is not None)


def _instruction_shape(module: QueryTransformer) -> Instruction | None:
    if module.vocab_size is None:
        return None
    return Instruction(jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.ShapeDtypeStruct((1, 1), jnp.bool_))


def describe(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """Vision tower, Q-Former and projection of a `Blip2Model`, an `InstructBlipModel`, or a model for generation."""
    kind, dtypes = config["model_type"], {"dtype": dtype, "param_dtype": param_dtype}
    settings = with_defaults(config, DEFAULTS, kind)
    prefix = find_prefix(checkpoint, _PROJECTION)
    if prefix + _PROJECTION not in checkpoint:
        raise PretrainedError(f"{kind}: expected a tensor named {_PROJECTION}, which gives the width of the decoder")
    vit = vision_tower(config.get("vision_config") or {}, f"{kind}.vision_config", **dtypes)
    section = config.get("qformer_config") or {}
    connector = QFormer(
        features=checkpoint[prefix + _PROJECTION].shape[0],
        num_queries=settings["num_query_tokens"],
        **qformer_fields(section, f"{kind}.qformer_config", instruction=kind == "instructblip"),
        **dtypes,
    )
    rules = (
        *prefixed(_vision_rules(vit), f"{prefix}vision_model.", "encoder/"),
        *prefixed(_qformer_rules(connector), f"{prefix}qformer.", "connector/"),
        *prefixed(connector_rules(connector.num_queries, connector.width), prefix, "connector/"),
    )
    ignore = tuple(f"({prefix})?{pattern}" for pattern in IGNORE)
    resize = resizer(config, vit, path=("encoder",), size_key=("vision_config", "image_size"))
    return visual_half(
        vit,
        connector,
        image_shape(vit, _CHANNELS),
        rules,
        ignore,
        instruction=_instruction_shape(connector),
        resize=resize,
    )


def describe_qformer(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """A `Blip2QFormerModel` or an `InstructBlipQFormerModel`, which takes queries and features."""
    kind = config["model_type"]
    fields = qformer_fields(config, kind, instruction=kind == "instructblip_qformer")
    module = QueryTransformer(**fields, dtype=dtype, param_dtype=param_dtype)
    width = with_defaults(config, QFORMER_DEFAULTS, kind)["encoder_hidden_size"]
    queries, tokens = (jax.ShapeDtypeStruct((1, 1, dim), jnp.float32) for dim in (module.width, width))
    features = VisualFeatures(tokens, jax.ShapeDtypeStruct((1, 1), jnp.bool_), (1, 1))
    prefix = find_prefix(checkpoint, "encoder.layer.0.attention.attention.query.weight")
    instruction = _instruction_shape(module)
    inputs = (queries, features, *(() if instruction is None else (instruction,)))
    return Description(module, inputs, prefixed(_qformer_rules(module), prefix), IGNORE)


def describe_vision(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """A `Blip2VisionModel` or an `InstructBlipVisionModel`."""
    vit = vision_tower(config, config["model_type"], dtype=dtype, param_dtype=param_dtype)
    prefix = find_prefix(checkpoint, "embeddings.patch_embedding.weight")
    resize = resizer(config, vit, size_key=("image_size",))
    return Description(vit, (image_shape(vit, _CHANNELS),), prefixed(_vision_rules(vit), prefix), resize=resize)
