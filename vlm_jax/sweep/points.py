"""The points of a sweep: one config each, with costs computed by shape before training."""

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from vlm_jax.build import CELL_HEAD, Experiment, build_conversational
from vlm_jax.build.sections import check_sections
from vlm_jax.build.settings import EvaluationSettings
from vlm_jax.config import ConfigError, OutOfRange, check_keys, check_section, convert, did_you_mean, parse
from vlm_jax.leaves import flatten
from vlm_jax.ranges import Seed, Size
from vlm_jax.sharding.initial import in_float32
from vlm_jax.sweep.costs import Costs, costs, first_with_images
from vlm_jax.sweep.halving import HalvingSettings, ray_schedulers
from vlm_jax.sweep.release_points import AS_RELEASED
from vlm_jax.sweep.search import Place, RandomSettings, applying, check_ranges, places, set_values
from vlm_jax.train.check import SETTINGS, check_training
from vlm_jax.train.stages import parse_schedule
from vlm_jax.types import Params, Sample

SECTIONS = ("encoder", "reducer", "connector", "decoder")


@dataclasses.dataclass(frozen=True)
class SweepSettings:
    """`config.sweep`.

    Attributes:
      shared: stages that every point starts from; they are run once. A candidate with a connector of its own
        draws that anew, and has the other parts of the shared stages.
      seeds: every point is run once for each.
      controls: labels of candidates that are there to be compared with.
      random: which points are drawn; None for every candidate at every budget and seed.
      halving: which points that are trained for one budget are stopped before their end; None for none.
    """

    shared: tuple[str, ...] = ()
    seeds: tuple[Seed, ...] = (0,)
    controls: tuple[str, ...] = ()
    random: RandomSettings | None = None
    halving: HalvingSettings | None = None


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
      label: `connector@budget`, and `#seed` for a seed beyond the first; `connector@released` without a budget.
      connector: the candidate's label, with `~number` of the draw where config keys are drawn.
      config: the whole config of the run.
      experiment: what it builds.
      costs: what it costs.
      trained_as: label of the run that its parameters are from: its own, or that of the candidate at the
        budget that all its points share; `untrained` for all points that train nothing.
      training: the config and the experiment of that run.
      start: parts that it has from the shared stages, where there are some.
      drawn: {key of the config: value} that were drawn.
    """

    label: str
    connector: str
    config: Any
    experiment: Experiment
    costs: Costs
    trained_as: str
    training: tuple[Any, Experiment]
    start: tuple[str, ...]
    drawn: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __reduce__(self):
        """Pickles the configs; what they build is built anew by whoever reads them."""
        trained = None if self.training[0] is self.config else self.training[0]
        given = self.label, self.connector, self.config, self.costs, self.trained_as, trained, self.start, self.drawn
        return _rebuilt, given


def _rebuilt(
    label: str,
    connector: str,
    config: Any,
    costs: Costs,
    trained_as: str,
    trained: Any,
    start: tuple[str, ...],
    drawn: Mapping[str, Any],
) -> Point:
    """A point that was pickled; `trained` is the config of its training, None where that is its own."""
    experiment = build_conversational(config)
    training = (config, experiment) if trained is None else (trained, build_conversational(trained))
    return Point(label, connector, config, experiment, costs, trained_as, training, start, drawn)


def sweep_settings(config: Any) -> SweepSettings:
    """Parses `config.sweep`, and checks its labels against the rest of the config."""
    check_keys(config, ("base", "candidates", "sweep"), "config")
    for key in ("base", "candidates", "sweep"):
        check_section(config.get(key), f"config.{key}")
    settings = parse(SweepSettings, config.sweep, "config.sweep")
    check_sections(config.base)
    check_training(config.base)
    for name, candidate in config.candidates.items():
        path = f"config.candidates.{name}"
        check_section(candidate, path)
        convert(candidate.get("budgets"), tuple[Size | None, ...], f"{path}.budgets")
        check_keys(candidate, ("budgets", "trained_at", "schedule", *SECTIONS), path)
        check_keys(candidate.get("schedule", ()), config.base.stages, f"{path}.schedule")
        if "trained_at" in candidate and candidate.get("schedule", config.base.schedule) == ():
            raise ConfigError(f"{path}.trained_at: the candidate trains nothing; remove it")
    for label in settings.controls:
        if label not in config.candidates:
            raise ConfigError(f"config.sweep.controls: no candidate '{label}'{did_you_mean(label, config.candidates)}")
    if parse(EvaluationSettings, config.base.evaluation, "config.base.evaluation").every is not None:
        raise ConfigError(
            "config.base.evaluation.every: points are evaluated when they are trained; set it to None in a sweep"
        )
    schedule = tuple(config.base.schedule)
    if schedule[: len(settings.shared)] != settings.shared:
        raise ConfigError(
            f"config.sweep.shared: {settings.shared} must be the first stages of config.base.schedule {schedule}"
        )
    check_keys(schedule, config.base.stages, "config.base.schedule")
    own = ["connector" in candidate for candidate in config.candidates.values()]
    for label in settings.shared:
        rates = config.base.stages[label].learning_rates
        if all(own) and (pattern := next((one for one in rates if one.split("/")[0] == "connector"), None)):
            raise ConfigError(
                f"config.base.stages.{label}.learning_rates.{pattern}: a shared stage trains no connector where every "
                "candidate has its own"
            )
    if settings.random is not None:
        settings.random.check("config.sweep.random")
        made = (point_config(config.base, one, None, 0, settings.shared) for one in config.candidates.values())
        check_ranges(settings.random, list(made))
    if settings.halving is not None:
        _check_halving(config, settings)
    return settings


def _check_halving(config: Any, settings: SweepSettings) -> None:
    """Whether losses of trainings can be compared: candidates learn by the same objectives; Ray Tune is installed."""
    ray_schedulers()
    first: tuple[str, Any] | None = None
    for name, candidate in config.candidates.items():
        run = point_config(config.base, candidate, None, 0, settings.shared)
        learned = list(dict.fromkeys(run.stages[label].get("objective") for label in run.schedule))
        first = (name, learned) if first is None and learned else first
        if first is not None and learned and learned != first[1]:
            raise ConfigError(
                f"config.sweep.halving: the losses of candidates '{first[0]}' and '{name}' cannot be compared, their "
                f"objectives are {first[1]} and {learned}; give them the same, or set it to None"
            )


def list_points(config: Any, only: tuple[str, ...] = (), refused: dict[str, str] | None = None) -> list[Point]:
    """Every candidate at each of its budgets and each seed, or those that `sweep.random` draws.

    Points that train nothing come first, then the others by tokens.

    A candidate is a dict with `budgets` and any of the sections encoder, reducer, connector and decoder, each of which
    replaces the base's. With `trained_at` it is trained once, at that budget, and its parameters are evaluated at all
    of `budgets`. Its `schedule` has the stages that train it behind the shared ones, where they are not those of
    `config.base.schedule`; with none it is evaluated as the release or the shared stages leave it. A budget of None
    leaves a release its own tokens.

    Args:
      config: a sweep's config: `base`, `candidates`, `sweep`.
      only: labels to keep; all when empty.
      refused: gets {label: error} of the points with a number outside its range, which are left out; else, or if no
        point is left, these are errors as the others.

    Raises:
      ConfigError: an unused key, a number outside its range, or an unknown label in `only`.
      InfeasibleBudget: a candidate cannot meet one of its budgets; the message has the nearest ones.
    """
    settings, samples = sweep_settings(config), {}

    def sample_of(seed: int, experiment: Experiment) -> Sample:
        """The first of the evaluation with an image, read once."""
        if seed not in samples:
            samples[seed] = first_with_images(experiment.open_source().evaluation(seed))
        return samples[seed]

    points: dict[str, Point] = {}
    shared: Params = {}
    trained: set[str] = set()  # parts
    if settings.shared:
        first = build_conversational(shared_config(config.base, settings.seeds[0], settings.shared))
        shared, trained = first.boxed_shapes(), {path.split("/")[0] for path in first.trained}
    untrained: list[Params] = []  # shapes of what points that train nothing have, each kind once
    made: dict[tuple[str, int], Made] = {}  # what a place's budget makes, each once
    for one in places(config.candidates, settings.seeds, settings.random, _applies(config, settings)):
        candidate, path = config.candidates[one.candidate], f"config.candidates.{one.candidate}"
        key = one.name, one.seed
        if key not in made:
            made[key] = functools.cache(functools.partial(_made, config.base, one, candidate, settings))
        suffix = f"#{one.seed}" if one.seed != settings.seeds[0] else ""
        label = f"{one.name}@{_said(one.budget)}{suffix}"
        try:
            run, experiment, drawn = made[key](one.budget)
        except OutOfRange as error:
            if refused is None:
                raise
            refused[label] = f"{type(error).__name__}: {error}"
            continue
        trained_at = candidate.trained_at if "trained_at" in candidate else one.budget
        training = (run, experiment) if trained_at == one.budget else made[key](trained_at)[:2]
        if trained_at != one.budget and training[1].boxed_shapes() != experiment.boxed_shapes():
            raise ConfigError(
                f"{path}.trained_at: the parameters for {trained_at} tokens have other shapes than those for "
                f"{one.budget}; choose a connector that nests its budgets, such as matryoshka, or train each"
            )
        start = _start(candidate, settings.shared, trained, experiment)
        _check_start(start, training[1].boxed_shapes(), shared, path)
        trained_as = f"{one.name}@{_said(trained_at)}{suffix}"
        if not run.schedule:
            _check_untrained(experiment, start, path)
            if (shapes := experiment.boxed_shapes()) not in untrained:
                untrained.append(shapes)
            kind = untrained.index(shapes)
            # The parameters of a release are the same for any seed.
            trained_as = f"untrained{f'-{kind}' if kind else ''}{suffix if settings.shared else ''}"
        sample = None if experiment.prompt is not None else sample_of(one.seed, experiment)
        counted = costs(experiment, sample)
        points[label] = Point(label, one.name, run, experiment, counted, trained_as, training, start, drawn)
    known = [*points, *(refused or ())]
    unknown = [label for label in only if label not in known]
    if unknown:
        raise ConfigError(f"--only: no point '{unknown[0]}'{did_you_mean(unknown[0], known)}")
    chosen = [point for label, point in points.items() if not only or label in only]
    if refused and only:
        for label in [label for label in refused if label not in only]:
            del refused[label]
    if refused and not chosen:
        raise ConfigError("\n".join(refused.values()))

    def place(point: Point) -> tuple[bool, str, float]:
        """Points that train nothing follow each other by the parameters that they share."""
        is_trained = bool(point.config.schedule)
        return is_trained, "" if is_trained else point.trained_as, float(point.costs.num_visual_tokens)

    return sorted(chosen, key=place)


def _applies(config: Any, settings: SweepSettings) -> dict[str, frozenset[str]] | None:
    """The ranges of each candidate's points; None where nothing is drawn."""
    if settings.random is None:
        return None
    configs = {
        name: point_config(config.base, one, None, 0, settings.shared) for name, one in config.candidates.items()
    }
    return {name: applying(settings.random, one) for name, one in configs.items()}


