"""Vision encoders: pixels in, `VisualFeatures` out.

The contract: a Linen module with `features` (its output width), a pure
`grid(height, width) -> (rows, cols)` that can be called before `init`, and
`__call__(images) -> VisualFeatures`.
"""

from vlm_jax.encoders.vit import ViT

ENCODERS = {"vit": ViT}
