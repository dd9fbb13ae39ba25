"""What the encoders of packed patches share: the check of their inputs, their grid and their output."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.layers.windowed_stack import restore_order
from vlm_jax.types import PADDING_SEGMENT, Grid, PackedPatches, VisualFeatures


def merged_grid(height: int, width: int, patch_size: int, merge_size: int) -> Grid:
    """Rows and columns of blocks of merge_size x merge_size patches in an image of so many pixels.

    Raises:
      ValueError: a side is no multiple of a block's.
    """
    unit = patch_size * merge_size
    if height % unit or width % unit or min(height, width) < unit:
        raise ValueError(
            f"an image of {height}x{width} pixels is not made of blocks of {merge_size}x{merge_size} patches "
            f"of {patch_size} pixels; resize both sides to a multiple of {unit}"
        )
    return height // unit, width // unit


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


def check_packed(packed: PackedPatches, patch_dim: int, merge_size: int, window: int | None) -> PackedPatches:
    """Gives the patches as device arrays, or refuses those that were cut or packed for another encoder.

    Raises:
      ValueError: names what differs.
    """
    _, length, found = packed.patches.shape
    if found != patch_dim:
        raise ValueError(f"expected patches of {patch_dim} values (channels x frames x rows x columns), got {found}")
    if length % merge_size**2:
        raise ValueError(f"{length} places cannot be merged by {merge_size}x{merge_size}; pack with this merge_size")
    expected = 0 if window is None else (window * merge_size) ** 2
    if packed.window_length not in (0, expected):
        raise ValueError(
            f"expected patches packed in windows of {expected} (window={window} blocks of "
            f"{merge_size}x{merge_size}), got {packed.window_length}"
        )
    return jax.tree.map(jnp.asarray, packed)


def packed_features(
    x: Float[Array, "B N D"], packed: PackedPatches, hidden: Float[Array, "L B N E"] | None, *, block: int
) -> VisualFeatures:
    """Features of patches in the processor's order, with their mask.

    Args:
      x: one feature a patch.
      packed: how the patches were laid out.
      hidden: hidden states of the patches.
      block: side of the blocks of neighbours in which the patches lie.
    """
    real = (packed.segment_ids != PADDING_SEGMENT).astype(jnp.float32)[..., None]
    mask = restore_order(real, packed)[..., 0] > 0
    tokens = restore_order(x, packed)
    states = None if hidden is None else restore_order(hidden, packed)
    return VisualFeatures(tokens, mask, (block, tokens.shape[1] // block), hidden=states, block=block)
