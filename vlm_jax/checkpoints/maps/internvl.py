"""InternViT and the projector, under the names of InternVL's release and of transformers."""

from vlm_jax.checkpoints.maps.torch_layers import conv, fused, layer_norm, linear, linear_stack, rms_norm
from vlm_jax.checkpoints.ops import Chain, Reshape, Split
from vlm_jax.checkpoints.rules import Rule

_BLOCK, _OURS = "encoder.layers.{layer}", "blocks/layers"


def encoder_rules(*, width: int, num_patches: int, qkv_bias: bool, rms: bool) -> tuple[Rule, ...]:
    """InternViT, after `vision_model.`; where queries and keys are normalised there are two more norms per block.

    Args:
      width: residual width.
      num_patches: rows of the position table, without the class token's.
      qkv_bias: whether query, key and value have biases.
      rms: whether the blocks' norms are RMSNorms, which have no bias.
    """
    heads = tuple(f"{_OURS}/attention/{name}" for name in ("query", "key", "value"))
    norm = rms_norm if rms else layer_norm
    return (
        *_tables("embeddings.class_embedding", "embeddings.position_embedding", width, num_patches),
        *conv("embeddings.patch_embedding", "patch_embed", bias=True),
        *norm(f"{_BLOCK}.norm1", f"{_OURS}/attention_norm"),
        *fused(f"{_BLOCK}.attn.qkv", heads, width, bias=qkv_bias),
        *rms_norm(f"{_BLOCK}.attn.q_norm", f"{_OURS}/attention/query_norm"),
        *rms_norm(f"{_BLOCK}.attn.k_norm", f"{_OURS}/attention/key_norm"),
        *linear(f"{_BLOCK}.attn.proj", f"{_OURS}/attention/out"),
        Rule(f"{_BLOCK}.ls1", f"{_OURS}/attention_scale"),
        *norm(f"{_BLOCK}.norm2", f"{_OURS}/mlp_norm"),
        *linear(f"{_BLOCK}.mlp.fc1", f"{_OURS}/mlp/up"),
        *linear(f"{_BLOCK}.mlp.fc2", f"{_OURS}/mlp/down"),
        Rule(f"{_BLOCK}.ls2", f"{_OURS}/mlp_scale"),
    )


def _tables(class_token: str, positions: str, width: int, num_patches: int) -> tuple[Rule, ...]:
    """The class token, and the position table, whose first row is the class token's."""
    rows = (num_patches + 1, width)
    apart = Chain(Reshape((1, *rows), rows), Split(0, (1, num_patches)))
    return (
        Rule(class_token, "class_token", Reshape((1, 1, width), (1, width))),
        Rule(positions, ("class_position", "positions/table"), apart),
    )


def hf_encoder_rules(*, width: int, num_patches: int, qkv_bias: bool, rms: bool) -> tuple[Rule, ...]:
    """InternViT in transformers, after `vision_tower.`; arguments as in `encoder_rules`."""
    block, norm = "encoder.layer.{layer}", rms_norm if rms else layer_norm
    rules = [
        *_tables("embeddings.cls_token", "embeddings.position_embeddings", width, num_patches),
        *conv("embeddings.patch_embeddings.projection", "patch_embed", bias=True),
        *norm(f"{block}.layernorm_before", f"{_OURS}/attention_norm"),
        *rms_norm(f"{block}.attention.q_norm", f"{_OURS}/attention/query_norm"),
        *rms_norm(f"{block}.attention.k_norm", f"{_OURS}/attention/key_norm"),
        *linear(f"{block}.attention.projection_layer", f"{_OURS}/attention/out"),
        Rule(f"{block}.lambda_1", f"{_OURS}/attention_scale"),
        *norm(f"{block}.layernorm_after", f"{_OURS}/mlp_norm"),
        *linear(f"{block}.mlp.fc1", f"{_OURS}/mlp/up"),
        *linear(f"{block}.mlp.fc2", f"{_OURS}/mlp/down"),
        Rule(f"{block}.lambda_2", f"{_OURS}/mlp_scale"),
    ]
    for released, ours in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
        rules += linear(f"{block}.attention.{released}", f"{_OURS}/attention/{ours}", bias=qkv_bias)
    return tuple(rules)


def projector_rules() -> tuple[Rule, ...]:
    """The names of OpenGVLab/InternVL -> `PixelShuffle`; the activation is number 2."""
    return (*layer_norm("mlp1.0", "norm"), *linear_stack("mlp1", "mlp", 2, start=1))