Made = Callable[[int | None], tuple[Any, Experiment, dict[str, Any]]]


def _made(
    base: Any, place: Place, candidate: Any, settings: SweepSettings, budget: int | None
) -> tuple[Any, Experiment, dict[str, Any]]:
    """Config and experiment of a place at a budget, and its drawn values; errors name both."""
    run = point_config(base, candidate, budget, place.seed, settings.shared)
    try:
        drawn = set_values(run, place, settings.random)
        if drawn:
            _check_drawn(run)
        return run, build_conversational(run), drawn
    except ValueError as error:
        tokens = "its released tokens" if budget is None else f"{budget} tokens"
        raise type(error)(f"candidate '{place.name}' at {tokens}: {error}") from error


def _check_drawn(run: Any) -> None:
    """Checks the sections that the trainer reads; `build` checks the others."""
    check_sections(run)
    check_training(run)
    for key, cls in SETTINGS.items():
        parse(cls, run[key], f"config.{key}")
    if run.schedule:
        parse_schedule(run.schedule, run.stages)


def _said(budget: int | None) -> str:
    return AS_RELEASED if budget is None else str(budget)


def _start(candidate: Any, shared: tuple[str, ...], trained: set[str], experiment: Experiment) -> tuple[str, ...]:
    """Parts of a candidate that the shared stages leave it."""
    if not shared:
        return ()
    others = trained.difference(("encoder", "decoder"), candidate)
    if experiment.cell_reader is None:
        others.discard(CELL_HEAD)
    return ("encoder", "decoder", *sorted(others))


