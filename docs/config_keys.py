"""The page of every key of a config, from the classes that read them: types, ranges, defaults and docstrings."""

import dataclasses
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from docstrings import attributes, escaped, summary

from vlm_jax import ranges
from vlm_jax.adapter import LoraSettings
from vlm_jax.budget import InfeasibleBudget
from vlm_jax.build.image_text import CaptionSettings, Similarity
from vlm_jax.build.sections import TOWERS, RunKeys
from vlm_jax.build.settings import (
    EvaluationSettings,
    ImageTextSettings,
    PixelSettings,
    ProcessorSettings,
    RowSettings,
)
from vlm_jax.config import hints_of, keys_of
from vlm_jax.connectors import CONNECTORS
from vlm_jax.data import SOURCES
from vlm_jax.decoders import DECODERS
from vlm_jax.encoders import COMPOSITE_ENCODERS, ENCODERS, PACKED_ENCODERS
from vlm_jax.encoders.encoder import ImageEncoder
from vlm_jax.evals.classification import ClassificationSettings
from vlm_jax.evals.pairs import PairSettings
from vlm_jax.optim.adamw import OptimizerSettings
from vlm_jax.pretrained.configured import ImageTextReleaseSettings, ReleaseProcessorSettings
from vlm_jax.reducers import REDUCERS
from vlm_jax.sharding.mesh import MeshSettings
from vlm_jax.sweep.points import SweepSettings
from vlm_jax.train.objectives import OBJECTIVES
from vlm_jax.train.settings import LoopSettings
from vlm_jax.train.stages import Stage

# Fields that the build derives from the rest of the config; a key for one is refused.
DERIVED = {
    "encoder": {"dtype", "param_dtype", "channels", "with_class_token"},
    "connector": {"features", "dtype", "param_dtype"},
    "decoder": {"vocab_size", "dtype", "param_dtype", "drops"},
    "stages": {"label", "settings"},
}
HEAD = """# Config keys

A run is described by a config, an `ml_collections.ConfigDict`; `configs/base.py` and
`vlm_jax/train/finetuning.py` have all sections. On the command line `--config.KEY=VALUE` overrides a key, and
`--list_keys` prints the keys that the config sets, with their values; this page has all:

```bash
python -m vlm_jax.cli.train --config=configs/digits.py --list_keys
```

This page is made from the classes that read the keys. A key that no class reads, one of another type and a number
outside its range are errors before anything is built; the message names the path and the nearest key. Upper bounds of
32,768 and more only protect from overflow, and are left out here. *Required* keys have no default in their class. Where
a section has several classes, the kind of the data, the model or the release chooses one.
"""


@dataclasses.dataclass(frozen=True)
class Key:
    """One row of a table."""

    name: str
    kind: str
    limits: str
    default: str
    text: str


def page() -> str:
    """The whole page as Markdown."""
    return "\n".join([HEAD, *_run(), *_model(), *_training(), *_sweep()])


def _run() -> Iterator[str]:
    yield from _section("", "config", [("", RunKeys)], "Keys that are in no section.")
    yield from _section("data", "config.data", [(f"kind = {kind}", cls) for kind, cls in SOURCES.items()])
    processors = [
        ("a release", ReleaseProcessorSettings),
        ("a released two-tower model or classifier", ImageTextReleaseSettings),
        ("sections: a model that answers", ProcessorSettings),
        ("sections: two towers", ImageTextSettings),
        ("sections: a classifier", PixelSettings),
    ]
    yield from _section("processor", "config.processor", processors)
    rows = [("a model that answers", RowSettings), ("two towers", CaptionSettings)]
    yield from _section("row", "config.row", rows)


def _model() -> Iterator[str]:
    tables: dict[str, tuple[Mapping[str, Any], str]] = {
        "encoder": (
            {**ENCODERS, **PACKED_ENCODERS, **COMPOSITE_ENCODERS},
            "Of a release, `None` leaves the release's own encoder, and other keys replace fields of it, such as "
            "`remat`.",
        ),
        "reducer": (REDUCERS.own, "Training-free reducers; `none` is the default."),
        "connector": (
            {**CONNECTORS.own, "similarity": Similarity},
            "Of a release, a `kind` of `None` is the release's own connector. Fields that `token_budget` solves are no "
            "keys.",
        ),
        "decoder": ({**DECODERS, **TOWERS}, "Of a release, keys replace fields of its own decoder, such as `remat`."),
    }
    for section, (table, text) in tables.items():
        kinds = [(f"kind = {kind}", cls) for kind, cls in table.items() if cls is not None]
        yield from _section(section, f"config.{section}", kinds, text)


def _training() -> Iterator[str]:
    yield from _section("lora", "config.lora", [("", LoraSettings)])
    objectives = [(f"objective = {name}", cls) for name, cls in OBJECTIVES.items()]
    text = "Keys of a stage, `config.stages.NAME`, are those of every stage and those of its objective."
    yield from _section("stages", "config.stages.NAME", [("every stage", Stage), *objectives], text)
    yield from _section("optimizer", "config.optimizer", [("", OptimizerSettings)])
    yield from _section("loop", "config.loop", [("", LoopSettings)])
    evaluations = [
        ("a model that answers", EvaluationSettings),
        ("two towers", PairSettings),
        ("a classifier", ClassificationSettings),
    ]
    yield from _section("evaluation", "config.evaluation", evaluations)
    yield from _section("mesh", "config.mesh", [("", MeshSettings)])


