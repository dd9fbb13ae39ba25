"""Ovis's connector: a token is the mean of visual word embeddings under a distribution that its features give."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from vlm_jax import axes
from vlm_jax.connectors.solving import CoveringSquares
from vlm_jax.layers.dense import Dense, Embed
from vlm_jax.layers.norm import Norm
from vlm_jax.layers.squares import squares
from vlm_jax.ranges import Natural, NonNegative, Positive, Side, Size
from vlm_jax.types import Dtype, VisualFeatures, VisualTokens

Tokenize = Literal["softmax", "gumbel_argmax", "st_argmax", "hard_softmax"]


def straight_through(x: Float[Array, "*batch V"]) -> Float[Array, "*batch V"]:
    """One-hot of the largest entry, with a straight-through gradient to x."""
    hard = jax.nn.one_hot(jnp.argmax(x, axis=-1), x.shape[-1], dtype=x.dtype)
    return hard + (x - jax.lax.stop_gradient(x))  # the bracket is exactly 0


def gumbel_softmax(
    logits: Float[Array, "*batch V"], noise: Float[Array, "*batch V"], tau: float
) -> Float[Array, "*batch V"]:
    """Softmax of logits with Gumbel noise, the sharper the smaller tau. Source: Jang et al. 2017, eq. 2."""
    return jax.nn.softmax((logits + noise) / tau, axis=-1)


class VisualVocabulary(CoveringSquares, nn.Module):
    """Squares of neighbours, linear, LayerNorm, weights of visual words, and the product with their embedding table.

    | tokenize | weights of the words in training | their gradient |
    |---|---|---|
    | `softmax` | softmax of the logits | its own |
    | `gumbel_argmax` | one-hot of a Gumbel sample, from the rng stream `connect` | that of the noisy softmax |
    | `st_argmax` | one-hot of the largest logit | passed to the logits unchanged (Ovis 2) |
    | `hard_softmax` | one-hot of the largest logit | that of the softmax (Ovis 2 in transformers) |

    At inference (`deterministic`) all but `softmax` look up the row of the largest logit. Squares at the
    bottom and the right of a grid that the factor does not divide are padded with zeros.

    Attributes:
      features: the decoder's width D.
      vocab_size: rows of the table, indicators included.
      factor: side of a square in features, solved from the budget; hidden_stride of the release.
      num_indicators: last rows of the table, which features cannot select: the learned tokens that the layout
        inserts around images; 5 in Ovis 2, 4 in Ovis 2.5.
      tokenize: a row of the table above.
      tau: temperature of `gumbel_argmax`.
      norm_epsilon: epsilon of the LayerNorm.
      dtype: dtype of the products; the softmax is float32.
      param_dtype: dtype of the stored parameters.

    Source: Lu et al. 2024 (Ovis), section 3; AIDC-AI/Ovis, ovis/model/visual_tokenizer and modeling_ovis.py.
    """

    kind = "visual_vocabulary"

    features: Size
    vocab_size: Size
    factor: Side
    num_indicators: Natural = 5
    tokenize: Tokenize = "softmax"
    tau: Positive = 1.0
    norm_epsilon: NonNegative = 1e-5
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self):
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        words = self.vocab_size - self.num_indicators
        if words < 1 or self.num_indicators < 0:
            raise ValueError(f"num_indicators: expected 0 to {self.vocab_size - 1}, got {self.num_indicators}")
        self.head = Dense(words, (axes.EMBED, axes.VOCAB), use_bias=False, **settings)
        self.head_norm = Norm("layer", self.norm_epsilon, **settings)
        # The softmax of initial logits averages most of the rows, which reduces their scale far below 1.
        self.table = Embed(self.vocab_size, self.features, 1.0, **settings)

    def logits(self, features: VisualFeatures) -> tuple[Float[Array, "B M V"], Bool[Array, "B M"]]:
        """Logits of the visual words (indicators left out) for every square, and the mask of the squares."""
        x, mask = squares(features, self.factor, self.kind)
        return self.head_norm(self.head(x.reshape(*x.shape[:2], -1))), mask.any(-1)

    def words(self, logits: Float[Array, "B M V"], *, deterministic: bool) -> Float[Array, "B M V"]:
        """The weights of the visual words; at inference the one-hot of the largest logit."""
        logits = logits.astype(jnp.float32)
        if self.tokenize == "softmax":
            return jax.nn.softmax(logits, axis=-1)
        if self.tokenize == "st_argmax" or deterministic:
            return straight_through(logits)
        if self.tokenize == "hard_softmax":
            return straight_through(jax.nn.softmax(logits, axis=-1))
        noise = jax.random.gumbel(self.make_rng("connect"), logits.shape)
        return straight_through(gumbel_softmax(logits, noise, self.tau))

    def embed(self, words: Float[Array, "B M V"]) -> Float[Array, "B M D"]:
        """Means of the table's rows under the weights of the words."""
        words = jnp.pad(words.astype(self.dtype), ((0, 0), (0, 0), (0, self.num_indicators)))
        return jnp.dot(words, self.table.embedding.astype(self.dtype))

    def indicators(self) -> Float[Array, "rows D"]:
        """The learned rows that come first in the visual table of a released model (`VLM.learned_rows`)."""
        return self.table(jnp.arange(self.vocab_size - self.num_indicators, self.vocab_size))

    def __call__(self, features: VisualFeatures, *, deterministic: bool) -> VisualTokens:
        logits, mask = self.logits(features)
        if deterministic and self.tokenize != "softmax":
            return VisualTokens(self.table(jnp.argmax(logits, axis=-1)), mask)
        return VisualTokens(self.embed(self.words(logits, deterministic=deterministic)), mask)
