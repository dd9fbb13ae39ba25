"""One table of rules imports a released checkpoint and exports it again.

A rule says which released tensors make which of our parameters, and how:

    Rule("vision_model.encoder.layers.{layer}.mlp.fc1.weight", "encoder/blocks/mlp/up/kernel", LINEAR)

`{layer}` stands for an integer. Where the target has it too, there is one parameter for every layer.
Where the target lacks it, the parameter is stacked: its leading axis runs over the layers. Several
such placeholders (`{layer}`, `{expert}`) stack in the order in which the source names them.

The targets decide which keys are wanted, so everything is checked before anything is read: a source
key that nothing reads, a target that nothing fills or two rules fill, a wrong shape. All of it is
reported in one `CheckpointMismatch`.

This module sees path strings, shapes and arrays. It knows no model.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.checkpoints import placement
from vlm_jax.checkpoints.mismatch import CheckpointMismatch, Nearest
from vlm_jax.checkpoints.ops import IDENTITY, Op, Shape

_PLACEHOLDER = re.compile(r"\{(\w+)\}")


@runtime_checkable
class SourceTensor(Protocol):
    """What a checkpoint holds under a key: a NumPy array will do, or a tensor still in a file."""

    @property
    def shape(self) -> Shape: ...

    @property
    def dtype(self) -> np.dtype: ...

    def __getitem__(self, index: Any, /) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which released tensors make which parameters.

    Attributes:
      source: one or more key templates of the release. `{name}` is an integer; all else is literal.
      target: one or more paths in our tree, parts separated by `/`. A target has no placeholder that
        the sources lack; those that it lacks itself are stacked on its leading axes.
      op: the operation on one source tensor of every key, without the stacked axes.
      where: the values of a placeholder, where they are not 0, 1, 2, ..: `{"layer": range(1, 27)}` for
        a stack that leaves out the first layer. Entry i of the stack holds value i of the range.
    """

    source: str | tuple[str, ...]
    target: str | tuple[str, ...]
    op: Op = IDENTITY
    where: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        in_sources = {frozenset(placeholders(template)) for template in self.sources}
        in_targets = {frozenset(placeholders(template)) for template in self.targets}
        if len(in_sources) != 1 or len(in_targets) != 1:
            raise ValueError(f"{self}: all sources, and all targets, of a rule must name the same placeholders")
        if lacking := next(iter(in_targets)) - next(iter(in_sources)):
            raise ValueError(f"{self}: the target names {sorted(lacking)}, which the source does not")
        if unknown := set(self.where) - next(iter(in_sources)):
            raise ValueError(f"{self}: `where` restricts {sorted(unknown)}, which the source does not name")

    def __str__(self) -> str:
        return f"Rule({' + '.join(self.sources)} -> {' + '.join(self.targets)})"

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,) if isinstance(self.source, str) else self.source

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.target,) if isinstance(self.target, str) else self.target

    @property
    def stacked(self) -> tuple[str, ...]:
        """The placeholders that the target stacks, outermost first."""
        kept = placeholders(self.targets[0])
        return tuple(name for name in placeholders(self.sources[0]) if name not in kept)


def prefixed(rules: Iterable[Rule], source: str = "", target: str = "") -> tuple[Rule, ...]:
    """The rules of a part as rules of a whole: prefixes go before every source and every target.

    A system's table is the tables of its parts, each under the system's names for the part:

        (*prefixed(siglip.rules(config.encoder), "vision_tower.", "encoder/"),
         *prefixed(qwen2.rules(config.decoder), "language_model.", "decoder/"))
    """
    return tuple(
        dataclasses.replace(
            rule,
            source=tuple(source + template for template in rule.sources),
            target=tuple(target + template for template in rule.targets),
        )
        for rule in rules
    )


def placeholders(template: str) -> tuple[str, ...]:
    """The names in braces, each once, in order."""
    return tuple(dict.fromkeys(_PLACEHOLDER.findall(template)))


def expand(template: str, values: Mapping[str, int]) -> str:
    """The template with its placeholders filled."""
    return _PLACEHOLDER.sub(lambda match: str(values[match.group(1)]), template)


