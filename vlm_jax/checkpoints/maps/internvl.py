"""InternVL's projector, in released files under `mlp1.`."""

from vlm_jax.checkpoints.maps.torch_layers import layer_norm, linear_stack
from vlm_jax.checkpoints.rules import Rule


def projector_rules() -> tuple[Rule, ...]:
    """The names of OpenGVLab/InternVL -> `PixelShuffle`; the activation is number 2."""
    return (*layer_norm("mlp1.0", "norm"), *linear_stack("mlp1", "mlp", 2, start=1))
