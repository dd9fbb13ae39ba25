"""The vision towers of Qwen2-VL and Qwen2.5-VL, in released files under `visual.`."""

from vlm_jax.checkpoints.maps.torch_layers import conv_of_patches, fused, layer_norm, linear, linear_stack, rms_norm
from vlm_jax.checkpoints.rules import Rule


def encoder_rules(*, width: int, window: tuple[int, int, int, int], gated: bool) -> tuple[Rule, ...]:
    """Patches and blocks of a `QwenViT`.

    Args:
      width: residual width.
      window: (channels, frames, rows, columns) of a patch.
      gated: SwiGLU and RMSNorm (Qwen2.5-VL), else a plain feed-forward and LayerNorm (Qwen2-VL).
    """
    block, target = "blocks.{layer}", "blocks/layers"
    heads = tuple(f"{target}/attention/{name}" for name in ("query", "key", "value"))
    norm = rms_norm if gated else layer_norm
    names = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"} if gated else {"fc1": "up", "fc2": "down"}
    rules = [
        Rule("patch_embed.proj.weight", "patch_embed/kernel", conv_of_patches(width, window)),
        *norm(f"{block}.norm1", f"{target}/attention_norm"),
        *fused(f"{block}.attn.qkv", heads, width),
        *linear(f"{block}.attn.proj", f"{target}/attention/out"),
        *norm(f"{block}.norm2", f"{target}/mlp_norm"),
    ]
    for released, ours in names.items():
        rules += linear(f"{block}.mlp.{released}", f"{target}/mlp/{ours}")
    return tuple(rules)


def merger_rules(*, gated: bool) -> tuple[Rule, ...]:
    """The patch merger -> `Concat`; `gated` as above."""
    norm = rms_norm if gated else layer_norm
    return (*norm("merger.ln_q", "norm"), *linear_stack("merger.mlp", "mlp", 2))
