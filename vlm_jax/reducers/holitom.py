"""HoliTom: static tokens are merged over the windows that save most, others kept by the attention in their frame."""

import functools
from fractions import Fraction
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.layers.density_peaks import distances, nearest_centers, peak_scores, ranks, together
from vlm_jax.ranges import Share, Size
from vlm_jax.reducers.clips import (
    Clip,
    Left,
    Merged,
    ReducesClips,
    Segments,
    in_order,
    means_of_joined,
    merge_static,
    of_frames,
    segments,
    shares,
    similarity_before,
    sorted_best,
)
from vlm_jax.reducers.reducer import KeepsAttended
from vlm_jax.types import VisualFeatures


class HoliTom(ReducesClips, KeepsAttended):
    """Merges static tokens over windows of frames, then keeps what the budget leaves of them and of every frame.

    A token is static in a window where it exceeds the cosine `threshold` with the next frame's token at its place, for
    all frames of the window. The windows divide the video so that most tokens are saved. The static tokens of a
    window are averaged over it and clustered by density peaks; the other tokens of a frame are ranked by their
    attention. Both keep the same share. A static token that is left is `center_weight` times the centre of its cluster
    plus the rest of the mean of those that joined it. Where fewer tokens than the budget remain, static tokens of later
    frames are kept beside, the least similar to the frame before first. Tokens stay in order. Of a still picture the
    most attended tokens are kept.

    By the rule `as_released` the share is `ratio` of the video's tokens, divided by the share that is left by merging,
    rounded up for a frame and to the nearest, halves to even, for the static tokens; those of a window come first.

    Attributes:
      threshold: above which cosine a token is static (T).
      ratio: by `as_released`, the share of the video's tokens that is kept (RETAIN_RATIO).
      center_weight: of the centre of a cluster (BETA).
      num_neighbors: nearest neighbours that give a density (K), at most as many as clusters.
      longest_window: frames of a window, at most (MAX_WINDOW_SIZE).

    Source: Shao et al. 2025 (HoliTom), section 3.2; holitom/llava_arch.py. Only the merging before the decoder, not
    that in one of its layers. Deviations: no noise in densities; shares are exact fractions, where the release rounds
    floats; no tokens of a frame are clustered (D of the release, by default 0: it fails with another value); newline
    tokens are left to the layout.
    """

    kind: ClassVar[str] = "holitom"

    threshold: Share = 0.8
    ratio: Share = 0.15
    center_weight: Share = 0.6
    num_neighbors: Size = 7
    longest_window: Size = 1024

    def saliency_of(self, features: VisualFeatures) -> Float[Array, "B N"]:
        """The attention to the features."""
        return self.attended(features)[0]

    def of_clip(self, clip: Clip, count: int) -> Left:
        """What is left of a clip."""
        size, released = len(clip.mask), self.rule == "as_released"
        merged = self.merged(clip)
        fixed, pairs = jax.lax.stop_gradient(merged.tokens), together(merged.group, merged.member)
        distance, clusters = distances(fixed), self.numbers(clip, merged, count)
        peaks = peak_scores(distance, pairs, self.num_neighbors, jnp.where(merged.static, clusters, 1))
        rank = ranks(jnp.where(merged.static, peaks, clip.saliency), pairs)
        if released:
            center = merged.member & (rank < clusters)
            kept, mask = in_order((merged.first, ~merged.static, clip.frame), center, count)
        else:
            share = jnp.where(merged.member, shares(rank, merged.sizes), 2)
            extra = jnp.where(merged.member, 0, similarity_before(clip, jnp.ones_like(rank)))
            kept, mask = sorted_best((share, extra), clip.mask, count)
            center = jnp.zeros(size, bool).at[kept].set(mask) & merged.member
        joined = nearest_centers(distance, pairs, center, rank)
        joined = jnp.where(center, size, joined)  # the mean is of the others
        means, number = means_of_joined(merged.tokens, joined, kept)
        mixed = self.center_weight * merged.tokens[kept] + (1 - self.center_weight) * means
        changes = (center & merged.static)[kept] & (number > 0)
        return jnp.where(changes[:, None], mixed, merged.tokens[kept]), kept, mask

    def merged(self, clip: Clip) -> Merged:
        """The clip with its static tokens merged."""
        runs = self.static_runs(clip)
        found = self.windows(clip, runs)
        first, length = of_frames(found.first, clip), of_frames(found.length, clip)
        last = jnp.arange(len(runs)) + (first + length - 1 - clip.frame) * clip.per_frame
        return merge_static(clip, found, runs[jnp.clip(last, 0, len(runs) - 1)] >= length - 1)

    def static_runs(self, clip: Clip) -> Int[Array, "L"]:
        """For how many frames before it each token has been static at its place."""
        size = len(clip.mask)
        similar = similarity_before(clip, jnp.ones(size, jnp.int32)) > self.threshold
        # Place after place, so that a run is a range.
        own = jnp.arange(size)
        place = jnp.where(clip.mask, own - clip.frame * clip.per_frame, size)
        order = jnp.lexsort((clip.frame, place))
        begins = jax.lax.cummax(jnp.where(similar[order], 0, own))
        return jnp.zeros(size, jnp.int32).at[order].set((own - begins).astype(jnp.int32))

    def windows(self, clip: Clip, runs: Int[Array, "L"]) -> Segments:
        """The windows that save most tokens; of equally good ones the shortest last one."""
        size = len(clip.mask)
        number = jnp.arange(size)
        saved = saved_tokens(clip, runs)

        find = functools.partial(_best_start, saved, self.longest_window)
        _, start = jax.lax.scan(find, jnp.zeros(size + 1, jnp.int32), number)
        last = (clip.frames - 1).astype(jnp.int32), jnp.int32(-2)
        _, starts = jax.lax.scan(functools.partial(_back, start), last, number, reverse=True)
        return segments(starts, clip.frames)

    def numbers(self, clip: Clip, merged: Merged, count: int) -> Int[Array, "L"]:
        """Clusters, or kept tokens, of each token's group, by the share that is left."""
        left = jnp.maximum(merged.member.sum(), 1)
        if self.rule == "exact":
            over, under = jnp.asarray(count), left
        else:
            share = Fraction(self.ratio).limit_denominator(1000)
            over, under = share.numerator * clip.mask.sum(), share.denominator * left
        over = merged.sizes * jnp.minimum(over, under)
        rounded = (2 * over + under) // (2 * under)
        rounded -= (2 * over % (2 * under) == under) & (rounded % 2 == 1)  # halves to even
        return jnp.where(merged.static, rounded, -(-over // under))


def _best_start(
    saved: Int[Array, "F F"], longest: int, best: Int[Array, "F1"], last: Int[Array, ""]
) -> tuple[Int[Array, "F1"], Int[Array, ""]]:
    """The first frame of the window that ends at `last`; best[f] is what the frames before f save."""
    size = len(saved)
    number = jnp.arange(size)
    within = (number <= last) & (last - number < longest)
    found = jnp.where(within, best[:size] + saved[:, last], -1)
    start = (size - 1 - jnp.argmax(found[::-1])).astype(jnp.int32)
    return best.at[last + 1].set(found[start]), start


def _back(
    start: Int[Array, "F"], window: tuple[Int[Array, ""], Int[Array, ""]], frame: Int[Array, ""]
) -> tuple[tuple[Int[Array, ""], Int[Array, ""]], Bool[Array, ""]]:
    """Whether a window begins at a frame, from the last frame back; `window` is its last frame and its first."""
    last, first = window
    first = jnp.where(frame == last, start[frame], first)
    return (jnp.where(frame == first, first - 1, last), first), frame == first


def saved_tokens(clip: Clip, runs: Int[Array, "L"]) -> Int[Array, "F F"]:
    """How many tokens a window saves, by its first and its last frame."""
    size = len(runs)
    frame = jnp.where(clip.mask, clip.frame, size)
    number = jnp.arange(size)
    exact = jnp.zeros((size + 1, size), jnp.int32).at[frame, runs].add(1)[:size]  # tokens of a frame with a run
    at_least = jnp.flip(jnp.cumsum(jnp.flip(exact, axis=1), axis=1), axis=1)
    length = number[None] - number[:, None]  # one less than the frames of the window
    static = at_least[number[None], jnp.maximum(length, 0)]
    return jnp.where(length > 0, static * length, 0)
