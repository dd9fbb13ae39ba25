"""The conversion plan between a release and a tree of parameters, checked before anything is read.

The targets determine the required keys: an unused source key, a target filled by no rule or by two,
and a wrong shape are all reported in one `CheckpointMismatch`.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from vlm_jax.checkpoints.mismatch import CheckpointMismatch, Nearest
from vlm_jax.checkpoints.ops import Shape
from vlm_jax.checkpoints.rules import Rule, SourceTensor, expand, matcher, matching, placeholders
from vlm_jax.leaves import flatten
from vlm_jax.types import Config, Dtype, Tree


@dataclasses.dataclass(frozen=True)
class Step:
    """One rule, for one value of the placeholders in its targets.

    Attributes:
      rule: the rule.
      targets: paths of the parameters that it fills.
      shapes: their shapes, stacked axes included.
      sources: the source keys of every position in the stack; the single position of a rule without
        a stack is `()`.
      needed: the shapes that the source tensors must have, the same for every position.
    """

    rule: Rule
    targets: tuple[str, ...]
    shapes: tuple[Shape, ...]
    sources: Mapping[tuple[int, ...], tuple[str, ...]]
    needed: tuple[Shape, ...]

    def __str__(self) -> str:
        positions = list(self.sources)
        keys = " + ".join(self.sources[positions[0]])
        if len(positions) > 1:
            keys += f" .. {' + '.join(self.sources[positions[-1]])} ({len(positions)} stacked)"
        targets = " + ".join(f"{t} {s}" for t, s in zip(self.targets, self.shapes, strict=True))
        return f"{keys} {' + '.join(map(str, self.needed))} -> {self.rule.op} -> {targets}"


def plan(
    rules: Iterable[Rule],
    source: Mapping[str, SourceTensor],
    targets: Tree,
    *,
    ignore: Iterable[str] = (),
    keep: Iterable[str] = (),
) -> tuple[Step, ...]:
    """Checks that a checkpoint fits a tree of parameters and plans the conversion, reading no tensor.

    Args:
      rules: the table.
      source: the checkpoint; only the shapes and dtypes of its tensors are used.
      targets: a tree of arrays or `jax.ShapeDtypeStruct`; may have boxes of axis names.
      ignore: regular expressions for whole source keys that may be unused.
      keep: regular expressions for whole target paths that the checkpoint does not fill, such as a
        new head. A rule whose targets are all kept is omitted; its source keys count as read.

    Returns:
      One step for every rule and value of the placeholders in its target.

    Raises:
      CheckpointMismatch: a key or target is missing, unused, written twice or of another shape.
    """
    rules = tuple(rules)
    leaves = dict(flatten(targets))
    kept = {path for path in leaves if matching(keep, path)}
    steps, problems = _steps(rules, {path: tuple(leaf.shape) for path, leaf in leaves.items()}, kept)

    missing, read, source_problems = _check_sources(steps, source, leaves, kept)
    unused = [key for key in source if key not in read and not matching(ignore, key)]
    problems += source_problems + _missing_and_unused(missing, unused, source, rules)
    if problems:
        raise CheckpointMismatch(problems)
    return tuple(step for step in steps if not kept.issuperset(step.targets))


def export_plan(rules: Iterable[Rule], shapes: Mapping[str, Shape]) -> tuple[Step, ...]:
    """The steps of `plan` computed from the parameters only, for export.

    Args:
      rules: the table of the import.
      shapes: of the parameters, by path.

    Raises:
      CheckpointMismatch: as `export_params`.
    """
    steps, problems = _steps(tuple(rules), shapes, set())
    written: dict[str, Rule] = {}
    for step in steps:
        for key in itertools.chain.from_iterable(step.sources.values()):
            if key in written:
                problems.append(f"written twice: {key}, by {written[key]} and by {step.rule}")
            written[key] = step.rule
    if problems:
        raise CheckpointMismatch(problems)
    return tuple(steps)


def _steps(rules: tuple[Rule, ...], shapes: Mapping[str, Shape], kept: set[str]) -> tuple[list[Step], list[str]]:
    """Every step for the target paths, and the mismatches between rules and targets."""
    steps: list[Step] = []
    problems: list[str] = []
    writers: dict[str, Rule] = {}
    for rule in rules:
        for values in _target_values(rule, shapes):
            targets = tuple(expand(template, values) for template in rule.targets)
            if absent := [path for path in targets if path not in shapes]:
                problems.append(f"not in the model: {', '.join(absent)}, which {rule} fills together with others")
                continue
            for path in targets:
                if path in writers:
                    problems.append(f"written twice: {path}, by {writers[path]} and by {rule}")
                writers[path] = rule
            try:
                steps.append(_step(rule, values, targets, tuple(shapes[path] for path in targets)))
            except ValueError as error:
                problems.append(f"wrong shape: {error}")
    nearest = Nearest(path for rule in rules for path in rule.targets if path not in writers)
    problems += [
        f"not filled: {path}, shape {shape}: no rule writes it" + nearest.suggest(path, "similar target of a rule")
        for path, shape in shapes.items()
        if path not in writers and path not in kept
    ]
    return steps, problems


def _target_values(rule: Rule, paths: Iterable[str]) -> list[dict[str, int]]:
    """The values of the targets' placeholders for which a target is in the tree."""
    found: dict[tuple[int, ...], dict[str, int]] = {}
    for template in rule.targets:
        names, matches = placeholders(rule.targets[0]), matcher(template).fullmatch
        for match in filter(None, map(matches, paths)):
            values = {name: int(match.group(name)) for name in names}
            if all(value in rule.where.get(name, (value,)) for name, value in values.items()):
                found[tuple(values.values())] = values
    return [found[key] for key in sorted(found)]


