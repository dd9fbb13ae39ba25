"""InternViT and the projector under the names of InternVL's own release."""

from vlm_jax.checkpoints.maps.torch_layers import conv, fused, layer_norm, linear, linear_stack, rms_norm
from vlm_jax.checkpoints.ops import Chain, Reshape, Split
from vlm_jax.checkpoints.rules import Rule

_BLOCK, _OURS = "encoder.layers.{layer}", "blocks/layers"


def encoder_rules(*, width: int, num_patches: int, qkv_bias: bool, rms: bool) -> tuple[Rule, ...]:
    """InternViT, after `vision_model.`; where queries and keys are normalised there are two more norms a block.

    Args:
      width: residual width.
      num_patches: rows of the position table, without that of the class token.
      qkv_bias: whether query, key and value have biases.
      rms: whether the blocks' norms are RMSNorms, which have no bias.
    """
    rows = (num_patches + 1, width)
    positions = Chain(Reshape((1, *rows), rows), Split(0, (1, num_patches)))
    heads = tuple(f"{_OURS}/attention/{name}" for name in ("query", "key", "value"))
    norm = rms_norm if rms else layer_norm
    return (
        Rule("embeddings.class_embedding", "class_token", Reshape((1, 1, width), (1, width))),
        Rule("embeddings.position_embedding", ("class_position", "positions/table"), positions),
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


def projector_rules() -> tuple[Rule, ...]:
    """The names of OpenGVLab/InternVL -> `PixelShuffle`; the activation is number 2."""
    return (*layer_norm("mlp1.0", "norm"), *linear_stack("mlp1", "mlp", 2, start=1))
