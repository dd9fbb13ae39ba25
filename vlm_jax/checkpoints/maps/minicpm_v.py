"""The vision tower and the merger of MiniCPM-V 4.6, under the names of transformers."""

from vlm_jax.checkpoints.maps.torch_layers import Where, conv_of_patches, layer_norm, linear
from vlm_jax.checkpoints.rules import Rule

_ATTENTION = {
    "self_attn.q_proj": "attention/query",
    "self_attn.k_proj": "attention/key",
    "self_attn.v_proj": "attention/value",
    "self_attn.out_proj": "attention/out",
}


def tower_rules(*, width: int, window: tuple[int, int, int], depth: int, merge_after: int) -> tuple[Rule, ...]:
    """A `MergingViT`, after `vision_tower.`.

    Args:
      width: residual width.
      window: (channels, rows, columns) of a patch.
      depth: number of blocks.
      merge_after: number of blocks before the merger.
    """
    rules = [
        Rule("embeddings.patch_embedding.weight", "patch_embed/kernel", conv_of_patches(width, window)),
        Rule("embeddings.patch_embedding.bias", "patch_embed/bias"),
        Rule("embeddings.position_embedding.weight", "positions"),
        *layer_norm("post_layernorm", "final_norm"),
        *layer_norm("vit_merger.layer_norm1", "merger/attention_norm"),
        *layer_norm("vit_merger.pre_norm", "merger/mlp_norm"),
        *linear("vit_merger.linear_1", "merger/mlp/up"),
        *linear("vit_merger.linear_2", "merger/mlp/down"),
    ]
    for released, ours in _ATTENTION.items():
        rules += linear(f"vit_merger.{released}", f"merger/{ours}")
    rules += _block_rules("early_blocks", {"layer": range(merge_after)})
    return (*rules, *(_block_rules("blocks", {"layer": range(merge_after, depth)}) if merge_after < depth else ()))


def _block_rules(stack: str, where: Where) -> list[Rule]:
    block, target = "encoder.layers.{layer}", f"{stack}/layers"
    rules = [
        *layer_norm(f"{block}.layer_norm1", f"{target}/attention_norm", where=where),
        *layer_norm(f"{block}.layer_norm2", f"{target}/mlp_norm", where=where),
    ]
    for released, ours in {**_ATTENTION, "mlp.fc1": "mlp/up", "mlp.fc2": "mlp/down"}.items():
        rules += linear(f"{block}.{released}", f"{target}/{ours}", where=where)
    return rules


def merger_rules() -> tuple[Rule, ...]:
    """The `PixelShuffle` behind the tower, after `merger.mlp.0.`."""
    return (
        *layer_norm("pre_norm", "norm"),
        *linear("linear_1", "mlp/up"),
        *linear("linear_2", "mlp/down"),
    )
