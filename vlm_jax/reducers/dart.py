"""DART: after a few layers of the decoder, visual tokens that are like others are dropped."""

from typing import ClassVar

from vlm_jax.ranges import Natural, Share, Size
from vlm_jax.reducers.in_decoder import ReducesInDecoder
from vlm_jax.types import Drop


class DART(ReducesInDecoder):
    """Keeps pivots, and the visual tokens that are least like them, before layer `layer`.

    Pivots are the visual tokens, and the tokens of the text after the image, whose keys in the layer before have the
    largest L1 norm, all heads together. Each pivot in turn takes the tokens with the smallest cosine to it, by hidden
    states after the decoder's last norm.

    Attributes:
      layer: layers that process all visual tokens.
      image_pivots: pivots among an image's tokens, all of which are kept.
      text_pivots: pivots in the text.
      ratio: by the rule `as_released`, the share of an image's tokens that is dropped, as configured in the port; every
        pivot takes equally many, rounded down, besides the image's pivots, so that more are kept. None for `num_kept`.

    Source: Wen et al. 2025 (DART), section 3; the authors' code could not be had, so the rules are those of the port in
    LightCompress, token_reduction/dart.py. Tokens keep their positions. Deviations: pivots take tokens in the
    order image, text, each by falling norm, where the port has the order of a Python set; in training and with several
    turns the text ends with the first instruction after the image. The rule `as_released` differs only in `ratio`.
    """

    kind: ClassVar[str] = "dart"

    layer: Natural = 2
    image_pivots: Size = 4
    text_pivots: Natural = 4
    ratio: Share | None = None

    def drops(self) -> tuple[Drop, ...]:
        """One drop, before layer `layer`."""
        share = 1 - self.ratio if self.rule == "as_released" and self.ratio is not None else None
        renumbers, pivots = self.positions == "consecutive", (self.image_pivots, self.text_pivots)
        return (Drop(self.layer, self.num_kept, self.layer - 1, share, renumbers=renumbers, pivots=pivots),)
