"""Layers in depth: one module run over stacked parameters, so that compile time does not grow with their number."""

from collections.abc import Callable

from flax import linen as nn

from vlm_jax import axes
from vlm_jax.types import Tree

LOSSES = "losses"  # the collection of weighted auxiliary losses that modules sow; see `train.objectives`


def scan_layers(block: Callable[..., nn.Module], depth: int, *, in_axes: Tree, unroll: int = 1) -> Callable[..., Tree]:
    """The class of a scan over `depth` blocks; every parameter has a leading layer axis.

    Args:
      block: a Linen class (lifted by `nn.remat` or not) with `__call__(x, *inputs) -> (x, collected)`.
      depth: number of blocks, at least 1.
      in_axes: for every further input 0 where each block has its own slice, `nn.broadcast` where blocks share it.
      unroll: blocks per loop iteration.
    """
    return nn.scan(
        block,
        variable_axes={"params": 0, "intermediates": 0, LOSSES: 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=depth,
        unroll=unroll,
        metadata_params={nn.PARTITION_NAME: axes.LAYERS},
    )