def _check_start(start: tuple[str, ...], shapes: Params, shared: Params, path: str) -> None:
    """Whether the parts that a candidate has from the shared stages are of the shapes that these train."""
    for part in start:
        own, given = (
            in_float32({part: tree[part]}, [path for path, _ in flatten({part: tree[part]})])
            for tree in (shapes, shared)  # whichever of them trains the part
        )
        if own != given and part in ("encoder", "decoder"):
            raise ConfigError(
                f"{path}: its {part} has other shapes than that of the shared stages, which every candidate has; take "
                "the section that changes it out, or set config.sweep.shared to ()"
            )
        if own != given:
            raise ConfigError(
                f"{path}: its {part} has other shapes than that of the shared stages; give the candidate a section "
                f"{part} of its own and a schedule that trains it, or take the section that changes it out"
            )


def _check_untrained(experiment: Experiment, start: tuple[str, ...], path: str) -> None:
    """Whether a candidate that trains nothing has all of its parts from the release or the shared stages."""
    release = experiment.system.release
    drawn = experiment.boxed_shapes() if release is None else release.initialised
    if missing := [part for part in drawn if part not in start]:
        raise ConfigError(
            f"{path}: it has no stage of its own, and its {' and '.join(missing)} would be drawn and never trained; "
            "give it a schedule, or take these parts from config.base.release or from shared stages that train them"
        )


def point_config(base: Any, candidate: Any, budget: int | None, seed: int, shared: tuple[str, ...]) -> Any:
    """The base with a candidate's sections, schedule and budget, and a seed, without the shared stages."""
    run = ConfigDict(copy.deepcopy(base.to_dict()))
    for section in SECTIONS:
        if section in candidate:
            run[section] = ConfigDict(candidate[section].to_dict())
    run.token_budget, run.seed = budget, seed
    rest = tuple(label for label in base.schedule if label not in shared)
    run.schedule = tuple(candidate.schedule) if "schedule" in candidate else rest
    run.stages = ConfigDict({label: base.stages[label].to_dict() for label in run.schedule})
    return run


def shared_config(base: Any, seed: int, shared: tuple[str, ...]) -> Any:
    """The base with only the shared stages."""
    run = ConfigDict(copy.deepcopy(base.to_dict()))
    run.seed, run.schedule = seed, shared
    run.stages = ConfigDict({label: base.stages[label].to_dict() for label in shared})
    return run
