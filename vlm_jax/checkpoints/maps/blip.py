"""The vision tower of BLIP-2 and InstructBLIP (EVA), in released files under `vision_model.`."""

from vlm_jax.checkpoints.maps.torch_layers import conv, fused, layer_norm, linear
from vlm_jax.checkpoints.ops import Chain, Reshape, Split
from vlm_jax.checkpoints.rules import Rule


def encoder_rules(width: int, num_patches: int, *, qkv_bias: bool) -> tuple[Rule, ...]:
    """A `Blip2VisionModel` or an `InstructBlipVisionModel`.

    Args:
      width: residual width.
      num_patches: rows of the position table, without the class token's.
      qkv_bias: whether the fused product has a bias.
    """
    block, target = "encoder.layers.{layer}", "blocks/layers"
    heads = tuple(f"{target}/attention/{name}" for name in ("query", "key", "value"))
    positions = Chain(Reshape((1, num_patches + 1, width), (num_patches + 1, width)), Split(0, (1, num_patches)))
    return (
        Rule("embeddings.class_embedding", "class_token", Reshape((1, 1, width), (1, width))),
        Rule("embeddings.position_embedding", ("class_position", "positions/table"), positions),
        *conv("embeddings.patch_embedding", "patch_embed", bias=True),
        *layer_norm(f"{block}.layer_norm1", f"{target}/attention_norm"),
        *fused(f"{block}.self_attn.qkv", heads, width, bias=qkv_bias),
        *linear(f"{block}.self_attn.projection", f"{target}/attention/out"),
        *layer_norm(f"{block}.layer_norm2", f"{target}/mlp_norm"),
        *linear(f"{block}.mlp.fc1", f"{target}/mlp/up"),
        *linear(f"{block}.mlp.fc2", f"{target}/mlp/down"),
        *layer_norm("post_layernorm", "final_norm"),
    )
