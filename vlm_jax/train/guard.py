"""Detects steps with non-finite numbers or spikes, which are skipped or end the run."""

import dataclasses
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from vlm_jax.config import check_fields
from vlm_jax.ranges import Count, Range
from vlm_jax.types import Array, Tree, struct

WINDOW, FEWEST = 64, 16  # steps of a running median; a spike is not looked for with fewer

Factor = Annotated[float, Range(above=1)]


class Bounds(NamedTuple):
    """Factors above the running medians of loss and gradient norm at which a step is a spike; None for any."""

    loss: float | None = None
    grad_norm: float | None = None


@dataclasses.dataclass(frozen=True)
class GuardSettings:
    """What is not a good step, keys of `config.loop`; a step that is not good leaves all parameters as they are.

    Attributes:
      on_nonfinite: "stop" ends the run at such a step, "skip" goes on with the next batch. The batch is kept in the
        workdir's folder `replay` either way; see `train.replay`.
      spike_loss: a loss above this factor of its median over the last 64 good steps is not a good step, nor is a
        number that is not finite; None for no such bound.
      spike_grad_norm: likewise for the norm of the gradient.
      max_skipped: with "skip", steps in a row that may be skipped before the run ends.
    """

    on_nonfinite: Literal["stop", "skip"] = "stop"
    spike_loss: Factor | None = None
    spike_grad_norm: Factor | None = None
    max_skipped: Count = 5

    def __post_init__(self):
        check_fields(self, "config.loop.")

    @property
    def bounds(self) -> Bounds:
        """Bounds of spikes."""
        return Bounds(self.spike_loss, self.spike_grad_norm)

    def ends_at(self, skipped: int) -> bool:
        """Whether the run ends after so many steps in a row that were not good."""
        return skipped > (0 if self.on_nonfinite == "stop" else self.max_skipped)


@struct
class Recent:
    """Numbers of the last good steps of a stage, NaN where there were none yet.

    Attributes:
      losses, grad_norms: in no order; the oldest is overwritten.
      taken: good steps of the stage.
      skipped: steps in a row, up to the last, that were not good.
    """

    losses: Float[Array, " W"]
    grad_norms: Float[Array, " W"]
    taken: Int[Array, ""]
    skipped: Int[Array, ""]


def first_recent() -> Recent:
    """Before a stage's first step."""
    numbers = [jnp.full((WINDOW,), jnp.nan, jnp.float32) for _ in range(2)]
    counts = [jnp.zeros((), jnp.int32) for _ in range(2)]  # each a buffer of its own, since a step donates all
    return Recent(*numbers, *counts)


def judged(recent: Recent, loss: jax.Array, grad_norm: jax.Array, bounds: Bounds) -> tuple[jax.Array, Recent]:
    """Whether a step is good, and the numbers with those of the step.

    Args:
      recent: of the steps before.
      loss, grad_norm: of the step.
      bounds: of spikes.
    """
    good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    for factor, value, before in ((bounds.loss, loss, recent.losses), (bounds.grad_norm, grad_norm, recent.grad_norms)):
        if factor is not None:
            good &= (recent.taken < FEWEST) | (value <= factor * jnp.nanmedian(before))
    place = recent.taken % WINDOW
    after = Recent(
        recent.losses.at[place].set(loss.astype(jnp.float32)),
        recent.grad_norms.at[place].set(grad_norm.astype(jnp.float32)),
        recent.taken + 1,
        jnp.zeros((), jnp.int32),
    )
    return good, _chosen(good, after, dataclasses.replace(recent, skipped=recent.skipped + 1))


def _chosen(good: jax.Array, after: Tree, before: Tree) -> Tree:
    """`after` where the step is good, else `before`, leaf by leaf."""
    return jax.tree.map(lambda new, old: jnp.where(good, new, old), after, before)
