"""The vision towers of Qwen2-VL, Qwen2.5-VL, Qwen2.5-Omni and Qwen3-VL, in released files under `visual.`."""

from collections.abc import Sequence

from vlm_jax.checkpoints.maps.torch_layers import conv_of_patches, fused, layer_norm, linear, linear_stack, rms_norm
from vlm_jax.checkpoints.rules import Rule


def encoder_rules(
    *, width: int, window: tuple[int, ...], gated: bool, table: bool = False, fused_heads: bool = True
) -> tuple[Rule, ...]:
    """Patches and blocks of a `QwenViT`, or of a `Siglip2NaViT` with its table where `table`.

    Args:
      width: residual width.
      window: the axes of a patch in the weight: (channels, frames, rows, columns), or without frames.
      gated: SwiGLU and RMSNorm (Qwen2.5-VL), else a plain feed-forward and LayerNorm (Qwen2-VL).
      table: whether there are a position table and a bias of the patches (Qwen3-VL).
      fused_heads: whether query, key and value are one tensor; else three (Qwen2.5-Omni).
    """
    block, target = "blocks.{layer}", "blocks/layers"
    heads = tuple(f"{target}/attention/{name}" for name in ("query", "key", "value"))
    norm = rms_norm if gated else layer_norm
    names = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"} if gated else {"fc1": "up", "fc2": "down"}
    if table:
        names = {"linear_fc1": "up", "linear_fc2": "down"}
    rules = [
        Rule("patch_embed.proj.weight", "patch_embed/kernel", conv_of_patches(width, window)),
        *norm(f"{block}.norm1", f"{target}/attention_norm"),
        *(fused(f"{block}.attn.qkv", heads, width) if fused_heads else ()),
        *linear(f"{block}.attn.proj", f"{target}/attention/out"),
        *norm(f"{block}.norm2", f"{target}/mlp_norm"),
    ]
    for released, ours in names.items():
        rules += linear(f"{block}.mlp.{released}", f"{target}/mlp/{ours}")
    if not fused_heads:
        for released, head in zip("qkv", heads, strict=True):
            rules += linear(f"{block}.attn.{released}", head)
    if table:
        rules += [Rule("patch_embed.proj.bias", "patch_embed/bias"), Rule("pos_embed.weight", "positions/table")]
    return tuple(rules)


def merger_rules(*, gated: bool) -> tuple[Rule, ...]:
    """The patch merger -> `Concat`; `gated` as above."""
    norm = rms_norm if gated else layer_norm
    return (*norm("merger.ln_q", "norm"), *linear_stack("merger.mlp", "mlp", 2))


def level_merger_rules(numbers: Sequence[int]) -> tuple[Rule, ...]:
    """The mergers of Qwen3-VL -> a `Concat` with levels.

    Args:
      numbers: of every level, the number of its released merger.
    """
    mergers = {"merger": ("norm", "mlp")}
    mergers |= {f"deepstack_merger_list.{n}": (f"level_{i}_norm", f"level_{i}_mlp") for i, n in enumerate(numbers)}
    rules: list[Rule] = []
    for released, (norm, mlp) in mergers.items():
        rules += layer_norm(f"{released}.norm", norm)
        rules += linear(f"{released}.linear_fc1", f"{mlp}/up")
        rules += linear(f"{released}.linear_fc2", f"{mlp}/down")
    return tuple(rules)
