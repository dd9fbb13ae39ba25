"""The vision-language model: encoder, reducer, connector, decoder, and one gather between."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vlm_jax.decoders.cache import Cache
from vlm_jax.types import PADDING_SEGMENT, TEXT_SLOT, Batch, PackedPatches, VisualTokens

Images = Float[Array, "images height width channels"] | PackedPatches


def flat_images(images: Float[Array, "B I height width channels"] | PackedPatches) -> Images:
    """A batch's images as an encoder takes them: one after another, or as they were packed."""
    if isinstance(images, PackedPatches):
        return images
    return images.reshape(-1, *images.shape[2:])


class VLM(nn.Module):
    """Composes an encoder, a connector and a decoder; it has no parameters of its own.

    Attributes:
      encoder: an entry of `encoders.ENCODERS`, or of another of its tables.
      connector: an entry of `connectors.CONNECTORS`.
      decoder: an entry of `decoders.DECODERS`.
      reducer: an entry of `reducers.REDUCERS`, or None.
    """

    encoder: nn.Module
    connector: nn.Module
    decoder: nn.Module
    reducer: nn.Module | None = None

    def visual_tokens(self, images: Images, *, deterministic: bool = True) -> VisualTokens:
        """Tokens of a flat batch of images, or of sequences of packed ones.

        Raises:
          ValueError: the connector gave another number of tokens than its `num_tokens` says.
        """
        features = self.encoder(images)
        if self.reducer is not None:
            features = self.reducer(features, deterministic=deterministic)
        tokens = self.connector(features, deterministic=deterministic)
        expected = self.connector.num_tokens(features.grid)
        if tokens.tokens.shape[1] != expected:
            raise ValueError(
                f"{type(self.connector).__name__} gave {tokens.tokens.shape[1]} tokens for a {features.grid} grid, "
                f"but its num_tokens says {expected}; one of the two is wrong"
            )
        return tokens

    def embed(self, batch: Batch, *, deterministic: bool = True) -> tuple[Float[Array, "B T D"], Int[Array, "B T"]]:
        """Embeddings of every position: text looked up, visual slots gathered from the table.

        Returns:
          The embeddings, and the segment ids, in which a masked visual token is padding.
        """
        text = self.decoder.embed(batch.tokens)
        if batch.images is None:
            return text, jnp.asarray(batch.segment_ids)
        size = batch.tokens.shape[0]
        visual = self.visual_tokens(flat_images(batch.images), deterministic=deterministic)
        table = visual.tokens.reshape(size, -1, visual.tokens.shape[-1]).astype(text.dtype)
        index = batch.visual_index[..., None]
        rows = jnp.take_along_axis(table, jnp.maximum(index, 0), axis=1)
        shown = jnp.take_along_axis(visual.mask.reshape(size, -1), jnp.maximum(batch.visual_index, 0), axis=1)
        segments = jnp.where((batch.visual_index == TEXT_SLOT) | shown, batch.segment_ids, PADDING_SEGMENT)
        return jnp.where(index == TEXT_SLOT, text, rows), segments

    def __call__(self, batch: Batch, *, deterministic: bool = True) -> Float[Array, "B T V"]:
        """Float32 logits at every position."""
        embeddings, segments = self.embed(batch, deterministic=deterministic)
        hidden, _ = self.decoder(embeddings, batch.positions, segments, branch_ids=batch.branch_ids)
        return self.decoder.logits(hidden)

    def prefill(self, batch: Batch, cache_length: int) -> tuple[Float[Array, "B V"], Cache]:
        """Runs a prompt whose rows end at the last column (left-padded).

        Returns:
          Logits of the last column, and a cache of `cache_length` slots with the prompt in it.
        """
        cache = self.decoder.init_cache(batch.tokens.shape[0], cache_length)
        embeddings, segments = self.embed(batch)
        hidden, cache = self.decoder(embeddings, batch.positions, segments, cache)
        return self.decoder.logits(hidden[:, -1]), cache

    def extend(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], cache: Cache
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Runs T more text tokens after the cache; logits of the last."""
        segments = jnp.ones_like(tokens)
        hidden, cache = self.decoder(self.decoder.embed(tokens), positions, segments, cache)
        return self.decoder.logits(hidden[:, -1]), cache
