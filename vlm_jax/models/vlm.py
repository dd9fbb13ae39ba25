"""The vision-language model: encoder, reducer, connector and decoder."""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.connectors.connector import Connector, IndicatorConnector
from vlm_jax.decoders.cache import Cache
from vlm_jax.decoders.decoder import Decoder, HeadKernel
from vlm_jax.encoders.encoder import Encoder
from vlm_jax.layers.learned_rows import LearnedRows
from vlm_jax.layers.local_rows import interpolated_rows, local_rows, on_own_device
from vlm_jax.models.guide import Guide
from vlm_jax.reducers.behind_connector import kept_levels, positions_of_kept, reduce_packed, token_features
from vlm_jax.reducers.reducer import Reducer
from vlm_jax.types import (
    NO_ID,
    PADDING_SEGMENT,
    PROMPT_SEGMENT,
    TEXT_SLOT,
    Batch,
    Dtype,
    Instruction,
    PackedPatches,
    Positions,
    Question,
    TwoSizes,
    VisualFeatures,
    VisualPlaces,
    VisualTokens,
    WholesAndTiles,
)


class Embedded(NamedTuple):
    """A decoder's input.

    Attributes:
      x: embeddings.
      segment_ids: those of the batch; a masked visual token is padding.
      places: positions of the visual tokens, for a decoder that drops some of them, else None.
      positions: those of the batch, with the original positions of visual tokens that keep them.
      token_ids: those of the batch, and `NO_ID` at visual tokens.
      levels: what is added to the outputs of the decoder's first blocks, D channels for each, concatenated: those of
        the visual tokens, and zeros for text; None for nothing.
    """

    x: Float[Array, "B T D"]
    segment_ids: Int[Array, "B T"]
    places: VisualPlaces | None
    positions: Positions
    token_ids: Int[Array, "B T"]
    levels: Float[Array, "B T F"] | None = None


Images = Float[Array, "images height width channels"] | PackedPatches | TwoSizes | WholesAndTiles
Seen = TypeVar("Seen", VisualFeatures, VisualTokens, VisualFeatures | tuple[VisualFeatures, VisualFeatures])
_NO_DECODER = "this model has no decoder, only an encoder and a connector: call it, or visual_tokens, for visual tokens"


def flat_images(
    images: Float[Array, "B I height width channels"] | PackedPatches | TwoSizes | WholesAndTiles,
) -> Images:
    """A batch's images as input of an encoder: on one batch axis; packed ones, and those with tiles, as they are."""
    if isinstance(images, PackedPatches | WholesAndTiles):
        return images
    return jax.tree.map(lambda pixels: pixels.reshape(-1, *pixels.shape[2:]), images)


def flat_question(batch: Batch) -> Question | None:
    """The questions of a batch's images, in the order of `flat_images`."""
    if batch.question is None:
        return None
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), batch.question)


def without_masked(batch: Batch, segments: Int[Array, "B T"]) -> Positions:
    """Positions computed without masked visual tokens: later positions in the segment are decreased.

    So a training sequence with masked tokens gives the same outputs as without these tokens.
    Positions are unchanged where an image has the positions of its grid, whatever the number of its tokens: on three
    axes, and where a reducer's tokens keep their positions.
    """
    if batch.positions.ndim == 3 or batch.visual_positions is not None:
        return batch.positions
    given = jnp.asarray(batch.segment_ids)
    masked = (given != PADDING_SEGMENT) & (segments == PADDING_SEGMENT)
    before = jnp.cumsum(masked, axis=1) - masked
    starts = given != jnp.pad(given[:, :-1], ((0, 0), (1, 0)), constant_values=PADDING_SEGMENT)
    return batch.positions - (before - jax.lax.cummax(jnp.where(starts, before, 0), axis=1))


def _kept_in_place(seen: Seen) -> Seen:
    """Features, those of two encoders, or visual tokens, each on the device of its row of the batch."""
    if isinstance(seen, tuple):
        return cast(Seen, tuple(map(_kept_in_place, seen)))
    levels = None if seen.levels is None else on_own_device(seen.levels)
    return dataclasses.replace(seen, tokens=on_own_device(seen.tokens), levels=levels)


