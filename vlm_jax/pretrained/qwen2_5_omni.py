"""Qwen2.5-Omni: the vision tower, its merger and the language model of the thinker."""

import re
from collections.abc import Mapping

from vlm_jax.checkpoints.maps.qwen_vit import encoder_rules, merger_rules
from vlm_jax.checkpoints.rules import SourceTensor, prefixed
from vlm_jax.pretrained.composition import text_names, text_section, visual_half, with_language
from vlm_jax.pretrained.family import Description, beside, find_prefix, system_section
from vlm_jax.pretrained.qwen2_vl import packed_shapes, qwen2_5_visual
from vlm_jax.types import Config, Dtype

# Keys of the parts that are not read: the speech decoder and the audio encoder.
UNREAD = r"(talker|token2wav)\..*|(thinker\.)?(model\.)?audio_tower\..*"


def describe(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """The thinker for text, images and videos, or its tower and merger if the checkpoint has only these.

    The thinker is a section of the released config, or the whole of a config saved alone; its names start with
    `thinker.` in released files. The tower is that of Qwen2.5-VL with query, key and value in tensors of their own.
    """
    kind, thinker, dtypes = config["model_type"], system_section(config), {"dtype": dtype, "param_dtype": param_dtype}
    root = kind if thinker is config else f"{kind}.thinker_config"
    where = f"{root}.vision_config" if "vision_config" in thinker else root
    encoder, connector = qwen2_5_visual(thinker.get("vision_config", thinker) or {}, where, **dtypes)
    window = (encoder.channels, encoder.temporal_patch_size, encoder.patch_size, encoder.patch_size)
    read = {key: tensor for key, tensor in checkpoint.items() if not re.fullmatch(UNREAD, key)}
    prefix = find_prefix(read, "patch_embed.proj.weight")
    tower = encoder_rules(width=encoder.width, window=window, gated=True, fused_heads=False)
    rules = (*prefixed(tower, prefix, "encoder/"), *prefixed(merger_rules(gated=True), prefix, "connector/"))
    inputs = packed_shapes(encoder.patch_dim, encoder.merge_size, encoder.window)
    # The thinker states whether the head is tied; its text section has a class default, which transformers ignores.
    text = {**(thinker.get("text_config") or {}), "tie_word_embeddings": False}
    return with_language(
        visual_half(encoder, connector, inputs, rules, (UNREAD,)),
        text_section({**thinker, "text_config": text}, read, kind="qwen2_5_omni_text", tied=False),
        read,
        f"{root}.text_config",
        names=text_names(read),
        beside=beside(prefix),
        **dtypes,
    )
