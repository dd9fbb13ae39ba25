"""What reducers of videos share: clips as rows of frames, similarity over time, segments, shares and merged tokens.

Functions act on the tokens of one clip, frame after frame; frames have equally many tokens.
"""

import abc
import functools
from collections.abc import Callable
from typing import ClassVar, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.layers.local_rows import row_by_row
from vlm_jax.ranges import Count
from vlm_jax.reducers.reducer import KeepsFeatures, every, real, unit
from vlm_jax.types import VisualFeatures

Left: TypeAlias = tuple[Float[Array, "K D"], Int[Array, "K"], Bool[Array, "K"]]  # tokens, their indices, mask


class Clip(NamedTuple):
    """The tokens of a clip; a still picture is a clip of one frame.

    Attributes:
      tokens: float32, 0 where masked; no gradient goes through what is computed from `fixed`.
      mask: True where a token is real.
      saliency: the attention that each token gets in its frame; 0 where it is not asked for.
      frame: number of each token's frame; L, the number of tokens, where masked.
      frames: number of frames.
      per_frame: tokens of a frame.
    """

    tokens: Float[Array, "L D"]
    mask: Bool[Array, "L"]
    saliency: Float[Array, "L"]
    frame: Int[Array, "L"]
    frames: Int[Array, ""]
    per_frame: Int[Array, ""]

    @property
    def fixed(self) -> Float[Array, "L D"]:
        """The tokens, as constants for gradients."""
        return jax.lax.stop_gradient(self.tokens)


class Segments(NamedTuple):
    """Neighbouring frames that belong together.

    Attributes:
      first: number of the first frame of each frame's segment; of padding its own.
      length: frames of it; 0 for padding.
    """

    first: Int[Array, "F"]
    length: Int[Array, "F"]


class Merged(NamedTuple):
    """A clip whose static tokens are merged over the frames of their segment.

    Attributes:
      tokens: at the static tokens of the first frame of a segment, the mean over its frames.
      member: False for padding, and static tokens of the other frames.
      static: whether a token is static.
      group: number of the tokens that are ranked together: the static ones of a segment, the others of a frame.
      sizes: members of each token's group.
      first: number of the first frame of each token's segment.
    """

    tokens: Float[Array, "L D"]
    member: Bool[Array, "L"]
    static: Bool[Array, "L"]
    group: Int[Array, "L"]
    sizes: Int[Array, "L"]
    first: Int[Array, "L"]


