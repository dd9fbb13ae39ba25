"""FasterVLM: keeps the features that the class token attends to most."""

from typing import ClassVar

from vlm_jax.reducers.reducer import KeepsAttended, every, highest
from vlm_jax.types import VisualFeatures


class FasterVLM(KeepsAttended):
    """Keeps the features with the highest attention from the class token, averaged over heads, in order.

    Source: Zhang et al. 2024 (FasterVLM), section 3.2; llava_arch.py, encode_images. As there, shares of attention that
    go to the class token itself are left out, and the others are not normalised again; the attention is of the last
    built block, so that features and attention are those of the release with select_layer -2. Deviations: without a
    class token the attention is averaged over all patches of the image. The rule `as_released` does not differ.
    """

    kind: ClassVar[str] = "fastervlm"

    def __call__(self, features: VisualFeatures, *, deterministic: bool) -> VisualFeatures:
        del deterministic
        if self.passes(features):
            return every(features)
        return self.take(features, highest(self.attended(features)[0], features.mask, self.num_kept))
