"""Vision transformers under the names of timm."""

from vlm_jax.checkpoints.maps.torch_layers import conv, fused, layer_norm, linear
from vlm_jax.checkpoints.ops import Chain, Reshape, Split
from vlm_jax.checkpoints.rules import Rule

BLOCK, OURS = "blocks.{layer}", "blocks/layers"


def vit_rules(
    *,
    width: int,
    num_patches: int,
    class_token: bool = False,
    class_position: bool = False,
    num_registers: int = 0,
    pre_norm: bool = False,
    patch_bias: bool = True,
    layer_scale: str | None = None,
    final_norm: bool = True,
) -> tuple[Rule, ...]:
    """A `VisionTransformer` -> `ViT`; there, query, key and value are one linear layer.

    Args:
      width: residual width.
      num_patches: rows of the position table, without the class token's.
      class_token, class_position, num_registers, pre_norm, patch_bias: as in `ViT`.
      layer_scale: name of the factors of a layer scale; None without them.
      final_norm: whether the last norm is used.
    """
    heads = tuple(f"{OURS}/attention/{name}" for name in ("query", "key", "value"))
    rows = num_patches + class_position
    table = Reshape((1, rows, width), (rows, width))
    positions = Rule("pos_embed", "positions/table", table)
    if class_position:
        split = Chain(table, Split(0, (1, num_patches)))
        positions = Rule("pos_embed", ("class_position", "positions/table"), split)
    registers = Reshape((1, num_registers, width), (num_registers, width))
    scales = {} if layer_scale is None else {"ls1": "attention_scale", "ls2": "mlp_scale"}
    return (
        *((Rule("cls_token", "class_token", Reshape((1, 1, width), (1, width))),) if class_token else ()),
        *((Rule("reg_token", "registers", registers),) if num_registers else ()),
        *conv("patch_embed.proj", "patch_embed", bias=patch_bias),
        positions,
        *(layer_norm("norm_pre", "pre_norm") if pre_norm else ()),
        *layer_norm(f"{BLOCK}.norm1", f"{OURS}/attention_norm"),
        *fused(f"{BLOCK}.attn.qkv", heads, width),
        *linear(f"{BLOCK}.attn.proj", f"{OURS}/attention/out"),
        *layer_norm(f"{BLOCK}.norm2", f"{OURS}/mlp_norm"),
        *linear(f"{BLOCK}.mlp.fc1", f"{OURS}/mlp/up"),
        *linear(f"{BLOCK}.mlp.fc2", f"{OURS}/mlp/down"),
        *(Rule(f"{BLOCK}.{theirs}.{layer_scale}", f"{OURS}/{ours}") for theirs, ours in scales.items()),
        *(layer_norm("norm", "final_norm") if final_norm else ()),
    )
