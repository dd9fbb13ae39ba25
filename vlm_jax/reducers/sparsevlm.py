"""SparseVLM: visual tokens are dropped in stages, by the attention of the text that speaks of the image."""

from typing import ClassVar, Literal

from vlm_jax.config import ConfigError
from vlm_jax.ranges import Natural, Size
from vlm_jax.reducers.in_decoder import ReducesInDecoder
from vlm_jax.types import Drop, Rating

_LAYERS, _DEPTH = (2, 6, 15), 32  # of the released 7B and 13B models, and the depth of the first
_COUNTS = {"1.0": (300, 200, 110), "2.0": (300, 200, 118)}


class SparseVLM(ReducesInDecoder):
    """After each of some layers, ranks visual tokens by that layer's attention from text to them, keeps the highest.

    The text that rates an image's tokens is chosen once, from the decoder's input: tokens after the image that are
    more like it than the mean. Version 1.0 merges the best of the dropped tokens into a few, which stay; version 2.0
    (SparseVLM+) does not, divides attention by what the rotary angles alone give, and averages those heads that attend
    most to the image.

    Attributes:
      layers: layers that rank; 2, 6 and 15 of 32 when None, in other decoders at the same shares of their depth.
      version: of the release.
      num_heads: heads that are averaged in version 2.0; all where there are fewer.
      counts: by the rule `as_released`, tokens to keep of each image after each of the layers, besides merged ones, at
        most one less than there are. When None those that the release has for 192 tokens: (300, 200, 110), in version
        2.0 (300, 200, 118). Its others are (303, 110, 36), (238, 48, 26) and (66, 30, 17) for 128, 96 and 64 tokens,
        in version 2.0 (238, 108, 60), (246, 54, 28) and (66, 34, 20). The number is the mean over layers.

    Source: Zhang et al. 2024 (SparseVLM), sections 3.2 to 3.4, and SparseVLM+, sections 4.2 and 4.3; score.py, utils.py
    and modelling_sparse_llama.py of the release. As there, counts are fixed and not by the rank of the attention. With
    several turns the text ends with the first instruction after the image where answers are learned; in a prompt it
    is all text after the image. Deviations of `exact`: counts fall at a constant ratio to the budget and include merged
    tokens, which stay in the place of their cluster's centre; tokens keep their positions unless `positions` is
    `consecutive`; no noise breaks ties of densities; where no text is above the mean, all of it rates. By
    `as_released` merged tokens follow the kept ones, positions are renumbered in version 1.0 and kept in 2.0, whatever
    `positions` says; where the release draws noise anew, it is always the same here.
    """

    kind: ClassVar[str] = "sparsevlm"

    layers: tuple[Natural, ...] | None = None
    version: Literal["1.0", "2.0"] = "1.0"
    num_heads: Size = 14
    counts: tuple[Natural, ...] | None = None

    def drops(self) -> tuple[Drop, ...]:
        """One drop after each layer.

        Raises:
          ConfigError: `counts` does not have one entry per layer.
        """
        ranking = tuple(sorted(self._scaled() if self.layers is None else self.layers))
        counts, released = self._counts(len(ranking)), self.rule == "as_released"
        recycles, renumbers = self.version == "1.0", self.positions == "consecutive"
        if released:
            renumbers = recycles
        heads, rotary = (None, False) if recycles else (self.num_heads, True)
        ratings = [Rating(counts[: i + 1], recycles, released, heads, rotary) for i in range(len(ranking))]
        return tuple(
            Drop(layer + 1, self.num_kept if released else count, layer, renumbers=renumbers, rating=rating)
            for layer, count, rating in zip(ranking, counts, ratings, strict=True)
        )

    def _scaled(self) -> set[int]:
        return {layer * self.num_layers // _DEPTH for layer in _LAYERS}

    def _counts(self, number: int) -> tuple[int, ...]:
        if self.rule == "as_released":
            counts = _COUNTS[self.version] if self.counts is None else self.counts
            if len(counts) != number:
                raise ConfigError(f"config.reducer.counts: expected one for each of {number} layers, got {counts}")
            return counts
        shown = self.connector_budget((1, self.num_features))
        ratio = self.num_kept / shown
        return (*(round(shown * ratio ** (i / number)) for i in range(1, number)), self.num_kept)
