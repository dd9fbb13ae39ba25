"""Every number that a user can set has a range, which one place checks."""

import dataclasses
import math
import pathlib
import types
import typing
from typing import Annotated, Any

import pytest

import vlm_jax.cli
from vlm_jax.adapter import LoraSettings
from vlm_jax.build.image_text import CaptionSettings, Similarity
from vlm_jax.build.sections import PROCESSORS, TOWERS, RunKeys
from vlm_jax.build.settings import EvaluationSettings, ProcessorSettings, RowSettings
from vlm_jax.config import ConfigError, OutOfRange, check_fields, convert, keys_of
from vlm_jax.connectors import CONNECTORS
from vlm_jax.data import SOURCES
from vlm_jax.decoders import DECODERS
from vlm_jax.encoders import COMPOSITE_ENCODERS, ENCODERS, PACKED_ENCODERS
from vlm_jax.evals.classification import ClassificationSettings
from vlm_jax.evals.pairs import PairSettings
from vlm_jax.layers.rope import Rope
from vlm_jax.optim.adamw import OptimizerSettings
from vlm_jax.pretrained.configured import ImageTextReleaseSettings, ReleaseProcessorSettings
from vlm_jax.ranges import Range, split
from vlm_jax.reducers import REDUCERS
from vlm_jax.sharding.mesh import MeshSettings
from vlm_jax.sweep.evaluation import ReleaseEvaluation
from vlm_jax.sweep.points import SweepSettings
from vlm_jax.train.check import SETTINGS
from vlm_jax.train.objectives import OBJECTIVES
from vlm_jax.train.stages import Stage

TABLES = (ENCODERS, COMPOSITE_ENCODERS, PACKED_ENCODERS, CONNECTORS, REDUCERS, DECODERS, TOWERS, SOURCES, OBJECTIVES,
          PROCESSORS, SETTINGS)  # fmt: skip
OTHERS = (RunKeys, Stage, Rope, Similarity, CaptionSettings, ProcessorSettings, RowSettings, EvaluationSettings,
          ClassificationSettings, PairSettings, ReleaseProcessorSettings, ImageTextReleaseSettings, SweepSettings,
          ReleaseEvaluation)  # fmt: skip
CLASSES = {*OTHERS, *(cls for table in TABLES for cls in table.values() if cls is not None)}
# Classes whose instances check themselves, with values that they can be made of.
CHECKED = {
    LoraSettings: {},
    OptimizerSettings: {},
    MeshSettings: {},
    EvaluationSettings: {"batch_size": 1, "question_length": 1, "max_new_tokens": 1},
    ClassificationSettings: {"batch_size": 1},
    PairSettings: {"batch_size": 1},
    CaptionSettings: {"text_length": 1},
    Similarity: {"scale": 1.0},
    RowSettings: {"text_length": 8},
    ReleaseEvaluation: {"release": "a", "data": "b", "reducers": ("none",)},
    **{cls: {} for name, cls in OBJECTIVES.items() if name != "contrastive"},
    OBJECTIVES["contrastive"]: {"loss": "softmax"},
    SETTINGS["loop"]: {},
    SOURCES["digits"]: {},
    SOURCES["documents"]: {},
    SOURCES["conversations"]: {"train_path": "a", "held_out": 1},
}


def numbers(hint: Any, path: tuple = ()):
    """(type, its ranges, where it is) of every number in a type hint; booleans are none."""
    hint, limits = split(hint)
    if hint in (int, float):
        yield hint, limits, path
    elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
        inner = typing.get_type_hints(hint, include_extras=True)
        for field in dataclasses.fields(hint):
            if field.name not in ("parent", "name"):
                yield from numbers(inner[field.name], (*path, field.name))
    elif typing.get_origin(hint) is not typing.Literal:
        for number, argument in enumerate(typing.get_args(hint)):
            yield from numbers(argument, (*path, number))


