"""Dropping visual tokens between a decoder's layers: rows get shorter by a static number of positions."""

import abc
import collections
import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.decoders.cache import Cache
from vlm_jax.decoders.duplicates import pivots_of, unlike_pivots
from vlm_jax.decoders.periods import Stack, periods
from vlm_jax.decoders.raters import rated, raters_of, relevance
from vlm_jax.decoders.rotary import no_prompt, rotary_lengths
from vlm_jax.layers.attention import Context, KeyValue, SharedKeyValue
from vlm_jax.layers.block import LayerCache, Part, TransformerStack, in_turn
from vlm_jax.layers.norm import Norm
from vlm_jax.layers.per_layer import of_layers
from vlm_jax.layers.rope import Rope
from vlm_jax.layers.saliency import Heads, attention_saliency
from vlm_jax.ranges import Depth
from vlm_jax.types import PADDING_SEGMENT, Drop, Dtype, Positions, VisualPlaces, struct

_NOWHERE = 2**30  # the index of padding added after a drop


@struct
class Rows:
    """The state of each remaining position between decoder layers.

    Attributes:
      x: activations.
      positions: rotary positions.
      lengths: length of each position's sequence, where the rotary scaling depends on it, else None.
      angles: rotary angles; of several ropes those of each, concatenated.
      query_scale: factor of the queries, or None.
      segment_ids, branch_ids, group_ids: as in `Batch`.
      index: index in the whole sequence; out of range for a dropped token that serves as padding.
      levels: what is added to the outputs of the first layers, or None.
      own_inputs: P channels that each layer reads of every token, or None.
      shared: keys and values that later layers read, by the stack whose last layer computed them.
    """

    x: Float[Array, "B T D"]
    positions: Positions
    lengths: Int[Array, "B T"] | None
    angles: Float[Array, "B T A"]
    query_scale: Float[Array, "B T"] | None
    segment_ids: Int[Array, "B T"]
    branch_ids: Int[Array, "B T"] | None
    index: Int[Array, "B T"]
    levels: Float[Array, "B T F"] | None = None
    group_ids: Int[Array, "B T"] | None = None
    own_inputs: Float[Array, "B T L P"] | None = None
    shared: dict[str, SharedKeyValue] = dataclasses.field(default_factory=dict)

    def levels_from(self, layer: int) -> Float[Array, "B T F"] | None:
        """The levels of layers from `layer` on; None where they have none."""
        width = self.x.shape[-1]
        if self.levels is None or self.levels.shape[-1] <= layer * width:
            return None
        return self.levels[..., layer * width :]

    def inputs_of(self, start: int, stop: int) -> Float[Array, "B T L P"] | None:
        """The own inputs of layers `start` to `stop` - 1."""
        return None if self.own_inputs is None else self.own_inputs[:, :, start:stop]


def lengths_left(places: VisualPlaces, drops: Sequence[Drop]) -> list[int]:
    """Number of positions in a row after each drop.

    Raises:
      ValueError: `places.lengths` does not have one entry per drop.
    """
    if places.lengths:
        if len(places.lengths) != len(drops):
            raise ValueError(f"places.lengths: expected one for each of {len(drops)} drops, got {places.lengths}")
        return list(places.lengths)
    images, tokens = places.index.shape[1:]
    return [places.ranking.shape[1] - images * (tokens - drop.num_left(tokens)) for drop in drops]


def numbers_left(places: VisualPlaces, coming: Drop) -> Int[Array, "B I"]:
    """Number of tokens of every image that a drop keeps, from the places before the first drop."""
    table = np.asarray([coming.num_left(count) for count in range(places.index.shape[2] + 1)], np.int32)
    return jnp.asarray(table)[jnp.sum(places.index < places.ranking.shape[1], axis=-1)]


