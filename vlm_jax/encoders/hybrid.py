"""Two encoders on one image, one of them at a lower resolution as in DeepSeek-VL, or side by side as in Prismatic."""

from typing import Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vlm_jax import axes
from vlm_jax.encoders.encoder import ImageEncoder
from vlm_jax.layers.resize import resize
from vlm_jax.ranges import Finite, Positive, Side
from vlm_jax.types import Grid, TwoSizes, VisualFeatures

Combine = Literal["feature", "sequence", "sum", "tuple"]
ChannelStatistics = tuple[tuple[Finite, ...], tuple[Positive, ...]]


class Hybrid(nn.Module):
    """A high-resolution encoder on the image and a low-resolution one on the downscaled image.

    Both may also see the image at one size, side by side: `low_size` is then that size, and the first is `high`.

    | combine | tokens | what must agree |
    |---|---|---|
    | `feature` | channels of both, high first | grids |
    | `sequence` | tokens of both, high first; they no longer form a rectangle, so the grid is (1, N) | widths |
    | `sum` | their sum | grids and widths |
    | `tuple` | (high, low) as two `VisualFeatures`, for a connector that takes both | nothing |

    Attributes:
      high: the encoder of the image at its own size.
      low: the encoder of the image at `low_size`.
      low_size: pixels of the shorter side of the input of `low`; the longer side keeps the aspect ratio,
        truncated. Bilinear with antialiasing, before either encoder normalises.
      combine: a row of the table.
      high_statistics: (mean, standard deviation) per channel, with which `high` normalises its
        pixels; None where the processor normalises.
      low_statistics: the same for `low`. With either, pixels are in [0, 1].

    Source: Lu et al. 2024 (DeepSeek-VL), section 3.1; DeepSeek-VL, models/clip_encoder.py,
    HybridVisionTower, where `sum` is called `add`; Karamcheti et al. 2024 (Prismatic), section 4.2.
    """

    high: ImageEncoder
    low: ImageEncoder
    low_size: Side
    combine: Combine
    high_statistics: ChannelStatistics | None = None
    low_statistics: ChannelStatistics | None = None

    @property
    def features(self) -> int:
        """Width D_v of the features; for `tuple` the sum of both widths."""
        if self.combine in ("feature", "tuple"):
            return self.high.features + self.low.features
        return self.high.features

    @property
    def num_blocks(self) -> int:
        """None: each encoder has its own."""
        return 0

    def low_image_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels of the input of `low` for an image of `height` x `width` pixels."""
        shorter = min(height, width)
        return self.low_size * height // shorter, self.low_size * width // shorter

    def grid(self, height: int, width: int) -> Grid:
        """Rows and columns of the features of an image of `height` x `width` pixels; for `tuple` those of `high`.

        Raises:
          ValueError: the image is too small for an encoder, or the encoders are incompatible.
        """
        high = self.high.grid(height, width)
        low = self.low.grid(*self.low_image_size(height, width))
        if self.combine in ("feature", "sum") and high != low:
            raise ValueError(f"combine '{self.combine}' needs equal grids, got {high} (high) and {low} (low)")
        if self.combine in ("sequence", "sum") and self.high.features != self.low.features:
            raise ValueError(
                f"combine '{self.combine}' needs equal widths, got {self.high.features} (high) and "
                f"{self.low.features} (low)"
            )
        return (1, high[0] * high[1] + low[0] * low[1]) if self.combine == "sequence" else high

    @nn.compact
    def __call__(
        self, images: Float[Array, "B height width channels"] | TwoSizes
    ) -> VisualFeatures | tuple[VisualFeatures, VisualFeatures]:
        """Encodes pixels: in [0, 1] where there are statistics, else normalised.

        With `TwoSizes` the low-resolution encoder gets the second image, without resizing.
        """
        if isinstance(images, TwoSizes):
            large, small = images.high, images.low
        else:
            large, small = images, resize(images, self.low_image_size(*images.shape[1:3]), "bilinear_antialias")
        grid = self.grid(*large.shape[1:3])
        high = self.high(_normalise(large, self.high_statistics))
        low = self.low(_normalise(small, self.low_statistics))
        if self.combine == "tuple":
            return high, low
        first_dim = None
        if self.combine == "sequence":
            tokens = jnp.concatenate([high.tokens, low.tokens], axis=1)
            mask = jnp.concatenate([high.mask, low.mask], axis=1)
        else:
            mask = high.mask & low.mask
            if self.combine == "feature":
                tokens, first_dim = jnp.concatenate([high.tokens, low.tokens], axis=-1), high.tokens.shape[-1]
            else:
                tokens = high.tokens + low.tokens
        tokens = nn.with_logical_constraint(tokens, (axes.BATCH, axes.LENGTH, axes.ACTIVATION_EMBED))
        return VisualFeatures(tokens, mask, grid, first_dim=first_dim)


def _normalise(
    images: Float[Array, "B height width channels"], statistics: ChannelStatistics | None
) -> Float[Array, "B height width channels"]:
    if statistics is None:
        return images
    mean, std = (jnp.asarray(values, images.dtype)[None, None, None] for values in statistics)
    return (images - mean) / std
