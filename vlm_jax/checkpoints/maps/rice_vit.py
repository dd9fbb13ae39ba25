"""The vision tower of LLaVA-OneVision 1.5, in released files under `visual.`; its merger is that of Qwen2-VL."""

from vlm_jax.checkpoints.maps import qwen_vit
from vlm_jax.checkpoints.maps.torch_layers import layer_norm
from vlm_jax.checkpoints.ops import Reshape
from vlm_jax.checkpoints.rules import Rule


def encoder_rules(*, width: int, window: tuple[int, ...]) -> tuple[Rule, ...]:
    """Patches, class token and blocks of a `RiceViT`.

    Args:
      width: residual width.
      window: (channels, rows, columns) of a patch.
    """
    return (
        *qwen_vit.encoder_rules(width=width, window=window, gated=False),
        Rule("class_embedding", "class_token", Reshape((width,), (1, width))),
        Rule("class_pos_emb", "class_angles"),
        *layer_norm("pre_layernorm", "pre_norm"),
    )
