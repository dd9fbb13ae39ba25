"""The projectors that LLaVA and those who took over its builder name in `mm_projector_type`."""

import re
from typing import Any

from flax import linen as nn

from vlm_jax.checkpoints.maps.mobilevlm import ldp_rules, ldp_v2_rules
from vlm_jax.checkpoints.maps.torch_layers import linear, linear_stack
from vlm_jax.checkpoints.rules import Rule, prefixed
from vlm_jax.connectors.ldp import LDP, squeezed_dim
from vlm_jax.connectors.ldp_v2 import LDPv2
from vlm_jax.connectors.mlp import MlpConnector
from vlm_jax.pretrained.family import PretrainedError

LDP_V2_GRID = (12, 12)  # of the release's tokens


def mm_projector(
    kind: str, features: int, where: str, *, source: str = "model.mm_projector", **dtypes: Any
) -> tuple[nn.Module, tuple[Rule, ...]]:
    """The connector and its rules.

    Args:
      kind: `linear`, `mlp<depth>x_gelu`, `ldpnet` or `ldpnetv2`.
      features: the decoder's width.
      where: names the config in messages.
      source: what the released keys start with.
      **dtypes: `dtype` and `param_dtype`.

    Raises:
      PretrainedError: another kind.
    """
    if kind == "linear":
        return MlpConnector(features, depth=1, **dtypes), linear(source, "mlp/down")
    if found := re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind):
        depth = int(found.group(1))
        return MlpConnector(features, depth=depth, **dtypes), linear_stack(source, "mlp", depth)
    if kind == "ldpnet":
        return LDP(features, **dtypes), prefixed(ldp_rules(features, squeezed_dim(features)), f"{source}.")
    if kind == "ldpnetv2":
        return LDPv2(features, LDP_V2_GRID, **dtypes), prefixed(ldp_v2_rules(), f"{source}.")
    known = "linear, mlp<depth>x_gelu, ldpnet, ldpnetv2"
    raise PretrainedError(f"{where}.mm_projector_type: expected one of {known}, got {kind!r}")
