"""Learning rates by patterns of parameter paths, and their decay over layers."""

import difflib
import fnmatch
import itertools
import math
import re
from collections.abc import Iterable, Mapping

from vlm_jax import axes
from vlm_jax.config import ConfigError
from vlm_jax.leaves import boxes, flatten, matches
from vlm_jax.types import Params

Rates = dict[str, float | tuple[float, ...]]  # by path; of a stack of layers one for every layer
StageRates = tuple[tuple[str, dict[str, float]], ...]  # (config path, rate by pattern) of each stage

# Modules and parameters behind the last layer, which learn at its rate; others without layers are before the first.
BEHIND = ("final_norm", "head", "projection", "representation", "neck", "high_res_*", "downsample_*")


def by_pattern(values: Mapping[str, float], paths: Iterable[str], where: str) -> dict[str, float]:
    """The value of every path that a pattern matches.

    Where several patterns match, that with the most characters that are not wildcards takes precedence. (The order of
    a config's keys is not kept.)

    Args:
      values: by pattern; see `leaves.matches`.
      paths: of the parameters.
      where: config path of `values`.

    Raises:
      ConfigError: a pattern that matches no path, or two values of equal precedence for one path.
    """
    paths, found = list(paths), dict[str, float]()
    first: dict[str, str] = {}
    for pattern in sorted(values, key=_precedence, reverse=True):
        own = [path for path in paths if matches(pattern, path)]
        if not own:
            raise ConfigError(f"{where}.{pattern}: no such parameter{_near(pattern, paths)}")
        for path in own:
            other = first.setdefault(path, pattern)
            if _precedence(other) == _precedence(pattern) and values[other] != values[pattern]:
                raise ConfigError(
                    f"{where}: '{other}' and '{pattern}' both match {path}, and neither is more specific (has more "
                    "characters that are not wildcards); write one that is"
                )
            found[path] = values[first[path]]
    return found


def trained_in_stages(params: Params, learning_rates: StageRates) -> frozenset[str]:
    """Paths of the parameters, or of their shapes, with a rate above 0 in any stage; raises as `by_pattern`."""
    paths = [path for path, _ in flatten(params)]
    found = (by_pattern(rates, paths, where) for where, rates in learning_rates)
    return frozenset(path for rates in found for path, rate in rates.items() if rate)


def leaf_rates(
    boxed: Params, learning_rates: Mapping[str, float], layer_decay: Mapping[str, float], where: str
) -> Rates:
    """Peak learning rates of the trained parameters, by path.

    Args:
      boxed: shapes of the parameters, in the boxes that name their axes.
      learning_rates: by pattern; what none matches, or one of 0, is frozen.
      layer_decay: decay by path of a part or of a module. Layer l of L has the rate times decay^(L - 1 - l), and
        what is before the first layer, such as embeddings, the rate times decay^L.
      where: config path of the stage.

    Raises:
      ConfigError: as `by_pattern`; a decay outside (0, 1], without layers below its path, or with several towers.

    Source: Bao et al. 2022 (BEiT), and microsoft/unilm, beit/optim_factory.py. There the rate is that of a head behind
    the tower, so that all of the tower's rates have one more factor of the decay.
    """
    peaks = by_pattern(learning_rates, (path for path, _ in flatten(boxed)), f"{where}.learning_rates")
    rates: Rates = {path: peak for path, peak in peaks.items() if peak}
    decayed: dict[str, str] = {}
    for root, decay in layer_decay.items():
        path = f"{where}.layer_decay.{root}"
        if not 0 < decay <= 1:
            raise ConfigError(f"{path}: expected above 0 and up to 1, got {decay}")
        for leaf, factors in _decays(boxed, root, decay, path).items():
            if leaf in decayed:
                raise ConfigError(f"{path}: {leaf} is also in '{decayed[leaf]}'; keep one of the two")
            decayed[leaf] = root
            if leaf in rates:
                scaled = [peaks[leaf] * factor for factor in factors]
                rates[leaf] = tuple(scaled) if len(scaled) > 1 else scaled[0]
    return rates


