"""DeepSeek-VL's SAM and projector under the names of its release; its SigLIP has those of timm."""

from vlm_jax.checkpoints.maps.sam import SEGMENT_ANYTHING, encoder_rules, neck_rules
from vlm_jax.checkpoints.maps.torch_layers import conv, linear, linear_stack
from vlm_jax.checkpoints.rules import Rule, prefixed


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
