"""SigLIP 2's NaFlex and Idefics2's SigLIP: a ViT on patches of images of any size and aspect ratio."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vlm_jax import axes
from vlm_jax.encoders.packed import check_packed
from vlm_jax.encoders.trunk import Trunk
from vlm_jax.layers.dense import Dense, with_axes
from vlm_jax.ranges import PatchSide, Size
from vlm_jax.types import Grid, PackedPatches, PatchFormat, VisualFeatures


class NaflexViT(Trunk, kw_only=True):
    """A `Trunk` on flattened patches; the position table is read at each patch's position in its own image.

    Unlike the other native-resolution encoders it flattens a patch as (row, column, channel), and
    expects patches in row-major order. Patches attend within their own image only, so that several images may
    share a sequence; but a pooling head pools a whole sequence, which must then hold one image.

    Attributes:
      patch_size: side of a patch in pixels.
      table_grid: rows and columns of the learned position table.
      position_interpolation: `linear`, with antialiasing (SigLIP 2), or the `nearest` row (Idefics2).
      patch_bias: a bias on the patch embedding.
      channels: channels of a pixel.

    Source: Tschannen et al. 2025 (SigLIP 2), section 2.4.2; big_vision, models/proj/image_text/naflex_vit.py;
    Laurençon et al. 2024 (Idefics2), section 3.3; transformers, models/idefics2, Idefics2VisionEmbeddings.
    """

    patch_size: PatchSide
    table_grid: tuple[Size, Size]
    position_interpolation: Literal["linear", "nearest"] = "linear"
    patch_bias: bool = True
    channels: Size = 3

    @property
    def patch_format(self) -> PatchFormat:
        """How images are patchified and packed."""
        return PatchFormat(self.patch_size, channels_last=True)

    def grid(self, height: int, width: int) -> Grid:
        """Rows and columns of patches of an image whose sides are multiples of the patch size.

        Raises:
          ValueError: they are not.
        """
        if height % self.patch_size or width % self.patch_size or min(height, width) < 1:
            raise ValueError(f"expected sides that are multiples of {self.patch_size} pixels, got {height}x{width}")
        return height // self.patch_size, width // self.patch_size

    @nn.compact
    def __call__(self, packed: PackedPatches, *, collect: bool = False) -> VisualFeatures:
        """Encodes patches of normalised pixels; the grid of the features is (1, N).

        Raises:
          ValueError: the patches were made for another encoder.
        """
        packed = check_packed(packed, self.channels * self.patch_size**2, 1, None)
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        embed = Dense(self.width, (axes.PATCH, axes.EMBED), self.patch_bias, name="patch_embed", **settings)
        init = with_axes(nn.initializers.normal(self.width**-0.5), axes.POSITION, axes.EMBED)
        table = self.param("positions", init, (self.table_grid[0] * self.table_grid[1], self.width), self.param_dtype)
        table = table.astype(jnp.float32).reshape(*self.table_grid, self.width)
        read = interpolate_table if self.position_interpolation == "linear" else nearest_of_table
        places = read(table, packed.positions, packed.sizes)
        x = embed(packed.patches) + places.astype(self.dtype)
        return self.encode(x, (1, x.shape[1]), packed.segment_ids, num_prefix=0, collect=collect)


def interpolate_table(
    table: Float[Array, "R C D"], positions: Int[Array, "B N 2"], sizes: Int[Array, "B N 2"]
) -> Float[Array, "B N D"]:
    """The table, resized to the grid of each patch's image, at the patch's position.

    Linear with antialiasing between half-pixel centres; sizes are traced, so no image size needs another
    compilation. Padding (size 0) is treated as a grid of one patch.
    """
    rows, cols = (
        _weights(positions[..., axis], jnp.maximum(sizes[..., axis], 1), table.shape[axis]) for axis in (0, 1)
    )
    weights = (rows[..., :, None] * cols[..., None, :]).reshape(*rows.shape[:2], -1)
    flat = table.reshape(-1, table.shape[-1])
    return jnp.einsum("bns,sd->bnd", weights, flat, precision=jax.lax.Precision.HIGHEST)


def _weights(index: Int[Array, "B N"], size: Int[Array, "B N"], table_size: int) -> Float[Array, "B N S"]:
    """Row `index` of the matrix that resizes `table_size` samples to `size`: a normalised triangle."""
    step = table_size / size.astype(jnp.float32)
    centre = (index.astype(jnp.float32) + 0.5) * step - 0.5
    distance = centre[..., None] - jnp.arange(table_size, dtype=jnp.float32)[None, None]
    weights = jnp.maximum(1 - jnp.abs(distance) / jnp.maximum(step, 1)[..., None], 0)
    return weights / weights.sum(-1, keepdims=True)


def nearest_of_table(
    table: Float[Array, "R C D"], positions: Int[Array, "B N 2"], sizes: Int[Array, "B N 2"]
) -> Float[Array, "B N D"]:
    """The row of the table in whose cell the upper left corner of each patch lies.

    For many sizes corners lie on cell edges, so that the result depends on rounding. Steps and edges are computed
    on the host, in the release's float32, so that every platform selects the same rows.
    """
    counts = np.arange(positions.shape[1] + 1)  # no side of an image has more patches than the sequence
    steps = jnp.asarray(np.float32(1) / np.maximum(counts, 1).astype(np.float32))

    def cells(axis: int) -> Int[Array, "B N"]:
        side = table.shape[axis]
        edges = (np.arange(1, side) * (1 / side)).astype(np.float32)
        corners = positions[..., axis].astype(jnp.float32) * steps[sizes[..., axis]]
        return jnp.searchsorted(jnp.asarray(edges), jnp.minimum(corners, np.float32(1 - 1e-6)), side="right")

    return table.reshape(-1, table.shape[-1])[cells(0) * table.shape[1] + cells(1)]
