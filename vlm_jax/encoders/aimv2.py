"""AIMv2, the vision tower of Ovis 2: RMSNorm, SwiGLU, a norm after the patch embedding."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vlm_jax import axes
from vlm_jax.encoders.last_attention import run_with_saliency
from vlm_jax.encoders.select_layer import blocks_up_to
from vlm_jax.layers.attention import Context
from vlm_jax.layers.block import RematPolicy, TransformerStack
from vlm_jax.layers.norm import Norm
from vlm_jax.layers.patch_embed import PatchEmbed
from vlm_jax.layers.position_embedding import LearnedPositions2D
from vlm_jax.layers.saliency import Saliency
from vlm_jax.ranges import Depth, Index, NonNegative, Side, Size
from vlm_jax.types import Dtype, Grid, VisualFeatures


class AIMv2(nn.Module):
    """Patch embedding, its norm, position embedding, `depth` blocks.

    Attributes:
      image_size: (height, width) in pixels of training; it determines the position table's size.
      patch_size: side of a patch in pixels.
      width: residual width.
      depth: number of blocks.
      num_heads: attention heads.
      mlp_dim: hidden width of the feed-forward.
      qkv_bias: biases on query, key and value.
      use_bias: biases on the other linear layers of the blocks.
      final_norm: normalises features after the last block. Ovis 2 does not, its port in transformers does.
      select_layer: features are hidden state number `select_layer` without the final norm: 0 is the
        embeddings, -1 the output of the last block. Later blocks are not built. None runs the
        whole model.
      norm_epsilon: epsilon of every RMSNorm.
      saliency: as in `Trunk`: the mean over the tokens of the same image, as there is no class token. For reducers;
        `build` sets it.
      remat, unroll: as in `TransformerStack`.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Source: Fini et al. 2024 (AIMv2), section 2; AIDC-AI/Ovis, ovis/model/visual_tokenizer.
    """

    image_size: tuple[Side, Side]
    patch_size: Side
    width: Size
    depth: Depth
    num_heads: Size
    mlp_dim: Size
    qkv_bias: bool = False
    use_bias: bool = False
    final_norm: bool = False
    select_layer: Index | None = None
    norm_epsilon: NonNegative = 1e-5
    saliency: Saliency = "none"
    remat: RematPolicy = "none"
    unroll: Depth = 1
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

    def grid(self, height: int, width: int) -> Grid:
        """Rows and columns of patches of an image of `height` x `width` pixels; a remainder is dropped.

        Raises:
          ValueError: the image is smaller than one patch.
        """
        grid = (height // self.patch_size, width // self.patch_size)
        if min(grid) < 1:
            raise ValueError(f"an image of {height}x{width} pixels is smaller than one patch of {self.patch_size}")
        return grid

    @nn.compact
    def __call__(self, images: Float[Array, "B height width channels"], *, collect: bool = False) -> VisualFeatures:
        """Encodes normalised pixels; `collect` also returns every block's input in `hidden`."""
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = {"kind": "rms", "epsilon": self.norm_epsilon, **settings}
        height, width = images.shape[1:3]
        x = PatchEmbed(self.patch_size, self.width, name="patch_embed", **settings)(images)
        x = Norm(name="patch_norm", **norm)(x)
        table = LearnedPositions2D(self.grid(*self.image_size), self.width, self.param_dtype, name="positions")
        x = x + table(self.grid(height, width)).astype(self.dtype)[None]
        x = nn.with_logical_constraint(x, (axes.BATCH, axes.LENGTH, axes.ACTIVATION_EMBED))
        depth = blocks_up_to(self.select_layer, self.depth)
        stack = TransformerStack(
            depth,
            {
                "num_heads": self.num_heads,
                "mlp_dim": self.mlp_dim,
                "activation": "silu",
                "gated": True,
                "norm": "rms",
                "norm_epsilon": self.norm_epsilon,
                "qkv_bias": self.qkv_bias,
                "use_bias": self.use_bias,
                **settings,
            },
            remat=self.remat,
            unroll=self.unroll,
            name="blocks",
        )
        hidden, saliency, keys = x[None] if collect else None, None, None
        if self.saliency != "none":
            if collect or not depth:
                raise ValueError("saliency is that of a last block, without collected states: leave out `collect`")
            x, saliency, keys = run_with_saliency(stack, x, Context("full"), self.saliency, class_token=False)
        elif depth:
            x, _, hidden = stack(x, Context("full"), collect=collect)
        if self.final_norm and self.select_layer is None:
            x = Norm(name="final_norm", **norm)(x)
        mask, grid = jnp.ones(x.shape[:2], bool), self.grid(height, width)
        return VisualFeatures(x, mask, grid, hidden=hidden, saliency=saliency, keys=keys)
