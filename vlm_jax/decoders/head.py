"""The linear head of a decoder: its own kernel, or the table of embeddings."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.decoders.decoder import HeadKernel
from vlm_jax.layers.dense import Dense, Embed
from vlm_jax.types import Dtype


class LinearHead:
    """`logits` and `head_kernel` of a decoder whose `setup` makes `embedding`, and `head` where it is not tied.

    Logits are capped by a tanh where it has a `final_logit_softcap`.
    """

    embedding: Embed
    head: Dense
    tie_embeddings: bool
    dtype: Dtype
    final_logit_softcap: float | None = None

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Vocabulary logits in float32."""
        out = self.embedding.attend(hidden) if self.tie_embeddings else self.head(hidden)
        out = out.astype(jnp.float32)
        cap = self.final_logit_softcap
        return out if cap is None else cap * jnp.tanh(out / cap)

    def head_kernel(self) -> HeadKernel:
        """The kernel of `logits`: the embedding table, or that of the separate head."""
        if self.tie_embeddings:
            return HeadKernel(self.embedding.embedding, 0, self.dtype, self.final_logit_softcap)
        return HeadKernel(self.head.get_variable("params", "kernel"), 1, self.dtype, self.final_logit_softcap)
