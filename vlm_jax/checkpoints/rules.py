"""Rules for converting tensors of a release to our parameters.

    Rule("vision_model.encoder.layers.{layer}.mlp.fc1.weight", "encoder/blocks/mlp/up/kernel", LINEAR)

`{layer}` is a placeholder for an integer. Where the target has it too, there is one parameter per layer.
Where the target lacks it, the parameter is stacked: its leading axis is the layer axis. Several
such placeholders (`{layer}`, `{expert}`) are stacked in the order of the source.

One table of rules both imports and exports a release (`params`), after every key is accounted
for (`plan`). These modules use only path strings, shapes and arrays, and are independent of models.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from vlm_jax.checkpoints.ops import IDENTITY, Op, Shape
from vlm_jax.types import Selection

_PLACEHOLDER = re.compile(r"\{(\w+)\}")


@runtime_checkable
class SourceTensor(Protocol):
    """A tensor of a checkpoint: a NumPy array or a lazily read tensor."""

    @property
    def shape(self) -> Shape: ...

    @property
    def dtype(self) -> np.dtype: ...

    def __getitem__(self, index: Selection, /) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Rule:
    """The conversion of some released tensors to some parameters.

    Attributes:
      source: one or more key templates of the release. `{name}` is an integer; the rest is literal.
      target: one or more paths in our tree, separated by `/`. Its placeholders must be in
        the sources; source placeholders that it lacks are stacked on its leading axes.
      op: the operation on one source tensor of every key, without the stacked axes.
      where: the values of a placeholder if they are not 0, 1, 2, ..: `{"layer": range(1, 27)}` for
        a stack without the first layer. Entry i of the stack has value i of the range.
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

    A system's table consists of the tables of its parts, each with the system's prefix for the part:

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
def matcher(template: str) -> re.Pattern[str]:
    """A pattern for filled templates; its groups are the placeholders."""
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


def matching(patterns: Iterable[str], name: str) -> str | None:
    """The first regular expression (of `ignore` or `keep`) that matches a whole key or path, or None."""
    return next((pattern for pattern in patterns if re.fullmatch(pattern, name)), None)