@functools.cache
def _matcher(template: str) -> re.Pattern[str]:
    pattern, seen = "", set()
    for i, part in enumerate(_PLACEHOLDER.split(template)):
        if i % 2 == 0:
            pattern += re.escape(part)
        elif part in seen:
            pattern += f"(?P={part})"
        else:
            seen.add(part)
            pattern += f"(?P<{part}>0|[1-9][0-9]*)"
    return re.compile(pattern)


@dataclasses.dataclass(frozen=True)
class Step:
    """One rule, for one value of the placeholders that its targets keep.

    Attributes:
      rule: where the step comes from.
      targets: paths of the parameters that it fills.
      shapes: their shapes, stacked axes included.
      sources: the source keys of every position in the stack; the one position of a rule that stacks
        nothing is `()`.
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
    targets: Any,
    *,
    ignore: Iterable[str] = (),
    keep: Iterable[str] = (),
) -> tuple[Step, ...]:
    """Checks that a checkpoint fits a tree of parameters and says what goes where, reading no tensor.

    Args:
      rules: the table.
      source: the checkpoint; only the shapes and dtypes of its tensors are looked at.
      targets: a tree of arrays or `jax.ShapeDtypeStruct`; boxes of axis names may stay on.
      ignore: regular expressions for whole source keys that may go unread.
      keep: regular expressions for whole target paths that the checkpoint is not to fill, such as a
        new head. A rule whose targets are all kept is left out; its source keys count as read.

    Returns:
      One step for every rule and value of the placeholders that its target keeps.

    Raises:
      CheckpointMismatch: something is missing, left over, written twice or misshapen.
    """
    rules = tuple(rules)
    leaves = dict(_flatten(targets))
    kept = {path for path in leaves if matching(keep, path)}
    steps, problems = _steps(rules, {path: tuple(leaf.shape) for path, leaf in leaves.items()}, kept)

    missing, read, source_problems = _check_sources(steps, source, leaves, kept)
    unused = [key for key in source if key not in read and not matching(ignore, key)]
    problems += source_problems + _missing_and_unused(missing, unused, source, rules)
    if problems:
        raise CheckpointMismatch(problems)
    return tuple(step for step in steps if not kept.issuperset(step.targets))


def import_params(
    rules: Iterable[Rule],
    source: Mapping[str, SourceTensor],
    targets: Any,
    *,
    ignore: Iterable[str] = (),
    keep: Iterable[str] = (),
) -> Any:
    """Reads a released checkpoint into a tree of parameters.

    Tensors are read one at a time, in parts, and only what the devices of this process hold, as far as the
    operation allows; beside the parameters themselves the host has at most one tensor: see `placement`.

    Args:
      rules: the table.
      source: the checkpoint.
      targets: a tree of `jax.ShapeDtypeStruct`; one without a sharding goes to the default device.
      ignore: source keys that may go unread, as in `plan`.
      keep: targets that stay as they are, as in `plan`.

    Returns:
      The tree of `targets` with `jax.Array`s on their devices, cast to the dtypes of the targets. Leaves that `keep`
      matches are left as they were given.

    Raises:
      CheckpointMismatch: as in `plan`; nothing has been read then.
    """
    steps = plan(rules, source, targets, ignore=ignore, keep=keep)
    leaves = dict(_flatten(targets))
    kept = {path for path in leaves if matching(keep, path)}
    values = dict(leaves)
    with placement.readers() as pool:
        for step in steps:
            wanted = [i for i, path in enumerate(step.targets) if path not in kept]
            read, axis = _reader(step, source, wanted)
            paths = [step.targets[i] for i in wanted]
            shapes = [_shape_of(leaves[path]) for path in paths]
            cut = all(getattr(source[key], "by_rows", True) for keys in step.sources.values() for key in keys)
            filled = placement.fill(shapes, len(step.rule.stacked), read, axis, pool, cut=cut)
            values |= zip(paths, filled, strict=True)
    structure = jax.tree_util.tree_structure(targets)
    return jax.tree_util.tree_unflatten(structure, [values[path] for path in leaves])


def export_params(rules: Iterable[Rule], params: Any, *, dtype: Any = None) -> dict[str, np.ndarray]:
    """Writes a tree of parameters under the released names: the inverse of `import_params`.

    Args:
      rules: the table of the import.
      params: arrays; each must be wholly addressable by this process.
      dtype: what floating-point tensors are cast to; None keeps the dtype of each.

    Returns:
      Released key -> tensor, views of the parameters on the host where the operation allows it.

    Raises:
      CheckpointMismatch: a parameter has no rule or two, does not have a shape that its rule can
        undo, or two rules write the same key.
    """
    leaves = dict(_flatten(params))
    steps = export_plan(rules, {path: tuple(leaf.shape) for path, leaf in leaves.items()})
    tensors = {}
    for step in steps:
        arrays = [np.asarray(leaves[path]) for path in step.targets]
        for position, keys in step.sources.items():
            parts = step.rule.op.inverse(*(np.asarray(array[position]) for array in arrays))
            for key, part in zip(keys, parts, strict=True):
                cast = dtype is not None and jnp.issubdtype(part.dtype, jnp.floating)
                tensors[key] = part.astype(dtype) if cast else part
    return tensors


def export_plan(rules: Iterable[Rule], shapes: Mapping[str, Shape]) -> tuple[Step, ...]:
    """What becomes of every parameter in a release: the steps of `plan` by the parameters alone.

    Args:
      rules: the table of the import.
      shapes: of the parameters, by path.

    Raises:
      CheckpointMismatch: as of `export_params`.
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
    """Every step that the target paths call for, and what is wrong between rules and targets."""
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
                problems.append(f"misshapen: {error}")
    nearest = Nearest(path for rule in rules for path in rule.targets if path not in writers)
    problems += [
        f"not filled: {path}, shape {shape}: no rule writes it" + nearest.suggest(path, "a rule's target is near")
        for path, shape in shapes.items()
        if path not in writers and path not in kept
    ]
    return steps, problems


