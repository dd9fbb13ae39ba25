"""VisPruner: keeps features with high attention, and of the others those that are not duplicates."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.ranges import Share
from vlm_jax.reducers.reducer import KeepsAttended, every, pick, real, unit
from vlm_jax.types import VisualFeatures

_MOST = 8  # features that leave in one round
_LAST = 2.0  # above any cosine


class VisPruner(KeepsAttended):
    """Important features, with the highest attention, and diverse ones from the rest; they stay in order.

    The rest stands by falling attention. In every round it is split into alternating halves, and the features of the
    first half that are most like one of the second leave, at most 8, until the budget is met. The first half then
    stands by falling similarity, before the second.

    Attributes:
      important_share: share of the budget that is important, rounded down.

    Source: Zhang et al. 2025 (VisPruner), section 3; llava_arch.py, encode_images. The attention is of the last built
    block, from the class token, averaged over heads; without a class token, over all patches. Deviations: the release
    fails where the rest is odd while features have to leave, or the first half is shorter than their number; here the
    first half is then the longer one, and no more leave than it has. The rule `as_released` does not differ.
    """

    kind: ClassVar[str] = "vispruner"

    important_share: Share = 0.5

    @property
    def num_important(self) -> int:
        """Number of important features."""
        return int(self.num_kept * self.important_share)

    def __call__(self, features: VisualFeatures, *, deterministic: bool) -> VisualFeatures:
        del deterministic
        if self.passes(features):
            return every(features)
        return self.take(features, jnp.sort(self.chosen(features), axis=1))

    def chosen(self, features: VisualFeatures) -> Int[Array, "B K"]:
        """Indices of the important features by falling attention, and of the diverse ones in their last order."""
        saliency, _ = self.attended(features)
        order = jnp.argsort(jnp.where(features.mask, -jnp.nan_to_num(saliency), jnp.inf), axis=1)
        first, rest = order[:, : self.num_important], order[:, self.num_important :]
        count = self.num_kept - self.num_important
        if count:
            first = jnp.concatenate([first, distinct(features, rest, count)], axis=1)
        return first


def distinct(features: VisualFeatures, rest: Int[Array, "B R"], count: int) -> Int[Array, "B K"]:
    """The `count` of the features at `rest` that stay when those most like another one leave.

    Args:
      features: of which masked ones are the last in `rest`.
      rest: in the order that alternating halves are made of.
      count: at least 1.
    """
    units = pick(unit(real(jax.lax.stop_gradient(features.tokens), features.mask)), rest)
    similarity = jnp.einsum("bnd,bmd->bnm", units, units)
    numbers = jnp.broadcast_to(jnp.arange(rest.shape[1])[None], rest.shape)
    left = pick(features.mask, rest).sum(axis=1)

    def leave(state: tuple[Int[Array, "B R"], Int[Array, "B"]], _: None):
        """Orders what stays before what has left."""
        places, left = state
        there = numbers < left[:, None]
        halves = there & (numbers % 2 == 0), there & (numbers % 2 == 1)
        likeness = _likeness(similarity, places, *halves)
        size = (left + 1) // 2
        leaving = jnp.clip(jnp.minimum(left - count, _MOST), 0, size)[:, None]
        rank = jnp.argsort(jnp.argsort(jnp.where(halves[0], -likeness, _LAST), axis=1), axis=1)
        second = size[:, None] - leaving + numbers // 2
        gone = numbers + rest.shape[1]  # keeps padding and what has left before in its order
        target = jnp.where(halves[1], second, gone)
        target = jnp.where(halves[0], jnp.where(rank < leaving, gone, rank - leaving), target)
        moved = pick(places, jnp.argsort(target, axis=1))
        return (jnp.where(leaving > 0, moved, places), left - leaving[:, 0]), None

    state, _ = jax.lax.scan(leave, (numbers, left), length=num_rounds(rest.shape[1], count))
    return pick(rest, state[0][:, :count])


def _likeness(
    similarity: Float[Array, "B R R"],
    places: Int[Array, "B R"],
    first: Bool[Array, "B R"],
    second: Bool[Array, "B R"],
) -> Float[Array, "B R"]:
    """The largest cosine of each feature at `places` of the first half with one of the second."""
    among = pick(second, jnp.argsort(places, axis=1))
    nearest = jnp.max(jnp.where(among[:, None], similarity, -_LAST), axis=-1)
    return jnp.where(first, pick(nearest, places), -_LAST)


def num_rounds(size: int, count: int) -> int:
    """Rounds after which no more than `count` of up to `size` features are left."""
    needed = {left: 0 for left in range(count + 1)}
    for left in range(count + 1, size + 1):
        needed[left] = 1 + needed[left - min(left - count, _MOST, (left + 1) // 2)]
    return max(needed.values())