def _sweep() -> Iterator[str]:
    yield (
        "\n## Sweeps\n\nThe config of a sweep has `base`, a run's config; `candidates`, which are described in "
        "[Run a sweep](../how-to/sweep.md); and `sweep`:\n"
    )
    yield from _table(rows_of(SweepSettings, "config.sweep"))


def _section(name: str, path: str, classes: list[tuple[str, Any]], text: str = "") -> Iterator[str]:
    """A heading, and a table a class; `name` is the section's key in the config, "" for none."""
    yield f"\n## {path}\n"
    if text:
        yield text
    for title, cls in classes:
        if title:
            yield f"\n### {path}: {title}\n"
        yield f"\n{escaped(summary(cls))} Read by `{cls.__module__}.{cls.__qualname__}`.\n"
        yield from _table(rows_of(cls, path, derived_of(cls, name)))


def derived_of(cls: Any, section: str) -> set[str]:
    """Fields of a class that are not keys of the section: those that the build derives, or solves from the budget."""
    derived = set(DERIVED.get(section, ()))
    if section == "encoder" and "image_size" in keys_of(cls) and cls in (*COMPOSITE_ENCODERS.values(),):
        derived.add("image_size")
    if section in ("connector", "reducer") and hasattr(cls, "for_budget"):
        extra = (4,) if section == "reducer" else ()
        for budget in (64, 16, 4):
            try:
                derived |= set(cls.for_budget(budget, (8, 8), *extra))
                break
            except InfeasibleBudget:
                continue
    return derived


def rows_of(cls: Any, path: str, derived: typing.Collection[str] = (), prefix: str = "") -> list[Key]:
    """The keys of a class, with those of the sections in it."""
    said, hints, rows = described(cls), hints_of(cls), list[Key]()
    for name, field in keys_of(cls).items():
        if name in derived:
            continue
        key = prefix + name
        kind, limits = told(hints[name])
        rows.append(Key(key, kind, limits, _default(field), said.get(name, "")))
        if (inner := _inner(hints[name])) is not None:
            cls_inside, step = inner
            rows += rows_of(cls_inside, path, prefix=f"{key}{step}.")
    return rows


def described(cls: Any) -> dict[str, str]:
    """`attributes`, where "as in `X`" is what X says."""
    found = attributes(cls)
    for name, text in found.items():
        words = text.split("`")
        if text.startswith("as in `"):
            other = _named(cls, words[1].split(".")[-1])
            if other is not None and name in (inner := attributes(other)):
                found[name] = inner[name]
    return found


def _named(cls: Any, name: str) -> Any:
    for one in cls.__mro__:
        if name in vars(sys.modules[one.__module__]):
            return vars(sys.modules[one.__module__])[name]
    return None


def _inner(hint: Any) -> tuple[Any, str] | None:
    """The settings class of a section inside, and what stands for its name; None for other types."""
    hint, _ = ranges.split(hint)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return next((found for one in args if (found := _inner(one)) is not None), None)
    if origin is dict:
        found = _inner(args[1])
        return None if found is None else (found[0], ".NAME" + found[1])
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return hint, ""
    return None


def told(hint: Any) -> tuple[str, str]:
    """A type as text, and the range of the number in it."""
    base, limits = ranges.split(hint)
    origin, args = typing.get_origin(base), typing.get_args(base)
    said = [_limit(limit) for limit in limits]
    if base is type(None):
        return "None", ""
    if base is ImageEncoder:
        return "section of an encoder", ""
    if isinstance(base, type) and dataclasses.is_dataclass(base):
        return "section", ""
    if origin is typing.Literal:
        return " or ".join(repr(one) for one in args), ""
    if not args:
        return getattr(base, "__name__", str(base)), "; ".join(said)
    inner = [(("...", "") if one is Ellipsis else told(one)) for one in args]
    said += [text for _, text in inner if text]
    names = [name for name, _ in inner]
    if origin in (typing.Union, types.UnionType):
        kind = " or ".join(dict.fromkeys(names))
    else:
        kind = f"{origin.__name__}[{', '.join(names)}]"
    return kind, "; ".join(dict.fromkeys(said))


def _limit(limit: ranges.Range) -> str:
    """A range as text, without an upper bound that only protects from overflow."""
    if limit.most is not None and limit.most >= ranges.LARGE:
        limit = dataclasses.replace(limit, most=None)
    return str(limit)


def _default(field: Any) -> str:
    value = field.default
    if value is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value is dataclasses.MISSING:
        return "*required*"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return "see below"
    return f"`{getattr(value, '__name__', None) or repr(value)}`"


def _table(rows: list[Key]) -> Iterator[str]:
    if not rows:
        yield "It has no keys of its own.\n"
        return
    yield "| key | type | range | default | meaning |"
    yield "| --- | --- | --- | --- | --- |"
    for row in rows:
        cells = (f"`{row.name}`", row.kind, row.limits, row.default, escaped(row.text))
        yield f"| {' | '.join(cells)} |"
