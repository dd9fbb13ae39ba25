"""CLIP under the names of openai/CLIP and open_clip: ViT, ModifiedResNet, text tower."""

from vlm_jax.checkpoints.maps.torch_layers import conv, fused, layer_norm, linear
from vlm_jax.checkpoints.ops import CONV2D, Reshape, Split
from vlm_jax.checkpoints.rules import Rule, prefixed

_QKV = ("query", "key", "value")


def block_rules(source: str, width: int) -> tuple[Rule, ...]:
    """Blocks with torch's `MultiheadAttention`.

    Args:
      source: template of a block's name, with `{layer}`.
      width: residual width.
    """
    target = "blocks/layers"
    heads = tuple(f"{target}/attention/{name}" for name in _QKV)
    return (
        *layer_norm(f"{source}.ln_1", f"{target}/attention_norm"),
        *fused(f"{source}.attn", heads, width, weight=".in_proj_weight", bias_name=".in_proj_bias"),
        *linear(f"{source}.attn.out_proj", f"{target}/attention/out"),
        *layer_norm(f"{source}.ln_2", f"{target}/mlp_norm"),
        *linear(f"{source}.mlp.c_fc", f"{target}/mlp/up"),
        *linear(f"{source}.mlp.c_proj", f"{target}/mlp/down"),
    )


def vit_rules(width: int, num_patches: int) -> tuple[Rule, ...]:
    """The ViT, after `visual.`."""
    return (
        Rule("conv1.weight", "patch_embed/kernel", CONV2D),
        Rule("class_embedding", "class_token", Reshape((width,), (1, width))),
        Rule("positional_embedding", ("class_position", "positions/table"), Split(0, (1, num_patches))),
        *layer_norm("ln_pre", "pre_norm"),
        *block_rules("transformer.resblocks.{layer}", width),
        *layer_norm("ln_post", "final_norm"),
        Rule("proj", "projection/kernel"),
    )


def _batch_norm(source: str, target: str) -> tuple[Rule, ...]:
    names = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "variance"}
    return tuple(Rule(f"{source}.{theirs}", f"{target}/{ours}") for theirs, ours in names.items())


def resnet_rules() -> tuple[Rule, ...]:
    """The ModifiedResNet, after `visual.`."""
    rules = []
    for i in (1, 2, 3):
        rules += [*conv(f"conv{i}", f"stem_conv{i}"), *_batch_norm(f"bn{i}", f"stem_norm{i}")]
    block, target = "layer{stage}.{block}", "stage{stage}_block{block}"
    for i in (1, 2, 3):
        rules += [
            *conv(f"{block}.conv{i}", f"{target}/conv{i}"),
            *_batch_norm(f"{block}.bn{i}", f"{target}/norm{i}"),
        ]
    names = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "c_proj": "out"}
    for theirs, ours in names.items():
        rules += linear(f"attnpool.{theirs}", f"head/attention/{ours}")
    return (
        *rules,
        *conv(f"{block}.downsample.0", f"{target}/conv_skip"),
        *_batch_norm(f"{block}.downsample.1", f"{target}/norm_skip"),
        Rule("attnpool.positional_embedding", "head/positions"),
    )


def clip_rules(vision: tuple[Rule, ...], text_width: int) -> tuple[Rule, ...]:
    """The whole model.

    Args:
      vision: rules of the image tower.
      text_width: residual width of the text tower.
    """
    text = (
        Rule("token_embedding.weight", "embedding/embedding"),
        Rule("positional_embedding", "positions"),
        *block_rules("transformer.resblocks.{layer}", text_width),
        *layer_norm("ln_final", "final_norm"),
        Rule("text_projection", "projection/kernel"),
    )
    return (
        *prefixed(vision, "visual.", "image/"),
        *prefixed(text, "", "text/"),
        Rule("logit_scale", "log_scale"),
    )
