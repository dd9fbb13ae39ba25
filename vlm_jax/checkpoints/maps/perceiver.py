"""Idefics2's connector, in released files under `model.connector.`."""

from vlm_jax.checkpoints.maps.torch_layers import linear, rms_norm
from vlm_jax.checkpoints.rules import Rule, prefixed

_MLP = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


def perceiver_rules() -> tuple[Rule, ...]:
    """The feed-forward to the decoder's width, and the resampler after it."""
    projection = [rule for name, ours in _MLP.items() for rule in linear(name, ours, bias=False)]
    return (
        *prefixed(projection, "modality_projection.", "projection/"),
        *prefixed(resampler_rules(), "perceiver_resampler."),
    )


def resampler_rules() -> tuple[Rule, ...]:
    """Only the resampler, under the names of its class."""
    block = "layers.{layer}"
    names = {f"self_attn.{name[0]}_proj": f"attention/{name}" for name in ("query", "key", "value")}
    names |= {"self_attn.o_proj": "attention/out"} | {f"mlp.{name}": f"mlp/{ours}" for name, ours in _MLP.items()}
    rules = [Rule("latents", "queries"), *rms_norm("norm", "final_norm")]
    for released, ours in names.items():
        rules += linear(f"{block}.{released}", f"layers/{ours}", bias=False)
    norms = {"input_latents_norm": "query_norm", "input_context_norm": "feature_norm"}
    for released, ours in (norms | {"post_attention_layernorm": "mlp_norm"}).items():
        rules += rms_norm(f"{block}.{released}", f"layers/{ours}")
    return tuple(rules)
