"""S²: any encoder at several scales, large images in pieces, features concatenated along channels."""

import itertools
import math

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vlm_jax import axes
from vlm_jax.encoders.encoder import ImageEncoder
from vlm_jax.layers.resize import resize
from vlm_jax.ranges import Natural, Positive, Side, Size
from vlm_jax.types import Grid, VisualFeatures


def split_chessboard(images: Float[Array, "B h w c"], splits: Grid) -> Float[Array, "S h2 w2 c"]:
    """Cuts every image into `splits` pieces a side; the batch axis is ordered (row, column, image).

    Raises:
      ValueError: the pieces would differ in size.
    """
    batch, height, width, channels = images.shape
    if height % splits[0] or width % splits[1]:
        raise ValueError(f"{height}x{width} pixels cannot be cut into {splits[0]}x{splits[1]} equal pieces")
    x = images.reshape(batch, splits[0], height // splits[0], splits[1], width // splits[1], channels)
    x = x.transpose(1, 3, 0, 2, 4, 5)
    return x.reshape(-1, *x.shape[3:])


def merge_chessboard(maps: Float[Array, "S r c D"], splits: Grid) -> Float[Array, "B R C D"]:
    """The inverse of `split_chessboard`, for feature maps."""
    rows, cols, width = maps.shape[1:]
    x = maps.reshape(*splits, -1, rows, cols, width).transpose(2, 0, 3, 1, 4, 5)
    return x.reshape(-1, splits[0] * rows, splits[1] * cols, width)


class MultiScale(nn.Module):
    """Runs one encoder over the image at several sizes and concatenates the features' channels.

    Each scale is the image resized (bicubic, not antialiased). A scale larger than `max_split_size`
    is cut into the fewest equal pieces that are not, and their features are merged; area
    pooling resizes every scale to the grid of scale `resize_output_to`. Tokens before the encoder's
    grid, such as a class token, are averaged over the pieces and stay before it.

    Pieces of one size, of all scales, are encoded in one batch; the reference calls the encoder
    once per scale.

    Attributes:
      encoder: the encoder of each piece.
      scales: factors of the image's size, one per scale, truncated to whole pixels; empty with
        `image_sizes`.
      image_sizes: (height, width) in pixels, one per scale.
      max_split_size: side in pixels of the largest piece; the image's own height and width when None.
      resize_output_to: index of the scale whose grid is used.

    Source: Shi et al. 2024 (S²), section 3.1; s2wrapper/core.py, forward.
    """

    encoder: ImageEncoder
    scales: tuple[Size | Positive, ...]
    image_sizes: tuple[tuple[Side, Side], ...] = ()
    max_split_size: Side | None = None
    resize_output_to: Natural = 0

    @property
    def features(self) -> int:
        """Width D_v of the features."""
        return self.encoder.features * max(len(self.scales), len(self.image_sizes))

    @property
    def num_blocks(self) -> int:
        """None: those of `encoder` run several times."""
        return 0

    def sizes(self, height: int, width: int) -> tuple[tuple[int, int], ...]:
        """(height, width) in pixels of every scale of an image.

        Raises:
          ValueError: both or none of `scales` and `image_sizes` are given, `resize_output_to` is out of range, or
            the image is empty.
        """
        if min(height, width) < 1:
            raise ValueError(f"an image of {height}x{width} pixels is empty")
        if bool(self.scales) == bool(self.image_sizes):
            raise ValueError(f"give either scales or image_sizes, got {self.scales} and {self.image_sizes}")
        sizes = self.image_sizes or tuple((int(height * scale), int(width * scale)) for scale in self.scales)
        if not 0 <= self.resize_output_to < len(sizes):
            raise ValueError(f"resize_output_to: expected one of the {len(sizes)} scales, got {self.resize_output_to}")
        return sizes

    def splits(self, height: int, width: int) -> tuple[Grid, ...]:
        """Rows and columns of pieces of every scale of an image of `height` x `width` pixels.

        Raises:
          ValueError: as `sizes`, or the pieces of a scale would differ in size; lists all such scales.
        """
        largest = (height, width) if self.max_split_size is None else (self.max_split_size,) * 2
        sizes = self.sizes(height, width)
        splits = tuple((math.ceil(size[0] / largest[0]), math.ceil(size[1] / largest[1])) for size in sizes)
        if problems := [
            f"{size[0]}x{size[1]} pixels in {count[0]}x{count[1]} pieces"
            for size, count in zip(sizes, splits, strict=True)
            if size[0] % count[0] or size[1] % count[1]
        ]:
            raise ValueError(
                f"pieces of at most {largest[0]}x{largest[1]} pixels do not divide every scale: "
                f"{'; '.join(problems)}; change the scale or max_split_size"
            )
        return splits

    def grid(self, height: int, width: int) -> Grid:
        """Rows and columns of the features of an image of `height` x `width` pixels."""
        size = self.sizes(height, width)[self.resize_output_to]
        splits = self.splits(height, width)[self.resize_output_to]
        rows, cols = self.encoder.grid(size[0] // splits[0], size[1] // splits[1])
        return rows * splits[0], cols * splits[1]

    @nn.compact
    def __call__(self, images: Float[Array, "B height width channels"]) -> VisualFeatures:
        """Encodes normalised pixels."""
        batch, height, width, _ = images.shape
        sizes, splits, grid = self.sizes(height, width), self.splits(height, width), self.grid(height, width)
        pieces = [
            split_chessboard(resize(images, size, "bicubic"), count) for size, count in zip(sizes, splits, strict=True)
        ]
        maps, prefixes = [], []
        for tokens, count in zip(self._encode(pieces), splits, strict=True):
            piece_grid = self.encoder.grid(*pieces[len(maps)].shape[1:3])
            prefix, patches = jnp.split(tokens, [tokens.shape[1] - math.prod(piece_grid)], axis=1)
            merged = merge_chessboard(patches.reshape(len(patches), *piece_grid, -1), count)
            maps.append(resize(merged, grid, "area").reshape(batch, math.prod(grid), -1))
            prefixes.append(prefix.reshape(math.prod(count), batch, *prefix.shape[1:]).mean(axis=0))
        prefix = jnp.concatenate(prefixes, axis=-1)
        tokens = jnp.concatenate([prefix, jnp.concatenate(maps, axis=-1)], axis=1)
        tokens = nn.with_logical_constraint(tokens, (axes.BATCH, axes.LENGTH, axes.ACTIVATION_EMBED))
        grid = (1, tokens.shape[1]) if prefix.shape[1] else grid
        return VisualFeatures(tokens, jnp.ones(tokens.shape[:2], bool), grid)

    def _encode(self, pieces: list[Float[Array, "_ _ _ c"]]) -> list[Float[Array, "_ _ D"]]:
        """The features of every scale's pieces, one call of the encoder per piece size."""
        shapes = [piece.shape[1:3] for piece in pieces]
        found = [pieces[0]] * len(pieces)
        for shape in dict.fromkeys(shapes):
            same = [i for i, other in enumerate(shapes) if other == shape]
            tokens = self.encoder(jnp.concatenate([pieces[i] for i in same])).tokens
            ends = list(itertools.accumulate(len(pieces[i]) for i in same))[:-1]
            for i, part in zip(same, jnp.split(tokens, ends), strict=True):
                found[i] = part
        return found