class ReducesClips(KeepsFeatures):
    """Reduces the frames of a video together; a still picture is a video of one frame.

    Attributes:
      num_kept: number of features, in the mean over the frames of a clip; on packed tokens, of the whole video.
      frames: frames of a clip, whose images follow each other in the batch, as those of `config.processor.frames`.
        Packed videos have their own numbers of frames.

    By the rule `as_released` the number of features depends on the video: there is room for all, the rest is masked.
    """

    reduces_clips: ClassVar[bool] = True

    frames: Count = 1

    def num_left(self, count: int) -> int:
        """`num_kept`, or all where there are fewer; by `as_released` all, most of which are masked."""
        return min(self.num_kept, count) if self.rule == "exact" else count

    def __call__(self, features: VisualFeatures, *, deterministic: bool) -> VisualFeatures:
        """The remaining features; of a clip of several images, divided evenly over these.

        Raises:
          ValueError: the number of images is no multiple of `frames`.
        """
        del deterministic
        if self.rule == "exact" and self.passes(features):
            return every(features)
        batch, size = features.mask.shape
        packed = features.frames is not None
        frames = 1 if packed else self.frames
        if batch % frames:
            raise ValueError(
                f"{self.kind}: expected a multiple of {frames} images, the frames of a clip, got {batch} images"
            )
        count = features.mask.sum(axis=1) if packed else jnp.full(batch // frames, size * frames)
        number = jnp.full(batch // frames, frames) if features.frames is None else features.frames
        saliency = jnp.nan_to_num(self.saliency_of(features)).reshape(batch // frames, -1)
        mask = features.mask.reshape(saliency.shape)
        tokens = real(features.tokens.reshape(*mask.shape, -1), mask)
        of_clip = functools.partial(self._of_clip, whole=self.num_left(size) * frames)
        tokens, kept, mask = row_by_row(jax.vmap(of_clip))(tokens, mask, saliency, number, count)
        first = (jnp.arange(batch) % frames * size)[:, None]  # an image's own first feature
        kept = kept.reshape(batch, -1) - first
        tokens = tokens.reshape(batch, kept.shape[1], -1).astype(features.tokens.dtype)
        return self.left(features, tokens, kept, mask.reshape(batch, -1))

    def saliency_of(self, features: VisualFeatures) -> Float[Array, "B N"]:
        """The attention to the features where the method ranks by it; else zeros."""
        return jnp.zeros(features.mask.shape)

    def _of_clip(
        self,
        tokens: Float[Array, "L D"],
        mask: Bool[Array, "L"],
        saliency: Float[Array, "L"],
        frames: Int[Array, ""],
        count: Int[Array, ""],
        whole: int,
    ) -> Left:
        clip = as_clip(tokens, mask, saliency, frames, count)
        left, kept, shown = self.of_clip(clip, whole)
        if self.rule == "exact":  # a clip with no more features is unchanged
            left = jnp.where(mask.sum() > whole, left, clip.tokens[kept])
        return left, kept, shown

    @abc.abstractmethod
    def of_clip(self, clip: Clip, count: int) -> Left:
        """What is left of a clip: `count` tokens, by `as_released` those that are not masked."""


def as_clip(
    tokens: Float[Array, "L D"],
    mask: Bool[Array, "L"],
    saliency: Float[Array, "L"],
    frames: Int[Array, ""],
    count: Int[Array, ""],
) -> Clip:
    """A clip of `frames` equal frames, which are `count` tokens."""
    frames = jnp.maximum(frames, 1)
    per_frame = jnp.maximum(-(-count // frames), 1)
    frame = jnp.where(mask, jnp.arange(len(mask)) // per_frame, len(mask))
    return Clip(tokens.astype(jnp.float32), mask, jax.lax.stop_gradient(saliency), frame, frames, per_frame)


def table(function: Callable[[int], int], size: int) -> Int[Array, "S"]:
    """The integers that a function of Python gives for 0 to `size`, so that they are rounded as Python does."""
    return jnp.asarray([function(number) for number in range(size + 1)], jnp.int32)


def of_frames(x: jax.Array, clip: Clip) -> jax.Array:
    """A value of each frame, for each of its tokens; the last one's for padding."""
    return x[jnp.minimum(clip.frame, len(x) - 1)]


def similarity_before(clip: Clip, back: Int[Array, "L"]) -> Float[Array, "L"]:
    """Cosine of each token to that at the same place `back` frames before; 0 where there is none."""
    units = unit(clip.fixed[None])[0]
    before = jnp.arange(len(units)) - back * clip.per_frame
    found = (units * units[jnp.maximum(before, 0)]).sum(axis=1)
    return jnp.where((before >= 0) & clip.mask, found, 0)


def frame_means(clip: Clip) -> Float[Array, "L D"]:
    """The mean of each frame's tokens; 0 for frames that there are not."""
    size = len(clip.mask)
    total = jax.ops.segment_sum(clip.fixed, clip.frame, size)
    number = jax.ops.segment_sum(clip.mask.astype(jnp.float32), clip.frame, size)
    return total / jnp.maximum(number, 1)[:, None]


def neighbour_similarity(means: Float[Array, "F D"], frames: Int[Array, ""]) -> Float[Array, "F"]:
    """Cosine of each frame to the next one; infinite for the last frame and padding."""
    units = unit(means[None])[0]
    found = (units * jnp.roll(units, -1, axis=0)).sum(axis=1)
    return jnp.where(jnp.arange(len(means)) < frames - 1, found, jnp.inf)


def segments(starts: Bool[Array, "F"], frames: Int[Array, ""]) -> Segments:
    """Segments that begin at the given frames, and at the first."""
    number = jnp.arange(len(starts))
    there = number < frames
    first = jax.lax.cummax(jnp.where((starts & there) | (number == 0) | ~there, number, 0))
    length = jax.ops.segment_sum(there.astype(jnp.int32), first, len(starts))[first]
    return Segments(first, jnp.where(there, length, 0))


def merge_static(clip: Clip, found: Segments, static: Bool[Array, "L"]) -> Merged:
    """Merges the tokens that are static: with those at the same place in all frames of their segment."""
    size = len(clip.mask)
    first, length = of_frames(found.first, clip), of_frames(found.length, clip)
    static = static & clip.mask & (length > 1)
    lead = first_tokens(clip, first)
    means = jax.ops.segment_sum(jnp.where(static[:, None], clip.tokens, 0), lead, size)
    leads = static & (lead == jnp.arange(size))
    tokens = jnp.where(leads[:, None], means / jnp.maximum(length, 1)[:, None], clip.tokens)
    member = clip.mask & (leads | ~static)
    group = jnp.where(clip.mask, jnp.where(static, size + first, clip.frame), 2 * size)
    sizes = jax.ops.segment_sum(member.astype(jnp.int32), group, 2 * size + 1)[group]
    return Merged(tokens, member, static, group, sizes, first)


def first_tokens(clip: Clip, first: Int[Array, "L"]) -> Int[Array, "L"]:
    """The index of the token at the same place in frame `first`; its own for padding."""
    own = jnp.arange(len(clip.mask))
    return jnp.where(clip.mask, own - (clip.frame - first) * clip.per_frame, own)


def in_order(keys: tuple[jax.Array, ...], shown: Bool[Array, "L"], count: int) -> tuple[Int[Array, "K"], jax.Array]:
    """Indices of the first `count` by several keys, the first one first, those that are not shown last; with a mask."""
    order = jnp.lexsort((*keys[::-1], ~shown))[:count]
    return order, shown[order]


def sorted_best(keys: tuple[jax.Array, ...], mask: Bool[Array, "L"], count: int) -> tuple[Int[Array, "K"], jax.Array]:
    """Like `in_order`, and then in the order of the tokens; unmasked ones first."""
    best, _ = in_order(keys, mask, count)
    kept = jnp.sort(jnp.where(mask[best], best, best + len(mask)))
    return kept % len(mask), kept < len(mask)


def shares(rank: Int[Array, "L"], sizes: jax.Array) -> Float[Array, "L"]:
    """Priorities whose smallest divide any number in proportion to the sizes, the lowest ranks of each group first.

    Source: the method of Webster (Sainte-Lague) for proportional shares.
    """
    return (rank + 0.5) / jnp.maximum(sizes, 1)


def means_of_joined(
    tokens: Float[Array, "L D"], joined: Int[Array, "L"], kept: Int[Array, "K"]
) -> tuple[Float[Array, "K D"], Float[Array, "K"]]:
    """The mean of the tokens that joined each kept one, 0 where none did, and their number."""
    joins = (joined[:, None] == kept[None]).astype(jnp.float32)
    number = joins.sum(axis=0)
    total = jnp.einsum("lk,ld->kd", joins, tokens, precision="highest")
    return total / jnp.maximum(number, 1)[:, None], number
