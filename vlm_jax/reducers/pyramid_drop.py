"""PyramidDrop: visual tokens are dropped in stages, at a constant ratio."""

from typing import ClassVar

from vlm_jax.config import ConfigError
from vlm_jax.ranges import Natural, Share
from vlm_jax.reducers.in_decoder import ReducesInDecoder
from vlm_jax.types import Drop


class PyramidDrop(ReducesInDecoder):
    """Before each of some layers, ranks visual tokens by that layer's attention to them and keeps the highest.

    With s drops, stage i has shown * (kept / shown) ** (i / s) tokens, rounded.

    Attributes:
      layers: layers before which tokens are dropped; at every quarter of the decoder, as in the paper, when None.
      ratios: by the rule `as_released`, the share of an image's initial tokens that remains after each drop; when None,
        each drop keeps half of the remaining tokens, as in the paper.

    Source: Xing et al. 2024 (PyramidDrop), section 3.2; modeling_llama_pdrop.py, pdrop_rank_drop. As there, the
    attention is that of the last token of the instruction, in training the mean over all instructions of a row.
    Deviations of `exact`: the ratio is computed from the budget, where the paper sets 0.5, and tokens keep their
    positions, with their rotary angles, unless `positions` is `consecutive`. By `as_released` shares are of each
    image's own number, rounded down, and positions are renumbered from 0 after every drop, whatever `positions` says.
    """

    kind: ClassVar[str] = "pyramid_drop"

    layers: tuple[Natural, ...] | None = None
    ratios: tuple[Share, ...] | None = None

    def drops(self) -> tuple[Drop, ...]:
        """One drop per layer.

        Raises:
          ConfigError: `ratios` does not have one entry per layer.
        """
        quarters = sorted({max(1, self.num_layers * quarter // 4) for quarter in (1, 2, 3)})
        layers = tuple(quarters) if self.layers is None else tuple(sorted(self.layers))
        if self.rule == "as_released":
            shares = tuple(0.5**stage for stage in range(1, len(layers) + 1)) if self.ratios is None else self.ratios
            if len(shares) != len(layers):
                raise ConfigError(f"config.reducer.ratios: expected one for each of layers {layers}, got {shares}")
            pairs = zip(layers, shares, strict=True)
            return tuple(Drop(layer, self.num_kept, layer, share, renumbers=True) for layer, share in pairs)
        shown = self.connector_budget((1, self.num_features))
        ratio, renumbers = self.num_kept / shown, self.positions == "consecutive"
        counts = [round(shown * ratio ** (number / len(layers))) for number in range(1, len(layers))]
        kept = [*counts, self.num_kept][: len(layers)]
        return tuple(Drop(layer, count, layer, renumbers=renumbers) for layer, count in zip(layers, kept, strict=True))