def _decays(boxed: Params, root: str, decay: float, where: str) -> dict[str, tuple[float, ...]]:
    """Factors of the leaves in the module at `root`: one, or one for every layer of a stack."""
    below = {path: leaf for path, leaf in boxes(boxed).items() if path.startswith(f"{root}/")}
    if not below:
        raise ConfigError(f"{where}: no such part or module{_near(root, boxes(boxed))}")
    stacks: dict[str, int] = {}  # depth by path
    for path, box in below.items():
        if box.names[:1] == (axes.LAYERS,):
            stacks[_stack(path, root)] = box.value.shape[0]
    if not stacks:
        raise ConfigError(f"{where}: there are no layers in it; choose a part with layers, such as a transformer")
    depth = sum(stacks.values())
    numbers = {stack: _layers(stack, count) for stack, count in stacks.items()}
    if len(stacks) == 1:  # also a stack of several by its own path
        numbers = dict.fromkeys(stacks, range(depth))
    if sorted(itertools.chain(*numbers.values())) != list(range(depth)):
        raise ConfigError(f"{where}: has several stacks of layers ({', '.join(sorted(stacks))}); give each a key")
    found = {}
    for path, box in below.items():
        if box.names[:1] == (axes.LAYERS,):
            found[path] = tuple(decay ** (depth - 1 - layer) for layer in numbers[_stack(path, root)])
        else:
            names = path.removeprefix(f"{root}/").split("/")
            behind = any(fnmatch.fnmatchcase(name, one) for name in names for one in BEHIND)
            found[path] = (1.0 if behind else decay**depth,)
    return found


def _stack(path: str, root: str) -> str:
    """The path of the stack that a leaf with a layer axis is in: up to `layers`, else the first module of `root`."""
    names = path.split("/")
    if "layers" in names:
        return "/".join(names[: names.index("layers")])
    return "/".join(names[: root.count("/") + 2])


def _layers(stack: str, count: int) -> range:
    """The numbers of a stack's layers in its tower: from the first, with which the names of several stacks end, on.

    Or every n-th one from it on, of a name that says so: `local_0_every_6`.
    """
    number = re.search(r"_(\d+)(?:_every_(\d+))?$", stack)
    first, step = (0, 1) if number is None else (int(number.group(1)), int(number.group(2) or 1))
    return range(first, first + count * step, step)


def _precedence(pattern: str) -> int:
    return len(re.sub(r"\[.[^]]*\]|[*?]", "", pattern))


def _near(pattern: str, paths: Iterable[str]) -> str:
    """The modules and parameters with the most similar names."""
    known: dict[str, None] = {}
    for path in paths:
        names = path.split("/")
        known.update(dict.fromkeys("/".join(names[: count + 1]) for count in range(len(names))))
    near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.6)
    if near:
        return f"; did you mean {' or '.join(map(repr, near))}?"
    return f"; the parts are {', '.join(name for name in known if '/' not in name)}"


def describe(boxed: Params, rates: Rates) -> list[str]:
    """One line for each part and rate: how many parameters learn at it, and how many of the part are frozen."""
    counts: dict[str, dict[str, int]] = {}
    for path, leaf in flatten(boxed):
        label = "frozen"
        if path in rates:
            rate = rates[path]
            label = f"at {rate[0]:g} to {rate[-1]:g}" if isinstance(rate, tuple) else f"at {rate:g}"
        own = counts.setdefault(path.split("/")[0], {})
        own[label] = own.get(label, 0) + math.prod(leaf.shape)
    lines = []
    for part, own in counts.items():
        labels = sorted(own, key=lambda label: (label == "frozen", label))
        lines.append(f"{part}: " + ", ".join(f"{own[label]:,} parameters {label}" for label in labels))
    return lines
