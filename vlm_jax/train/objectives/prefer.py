"""Preference of one answer over another: DPO."""

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import Annotated, Any, ClassVar, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Array, Float

from vlm_jax.build import AnyExperiment
from vlm_jax.config import ConfigError, check_fields
from vlm_jax.losses.cross_entropy import head_losses
from vlm_jax.ranges import Bytes, Positive, Range
from vlm_jax.train.objectives.next_token import final_states
from vlm_jax.train.objectives.objective import Loss, Metrics, Objective, of_conversations
from vlm_jax.types import Batch, Params, Tree


@dataclasses.dataclass(frozen=True)
class Prefer(Objective):
    """Direct preference optimisation on pairs of answers to one prompt.

    The reference policy is the model at the start of the stage: the trained parameters are kept twice. Rewards in the
    metrics are `beta` times the log ratio of policy and reference.

    Attributes:
      beta: how strongly the policy is held to the reference.
      label_smoothing: probability that a preference is the wrong way round, in [0, 0.5).
      logits_bytes: as of `next_token`.

    Source: Rafailov et al. 2023, equation 7; with label smoothing Mitchell 2023, equation 3; TRL's `DPOTrainer`.
    """

    beta: Positive = 0.1
    label_smoothing: Annotated[float, Range(0, below=0.5)] = 0.0
    logits_bytes: Bytes | None = None

    streams: ClassVar[tuple[str, ...]] = ("preferences",)

    def __post_init__(self):
        check_fields(self, "")

    def check(self, experiment: AnyExperiment, *, accumulate: int, path: str) -> None:
        """Requires a model that answers, and a row for each answer."""
        del accumulate
        if not of_conversations(experiment, path, "prefer").rows.are_single:
            raise ConfigError(
                f"{path}.objective: prefer lays out each answer in a row of its own and one length; set "
                "config.row.pack to False and config.row.buckets to 1"
            )

    def build(self, experiment: AnyExperiment, trained: Collection[str] = ()) -> Loss:
        """See the class."""
        del trained
        return _prefer(experiment.system.model, self)

    def element(self, experiment: AnyExperiment, stream: str) -> Callable[[Any], Tree]:
        """Two rows: the chosen answer, then the rejected one."""
        del stream
        return of_conversations(experiment, "config.stages", "prefer").preference_rows

    def example(self, experiment: AnyExperiment, stream: str) -> Tree:
        """Two rows."""
        del stream
        own = of_conversations(experiment, "config.stages", "prefer")
        return jax.tree.map(lambda leaf: leaf.update(shape=(2, *leaf.shape[1:])), own.system.example(own.row))

    def reference_shapes(self, trained: Params) -> Params | None:
        """Those of the trained parameters."""
        return trained

    def reference(self, trained: Params, mesh: Mesh) -> Params | None:
        """A copy of the trained parameters."""
        del mesh
        return jax.tree.map(jnp.copy, trained)


@functools.lru_cache(maxsize=64)
def _prefer(model: nn.Module, settings: Prefer) -> Loss:
    def log_probs(params: Params, batch: Batch, key: jax.Array) -> tuple[Float[Array, "B"], jax.Array | None]:
        """The sum of the log-probabilities of each row's learned tokens."""
        hidden, head, blocks, auxiliary = final_states(model, params, batch, key, settings.logits_bytes)
        losses, _, _ = head_losses(hidden, head.kernel, cast(Any, batch.targets), blocks=blocks)
        return -(losses * cast(jax.Array, batch.loss_weights)).sum(axis=1), auxiliary

    def loss(
        params: Params,
        batch: Batch,
        key: jax.Array,
        weight: jax.Array | float = 1.0,
        reference: Params | None = None,
    ) -> tuple[jax.Array, Metrics]:
        del weight  # every microbatch has as many pairs
        assert reference is not None
        policy, auxiliary = log_probs(params, batch, key)
        held, _ = log_probs(jax.lax.stop_gradient(overlaid(params, reference)), batch, key)
        rewards = settings.beta * (policy - held)
        chosen, rejected = rewards[0::2], rewards[1::2]
        margin, smoothing = chosen - rejected, settings.label_smoothing
        value = -(1 - smoothing) * jax.nn.log_sigmoid(margin) - smoothing * jax.nn.log_sigmoid(-margin)
        metrics = {
            "accuracy": jnp.mean(margin > 0, dtype=jnp.float32),
            "reward_chosen": chosen.mean(),
            "reward_rejected": rejected.mean(),
            "reward_margin": margin.mean(),
        }
        if auxiliary is None:
            return value.mean(), metrics
        return value.mean() + auxiliary, {**metrics, "auxiliary_loss": auxiliary}

    return loss


def overlaid(params: Params, reference: Params) -> Params:
    """The parameters, with those of a reference replacing their counterparts."""
    return {
        name: overlaid(tree, reference[name])
        if name in reference and isinstance(tree, dict)
        else reference.get(name, tree)
        for name, tree in params.items()
    }
