"""DeepSeek-V2's language models, under the names of their release and of transformers."""

from collections.abc import Iterable

from vlm_jax.checkpoints.maps.torch_layers import Where, linear, rms_norm
from vlm_jax.checkpoints.ops import IDENTITY, LINEAR, Chain, Parallel, Permute, Split, grouped_linear
from vlm_jax.checkpoints.rules import Rule

_BLOCK = "layers.{layer}"
_GATED = ("gate", "up", "down")


def block_rules(target: str, where: Where) -> tuple[Rule, ...]:
    """The two norms of a stack of blocks, after `model.`.

    Args:
      target: the stack's blocks.
      where: their layers.
    """
    return (
        *rms_norm(f"{_BLOCK}.input_layernorm", f"{target}/attention_norm", where=where),
        *rms_norm(f"{_BLOCK}.post_attention_layernorm", f"{target}/mlp_norm", where=where),
    )


def plain_attention_rules(target: str, where: Where) -> tuple[Rule, ...]:
    """Multi-head attention, as in Llama."""
    names = {"q": "query", "k": "key", "v": "value", "o": "out"}
    rules = [
        linear(f"{_BLOCK}.self_attn.{released}_proj", f"{target}/attention/{ours}", bias=False, where=where)
        for released, ours in names.items()
    ]
    return tuple(rule for part in rules for rule in part)


def latent_attention_rules(
    target: str,
    where: Where,
    *,
    num_heads: int,
    latent_dim: int,
    content_dim: int,
    rope_dim: int,
    value_dim: int,
    query_latent: bool,
    bias: bool,
) -> tuple[Rule, ...]:
    """Latent attention; the arguments are fields of `LatentAttention`.

    Released rotary parts are interleaved (coordinate 2 i is rotated with 2 i + 1), ours are half-split.
    """
    theirs, ours = f"{_BLOCK}.self_attn", f"{target}/attention"
    turned = half_split(rope_dim)
    heads = Permute(0, per_head(num_heads, content_dim, turned))
    compressed = Chain(Split(0, (latent_dim, rope_dim)), Parallel(IDENTITY, Permute(0, turned)))
    expansions = (f"{ours}/key_expansion", f"{ours}/value_expansion")
    query = "q_b_proj" if query_latent else "q_proj"
    rules = [
        Rule(f"{theirs}.{query}.weight", f"{ours}/query/kernel", Chain(heads, LINEAR), where),
        Rule(f"{theirs}.kv_a_proj_with_mqa.weight", _both(ours, "kernel"), Chain(compressed, LINEAR), where),
        Rule(
            f"{theirs}.kv_b_proj.weight",
            expansions,
            grouped_linear(num_heads, (content_dim, value_dim), latent_dim),
            where,
        ),
        *rms_norm(f"{theirs}.kv_a_layernorm", f"{ours}/latent_norm", where=where),
        *linear(f"{theirs}.o_proj", f"{ours}/out", bias=bias, where=where),
    ]
    if bias:
        rules.append(Rule(f"{theirs}.kv_a_proj_with_mqa.bias", _both(ours, "bias"), compressed, where))
    if query_latent:
        rules += linear(f"{theirs}.q_a_proj", f"{ours}/query_latent", bias=bias, where=where)
        rules += rms_norm(f"{theirs}.q_a_layernorm", f"{ours}/query_latent_norm", where=where)
    return tuple(rules)


def dense_rules(target: str, where: Where) -> tuple[Rule, ...]:
    """The feed-forwards of layers without experts."""
    return _gated(f"{_BLOCK}.mlp", f"{target}/mlp", where)


def experts_rules(target: str, where: Where, *, shared: bool, bias: bool) -> tuple[Rule, ...]:
    """Mixtures of experts: each expert has separate released tensors, and ours are stacked.

    Args:
      target: the stack's blocks.
      where: their layers.
      shared: whether there are shared experts.
      bias: whether the router has a selection bias.
    """
    theirs, ours = f"{_BLOCK}.mlp", f"{target}/mlp"
    rules = [Rule(f"{theirs}.gate.weight", f"{ours}/router/kernel", LINEAR, where)]
    rules += [
        Rule(f"{theirs}.experts.{{expert}}.{name}_proj.weight", f"{ours}/experts/{name}", LINEAR, where)
        for name in _GATED
    ]
    if bias:
        rules.append(Rule(f"{theirs}.gate.e_score_correction_bias", f"{ours}/router/bias", where=where))
    if shared:
        rules += _gated(f"{theirs}.shared_experts", f"{ours}/shared", where)
    return tuple(rules)


def half_split(rope_dim: int) -> tuple[int, ...]:
    """The permutation from an interleaved rotary part to a half-split one."""
    return (*range(0, rope_dim, 2), *range(1, rope_dim, 2))


def per_head(num_heads: int, content_dim: int, turned: Iterable[int]) -> tuple[int, ...]:
    """The same permutation for all heads, concatenated, each starting with its content part."""
    head = (*range(content_dim), *(content_dim + i for i in turned))
    return tuple(start * len(head) + i for start in range(num_heads) for i in head)


def _both(ours: str, parameter: str) -> tuple[str, str]:
    return f"{ours}/latent/{parameter}", f"{ours}/rope_key/{parameter}"


def _gated(source: str, target: str, where: Where) -> tuple[Rule, ...]:
    rules = [linear(f"{source}.{name}_proj", f"{target}/{name}", bias=False, where=where) for name in _GATED]
    return tuple(rule for (rule,) in rules)
