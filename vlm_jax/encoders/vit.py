"""The vision transformer: one module for every plain ViT, told apart by its fields."""

from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vlm_jax import axes
from vlm_jax.layers.attention import Context
from vlm_jax.layers.block import RematPolicy, TransformerStack
from vlm_jax.layers.norm import Norm
from vlm_jax.layers.patch_embed import PatchEmbed
from vlm_jax.layers.position_embedding import LearnedPositions2D, sincos_2d
from vlm_jax.types import Grid, VisualFeatures


class ViT(nn.Module):
    """Patches, positions, `depth` pre-norm blocks, a final norm.

    Attributes:
      image_size: (height, width) in pixels of training; the position table's size comes of it.
      patch_size: side of a patch in pixels.
      width: residual width D_v.
      depth: number of blocks.
      num_heads: attention heads.
      mlp_dim: hidden width of the feed-forward.
      position: `learned` or `sincos`; either is interpolated for another image size.
      activation: a name of `layers.mlp.ACTIVATIONS`.
      norm_epsilon: epsilon of every LayerNorm.
      remat, unroll: as in `TransformerStack`.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Source: Dosovitskiy et al. 2021, section 3.1; big_vision, models/vit.py.
    """

    image_size: tuple[int, int]
    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    position: Literal["learned", "sincos"] = "learned"
    activation: str = "gelu_tanh"
    norm_epsilon: float = 1e-6
    remat: RematPolicy = "none"
    unroll: int = 1
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @property
    def features(self) -> int:
        """Width D_v of the features."""
        return self.width

    def grid(self, height: int, width: int) -> Grid:
        """Rows and columns of patches of an image of `height` x `width` pixels; a rest is dropped.

        Raises:
          ValueError: not even one patch fits.
        """
        grid = (height // self.patch_size, width // self.patch_size)
        if min(grid) < 1:
            raise ValueError(f"an image of {height}x{width} pixels is smaller than one patch of {self.patch_size}")
        return grid

    @nn.compact
    def __call__(
        self, images: Float[Array, "B height width channels"], *, collect: bool = False
    ) -> VisualFeatures:
        """Encodes normalised pixels; `collect` also returns every block's input in `hidden`."""
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        grid = self.grid(*images.shape[1:3])
        x = PatchEmbed(self.patch_size, self.width, name="patch_embed", **settings)(images)
        table_grid = self.grid(*self.image_size)
        if self.position == "learned":
            positions = LearnedPositions2D(table_grid, self.width, self.param_dtype, name="positions")(grid)
        else:
            positions = jnp.asarray(sincos_2d(grid, self.width, table_grid=table_grid))
        x = x + positions.astype(self.dtype)[None]
        x = nn.with_logical_constraint(x, (axes.BATCH, axes.LENGTH, axes.ACTIVATION_EMBED))
        stack = TransformerStack(
            self.depth,
            {
                "num_heads": self.num_heads,
                "mlp_dim": self.mlp_dim,
                "activation": self.activation,
                "norm": "layer",
                "norm_epsilon": self.norm_epsilon,
                **settings,
            },
            remat=self.remat,
            unroll=self.unroll,
            name="blocks",
        )
        x, _, hidden = stack(x, Context("full"), collect=collect)
        x = Norm("layer", self.norm_epsilon, name="final_norm", **settings)(x)
        return VisualFeatures(x, jnp.ones(x.shape[:2], bool), grid, hidden=hidden)