def _target_values(rule: Rule, paths: Iterable[str]) -> list[dict[str, int]]:
    """The values of the targets' placeholders for which any of the targets is in the tree."""
    found: dict[tuple[int, ...], dict[str, int]] = {}
    for template in rule.targets:
        names, matcher = placeholders(rule.targets[0]), _matcher(template)
        for match in filter(None, map(matcher.fullmatch, paths)):
            values = {name: int(match.group(name)) for name in names}
            if all(value in rule.where.get(name, (value,)) for name, value in values.items()):
                found[tuple(values.values())] = values
    return [found[key] for key in sorted(found)]


def _step(rule: Rule, values: Mapping[str, int], targets: tuple[str, ...], shapes: tuple[Shape, ...]) -> Step:
    """Works out the source keys and their shapes.

    Raises:
      ValueError: the targets do not have the axes that the rule stacks, or a shape that its operation
        cannot give.
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
        raise ValueError(f"{described}: {rule} cannot give this shape: {error}") from error
    if len(needed) != len(rule.sources):
        raise ValueError(f"{described}: {rule} names {len(rule.sources)} sources, and {rule.op} reads {len(needed)}")
    sources = {}
    for position in np.ndindex(*stack):
        numbers = {name: values_of[i] for name, values_of, i in zip(rule.stacked, ranges, position, strict=True)}
        sources[position] = tuple(expand(template, {**values, **numbers}) for template in rule.sources)
    return Step(rule, targets, shapes, sources, needed)


def _check_sources(
    steps: Iterable[Step], source: Mapping[str, SourceTensor], leaves: Mapping[str, Any], kept: set[str]
) -> tuple[dict[str, str], dict[str, Rule], list[str]]:
    """Missing keys with their lines, the rule that reads each key, and all other problems of source keys."""
    read: dict[str, Rule] = {}
    missing: dict[str, str] = {}
    problems: list[str] = []
    for step in steps:
        wanted = not kept.issuperset(step.targets)
        for position, keys in step.sources.items():
            for key, needed in zip(keys, step.needed, strict=True):
                if key in read and wanted:
                    problems.append(
                        f"read twice: {key}, by {read[key]} and by {step.rule}; a tensor that makes several "
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
                        f"misshapen: {key}: expected {needed}, found {tuple(source[key].shape)}, "
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
    """The lines of missing and of unused keys, each with the nearest of the other."""
    known = {key: made for key in unused if (made := _what_it_makes(key, rules))}
    unknown = [key for key in unused if key not in known]
    near_unused, near_missing = Nearest(unknown), Nearest(missing)
    problems = [line + near_unused.suggest(key, "an unused key is near") for key, line in missing.items()]
    problems += [
        f"unused: {key}, shape {tuple(source[key].shape)}: the model has no {made}, and no ignore pattern "
        "covers the key"
        for key, made in known.items()
    ]
    problems += [
        f"unused: {key}, shape {tuple(source[key].shape)}: no rule reads it and no ignore pattern covers it"
        + near_missing.suggest(key, "a missing key is near")
        for key in unknown
    ]
    return problems


def block_reader(
    step: Step, i: int, source: Mapping[str, SourceTensor], dtype: Any
) -> Callable[[tuple[range, ...]], np.ndarray]:
    """A function that reads a block of the step's target `i`, one range of step 1 for every axis."""
    depth = len(step.rule.stacked)
    read_at, axis = _reader(step, source, [i])

    def read(block: tuple[range, ...]) -> np.ndarray:
        stack, rest = block[:depth], block[depth:]
        values = np.empty([len(r) for r in block], dtype)
        for offset in np.ndindex(*(len(r) for r in stack)):
            position = tuple(r[o] for r, o in zip(stack, offset, strict=True))
            if axis is None:
                values[offset] = read_at(position, None)[0][tuple(slice(r.start, r.stop) for r in rest)]
            else:
                values[offset] = read_at(position, rest)[0]
        return values

    return read


