"""DINOv3 under the names of transformers."""

from vlm_jax.checkpoints.maps.torch_layers import conv, layer_norm, linear
from vlm_jax.checkpoints.maps.vit import OURS
from vlm_jax.checkpoints.ops import Reshape
from vlm_jax.checkpoints.rules import Rule


def encoder_rules(
    width: int,
    *,
    layers: str,
    num_registers: int,
    qkv_bias: bool,
    key_bias: bool,
    bias: bool,
    mlp_bias: bool,
    gated: bool,
) -> tuple[Rule, ...]:
    """A `DINOv3ViTModel`.

    Args:
      width: residual width.
      layers: released name of the blocks, which depends on the version of transformers.
      num_registers: register tokens.
      qkv_bias: whether query and value have biases.
      key_bias: whether the key has one.
      bias: whether attention's output has one.
      mlp_bias: whether the linear layers of the feed-forward have biases.
      gated: whether the feed-forward has a gate.
    """
    block = f"{layers}.{{layer}}"
    attention = {"q": ("query", qkv_bias), "k": ("key", key_bias), "v": ("value", qkv_bias), "o": ("out", bias)}
    registers = Rule(
        "embeddings.register_tokens", "registers", Reshape((1, num_registers, width), (num_registers, width))
    )
    rules = [
        Rule("embeddings.cls_token", "class_token", Reshape((1, 1, width), (1, width))),
        *((registers,) if num_registers else ()),
        *conv("embeddings.patch_embeddings", "patch_embed", bias=True),
        *layer_norm(f"{block}.norm1", f"{OURS}/attention_norm"),
        Rule(f"{block}.layer_scale1.lambda1", f"{OURS}/attention_scale"),
        *layer_norm(f"{block}.norm2", f"{OURS}/mlp_norm"),
        Rule(f"{block}.layer_scale2.lambda1", f"{OURS}/mlp_scale"),
        *layer_norm("norm", "final_norm"),
    ]
    for released, (ours, has_bias) in attention.items():
        rules += linear(f"{block}.attention.{released}_proj", f"{OURS}/attention/{ours}", bias=has_bias)
    for name in ("gate", "up", "down") if gated else ("up", "down"):
        rules += linear(f"{block}.mlp.{name}_proj", f"{OURS}/mlp/{name}", bias=mlp_bias)
    return tuple(rules)
