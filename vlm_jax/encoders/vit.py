"""The vision transformer: one module for every plain ViT, configured by its fields."""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from vlm_jax import axes
from vlm_jax.encoders.resnet_stem import ResNetStem
from vlm_jax.encoders.trunk import Trunk
from vlm_jax.interpolation import ResizeKind
from vlm_jax.layers.dense import with_axes
from vlm_jax.layers.patch_embed import PatchEmbed
from vlm_jax.layers.position_embedding import LearnedPositions2D, sincos_2d
from vlm_jax.layers.rope_2d import centre_angles
from vlm_jax.ranges import Natural, Positive, Side, Size
from vlm_jax.types import Grid, VisualFeatures


class ViT(Trunk, kw_only=True):
    """Patches, positions, `depth` pre-norm blocks, a final norm, and heads: see `Trunk` for its fields.

    | model | fields |
    |---|---|
    | ViT (vision_transformer) | class_token, class_position, pooling `token`; `gap` without the class token |
    | ViT (big_vision) | class_token, pooling `token`; or pooling `map` |
    | CLIP | class_token, class_position, pre_norm, no patch_bias, `quick_gelu`, final_norm `pooled` |
    | SigLIP, SigLIP 2 | pooling `map` |
    | Idefics3, SmolVLM | position_interpolation `cell` |
    | InternViT | class_token, class_position, layer_scale, qk_norm over the width, final_norm `none` |
    | DINOv2 | class_token, class_position, layer_scale, position_interpolation `bicubic`; num_registers; gated |
    | DINOv3 | class_token, num_registers, layer_scale, no key_bias, position `rotary`; gated |
    | Qwen-VL | pre_norm, no patch_bias, final_norm `none`, position_interpolation `bicubic` |
    | DeepSeek-OCR's CLIP | as CLIP, with final_norm `none`; embeds_patches off |

    Attributes:
      image_size: (height, width) in pixels of training; it determines the position table's size. None
        where no table is learned: sin-cos positions then are patch indices, at any size. Rotary ones do not need it.
      patch_size: side of a patch in pixels, or in positions of the stem's map.
      patch_bias: a bias on the patch embedding.
      embeds_patches: whether the input is pixels; else a map [B, rows, columns, width] of embedded patches, those of
        another encoder, and `image_size` and `patch_size` are in positions of such a map.
      position: `learned`, `sincos`, `rotary` or `none`; the first two are interpolated for another image size. Rotary
        ones are of the patches' centres relative to the image, in every block; tokens before the patches have none.
      rope_theta: base of the wavelengths of rotary positions.
      position_interpolation: of a learned table, a kind of `vlm_jax.interpolation`.
      class_token: a learned token before the patches.
      class_position: a row of the position table for the class token.
      num_registers: learned tokens without a position between the class token and the patches.
      stem_layers: residual units in every stage of a ResNet in front of the patches (a hybrid; empty
        for the root alone), or None.
      stem_width: channels of that ResNet's root.

    Source: Dosovitskiy et al. 2021, section 3.1; big_vision, models/vit.py; Darcet et al. 2024 for registers.
    """

    image_size: tuple[Side, Side] | None
    patch_size: Side
    patch_bias: bool = True
    embeds_patches: bool = True
    position: Literal["learned", "sincos", "rotary", "none"] = "learned"
    rope_theta: Positive = 100.0
    position_interpolation: ResizeKind = "bicubic_antialias"
    class_token: bool = False
    class_position: bool = False
    num_registers: Natural = 0
    stem_layers: tuple[Natural, ...] | None = None
    stem_width: Size = 64

    @property
    def _stem(self) -> ResNetStem | None:
        if self.stem_layers is None:
            return None
        return ResNetStem(layers=self.stem_layers, width=self.stem_width, parent=None)

    @property
    def patch_pixels(self) -> int:
        """Side of a patch in pixels of the image, also behind a stem."""
        return self.patch_size * (1 if self._stem is None else self._stem.step)

    def grid(self, height: int, width: int) -> Grid:
        """Rows and columns of patches of an image of `height` x `width` pixels; a remainder is dropped.

        Raises:
          ValueError: the image is smaller than one patch.
        """
        rows, cols = (height, width) if self._stem is None else self._stem.map_size(height, width)
        grid = (rows // self.patch_size, cols // self.patch_size)
        if min(grid) < 1:
            raise ValueError(f"an image of {height}x{width} pixels is smaller than one patch of {self.patch_size}")
        return grid

    @nn.compact
    def __call__(self, images: Float[Array, "B height width channels"], *, collect: bool = False) -> VisualFeatures:
        """Encodes normalised pixels; `collect` also returns every block's input in `hidden`."""
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if (self.class_position or self.num_registers) and not self.class_token:
            raise ValueError("class_position and num_registers need a class token; set class_token too")
        if not self.embeds_patches and (self.patch_size != 1 or images.shape[-1] != self.width):
            raise ValueError(
                f"embeds_patches is off: expected patches embedded to {self.width} channels and patch_size 1, got "
                f"{images.shape[-1]} channels and patch_size {self.patch_size}"
            )
        grid = self.grid(*images.shape[1:3])
        x = images
        if self.stem_layers is not None:
            x = ResNetStem(layers=self.stem_layers, width=self.stem_width, name="stem", **settings)(x)
        if self.embeds_patches:
            x = PatchEmbed(self.patch_size, self.width, self.patch_bias, name="patch_embed", **settings)(x)
        else:
            x = x.reshape(x.shape[0], grid[0] * grid[1], self.width).astype(self.dtype)
        table_grid = None if self.image_size is None else self.grid(*self.image_size)
        if self.position == "learned":
            if table_grid is None:
                raise ValueError("learned positions need image_size, the image size of training")
            table = LearnedPositions2D(
                table_grid, self.width, self.param_dtype, self.position_interpolation, name="positions"
            )
            x = x + table(grid).astype(self.dtype)[None]
        elif self.position == "sincos":
            x = x + jnp.asarray(sincos_2d(grid, self.width, table_grid=table_grid)).astype(self.dtype)[None]
        if self.class_token:
            x = jnp.concatenate([self._class_token(x.shape[0]), *self._registers(x.shape[0]), x], axis=1)
        num_prefix = self.class_token + self.num_registers
        angles = self._angles(grid, num_prefix, x.shape[0]) if self.position == "rotary" else None
        return self.encode(x, grid, None, num_prefix=num_prefix, collect=collect, angles=angles)

    def _angles(self, grid: Grid, num_prefix: int, batch: int) -> Float[Array, "B T half"]:
        """Rotary angles of all tokens: those before the patches are not rotated."""
        angles = centre_angles(grid, self.width // self.num_heads, self.rope_theta)
        angles = np.pad(angles, ((num_prefix, 0), (0, 0)))
        return jnp.broadcast_to(jnp.asarray(angles)[None], (batch, *angles.shape))

    def _registers(self, batch: int) -> tuple[Float[Array, "B R D"], ...]:
        """The register tokens, where there are any."""
        if not self.num_registers:
            return ()
        init = with_axes(nn.initializers.normal(0.02), axes.POSITION, axes.EMBED)
        tokens = self.param("registers", init, (self.num_registers, self.width), self.param_dtype)
        return (jnp.broadcast_to(tokens.astype(self.dtype)[None], (batch, *tokens.shape)),)

    def _class_token(self, batch: int) -> Float[Array, "B 1 D"]:
        """The class token with its position; they are separate parameters, as in other releases."""
        init = with_axes(nn.initializers.normal(0.02), axes.POSITION, axes.EMBED)
        token = self.param("class_token", init, (1, self.width), self.param_dtype)
        if self.class_position:
            token = token + self.param("class_position", init, (1, self.width), self.param_dtype)
        return jnp.broadcast_to(token.astype(self.dtype)[None], (batch, 1, self.width))
