"""FastVID: the most attended tokens of every frame, and dense ones of a few frames that the rest is merged into."""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.layers.density_peaks import distances, peak_scores, ranks, together
from vlm_jax.ranges import Share, Size
from vlm_jax.reducers.clips import (
    Clip,
    Left,
    ReducesClips,
    Segments,
    frame_means,
    in_order,
    neighbour_similarity,
    of_frames,
    segments,
    shares,
    sorted_best,
    table,
)
from vlm_jax.reducers.reducer import KeepsAttended, unit
from vlm_jax.types import VisualFeatures

_NEIGHBORS = 4  # of the release


class Numbers(NamedTuple):
    """Tokens that each frame keeps by `as_released`.

    Attributes:
      salient, context: of each frame.
      own: whether its context merges tokens of the frame alone.
    """

    salient: Int[Array, "F"]
    context: Int[Array, "F"]
    own: Bool[Array, "F"]


class FastVID(ReducesClips, KeepsAttended):
    """Keeps salient tokens of every frame, and context tokens of anchor frames, into which the others are merged.

    The video is cut between frames that are least alike, by their mean tokens: at `num_segments` - 1 places, and
    wherever the cosine is below `threshold`. Every frame keeps its most attended tokens. Anchors are every
    `anchor_step`-th frame of a segment, from its last one back; their context tokens are the density peaks among the
    tokens that are not salient. Each token that is not salient is merged into the context token of each anchor of its
    segment that it has the largest cosine to: a context token has the weight 1 / (1 + number of those), at least
    `least_weight`, and their mean the rest. `context_share` of the budget, rounded down, is context, in proportion to
    the frames of the segments, and what anchors cannot use of it goes to the most attended of the other tokens. Tokens
    stay in order. A still picture is a segment of its own.

    By the rule `as_released` every frame has `ratio` of its tokens, rounded down. Without `still` the counts are those
    for LLaVA-OneVision, where remainders of a division among anchors are lost. With it they are those for Qwen2.5-VL:
    only the last of neighbouring frames of a segment that are at least so similar keeps tokens, remainders are shared,
    at most half of a frame is context, a segment has at least one context token, and context tokens of other anchors
    are merged too.

    Attributes:
      num_segments: segments, at least (DySeg_c).
      threshold: below which cosine neighbouring frames are cut (DySeg_tau).
      context_share: share of the kept tokens that is context (STPrune_d).
      anchor_step: frames of a segment for each anchor (DTM_p).
      least_weight: of a context token (DTM_beta).
      ratio: by `as_released`, the share of a frame's tokens.
      still: by `as_released`, from which cosine neighbouring frames of a segment are one (DySeg_ignore); or None.

    Source: Shen et al. 2025 (FastVID), section 3; the statements in modeling_qwen2.py for LLaVA-OneVision and in
    modeling_qwen2_5_vl.py. Tokens keep their positions there. Deviations: frames are compared by their mean tokens, as
    for Qwen2.5-VL; for LLaVA-OneVision by an embedding of the image. No noise in densities; with fewer frames than
    segments, or fewer tokens than neighbours, the release fails.
    """

    kind: ClassVar[str] = "fastvid"

    num_segments: Size = 8
    threshold: Share = 0.9
    context_share: Share = 0.4
    anchor_step: Size = 4
    least_weight: Share = 0.6
    ratio: Share = 0.1
    still: Share | None = None

    def saliency_of(self, features: VisualFeatures) -> Float[Array, "B N"]:
        """The attention to the features."""
        return self.attended(features)[0]

    def of_clip(self, clip: Clip, count: int) -> Left:
        """What is left of a clip."""
        return self.left_of_clip(clip, count, frame_means(clip))

    def left_of_clip(self, clip: Clip, count: int, frames: Float[Array, "F D"]) -> Left:
        """What is left of a clip, whose frames are compared by the given vectors."""
        size = len(clip.mask)
        similarity = neighbour_similarity(frames, clip.frames)
        found = self.segments(similarity, clip.frames)
        in_frame = together(clip.frame, clip.mask)
        attended = ranks(clip.saliency, in_frame)
        if self.rule == "as_released":
            numbers = self.numbers(clip, found, similarity)
            salient = clip.mask & (attended < of_frames(numbers.salient, clip))
        else:
            budget = count - int(count * self.context_share)
            best, _ = in_order((attended, -clip.saliency), clip.mask, budget)
            salient = clip.mask & jnp.zeros(size, bool).at[best].set(True)
        rest = clip.mask & ~salient
        peers = in_frame & rest[:, None] & rest[None]
        rank = ranks(peak_scores(distances(clip.fixed), peers, _NEIGHBORS), peers)
        first = of_frames(found.first, clip)
        in_segment = (first[:, None] == first[None]) & rest[:, None]  # of a token, and the context it may join
        if self.rule == "as_released":
            context = rest & (rank < of_frames(numbers.context, clip))
            kept, mask = in_order((), salient | context, count)
            own = of_frames(numbers.own, clip)[None]
            in_segment &= ~own | (clip.frame[:, None] == clip.frame[None])
            if self.still is not None:
                in_segment &= ~(context[:, None] & (clip.frame[:, None] == clip.frame[None]))
        else:
            anchor, number = of_frames(self.anchors(found), clip), of_frames(self.num_anchors(found), clip)
            weight = of_frames(found.length, clip) / jnp.maximum(number, 1)
            last = jnp.where(anchor, 0, 1)
            share = jnp.where(salient, -1, jnp.where(anchor, shares(rank, weight), 0))
            kept, mask = sorted_best((jnp.where(salient, 0, last), share, -clip.saliency), clip.mask, count)
            context = jnp.zeros(size, bool).at[kept].set(mask) & rest & anchor
        return self._merged(clip, context, in_segment, kept), kept, mask

    def segments(self, similarity: Float[Array, "F"], frames: Int[Array, ""]) -> Segments:
        """The segments, by each frame's similarity to the next one."""
        number = jnp.arange(len(similarity))
        order = jnp.argsort(similarity)
        rank = jnp.zeros_like(order).at[order].set(number)
        cut = ((rank < self.num_segments - 1) | (similarity < self.threshold)) & (number < frames - 1)
        return segments(jnp.roll(cut, 1), frames)

    def anchors(self, found: Segments) -> Bool[Array, "F"]:
        """The anchor frames."""
        back = found.first + found.length - 1 - jnp.arange(len(found.first))
        return (found.length > 0) & (back % self.anchor_step == 0)

    def num_anchors(self, found: Segments) -> Int[Array, "F"]:
        """The number of anchors of each frame's segment."""
        return -(-found.length // self.anchor_step)

    def numbers(self, clip: Clip, found: Segments, similarity: Float[Array, "F"]) -> Numbers:
        """The numbers of tokens that each frame keeps, as released."""
        size, (first, length) = len(clip.mask), found
        total = table(lambda tokens: int(tokens * self.ratio), size)[jnp.minimum(clip.per_frame, size)]
        context = table(lambda tokens: int(tokens * self.context_share), size)
        if self.still is None:
            of_frame = context[total]
            share = of_frame * length // jnp.maximum(self.num_anchors(found), 1)
            salient = jnp.full(size, total - of_frame)
            return Numbers(salient, jnp.where(self.anchors(found), share, 0), share == of_frame)
        in_segment = jnp.maximum(context[jnp.minimum(total * length, size)], 1)
        salient = total * length - in_segment
        last = jnp.arange(size) == first + length - 1
        valid = (length > 0) & (last | (similarity < self.still))
        before = jnp.cumsum(valid) - valid
        number = before - before[first]
        of_segment = jnp.maximum(jax.ops.segment_sum(valid.astype(jnp.int32), first, size)[first], 1)
        salient = jnp.where(valid, salient // of_segment + (number < salient % of_segment), 0)
        back, anchors = of_segment - 1 - number, -(-of_segment // self.anchor_step)
        is_anchor = valid & (back % self.anchor_step == 0)
        share = in_segment // anchors + (back // self.anchor_step < in_segment % anchors)
        share = jnp.where(length == 1, share, jnp.minimum(share, clip.per_frame // 2))
        share = jnp.where(is_anchor, share, 0)
        return Numbers(jnp.minimum(salient, clip.per_frame - share), share, jnp.zeros(size, bool))

    def _merged(
        self, clip: Clip, context: Bool[Array, "L"], usable: Bool[Array, "L L"], kept: Int[Array, "K"]
    ) -> Float[Array, "K D"]:
        """The kept tokens, those of the context with the others merged into them."""
        size, row = len(context), jnp.arange(len(context))[:, None]
        units = unit(clip.fixed[None])[0]
        cosine = jnp.einsum("nd,md->nm", units, units, precision="highest")
        usable = usable & context[None]
        cosine = jnp.where(usable, cosine, -jnp.inf)
        frame = jnp.broadcast_to(jnp.minimum(clip.frame, size - 1)[None], cosine.shape)
        best = jnp.full(cosine.shape, -jnp.inf).at[row, frame].max(cosine)  # of a token to a frame's context
        tied = usable & (cosine == jnp.take_along_axis(best, frame, axis=1))
        place = jnp.where(tied, jnp.arange(size)[None], size)
        lowest = jnp.full(cosine.shape, size).at[row, frame].min(place)
        joins = tied & (place == jnp.take_along_axis(lowest, frame, axis=1))
        joins = joins.astype(jnp.float32)[:, kept]
        number = joins.sum(axis=0)[:, None]
        means = jnp.einsum("nk,nd->kd", joins, clip.tokens, precision="highest") / jnp.maximum(number, 1)
        weight = jnp.maximum(1 / (number + 1), self.least_weight)
        mixed = weight * clip.tokens[kept] + (1 - weight) * means
        return jnp.where(context[kept][:, None], mixed, clip.tokens[kept])
