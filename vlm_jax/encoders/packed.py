"""Base of the encoders of packed patches: blocks, input checks, grid and output."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from vlm_jax import axes
from vlm_jax.encoders.select_layer import blocks_up_to
from vlm_jax.layers.block import RematPolicy
from vlm_jax.layers.mlp import Activation
from vlm_jax.layers.norm import NormKind
from vlm_jax.layers.rope_2d import rope_2d_angles
from vlm_jax.layers.saliency import Saliency
from vlm_jax.layers.windowed_stack import WindowedStack, restore_order
from vlm_jax.ranges import Depth, Few, Index, Natural, NonNegative, PatchSide, Positive, Size
from vlm_jax.types import PADDING_SEGMENT, Dtype, Fields, Grid, PackedPatches, PatchFormat, VisualFeatures


class PackedTrunk(nn.Module, kw_only=True):
    """Embedded patches through pre-norm blocks with 2D rotary positions, some of them in windows; subclasses embed.

    Images and features are packed (`processors.patches.pack_patches` with `merge_size` and `window` of the module),
    in blocks of merge_size x merge_size neighbours.

    Attributes:
      patch_size: side of a patch in pixels.
      width: residual width.
      depth: number of blocks.
      num_heads: attention heads.
      mlp_dim: hidden width of the feed-forward.
      temporal_patch_size: frames of a patch; an image is repeated.
      channels: channels of a pixel.
      activation, gated: as in `layers.mlp.Mlp`.
      norm: kind of every norm.
      norm_epsilon: epsilon of every norm.
      merge_size: side in patches of the blocks in which patches and features are ordered.
      window_size: side in pixels of an attention window; None where every layer attends to whole images.
      full_layers: the layers that attend to whole images; None for all.
      select_layer: features are hidden state number `select_layer`: 0 is the embeddings, -1 the output of
        the last block. Later blocks are not built. None runs the whole model.
      levels: hidden states, numbered as in `select_layer` and in ascending order, to concatenate in
        `VisualFeatures.levels`, for connectors that read several; empty for none.
      use_rope: applies 2D RoPE to queries and keys.
      rope_theta: base of the rotary wavelengths.
      saliency: as in `WindowedStack`. For reducers; `build` sets it.
      remat: as in `TransformerStack`.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.
    """

    patch_size: PatchSide
    width: Size
    depth: Depth
    num_heads: Size
    mlp_dim: Size
    temporal_patch_size: Few = 1
    channels: Size = 3
    activation: Activation = "gelu_tanh"
    gated: bool = False
    norm: NormKind = "layer"
    norm_epsilon: NonNegative = 1e-6
    merge_size: Few = 2
    window_size: Natural | None = None
    full_layers: tuple[Natural, ...] | None = None
    select_layer: Index | None = None
    levels: tuple[Index, ...] = ()
    use_rope: bool = True
    rope_theta: Positive = 10_000.0
    saliency: Saliency = "none"
    remat: RematPolicy = "none"
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

    @property
    def window(self) -> int | None:
        """Side of an attention window in blocks of merge_size x merge_size patches."""
        if self.window_size is None:
            return None
        return window_in_blocks(self.window_size, self.patch_size, self.merge_size)

    @property
    def patch_dim(self) -> int:
        """Number of values in a patch."""
        return self.channels * self.temporal_patch_size * self.patch_size**2

    @property
    def patch_format(self) -> PatchFormat:
        """How images are patchified and packed."""
        return PatchFormat(
            self.patch_size,
            self.temporal_patch_size,
            self.merge_size,
            self.window,
            class_tokens=self.class_tokens,
        )

    @property
    def class_tokens(self) -> bool:
        """Whether each image has a class token, which attends and is attended to, but is no feature."""
        return False

    def checked(self, packed: PackedPatches) -> PackedPatches:
        """The patches as device arrays.

        Raises:
          ValueError: they were made or packed for another encoder.
        """
        return check_packed(packed, self.patch_dim, self.merge_size, self.window, class_tokens=self.class_tokens)

    def angles(self, packed: PackedPatches) -> Float[Array, "B N half"] | None:
        """Rotary angles of every place by its row and column, or None without 2D RoPE."""
        if not self.use_rope:
            return None
        return rope_2d_angles(packed.positions, self.width // self.num_heads, self.rope_theta)

    def attention_fields(self) -> Fields:
        """Arguments of `TransformerBlock` beside the sizes, the activation and the norms; none by default."""
        return {}

    def encode(self, x: Float[Array, "B N D"], packed: PackedPatches, *, collect: bool) -> VisualFeatures:
        """Runs the blocks; to be called inside a subclass's compact `__call__`.

        Args:
          x: embedded patches in the order of `packed`.
          packed: segments, windows and positions.
          collect: also returns the input of every block and the output of the last in `hidden`.
        """
        x = nn.with_logical_constraint(x, (axes.BATCH, axes.LENGTH, axes.ACTIVATION_EMBED))
        depth = blocks_up_to(self.select_layer, self.depth)
        levels = self._level_numbers(depth)
        stack = WindowedStack(
            depth,
            {
                "num_heads": self.num_heads,
                "mlp_dim": self.mlp_dim,
                "activation": self.activation,
                "gated": self.gated,
                "norm": self.norm,
                "norm_epsilon": self.norm_epsilon,
                **self.attention_fields(),
                "dtype": self.dtype,
                "param_dtype": self.param_dtype,
            },
            full_layers=None if self.full_layers is None else tuple(i for i in self.full_layers if i < depth),
            saliency=self.saliency,
            remat=self.remat,
            levels=levels,
            name="blocks",
        )
        x, states, attended = stack(x, packed, self.angles(packed), collect=collect)
        found = packed_features(x, packed, states if collect else None, block=self.merge_size)
        if levels:
            assert states is not None
            chosen = restore_order(states[np.asarray(levels)] if collect else states, packed)
            found = dataclasses.replace(found, levels=jnp.concatenate(list(chosen), axis=-1))
        if attended is None:
            return found
        batch, count, heads, dim = attended.keys.shape
        keys = restore_order(attended.keys.reshape(batch, count, -1), packed).reshape(batch, count, heads, dim)
        return dataclasses.replace(
            found, saliency=restore_order(attended.saliency[..., None], packed)[..., 0], keys=keys
        )

    def _level_numbers(self, depth: int) -> tuple[int, ...]:
        """The non-negative numbers of the hidden states of `levels`, of `depth` blocks that are built.

        Raises:
          ValueError: a hidden state that is not computed, or an order that does not ascend.
        """
        numbers = tuple(level % (self.depth + 1) for level in self.levels)
        beyond = [level for level, number in zip(self.levels, numbers, strict=True) if number > depth]
        if beyond or not all(-self.depth - 1 <= level <= self.depth for level in self.levels):
            raise ValueError(
                f"levels {self.levels}: {depth} of {self.depth} blocks are built, with the hidden states 0 to {depth}; "
                "choose among these"
            )
        if list(numbers) != sorted(set(numbers)):
            raise ValueError(f"levels: expected numbers of hidden states in ascending order, got {self.levels}")
        return numbers


def patches_in_blocks(height: int, width: int, patch_size: int, merge_size: int) -> Grid:
    """Rows and columns of patches in an image of `height` x `width` pixels, in blocks of merge_size x merge_size.

    Raises:
      ValueError: a side is not a multiple of a block's.
    """
    unit = patch_size * merge_size
    if height % unit or width % unit or min(height, width) < unit:
        raise ValueError(
            f"an image of {height}x{width} pixels cannot be divided into blocks of {merge_size}x{merge_size} patches "
            f"of {patch_size} pixels; resize both sides to a multiple of {unit}"
        )
    return height // patch_size, width // patch_size


def window_in_blocks(window_size: int, patch_size: int, merge_size: int) -> int:
    """Side of a window of `window_size` pixels, in blocks of merge_size x merge_size patches; rounded down.

    Raises:
      ValueError: the window is smaller than a block.
    """
    window = window_size // merge_size // patch_size
    if window < 1:
        raise ValueError(
            f"window_size: expected at least {merge_size * patch_size} pixels (a block of "
            f"{merge_size}x{merge_size} patches of {patch_size}), got {window_size}"
        )
    return window


def check_packed(
    packed: PackedPatches, patch_dim: int, merge_size: int, window: int | None, *, class_tokens: bool = False
) -> PackedPatches:
    """Returns the patches as device arrays after checking that they fit the encoder.

    Raises:
      ValueError: they were made or packed for another encoder; names the difference.
    """
    _, length, found = packed.patches.shape
    if found != patch_dim:
        raise ValueError(f"expected patches of {patch_dim} values (channels x frames x rows x columns), got {found}")
    if length % merge_size**2:
        raise ValueError(f"{length} patches cannot be merged by {merge_size}x{merge_size}; pack with this merge_size")
    expected = 0 if window is None else (window * merge_size) ** 2
    if packed.window_length not in (0, expected):
        raise ValueError(
            f"expected patches packed in windows of {expected} (window={window} blocks of "
            f"{merge_size}x{merge_size}), got {packed.window_length}"
        )
    if class_tokens != (packed.class_tokens is not None):
        have = "no places" if class_tokens else "places"
        raise ValueError(f"the patches were packed with {have} for class tokens; pack with class_tokens={class_tokens}")
    return jax.tree.map(jnp.asarray, packed)


def packed_features(
    x: Float[Array, "B N D"], packed: PackedPatches, hidden: Float[Array, "L B N E"] | None, *, block: int
) -> VisualFeatures:
    """Features of patches in the processor's order, with their mask.

    Args:
      x: one feature per patch.
      packed: how the patches were laid out.
      hidden: hidden states of the patches.
      block: side of the blocks of neighbours in which the patches are ordered.
    """
    real = packed.segment_ids != PADDING_SEGMENT
    if packed.class_tokens is not None:
        real &= ~packed.class_tokens
    mask = restore_order(real.astype(jnp.float32)[..., None], packed)[..., 0] > 0
    tokens = restore_order(x, packed)
    states = None if hidden is None else restore_order(hidden, packed)
    return VisualFeatures(tokens, mask, (block, tokens.shape[1] // block), hidden=states, block=block)
