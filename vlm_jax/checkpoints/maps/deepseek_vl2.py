"""DeepSeek-VL2's down-sampling projector."""

from vlm_jax.checkpoints.maps.torch_layers import linear_stack
from vlm_jax.checkpoints.ops import LINEAR, Chain, Op, Reshape, Transpose
from vlm_jax.checkpoints.rules import Rule


def projector_rules(*, width: int, factor: int, hidden_dim: int, depth: int) -> tuple[Rule, ...]:
    """`downsample_mlp_gelu`, after its prefix -> `PixelShuffle` without a norm.

    Args:
      width: width of the vision tower's features.
      factor: side of a square, the release's downsample_ratio.
      hidden_dim: outputs of the first linear layer.
      depth: linear layers.
    """
    first, *rest = linear_stack("layers", "mlp", depth)
    return (Rule(first.source, first.target, unfolded(width, factor, hidden_dim)), *rest)


def unfolded(width: int, side: int, features: int) -> Op:
    """A torch weight on the order of `torch.nn.functional.unfold` (channel, row, column) -> (row, column, channel)."""
    window, rows = (side, side), width * side * side
    return Chain(
        LINEAR,
        Reshape((rows, features), (width, *window, features)),
        Transpose((1, 2, 0, 3)),
        Reshape((*window, width, features), (rows, features)),
    )
