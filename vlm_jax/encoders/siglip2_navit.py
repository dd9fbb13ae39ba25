"""The vision towers of Ovis 2.5 and Qwen3-VL: SigLIP 2 at any resolution, a resampled table, 2D rotary positions."""

from flax import linen as nn

from vlm_jax import axes
from vlm_jax.encoders.packed import PackedTrunk, patches_in_blocks
from vlm_jax.layers.dense import Dense
from vlm_jax.layers.resampled_positions import Interpolation, ResampledPositions
from vlm_jax.ranges import Size
from vlm_jax.types import Grid, PackedPatches, VisualFeatures


class Siglip2NaViT(PackedTrunk, kw_only=True):
    """Packed patches, positions, `depth` pre-norm blocks: see `PackedTrunk` for its other fields.

    Features are the last block's output: Ovis 2.5 has a norm after it that it never uses. Patches of Qwen3-VL have two
    frames, its table is resized by `bilinear_corners`, and its connector also reads `levels`.

    Attributes:
      table_side: rows and columns of the position table, which is resized to every image's grid; None for no
        position embeddings.
      interpolation: how the table is resized; as in `ResampledPositions`.

    Source: Lu et al. 2025 (Ovis2.5), section 2; AIDC-AI/Ovis2.5-9B, modeling_ovis2_5.py, Siglip2NavitModel;
    Bai et al. 2025 (Qwen3-VL), section 2; transformers, models/qwen3_vl, Qwen3VLVisionModel.
    """

    table_side: Size | None = 32
    interpolation: Interpolation = "bicubic"

    def grid(self, height: int, width: int) -> Grid:
        """Rows and columns of features of one image of `height` x `width` pixels.

        Raises:
          ValueError: a side is not a multiple of a block's.
        """
        return patches_in_blocks(height, width, self.patch_size, self.merge_size)

    @nn.compact
    def __call__(self, packed: PackedPatches, *, collect: bool = False) -> VisualFeatures:
        """Encodes packed patches; `collect` also returns every block's input in `hidden`.

        Raises:
          ValueError: the patches were made or packed for another encoder.
        """
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        packed = self.checked(packed)
        x = Dense(self.width, (axes.PATCH, axes.EMBED), name="patch_embed", **settings)(packed.patches)
        if self.table_side is not None:
            table = ResampledPositions(
                self.table_side, self.width, self.param_dtype, self.interpolation, name="positions"
            )
            x = x + table(packed.positions, packed.sizes).astype(self.dtype)
        return self.encode(x, packed, collect=collect)
