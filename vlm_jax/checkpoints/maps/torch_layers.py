"""The rules of single torch layers: `weight` and `bias` under a prefix."""

import math
from collections.abc import Mapping, Sequence

from vlm_jax.checkpoints.ops import CONV2D, LINEAR, Chain, Op, Reshape, Split, Transpose, fused_linear
from vlm_jax.checkpoints.rules import Rule

Where = Mapping[str, Sequence[int]]


def linear(source: str, target: str, *, bias: bool = True, where: Where | None = None) -> tuple[Rule, ...]:
    """`torch.nn.Linear` -> `Dense`."""
    rules = (Rule(f"{source}.weight", f"{target}/kernel", LINEAR, where or {}),)
    return (*rules, Rule(f"{source}.bias", f"{target}/bias", where=where or {})) if bias else rules


def linear_stack(source: str, target: str, depth: int, *, start: int = 0) -> tuple[Rule, ...]:
    """A `torch.nn.Sequential` of `depth` linear layers with activations between them -> `Mlp`.

    Args:
      source: its name.
      target: the `Mlp`.
      depth: linear layers.
      start: index of the first one.
    """
    names = ["up", *(f"middle_{i}" for i in range(depth - 2)), "down"] if depth > 1 else ["down"]
    rules = [linear(f"{source}.{start + 2 * i}", f"{target}/{name}") for i, name in enumerate(names)]
    return tuple(rule for pair in rules for rule in pair)


def layer_norm(source: str, target: str, *, where: Where | None = None) -> tuple[Rule, ...]:
    """`torch.nn.LayerNorm` -> `Norm`."""
    return (
        Rule(f"{source}.weight", f"{target}/scale", where=where or {}),
        Rule(f"{source}.bias", f"{target}/bias", where=where or {}),
    )


def conv(source: str, target: str, *, bias: bool = False) -> tuple[Rule, ...]:
    """`torch.nn.Conv2d` -> `Conv` or `PatchEmbed`."""
    rules = (Rule(f"{source}.weight", f"{target}/kernel", CONV2D),)
    return (*rules, Rule(f"{source}.bias", f"{target}/bias")) if bias else rules


def pointwise_conv(source: str, target: str, in_dim: int, out_dim: int, *, bias: bool = False) -> tuple[Rule, ...]:
    """A `torch.nn.Conv2d` of window 1 -> `Dense`."""
    op = Chain(CONV2D, Reshape((1, 1, in_dim, out_dim), (in_dim, out_dim)))
    rules = (Rule(f"{source}.weight", f"{target}/kernel", op),)
    return (*rules, Rule(f"{source}.bias", f"{target}/bias")) if bias else rules


def fused(
    source: str,
    targets: tuple[str, ...],
    width: int,
    *,
    bias: bool = True,
    where: Where | None = None,
    weight: str = ".weight",
    bias_name: str = ".bias",
) -> tuple[Rule, ...]:
    """One weight of several concatenated linear layers of equal width -> a `Dense` each."""
    sizes = (width,) * len(targets)

    def rule(ending: str, parameter: str, op: Op) -> Rule:
        return Rule(source + ending, tuple(f"{target}/{parameter}" for target in targets), op, where or {})

    rules = (rule(weight, "kernel", fused_linear(*sizes)),)
    return (*rules, rule(bias_name, "bias", Split(0, sizes))) if bias else rules


def conv_of_patches(features: int, window: tuple[int, ...]) -> Op:
    """A torch convolution [out, channels, (frames,) rows, columns] of whole patches -> a kernel [patch, out].

    Args:
      features: outputs.
      window: the weight's other axes; patches are flattened in this order.
    """
    return Chain(Reshape((features, *window), (features, math.prod(window))), LINEAR)


def stacked_experts(source: str, target: str, expert_dim: int, *, where: Where | None = None) -> tuple[Rule, ...]:
    """Experts in two tensors, [expert, out, in] each, gate and up in the first -> `Experts`.

    Args:
      source, target: names of both.
      expert_dim: hidden width of an expert.
      where: the layers.
    """
    turned, both = Transpose((0, 2, 1)), (f"{target}/gate", f"{target}/up")
    halves = Chain(turned, Split(2, (expert_dim, expert_dim)))
    return (
        Rule(f"{source}.gate_up_proj", both, halves, where or {}),
        Rule(f"{source}.down_proj", f"{target}/down", turned, where or {}),
    )


def separate_experts(source: str, target: str, *, where: Where | None = None) -> tuple[Rule, ...]:
    """Experts in three linear layers each -> `Experts`.

    Args:
      source, target: names of all experts.
      where: the layers.
    """
    return tuple(
        Rule(f"{source}.{{expert}}.{name}_proj.weight", f"{target}/{name}", LINEAR, where or {})
        for name in ("gate", "up", "down")
    )


def rms_norm(source: str, target: str, *, where: Where | None = None) -> tuple[Rule, ...]:
    """An RMSNorm, which has only a weight -> `Norm`."""
    return (Rule(f"{source}.weight", f"{target}/scale", where=where or {}),)
