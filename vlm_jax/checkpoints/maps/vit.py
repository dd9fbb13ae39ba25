"""ViT under the names of transformers."""

from vlm_jax.checkpoints.maps.torch_layers import conv, layer_norm, linear
from vlm_jax.checkpoints.ops import Chain, Reshape, Split
from vlm_jax.checkpoints.rules import Rule

BLOCK, OURS = "encoder.layer.{layer}", "blocks/layers"


def encoder_rules(width: int, num_patches: int, *, qkv_bias: bool) -> tuple[Rule, ...]:
    """A `ViTModel`, with its pooler.

    Args:
      width: residual width.
      num_patches: rows of the position table, without the class token's.
      qkv_bias: whether query, key and value have biases.
    """
    return (
        *embedding_rules(width, num_patches),
        *attention_rules(qkv_bias=qkv_bias),
        *layer_norm(f"{BLOCK}.layernorm_before", f"{OURS}/attention_norm"),
        *layer_norm(f"{BLOCK}.layernorm_after", f"{OURS}/mlp_norm"),
        *linear(f"{BLOCK}.intermediate.dense", f"{OURS}/mlp/up"),
        *linear(f"{BLOCK}.output.dense", f"{OURS}/mlp/down"),
        *layer_norm("layernorm", "final_norm"),
        *linear("pooler.dense", "representation"),
    )


def embedding_rules(width: int, num_patches: int) -> tuple[Rule, ...]:
    """Patches, the class token, and the position table, whose first row is the class token's; see `encoder_rules`."""
    positions = Chain(Reshape((1, num_patches + 1, width), (num_patches + 1, width)), Split(0, (1, num_patches)))
    return (
        Rule("embeddings.cls_token", "class_token", Reshape((1, 1, width), (1, width))),
        Rule("embeddings.position_embeddings", ("class_position", "positions/table"), positions),
        *conv("embeddings.patch_embeddings.projection", "patch_embed", bias=True),
    )


def attention_rules(*, qkv_bias: bool) -> tuple[Rule, ...]:
    """The four linear layers of every block's attention; see `encoder_rules`."""
    rules = linear(f"{BLOCK}.attention.output.dense", f"{OURS}/attention/out")
    for name in ("query", "key", "value"):
        rules += linear(f"{BLOCK}.attention.attention.{name}", f"{OURS}/attention/{name}", bias=qkv_bias)
    return rules
