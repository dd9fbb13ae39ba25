"""The vision towers of Qwen2-VL and Qwen2.5-VL: any resolution, 2D rotary positions, optional windows."""

from flax import linen as nn

from vlm_jax import axes
from vlm_jax.encoders.packed import PackedTrunk, patches_in_blocks
from vlm_jax.layers.dense import Dense
from vlm_jax.layers.mlp import Activation
from vlm_jax.layers.norm import NormKind
from vlm_jax.ranges import Few
from vlm_jax.types import Grid, PackedPatches, VisualFeatures


class QwenViT(PackedTrunk, kw_only=True):
    """Packed patches and `depth` blocks with 2D rotary positions: see `PackedTrunk` for its fields.

    | model | fields |
    |---|---|
    | Qwen2-VL | activation `quick_gelu`, not gated, norm `layer` |
    | Qwen2.5-VL | window_size 112 and full_layers (7, 15, 23, 31) |

    There is no position table and no final norm; the release's patch merger is the connector `concat`.

    Source: Wang et al. 2024 (Qwen2-VL), section 2.1; Bai et al. 2025 (Qwen2.5-VL), section 2.1.1.
    """

    temporal_patch_size: Few = 2
    activation: Activation = "silu"
    gated: bool = True
    norm: NormKind = "rms"

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
        embed = Dense(self.width, (axes.PATCH, axes.EMBED), use_bias=False, name="patch_embed", **settings)
        return self.encode(embed(packed.patches), packed, collect=collect)
