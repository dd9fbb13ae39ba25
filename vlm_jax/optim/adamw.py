"""AdamW with a learning rate for each part of the model."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import optax

from vlm_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer of every stage.

    Attributes:
      b1: decay of the first moment.
      b2: decay of the second moment.
      epsilon: added to the root of the second moment.
      weight_decay: decoupled decay of matrices; vectors, norms and biases have none.
      clip_norm: maximum global norm of the gradient over all trained parts.
      final_scale: final learning rate of the cosine as a share of the peak.
    """

    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    final_scale: float = 0.0


def schedule(peak: float, warmup_steps: int, steps: int, final_scale: float) -> optax.Schedule:
    """Linear warm-up from 0, then a cosine to `final_scale` of the peak.

    Source: Loshchilov and Hutter 2017 (SGDR), eq. 5, one period.
    """
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, steps, peak * final_scale)


def decays(path: tuple) -> bool:
    """Whether weight decay applies to a leaf: kernels, embeddings and queries, not scales or biases."""
    return str(getattr(path[-1], "key", path[-1])) in ("kernel", "embedding", "queries")


def adamw(
    settings: OptimizerSettings, learning_rates: Mapping[str, float], warmup_steps: int, steps: int
) -> optax.GradientTransformation:
    """AdamW over a tree {part: parameters}.

    Args:
      settings: moments, decay and clipping.
      learning_rates: peak learning rate of each part of the tree.
      warmup_steps: steps of linear warm-up.
      steps: all steps of the stage.

    Raises:
      ConfigError: the warm-up is not shorter than the stage.

    Source: Loshchilov and Hutter 2019 (AdamW), algorithm 2.
    """
    return _adamw(settings, tuple(learning_rates.items()), warmup_steps, steps)


@functools.lru_cache(maxsize=64)  # equal optimizers are one object, so that equal steps are compiled once
def _adamw(
    settings: OptimizerSettings, learning_rates: tuple[tuple[str, float], ...], warmup_steps: int, steps: int
) -> optax.GradientTransformation:
    if warmup_steps >= steps:
        raise ConfigError(f"warmup_steps: expected fewer than the {steps} steps of the stage, got {warmup_steps}")

    def one(peak: float) -> optax.GradientTransformation:
        return optax.adamw(
            schedule(peak, warmup_steps, steps, settings.final_scale),
            b1=settings.b1,
            b2=settings.b2,
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
            mask=lambda tree: jax.tree_util.tree_map_with_path(lambda path, _: decays(path), tree),
        )

    def labels(tree):
        return {part: jax.tree.map(lambda _, label=part: label, subtree) for part, subtree in tree.items()}

    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.partition({part: one(peak) for part, peak in learning_rates}, labels),
    )
