"""The vision tower of Ovis 2.5: SigLIP 2 at any resolution, a resampled table and 2D rotary positions."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from vlm_jax import axes
from vlm_jax.encoders.packed import check_packed, merged_grid, packed_features, window_in_blocks
from vlm_jax.encoders.select_layer import blocks_up_to
from vlm_jax.layers.block import RematPolicy
from vlm_jax.layers.dense import Dense
from vlm_jax.layers.resampled_positions import ResampledPositions
from vlm_jax.layers.rope_2d import rope_2d_angles
from vlm_jax.layers.windowed_stack import WindowedStack
from vlm_jax.types import Grid, PackedPatches, PatchFormat, VisualFeatures


class Siglip2NaViT(nn.Module):
    """Packed patches, positions, `depth` pre-norm blocks.

    Features are those of the last block as they are: Ovis 2.5 has a norm behind it that it never uses.
    Images come packed (`processors.patches.pack` with `merge_size` and `window` of this module), and so do
    features, in blocks of merge_size x merge_size neighbours.

    Attributes:
      patch_size: side of a patch in pixels.
      width: residual width.
      depth: number of blocks.
      num_heads: attention heads.
      mlp_dim: hidden width of the feed-forward.
      table_side: rows and columns of the position table, which is resized to every image; None adds no
        positions to the embeddings.
      merge_size: side in patches of the blocks in which patches and features lie.
      temporal_patch_size: frames of a patch.
      channels: colours of a pixel.
      activation: a name of `layers.mlp.ACTIVATIONS`.
      window_size: side in pixels of an attention window; None where every layer sees whole images.
      full_layers: the layers that see whole images; None for all.
      use_rope: turns queries and keys with row and column.
      select_layer: features are hidden state number `select_layer`: 0 is the embeddings, -1 the output of
        the last block. Blocks behind it are not built. None runs the whole model.
      norm_epsilon: epsilon of every LayerNorm.
      rope_theta: base of the rotary wavelengths.
      remat: as in `TransformerStack`.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Source: Lu et al. 2025 (Ovis2.5), section 2; AIDC-AI/Ovis2.5-9B, modeling_ovis2_5.py, Siglip2NavitModel.
    """

    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    table_side: int | None = 32
    merge_size: int = 2
    temporal_patch_size: int = 1
    channels: int = 3
    activation: str = "gelu_tanh"
    window_size: int | None = None
    full_layers: tuple[int, ...] | None = None
    use_rope: bool = True
    select_layer: int | None = None
    norm_epsilon: float = 1e-6
    rope_theta: float = 10_000.0
    remat: RematPolicy = "none"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @property
    def features(self) -> int:
        """Width D_v of the features."""
        return self.width

    @property
    def window(self) -> int | None:
        """Side of an attention window in blocks of merge_size x merge_size patches."""
        if self.window_size is None:
            return None
        return window_in_blocks(self.window_size, self.patch_size, self.merge_size)

    @property
    def patch_dim(self) -> int:
        """Values of a patch."""
        return self.channels * self.temporal_patch_size * self.patch_size**2

    @property
    def patch_format(self) -> PatchFormat:
        """How images are cut and packed."""
        return PatchFormat(self.patch_size, self.temporal_patch_size, self.merge_size, self.window)

    def grid(self, height: int, width: int) -> Grid:
        """Rows and columns of features of one image of `height` x `width` pixels.

        Raises:
          ValueError: the image is not made of whole blocks.
        """
        rows, cols = merged_grid(height, width, self.patch_size, self.merge_size)
        return rows * self.merge_size, cols * self.merge_size

    @nn.compact
    def __call__(self, packed: PackedPatches, *, collect: bool = False) -> VisualFeatures:
        """Encodes packed patches; `collect` also returns every block's input in `hidden`.

        Raises:
          ValueError: the patches were cut or packed for another encoder.
        """
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        packed = check_packed(packed, self.patch_dim, self.merge_size, self.window)
        x = Dense(self.width, (axes.PATCH, axes.EMBED), name="patch_embed", **settings)(packed.patches)
        if self.table_side is not None:
            table = ResampledPositions(self.table_side, self.width, self.param_dtype, name="positions")
            x = x + table(packed.positions, packed.sizes).astype(self.dtype)
        x = nn.with_logical_constraint(x, (axes.BATCH, axes.LENGTH, axes.ACTIVATION_EMBED))
        head_dim = self.width // self.num_heads
        angles = rope_2d_angles(packed.positions, head_dim, self.rope_theta) if self.use_rope else None
        depth = blocks_up_to(self.select_layer, self.depth)
        stack = WindowedStack(
            depth,
            {
                "num_heads": self.num_heads,
                "mlp_dim": self.mlp_dim,
                "activation": self.activation,
                "norm": "layer",
                "norm_epsilon": self.norm_epsilon,
                **settings,
            },
            full_layers=None if self.full_layers is None else tuple(i for i in self.full_layers if i < depth),
            remat=self.remat,
            name="blocks",
        )
        x, hidden = stack(x, packed, angles, collect=collect)
        return packed_features(x, packed, hidden, block=self.merge_size)
