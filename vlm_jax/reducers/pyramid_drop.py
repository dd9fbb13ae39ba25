"""PyramidDrop: visual tokens are dropped in stages, at a constant ratio."""

from vlm_jax.reducers.in_decoder import ReducesInDecoder
from vlm_jax.types import Drop


class PyramidDrop(ReducesInDecoder):
    """Before each of some layers, ranks visual tokens by that layer's attention to them and keeps the highest.

    With s drops, stage i has shown * (kept / shown) ** (i / s) tokens, rounded.

    Attributes:
      layers: before which layers tokens are dropped; where None, the paper's: at every quarter of the decoder.

    Source: Xing et al. 2024 (PyramidDrop), section 3.2; modeling_llama_pdrop.py, pdrop_rank_drop. As there, the
    attention is that of the last token of the instruction, in training the mean over all instructions of a row.
    Deviation: the ratio follows from the budget, where the paper sets 0.5. Each image keeps as many as any other.
    """

    kind = "pyramid_drop"

    layers: tuple[int, ...] | None = None

    def drops(self) -> tuple[Drop, ...]:
        """One a layer."""
        quarters = sorted({max(1, self.num_layers * quarter // 4) for quarter in (1, 2, 3)})
        layers = tuple(quarters) if self.layers is None else tuple(sorted(self.layers))
        shown = self.connector_budget((1, self.num_features))
        ratio = self.num_kept / shown
        return tuple(
            Drop(
                layer, self.num_kept if number == len(layers) else round(shown * ratio ** (number / len(layers))), layer
            )
            for number, layer in enumerate(layers, 1)
        )
