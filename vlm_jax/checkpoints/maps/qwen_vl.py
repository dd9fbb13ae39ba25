"""The visual tower and the resampler of Qwen-VL (v1), in released files under `transformer.visual.`."""

from vlm_jax.checkpoints.maps.torch_layers import fused, layer_norm, linear
from vlm_jax.checkpoints.ops import CONV2D, LINEAR, grouped_bias, grouped_linear
from vlm_jax.checkpoints.rules import Rule


def encoder_rules(width: int, num_heads: int) -> tuple[Rule, ...]:
    """The ViT, whose fused query-key-value weight is ordered by head.

    Args:
      width: residual width.
      num_heads: attention heads.
    """
    block, target = "transformer.resblocks.{layer}", "blocks/layers"
    sizes = (width // num_heads,) * 3
    heads = [f"{target}/attention/{name}" for name in ("query", "key", "value")]
    kernels, biases = (tuple(f"{head}/{name}" for head in heads) for name in ("kernel", "bias"))
    return (
        Rule("conv1.weight", "patch_embed/kernel", CONV2D),
        Rule("positional_embedding", "positions/table"),
        *layer_norm("ln_pre", "pre_norm"),
        *layer_norm(f"{block}.ln_1", f"{target}/attention_norm"),
        Rule(f"{block}.attn.in_proj.weight", kernels, grouped_linear(num_heads, sizes, width)),
        Rule(f"{block}.attn.in_proj.bias", biases, grouped_bias(num_heads, sizes)),
        *linear(f"{block}.attn.out_proj", f"{target}/attention/out"),
        *layer_norm(f"{block}.ln_2", f"{target}/mlp_norm"),
        *linear(f"{block}.mlp.c_fc", f"{target}/mlp/up"),
        *linear(f"{block}.mlp.c_proj", f"{target}/mlp/down"),
    )


def resampler_rules(width: int) -> tuple[Rule, ...]:
    """Only the resampler, under the names of its class; `kv_proj` is absent where widths are equal."""
    heads = tuple(f"attention/{name}" for name in ("query", "key", "value"))
    return (
        Rule("query", "queries"),
        Rule("pos_embed", "positions"),
        Rule("kv_proj.weight", "kv_proj/kernel", LINEAR),
        *layer_norm("ln_q", "query_norm"),
        *layer_norm("ln_kv", "kv_norm"),
        *fused("attn", heads, width, weight=".in_proj_weight", bias_name=".in_proj_bias"),
        *linear("attn.out_proj", "attention/out"),
    )


def projection_rules() -> tuple[Rule, ...]:
    """The norm and the projection after the resampler, which are part of the release's tower."""
    return (*layer_norm("ln_post", "post_norm"), Rule("proj", "projection/kernel"))
