"""Towers and Gemma under the names of vision_transformer and of big_vision, parts separated by `/`.

Both have a separate head axis in attention (`[width, heads, head_dim]`). vision_transformer numbers
all layers of a block consecutively (`LayerNorm_0`, `MultiHeadDotProductAttention_1`, ..), big_vision each kind
from 0, and where big_vision scans over depth, its blocks are already stacked.
"""

from collections.abc import Mapping
from typing import NamedTuple

from vlm_jax.checkpoints.ops import Chain, Each, Op, Reshape, Split, Transpose
from vlm_jax.checkpoints.rules import Rule


class Sizes(NamedTuple):
    """Residual width and attention heads of a transformer."""

    width: int
    num_heads: int


class GemmaSizes(NamedTuple):
    """Sizes of Gemma or Gemma 2: residual width, blocks, width of the feed-forward, heads and their width."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


BIG_VISION = {"attention_norm": "LayerNorm_0", "attention": "MultiHeadDotProductAttention_0",
              "mlp_norm": "LayerNorm_1", "mlp": "MlpBlock_0"}  # fmt: skip
VISION_TRANSFORMER = {"attention_norm": "LayerNorm_0", "attention": "MultiHeadDotProductAttention_1",
                      "mlp_norm": "LayerNorm_2", "mlp": "MlpBlock_3"}  # fmt: skip
_MAP_HEAD = {"attention": "MultiHeadDotProductAttention_0", "norm": "LayerNorm_0", "mlp": "MlpBlock_0"}


def dense(source: str, target: str) -> tuple[Rule, ...]:
    """A Flax `Dense` or `Conv`, whose kernel has our layout."""
    return (Rule(f"{source}/kernel", f"{target}/kernel"), Rule(f"{source}/bias", f"{target}/bias"))


def layer_norm(source: str, target: str) -> tuple[Rule, ...]:
    """A Flax `LayerNorm`."""
    return (Rule(f"{source}/scale", f"{target}/scale"), Rule(f"{source}/bias", f"{target}/bias"))


def _attention(source: str, target: str, sizes: Sizes, scanned: bool) -> tuple[Rule, ...]:
    width, heads = sizes
    split = (heads, width // heads)

    def rule(name: str, shape: tuple[int, ...], flat: tuple[int, ...]) -> Rule:
        op: Op = Reshape(shape, flat)
        return Rule(f"{source}/{name}", f"{target}/{name}", Each(op) if scanned else op)

    rules = [
        rule("out/kernel", (*split, width), (width, width)),
        Rule(f"{source}/out/bias", f"{target}/out/bias"),
    ]
    for name in ("query", "key", "value"):
        rules += [
            rule(f"{name}/kernel", (width, *split), (width, width)),
            rule(f"{name}/bias", split, (width,)),
        ]
    return tuple(rules)


def _mlp(source: str, target: str) -> tuple[Rule, ...]:
    return (*dense(f"{source}/Dense_0", f"{target}/up"), *dense(f"{source}/Dense_1", f"{target}/down"))


def encoder_rules(source: str, sizes: Sizes, names: Mapping[str, str], *, scanned: bool) -> tuple[Rule, ...]:
    """Blocks and the norm after them.

    Args:
      source: the encoder's name: `Transformer` or `Encoder_0`.
      sizes: sizes of its blocks.
      names: `BIG_VISION` or `VISION_TRANSFORMER`.
      scanned: whether the release stacks its blocks.
    """
    block = f"{source}/encoderblock" if scanned else f"{source}/encoderblock_{{layer}}"
    target = "blocks/layers"
    return (
        *layer_norm(f"{block}/{names['attention_norm']}", f"{target}/attention_norm"),
        *_attention(f"{block}/{names['attention']}", f"{target}/attention", sizes, scanned),
        *layer_norm(f"{block}/{names['mlp_norm']}", f"{target}/mlp_norm"),
        *_mlp(f"{block}/{names['mlp']}", f"{target}/mlp"),
        *layer_norm(f"{source}/encoder_norm", "final_norm"),
    )


def map_head_rules(sizes: Sizes) -> tuple[Rule, ...]:
    """The attention-pooling head."""
    source = "MAPHead_0"
    return (
        Rule(f"{source}/probe", "head/probe", Reshape((1, 1, sizes.width), (1, sizes.width))),
        *_attention(f"{source}/{_MAP_HEAD['attention']}", "head/attention", sizes, False),
        *layer_norm(f"{source}/{_MAP_HEAD['norm']}", "head/norm"),
        *_mlp(f"{source}/{_MAP_HEAD['mlp']}", "head/mlp"),
    )


def vit_rules(sizes: Sizes, num_positions: int, *, scanned: bool) -> tuple[Rule, ...]:
    """A ViT of big_vision, with all its optional heads.

    Args:
      sizes: sizes of its blocks.
      num_positions: rows of the position table.
      scanned: whether the release stacks its blocks.
    """
    width = sizes.width
    return (
        *dense("embedding", "patch_embed"),
        Rule("pos_embedding", "positions/table", Reshape((1, num_positions, width), (num_positions, width))),
        Rule("cls", "class_token", Reshape((1, 1, width), (1, width))),
        *encoder_rules("Transformer", sizes, BIG_VISION, scanned=scanned),
        *map_head_rules(sizes),
        *dense("pre_logits", "representation"),
    )


def naflex_rules(sizes: Sizes, table_side: int, *, scanned: bool) -> tuple[Rule, ...]:
    """A NaFlex ViT of big_vision, with all its optional heads."""
    positions = Reshape((table_side, table_side, sizes.width), (table_side**2, sizes.width))
    return (
        *dense("embedding", "patch_embed"),
        Rule("pos_embedding", "positions", positions),
        *encoder_rules("Transformer", sizes, BIG_VISION, scanned=scanned),
        *map_head_rules(sizes),
        *dense("pre_logits", "representation"),
    )


def text_rules(sizes: Sizes, context_length: int, *, scanned: bool) -> tuple[Rule, ...]:
    """A text tower of big_vision, with all its optional heads."""
    positions = Reshape((1, context_length, sizes.width), (context_length, sizes.width))
    return (
        Rule("Embed_0/embedding", "embedding/embedding"),
        Rule("pos_embedding", "positions", positions),
        *encoder_rules("Encoder_0", sizes, BIG_VISION, scanned=scanned),
        *map_head_rules(sizes),
        *dense("head", "projection"),
    )


def two_tower_rules() -> tuple[Rule, ...]:
    """Temperature (stored as a logarithm) and bias."""
    return (Rule("t", "log_scale", Reshape((1,), ())), Rule("b", "bias", Reshape((1,), ())))


def gemma_rules(sizes: GemmaSizes, *, post_norms: bool, scanned: bool) -> tuple[Rule, ...]:
    """Gemma, or with `post_norms` Gemma 2, whose table is also the head; targets are those of a `Transformer`.

    Args:
      sizes: of the model.
      post_norms: whether the outputs of attention and feed-forward have norms too.
      scanned: whether the release stacks its blocks.

    Source: big_vision, models/ppp/gemma.py.
    """
    width, depth, mlp_dim, heads, kv_heads, head_dim = sizes
    lead = (depth,) if scanned else ()
    axis = len(lead)  # the first one of a block's own
    source, target = "layers" if scanned else "layers/{layer}", "blocks/layers"

    def pair(parts: int, *shape: int) -> Op:
        """Divides [parts, *shape] of a block into `parts` arrays of `shape`."""
        return Chain(Split(axis, (1,) * parts), Reshape((*lead, 1, *shape), (*lead, *shape)))

    def into(count: int) -> Op:
        """[heads, width, head_dim] of a block -> [width, heads * head_dim]."""
        swapped = Transpose((*range(axis), axis + 1, axis, axis + 2))
        return Chain(swapped, Reshape((*lead, width, count, head_dim), (*lead, width, count * head_dim)))

    query, key, value = (f"{target}/attention/{name}/kernel" for name in ("query", "key", "value"))
    if heads == kv_heads:
        all_three = Chain(pair(3, heads, width, head_dim), into(heads))
        attention = [Rule(f"{source}/attn/qkv_einsum/w", (query, key, value), all_three)]
    else:
        both = Chain(pair(2, kv_heads, width, head_dim), into(kv_heads))
        attention = [
            Rule(f"{source}/attn/q_einsum/w", query, into(heads)),
            Rule(f"{source}/attn/kv_einsum/w", (key, value), both),
        ]
    norms = {"pre_attention_norm": "attention_norm", "pre_ffw_norm": "mlp_norm"}
    if post_norms:
        norms |= {"post_attention_norm": "attention_post_norm", "post_ffw_norm": "mlp_post_norm"}
    out = Reshape((*lead, heads, head_dim, width), (*lead, heads * head_dim, width))
    gates = (f"{target}/mlp/gate/kernel", f"{target}/mlp/up/kernel")
    return (
        Rule("embedder/input_embedding", "embedding/embedding"),
        *attention,
        Rule(f"{source}/attn/attn_vec_einsum/w", f"{target}/attention/out/kernel", out),
        Rule(f"{source}/mlp/gating_einsum", gates, pair(2, width, mlp_dim)),
        Rule(f"{source}/mlp/linear", f"{target}/mlp/down/kernel"),
        *(Rule(f"{source}/{theirs}/scale", f"{target}/{ours}/scale") for theirs, ours in norms.items()),
        Rule("final_norm/scale", "final_norm/scale"),
    )


def vision_transformer_rules(sizes: Sizes, num_positions: int, *, class_token: bool) -> tuple[Rule, ...]:
    """A ViT of vision_transformer; with a class token the first row of the position table is the class token's.

    Args:
      sizes: sizes of its blocks.
      num_positions: rows of the position table, including that of the class token.
      class_token: whether there is one.
    """
    width = sizes.width
    source = "Transformer/posembed_input/pos_embedding"
    flat = Reshape((1, num_positions, width), (num_positions, width))
    positions = Rule(source, "positions/table", flat)
    if class_token:
        op = Chain(flat, Split(0, (1, num_positions - 1)))
        positions = Rule(source, ("class_position", "positions/table"), op)
    return (
        *dense("embedding", "patch_embed"),
        Rule("cls", "class_token", Reshape((1, 1, width), (1, width))),
        positions,
        *encoder_rules("Transformer", sizes, VISION_TRANSFORMER, scanned=False),
        *dense("pre_logits", "representation"),
    )


def resnet_stem_rules(width: int, num_stages: int) -> tuple[Rule, ...]:
    """The ResNet of a hybrid of vision_transformer, whose GroupNorms are stored as [1, 1, 1, channels]."""

    def norm(source: str, target: str, channels: int) -> tuple[Rule, ...]:
        op = Reshape((1, 1, 1, channels), (channels,))
        return tuple(Rule(f"{source}/{name}", f"{target}/{name}", op) for name in ("scale", "bias"))

    rules = [Rule("conv_root/kernel", "conv_root/kernel"), *norm("gn_root", "norm_root", width)]
    for stage in range(1, num_stages + 1):
        inner = width * 2 ** (stage - 1)
        unit, target = f"block{stage}/unit{{unit}}", f"stage{stage}_unit{{unit}}"
        for ours, theirs in (("skip", "proj"), ("1", "1"), ("2", "2"), ("3", "3")):
            joint = "_" if ours == "skip" else ""
            channels = inner if ours in "12" else 4 * inner
            rules += [
                Rule(f"{unit}/conv{joint}{theirs}/kernel", f"{target}/conv{joint}{ours}/kernel"),
                *norm(f"{unit}/gn{joint}{theirs}", f"{target}/norm{joint}{ours}", channels),
            ]
    return tuple(rules)
