"""The guide of a release whose reducer chooses by the question: parts of the CLIP whose image tower it has."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from vlm_jax.checkpoints.hub import Checkpoint, fetch, open_checkpoint, read_config
from vlm_jax.checkpoints.maps.clip import clip_text_rules
from vlm_jax.checkpoints.maps.torch_layers import layer_norm
from vlm_jax.checkpoints.ops import LINEAR
from vlm_jax.checkpoints.release import Borrowed
from vlm_jax.checkpoints.rules import Rule, prefixed
from vlm_jax.config import ConfigError
from vlm_jax.encoders.encoder import Encoder
from vlm_jax.encoders.vit import ViT
from vlm_jax.models.guide import Guide
from vlm_jax.pretrained import clip
from vlm_jax.pretrained.family import with_defaults
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.types import Config

PART = "guide"
_USED = re.compile(
    r"text_model\.(?!embeddings\.position_ids).*|text_projection\.weight|visual_projection\.weight"
    r"|vision_model\.post_layernorm\..*"
)
_SAME = ("width", "depth", "num_heads", "mlp_dim", "patch_size", "class_token", "pre_norm")


class Guiding(NamedTuple):
    """A guide with its parameters, unread, and the tokenizer of its texts."""

    module: Guide
    borrowed: Borrowed
    tokenizer: Tokenizer


def clip_guide(
    encoder: Encoder, text_model: str | None, released: Config, folder: Path, *, kind: str, path: str
) -> Guiding:
    """The guide of a system with a CLIP's image tower.

    Args:
      encoder: of the system.
      text_model: folder of a CLIP, relative to the release's or the working directory, or its name on the hub; the
        release's `mm_vision_tower` when None.
      released: config of the release.
      folder: of the release.
      kind: of the reducer, for messages.
      path: of the reducer's config, for messages.

    Raises:
      ConfigError: the encoder is not a CLIP's image tower, no CLIP is named, or it is another one.
      CheckpointFileError: the CLIP cannot be found or read.
    """
    if not isinstance(encoder, ViT):
        raise ConfigError(
            f"{path}.kind: {kind} compares patches with the question as CLIP embeds both, but the encoder is a "
            f"{type(encoder).__name__}; choose a release with one CLIP tower, such as LLaVA, or another reducer"
        )
    name = released.get("mm_vision_tower") if text_model is None else text_model
    if name is None:
        raise ConfigError(
            f"{path}.text_model: {kind} reads the text tower of the CLIP whose image tower this release has, which its "
            "config does not name; set it to its folder or name, such as openai/clip-vit-large-patch14-336 "
            "(--text_model of vlm_jax.cli.evaluate)"
        )
    place = folder / str(name) if (folder / str(name)).is_dir() else fetch(str(name))
    config = read_config(place)
    if config.get("model_type") != "clip":
        raise ConfigError(
            f"{path}.text_model: {place}: expected a CLIP with both towers (model_type clip), got "
            f"{config.get('model_type')!r}; set it to the folder of the whole CLIP"
        )
    sections = clip.sections(config)
    dtypes = {"dtype": encoder.dtype, "param_dtype": encoder.param_dtype}
    tower = clip.vision_tower(sections["vision_config"], f"{place}: vision_config")
    differing = {
        field: (getattr(encoder, field), getattr(tower, field))
        for field in _SAME
        if getattr(encoder, field) != getattr(tower, field)
    }
    if differing:
        told = ", ".join(f"{field} {there} (here {own})" for field, (own, there) in differing.items())
        raise ConfigError(
            f"{path}.text_model: {place} is not the CLIP of this release's image tower: it has {told}; set it to that "
            "CLIP, or choose another reducer"
        )
    projection = with_defaults(config, clip.DEFAULTS, "clip")["projection_dim"]
    text = clip.text_tower(sections["text_config"], f"{place}: text_config", projection_dim=projection, **dtypes)
    checkpoint = open_checkpoint(place)
    used: Mapping = {key: tensor for key, tensor in checkpoint.items() if _USED.fullmatch(key)}
    rules = (
        *prefixed(clip_text_rules(), "text_model.", f"{PART}/text/"),
        Rule("text_projection.weight", f"{PART}/text/projection/kernel", LINEAR),
        Rule("visual_projection.weight", f"{PART}/image_projection/kernel", LINEAR),
        *layer_norm("vision_model.post_layernorm", f"{PART}/image_norm"),
    )
    return Guiding(
        Guide(text, tower.norm_epsilon, **dtypes),
        Borrowed(PART, Checkpoint(used, checkpoint.origin), rules),
        Tokenizer.from_folder(place),
    )
