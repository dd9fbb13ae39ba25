"""RICE-ViT, the vision tower of LLaVA-OneVision 1.5: any resolution, 2D rotary positions, a class token per image."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vlm_jax import axes
from vlm_jax.encoders.packed import PackedTrunk, patches_in_blocks
from vlm_jax.layers.dense import Dense, with_axes
from vlm_jax.layers.mlp import Activation
from vlm_jax.layers.norm import Norm
from vlm_jax.ranges import NonNegative
from vlm_jax.types import Grid, PackedPatches, VisualFeatures


class RiceViT(PackedTrunk, kw_only=True):
    """Packed patches and a class token, a norm, `depth` pre-norm blocks: see `PackedTrunk` for its fields.

    Every image, and every frame of a video, has a class token of its own, whose rotary angles are learned as it has no
    row and column. It is no feature: reducers rank by its attention. There is no position table and no final norm.
    Every layer attends to whole images.

    Source: Xie et al. 2025 (RICE), section 3; An et al. 2025 (LLaVA-OneVision-1.5), section 2.1;
    EvolvingLMMs-Lab/LLaVA-OneVision-1.5, modeling_llavaonevision1_5.py, RiceTransformerPretrainedModel, for single
    images: of several in a call, it returns all but the first shifted by a token, unlike rice_vision_model.py, with
    which it was trained, and which gives a video one class token in all.
    """

    activation: Activation = "gelu"
    norm_epsilon: NonNegative = 1e-5

    @property
    def class_tokens(self) -> bool:
        """True: each image has one."""
        return True

    @property
    def window(self) -> None:
        """None.

        Raises:
          ValueError: some layers have windows.
        """
        if self.window_size is not None or self.full_layers is not None:
            raise ValueError(
                "rice_vit: each class token attends to a whole image, so that no layer can have windows; leave "
                "window_size and full_layers out"
            )

    def grid(self, height: int, width: int) -> Grid:
        """Rows and columns of features of one image of `height` x `width` pixels.

        Raises:
          ValueError: a side is not a multiple of a block's.
        """
        return patches_in_blocks(height, width, self.patch_size, self.merge_size)

    def angles(self, packed: PackedPatches) -> Float[Array, "B N half"] | None:
        """Rotary angles of every place, learned for class tokens; to be called inside `__call__`."""
        angles = super().angles(packed)
        if angles is None or packed.class_tokens is None:
            return angles
        init = with_axes(nn.initializers.normal(1.0), axes.POSITION, axes.HEAD_DIM)
        own = self.param("class_angles", init, (1, angles.shape[-1]), self.param_dtype)
        return jnp.where(packed.class_tokens[..., None], own.astype(angles.dtype)[None], angles)

    @nn.compact
    def __call__(self, packed: PackedPatches, *, collect: bool = False) -> VisualFeatures:
        """Encodes packed patches; `collect` also returns every block's input in `hidden`.

        Raises:
          ValueError: the patches were made or packed for another encoder.
        """
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        packed = self.checked(packed)
        x = Dense(self.width, (axes.PATCH, axes.EMBED), use_bias=False, name="patch_embed", **settings)(packed.patches)
        init = with_axes(nn.initializers.normal(self.width**-0.5), axes.POSITION, axes.EMBED)
        own = self.param("class_token", init, (1, self.width), self.param_dtype)
        assert packed.class_tokens is not None
        x = jnp.where(packed.class_tokens[..., None], own.astype(self.dtype)[None], x)
        x = Norm(self.norm, self.norm_epsilon, name="pre_norm", **settings)(x)
        return self.encode(x, packed, collect=collect)
