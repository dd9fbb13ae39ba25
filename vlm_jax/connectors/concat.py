"""The patch merger of Qwen2-VL to Qwen3-VL and LLaVA-OneVision 1.5: k x k neighbours concatenated, then an MLP."""

import dataclasses

import jax.numpy as jnp
from flax import linen as nn

from vlm_jax.connectors.solving import WholeSquares
from vlm_jax.layers.mlp import Mlp
from vlm_jax.layers.norm import Norm, NormKind
from vlm_jax.layers.squares import squares
from vlm_jax.ranges import Natural, NonNegative, Side, Size
from vlm_jax.types import Dtype, VisualFeatures, VisualTokens


class Concat(WholeSquares, nn.Module):
    """Norm, concatenation of factor x factor neighbours, linear, GELU, linear; the hidden width is that of the square.

    With `levels`, each of the encoder's hidden states in `VisualFeatures.levels` has a merger of its own, which
    normalises whole squares; what it gives is in `VisualTokens.levels` (DeepStack).

    It takes the features of single images and of packed ones, which are in blocks of neighbours.

    Attributes:
      features: the decoder's width D.
      factor: side of a square in features, solved from the budget; divides rows and columns.
      norm: `rms` in Qwen2.5-VL, `layer` in the others.
      levels: number of hidden states that have mergers.
      norm_epsilon: its epsilon.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Source: Wang et al. 2024 (Qwen2-VL), section 2.1; transformers, models/qwen2_vl, PatchMerger;
    Meng et al. 2024 (DeepStack), section 3; transformers, models/qwen3_vl, Qwen3VLVisionPatchMerger.
    """

    kind = "concat"

    features: Size
    factor: Side
    norm: NormKind = "layer"
    levels: Natural = 0
    norm_epsilon: NonNegative = 1e-6
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, features: VisualFeatures, *, deterministic: bool) -> VisualTokens:
        del deterministic  # no randomness
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        count = self.num_tokens(features.grid)
        x, mask = squares(features, self.factor, self.kind)
        x = Norm(self.norm, self.norm_epsilon, name="norm", **settings)(x).reshape(x.shape[0], count, -1)
        tokens = Mlp(x.shape[-1], "gelu", out_dim=self.features, name="mlp", **settings)(x)
        if not self.levels:
            return VisualTokens(tokens, mask.any(-1))
        if features.levels is None or features.levels.shape[-1] != self.levels * features.tokens.shape[-1]:
            given = 0 if features.levels is None else features.levels.shape[-1] // features.tokens.shape[-1]
            raise ValueError(
                f"concat: expected {self.levels} levels of features, got {given}; set the encoder's levels, and "
                "with a reducer reduce to 'tokens'"
            )
        merged = []
        for i, level in enumerate(jnp.split(features.levels, self.levels, axis=-1)):
            y, _ = squares(dataclasses.replace(features, tokens=level), self.factor, self.kind)
            y = Norm(self.norm, self.norm_epsilon, name=f"level_{i}_norm", **settings)(y.reshape(y.shape[0], count, -1))
            merged.append(Mlp(y.shape[-1], "gelu", out_dim=self.features, name=f"level_{i}_mlp", **settings)(y))
        return VisualTokens(tokens, mask.any(-1), levels=jnp.concatenate(merged, axis=-1))
