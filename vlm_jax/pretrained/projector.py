"""Projectors shared by several releases: LLaVA's `mm_projector_type`, and DeepSeek's `MlpProjector`."""

import re

from vlm_jax.checkpoints.maps.deepseek_vl import split_projector_rules
from vlm_jax.checkpoints.maps.deepseek_vl2 import projector_rules
from vlm_jax.checkpoints.maps.mobilevlm import ldp_rules, ldp_v2_rules
from vlm_jax.checkpoints.maps.torch_layers import linear, linear_stack
from vlm_jax.checkpoints.rules import Rule, prefixed
from vlm_jax.connectors.connector import Connector
from vlm_jax.connectors.hybrid_mlp import HybridMlp
from vlm_jax.connectors.ldp import LDP, squeezed_dim
from vlm_jax.connectors.ldp_v2 import LDPv2
from vlm_jax.connectors.mlp import MlpConnector
from vlm_jax.connectors.pixel_shuffle import PixelShuffle
from vlm_jax.pretrained.family import REQUIRED, PretrainedError, check_supported, with_defaults
from vlm_jax.types import Config, Dtype, Fields

# deepseek_vl/models/projector.py and deepseek_vl2/models/modeling_deepseek_vl_v2.py.
MLP_PROJECTOR_DEFAULTS: Fields = {
    "projector_type": REQUIRED,
    "input_dim": REQUIRED,
    "n_embed": REQUIRED,
    "depth": 1,
    "mlp_ratio": 1,
    "downsample_ratio": 2,
}
LDP_V2_GRID = (12, 12)  # of the release's tokens


def mm_projector(
    kind: str, features: int, where: str, *, source: str = "model.mm_projector", **dtypes: Dtype
) -> tuple[Connector, tuple[Rule, ...]]:
    """The connector and its rules.

    Args:
      kind: `linear`, `mlp<depth>x_gelu`, `ldpnet` or `ldpnetv2`.
      features: the decoder's width.
      where: name of the config for errors.
      source: prefix of the released keys.
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


def mlp_projector(config: Config, where: str, *, source: str, **dtypes: Dtype) -> tuple[Connector, tuple[Rule, ...]]:
    """The connector and its rules of DeepSeek-VL's and DeepSeek-VL2's `MlpProjector`.

    Args:
      config: the released section.
      where: name of the section for errors.
      source: prefix of the released keys.
      **dtypes: `dtype` and `param_dtype`.

    Raises:
      PretrainedError: missing settings, or an unsupported type.
    """
    settings = with_defaults(config, MLP_PROJECTOR_DEFAULTS, where)
    types = ("linear", "mlp_gelu", "low_high_hybrid_split_mlp_gelu", "downsample_mlp_gelu")
    check_supported(settings, {"projector_type": types}, where)
    kind, features, depth = settings["projector_type"], settings["n_embed"], settings["depth"]
    if kind == "linear":
        return MlpConnector(features, depth=1, **dtypes), linear(f"{source}.layers", "mlp/down")
    if kind == "mlp_gelu":
        return MlpConnector(features, depth=depth, **dtypes), linear_stack(f"{source}.layers", "mlp", depth)
    if kind == "low_high_hybrid_split_mlp_gelu":
        return HybridMlp(features, depth=depth, **dtypes), prefixed(split_projector_rules(depth), f"{source}.")
    factor, hidden_dim = settings["downsample_ratio"], int(features * settings["mlp_ratio"])
    depth = max(depth, 2)  # the release always has its first and last layer
    connector = PixelShuffle(features, factor, norm=None, mlp_dim=hidden_dim, depth=depth, **dtypes)
    rules = projector_rules(width=settings["input_dim"], factor=factor, hidden_dim=hidden_dim, depth=depth)
    return connector, prefixed(rules, f"{source}.")