def drop(
    rows: Rows,
    places: VisualPlaces,
    saliency: Float[Array, "B T"],
    number: Int[Array, "B I"],
    most: int,
    length: int,
) -> tuple[Rows, VisualPlaces]:
    """Keeps the tokens of every image with the most attention, and all tokens that are not visual.

    Tokens stay in order; among ties the first is kept; padding is dropped first.

    Args:
      rows: T positions.
      places: positions of the visual tokens.
      saliency: attention that each position gets.
      number: tokens of each image to keep.
      most: upper bound of `number`.
      length: remaining positions of a row. A row that loses fewer tokens must have enough padding to drop
        instead.

    Returns:
      Rows of `length` positions, and the places of visual tokens in them.
    """
    batch, before = saliency.shape
    row = jnp.arange(batch)[:, None, None]
    value = jnp.where(rows.segment_ids == PADDING_SEGMENT, -1.0, jax.lax.stop_gradient(saliency))
    value = jnp.where(places.ranking, jnp.inf, value)
    value = jnp.pad(value, ((0, 0), (0, 1)), constant_values=-2.0)  # of a token outside of all images
    tokens = places.index.shape[2]
    most = min(most, tokens)
    best = jax.lax.top_k(value[row, places.index], most)[1]
    best = jnp.sort(jnp.where(jnp.arange(most)[None, None] < number[..., None], best, tokens), axis=-1)
    index = jnp.pad(places.index, ((0, 0), (0, 0), (0, 1)), constant_values=before)
    kept = jnp.take_along_axis(index, best, axis=-1)
    lost = jnp.zeros((batch, before + 1), bool).at[row, places.index].set(True).at[row, kept].set(False)[:, :before]
    going = jnp.where(lost, 2, jnp.where(rows.segment_ids == PADDING_SEGMENT, 1, 0))
    left = jnp.sort(jnp.argsort(going, axis=1)[:, :length], axis=1)

    moved = jnp.full((batch, before + 1), length).at[row[..., 0], left].set(jnp.arange(length)[None])
    shorter = jax.tree.map(lambda leaf: _take(leaf, left), rows)
    filling = _take(lost, left)  # a row that loses more than others is padded with its dropped tokens
    shorter = dataclasses.replace(
        shorter,
        segment_ids=jnp.where(filling, PADDING_SEGMENT, shorter.segment_ids),
        index=jnp.where(filling, _NOWHERE, shorter.index),
    )
    return shorter, VisualPlaces(moved[row, kept], _take(places.ranking, left))


def renumbered(rows: Rows) -> Rows:
    """The rows with positions that count from 0 in every segment, on all axes; 0 for padding.

    A position of a branch follows the previous ones of branch 0 and of its own branch.
    """
    segments = rows.segment_ids
    earlier = jnp.tri(segments.shape[1], k=-1, dtype=bool)[None]
    earlier &= segments[:, :, None] == segments[:, None, :]
    if rows.branch_ids is not None:
        keys = rows.branch_ids[:, None, :]
        earlier &= (keys == 0) | (keys == rows.branch_ids[:, :, None])
    numbers = jnp.where(segments == PADDING_SEGMENT, 0, earlier.sum(axis=2))
    if rows.positions.ndim == 3:
        numbers = jnp.broadcast_to(numbers[..., None], rows.positions.shape)
    return dataclasses.replace(rows, positions=numbers.astype(rows.positions.dtype))


def next_position(positions: Positions, segment_ids: Int[Array, "B T"]) -> Int[Array, "B"]:
    """1 + the largest position of every row, without padding."""
    flat = positions if positions.ndim == 2 else positions.max(axis=-1)
    return 1 + jnp.max(jnp.where(segment_ids == PADDING_SEGMENT, -1, flat), axis=1)


def restore(x: Float[Array, "B T D"], rows: Rows, length: int) -> Float[Array, "B S D"]:
    """Activations of all `length` positions; zeros where tokens were dropped."""
    row = jnp.arange(x.shape[0])[:, None]
    return jnp.zeros((x.shape[0], length, x.shape[2]), x.dtype).at[row, rows.index].set(x, mode="drop")


