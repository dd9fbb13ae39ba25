"""DyCoke: of three frames in four, only the tokens that are least like those at the same place before."""

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm_jax.ranges import Share
from vlm_jax.reducers.clips import Clip, Left, ReducesClips, in_order, of_frames, similarity_before, sorted_best, table


class DyCoke(ReducesClips):
    """Keeps the first of every four frames whole, and of the others the tokens with the least cosine to a frame before.

    The second and the fourth of four frames are compared with the frame before them, the third with the first, at the
    same places. Every compared frame keeps equally many tokens, the least similar ones; what does not divide goes to
    the frames whose next token is least similar. Where the budget is below the whole frames, these are sampled at even
    steps: a still picture is. Tokens stay in order.

    By the rule `as_released` each compared frame keeps 1 - `merging_ratio` of its tokens, rounded down, by rising
    similarity; the third frame of the last four is not compared; an odd last frame is lost.

    Attributes:
      merging_ratio: by `as_released`, the share of a compared frame that is dropped (dycoke_k).

    Source: Tao et al. 2024 (DyCoke), section 3.2; llava/model/llava_arch.py, dycole_ttm. Only the first stage, the
    merging over time: the second one chooses among the cached tokens anew at every decoding step, by attention of that
    step. The release fails with 4 frames or fewer, which are compared in pairs here.
    """

    kind: ClassVar[str] = "dycoke"

    merging_ratio: Share = 0.7

    def of_clip(self, clip: Clip, count: int) -> Left:
        """What is left of a clip."""
        size = len(clip.mask)
        number = jnp.where(clip.mask, clip.frame, 0)
        released = self.rule == "as_released"
        third = (number % 4 == 2) & ((number - 2 < clip.frames - 4) if released else True)
        back = jnp.where(number % 2 == 1, 1, jnp.where(third, 2, 0))
        similarity = jnp.where(back > 0, similarity_before(clip, back), 0)
        rank = ranks_in_frames(similarity, clip)
        if released:
            share = 1 - self.merging_ratio
            most = table(lambda tokens: int(share * tokens), size)[jnp.minimum(clip.per_frame, size)]
            whole = (clip.frames % 2 == 1) & (clip.frames > 1)
            shown = clip.mask & ((back == 0) | (rank < most)) & ~(whole & (number == clip.frames - 1))
            inside = jnp.where(back > 0, rank, jnp.arange(size) % clip.per_frame)
            kept, mask = in_order((number, inside), shown, count)
            return clip.tokens[kept], kept, mask
        anchors = clip.mask & (back == 0)
        total = anchors.sum()
        nth, total = jnp.cumsum(anchors) - 1, jnp.maximum(total, 1)
        even = -(-nth * count // total) * total // count == nth  # number i * total // count for an i
        first = jnp.where(anchors, jnp.where((total <= count) | even, -2, size), rank)
        kept, mask = sorted_best((first, similarity), clip.mask, count)
        return clip.tokens[kept], kept, mask


def ranks_in_frames(scores: Float[Array, "L"], clip: Clip) -> Int[Array, "L"]:
    """How many tokens of the same frame have a lower score, or the same and come first."""
    order = jnp.lexsort((scores, clip.frame))
    places = jnp.zeros_like(order).at[order].set(jnp.arange(len(order)))
    number = (clip.frame[:, None] == jnp.arange(len(order))[None]).sum(axis=0)
    return places - of_frames(jnp.cumsum(number) - number, clip)
