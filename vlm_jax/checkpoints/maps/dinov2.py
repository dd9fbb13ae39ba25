"""DINOv2, with and without registers, under the names of transformers."""

from vlm_jax.checkpoints.maps.torch_layers import fused, layer_norm, linear
from vlm_jax.checkpoints.maps.vit import BLOCK, OURS, attention_rules, embedding_rules
from vlm_jax.checkpoints.ops import Reshape
from vlm_jax.checkpoints.rules import Rule


def encoder_rules(
    width: int, num_patches: int, *, num_registers: int, qkv_bias: bool, gated_dim: int | None
) -> tuple[Rule, ...]:
    """A `Dinov2Model`, or a `Dinov2WithRegistersModel`.

    Args:
      width: residual width.
      num_patches: rows of the position table, without the class token's.
      num_registers: register tokens.
      qkv_bias: whether query, key and value have biases.
      gated_dim: hidden width of SwiGLU, whose first two layers are one tensor; None for a plain feed-forward.
    """
    mlp, target = f"{BLOCK}.mlp", f"{OURS}/mlp"
    if gated_dim is None:
        feed_forward = (*linear(f"{mlp}.fc1", f"{target}/up"), *linear(f"{mlp}.fc2", f"{target}/down"))
    else:
        feed_forward = (
            *fused(f"{mlp}.weights_in", (f"{target}/gate", f"{target}/up"), gated_dim),
            *linear(f"{mlp}.weights_out", f"{target}/down"),
        )
    registers = Reshape((1, num_registers, width), (num_registers, width))
    return (
        *embedding_rules(width, num_patches),
        *((Rule("embeddings.register_tokens", "registers", registers),) if num_registers else ()),
        *layer_norm(f"{BLOCK}.norm1", f"{OURS}/attention_norm"),
        *attention_rules(qkv_bias=qkv_bias),
        Rule(f"{BLOCK}.layer_scale1.lambda1", f"{OURS}/attention_scale"),
        *layer_norm(f"{BLOCK}.norm2", f"{OURS}/mlp_norm"),
        *feed_forward,
        Rule(f"{BLOCK}.layer_scale2.lambda1", f"{OURS}/mlp_scale"),
        *layer_norm("layernorm", "final_norm"),
    )
