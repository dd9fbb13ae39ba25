"""ViT under the names of transformers."""

from vlm_jax.checkpoints.maps.torch_layers import conv, layer_norm, linear
from vlm_jax.checkpoints.ops import Chain, Reshape, Split
from vlm_jax.checkpoints.rules import Rule


def encoder_rules(width: int, num_patches: int, *, qkv_bias: bool) -> tuple[Rule, ...]:
    """A `ViTModel`, with its pooler.

    Args:
      width: residual width.
      num_patches: rows of the position table, without the class token's.
      qkv_bias: whether query, key and value have biases.
    """
    block, target = "encoder.layer.{layer}", "blocks/layers"
    positions = Chain(Reshape((1, num_patches + 1, width), (num_patches + 1, width)), Split(0, (1, num_patches)))
    rules = [
        Rule("embeddings.cls_token", "class_token", Reshape((1, 1, width), (1, width))),
        Rule("embeddings.position_embeddings", ("class_position", "positions/table"), positions),
        *conv("embeddings.patch_embeddings.projection", "patch_embed", bias=True),
        *layer_norm(f"{block}.layernorm_before", f"{target}/attention_norm"),
        *linear(f"{block}.attention.output.dense", f"{target}/attention/out"),
        *layer_norm(f"{block}.layernorm_after", f"{target}/mlp_norm"),
        *linear(f"{block}.intermediate.dense", f"{target}/mlp/up"),
        *linear(f"{block}.output.dense", f"{target}/mlp/down"),
        *layer_norm("layernorm", "final_norm"),
        *linear("pooler.dense", "representation"),
    ]
    for name in ("query", "key", "value"):
        rules += linear(f"{block}.attention.attention.{name}", f"{target}/attention/{name}", bias=qkv_bias)
    return tuple(rules)
