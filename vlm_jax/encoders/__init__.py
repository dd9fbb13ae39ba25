"""Vision encoders: pixels in, `VisualFeatures` out.

Interface: a Linen module with `features` (its output width), a pure
`grid(height, width) -> (rows, cols)` that can be called before `init`, and
`__call__(images) -> VisualFeatures`. Encoders of `PACKED_ENCODERS` take `PackedPatches` instead, in which
images of any size share a sequence; their features are in blocks (`VisualFeatures.block`), and `patch_format`
defines how the processor patchifies and packs. `COMPOSITE_ENCODERS` contain other encoders and take their inputs.
"""

from collections.abc import Mapping

from vlm_jax.encoders.aimv2 import AIMv2
from vlm_jax.encoders.axial_vit import AxialViT
from vlm_jax.encoders.cascade import Cascade
from vlm_jax.encoders.causal_queries import CausalQueries
from vlm_jax.encoders.encoder import Encoder, ImageEncoder, PackedEncoder
from vlm_jax.encoders.hybrid import Hybrid
from vlm_jax.encoders.merging_vit import MergingViT
from vlm_jax.encoders.multiscale import MultiScale
from vlm_jax.encoders.naflex import NaflexViT
from vlm_jax.encoders.qwen_vit import QwenViT
from vlm_jax.encoders.resnet import ModifiedResNet
from vlm_jax.encoders.rice_vit import RiceViT
from vlm_jax.encoders.sam import SAM
from vlm_jax.encoders.siglip2_navit import Siglip2NaViT
from vlm_jax.encoders.vit import ViT

ENCODERS: Mapping[str, type[ImageEncoder]] = {"vit": ViT, "aimv2": AIMv2, "resnet": ModifiedResNet, "sam": SAM}
COMPOSITE_ENCODERS: Mapping[str, type[Encoder]] = {
    "cascade": Cascade,
    "causal_queries": CausalQueries,
    "hybrid": Hybrid,
    "multiscale": MultiScale,
}
PACKED_ENCODERS: Mapping[str, type[PackedEncoder]] = {
    "axial_vit": AxialViT,
    "merging_vit": MergingViT,
    "naflex": NaflexViT,
    "qwen_vit": QwenViT,
    "rice_vit": RiceViT,
    "siglip2_navit": Siglip2NaViT,
}
