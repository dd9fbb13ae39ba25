"""DeepSeek-VL's vision towers and projector under the names of its release."""

from vlm_jax.checkpoints.maps.sam import SEGMENT_ANYTHING, encoder_rules, neck_rules
from vlm_jax.checkpoints.maps.torch_layers import conv, fused, layer_norm, linear, linear_stack
from vlm_jax.checkpoints.ops import Reshape
from vlm_jax.checkpoints.rules import Rule, prefixed


def siglip_rules(*, num_patches: int, width: int) -> tuple[Rule, ...]:
    """The SigLIP tower, in timm's names -> `ViT`; there, query, key and value are one linear layer.

    Args:
      num_patches: rows of the position table.
      width: residual width.
    """
    positions = Reshape((1, num_patches, width), (num_patches, width))
    block, ours = "blocks.{layer}", "blocks/layers"
    heads = tuple(f"{ours}/attention/{name}" for name in ("query", "key", "value"))
    return (
        *conv("patch_embed.proj", "patch_embed", bias=True),
        Rule("pos_embed", "positions/table", positions),
        *layer_norm(f"{block}.norm1", f"{ours}/attention_norm"),
        *fused(f"{block}.attn.qkv", heads, width),
        *linear(f"{block}.attn.proj", f"{ours}/attention/out"),
        *layer_norm(f"{block}.norm2", f"{ours}/mlp_norm"),
        *linear(f"{block}.mlp.fc1", f"{ours}/mlp/up"),
        *linear(f"{block}.mlp.fc2", f"{ours}/mlp/down"),
        *layer_norm("norm", "final_norm"),
    )


def sam_rules(
    *,
    grid: tuple[int, int],
    width: int,
    neck_dim: int,
    num_downsamples: int,
    runs: tuple[tuple[str, range], ...],
) -> tuple[Rule, ...]:
    """The SAM tower, in segment-anything's names, with the down-sampling and the high-resolution branch.

    Args:
      grid, width, neck_dim, runs: as in `sam.encoder_rules`.
      num_downsamples: convolutions after the neck.
    """
    branch = ("neck_hd.0", "neck_hd.1", "neck_hd.2", "neck_hd.3")
    rules = [*encoder_rules(SEGMENT_ANYTHING, grid=grid, width=width, neck_dim=neck_dim, runs=runs)]
    for i in range(num_downsamples):
        rules += conv(f"downsamples.{i}", f"downsample_{i}")
    return (
        *rules,
        *neck_rules(branch, "high_res_neck", width, neck_dim),
        Rule("hd_alpha_downsamples", "high_res_scale"),
    )


def hybrid_rules(high: tuple[Rule, ...], low: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Both towers -> `Hybrid`."""
    return (
        *prefixed(high, "vision_model.vision_tower_high.vision_tower.", "high/"),
        *prefixed(low, "vision_model.vision_tower_low.vision_tower.", "low/"),
    )


def split_projector_rules(depth: int) -> tuple[Rule, ...]:
    """`low_high_hybrid_split_mlp_gelu`, after its prefix -> `HybridMlp`; the first activation is number 0."""
    return (
        *linear("high_up_proj", "high"),
        *linear("low_up_proj", "low"),
        *(linear_stack("layers", "mlp", depth - 1, start=1) if depth > 1 else ()),
    )
