"""SAM's image encoder: windowed and global blocks, followed by the down-sampling of DeepSeek-VL."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from vlm_jax import axes
from vlm_jax.layers.attention import Context, attention
from vlm_jax.layers.block import REMAT_POLICIES, RematPolicy
from vlm_jax.layers.conv import Conv
from vlm_jax.layers.dense import Dense, with_axes
from vlm_jax.layers.mlp import Activation, Mlp
from vlm_jax.layers.norm import Norm
from vlm_jax.layers.patch_embed import PatchEmbed
from vlm_jax.layers.position_embedding import LearnedPositions2D
from vlm_jax.layers.resize import resize, resize_axis
from vlm_jax.layers.scan import scan_layers
from vlm_jax.ranges import Depth, Natural, NonNegative, Side, Size
from vlm_jax.types import Dtype, Grid, VisualFeatures

NECK_EPSILON = 1e-6


class Run(NamedTuple):
    """Consecutive blocks of one kind: block `start` up to `stop`, exclusive."""

    name: str
    start: int
    stop: int
    windowed: bool


def block_runs(depth: int, global_blocks: tuple[int, ...]) -> tuple[Run, ...]:
    """The blocks as runs of one kind, in order; a run is one scanned stack of parameters.

    The first global block is a separate run, because DeepSeek-VL reads its output.

    Raises:
      ValueError: a global block that does not exist.
    """
    if unknown := [i for i in global_blocks if not 0 <= i < depth]:
        raise ValueError(f"global blocks {unknown} do not exist: there are {depth} blocks, counted from 0")
    first = min(global_blocks, default=None)
    runs = []
    for (is_global, _), members in itertools.groupby(range(depth), lambda i: (i in global_blocks, i == first)):
        indices = list(members)
        runs.append(Run(f"run_{indices[0]}", indices[0], indices[-1] + 1, not is_global))
    return tuple(runs)


def partition_windows(x: Float[Array, "B R C D"], window: int) -> Float[Array, "W window window D"]:
    """Cuts a map into windows, in (image, row, column) order; the last ones are padded with zeros."""
    batch, rows, cols, width = x.shape
    x = jnp.pad(x, ((0, 0), (0, -rows % window), (0, -cols % window), (0, 0)))
    x = x.reshape(batch, x.shape[1] // window, window, x.shape[2] // window, window, width)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, window, window, width)


def merge_windows(windows: Float[Array, "W window window D"], grid: Grid) -> Float[Array, "B R C D"]:
    """The inverse of `partition_windows`, for maps of `grid`; padding is removed."""
    window, width = windows.shape[-2:]
    across = tuple(-(-size // window) for size in grid)
    x = windows.reshape(-1, *across, window, window, width).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(-1, across[0] * window, across[1] * window, width)
    return x[:, : grid[0], : grid[1]]


def relative_positions(
    table: Float[Array, "L H"], num_queries: int, num_keys: int
) -> Float[Array, "num_queries num_keys H"]:
    """The row of `table` for every distance between a query and a key along one axis.

    Args:
      table: embeddings of the distances; a length other than 2 * max(queries, keys) - 1 is
        interpolated linearly first.
      num_queries: positions of queries.
      num_keys: positions of keys; where the counts differ, the shorter axis is stretched.

    Source: segment-anything, image_encoder.py, get_rel_pos.
    """
    table = resize_axis(table, 0, 2 * max(num_queries, num_keys) - 1, "bilinear")
    query_step, key_step = max(num_keys / num_queries, 1.0), max(num_queries / num_keys, 1.0)
    distance = np.arange(num_queries)[:, None] * query_step - np.arange(num_keys)[None] * key_step
    return table[(distance + (num_keys - 1) * key_step).astype(int)]


class RelativeAttention(nn.Module):
    """Self-attention over a map, with decomposed relative positions.

    The logits of a query q and a key at (row, column) are q k / sqrt(H) + q r_row + q c_column: position
    terms use the unscaled query.

    Attributes:
      num_heads: heads Q.
      table_grid: (rows, columns) of the two stored tables of distances.
      qkv_bias: biases on query, key and value.
      dtype, param_dtype: as in `Dense`.

    Source: Li et al. 2022 (MViTv2), eq. 4; segment-anything, image_encoder.py, Attention.
    """

    num_heads: int
    table_grid: Grid
    qkv_bias: bool = True
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B R C D"]) -> Float[Array, "B R C D"]:
        batch, rows, cols, width = x.shape
        head_dim = width // self.num_heads
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def heads(axis, name):
            dense = Dense(width, (axes.EMBED, axis), use_bias=self.qkv_bias, name=name, **settings)
            return dense(x).reshape(batch, rows * cols, self.num_heads, head_dim)

        def positions(name, size, axis_size):
            init = with_axes(nn.initializers.zeros, axes.POSITION, axes.HEAD_DIM)
            table = self.param(name, init, (2 * size - 1, head_dim), self.param_dtype)
            return relative_positions(table.astype(self.dtype), axis_size, axis_size)

        query, key = heads(axes.HEADS, "query"), heads(axes.KV_HEADS, "key")
        on_map = query.reshape(batch, rows, cols, self.num_heads, head_dim)
        by_row = jnp.einsum("brcnh,rkh->bnrck", on_map, positions("row_distances", self.table_grid[0], rows))
        by_col = jnp.einsum("brcnh,ckh->bnrck", on_map, positions("column_distances", self.table_grid[1], cols))
        bias = by_row[..., :, None] + by_col[..., None, :]
        bias = bias.reshape(batch, self.num_heads, rows * cols, rows * cols)
        out = attention(query, key, heads(axes.KV_HEADS, "value"), Context("full"), bias=bias)
        dense = Dense(width, (axes.HEADS, axes.EMBED), name="out", **settings)
        return dense(out.reshape(batch, rows, cols, width))


class SamBlock(nn.Module):
    """A transformer block over a feature map, attending inside windows or globally.

    Attributes:
      num_heads, table_grid, qkv_bias: as in `RelativeAttention`.
      mlp_dim, activation: as in `Mlp`.
      norm_epsilon: epsilon of both norms.
      window_size: side of a window, or None for global attention. Padding is added after the norm, as
        unmasked zeros.
      collect: whether the block's input is returned as well.
      dtype, param_dtype: as in `Dense`.

    Source: Kirillov et al. 2023, appendix A; segment-anything, image_encoder.py, Block.
    """

    num_heads: int
    table_grid: Grid
    mlp_dim: int
    activation: str
    norm_epsilon: float
    qkv_bias: bool = True
    window_size: int | None = None
    collect: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B R C D"], _: None = None
    ) -> tuple[Float[Array, "B R C D"], Float[Array, "B R C D"] | None]:
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        attend = RelativeAttention(self.num_heads, self.table_grid, self.qkv_bias, name="attention", **settings)
        normed = Norm("layer", self.norm_epsilon, name="attention_norm", **settings)(x)
        if self.window_size is None:
            attended = attend(normed)
        else:
            windows = attend(partition_windows(normed, self.window_size))
            attended = merge_windows(windows, (x.shape[1], x.shape[2]))
        y = x + attended
        normed = Norm("layer", self.norm_epsilon, name="mlp_norm", **settings)(y)
        y = y + Mlp(self.mlp_dim, self.activation, name="mlp", **settings)(normed)
        return y, x if self.collect else None


class Neck(nn.Module):
    """Two convolutions without bias, 1x1 and 3x3, each with a norm over the channels."""

    features: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B R C D"]) -> Float[Array, "B R C E"]:
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = Dense(self.features, (axes.EMBED, axes.CHANNELS_IN), use_bias=False, name="project", **settings)(x)
        x = Norm("layer", NECK_EPSILON, name="project_norm", **settings)(x)
        x = Conv(self.features, window=3, padding=1, name="smooth", **settings)(x)
        return Norm("layer", NECK_EPSILON, name="smooth_norm", **settings)(x)


class SAM(nn.Module):
    """SAM's image encoder, optionally down-sampled to the low-resolution tower's grid as in DeepSeek-VL.

    Attributes:
      image_size: (height, width) in pixels of training; other sizes interpolate the position tables.
      patch_size: side of a patch in pixels.
      width: residual width.
      depth: number of blocks.
      num_heads: attention heads.
      mlp_dim: hidden width of the feed-forward.
      neck_dim: channels of the neck.
      global_blocks: indices of the blocks with global attention; the others attend inside windows.
      window_size: side of a window in patches.
      qkv_bias: biases on query, key and value.
      activation: a name of `layers.mlp.ACTIVATIONS`.
      norm_epsilon: epsilon of the blocks' norms.
      downsample_dims: output channels of the convolutions of stride 2 after the neck, one each.
      downsample_from: (rows, columns) to which the neck's map is resized bilinearly before the
        convolutions; None for no resizing.
      high_res_branch: adds a second path, scaled by the learned `high_res_scale`: the output of the
        first global block through a second neck and the same down-sampling.
      remat, unroll: as in `TransformerStack`.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Source: Kirillov et al. 2023, appendix A; Lu et al. 2024 (DeepSeek-VL), section 3.1;
    DeepSeek-VL, models/sam.py.
    """

    image_size: tuple[Side, Side]
    patch_size: Side
    width: Size
    depth: Depth
    num_heads: Size
    mlp_dim: Size
    neck_dim: Size
    global_blocks: tuple[Natural, ...]
    window_size: Side = 14
    qkv_bias: bool = True
    activation: Activation = "gelu"
    norm_epsilon: NonNegative = 1e-6
    downsample_dims: tuple[Size, ...] = ()
    downsample_from: tuple[Size, Size] | None = None
    high_res_branch: bool = False
    remat: RematPolicy = "none"
    unroll: Depth = 1
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @property
    def features(self) -> int:
        """Width D_v of the features."""
        return (self.neck_dim, *self.downsample_dims)[-1]

    @property
    def num_blocks(self) -> int:
        """Blocks that are built."""
        return self.depth

    def patch_grid(self, height: int, width: int) -> Grid:
        """Rows and columns of patches, the blocks' input; a remainder is dropped.

        Raises:
          ValueError: the image is smaller than one patch.
        """
        grid = (height // self.patch_size, width // self.patch_size)
        if min(grid) < 1:
            raise ValueError(f"an image of {height}x{width} pixels is smaller than one patch of {self.patch_size}")
        return grid

    def grid(self, height: int, width: int) -> Grid:
        """Rows and columns of the features, after the down-sampling."""
        rows, cols = self.patch_grid(height, width) if self.downsample_from is None else self.downsample_from
        for _ in self.downsample_dims:
            rows, cols = -(-rows // 2), -(-cols // 2)
        return rows, cols

    @nn.compact
    def __call__(self, images: Float[Array, "B height width channels"], *, collect: bool = False) -> VisualFeatures:
        """Encodes normalised pixels; `collect` also returns every block's input in `hidden`."""
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        table_grid, grid = self.patch_grid(*self.image_size), self.patch_grid(*images.shape[1:3])
        x = PatchEmbed(self.patch_size, self.width, name="patch_embed", **settings)(images)
        positions = LearnedPositions2D(table_grid, self.width, self.param_dtype, name="positions")(grid)
        x = (x + positions.astype(self.dtype)[None]).reshape(-1, *grid, self.width)

        inputs, first_global = [], None
        for run in block_runs(self.depth, self.global_blocks):
            x, seen = self._stack(run, table_grid, collect)(x, None)
            inputs.append(seen)
            if first_global is None and not run.windowed:
                first_global = x
        hidden = None
        if collect:
            hidden = jnp.concatenate([*inputs, x[None]]).reshape(self.depth + 1, len(images), -1, self.width)

        downsample = [
            Conv(dim, window=3, stride=2, padding=1, name=f"downsample_{i}", **settings)
            for i, dim in enumerate(self.downsample_dims)
        ]

        def out(x, name):
            x = Neck(self.neck_dim, name=name, **settings)(x)
            x = x if self.downsample_from is None else resize(x, self.downsample_from, "bilinear")
            for conv in downsample:
                x = conv(x)
            return x

        x = out(x, "neck")
        if self.high_res_branch:
            if first_global is None:
                raise ValueError("high_res_branch reads the first global block, but global_blocks is empty")
            init = with_axes(nn.initializers.zeros, axes.NORM)
            scale = self.param("high_res_scale", init, (1,), self.param_dtype).astype(self.dtype)
            x = x + out(first_global, "high_res_neck") * scale[None, None, None]
        tokens = x.reshape(len(images), -1, self.features)
        tokens = nn.with_logical_constraint(tokens, (axes.BATCH, axes.LENGTH, axes.ACTIVATION_EMBED))
        grid = self.grid(*images.shape[1:3])
        return VisualFeatures(tokens, jnp.ones(tokens.shape[:2], bool), grid, hidden=hidden)

    def _stack(self, run: Run, table_grid: Grid, collect: bool) -> nn.Module:
        """The blocks of a run, scanned."""
        block: Callable[..., nn.Module] = SamBlock
        if self.remat != "none":
            block = nn.remat(block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        length = run.stop - run.start
        scanned = scan_layers(block, length, in_axes=nn.broadcast, unroll=min(self.unroll, length))
        window = self.window_size if run.windowed else None
        return scanned(
            num_heads=self.num_heads,
            table_grid=(self.window_size, self.window_size) if run.windowed else table_grid,
            mlp_dim=self.mlp_dim,
            activation=self.activation,
            norm_epsilon=self.norm_epsilon,
            qkv_bias=self.qkv_bias,
            window_size=window,
            collect=collect,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=run.name,
        )
