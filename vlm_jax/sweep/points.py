"""The points of a sweep: one config each, built by shape and costed before anything trains."""

import copy
import dataclasses
import functools
from typing import Any

import jax
from flax import linen as nn
from ml_collections import ConfigDict

from vlm_jax.build import System, build
from vlm_jax.config import ConfigError, check_keys, did_you_mean, parse
from vlm_jax.models.vlm import flat_images
from vlm_jax.planner.flops import count_flops
from vlm_jax.types import Batch

SECTIONS = ("encoder", "reducer", "connector", "decoder")


@dataclasses.dataclass(frozen=True)
class SweepSettings:
    """`config.sweep`.

    Attributes:
      shared: stages that every point starts from; they are run once. They train the encoder and
        the decoder, never the connector.
      seeds: every point is run once for each.
      controls: labels of candidates that are there to be compared with.
    """

    shared: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    controls: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a point costs, known by shape alone.

    Attributes:
      num_visual_tokens: tokens of one image that reach the decoder's last layers.
      mean_visual_tokens: the mean over its layers.
      num_params: parameters of each part.
      flops: of one example with its images: `encoder`, `connector` (and reducer), and `prefill`,
        the decoder over a prompt of full length.
    """

    num_visual_tokens: int
    mean_visual_tokens: float
    num_params: dict[str, int]
    flops: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
      label: `connector@budget`, and `#seed` for a seed beyond the first.
      connector: the candidate's label.
      config: the whole config of the run.
      system: what it builds.
      costs: what it costs.
      trained_as: label of the run that its parameters are from: its own, or that of the candidate at the
        budget that all its points share.
      training: the config and the system of that run.
    """

    label: str
    connector: str
    config: Any
    system: System
    costs: Costs
    trained_as: str
    training: tuple[Any, System]


def sweep_settings(config: Any) -> SweepSettings:
    """Parses `config.sweep`, and checks what it names against the rest."""
    settings = parse(SweepSettings, config.sweep, "config.sweep")
    check_keys(config, ("base", "candidates", "sweep"), "config")
    for label in settings.controls:
        if label not in config.candidates:
            raise ConfigError(f"config.sweep.controls: no candidate '{label}'{did_you_mean(label, config.candidates)}")
    schedule = tuple(config.base.schedule)
    if schedule[: len(settings.shared)] != settings.shared or len(schedule) == len(settings.shared):
        raise ConfigError(
            f"config.sweep.shared: {settings.shared} must be the first stages of config.base.schedule {schedule}, "
            "and leave at least one"
        )
    for label in settings.shared:
        if "connector" in config.base.stages[label].learning_rates:
            raise ConfigError(
                f"config.base.stages.{label}.learning_rates.connector: a shared stage trains no connector, since "
                "every point has its own"
            )
    return settings


def list_points(config: Any, only: tuple[str, ...] = ()) -> list[Point]:
    """Every candidate at every one of its budgets and every seed, cheapest budgets first.

    A candidate is a dict with `budgets` and any of the sections encoder, reducer, connector and
    decoder, each of which replaces the base's. With `trained_at` it is trained once, at that budget, and
    its parameters are evaluated at all of `budgets`.

    Args:
      config: a sweep's config: `base`, `candidates`, `sweep`.
      only: labels to keep; all when empty.

    Raises:
      ConfigError: a key that nothing reads, or a label of `only` that there is not.
      InfeasibleBudget: a candidate cannot meet one of its budgets; nearest ones are named.
    """
    settings = sweep_settings(config)
    points: dict[str, Point] = {}
    for name in config.candidates:
        candidate, path = config.candidates[name], f"config.candidates.{name}"
        check_keys(candidate, ("budgets", "trained_at", *SECTIONS), path)
        for number, seed in enumerate(settings.seeds):
            made = functools.partial(_made, config.base, name, candidate, seed, settings.shared)
            suffix = f"#{seed}" if number else ""
            for budget in candidate.budgets:
                run, system = made(budget)
                trained_at = candidate.trained_at if "trained_at" in candidate else budget
                training = (run, system) if trained_at == budget else made(trained_at)
                if trained_at != budget and _shapes(training[1]) != _shapes(system):
                    raise ConfigError(
                        f"{path}.trained_at: the parameters for {trained_at} tokens have other shapes than those for "
                        f"{budget}; choose a connector that nests its budgets, such as matryoshka, or train each"
                    )
                label, trained_as = f"{name}@{budget}{suffix}", f"{name}@{trained_at}{suffix}"
                points[label] = Point(label, name, run, system, costs(system), trained_as, training)
    unknown = [label for label in only if label not in points]
    if unknown:
        raise ConfigError(f"--only: no point '{unknown[0]}'{did_you_mean(unknown[0], points)}")
    chosen = [point for label, point in points.items() if not only or label in only]
    return sorted(chosen, key=lambda point: point.costs.num_visual_tokens)


def _made(base: Any, name: str, candidate: Any, seed: int, shared: tuple[str, ...], budget: int) -> tuple[Any, System]:
    """Config and system of a candidate at a budget; a refusal names the two."""
    run = point_config(base, candidate, budget, seed, shared)
    try:
        return run, build(run)
    except ValueError as error:
        raise type(error)(f"candidate '{name}' at {budget} tokens: {error}") from error


def _shapes(system: System) -> Any:
    return jax.eval_shape(system.init, jax.random.key(0))


def point_config(base: Any, candidate: Any, budget: int, seed: int, shared: tuple[str, ...]) -> Any:
    """The base with a candidate's sections, its budget and seed, without the shared stages."""
    run = ConfigDict(copy.deepcopy(base.to_dict()))
    for section in SECTIONS:
        if section in candidate:
            run[section] = ConfigDict(candidate[section].to_dict())
    run.token_budget, run.seed = budget, seed
    run.schedule = tuple(label for label in base.schedule if label not in shared)
    run.stages = ConfigDict({label: base.stages[label].to_dict() for label in run.schedule})
    return run


def shared_config(base: Any, seed: int, shared: tuple[str, ...]) -> Any:
    """The base with the shared stages alone."""
    run = ConfigDict(copy.deepcopy(base.to_dict()))
    run.seed, run.schedule = seed, shared
    run.stages = ConfigDict({label: base.stages[label].to_dict() for label in shared})
    return run


def costs(system: System) -> Costs:
    """Counts by shape; nothing is allocated."""
    processor, model = system.processor, system.model
    boxed = jax.eval_shape(system.init, jax.random.key(0))
    num_params = system.num_params()
    params = {"params": {part: nn.meta.unbox(boxed[part]) for part in num_params}}
    row = jax.ShapeDtypeStruct((1, processor.max_prompt_length), jax.numpy.int32)
    images: Any = system.example().images
    prompt = Batch(row, row, row, row, images=images)
    flat = jax.eval_shape(flat_images, images)
    encoder = count_flops(lambda p, x: model.apply(p, x, method=lambda m, x: m.encoder(x)), params, flat)
    visual = count_flops(lambda p, x: model.apply(p, x, method="visual_tokens"), params, flat)
    whole = count_flops(lambda p, b: model.apply(p, b, processor.max_prompt_length, method="prefill"), params, prompt)
    flops = {"encoder": encoder, "connector": visual - encoder, "prefill": whole - visual}
    return Costs(system.num_visual_tokens, system.mean_visual_tokens, num_params, flops)
