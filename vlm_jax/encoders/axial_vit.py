"""The vision tower of Gemma 4: a position table and rotary positions of each axis, normalised queries, keys, values."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vlm_jax import axes
from vlm_jax.encoders.packed import PackedTrunk, patches_in_blocks
from vlm_jax.layers.dense import Dense, with_axes
from vlm_jax.layers.norm import NormKind
from vlm_jax.layers.rope_2d import rope_2d_angles
from vlm_jax.ranges import Few, Positive, Size
from vlm_jax.types import Fields, Grid, PackedPatches, PatchFormat, VisualFeatures


class AxialViT(PackedTrunk, kw_only=True):
    """Packed patches, a position of each axis, `depth` blocks with norms around both halves: see `PackedTrunk`.

    The position of a patch is the sum of its row's and its column's rows of two tables, of any image size up to theirs.
    It flattens a patch as (row, column, channel). Nothing has a bias, and there is no final norm. Rotary angles are
    those of the column first: the released coordinates are permuted when they are loaded, so that column and row share
    both halves of a head.

    Attributes:
      table_length: rows of the position table of either axis, the largest number of patches along a side.
      head_dim: coordinates of a head; width / num_heads when None.
      num_kv_heads: key and value heads; num_heads when None.
      clips: the linear layers of the blocks bound their inputs and outputs, as `Dense` does.

    Source: transformers, models/gemma4, Gemma4VisionModel.
    """

    table_length: Size = 10_240
    head_dim: Size | None = None
    num_kv_heads: Size | None = None
    clips: bool = False
    gated: bool = True
    norm: NormKind = "rms_float32"
    merge_size: Few = 3
    rope_theta: Positive = 100.0

    @property
    def patch_format(self) -> PatchFormat:
        """How images are patchified and packed."""
        return PatchFormat(self.patch_size, self.temporal_patch_size, self.merge_size, self.window, channels_last=True)

    def grid(self, height: int, width: int) -> Grid:
        """Rows and columns of features of one image of `height` x `width` pixels.

        Raises:
          ValueError: a side is not a multiple of a block's.
        """
        return patches_in_blocks(height, width, self.patch_size, self.merge_size)

    def angles(self, packed: PackedPatches) -> Float[Array, "B N half"] | None:
        """Rotary angles of every place by its column and row, or None without 2D RoPE."""
        if not self.use_rope:
            return None
        head_dim = self.head_dim or self.width // self.num_heads
        return rope_2d_angles(jnp.flip(packed.positions, axis=-1), head_dim, self.rope_theta)

    def attention_fields(self) -> Fields:
        """Normalised heads, logits that are not scaled, norms of outputs, no biases, bounds of linear layers."""
        return {
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "qkv_bias": False,
            "use_bias": False,
            "qk_norm": self.norm,
            "qk_scale": 1.0,
            "value_norm": True,
            "post_norm": True,
            "clips": self.clips,
        }

    @nn.compact
    def __call__(self, packed: PackedPatches, *, collect: bool = False) -> VisualFeatures:
        """Encodes packed patches; `collect` also returns every block's input in `hidden`.

        Raises:
          ValueError: the patches were made or packed for another encoder.
        """
        packed = self.checked(packed)
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        embed = Dense(self.width, (axes.PATCH, axes.EMBED), use_bias=False, name="patch_embed", **settings)
        init = with_axes(nn.initializers.normal(self.width**-0.5), axes.POSITION, axes.EMBED)
        shape = self.table_length, self.width
        # Whole on every device, since each reads any of its rows.
        row, column = (
            nn.with_logical_constraint(self.param(f"{name}_positions", init, shape, self.param_dtype), (None, None))
            for name in ("row", "column")
        )
        places = row[packed.positions[..., 0]] + column[packed.positions[..., 1]]
        return self.encode(embed(packed.patches) + places.astype(self.dtype), packed, collect=collect)
