"""The points of a sweep: one config each, with costs computed by shape before training."""

import copy
import dataclasses
import functools
from typing import Any

import jax
from flax import linen as nn
from ml_collections import ConfigDict

from vlm_jax.build import Experiment, build
from vlm_jax.config import ConfigError, check_keys, did_you_mean, parse
from vlm_jax.models.vlm import flat_images
from vlm_jax.planner.flops import count_flops

SECTIONS = ("encoder", "reducer", "connector", "decoder")


@dataclasses.dataclass(frozen=True)
class SweepSettings:
    """`config.sweep`.

    Attributes:
      shared: initial stages of every point, which are run once. They train the encoder and
        the decoder, never the connector.
      seeds: every point is run once per seed.
      controls: labels of candidates that only serve as comparison.
    """

    shared: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    controls: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Costs:
    """Costs of a point, computed from shapes only.

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
      label: `connector@budget`, and `#seed` for seeds after the first.
      connector: the candidate's label.
      config: the full config of the run.
      experiment: built from the config.
      costs: its costs.
      trained_as: label of the run of its parameters: its own, or that of the candidate at the
        budget shared by all its points.
      training: the config and the experiment of that run.
    """

    label: str
    connector: str
    config: Any
    experiment: Experiment
    costs: Costs
    trained_as: str
    training: tuple[Any, Experiment]


def sweep_settings(config: Any) -> SweepSettings:
    """Parses `config.sweep`, and checks its labels against the rest of the config."""
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
                f"config.base.stages.{label}.learning_rates.connector: a shared stage must not train the connector, "
                "since every point has its own"
            )
    return settings


def list_points(config: Any, only: tuple[str, ...] = ()) -> list[Point]:
    """Every candidate at every one of its budgets and every seed, cheapest budgets first.

    A candidate is a dict with `budgets` and any of the sections encoder, reducer, connector and
    decoder, which replace the base's. With `trained_at` it is trained once, at that budget, and
    evaluated at all of `budgets`.

    Args:
      config: a sweep's config: `base`, `candidates`, `sweep`.
      only: labels to keep; all when empty.

    Raises:
      ConfigError: an unused key, or an unknown label in `only`.
      InfeasibleBudget: a candidate cannot meet one of its budgets; the message has the nearest ones.
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
                run, experiment = made(budget)
                trained_at = candidate.trained_at if "trained_at" in candidate else budget
                training = (run, experiment) if trained_at == budget else made(trained_at)
                if trained_at != budget and _shapes(training[1]) != _shapes(experiment):
                    raise ConfigError(
                        f"{path}.trained_at: the parameters for {trained_at} tokens have other shapes than those for "
                        f"{budget}; choose a connector that nests its budgets, such as matryoshka, or train each"
                    )
                label, trained_as = f"{name}@{budget}{suffix}", f"{name}@{trained_at}{suffix}"
                points[label] = Point(label, name, run, experiment, costs(experiment), trained_as, training)
    unknown = [label for label in only if label not in points]
    if unknown:
        raise ConfigError(f"--only: no point '{unknown[0]}'{did_you_mean(unknown[0], points)}")
    chosen = [point for label, point in points.items() if not only or label in only]
    return sorted(chosen, key=lambda point: point.costs.num_visual_tokens)


def _made(
    base: Any, name: str, candidate: Any, seed: int, shared: tuple[str, ...], budget: int
) -> tuple[Any, Experiment]:
    """Config and experiment of a candidate at a budget; errors name both."""
    run = point_config(base, candidate, budget, seed, shared)
    try:
        return run, build(run)
    except ValueError as error:
        raise type(error)(f"candidate '{name}' at {budget} tokens: {error}") from error


def _shapes(experiment: Experiment) -> Any:
    return jax.eval_shape(experiment.init, jax.random.key(0))


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
    """The base with only the shared stages."""
    run = ConfigDict(copy.deepcopy(base.to_dict()))
    run.seed, run.schedule = seed, shared
    run.stages = ConfigDict({label: base.stages[label].to_dict() for label in shared})
    return run


def costs(experiment: Experiment) -> Costs:
    """Computes costs from shapes; nothing is allocated."""
    system, shape = experiment.system, experiment.prompt or experiment.row
    length = shape.length
    model, num_params = system.model, experiment.num_params()
    boxed = jax.eval_shape(experiment.init, jax.random.key(0))
    params = {"params": {part: nn.meta.unbox(boxed[part]) for part in num_params}}
    prompt = dataclasses.replace(system.example(shape), targets=None, loss_weights=None)
    flat = jax.eval_shape(flat_images, prompt.images)
    encoder = count_flops(lambda p, x: model.apply(p, x, method=lambda m, x: m.encoder(x)), params, flat)
    visual = count_flops(lambda p, x: model.apply(p, x, method="visual_tokens"), params, flat)
    whole = count_flops(lambda p, b: model.apply(p, b, length, method="prefill"), params, prompt)
    flops = {"encoder": encoder, "connector": visual - encoder, "prefill": whole - visual}
    return Costs(experiment.budget.left, experiment.budget.mean, num_params, flops)
