"""Input shapes and position tables of a ViT, and resizing of the latter."""

import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.checkpoints.rules import SourceTensor
from vlm_jax.encoders.vit import ViT
from vlm_jax.layers.resize import resize
from vlm_jax.pretrained.family import Resize
from vlm_jax.types import Config, Fields, Params, Tree


def num_patches(vit: ViT) -> int:
    """Rows of the position table, without that of a class token."""
    if vit.image_size is None:
        return 0
    rows, cols = vit.grid(*vit.image_size)
    return rows * cols


def image_shape(vit: ViT, channels: int) -> jax.ShapeDtypeStruct:
    """Shape of one image of one patch."""
    return jax.ShapeDtypeStruct((1, vit.patch_pixels, vit.patch_pixels, channels), jnp.float32)


def left_out(vit: ViT, blocks: str) -> tuple[str, ...]:
    """Patterns of the released keys of the unused blocks after the selected layer.

    Args:
      vit: the encoder.
      blocks: prefix of a block's number in the released keys.
    """
    return tuple(re.escape(f"{blocks}{block}.") + ".*" for block in range(vit.num_blocks, vit.depth))


def resizer(
    config: Config,
    vit: ViT,
    *,
    path: Sequence[str] = (),
    size_key: Sequence[str] | None = None,
    table_key: str | None = None,
) -> Resize:
    """The `resize` of a `Description` whose only position table is a ViT's.

    Args:
      config: the released config.
      vit: the encoder, at its released size.
      path: path of its parameters.
      size_key: path of the side in pixels in the config; None if it has none.
      table_key: the released key of a table [1, rows, width] that determines the side instead.
    """

    def apply(params: Params, side: int) -> tuple[Fields, Params, dict[str, SourceTensor]]:
        changed = dict(config) if size_key is None else _replaced(config, size_key, side)
        if vit.position != "learned" or vit.image_size is None:
            return changed, params, {}
        where = (*path, "positions", "table")
        table = jnp.asarray(_at(params, where))
        square = table.reshape(*vit.grid(*vit.image_size), -1)
        resized = resize(square, vit.grid(side, side), vit.position_interpolation).reshape(-1, table.shape[-1])
        shapes: dict[str, SourceTensor] = {}
        if table_key is not None:
            shape = (1, len(resized) + vit.class_position, table.shape[-1])
            shapes[table_key] = np.broadcast_to(np.zeros((), table.dtype), shape)  # takes no memory
        return changed, _replaced(params, where, resized), shapes

    return apply


def _at(tree: Tree, path: Sequence[str]) -> Tree:
    for name in path:
        tree = tree[name]
    return tree


def _replaced(tree: Config, path: Sequence[str], value: object) -> Fields:
    """The tree with one leaf replaced or added; only dicts on its path are copied."""
    first, *rest = path
    return {**tree, first: _replaced(tree.get(first, {}), rest, value) if rest else value}
