"""An encoder and a connector: pixels in, the visual tokens of a language model out."""

from flax import linen as nn
from jaxtyping import Array, Float

from vlm_jax.types import Instruction, PackedPatches, TwoSizes, VisualTokens


class VisualPrefix(nn.Module):
    """The visual half of a `VLM`, under the same names.

    Attributes:
      encoder: an entry of `encoders.ENCODERS`, or of `encoders.PACKED_ENCODERS` with one image a sequence.
      connector: an entry of `connectors.CONNECTORS`.
    """

    encoder: nn.Module
    connector: nn.Module

    def visual_tokens(
        self,
        images: Float[Array, "B height width channels"] | PackedPatches | TwoSizes,
        instruction: Instruction | None = None,
        *,
        deterministic: bool = True,
    ) -> VisualTokens:
        """Tokens of a flat batch of images; an `instruction` for each where the connector reads one."""
        more = {} if instruction is None else {"instruction": instruction}
        return self.connector(self.encoder(images), deterministic=deterministic, **more)

    def __call__(
        self,
        images: Float[Array, "B height width channels"] | PackedPatches | TwoSizes,
        instruction: Instruction | None = None,
        *,
        deterministic: bool = True,
    ) -> VisualTokens:
        """As `visual_tokens`."""
        return self.visual_tokens(images, instruction, deterministic=deterministic)
