"""The vision tower of MiniCPM-V 4.6: SigLIP at native resolution, whose blocks merge patches on the way."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vlm_jax import axes
from vlm_jax.encoders.packed import check_packed, patches_in_blocks
from vlm_jax.layers.block import RematPolicy
from vlm_jax.layers.dense import Dense, with_axes
from vlm_jax.layers.mlp import Activation
from vlm_jax.layers.norm import Norm
from vlm_jax.layers.saliency import Saliency
from vlm_jax.layers.square_merger import SquareMerger
from vlm_jax.layers.squares import squares
from vlm_jax.layers.windowed_stack import WindowedStack
from vlm_jax.ranges import Depth, NonNegative, PatchSide, Size
from vlm_jax.types import PADDING_SEGMENT, Dtype, Grid, PackedPatches, PatchFormat, VisualFeatures

SIDE = 2  # of the squares that are merged, and of the blocks in which features are ordered


class MergingViT(nn.Module, kw_only=True):
    """Packed patches, positions, blocks, a merger of 2x2 patches, the other blocks, and a norm.

    Images are packed in blocks of 4x4 patches, and features are in blocks of 2x2, for a connector that merges once
    more. Without merging the features are those of patches, packed in blocks of 2x2: four times as many. Parameters
    are the same in both modes; without merging those of the merger are unused.

    Attributes:
      patch_size: side of a patch in pixels.
      width: residual width.
      depth: number of blocks.
      num_heads: attention heads.
      mlp_dim: hidden width of the feed-forwards; the merger's is that of a square of patches.
      merge_after: number of blocks before the merger.
      merges: whether patches are merged.
      table_side: rows and columns of the position table, of which a patch reads the row at its place in the image.
      channels: channels of a pixel.
      activation: of the feed-forwards; the merger's is `gelu_tanh`.
      norm_epsilon: epsilon of every norm.
      saliency: as in `WindowedStack`, of the last block. For reducers; `build` sets it.
      remat: as in `TransformerStack`.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Source: transformers, models/minicpmv4_6, MiniCPMV4_6VisionModel; Tschannen et al. 2025 (SigLIP 2), section 2.
    """

    patch_size: PatchSide
    width: Size
    depth: Depth
    num_heads: Size
    mlp_dim: Size
    merge_after: Depth = 1
    merges: bool = True
    table_side: Size = 70
    channels: Size = 3
    activation: Activation = "gelu_tanh"
    norm_epsilon: NonNegative = 1e-6
    saliency: Saliency = "none"
    remat: RematPolicy = "none"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @property
    def features(self) -> int:
        """Width D_v of the features."""
        return self.width

    @property
    def num_blocks(self) -> int:
        """Blocks that are built."""
        return self.depth

    @property
    def patch_format(self) -> PatchFormat:
        """How images are patchified and packed."""
        return PatchFormat(self.patch_size, merge_size=SIDE**2 if self.merges else SIDE)

    def grid(self, height: int, width: int) -> Grid:
        """Rows and columns of features of one image of `height` x `width` pixels.

        Raises:
          ValueError: a side is not a multiple of a block's.
        """
        rows, cols = patches_in_blocks(height, width, self.patch_size, self.patch_format.merge_size)
        return (rows // SIDE, cols // SIDE) if self.merges else (rows, cols)

    @nn.compact
    def __call__(self, packed: PackedPatches) -> VisualFeatures:
        """Encodes packed patches.

        Raises:
          ValueError: the patches were made or packed for another encoder, or `merge_after` is more than `depth`.
        """
        if self.merge_after > self.depth:
            raise ValueError(f"merge_after: expected at most the depth, {self.depth}, got {self.merge_after}")
        packed = check_packed(packed, self.channels * self.patch_size**2, self.patch_format.merge_size, None)
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = Dense(self.width, (axes.PATCH, axes.EMBED), name="patch_embed", **settings)(packed.patches)
        init = with_axes(nn.initializers.normal(self.width**-0.5), axes.POSITION, axes.EMBED)
        table = self.param("positions", init, (self.table_side**2, self.width), self.param_dtype)
        # Whole on every device, since each reads any of its rows.
        table = nn.with_logical_constraint(table, (None, None))
        x = x + table[rows_of_table(packed.positions, packed.sizes, self.table_side)].astype(self.dtype)
        x = nn.with_logical_constraint(x, (axes.BATCH, axes.LENGTH, axes.ACTIVATION_EMBED))
        x, _, _ = self._stack(self.merge_after, "early_blocks")(x, packed)
        if self.merges or self.is_initializing():
            merger = SquareMerger(
                SIDE**2, self.num_heads, SIDE**2 * self.mlp_dim, self.norm_epsilon, name="merger", **settings
            )
            merged = merger(_in_squares(x, packed, self.patch_format.merge_size), packed.segment_ids)
            if self.merges:
                x = nn.with_logical_constraint(merged, (axes.BATCH, axes.LENGTH, axes.ACTIVATION_EMBED))
                packed = _of_squares(packed)
        x, _, attended = self._stack(self.depth - self.merge_after, "blocks")(x, packed)
        x = Norm("layer", self.norm_epsilon, name="final_norm", **settings)(x)
        mask = packed.segment_ids != PADDING_SEGMENT
        found = VisualFeatures(x, mask, (SIDE, x.shape[1] // SIDE), block=SIDE)
        if attended is None:
            return found
        return dataclasses.replace(found, saliency=attended.saliency, keys=attended.keys)

    def _stack(self, depth: int, name: str) -> WindowedStack:
        """Some of the blocks; the last ones tell what each token is attended to."""
        block = {
            "num_heads": self.num_heads,
            "mlp_dim": self.mlp_dim,
            "activation": self.activation,
            "norm": "layer",
            "norm_epsilon": self.norm_epsilon,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }
        saliency = self.saliency if name == "blocks" else "none"
        return WindowedStack(depth, block, saliency=saliency, remat=self.remat, name=name)


def rows_of_table(positions: Int[Array, "B N 2"], sizes: Int[Array, "B N 2"], side: int) -> Int[Array, "B N"]:
    """The row of a table of side x side cells in whose cell the upper left corner of each patch lies.

    In whole numbers, so that every platform selects the same row. The reference compares fractions, which are rounded:
    the same for its table of 70 x 70, and for some others a neighbour where a corner lies on the edge of a cell.

    Args:
      positions: (row, column) of a patch in its image.
      sizes: (rows, columns) of its image, in patches.
      side: rows and columns of the table.
    """
    cells = jnp.minimum(positions * side // jnp.maximum(sizes, 1), side - 1)
    return cells[..., 0] * side + cells[..., 1]


def _in_squares(x: Float[Array, "B N D"], packed: PackedPatches, block: int) -> Float[Array, "B N D"]:
    """Patches in blocks of block x block reordered, so that those of a square follow one another; 0 for padding."""
    mask = packed.segment_ids != PADDING_SEGMENT
    features = VisualFeatures(x, mask, (block, x.shape[1] // block), block=block)
    return squares(features, SIDE, "merging_vit")[0].reshape(x.shape)


def _of_squares(packed: PackedPatches) -> PackedPatches:
    """The same for one token of every square."""
    alone = dataclasses.replace(packed, images=None)
    return jax.tree.map(lambda leaf: leaf[:, :: SIDE**2], alone)
