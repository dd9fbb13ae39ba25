"""PruneVid: static tokens are merged over the frames of a segment, and similar tokens by clustering."""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.layers.density_peaks import distances, nearest_centers, peak_scores, ranks, together
from vlm_jax.ranges import Share, Size
from vlm_jax.reducers.clips import (
    Clip,
    Left,
    ReducesClips,
    Segments,
    first_tokens,
    frame_means,
    in_order,
    means_of_joined,
    merge_static,
    of_frames,
    segments,
    shares,
    sorted_best,
    table,
)
from vlm_jax.reducers.reducer import unit

_SMALL = 14  # tokens; by the release, a group that has no more is not clustered


class PruneVid(ReducesClips):
    """Splits a video into segments, merges their static tokens over time, and clusters tokens inside frames.

    Frames are clustered by their mean token; the longest run of each cluster is a segment. A token is static where the
    cosines among the tokens at its place, in the mean over all pairs of frames of the segment, exceed `threshold`:
    these are averaged. The static tokens of a segment and the other tokens of each frame are groups, which are
    clustered by density peaks; the budget is divided in proportion to their sizes, the densest peaks first. A token
    that is left is the mean of its cluster. Where fewer tokens than the budget remain, static tokens of later frames
    are kept beside, the least static ones first. Tokens stay in order of their centres. A still picture is clustered.

    By the rule `as_released` a group of more than 14 tokens has `cluster_ratio` of them as clusters, rounded down, and
    others stay; the static tokens of a segment come first, and the clusters of a group by falling score.

    Attributes:
      threshold: above which mean cosine a token is static (tau).
      segment_ratio: clusters of frames, as a share of the frames, rounded down, at least one.
      cluster_ratio: by `as_released`, clusters of a group, as a share of its tokens.
      num_neighbors: nearest neighbours that give a density, fewer where there are fewer.

    Source: Huang et al. 2024 (PruneVid), section 3.2; models/pllava/modeling_pllava.py, merge_frames_dynamic. Only the
    merging before the decoder: the paper then prunes by the attention of a layer. Deviations: no noise in densities;
    with fewer frames than neighbours the release fails. As there, of several longest runs of a cluster all stay.
    """

    kind: ClassVar[str] = "prunevid"

    threshold: Share = 0.8
    segment_ratio: Share = 0.25
    cluster_ratio: Share = 0.5
    num_neighbors: Size = 7

    def of_clip(self, clip: Clip, count: int) -> Left:
        """What is left of a clip."""
        size = len(clip.mask)
        found = self.segments(clip)
        similarity = static_similarity(clip, found)
        merged = merge_static(clip, found, similarity > self.threshold)
        fixed, pairs = jax.lax.stop_gradient(merged.tokens), together(merged.group, merged.member)
        distance = distances(fixed)
        rank = ranks(peak_scores(distance, pairs, self.num_neighbors), pairs)
        number = jnp.arange(size)
        if self.rule == "as_released":
            clustered = merged.sizes > _SMALL
            clusters = table(lambda tokens: max(int(tokens * self.cluster_ratio), 1), size)[merged.sizes]
            center = merged.member & (~clustered | (rank < clusters))
            inside = jnp.where(clustered, rank, number)
            kept, mask = in_order((merged.first, ~merged.static, clip.frame, inside), center, count)
        else:
            share = jnp.where(merged.member, shares(rank, merged.sizes), 2)
            extra = jnp.where(merged.member, 0, similarity)
            kept, mask = sorted_best((share, extra), clip.mask, count)
            center = jnp.zeros(size, bool).at[kept].set(mask) & merged.member
        joined = nearest_centers(distance, pairs, center, rank)
        means, _ = means_of_joined(merged.tokens, joined, kept)
        return jnp.where(center[kept][:, None], means, merged.tokens[kept]), kept, mask

    def segments(self, clip: Clip) -> Segments:
        """The segments of a clip."""
        size = len(clip.mask)
        clusters = table(lambda frames: max(int(frames * self.segment_ratio), 1), size)[jnp.minimum(clip.frames, size)]
        means, there = frame_means(clip), jnp.arange(size) < clip.frames
        distance, pairs = distances(jnp.where(there[:, None], means, 0)), there[:, None] & there[None]
        rank = ranks(peak_scores(distance, pairs, self.num_neighbors), pairs)
        labels = refined(nearest_centers(distance, pairs, rank < clusters, rank), there)
        return segments(labels != jnp.roll(labels, 1), clip.frames)


class _Run(NamedTuple):
    """The run of frames of one label that ends at a frame: its label, frames, and whether it was filled."""

    label: Int[Array, ""]
    length: Int[Array, ""]
    was_open: Bool[Array, ""]


def refined(labels: Int[Array, "F"], there: Bool[Array, "F"]) -> Int[Array, "F"]:
    """Keeps the longest run of every cluster of frames; others join the longer of the runs on their sides.

    Runs of one frame are not kept. Of equally long neighbours it is the left one; without any the cluster is 0.

    Source: models/pllava/modeling_pllava.py, refine_clusters.
    """
    size = len(labels)
    number = jnp.arange(size)
    labels = jnp.where(there, labels, size)
    starts = (number == 0) | (labels != jnp.roll(labels, 1))
    first = jax.lax.cummax(jnp.where(starts, number, 0))
    length = jax.ops.segment_sum(jnp.ones(size, jnp.int32), first, size)[first]
    longest = jax.ops.segment_max(length, labels, size + 1)[labels]
    is_open = there & ((length < longest) | (longest == 1))
    # The first frame behind each that is not open, and the length of the run from there on.
    behind = jnp.flip(jax.lax.cummin(jnp.flip(jnp.where(is_open, size, number))))
    right = jnp.minimum(behind, size - 1)
    has_right = (behind < size) & there[right]
    right_length = jnp.where(has_right, length[right], 0)  # that run is whole

    nothing = _Run(jnp.asarray(-1, labels.dtype), jnp.asarray(0), jnp.asarray(False))
    return jax.lax.scan(_filled, nothing, (labels, is_open, labels[right], right_length))[1]


def _filled(before: _Run, frame: tuple[jax.Array, ...]) -> tuple[_Run, jax.Array]:
    """The run that ends at a frame, and the frame's label, that of a neighbour where its run is open."""
    label, is_open, right_label, right_length = frame
    filled = jnp.where(right_length > before.length, right_label, jnp.where(before.length > 0, before.label, 0))
    filled = jnp.where(before.was_open, before.label, filled)  # as the frames before it in the open run
    label = jnp.where(is_open, filled, label)
    length = jnp.where((label == before.label) & (before.length > 0), before.length + 1, 1)
    return _Run(label, length, is_open), label


def static_similarity(clip: Clip, found: Segments) -> Float[Array, "L"]:
    """The mean cosine among the tokens at a token's place, over all pairs of frames of its segment; 0 for one frame."""
    first, length = of_frames(found.first, clip), of_frames(found.length, clip)
    lead = first_tokens(clip, first)
    total = jax.ops.segment_sum(unit(clip.fixed[None])[0], lead, len(lead))[lead]
    number = length.astype(jnp.float32)
    mean = ((total**2).sum(axis=1) - number) / jnp.maximum(number * (number - 1), 1)
    return jnp.where(clip.mask & (length > 1), mean, 0)
