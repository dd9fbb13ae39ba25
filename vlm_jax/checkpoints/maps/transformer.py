"""The language models of the Llama family, as transformers names them."""

from vlm_jax.checkpoints.maps.torch_layers import linear, rms_norm
from vlm_jax.checkpoints.ops import LINEAR, Shared
from vlm_jax.checkpoints.rules import Rule

_BLOCK, _OURS = "layers.{layer}", "blocks/layers"


def trunk_rules(*, qkv_bias: bool, qk_norm: bool) -> tuple[Rule, ...]:
    """Blocks and final norm, after `model.`; the settings are those of `Transformer`."""
    rules = [
        *rms_norm(f"{_BLOCK}.input_layernorm", f"{_OURS}/attention_norm"),
        *rms_norm(f"{_BLOCK}.post_attention_layernorm", f"{_OURS}/mlp_norm"),
        *linear(f"{_BLOCK}.self_attn.o_proj", f"{_OURS}/attention/out", bias=False),
        *rms_norm("norm", "final_norm"),
    ]
    for released, ours in {"q": "query", "k": "key", "v": "value"}.items():
        rules += linear(f"{_BLOCK}.self_attn.{released}_proj", f"{_OURS}/attention/{ours}", bias=qkv_bias)
    if qk_norm:
        rules += rms_norm(f"{_BLOCK}.self_attn.q_norm", f"{_OURS}/attention/query_norm")
        rules += rms_norm(f"{_BLOCK}.self_attn.k_norm", f"{_OURS}/attention/key_norm")
    for name in ("gate", "up", "down"):
        rules += linear(f"{_BLOCK}.mlp.{name}_proj", f"{_OURS}/mlp/{name}", bias=False)
    return tuple(rules)


def vocabulary_rules(embedding: str, head: str, *, tied: bool, stored: bool) -> tuple[Rule, ...]:
    """The embedding table and the head, by their whole released keys.

    Args:
      embedding: key of the table.
      head: key of the head.
      tied: whether the table is the head.
      stored: whether a tied checkpoint stores the table a second time, as the head.
    """
    table = "embedding/embedding"
    if tied and stored:
        return (Rule((embedding, head), table, Shared(2)),)
    rule = Rule(embedding, table)
    return (rule,) if tied else (rule, Rule(head, "head/kernel", LINEAR))