def _step(rule: Rule, values: Mapping[str, int], targets: tuple[str, ...], shapes: tuple[Shape, ...]) -> Step:
    """Computes the source keys and their shapes.

    Raises:
      ValueError: the targets lack the axes that the rule stacks, or have a shape that its operation
        cannot return.
    """
    depth = len(rule.stacked)
    described = " + ".join(f"{path} {shape}" for path, shape in zip(targets, shapes, strict=True))
    stack = shapes[0][:depth]
    if len(stack) < depth or any(shape[:depth] != stack for shape in shapes):
        raise ValueError(f"{described}: {rule} stacks {', '.join(rule.stacked)} on the leading axes")
    ranges = [rule.where.get(name, range(size)) for name, size in zip(rule.stacked, stack, strict=True)]
    for name, values_of, size in zip(rule.stacked, ranges, stack, strict=True):
        if len(values_of) != size:
            raise ValueError(f"{described}: {rule} stacks {len(values_of)} values of {name}, not {size}")
    try:
        needed = rule.op.inverse.shapes(*(shape[depth:] for shape in shapes))
    except ValueError as error:
        raise ValueError(f"{described}: {rule} cannot return this shape: {error}") from error
    if len(needed) != len(rule.sources):
        raise ValueError(f"{described}: {rule} names {len(rule.sources)} sources, but {rule.op} takes {len(needed)}")
    sources = {}
    for position in np.ndindex(*stack):
        numbers = {name: values_of[i] for name, values_of, i in zip(rule.stacked, ranges, position, strict=True)}
        sources[position] = tuple(expand(template, {**values, **numbers}) for template in rule.sources)
    return Step(rule, targets, shapes, sources, needed)


def _check_sources(
    steps: Iterable[Step], source: Mapping[str, SourceTensor], leaves: Config, kept: set[str]
) -> tuple[dict[str, str], dict[str, Rule], list[str]]:
    """Missing keys with their messages, the rule that reads each key, and all other problems of source keys."""
    read: dict[str, Rule] = {}
    missing: dict[str, str] = {}
    problems: list[str] = []
    for step in steps:
        wanted = not kept.issuperset(step.targets)
        for position, keys in step.sources.items():
            for key, needed in zip(keys, step.needed, strict=True):
                if key in read and wanted:
                    problems.append(
                        f"read twice: {key}, by {read[key]} and by {step.rule}; a tensor for several "
                        "parameters needs one rule with several targets"
                    )
                read[key] = step.rule
                if not wanted:
                    continue
                for_what = _entry(" + ".join(step.targets), position)
                if key not in source:
                    missing[key] = f"missing from the checkpoint: {key}, shape {needed}, for {for_what}"
                elif tuple(source[key].shape) != needed:
                    problems.append(
                        f"wrong shape: {key}: expected {needed}, found {tuple(source[key].shape)}, "
                        f"for {for_what} through {step.rule.op}"
                    )
                else:
                    problems += _dtype_problems(key, source[key].dtype, step, leaves)
    return missing, read, problems


def _missing_and_unused(
    missing: Mapping[str, str],
    unused: Sequence[str],
    source: Mapping[str, SourceTensor],
    rules: Iterable[Rule],
) -> list[str]:
    """The messages for missing and unused keys, each with the most similar of the other."""
    known = {key: made for key in unused if (made := _what_it_makes(key, rules))}
    unknown = [key for key in unused if key not in known]
    near_unused, near_missing = Nearest(unknown), Nearest(missing)
    problems = [line + near_unused.suggest(key, "similar unused key") for key, line in missing.items()]
    problems += [
        f"unused: {key}, shape {tuple(source[key].shape)}: the model has no {made}, and no ignore pattern "
        "covers the key"
        for key, made in known.items()
    ]
    problems += [
        f"unused: {key}, shape {tuple(source[key].shape)}: no rule reads it and no ignore pattern covers it"
        + near_missing.suggest(key, "similar missing key")
        for key in unknown
    ]
    return problems


def _dtype_problems(key: str, dtype: Dtype, step: Step, leaves: Config) -> list[str]:
    """Problems of casts between integer and floating-point dtypes."""
    return [
        f"wrong dtype: {key} is {np.dtype(dtype)}, and {path} is {np.dtype(leaves[path].dtype)}"
        for path in step.targets
        if jnp.issubdtype(dtype, jnp.floating) != jnp.issubdtype(leaves[path].dtype, jnp.floating)
    ]


def _what_it_makes(key: str, rules: Iterable[Rule]) -> str | None:
    """The parameters that a rule fills from a source key, or None where no rule has the key."""
    for rule in rules:
        for template in rule.sources:
            if match := matcher(template).fullmatch(key):
                values = {name: int(value) for name, value in match.groupdict().items()}
                return " + ".join(_at(target, rule, values) for target in rule.targets)
    return None


def _at(target: str, rule: Rule, values: Mapping[str, int]) -> str:
    """The target with its placeholders filled and the stacked ones as `[layer 3]`."""
    stacked = ", ".join(f"{name} {values[name]}" for name in rule.stacked)
    return expand(target, values) + (f"[{stacked}]" if stacked else "")


def _entry(path: str, position: tuple[int, ...]) -> str:
    return f"{path}[{', '.join(map(str, position))}]" if position else path
