"""FastV: after a few layers of the decoder, most visual tokens are dropped."""

from typing import ClassVar

from vlm_jax.reducers.in_decoder import ReducesInDecoder
from vlm_jax.types import Drop


class FastV(ReducesInDecoder):
    """Ranks visual tokens by the attention that they get in layer number `layer`, and keeps the highest behind it.

    Attributes:
      layer: K, layers that see all visual tokens.
      ratio: by the rule `as_released`, the share of an image's tokens that is dropped, as one release is told; what is
        left is rounded to the nearest integer, halves to the even one. None for `num_kept`.

    Source: Chen et al. 2024 (FastV), section 4.1; fastv_kvcache.py. As there, the attention is that of the
    last token of the instruction. Each image keeps as many as any other, or all
    of its own. The rule `as_released` differs in `ratio` alone.
    """

    kind: ClassVar[str] = "fastv"

    layer: int = 2
    ratio: float | None = None

    def drops(self) -> tuple[Drop, ...]:
        """One."""
        share = 1 - self.ratio if self.rule == "as_released" and self.ratio is not None else None
        renumbers = self.positions == "consecutive"
        return (
            Drop(self.layer, self.num_kept, self.layer - 1, share, "down" if share is None else "nearest", renumbers),
        )
