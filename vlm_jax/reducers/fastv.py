"""FastV: after a few layers of the decoder, most visual tokens are dropped."""

from vlm_jax.reducers.in_decoder import ReducesInDecoder
from vlm_jax.types import Drop


class FastV(ReducesInDecoder):
    """Ranks visual tokens by the attention that they get in layer number `layer`, and keeps the highest behind it.

    Attributes:
      layer: K, layers that see all visual tokens.

    Source: Chen et al. 2024 (FastV), section 4.1; fastv_kvcache.py. As there, the attention is that of the
    last token of the instruction. Each image keeps as many as any other.
    """

    kind = "fastv"

    layer: int = 2

    def drops(self) -> tuple[Drop, ...]:
        """One."""
        return (Drop(self.layer, self.num_kept, self.layer - 1),)