class VLM(nn.Module):
    """Composes an encoder, a reducer, a connector and a decoder; it has no parameters of its own.

    Attributes:
      encoder: an entry of `encoders.ENCODERS`, or of another of its tables; None for a language model.
      connector: an entry of `connectors.CONNECTORS`; None without an encoder.
      decoder: an entry of `decoders.DECODERS`; None for an encoder and a connector only, which return visual tokens.
      reducer: an entry of `reducers.REDUCERS`, or None.
      reduce: for a reducer outside of the encoder and the decoder, whether it acts on the encoder's `features`,
        before the connector, or on the connector's `tokens`, required where several images are packed in a row.
      learned_rows: the first rows of every example's visual table, before the tokens of its images: a
        `LearnedRows`, or `connector` for the `indicators()` of the connector; None for none.
      guide: embeds images and questions for a reducer that is `guided_by` them, else None.
    """

    encoder: Encoder | None
    connector: Connector | None
    decoder: Decoder | None = None
    reducer: Reducer | None = None
    reduce: Literal["features", "tokens"] = "features"
    learned_rows: LearnedRows | Literal["connector"] | None = None
    guide: Guide | None = None

    @property
    def num_learned_rows(self) -> int:
        """Rows of the visual table before those of images."""
        if self.learned_rows is None:
            return 0
        if isinstance(self.learned_rows, str):
            return self._indicating.num_indicators
        return len(self.learned_rows.names)

    @property
    def _indicating(self) -> IndicatorConnector:
        """The connector, of a model whose learned rows are the connector's."""
        assert isinstance(self.connector, IndicatorConnector)
        return self.connector

    def visual_tokens(
        self,
        images: Images,
        instruction: Instruction | None = None,
        question: Question | None = None,
        *,
        deterministic: bool = True,
    ) -> VisualTokens:
        """Visual tokens of a flat batch of images, of sequences of packed ones, or of rows of both sizes, reduced.

        Args:
          images: normalised pixels, or packed patches.
          instruction: for a connector that takes one, one row per image.
          question: for a model with a guide, that of every image.
          deterministic: False in training.

        Raises:
          ValueError: the connector's number of tokens differs from its `num_tokens`, there is no encoder, or the
            reducer cannot act on packed images, or on the features of two encoders; there is a guide, but no question.
        """
        if self.encoder is None or self.connector is None:
            raise ValueError("this is a language model without an encoder: expected a batch with images=None")
        if isinstance(images, WholesAndTiles):
            return self._of_both(images, deterministic)
        features = _kept_in_place(self.encoder(images))
        if self.guide is not None:
            if question is None or isinstance(features, tuple):
                raise ValueError(
                    "this model chooses visual tokens by the question: expected a batch with question, made by the "
                    "processor of a system with this reducer"
                )
            features = dataclasses.replace(features, guidance=self.guide(features, question))
        reducer = None if self.reducer is None or self.reducer.reduces_in == "decoder" else self.reducer
        if reducer is None:
            return self._connected(self.connector, features, instruction, deterministic)
        if isinstance(features, tuple):
            raise ValueError(
                f"{reducer.kind} acts on the features of one encoder, and {type(self.encoder).__name__} returns "
                "those of two; set its combine to 'feature'"
            )
        if self.reduce == "tokens":
            tokens = self._connected(self.connector, features, instruction, deterministic)
            found = token_features(tokens, features, self.connector.token_grid(features.grid))
            return self._reduced(reducer, found, tokens.levels, images, deterministic)
        if isinstance(images, PackedPatches):
            raise ValueError(
                f"{reducer.kind} acts on the features of one image, but several are packed in a row; set reduce to "
                "'tokens', so that it acts after the connector"
            )
        reduced = _kept_in_place(reducer(features, deterministic=deterministic))
        tokens = self._connected(self.connector, reduced, instruction, deterministic)
        if reduced.kept is None or self.connector.token_grid(reduced.grid) != reduced.grid:
            return tokens  # a token is computed from several features, or all features are kept
        return dataclasses.replace(tokens, kept=reduced.kept)

    def _of_both(self, images: WholesAndTiles, deterministic: bool) -> VisualTokens:
        """The tokens of wholes and of tiles, in the order of each row's visual table."""
        size, parts = len(images.order), []
        for pixels in (images.wholes, images.tiles):
            found = self.visual_tokens(pixels.reshape(-1, *pixels.shape[2:]), deterministic=deterministic)
            leaves = found.tokens, found.mask, found.levels
            parts.append([None if leaf is None else leaf.reshape(size, -1, *leaf.shape[2:]) for leaf in leaves])
        tables = tuple(jnp.concatenate(pair, axis=1) for pair in zip(*parts, strict=True) if pair[0] is not None)
        tokens, mask, *levels = local_rows(tables, images.order)
        return VisualTokens(tokens, mask, levels=levels[0] if levels else None)

    def _connected(
        self,
        connector: Connector,
        features: VisualFeatures | tuple[VisualFeatures, VisualFeatures],
        instruction: Instruction | None,
        deterministic: bool,
    ) -> VisualTokens:
        """The connector's tokens; checks their number."""
        connect = cast(Callable[..., VisualTokens], connector)  # some kinds take two encoders, or an instruction
        instructed = {} if instruction is None else {"instruction": instruction}
        tokens = _kept_in_place(connect(features, deterministic=deterministic, **instructed))
        grid = (features[0] if isinstance(features, tuple) else features).grid  # both encoders have the same grid
        expected = connector.num_tokens(grid)
        if tokens.tokens.shape[1] != expected:
            raise ValueError(
                f"{type(connector).__name__} gave {tokens.tokens.shape[1]} tokens for a {grid} grid, "
                f"but its num_tokens gives {expected}; one of the two is wrong"
            )
        return tokens

    def _reduced(
        self,
        reducer: Reducer,
        found: VisualFeatures,
        levels: Float[Array, "B M F"] | None,
        images: Images,
        deterministic: bool,
    ) -> VisualTokens:
        """Applies the reducer to the connector's tokens, and keeps their levels."""
        if reducer.reduces_in is not None:
            raise ValueError(
                f"{reducer.kind} works in the {reducer.reduces_in}, not on tokens; set reduce to 'features'"
            )
        if not isinstance(images, PackedPatches):
            left = reducer(found, deterministic=deterministic)
            return kept_levels(VisualTokens(left.tokens, left.mask, left.kept), levels)
        if images.images is None:
            raise ValueError(
                f"{reducer.kind}: expected packed patches with the positions of each image's tokens (images)"
            )
        return kept_levels(reduce_packed(reducer, found, images.images, deterministic=deterministic), levels)

    def table(
        self, tokens: VisualTokens, size: int, dtype: Dtype
    ) -> tuple[Float[Array, "B rows D"], Bool[Array, "B rows"], int]:
        """The visual table of `size` examples with its mask, learned rows first, and the number of learned rows."""
        rows = tokens.tokens.reshape(size, -1, tokens.tokens.shape[-1]).astype(dtype)
        shown = tokens.mask.reshape(size, -1)
        if self.learned_rows is None:
            return rows, shown, 0
        first = self._indicating.indicators() if isinstance(self.learned_rows, str) else self.learned_rows()
        first = jnp.broadcast_to(first.astype(dtype)[None], (size, *first.shape))
        shown = jnp.pad(shown, ((0, 0), (first.shape[1], 0)), constant_values=True)
        return jnp.concatenate([first, rows], axis=1), shown, first.shape[1]

    def embed(self, batch: Batch, *, deterministic: bool = True) -> Embedded:
        """The decoder's input: embedded text, with visual tokens gathered from the visual table."""
        if self.decoder is None:
            raise ValueError(_NO_DECODER)
        text = self.decoder.embed(batch.tokens)
        if batch.images is None:
            segments = jnp.asarray(batch.segment_ids)
            return Embedded(text, segments, None, without_masked(batch, segments), jnp.asarray(batch.tokens))
        size = batch.tokens.shape[0]
        visual = self.visual_tokens(
            flat_images(batch.images), batch.instruction, flat_question(batch), deterministic=deterministic
        )
        table, real, num_learned = self.table(visual, size, text.dtype)
        tables, levels = (table,), None
        if visual.levels is not None:
            added = visual.levels.reshape(size, -1, visual.levels.shape[-1]).astype(text.dtype)
            tables = (table, jnp.pad(added, ((0, 0), (num_learned, 0), (0, 0))))
        index = jnp.maximum(batch.visual_index, 0)
        if batch.interpolation is None:
            shown, rows, *rest = local_rows((real, *tables), index)
        else:
            (shown,) = local_rows((real,), index)
            of_rows = jnp.asarray(batch.interpolation.index), jnp.asarray(batch.interpolation.weights)
            rows, *rest = (interpolated_rows(one, *of_rows) for one in tables)
        if rest:
            levels = jnp.where(batch.visual_index[..., None] == TEXT_SLOT, 0, rest[0])
        segments = jnp.where((batch.visual_index == TEXT_SLOT) | shown, batch.segment_ids, PADDING_SEGMENT)
        positions, places = without_masked(batch, segments), None
        if batch.visual_positions is not None and visual.kept is not None:
            of_images = jnp.asarray(batch.visual_index) - num_learned
            own = positions_of_kept(batch.visual_positions, visual.kept, jnp.maximum(of_images, 0))
            chosen = of_images >= 0
            positions = jnp.where(chosen if positions.ndim == 2 else chosen[..., None], own, positions)
        if self.decoder.drops:
            places = batch.places
            if places is None:
                raise ValueError(
                    "this decoder drops visual tokens: expected a batch with places, made by the processor of a system "
                    "with this reducer"
                )
            places = jax.tree.map(jnp.asarray, places)
        is_text = batch.visual_index == TEXT_SLOT
        x = jnp.where(is_text[..., None], text, rows)
        return Embedded(x, segments, places, positions, jnp.where(is_text, batch.tokens, NO_ID), levels)

    def __call__(self, batch: Batch, *, deterministic: bool = True) -> Float[Array, "B T V"] | VisualTokens:
        """Float32 logits at every position; without a decoder, the visual tokens of the images."""
        if self.decoder is None:
            if batch.images is None:
                raise ValueError("this model has no decoder: expected a batch with images, got images=None")
            return self.visual_tokens(
                flat_images(batch.images), batch.instruction, flat_question(batch), deterministic=deterministic
            )
        return self.decoder.logits(self.hidden(batch, deterministic=deterministic))

    def hidden(self, batch: Batch, *, deterministic: bool = True) -> Float[Array, "B T D"]:
        """The decoder's final hidden states at every position, the input of the head.

        Raises:
          ValueError: there is no decoder.
        """
        if self.decoder is None:
            raise ValueError(_NO_DECODER)
        given = self.embed(batch, deterministic=deterministic)
        hidden, _ = self.decoder(
            given.x,
            given.positions,
            given.segment_ids,
            branch_ids=batch.branch_ids,
            places=given.places,
            levels=given.levels,
            group_ids=batch.group_ids,
            token_ids=given.token_ids,
        )
        return hidden

    def head_kernel(self) -> HeadKernel:
        """The kernel of the decoder's head, which gives logits of `hidden`.

        Raises:
          ValueError: there is no decoder.
        """
        if self.decoder is None:
            raise ValueError(_NO_DECODER)
        return self.decoder.head_kernel()

    def prefill(self, batch: Batch, cache_length: int, cache_dtype: Dtype = None) -> tuple[Float[Array, "B V"], Cache]:
        """Runs prompts, one per row, padded on either side; `branch_ids` are for sequences without a cache.

        Returns:
          Logits of the last token of every row, and a cache of `cache_length` slots, in `cache_dtype` or the
          decoder's own, with the prompt in it.
        """
        if self.decoder is None:
            raise ValueError(_NO_DECODER)
        given = self.embed(batch)
        segments = given.segment_ids
        cache = self.decoder.init_cache(batch.tokens.shape[0], cache_length, cache_dtype, places=given.places)
        hidden, written = self.decoder(
            given.x,
            given.positions,
            segments,
            cache,
            places=given.places,
            levels=given.levels,
            group_ids=batch.group_ids,
            token_ids=given.token_ids,
        )
        assert written is not None
        last = jnp.max(jnp.where(segments == PADDING_SEGMENT, 0, jnp.arange(segments.shape[1])[None]), axis=1)
        hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
        return self.decoder.logits(hidden[:, 0]), written

    def extend(
        self, tokens: Int[Array, "B T"], positions: Positions, cache: Cache
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Runs T more text tokens of the prompt's segment, `PROMPT_SEGMENT`, after the cache; logits of the last."""
        if self.decoder is None:
            raise ValueError(_NO_DECODER)
        segments = jnp.full_like(tokens, PROMPT_SEGMENT)
        hidden, written = self.decoder(self.decoder.embed(tokens), positions, segments, cache, token_ids=tokens)
        assert written is not None
        return self.decoder.logits(hidden[:, -1]), written
