"""Position tables of ViTs at another image size."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.encoders.vit import ViT
from vlm_jax.layers.resize import resize

Resize = Callable[[Any, int], tuple[dict[str, Any], Any]]


def resizer(
    config: Mapping[str, Any], vit: ViT, *, path: Sequence[str] = (), keys: Sequence[str] | None = None
) -> Resize:
    """The `resize` of a `Description` whose one table is a ViT's.

    Args:
      config: the released config.
      vit: the encoder, at its released size.
      path: where its parameters stand.
      keys: where the config holds the side in pixels; None where it does not.
    """

    def apply(params: Any, side: int) -> tuple[dict[str, Any], Any]:
        grid = vit.grid(side, side)
        changed = _replaced(config, keys, side) if keys is not None else dict(config)
        if vit.position != "learned" or vit.image_size is None:
            return changed, params
        where = (*path, "positions", "table")
        table = jnp.asarray(_at(params, where))
        square = table.reshape(*vit.grid(*vit.image_size), -1)
        resized = resize(square, grid, vit.position_interpolation).reshape(-1, table.shape[-1])
        return changed, _replaced(params, where, jax.device_get(resized))

    return apply


def _at(tree: Any, path: Sequence[str]) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def _replaced(tree: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """The tree with one leaf exchanged, or added; what is on the way is copied."""
    first, *rest = path
    return {**tree, first: _replaced(tree.get(first, {}), rest, value) if rest else value}