def _reader(step: Step, source: Mapping[str, SourceTensor], wanted: Sequence[int]) -> tuple[placement.Read, int | None]:
    """What reads blocks of a step's `wanted` targets, and along which of their axes the rows of the tensor lie.

    The axis is None where tensors are only read whole: there are several, or the operation cannot tell where
    in the tensor a block of the target lies.
    """
    op, rank = step.rule.op, len(step.shapes[0]) - len(step.rule.stacked)
    corner = op.source_index(tuple(slice(i, i + 1) for i in range(rank)))
    if len(step.rule.sources) > 1 and len(step.rule.targets) > 1:
        corner = None

    def read(position: placement.Position, block: placement.Block | None) -> list[np.ndarray]:
        keys = step.sources[position]
        if block is None:
            made = op(*(np.asarray(source[key][...]) for key in keys))
        else:
            part = op.source_index(tuple(slice(r.start, r.stop) for r in block))
            made = op(*[np.asarray(source[keys[0]][part])] * len(keys))  # stored several times, read once
        return [made[i] for i in wanted]

    return read, corner[0].start if corner else None


def _shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))


def _dtype_problems(key: str, dtype: Any, step: Step, leaves: Mapping[str, Any]) -> list[str]:
    """A cast between integers and floating point is never meant."""
    return [
        f"wrong kind of number: {key} is {np.dtype(dtype)}, and {path} is {np.dtype(leaves[path].dtype)}"
        for path in step.targets
        if jnp.issubdtype(dtype, jnp.floating) != jnp.issubdtype(leaves[path].dtype, jnp.floating)
    ]


def _what_it_makes(key: str, rules: Iterable[Rule]) -> str | None:
    """The parameters that a rule makes of a source key, or None where no rule knows the key."""
    for rule in rules:
        for template in rule.sources:
            if match := _matcher(template).fullmatch(key):
                values = {name: int(value) for name, value in match.groupdict().items()}
                return " + ".join(_at(target, rule, values) for target in rule.targets)
    return None


def _at(target: str, rule: Rule, values: Mapping[str, int]) -> str:
    """The target with its own placeholders filled and the stacked ones as `[layer 3]`."""
    stacked = ", ".join(f"{name} {values[name]}" for name in rule.stacked)
    return expand(target, values) + (f"[{stacked}]" if stacked else "")


def _flatten(tree: Any) -> list[tuple[str, Any]]:
    """(path, leaf) in tree order; a box of axis names adds nothing to the path."""
    named = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        parts = [str(getattr(part, "key", getattr(part, "idx", None))) for part in path if not _is_box(part)]
        named.append(("/".join(parts), leaf))
    return named


def _is_box(part: Any) -> bool:
    return isinstance(part, jax.tree_util.GetAttrKey) and part.name == "value"


def _entry(path: str, position: tuple[int, ...]) -> str:
    return f"{path}[{', '.join(map(str, position))}]" if position else path


def matching(patterns: Iterable[str], name: str) -> str | None:
    """The first regular expression that matches a whole key or path, as of `ignore` and `keep`; None if none does."""
    return next((pattern for pattern in patterns if re.fullmatch(pattern, name)), None)
