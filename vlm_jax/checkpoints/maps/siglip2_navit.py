"""The vision tower of Ovis 2.5, in released files under `visual_tokenizer.vit.vision_model.`."""

from vlm_jax.checkpoints.maps.torch_layers import conv_of_patches, layer_norm, linear
from vlm_jax.checkpoints.ops import LINEAR
from vlm_jax.checkpoints.rules import Rule


def encoder_rules(*, width: int, window: tuple[int, ...] | None, table: bool) -> tuple[Rule, ...]:
    """Patches, positions and blocks of a `Siglip2NaViT`. `post_layernorm` is stored but never used.

    Args:
      width: residual width.
      window: (channels, rows, columns) of a patch where the release has a convolution; None where it has
        a linear layer.
      table: whether there is a position table.
    """
    block, target = "encoder.layers.{layer}", "blocks/layers"
    embedding = LINEAR if window is None else conv_of_patches(width, window)
    names = {
        "self_attn.q_proj": "attention/query",
        "self_attn.k_proj": "attention/key",
        "self_attn.v_proj": "attention/value",
        "self_attn.out_proj": "attention/out",
        "mlp.fc1": "mlp/up",
        "mlp.fc2": "mlp/down",
    }
    rules = [
        Rule("embeddings.patch_embedding.weight", "patch_embed/kernel", embedding),
        Rule("embeddings.patch_embedding.bias", "patch_embed/bias"),
        *layer_norm(f"{block}.layer_norm1", f"{target}/attention_norm"),
        *layer_norm(f"{block}.layer_norm2", f"{target}/mlp_norm"),
    ]
    if table:
        rules.append(Rule("embeddings.position_embedding.weight", "positions/table"))
    for released, ours in names.items():
        rules += linear(f"{block}.{released}", f"{target}/{ours}")
    return tuple(rules)
