"""MobileVLM's projectors, in released files under `model.mm_projector.`."""

from vlm_jax.checkpoints.maps.torch_layers import conv, layer_norm, linear_stack, pointwise_conv
from vlm_jax.checkpoints.rules import Rule


def ldp_rules(width: int, squeezed_dim: int) -> tuple[Rule, ...]:
    """`ldpnet` -> `LDP`; the first module of each sequence is an identity.

    Args:
      width: width of the decoder.
      squeezed_dim: hidden width of squeeze-and-excite.
    """
    rules = [*linear_stack("model.mlp", "mlp", 2, start=1)]
    for i in range(2):
        block, ours = f"model.mb_block.{i + 1}.block", f"block_{i}"
        rules += conv(f"{block}.0.0", f"{ours}/depthwise")
        rules += layer_norm(f"{block}.0.1", f"{ours}/depthwise_norm")
        rules += pointwise_conv(f"{block}.1.fc1", f"{ours}/squeeze_excite/up", width, squeezed_dim, bias=True)
        rules += pointwise_conv(f"{block}.1.fc2", f"{ours}/squeeze_excite/down", squeezed_dim, width, bias=True)
        rules += pointwise_conv(f"{block}.2.0", f"{ours}/project", width, width)
        rules += layer_norm(f"{block}.2.1", f"{ours}/project_norm")
    return tuple(rules)


def ldp_v2_rules() -> tuple[Rule, ...]:
    """`ldpnetv2` -> `LDPv2`."""
    return (*linear_stack("mlp.mlp", "mlp", 2), *conv("peg.peg.0", "positions", bias=True))
