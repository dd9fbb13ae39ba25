"""Images that are resized to fill a number of visual tokens, whatever their size: Gemma 4."""

import dataclasses
import math

from vlm_jax.processors.native import NativeViews
from vlm_jax.processors.tiling import Size
from vlm_jax.processors.views import ItemSize, PictureMismatch


def filled_size(size: Size, factor: int, min_pixels: int, max_pixels: int) -> Size:
    """The largest multiples of `factor` with approximately the image's aspect ratio, in at most `max_pixels`.

    Args:
      size: (height, width) of the image, in pixels.
      factor: side of a block, in pixels.
      min_pixels: unread; small images are enlarged.
      max_pixels: of the result, at least a block.

    Source: transformers, models/gemma4/image_processing_gemma4.py, get_aspect_ratio_preserving_size.
    """
    del min_pixels
    height, width = size
    scale = math.sqrt(max_pixels / (height * width))
    rows, cols = (math.floor(scale * side / factor) for side in size)
    most = max_pixels // factor**2
    if not rows:
        rows, cols = 1, min(max(1, width // height), most)
    elif not cols:
        rows, cols = min(max(1, height // width), most), 1
    return rows * factor, cols * factor


@dataclasses.dataclass(frozen=True)
class FilledViews(NativeViews):
    """`NativeViews` by `filled_size`, with the numbers of visual tokens that the release was trained with.

    Attributes:
      budgets: numbers of visual tokens of an image, in ascending order.
    """

    budgets: tuple[int, ...] = ()

    def of_budget(self, tokens: int) -> "FilledViews":
        """The same with one of `budgets`, which may be larger than before; another number is a bound, as in `within`.

        Raises:
          InfeasibleBudget: not even one block.
        """
        if tokens not in self.budgets:
            return self.within(tokens)
        return dataclasses.replace(self, max_pixels=tokens // self.block_tokens * self.format.block_size**2)

    def within(self, max_tokens: int) -> "FilledViews":
        """The same with fewer pixels."""
        found = super().within(max_tokens)
        assert isinstance(found, FilledViews)
        return found

    def sized(self, size: ItemSize) -> "FilledViews":
        """Raises `PictureMismatch` for any setting: images fill the number of visual tokens."""
        given = [field.name for field in dataclasses.fields(size) if getattr(size, field.name) is not None]
        if given:
            raise PictureMismatch(
                f"{given[0]}: this system's images fill a number of visual tokens; remove the key from the item, and "
                "set max_visual_tokens or max_video_tokens, or token_budget for a larger number"
            )
        return self
