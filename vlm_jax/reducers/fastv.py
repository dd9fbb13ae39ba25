"""FastV: after a few layers of the decoder, most visual tokens are dropped."""

from typing import ClassVar

from vlm_jax.ranges import Natural, Share
from vlm_jax.reducers.in_decoder import ReducesInDecoder
from vlm_jax.types import Drop


class FastV(ReducesInDecoder):
    """Ranks visual tokens by the attention that they get in layer number `layer`, and keeps the highest after it.

    Attributes:
      layer: K, layers that process all visual tokens.
      ratio: by the rule `as_released`, the share of an image's tokens that is dropped, as configured in a release; the
        number of kept tokens is rounded to the nearest integer, halves to even. None for `num_kept`.

    Source: Chen et al. 2024 (FastV), section 4.1; fastv_kvcache.py. As there, the attention is that of the
    last token of the instruction, and tokens keep their positions unless `positions` is `consecutive`. Every image
    keeps the same number, or all of its tokens. The rule `as_released` differs only in `ratio`.
    """

    kind: ClassVar[str] = "fastv"

    layer: Natural = 2
    ratio: Share | None = None

    def drops(self) -> tuple[Drop, ...]:
        """One drop, before layer `layer`."""
        share = 1 - self.ratio if self.rule == "as_released" and self.ratio is not None else None
        renumbers = self.positions == "consecutive"
        return (
            Drop(self.layer, self.num_kept, self.layer - 1, share, "down" if share is None else "nearest", renumbers),
        )