def _take(leaf: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(leaf, index.reshape(*index.shape, *(1,) * (leaf.ndim - 2)), axis=1)


class DropsTokens:
    """Mixin that runs a decoder's layers with drops of visual tokens between them.

    It provides `init_cache` and `run_layers`. A decoder lists its stacks of blocks in `stacks` and defines
    a row's attention in `context`. Layers whose stacks follow each other periodically run as one scan.
    """

    depth: Depth
    rope: Rope
    drops: tuple[Drop, ...]
    dtype: Dtype
    final_norm: Norm

    @abc.abstractmethod
    def stacks(self) -> tuple[Stack, ...]:
        """The stacks of blocks, by their first layers."""

    @abc.abstractmethod
    def rotary_dim(self) -> int:
        """Rotated coordinates of a head."""

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The rotary settings of its layers; a layer has one of them."""
        return (self.rope,)

    @abc.abstractmethod
    def context(self, rows: Rows) -> Context:
        """The attention context of a sequence without a cache."""

    def context_in(self, name: str, context: Context) -> Context:
        """The attention context of a stack, from that of the sequence; the same where stacks do not differ."""
        del name
        return context

    def source_of(self, name: str) -> str | None:
        """The stack of whose last layer a stack's layers read the keys and values; None where they have their own."""
        del name

    def query_scale(self, positions: Positions) -> Float[Array, "B T"] | None:
        """Factor of every query, or None."""
        del positions

    @abc.abstractmethod
    def empty_layers(self, name: str, depth: int, batch_size: int, slots: int, dtype: Dtype) -> LayerCache:
        """The empty cache of `depth` layers of a stack."""

    def init_cache(
        self, batch_size: int, length: int, dtype: Dtype = None, places: VisualPlaces | None = None
    ) -> Cache:
        """An empty cache for `length` positions per row; layers after a drop have fewer.

        `dtype` is the decoder's when None; `places` are those of the prompt to be cached.
        """
        drops = () if places is None else self.drops
        whole = 0 if places is None else places.ranking.shape[1]
        left = [whole, *([] if places is None else lengths_left(places, drops))]
        parts = []
        for number, (start, stop) in enumerate(_spans(drops, self.depth)):
            slots = length - (whole - left[number])
            dtype = self.dtype if dtype is None else dtype
            kept = self._kept(start, stop)
            layers = (self.empty_layers(name, depth, batch_size, slots, dtype) for name, depth in kept.items())
            part = Cache.empty(tuple(layers), batch_size, slots)
            if any(drop.renumbers for drop in drops[:number]):
                part = dataclasses.replace(part, position_shift=jnp.zeros(batch_size, jnp.int32))
            parts.append(part)
        parts[0] = dataclasses.replace(parts[0], prompt_length=no_prompt(self.ropes, batch_size))
        return Cache.chained(parts)

    def run_layers(
        self,
        embeddings: Float[Array, "B T D"],
        positions: Positions,
        segment_ids: Int[Array, "B T"],
        cache: Cache | None,
        branch_ids: Int[Array, "B T"] | None,
        places: VisualPlaces | None,
        levels: Float[Array, "B T F"] | None = None,
        group_ids: Int[Array, "B T"] | None = None,
        own_inputs: Float[Array, "B T L P"] | None = None,
    ) -> tuple[Rows, Cache | None]:
        """Runs all layers; returns the remaining rows and the updated cache.

        Raises:
          ValueError: groups of positions after those in a cache.
        """
        if group_ids is not None and cache is not None and not cache.is_empty:
            raise ValueError("group_ids: expected None after a prompt in the cache, whose groups are whole, got groups")
        every = jnp.broadcast_to(jnp.arange(embeddings.shape[1])[None], segment_ids.shape)
        lengths, cache = rotary_lengths(self.ropes, positions, segment_ids, cache)
        angles, scale = self._angles(positions, lengths), self.query_scale(positions)
        rows = Rows(embeddings, positions, lengths, angles, scale, segment_ids, branch_ids, every, levels, group_ids)
        rows = dataclasses.replace(rows, own_inputs=own_inputs)
        drops = () if places is None else self.drops
        left = [] if places is None else lengths_left(places, drops)
        whole = places
        # A cache has a part for every span of the prompt in it.
        spans = _spans(drops if cache is None or len(cache.parts) == 1 else self.drops, self.depth)
        following, shift = next_position(positions, segment_ids), None
        raters = None
        if places is not None and any(drop.rating is not None for drop in drops):
            raters = raters_of(embeddings, segment_ids, places)
        written: list[Cache] = []
        for number, (start, stop) in enumerate(spans):
            coming = drops[number] if number < len(drops) else None
            part = None if cache is None else cache.parts[number]
            if part is not None and part.position_shift is not None:
                if part.is_empty:
                    part = dataclasses.replace(part, position_shift=shift)
                else:
                    shift_of = part.position_shift.reshape(-1, *(1,) * (positions.ndim - 1))
                    rows = self._turned(dataclasses.replace(rows, positions=positions - shift_of))
            rows, part, heads = self._span(rows, part, start, stop, coming)
            if part is not None:
                written.append(part)
            if coming is not None and places is not None and whole is not None and heads is not None:
                rows, saliency = self._ranked(rows, heads, places, whole, coming, raters)
                most = coming.num_left(whole.index.shape[2])
                rows, places = drop(rows, places, saliency, numbers_left(whole, coming), most, left[number])
                if coming.renumbers:
                    rows = self._turned(renumbered(rows))
                    shift = following - next_position(rows.positions, rows.segment_ids)
        return rows, Cache.chained(written) if written else None

    def _ranked(
        self,
        rows: Rows,
        heads: Heads,
        places: VisualPlaces,
        whole: VisualPlaces,
        coming: Drop,
        raters: Bool[Array, "B I whole"] | None,
    ) -> tuple[Rows, Float[Array, "B T"]]:
        """What ranks the tokens for a drop: attention, or 1 at those to keep; and the rows with merged tokens."""
        if coming.pivots is not None:
            number = numbers_left(whole, coming)
            pivots = pivots_of(heads.key, rows.segment_ids, places, number, coming.pivots)
            unlike = unlike_pivots(self.final_norm(rows.x), rows.segment_ids, places, pivots, number)
            return rows, unlike.astype(jnp.float32)
        name, layer = self._stack_of(coming.ranked_by)
        context = self._stack(name).context_of(layer, self.context_in(name, self.context(rows)))
        if coming.rating is None or raters is None:
            return rows, attention_saliency(heads, context, places.ranking.astype(jnp.float32))
        left = jnp.take_along_axis(raters, rows.index[:, None], axis=2, mode="fill", fill_value=False)
        scores = jax.lax.stop_gradient(relevance(heads, context, left, places, coming.rating))
        found = rated(rows.x, rows.segment_ids, places, scores, whole, coming.rating)
        index = _take(rows.index, found.source)
        of_source = (rows.levels, rows.own_inputs, rows.shared)
        levels, inputs, shared = jax.tree.map(lambda leaf: _take(leaf, found.source), of_source)
        rows = dataclasses.replace(rows, x=found.x, index=index, levels=levels, own_inputs=inputs, shared=shared)
        return rows, found.left.astype(jnp.float32)

    def _turned(self, rows: Rows) -> Rows:
        """The rows with the rotary angles and query scales of their positions."""
        angles = self._angles(rows.positions, rows.lengths)
        return dataclasses.replace(rows, angles=angles, query_scale=self.query_scale(rows.positions))

    def _angles(self, positions: Positions, lengths: Int[Array, "B T"] | None) -> Float[Array, "B T A"]:
        """The rotary angles of each of the ropes, concatenated."""
        found = [rope.angles(positions, self.rotary_dim(), lengths) for rope in self.ropes]
        return found[0] if len(found) == 1 else jnp.concatenate(found, axis=-1)

    def _stack(self, name: str) -> TransformerStack:
        """The stack that `setup` made under a name."""
        return getattr(self, name)

    def _stack_of(self, layer: int) -> tuple[str, int]:
        """The name of a layer's stack, and its index there."""
        return next((name, layers.index(layer)) for name, layers in self.stacks() if layer in layers)

    def _order(self) -> tuple[str, ...]:
        """The name of every layer's stack."""
        return tuple(self._stack_of(layer)[0] for layer in range(self.depth))

    def _kept(self, start: int, stop: int) -> dict[str, int]:
        """The layers of each stack that layers `start` to `stop` - 1 keep in a cache.

        They are those with keys and values of their own, and the last layer of a stack before them that they read: its
        keys and values are kept once more, without the tokens that were dropped since.
        """
        order = self._order()[start:stop]
        kept = collections.Counter(name for name in order if self.source_of(name) is None)
        sources = (self.source_of(name) for name in order)
        return {**kept, **{name: 1 for name in sources if name is not None and name not in kept}}

    def _span(
        self, rows: Rows, cache: Cache | None, start: int, stop: int, coming: Drop | None
    ) -> tuple[Rows, Cache | None, Heads | None]:
        """Layers `start` to `stop` - 1, and the queries and keys that rank tokens for the next drop."""
        context, heads, x = self.context(rows), None, rows.x
        order, kept = self._order()[start:stop], self._kept(start, stop)
        sources = {self.source_of(name) for name in self._order()}
        if cache is not None:
            context = dataclasses.replace(context, key_segments=cache.key_segments(rows.segment_ids), branches=None)
            held = dict(zip(kept, cache.readable, strict=True))
        else:  # what sources compute is returned, as what they would write to a cache
            of_sources = ((name, depth) for name, depth in kept.items() if name in sources)
            held = {name: self.empty_layers(name, depth, x.shape[0], 0, self.dtype) for name, depth in of_sources}
        written = {name: _one_layer(rows.shared[name], held[name]) for name in kept if name not in order}
        ranks = coming is not None and start <= coming.ranked_by == stop - 1  # the last layer of the span does

        def write(name: str, own: LayerCache | None) -> None:
            if own is not None:
                written[name] = written[name].joined(own) if name in written else own

        def given(name: str, past: bool = True) -> SharedKeyValue | None:
            source = self.source_of(name)
            if source is None or source not in written:
                return None if source is None else rows.shared[source]
            before = of_layers(held[source], -1) if past else None
            return SharedKeyValue.of(of_layers(written[source], -1), before, self.dtype)

        for first, period, repeats in periods(order[: len(order) - ranks]):
            names, layer = order[first : first + period], start + first
            levels, inputs = rows.levels_from(layer), rows.inputs_of(layer, layer + period * repeats)
            parts = []
            for place, name in enumerate(names):
                _, index = self._stack_of(layer + place)
                skip, inside = order[:first].count(name), self.context_in(name, context)
                parts.append(Part(self._stack(name), inside, index, held.get(name), skip, given(name)))
            if period == 1 and repeats == parts[0].stack.depth and parts[0].shared is None:
                own = {"cache": parts[0].cache, "levels": levels, "own_inputs": inputs}
                x, *fresh, _ = parts[0].stack(x, parts[0].context, **own)
            else:
                x, fresh = in_turn(parts, repeats, x, levels, inputs, indexed=cache is not None)
            for name, own in zip(names, fresh, strict=True):
                write(name, own)
        if coming is not None:
            name, index = self._stack_of(coming.ranked_by)
            stack = self._stack(name)
            if ranks:
                own = held[name].part(-1, None) if name in held else given(name)
                x, own, heads = stack.attend(x, self.context_in(name, context), index, cache=own)
                inputs = rows.inputs_of(stop - 1, stop)
                own_input = None if inputs is None else inputs[:, :, 0]
                x = stack.feed_forward(x, index, levels=rows.levels_from(stop - 1), own_input=own_input)
                write(name, own)
            else:
                inside = self.context_in(name, self.context(rows))
                heads = stack.attend(x, inside, index, cache=given(name, past=False))[2]
        of_sources = ((name, of_layers(own, -1)) for name, own in written.items() if name in sources)
        shared = {name: SharedKeyValue.of(own, None, self.dtype) for name, own in of_sources}
        rows = dataclasses.replace(rows, x=x, shared={**rows.shared, **shared})
        if cache is not None:
            cache = cache.with_written(tuple(written[name] for name in kept), rows.segment_ids)
        return rows, cache, heads


def _one_layer(shared: SharedKeyValue, like: LayerCache) -> KeyValue:
    """Keys and values as what one layer writes to a cache with the dtypes of `like`."""
    key, value = shared.key.transpose(0, 2, 3, 1), shared.value.transpose(0, 2, 1, 3)
    return KeyValue(key.astype(like.key.dtype)[None], value.astype(like.value.dtype)[None])


def _spans(drops: Sequence[Drop], depth: int) -> list[tuple[int, int]]:
    """(first layer, last layer + 1) of the layers between drops."""
    return list(itertools.pairwise((0, *(drop.layer for drop in drops), depth)))
