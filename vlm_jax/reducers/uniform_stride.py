"""The second control: keep features at even steps."""

from typing import ClassVar

from vlm_jax.reducers.reducer import KeepsFeatures, every, spread
from vlm_jax.types import VisualFeatures


class UniformStride(KeepsFeatures):
    """Keeps feature number i * N // num_kept of an image's N unmasked ones, in row-major order."""

    kind: ClassVar[str] = "uniform_stride"

    def __call__(self, features: VisualFeatures, *, deterministic: bool) -> VisualFeatures:
        del deterministic
        if self.passes(features):
            return every(features)
        return self.take(features, spread(features.mask, self.num_kept))
