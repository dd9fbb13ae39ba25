"""SAM's image encoder, under the names of segment-anything and of Hugging Face."""

import dataclasses

from vlm_jax.checkpoints.maps.torch_layers import conv, fused, layer_norm, linear, pointwise_conv
from vlm_jax.checkpoints.ops import Reshape
from vlm_jax.checkpoints.rules import Rule


@dataclasses.dataclass(frozen=True)
class Names:
    """A release's names of the parts; those of attention and of the feed-forward are the same in all.

    Attributes:
      patch_embed: the convolution of the patches.
      block: one block, with the placeholder `layer`.
      norms: the two norms of a block.
      neck: convolution, norm, convolution and norm of the neck.
    """

    patch_embed: str
    block: str
    norms: tuple[str, str]
    neck: tuple[str, str, str, str]


SEGMENT_ANYTHING = Names(
    "patch_embed.proj", "blocks.{layer}", ("norm1", "norm2"), ("neck.0", "neck.1", "neck.2", "neck.3")
)
HUGGING_FACE = Names(
    "patch_embed.projection",
    "layers.{layer}",
    ("layer_norm1", "layer_norm2"),
    ("neck.conv1", "neck.layer_norm1", "neck.conv2", "neck.layer_norm2"),
)


def encoder_rules(
    names: Names,
    *,
    grid: tuple[int, int],
    width: int,
    neck_dim: int,
    runs: tuple[tuple[str, range], ...],
    qkv_bias: bool = True,
) -> tuple[Rule, ...]:
    """Patches, positions, blocks and the neck.

    Args:
      names: the release's names.
      grid: rows and columns of patches.
      width: residual width.
      neck_dim: channels of the neck.
      runs: name of every scanned stack and its blocks (`encoders.sam.block_runs`).
      qkv_bias: whether query, key and value have biases.
    """
    positions = Reshape((1, *grid, width), (grid[0] * grid[1], width))
    rules = [
        *conv(names.patch_embed, "patch_embed", bias=True),
        Rule("pos_embed", "positions/table", positions),
    ]
    for run, blocks in runs:
        rules += _block_rules(names, run, {"layer": blocks}, width, qkv_bias)
    return (*rules, *neck_rules(names.neck, "neck", width, neck_dim))


def neck_rules(sources: tuple[str, str, str, str], target: str, width: int, neck_dim: int) -> tuple[Rule, ...]:
    """Two convolutions and two norms, in the order of the forward pass."""
    project, project_norm, smooth, smooth_norm = sources
    return (
        *pointwise_conv(project, f"{target}/project", width, neck_dim),
        *layer_norm(project_norm, f"{target}/project_norm"),
        *conv(smooth, f"{target}/smooth"),
        *layer_norm(smooth_norm, f"{target}/smooth_norm"),
    )


def _block_rules(names: Names, run: str, where: dict, width: int, qkv_bias: bool) -> list[Rule]:
    attention = f"{run}/attention"
    heads = tuple(f"{attention}/{name}" for name in ("query", "key", "value"))
    return [
        *layer_norm(f"{names.block}.{names.norms[0]}", f"{run}/attention_norm", where=where),
        *fused(f"{names.block}.attn.qkv", heads, width, bias=qkv_bias, where=where),
        *linear(f"{names.block}.attn.proj", f"{attention}/out", where=where),
        Rule(f"{names.block}.attn.rel_pos_h", f"{attention}/row_distances", where=where),
        Rule(f"{names.block}.attn.rel_pos_w", f"{attention}/column_distances", where=where),
        *layer_norm(f"{names.block}.{names.norms[1]}", f"{run}/mlp_norm", where=where),
        *linear(f"{names.block}.mlp.lin1", f"{run}/mlp/up", where=where),
        *linear(f"{names.block}.mlp.lin2", f"{run}/mlp/down", where=where),
    ]
