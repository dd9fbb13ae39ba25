"""Included released configs, for describing and planning a system without its weights.

`released/<organisation>--<name>` has the settings that a family reads from the `config.json` of a repository on the
Hugging Face hub, and from the files of its image processor, where these state more than the defaults of their class.
"""

import json
import pathlib

import jax.numpy as jnp
import numpy as np

from vlm_jax.config import did_you_mean
from vlm_jax.pretrained import FAMILIES
from vlm_jax.pretrained.family import Description, PretrainedError, marker
from vlm_jax.pretrained.loader import choose_family
from vlm_jax.types import Config, Dtype, Fields

_FOLDER = pathlib.Path(__file__).parent / "released"
_SEPARATOR = "--"

_IDEFICS3 = (
    "model.vision_model.embeddings.patch_embedding.weight",
    "model.connector.modality_projection.proj.weight",
    "model.text_model.embed_tokens.weight",
)
_GEMMA3 = (
    "vision_tower.vision_model.embeddings.patch_embedding.weight",
    "multi_modal_projector.mm_input_projection_weight",
    "language_model.model.embed_tokens.weight",
)
_PALIGEMMA = (
    "vision_tower.vision_model.embeddings.patch_embedding.weight",
    "multi_modal_projector.linear.weight",
    "language_model.model.embed_tokens.weight",
)
_QWEN2_VL = ("visual.patch_embed.proj.weight", "model.embed_tokens.weight")
# `family.marker` -> the keys of the released files from which a family determines the parts and their
# prefixes; other families only need the config.
_KEYS: dict[str, tuple[str, ...]] = {
    "DeepseekOCR2": ("model.embed_tokens.weight", "lm_head.weight"),
    "deepseek_ocr": ("model.embed_tokens.weight", "lm_head.weight"),
    "deepseek_vl_v2": ("language.model.norm.weight", "image_newline", "view_seperator"),
    "gemma3": _GEMMA3,
    "gemma4": (
        "model.vision_tower.patch_embedder.position_embedding_table",
        "model.embed_vision.embedding_projection.weight",
        "model.language_model.embed_tokens.weight",
    ),
    "idefics3": _IDEFICS3,
    "internvl_chat": ("language_model.model.norm.weight",),
    "llava": (
        "language_model.model.embed_tokens.weight",
        "language_model.lm_head.weight",
        "vision_tower.vision_model.embeddings.class_embedding",
    ),
    "llavaonevision1_5": _QWEN2_VL,
    "minicpmv4_6": (
        "model.vision_tower.embeddings.patch_embedding.weight",
        "model.merger.mlp.0.pre_norm.weight",
        "model.language_model.embed_tokens.weight",
    ),
    "mobilevlm": ("model.embed_tokens.weight",),
    "multi_modality": ("language_model.model.norm.weight",),
    "openvla": ("language_model.model.norm.weight",),
    "ovis": ("llm.model.norm.weight",),
    "ovis2_5": ("llm.model.norm.weight",),
    "paligemma": _PALIGEMMA,
    "prismatic": ("language_model.model.norm.weight",),
    "qwen": ("transformer.wte.weight", "transformer.visual.proj"),
    "qwen2_5_omni": tuple(f"thinker.{key}" for key in _QWEN2_VL),
    "qwen2_5_vl": _QWEN2_VL,
    "qwen2_vl": _QWEN2_VL,
    "qwen3_5": ("model.visual.patch_embed.proj.weight", "model.language_model.embed_tokens.weight"),
    "qwen3_5_moe": ("model.visual.patch_embed.proj.weight", "model.language_model.embed_tokens.weight"),
    "qwen3_vl": ("model.visual.patch_embed.proj.weight", "model.language_model.embed_tokens.weight"),
    "qwen3_vl_moe": ("model.visual.patch_embed.proj.weight", "model.language_model.embed_tokens.weight"),
    "smolvlm": _IDEFICS3,
    "vit": ("pooler.dense.weight",),
}
_KEYS["llava_next"] = (*_KEYS["llava"], "image_newline")
_KEYS["llava_onevision"] = (
    *_KEYS["llava"][:2],
    "vision_tower.vision_model.embeddings.patch_embedding.weight",
    "image_newline",
)


def known_configs() -> tuple[str, ...]:
    """Names on the Hugging Face hub, `organisation/name`, in alphabetical order."""
    return tuple(sorted(folder.name.replace(_SEPARATOR, "/", 1) for folder in _FOLDER.iterdir()))


def known_folder(name: str) -> pathlib.Path:
    """The folder with the included files of one of `known_configs`; raises as `known_config`."""
    if name not in known_configs():
        raise PretrainedError(f"no config of '{name}' is included{did_you_mean(name, known_configs())}")
    return _FOLDER / name.replace("/", _SEPARATOR, 1)


def known_config(name: str) -> Fields:
    """The released settings of one of `known_configs`.

    Args:
      name: `organisation/name`.

    Raises:
      PretrainedError: no config of that name is included; the message suggests the nearest one.
    """
    return json.loads((known_folder(name) / "config.json").read_text(encoding="utf-8"))


def describe_known(name: str, *, dtype: Dtype = jnp.float32, param_dtype: Dtype = jnp.float32) -> Description:
    """One of `known_configs` as a module, the full system with its language model, without a checkpoint.

    Args:
      name: `organisation/name`.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Raises:
      PretrainedError: as `known_config`.
    """
    config = known_config(name)
    return choose_family(config, FAMILIES)(config, _stand_ins(config), dtype=dtype, param_dtype=param_dtype)


def _stand_ins(config: Config) -> dict[str, np.ndarray]:
    """The tensors that a family reads, as zeros that take no memory."""
    kind = marker(config)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(_KEYS.get(kind, ()), (1,))
    if kind in ("llava", "llava_next", "llava_onevision"):  # read for the width of the language model
        width = config["text_config"]["hidden_size"]
        shapes["multi_modal_projector.linear_2.weight"] = (width, width)
    return {key: np.broadcast_to(np.zeros((), np.float32), shape) for key, shape in shapes.items()}
