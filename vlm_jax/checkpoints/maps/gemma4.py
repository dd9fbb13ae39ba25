"""Gemma 4: the vision tower, its pooler and projection, and the blocks of its language model."""

import itertools
from collections.abc import Sequence

import numpy as np

from vlm_jax.checkpoints.maps.torch_layers import Where, linear, rms_norm, stacked_experts
from vlm_jax.checkpoints.ops import LINEAR, Chain, Parallel, Permute, Reshape, Split
from vlm_jax.checkpoints.rules import Rule

_NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "attention_post_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}


_BOUNDS = ("input_min", "input_max", "output_min", "output_max")


def tower_rules(
    *, head_dim: int, num_heads: int, num_kv_heads: int, table: int, width: int, clips: bool
) -> tuple[Rule, ...]:
    """Patches, positions and blocks of an `AxialViT`.

    Args:
      head_dim, num_heads, num_kv_heads: of the attention.
      table: rows of the position table of an axis.
      width: residual width.
      clips: whether the linear layers have bounds.
    """
    block, ours, part = "encoder.layers.{layer}", "blocks/layers", Permute(0, _order(head_dim))
    row = Chain(Split(0, (1, 1)), Parallel(*(_of_one(table, width) for _ in range(2))))
    rules = [
        *linear("patch_embedder.input_proj", "patch_embed", bias=False),
        Rule("patch_embedder.position_embedding_table", ("column_positions", "row_positions"), row),
        *linear(f"{block}.self_attn.v_proj.linear", f"{ours}/attention/value", bias=False),
        *linear(f"{block}.self_attn.o_proj.linear", f"{ours}/attention/out", bias=False),
    ]
    for released, name, count in (("q", "query", num_heads), ("k", "key", num_kv_heads)):
        turned = Chain(Permute(0, _order(head_dim, count)), LINEAR)
        rules += [
            Rule(f"{block}.self_attn.{released}_proj.linear.weight", f"{ours}/attention/{name}/kernel", turned),
            Rule(f"{block}.self_attn.{released}_norm.weight", f"{ours}/attention/{name}_norm/scale", part),
        ]
    for name in ("gate", "up", "down"):
        rules += linear(f"{block}.mlp.{name}_proj.linear", f"{ours}/mlp/{name}", bias=False)
    if clips:
        layers = {f"self_attn.{name[0]}_proj": f"attention/{name}" for name in ("query", "key", "value", "out")}
        layers |= {f"mlp.{name}_proj": f"mlp/{name}" for name in ("gate", "up", "down")}
        bounds = itertools.product(layers.items(), _BOUNDS)
        rules += [Rule(f"{block}.{theirs}.{bound}", f"{ours}/{name}/{bound}") for (theirs, name), bound in bounds]
    return (*rules, *_norm_rules(block, ours))


def pooler_rules(*, standardize: bool) -> tuple[Rule, ...]:
    """What a `BlockMean` subtracts and multiplies by, after `vision_tower.`."""
    return (Rule("std_bias", "shift"), Rule("std_scale", "spread")) if standardize else ()


def input_rules() -> tuple[Rule, ...]:
    """What every block reads of the tokens besides its input, after `model.` -> `layer_inputs`."""
    return (
        Rule("embed_tokens_per_layer.weight", "layer_inputs/table/embedding"),
        *linear("per_layer_model_projection", "layer_inputs/project", bias=False),
        *rms_norm("per_layer_projection_norm", "layer_inputs/norm"),
    )


def block_rules(
    target: str, layers: Sequence[int], *, key: bool, value: bool, bias: bool, own_input: bool
) -> tuple[Rule, ...]:
    """Some blocks of the language model, after `model.`.

    Args:
      target: their stack.
      layers: their numbers.
      key: whether they have keys and values of their own.
      value: whether values have a projection of their own.
      bias: whether the projections of the attention have biases.
      own_input: whether they read an input of their own.
    """
    block, where = "layers.{layer}", {"layer": layers}
    normed = {"q": "query"} | ({"k": "key"} if key else {})
    names = {**normed, "o": "out"} | ({"v": "value"} if key and value else {})
    rules = [Rule(f"{block}.layer_scalar", f"{target}/output_scale", where=where)]
    for released, ours in names.items():
        rules += linear(f"{block}.self_attn.{released}_proj", f"{target}/attention/{ours}", bias=bias, where=where)
    for released, ours in normed.items():
        rules += rms_norm(f"{block}.self_attn.{released}_norm", f"{target}/attention/{ours}_norm", where=where)
    for name in ("gate", "up", "down"):
        rules += linear(f"{block}.mlp.{name}_proj", f"{target}/mlp/{name}", bias=False, where=where)
    if own_input:
        rules += linear(f"{block}.per_layer_input_gate", f"{target}/own_input/gate", bias=False, where=where)
        rules += linear(f"{block}.per_layer_projection", f"{target}/own_input/out", bias=False, where=where)
        rules += rms_norm(f"{block}.post_per_layer_input_norm", f"{target}/own_input_norm", where=where)
    return (*rules, *_norm_rules(block, target, where))


def expert_rules(target: str, layers: Sequence[int], expert_dim: int) -> tuple[Rule, ...]:
    """The experts beside the feed-forwards of some blocks; arguments as in `block_rules`."""
    block, where, ours = "layers.{layer}", {"layer": layers}, f"{target}/experts_beside"
    return (
        *linear(f"{block}.router.proj", f"{ours}/router", bias=False, where=where),
        Rule(f"{block}.router.scale", f"{ours}/router_scale", where=where),
        Rule(f"{block}.router.per_expert_scale", f"{ours}/expert_scale", where=where),
        *stacked_experts(f"{block}.experts", f"{ours}/experts", expert_dim, where=where),
        *rms_norm(f"{block}.post_feedforward_layernorm_1", f"{target}/mlp_own_norm", where=where),
        *rms_norm(f"{block}.pre_feedforward_layernorm_2", f"{ours}/norm", where=where),
        *rms_norm(f"{block}.post_feedforward_layernorm_2", f"{ours}/post_norm", where=where),
    )


def _norm_rules(block: str, target: str, where: Where | None = None) -> tuple[Rule, ...]:
    found = (rms_norm(f"{block}.{theirs}", f"{target}/{ours}", where=where) for theirs, ours in _NORMS.items())
    return tuple(rule for rules in found for rule in rules)


def _of_one(rows: int, width: int) -> Reshape:
    """The table of one axis."""
    return Reshape((1, rows, width), (rows, width))


def _order(head_dim: int, num_heads: int = 1) -> tuple[int, ...]:
    """The released coordinate of each of ours.

    The release rotates the first half of a head by the column and the second by the row, each half in pairs of its own
    halves; ours are pairs of the head's halves, of which each has the column's and then the row's.
    """
    own = np.arange(head_dim).reshape(2, 2, head_dim // 4).swapaxes(0, 1).reshape(-1)
    return tuple((np.arange(num_heads)[:, None] * head_dim + own).reshape(-1).tolist())
