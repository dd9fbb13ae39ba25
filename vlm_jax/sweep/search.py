"""Which points of a sweep are run: all of its grid, or some that are drawn, with drawn values of config keys."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vlm_jax.config import ConfigError, did_you_mean, is_section
from vlm_jax.ranges import Count, Finite, Seed

OWN = ("seed", "token_budget", "schedule")  # keys that the sweep or a candidate sets
DRAW = "~"  # between a candidate's label and the number of the draw
TRIES = 1000  # of draws that repeat a point


@dataclasses.dataclass(frozen=True)
class RangeSettings:
    """Values of a config key that are drawn.

    Attributes:
      key: of a point's config, as `optimizer.weight_decay` or `stages.adaptation.learning_rates.connector`. Points
        without its section, here that stage, keep their value.
      low, high: bounds of a number; None with `choices`.
      log: whether the number's logarithm is uniform.
      choices: values of which one is drawn, each as likely as another; empty with bounds.
    """

    key: str
    low: Finite | None = None
    high: Finite | None = None
    log: bool = False
    choices: tuple[Any, ...] = ()

    def check(self, path: str) -> None:
        """Raises a ConfigError unless there is something to draw; `path` is the section's."""
        if self.choices:
            if self.log or (self.low, self.high) != (None, None):
                raise ConfigError(f"{path}.choices: low, high and log are of numbers between bounds; remove them")
        elif self.low is None or self.high is None:
            raise ConfigError(f"{path}: expected low and high, or choices, got low={self.low}, high={self.high}")
        elif self.low >= self.high or (self.log and self.low <= 0):
            floor = "above 0 and " if self.log else ""
            raise ConfigError(f"{path}.low: expected a number {floor}below high, {self.high}, got {self.low}")
        if self.key.partition(".")[0] in OWN:
            raise ConfigError(
                f"{path}.key: '{self.key}' is set by the sweep itself; use config.sweep.seeds, or budgets and schedule "
                "of candidates"
            )

    def draw(self, random: np.random.Generator) -> Any:
        """One value; a number has four significant digits."""
        if self.choices:
            return self.choices[int(random.integers(len(self.choices)))]
        assert self.low is not None and self.high is not None
        share = float(random.random())
        if self.log:
            value = math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + share * (self.high - self.low)
        return min(max(float(f"{value:.4g}"), self.low), self.high)


@dataclasses.dataclass(frozen=True)
class RandomSettings:
    """`config.sweep.random`.

    Attributes:
      num_points: points that are drawn. With more of them the first ones stay the same.
      seed: of the draws.
      ranges: config keys that are drawn, under names for the results. Every point is then a candidate, budget and seed
        of the grid, any number of times, with values of its own; without, points of the grid are drawn, each once.
    """

    num_points: Count
    seed: Seed = 0
    ranges: dict[str, RangeSettings] = dataclasses.field(default_factory=dict)

    def check(self, path: str) -> None:
        """Raises a ConfigError for a range that cannot be drawn from; `path` is the section's."""
        for name, settings in self.ranges.items():
            settings.check(f"{path}.ranges.{name}")


@dataclasses.dataclass(frozen=True)
class Place:
    """A point of the grid, before it is built.

    Attributes:
      candidate: its label in the config.
      seed: of the run.
      budget: visual tokens; None for those of a release.
      number: of the draw; None where no values are drawn.
      values: {name: value} that are drawn.
    """

    candidate: str
    seed: int
    budget: int | None
    number: int | None = None
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """The candidate's label, with the number of the draw."""
        return self.candidate if self.number is None else f"{self.candidate}{DRAW}{self.number}"


def places(
    candidates: Any,
    seeds: tuple[int, ...],
    random: RandomSettings | None,
    applies: Mapping[str, frozenset[str]] | None = None,
) -> list[Place]:
    """The points of a sweep: those of the grid in its order, or those that are drawn.

    Args:
      candidates: `config.candidates`, which are checked.
      seeds: of the sweep.
      random: `config.sweep.random`.
      applies: of each candidate the names of the ranges that its points have values of, as of `applying`; of all when
        None.

    Raises:
      ConfigError: more points are to be drawn than there are.
    """
    grid = [
        Place(name, seed, budget)
        for name in candidates
        for seed, budget in itertools.product(seeds, candidates[name].budgets)
    ]
    if random is None:
        return grid
    if not random.ranges:
        if random.num_points > len(grid):
            raise ConfigError(
                f"config.sweep.random.num_points: expected at most {len(grid)}, the points of the grid, got "
                f"{random.num_points}"
            )
        order = np.random.default_rng(random.seed).permutation(len(grid))
        return [grid[index] for index in sorted(order[: random.num_points])]
    applies = {name: frozenset(random.ranges) for name in candidates} if applies is None else applies
    return list(itertools.islice(_drawn(grid, random, applies), random.num_points))


def _drawn(grid: list[Place], random: RandomSettings, applies: Mapping[str, frozenset[str]]) -> Iterator[Place]:
    generator, made = np.random.default_rng(random.seed), list[Place]()
    while True:
        for _ in range(TRIES):
            place = grid[int(generator.integers(len(grid)))]
            values = {name: settings.draw(generator) for name, settings in random.ranges.items()}
            own = {name: value for name, value in values.items() if name in applies[place.candidate]}
            drawn = dataclasses.replace(place, values=own)
            if drawn not in made:
                break
        else:
            raise ConfigError(
                f"config.sweep.random.num_points: {random.num_points} points are not found, only {len(made)} that "
                "differ; lower it, or widen the ranges"
            )
        yield dataclasses.replace(drawn, number=len(made))
        made.append(drawn)


def check_ranges(random: RandomSettings, configs: list[Any]) -> None:
    """Checks that every range is of a section that some candidate's config has.

    Args:
      random: `config.sweep.random`.
      configs: of the candidates, each at any budget and seed.

    Raises:
      ConfigError: none has it.
    """
    for name, settings in random.ranges.items():
        if not any(_section_of(config, settings.key) is not None for config in configs):
            first, _, rest = settings.key.partition(".")
            known = {key for config in configs for key in config}
            if first in known:
                known = {key for config in configs if is_section(config[first]) for key in config[first]}
                first = rest.partition(".")[0]
            raise ConfigError(
                f"config.sweep.random.ranges.{name}.key: no candidate's own config has the section of '{settings.key}'"
                f"{did_you_mean(first, known)}"
            )


def applying(random: RandomSettings, config: Any) -> frozenset[str]:
    """The names of the ranges that a candidate's config has a section for."""
    return frozenset(name for name, one in random.ranges.items() if _section_of(config, one.key) is not None)


def set_values(config: Any, place: Place, random: RandomSettings | None) -> dict[str, Any]:
    """Sets the drawn values of a place in its config, and returns them by key."""
    found: dict[str, Any] = {}
    for name, value in place.values.items():
        assert random is not None
        key = random.ranges[name].key
        section = _section_of(config, key)
        with section.ignore_type():
            section[key.rpartition(".")[2]] = value
        found[key] = value
    return found


def _section_of(config: Any, key: str) -> Any:
    """The section of a config that a key is in; None where there is none."""
    section = config
    for part in key.split(".")[:-1]:
        if not is_section(section) or part not in section:
            return None
        section = section[part]
    return section if is_section(section) else None
