"""AdamW with a learning rate for each parameter."""

import dataclasses
import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated

import jax
import jax.numpy as jnp
import optax

from vlm_jax.config import ConfigError, check_fields, choose
from vlm_jax.leaves import flatten, map_with_path
from vlm_jax.ranges import Decay, NonNegative, Positive, Range, Share
from vlm_jax.types import Dtype, Tree

MOMENT_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# An average in bfloat16 of decay b stands still where its step, (1 - b) of its distance from the gradient, is less than
# half of the spacing of its values, which is up to 2^-8 of the average: within 2^-8 / (1 - b) of where it should be.
HALF_SPACING, MAX_ERROR = 2.0**-8, 0.1


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer of every stage.

    Attributes:
      b1: decay of the first moment.
      b2: decay of the second moment.
      epsilon: added to the root of the second moment.
      weight_decay: decoupled decay of matrices; vectors, norms and biases have none.
      clip_norm: maximum global norm of the gradient over all trained parameters; inf for no clipping.
      final_scale: final learning rate of the cosine as a share of the peak.
      first_moment: dtype in which the first moment is kept, `float32` or `bfloat16`; arithmetic is in float32.
      second_moment: dtype in which the second moment is kept, likewise.
      ema: decay of a moving average of the trained parameters, from their values at the start of the stage; None for
        none. The next stage starts from it, and so do evaluation, `from_pretrained(WORKDIR)` and exports.

    Raises:
      ConfigError: a number outside its range, or a moment is to be kept in bfloat16 with a decay (above 0.96) that it
        cannot follow within a tenth.
    """

    b1: Decay = 0.9
    b2: Decay = 0.95
    epsilon: Positive = 1e-8
    weight_decay: NonNegative = 0.05
    clip_norm: Annotated[float, Range(above=0, infinite=True, note="inf for no clipping")] = 1.0
    final_scale: Share = 0.0
    first_moment: str = "float32"
    second_moment: str = "float32"
    ema: Decay | None = None

    def __post_init__(self):
        check_fields(self, "config.optimizer.")
        for key, decay in (("first_moment", "b1"), ("second_moment", "b2")):
            path, value = f"config.optimizer.{key}", getattr(self, decay)
            dtype = choose(MOMENT_DTYPES, getattr(self, key), path)
            if dtype == jnp.bfloat16 and (1 - value) * MAX_ERROR < HALF_SPACING:
                raise ConfigError(
                    f"{path}: an average with {decay}={value} stands still in bfloat16, since its steps are less than "
                    f"half of the spacing of its values; set {key} to float32, or {decay} to at most "
                    f"{1 - HALF_SPACING / MAX_ERROR:.2f}"
                )


def schedule(peak: float, warmup_steps: int, steps: int, final_scale: float) -> optax.Schedule:
    """Linear warm-up from 0, then a cosine to `final_scale` of the peak.

    Source: Loshchilov and Hutter 2017 (SGDR), eq. 5, one period.
    """
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, steps, peak * final_scale)


def decays(path: tuple) -> bool:
    """Whether weight decay applies to a leaf: kernels, adapters, embeddings and queries, not scales or biases."""
    return str(getattr(path[-1], "key", path[-1])) in ("kernel", "embedding", "queries", "lora_a", "lora_b")


def adamw(
    settings: OptimizerSettings,
    rates: Mapping[str, float | tuple[float, ...]],
    warmup_steps: int,
    steps: int,
    limits: Mapping[str, float] = MappingProxyType({}),
) -> optax.GradientTransformation:
    """AdamW over a tree of parameters; clipping, moments and updates are in float32 for parameters of any dtype.

    Args:
      settings: moments, decay and clipping.
      rates: peak learning rate of every parameter, by path, as from `optim.patterns.leaf_rates`; several are those of
        the slices of its first axis.
      warmup_steps: steps of linear warm-up.
      steps: all steps of the stage.
      limits: the largest value that a step leaves a parameter, by path.

    Raises:
      ConfigError: the warm-up is not shorter than the stage.

    Source: Loshchilov and Hutter 2019 (AdamW), algorithm 2.
    """
    return _adamw(settings, tuple(sorted(rates.items())), warmup_steps, steps, tuple(sorted(limits.items())))


@functools.lru_cache(maxsize=64)  # equal optimizers are one object, so that equal steps are compiled once
def _adamw(
    settings: OptimizerSettings,
    rates: tuple[tuple[str, float | tuple[float, ...]], ...],
    warmup_steps: int,
    steps: int,
    limits: tuple[tuple[str, float], ...],
) -> optax.GradientTransformation:
    if warmup_steps >= steps:
        raise ConfigError(f"warmup_steps: expected fewer than the {steps} steps of the stage, got {warmup_steps}")
    return _in_float32(
        optax.chain(
            optax.clip_by_global_norm(settings.clip_norm),
            _scale_by_adam(settings),
            optax.add_decayed_weights(
                settings.weight_decay,
                mask=lambda tree: jax.tree_util.tree_map_with_path(lambda path, _: decays(path), tree),
            ),
            optax.scale_by_schedule(schedule(1.0, warmup_steps, steps, settings.final_scale)),
            _scale_by_rates(dict(rates)),
            _keep_below(dict(limits)),
        )
    )


def _scale_by_rates(rates: Mapping[str, float | tuple[float, ...]]) -> optax.GradientTransformation:
    """Multiplies every update by minus the peak rate of its parameter."""

    def scaled(path: str, update: jax.Array) -> jax.Array:
        rate = jnp.asarray(rates[path], jnp.float32)
        return -rate.reshape(rate.shape + (1,) * (update.ndim - rate.ndim)) * update

    def init(params: Tree) -> Tree:
        if missing := [path for path, _ in flatten(params) if path not in rates]:
            raise ValueError(f"no learning rate for {', '.join(missing)}")
        return optax.EmptyState()

    def update(updates: Tree, state: Tree, params: Tree = None) -> tuple[Tree, Tree]:
        del params
        return map_with_path(scaled, updates), state

    return optax.GradientTransformation(init, update)


def _keep_below(limits: Mapping[str, float]) -> optax.GradientTransformation:
    """Shortens updates that would leave a parameter above its limit."""

    def shortened(path: str, update: jax.Array, param: jax.Array) -> jax.Array:
        return jnp.minimum(update, limits[path] - param) if path in limits else update

    def update(updates: Tree, state: Tree, params: Tree = None) -> tuple[Tree, Tree]:
        return map_with_path(shortened, updates, params) if limits else updates, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _scale_by_adam(settings: OptimizerSettings) -> optax.GradientTransformation:
    """`optax.scale_by_adam` whose moments are kept in the settings' dtypes, and computed in float32."""
    adam = optax.scale_by_adam(b1=settings.b1, b2=settings.b2, eps=settings.epsilon)
    first, second = MOMENT_DTYPES[settings.first_moment], MOMENT_DTYPES[settings.second_moment]

    def kept(state: Tree, first: Dtype, second: Dtype) -> Tree:
        return state._replace(mu=optax.tree.cast(state.mu, first), nu=optax.tree.cast(state.nu, second))

    def init(params: Tree) -> Tree:
        return kept(adam.init(params), first, second)

    def update(updates: Tree, state: Tree, params: Tree = None) -> tuple[Tree, Tree]:
        updates, state = adam.update(updates, kept(state, jnp.float32, jnp.float32), params)
        return updates, kept(state, first, second)

    return optax.GradientTransformation(init, update)


def _in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """A transformation that gets gradients and parameters as float32, and so returns float32 updates."""

    def init(params: Tree) -> Tree:
        return tx.init(optax.tree.cast(params, jnp.float32))

    def update(updates: Tree, state: Tree, params: Tree = None) -> tuple[Tree, Tree]:
        return tx.update(optax.tree.cast(updates, jnp.float32), state, optax.tree.cast(params, jnp.float32))

    return optax.GradientTransformation(init, update)
