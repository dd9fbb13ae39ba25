"""Qwen3.5's language models, under the names of their release and of transformers."""

from vlm_jax.checkpoints.maps.torch_layers import Where, linear, rms_norm, separate_experts, stacked_experts
from vlm_jax.checkpoints.ops import LINEAR, Chain, Reshape, Split, fused_linear, grouped_bias, grouped_linear
from vlm_jax.checkpoints.rules import Rule

_BLOCK = "layers.{layer}"


def block_rules(target: str, where: Where, expert_dim: int | None, *, separate: bool) -> tuple[Rule, ...]:
    """The norms and the feed-forwards of a stack of blocks, after `model.`.

    Args:
      target: the stack's blocks.
      where: their layers.
      expert_dim: hidden width of an expert, of mixtures of experts in place of the feed-forwards; None for none.
      separate: whether each expert has tensors of its own, as in files that transformers writes, or all have two, as in
        the release.
    """
    rules = [
        *rms_norm(f"{_BLOCK}.input_layernorm", f"{target}/attention_norm", where=where),
        *rms_norm(f"{_BLOCK}.post_attention_layernorm", f"{target}/mlp_norm", where=where),
    ]
    theirs, ours = f"{_BLOCK}.mlp", f"{target}/mlp"
    if expert_dim is not None:
        rules += linear(f"{theirs}.gate", f"{ours}/router", bias=False, where=where)
        both = f"{theirs}.experts", f"{ours}/experts"
        rules += separate_experts(*both, where=where) if separate else stacked_experts(*both, expert_dim, where=where)
        rules += linear(f"{theirs}.shared_expert_gate", f"{ours}/shared_gate", bias=False, where=where)
        theirs, ours = f"{theirs}.shared_expert", f"{ours}/shared"
    for name in ("gate", "up", "down"):
        rules += linear(f"{theirs}.{name}_proj", f"{ours}/{name}", bias=False, where=where)
    return tuple(rules)


def attention_rules(
    target: str, where: Where, *, width: int, num_heads: int, head_dim: int, bias: bool
) -> tuple[Rule, ...]:
    """Gated attention; of every head the released weight has the query, then the gate."""
    theirs, ours = f"{_BLOCK}.self_attn", f"{target}/attention"
    both, sizes = (f"{ours}/query", f"{ours}/gate"), (head_dim, head_dim)
    kernels, biases = (tuple(f"{name}/{kind}" for name in both) for kind in ("kernel", "bias"))
    rules = [Rule(f"{theirs}.q_proj.weight", kernels, grouped_linear(num_heads, sizes, width), where)]
    if bias:
        rules.append(Rule(f"{theirs}.q_proj.bias", biases, grouped_bias(num_heads, sizes), where))
    for released, name in {"k": "key", "v": "value", "o": "out"}.items():
        rules += linear(f"{theirs}.{released}_proj", f"{ours}/{name}", bias=bias, where=where)
    for released, name in {"q": "query", "k": "key"}.items():
        rules += rms_norm(f"{theirs}.{released}_norm", f"{ours}/{name}_norm", where=where)
    return tuple(rules)


def delta_rules(target: str, where: Where, *, keys: int, values: int, window: int) -> tuple[Rule, ...]:
    """Gated DeltaNet.

    Args:
      target, where: as in `block_rules`.
      keys, values: widths of all heads of keys, and of values.
      window: tokens that the convolution reads.
    """
    theirs, ours = f"{_BLOCK}.linear_attn", f"{target}/delta"
    names, sizes = ("query", "key", "value"), (keys, keys, values)
    channels = sum(sizes)
    convolution = Chain(Reshape((channels, 1, window), (channels, window)), LINEAR, Split(1, sizes))
    kernels, convolutions = (tuple(f"{ours}/{name}{end}" for name in names) for end in ("/kernel", "_conv"))
    rules = [
        Rule(f"{theirs}.in_proj_qkv.weight", kernels, fused_linear(*sizes), where),
        Rule(f"{theirs}.conv1d.weight", convolutions, convolution, where),
        Rule(f"{theirs}.A_log", f"{ours}/decay_log", where=where),
        Rule(f"{theirs}.dt_bias", f"{ours}/decay_bias", where=where),
        *rms_norm(f"{theirs}.norm", f"{ours}/norm", where=where),
    ]
    for released, name in {"in_proj_z": "gate", "in_proj_b": "rate", "in_proj_a": "decay", "out_proj": "out"}.items():
        rules += linear(f"{theirs}.{released}", f"{ours}/{name}", bias=False, where=where)
    return tuple(rules)
