"""Multi-head latent attention: all keys and values are computed from one short, cached vector per position."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vlm_jax import axes
from vlm_jax.layers.attention import HEADS, Context, attention, last
from vlm_jax.layers.dense import KERNEL_INIT, Dense, with_axes
from vlm_jax.layers.norm import Norm
from vlm_jax.layers.per_layer import joined
from vlm_jax.layers.rope import rotate
from vlm_jax.types import Dtype, Fields

_EPSILON = 1e-6  # of the norms of bottlenecks, independent of the other norms


class LatentKeyValue(NamedTuple):
    """Cached values of one layer, or of all layers with a leading layer axis; none are per head."""

    latent: Float[Array, "*L B S R"]
    rope_key: Float[Array, "*L B S P"]

    AXES = ((axes.LAYERS, axes.BATCH, None, None),) * 2  # of all layers
    SLOTS = (-2, -2)  # the axis of positions in each

    def part(self, start: int, stop: int | None) -> "LatentKeyValue":
        """The cached values of layers `start` to `stop` - 1."""
        return LatentKeyValue(*(leaf[start:stop] for leaf in self))

    def joined(self, other: "LatentKeyValue") -> "LatentKeyValue":
        """These layers followed by those of `other`."""
        return LatentKeyValue(*map(joined, self, other))


class LatentAttention(nn.Module):
    """Self-attention whose keys and values are linear in a normalised latent vector of R values.

    A head's query and key have a content part and a rotary part; the rotary key is shared by all heads.
    The latents are expanded to keys and values of every head, or, where that takes fewer operations (few
    queries over a long cache), the expansion is absorbed: queries are projected to the latent space and attend
    to the latents themselves, and the results are projected to the heads' values.

    Attributes:
      num_heads: Q.
      latent_dim: R, of keys and values.
      query_latent_dim: width of the queries' own bottleneck, or None for none.
      content_dim, rope_dim, value_dim: widths of a head's content and rotary parts, and of its values.
      logit_scale: factor of the attention logits, in addition to (content_dim + rope_dim) ** -0.5.
      use_bias: biases on the projections to the bottlenecks and on the output projection.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Source: DeepSeek-AI 2024 (DeepSeek-V2), section 2.1 and appendix C. Rotary parts are half-split here;
    released ones are interleaved, and their kernels' columns are reordered when they are loaded.
    """

    num_heads: int
    latent_dim: int
    query_latent_dim: int | None
    content_dim: int
    rope_dim: int
    value_dim: int
    logit_scale: float = 1.0
    use_bias: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], context: Context, *, cache: LatentKeyValue | None = None
    ) -> tuple[Float[Array, "B T D"], LatentKeyValue | None]:
        """Attends within `x` and, before it, to the cache; `context.angles` are for `rope_dim` coordinates.

        Returns:
          The output, and with a cache the new latents and rotary keys in its dtype, to be written to it.
        """
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        content, rotary = jnp.split(self._queries(x, settings), [self.content_dim], axis=-1)
        latent = Dense(self.latent_dim, (axes.EMBED, axes.LATENT), self.use_bias, name="latent", **settings)(x)
        latent = Norm("rms", _EPSILON, name="latent_norm", **settings)(latent)
        key = Dense(self.rope_dim, (axes.EMBED, axes.HEAD_DIM), self.use_bias, name="rope_key", **settings)(x)
        if context.angles is not None:
            rotary = rotate(rotary, context.angles, context.magnitude)
            key = rotate(key[:, :, None], context.angles, context.magnitude)[:, :, 0]
        expansions = self._expansions()
        if self.is_mutable_collection(HEADS) and not self.is_initializing():  # only where requested
            query = self.logit_scale * jnp.concatenate([content, rotary], axis=-1)
            self.sow(HEADS, "queries", query, init_fn=tuple, reduce_fn=last)
            self.sow(HEADS, "keys", self._keys(latent, key, expansions[0]), init_fn=tuple, reduce_fn=last)
        fresh = None
        if cache is not None:
            fresh = LatentKeyValue(latent.astype(cache.latent.dtype), key.astype(cache.rope_key.dtype))
            latent, key = (jnp.concatenate(pair, axis=1).astype(self.dtype) for pair in zip(cache, fresh, strict=True))
        attend = self._absorbed if self._absorbs(x.shape[1], latent.shape[1]) else self._expanded
        out = attend(content, rotary, latent, key, context, expansions)
        out = out.reshape(*x.shape[:-1], self.num_heads * self.value_dim)
        dense = Dense(x.shape[-1], (axes.HEADS, axes.EMBED), self.use_bias, name="out", **settings)
        return dense(out), fresh

    def _queries(self, x: jax.Array, settings: Fields) -> Float[Array, "B T Q H"]:
        names = (axes.EMBED, axes.HEADS)
        if self.query_latent_dim is not None:
            bottleneck = (axes.EMBED, axes.LATENT)
            x = Dense(self.query_latent_dim, bottleneck, self.use_bias, name="query_latent", **settings)(x)
            x = Norm("rms", _EPSILON, name="query_latent_norm", **settings)(x)
            names = (axes.LATENT, axes.HEADS)
        head_dim = self.content_dim + self.rope_dim
        query = Dense(self.num_heads * head_dim, names, use_bias=False, name="query", **settings)(x)
        return query.reshape(*x.shape[:-1], self.num_heads, head_dim)

    def _expansions(self) -> tuple[Float[Array, "R Q C"], Float[Array, "R Q V"]]:
        """From latents to every head's content keys and values."""
        found = []
        for name, size in (("key", self.content_dim), ("value", self.value_dim)):
            init, shape = with_axes(KERNEL_INIT, axes.LATENT, axes.HEADS), (self.latent_dim, self.num_heads * size)
            kernel = self.param(f"{name}_expansion", init, shape, self.param_dtype).astype(self.dtype)
            found.append(kernel.reshape(self.latent_dim, self.num_heads, size))
        return found[0], found[1]

    def _absorbs(self, num_queries: int, num_keys: int) -> bool:
        """Whether projecting queries to the latent space takes fewer operations per head."""
        ends = self.latent_dim * (self.content_dim + self.value_dim)
        pair = self.content_dim + self.rope_dim + self.value_dim
        pair_absorbed = 2 * self.latent_dim + self.rope_dim
        expanded = num_keys * ends + num_queries * num_keys * pair
        return num_queries * ends + num_queries * num_keys * pair_absorbed < expanded

    def _scale(self) -> float:
        return self.logit_scale * (self.content_dim + self.rope_dim) ** -0.5

    def _expanded(self, content, rotary, latent, key, context, expansions):
        of_keys, of_values = expansions
        query = jnp.concatenate([content, rotary], axis=-1)
        values = jnp.einsum("bsr,rqv->bsqv", latent, of_values)
        return attention(query, self._keys(latent, key, of_keys), values, context, scale=self._scale())

    @staticmethod
    def _keys(latent: jax.Array, key: jax.Array, of_keys: jax.Array) -> Float[Array, "B S Q H"]:
        """The keys of every head: its content part and the shared rotary part."""
        keys = jnp.einsum("bsr,rqc->bsqc", latent, of_keys)
        shared = jnp.broadcast_to(key[:, :, None], (*keys.shape[:3], key.shape[-1]))
        return jnp.concatenate([keys, shared], axis=-1)

    def _absorbed(self, content, rotary, latent, key, context, expansions):
        of_keys, of_values = expansions
        query = jnp.concatenate([jnp.einsum("btqc,rqc->btqr", content, of_keys), rotary], axis=-1)
        keys = jnp.concatenate([latent, key], axis=-1)[:, :, None]
        gathered = attention(query, keys, latent[:, :, None], context, scale=self._scale())
        return jnp.einsum("btqr,rqv->btqv", gathered, of_values)
