"""Language models of the Llama family under the names of transformers, Qwen (v1) and InternLM2."""

from typing import Literal

from vlm_jax.checkpoints.maps.torch_layers import fused, linear, rms_norm, separate_experts, stacked_experts
from vlm_jax.checkpoints.ops import IDENTITY, LINEAR, Shared, Split, grouped_linear
from vlm_jax.checkpoints.rules import Rule

_BLOCK, _OURS = "layers.{layer}", "blocks/layers"
# How a layer's experts are stored: as tensors of each; or all of them stacked, gate and up in one tensor, as [in, out]
# or as [out, in], like other layers of torch.
Experts = Literal["separate", "stacked", "stacked_out_first"]


def trunk_rules(
    *,
    qkv_bias: bool,
    out_bias: bool,
    mlp_bias: bool,
    qk_norm: bool,
    post_norm: bool = False,
    expert_dim: int | None = None,
    experts: Experts = "stacked",
) -> tuple[Rule, ...]:
    """Blocks and final norm, after `model.`; the settings are those of `Transformer`.

    Args:
      qkv_bias, out_bias, mlp_bias, qk_norm, post_norm, expert_dim: as in `Transformer`.
      experts: how those of a layer are stored.
    """
    norms = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    if post_norm:
        norms |= {"post_attention_layernorm": "attention_post_norm", "pre_feedforward_layernorm": "mlp_norm"}
        norms |= {"post_feedforward_layernorm": "mlp_post_norm"}
    rules = [
        *(rule for released, ours in norms.items() for rule in rms_norm(f"{_BLOCK}.{released}", f"{_OURS}/{ours}")),
        *linear(f"{_BLOCK}.self_attn.o_proj", f"{_OURS}/attention/out", bias=out_bias),
        *rms_norm("norm", "final_norm"),
    ]
    for released, ours in {"q": "query", "k": "key", "v": "value"}.items():
        rules += linear(f"{_BLOCK}.self_attn.{released}_proj", f"{_OURS}/attention/{ours}", bias=qkv_bias)
    if qk_norm:
        rules += rms_norm(f"{_BLOCK}.self_attn.q_norm", f"{_OURS}/attention/query_norm")
        rules += rms_norm(f"{_BLOCK}.self_attn.k_norm", f"{_OURS}/attention/key_norm")
    if expert_dim is not None:
        return (*rules, *_experts_rules(expert_dim, experts))
    for name in ("gate", "up", "down"):
        rules += linear(f"{_BLOCK}.mlp.{name}_proj", f"{_OURS}/mlp/{name}", bias=mlp_bias)
    return tuple(rules)


def _experts_rules(expert_dim: int, stored: Experts) -> tuple[Rule, ...]:
    theirs, ours = f"{_BLOCK}.mlp", f"{_OURS}/mlp"
    router = Rule(f"{theirs}.gate.weight", f"{ours}/router/kernel", LINEAR)
    if stored == "separate":
        return router, *separate_experts(f"{theirs}.experts", f"{ours}/experts")
    if stored == "stacked_out_first":
        return router, *stacked_experts(f"{theirs}.experts", f"{ours}/experts", expert_dim)
    both = (f"{ours}/experts/gate", f"{ours}/experts/up")
    return (
        router,
        Rule(f"{theirs}.experts.gate_up_proj", both, Split(2, (expert_dim, expert_dim))),
        Rule(f"{theirs}.experts.down_proj", f"{ours}/experts/down", IDENTITY),
    )


def qwen_rules(heads_width: int) -> tuple[Rule, ...]:
    """Blocks and final norm of Qwen (v1), after `transformer.`.

    Args:
      heads_width: total width of all query heads.
    """
    block = "h.{layer}"
    heads = tuple(f"{_OURS}/attention/{name}" for name in ("query", "key", "value"))
    return (
        *rms_norm(f"{block}.ln_1", f"{_OURS}/attention_norm"),
        *rms_norm(f"{block}.ln_2", f"{_OURS}/mlp_norm"),
        *fused(f"{block}.attn.c_attn", heads, heads_width),
        *linear(f"{block}.attn.c_proj", f"{_OURS}/attention/out", bias=False),
        *linear(f"{block}.mlp.w2", f"{_OURS}/mlp/gate", bias=False),
        *linear(f"{block}.mlp.w1", f"{_OURS}/mlp/up", bias=False),
        *linear(f"{block}.mlp.c_proj", f"{_OURS}/mlp/down", bias=False),
        *rms_norm("ln_f", "final_norm"),
    )


def internlm2_rules(*, width: int, num_heads: int, num_kv_heads: int) -> tuple[Rule, ...]:
    """Blocks and final norm of InternLM2, after `model.`; each key-value head follows its query heads."""
    head_dim = width // num_heads
    rows = (num_heads // num_kv_heads * head_dim, head_dim, head_dim)
    heads = tuple(f"{_OURS}/attention/{name}/kernel" for name in ("query", "key", "value"))
    return (
        *rms_norm(f"{_BLOCK}.attention_norm", f"{_OURS}/attention_norm"),
        *rms_norm(f"{_BLOCK}.ffn_norm", f"{_OURS}/mlp_norm"),
        Rule(f"{_BLOCK}.attention.wqkv.weight", heads, grouped_linear(num_kv_heads, rows, width)),
        *linear(f"{_BLOCK}.attention.wo", f"{_OURS}/attention/out", bias=False),
        *linear(f"{_BLOCK}.feed_forward.w1", f"{_OURS}/mlp/gate", bias=False),
        *linear(f"{_BLOCK}.feed_forward.w3", f"{_OURS}/mlp/up", bias=False),
        *linear(f"{_BLOCK}.feed_forward.w2", f"{_OURS}/mlp/down", bias=False),
        *rms_norm("norm", "final_norm"),
    )


def vocabulary_rules(embedding: str, head: str, *, tied: bool, stored: bool) -> tuple[Rule, ...]:
    """The embedding table and the head, by their full released keys.

    Args:
      embedding: key of the table.
      head: key of the head.
      tied: whether the table is also the head.
      stored: whether a tied checkpoint stores the table a second time, as the head.
    """
    table = "embedding/embedding"
    if tied and stored:
        return (Rule((embedding, head), table, Shared(2)),)
    rule = Rule(embedding, table)
    return (rule,) if tied else (rule, Rule(head, "head/kernel", LINEAR))
