"""The decoder-only transformer of the Llama family: RoPE, grouped heads, RMSNorm, SwiGLU."""

import dataclasses
import itertools
import math
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vlm_jax import axes
from vlm_jax.decoders.cache import Cache
from vlm_jax.decoders.dropping import Rows, drop, num_dropped, restore
from vlm_jax.decoders.rotary import no_prompt, rotary_angles
from vlm_jax.layers.attention import Context, KeyValue
from vlm_jax.layers.block import RematPolicy, TransformerStack
from vlm_jax.layers.dense import Dense, Embed
from vlm_jax.layers.norm import Norm
from vlm_jax.layers.rope import Rope
from vlm_jax.layers.saliency import Heads, attention_saliency
from vlm_jax.types import Drop, Positions, VisualPlaces


class Transformer(nn.Module):
    """A causal language model over embeddings, so that visual tokens can stand among the text.

    Attributes:
      vocab_size: rows of the embedding table.
      width: residual width D.
      depth: number of blocks.
      num_heads: query heads.
      num_kv_heads: key and value heads; divides num_heads.
      mlp_dim: hidden width of the gated feed-forward.
      activation: of its gate, a name of `layers.mlp.ACTIVATIONS`.
      head_dim: width / num_heads when None.
      rope: how positions become rotary angles.
      log_length: queries at places beyond it are scaled by log(place) / log(log_length), as in Qwen; None for none.
      norm_epsilon: epsilon of every RMSNorm.
      qkv_bias: biases on query, key and value, as in Qwen2.
      out_bias, mlp_bias: one on attention's output, and on the feed-forward's layers.
      windows: of every block how many positions it sees at most, itself among them, or None; empty for all of all.
      qk_norm: an RMSNorm of every head's queries and keys before they are turned, as in Qwen3.
      tie_embeddings: logits by the embedding table instead of a head of their own.
      drops: where visual tokens are dropped, first to last. For reducers; `build` sets it.
      remat, unroll: as in `TransformerStack`.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Source: Touvron et al. 2023 (Llama), section 2.2.
    """

    vocab_size: int
    width: int
    depth: int
    num_heads: int
    num_kv_heads: int
    mlp_dim: int
    activation: str = "silu"
    head_dim: int | None = None
    rope: Rope = Rope()
    log_length: int | None = None
    norm_epsilon: float = 1e-6
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()
    tie_embeddings: bool = True
    drops: tuple[Drop, ...] = ()
    remat: RematPolicy = "none"
    unroll: int = 1
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self):
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        # Drawn at the scale that every block adds to the residual stream; a table that also gives
        # the logits is drawn so that these start near 1.
        stddev = self.width**-0.5 if self.tie_embeddings else 1.0
        self.embedding = Embed(self.vocab_size, self.width, stddev, **settings)
        self.blocks = TransformerStack(
            self.depth,
            {
                "num_heads": self.num_heads,
                "num_kv_heads": self.num_kv_heads,
                "head_dim": self.head_dim,
                "mlp_dim": self.mlp_dim,
                "activation": self.activation,
                "gated": True,
                "norm": "rms",
                "norm_epsilon": self.norm_epsilon,
                "qkv_bias": self.qkv_bias,
                "qk_norm": "rms" if self.qk_norm else None,
                "use_bias": self.out_bias,
                "mlp_bias": self.mlp_bias,
                **settings,
            },
            remat=self.remat,
            unroll=self.unroll,
            windows=self.windows,
        )
        self.final_norm = Norm("rms", self.norm_epsilon, **settings)
        if not self.tie_embeddings:
            self.head = Dense(self.vocab_size, (axes.EMBED, axes.VOCAB), use_bias=False, **settings)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Looks token ids up."""
        return self.embedding(tokens)

    def init_cache(self, batch_size: int, length: int, dtype: Any = None, places: VisualPlaces | None = None) -> Cache:
        """An empty cache for `length` positions a row; layers behind a drop hold fewer.

        `dtype` is the decoder's when None; `places` are those of the prompt that it is for.
        """
        parts = []
        for (start, stop), dropped in zip(self._spans(places), self._dropped(places), strict=True):
            slots, dtype = length - dropped, self.dtype if dtype is None else dtype
            layers = KeyValue.empty(stop - start, batch_size, slots, self.num_kv_heads, self._head_dim, dtype)
            parts.append(Cache.empty(layers, batch_size, slots))
        parts[0] = dataclasses.replace(parts[0], prompt_length=no_prompt(self.rope, batch_size))
        return Cache.chained(parts)

    def __call__(
        self,
        embeddings: Float[Array, "B T D"],
        positions: Positions,
        segment_ids: Int[Array, "B T"],
        cache: Cache | None = None,
        branch_ids: Int[Array, "B T"] | None = None,
        places: VisualPlaces | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Runs T positions, after those in the cache when there is one.

        `branch_ids` is for sequences without a cache; see `types.Batch`. With `places` visual tokens are
        dropped on the way, at `drops`; the cache is then an empty one that was made for them.

        Returns:
          Normalised hidden states, zeros at positions that were dropped, and the cache with T more slots written.
        """
        length = embeddings.shape[1]
        every = jnp.broadcast_to(jnp.arange(length)[None], segment_ids.shape)
        angles, cache = rotary_angles(self.rope, positions, segment_ids, self._head_dim, cache)
        rows = Rows(embeddings, angles, self._query_scale(positions), segment_ids, branch_ids, every)
        drops = () if places is None else self.drops
        spans = self._spans(places) if cache is None else _spans_of(cache)
        written: list[Cache] = []
        for number, (start, stop) in enumerate(spans):
            coming = drops[number] if number < len(drops) else None
            part = None if cache is None else cache.parts[number]
            x, part, heads = self._span(rows, part, start, stop, coming)
            rows = dataclasses.replace(rows, x=x)
            if part is not None:
                written.append(part)
            if coming is not None and places is not None and heads is not None:
                context = self.blocks.context_of(coming.ranked_by, self._context(rows))
                saliency = attention_saliency(heads, context, places.ranking.astype(jnp.float32))
                rows, places = drop(rows, places, saliency, coming.num_kept)
        x = self.final_norm(rows.x)
        return (restore(x, rows, length) if drops else x), Cache.chained(written) if written else None

    def _span(
        self, rows: Rows, cache: Cache | None, start: int, stop: int, coming: Drop | None
    ) -> tuple[Float[Array, "B T D"], Cache | None, Heads | None]:
        """Layers `start` to `stop` - 1, and the queries and keys that rank tokens for the drop that comes."""
        context, heads, layers = self._context(rows), None, None
        if cache is not None:
            context = dataclasses.replace(context, key_segments=cache.key_segments(rows.segment_ids), branches=None)
            layers = cache.readable
        if (start, stop) == (0, self.depth):
            x, layers, _ = self.blocks(rows.x, context, cache=layers)
        elif coming is None or coming.ranked_by == stop:
            x, layers = self.blocks.run(rows.x, context, start, stop, cache=layers)
        else:
            first, last = (None, None) if layers is None else (layers.part(0, -1), layers.part(-1, None))
            x, first = self.blocks.run(rows.x, context, start, stop - 1, cache=first)
            x, last, heads = self.blocks.attend(x, context, stop - 1, cache=last)
            x = self.blocks.feed_forward(x, stop - 1)
            layers = last if first is None or last is None else first.joined(last)
        if coming is not None and heads is None:
            heads = self.blocks.attend(x, self._context(rows), coming.ranked_by)[2]
        if cache is not None:  # of a span without layers there is nothing to write
            segments = rows.segment_ids
            cache = cache.with_segments(segments) if layers is None else cache.with_written(layers, segments)
        return x, cache, heads

    def _context(self, rows: Rows) -> Context:
        """That of a sequence without a cache."""
        return Context(
            "causal",
            rows.segment_ids,
            rows.segment_ids,
            rows.branch_ids,
            rows.angles,
            magnitude=self.rope.magnitude,
            query_scale=rows.query_scale,
        )

    def _query_scale(self, positions: Positions) -> Float[Array, "B T"] | None:
        """Source: Su 2023 (log-n scaling); Bai et al. 2023 (Qwen), section 2.4."""
        if self.log_length is None:
            return None
        places = (positions if positions.ndim == 2 else positions.max(axis=-1)) + 1
        return jnp.log(jnp.maximum(places, self.log_length).astype(jnp.float32)) / math.log(self.log_length)

    @property
    def _head_dim(self) -> int:
        return self.head_dim or self.width // self.num_heads

    def _spans(self, places: VisualPlaces | None) -> list[tuple[int, int]]:
        """First and last + 1 of the layers between drops."""
        drops = () if places is None else self.drops
        return list(itertools.pairwise((0, *(drop.layer for drop in drops), self.depth)))

    def _dropped(self, places: VisualPlaces | None) -> list[int]:
        """Positions that are missing in each span."""
        return [0] + ([] if places is None else [num_dropped(places, drop.num_kept) for drop in self.drops])

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Vocabulary logits in float32."""
        out = self.embedding.attend(hidden) if self.tie_embeddings else self.head(hidden)
        return out.astype(jnp.float32)


def _spans_of(cache: Cache) -> list[tuple[int, int]]:
    """First and last + 1 of the layers of every part of a cache."""
    counts = itertools.accumulate((part.layers.key.shape[0] for part in cache.parts), initial=0)
    return list(itertools.pairwise(counts))