def fields(cls: Any):
    """(key, type hint) of what may be keys of a class."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return [(key, hints[key]) for key in keys_of(cls)]


def outside(kind: type, limit: Range):
    """Numbers just outside a range, and those that are in none."""
    step = 1 if kind is int else 1e-6
    found = [bound for bound in (limit.above, limit.below) if bound is not None]
    found += [limit.least - step] if limit.least is not None else []
    found += [limit.most + step] if limit.most is not None else []
    found += [math.nan, -math.inf] + ([] if limit.infinite else [math.inf]) if kind is float else []
    return [kind(value) for value in found]


@pytest.mark.parametrize("cls", sorted(CLASSES, key=lambda cls: cls.__name__), ids=lambda cls: cls.__name__)
def test_every_number_has_a_range(cls):
    found = [(key, *one) for key, hint in fields(cls) for one in numbers(hint)]
    bare = [".".join(map(str, (cls.__name__, key, *path))) for key, _, limits, path in found if len(limits) != 1]
    assert not bare, f"state their range in their type, see vlm_jax/ranges.py: {', '.join(bare)}"
    for key, hint in fields(cls):
        options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
        for kind, limits in map(split, options):
            for value in outside(kind, limits[0]) if limits and len(options) < 3 else ():
                with pytest.raises(ConfigError, match=f"x.{key}: expected "):
                    convert(value, hint, f"x.{key}")


@pytest.mark.parametrize("cls", CHECKED, ids=lambda cls: cls.__name__)
def test_settings_check_themselves_however_they_are_made(cls):
    made = CHECKED[cls]
    cls(**made)
    for key, hint in fields(cls):
        kind, limits = split(hint)
        for value in outside(kind, limits[0]) if limits else ():
            with pytest.raises(OutOfRange, match=f"{key}: expected "):
                cls(**{**made, key: value})


def test_a_range_says_what_it_takes():
    assert str(Range(1, 10)) == "at least 1 and at most 10" and str(Range(above=0, below=1)) == "above 0 and below 1"
    assert Range(1, 2**20).broken_by(0) == "at least 1" and "1,048,576" in Range(1, 2**20).broken_by(2**21)
    assert str(Range(1, also=-1)) == "at least 1, or -1" and -1 in Range(1, also=-1) and 0 not in Range(1, also=-1)
    assert math.inf in Range(above=0, infinite=True) and math.inf not in Range(above=0) and math.nan not in Range()
    with pytest.raises(ConfigError, match=r"^a: expected above 0 \(inf for none\), or None, got -1$"):
        convert(-1, Annotated[float, Range(above=0, note="inf for none")] | None, "a")
    with pytest.raises(ConfigError, match=r"^a\[1\]: expected at least 1, got 0$"):
        convert((1, 0), tuple[Annotated[int, Range(1)], ...] | None, "a")


def test_a_new_setting_without_a_range_is_found():
    @dataclasses.dataclass
    class Fresh:
        rate: float = 1.0
        sizes: tuple[Annotated[int, Range(1)], ...] = ()
        counts: dict[str, int] = dataclasses.field(default_factory=dict)

    assert [key for key, hint in fields(Fresh) for one in numbers(hint) if not one[1]] == ["rate", "counts"]
    check_fields(Fresh(sizes=(1,)), "config.fresh.")
    with pytest.raises(ConfigError, match=r"config\.fresh\.sizes\[0\]: expected at least 1, got 0"):
        check_fields(Fresh(sizes=(0,)), "config.fresh.")


def test_every_numeric_flag_of_the_commands_has_a_range():
    texts = {path.name: path.read_text() for path in pathlib.Path(vlm_jax.cli.__file__).parent.glob("*.py")}
    for name, text in texts.items():
        assert "DEFINE_integer" not in text and "DEFINE_float" not in text, f"{name}: use cli.numbers.define"
    assert sum(text.count("numbers.define(") for text in texts.values()) > 10


@pytest.mark.parametrize(("text", "said"), [("0", "at least 1"), ("x", "an integer at least 1"), ("1.5", "an integer")])
def test_a_flag_outside_its_range_is_refused(text, said):
    from vlm_jax.cli import numbers as of_flags
    from vlm_jax.ranges import Count

    with pytest.raises(ValueError, match=said):
        of_flags._Parser("size", Count).parse(text)
    assert of_flags._Parser("size", Count).parse("7") == 7
