"""DeepSeek-OCR's two encoders under the names of its release; CLIP's patch convolution is in its files, unused."""

from vlm_jax.checkpoints.maps.clip import class_position_op
from vlm_jax.checkpoints.maps.sam import SEGMENT_ANYTHING, encoder_rules
from vlm_jax.checkpoints.maps.torch_layers import conv, fused, layer_norm, linear
from vlm_jax.checkpoints.ops import Reshape
from vlm_jax.checkpoints.rules import Rule

# Released names of the convolutions after the neck, in order.
DOWNSAMPLES = ("net_2", "net_3")


def sam_rules(
    *,
    grid: tuple[int, int],
    width: int,
    neck_dim: int,
    runs: tuple[tuple[str, range], ...],
    qkv_bias: bool = True,
) -> tuple[Rule, ...]:
    """SAM and the convolutions after it, after `sam_model.`; arguments as in `sam.encoder_rules`."""
    convolutions = [conv(name, f"downsample_{number}") for number, name in enumerate(DOWNSAMPLES)]
    return (
        *encoder_rules(SEGMENT_ANYTHING, grid=grid, width=width, neck_dim=neck_dim, runs=runs, qkv_bias=qkv_bias),
        *(rule for rules in convolutions for rule in rules),
    )


def clip_rules(*, width: int, num_patches: int) -> tuple[Rule, ...]:
    """CLIP's ViT, after `vision_model.`; query, key and value are one linear layer.

    Args:
      width: residual width.
      num_patches: rows of the position table, without the class token's.
    """
    block, ours = "transformer.layers.{layer}", "blocks/layers"
    heads = tuple(f"{ours}/attention/{name}" for name in ("query", "key", "value"))
    return (
        Rule("embeddings.class_embedding", "class_token", Reshape((width,), (1, width))),
        Rule(
            "embeddings.position_embedding.weight",
            ("class_position", "positions/table"),
            class_position_op(num_patches),
        ),
        *layer_norm("pre_layrnorm", "pre_norm"),
        *layer_norm(f"{block}.layer_norm1", f"{ours}/attention_norm"),
        *fused(f"{block}.self_attn.qkv_proj", heads, width),
        *linear(f"{block}.self_attn.out_proj", f"{ours}/attention/out"),
        *layer_norm(f"{block}.layer_norm2", f"{ours}/mlp_norm"),
        *linear(f"{block}.mlp.fc1", f"{ours}/mlp/up"),
        *linear(f"{block}.mlp.fc2", f"{ours}/mlp/down"),
    )
