"""Config sections become settings, or an error that names the key."""

import dataclasses
from typing import Any, Literal

import pytest
from flax import linen as nn
from ml_collections import ConfigDict

from vlm_jax.config import (
    ConfigError,
    check_keys,
    choose,
    config_hash,
    convert,
    did_you_mean,
    differences,
    parse,
    plain,
)


@dataclasses.dataclass(frozen=True)
class Settings:
    learning_rate: float
    num_heads: int = 2
    grid: tuple[int, int] = (1, 1)
    names: tuple[str, ...] = ()
    kind: Literal["layer", "rms"] = "rms"
    stddev: float | None = None
    rates: dict[str, float] = dataclasses.field(default_factory=dict)
    augment: bool = False
    dtype: Any = None


class Layer(nn.Module):
    width: int
    use_bias: bool = True


def read(**section):
    return parse(Settings, ConfigDict({"learning_rate": 1.0, **section}), "config.s")


def message(**section):
    with pytest.raises(ConfigError) as caught:
        read(**section)
    return str(caught.value)


def test_every_kind_of_value_is_read():
    settings = read(
        learning_rate=3,
        num_heads=4,
        grid=[2, 3],
        names=("a", "b"),
        kind="layer",
        stddev=1,
        rates={"encoder": 1},
        augment=True,
        dtype="anything",
    )
    assert settings == Settings(3.0, 4, (2, 3), ("a", "b"), "layer", 1.0, {"encoder": 1.0}, True, "anything")
    # An int serves as a float, and is one from then on; a list serves as a tuple.
    assert type(settings.learning_rate) is type(settings.stddev) is type(settings.rates["encoder"]) is float
    assert type(settings.grid) is tuple
    assert type(settings.rates) is dict
    assert read(stddev=None).stddev is None
    assert read() == Settings(1.0)


def test_a_linen_module_is_read_like_any_dataclass():
    assert parse(Layer, {"width": 3}, "config.layer") == Layer(width=3)
    for field in ("parent", "name"):
        with pytest.raises(ConfigError, match=f"config.layer.{field}: unknown"):
            parse(Layer, {"width": 3, field: None}, "config.layer")


def test_an_unknown_key_names_the_nearest():
    assert message(num_head=3) == "config.s.num_head: unknown or unused key; did you mean 'num_heads'?"


def test_an_unknown_key_far_from_all_lists_them():
    text = message(zzz=3)
    assert text.startswith("config.s.zzz: unknown or unused key; known here: ")
    assert all(field.name in text for field in dataclasses.fields(Settings))


def test_all_unknown_keys_are_named_at_once():
    assert [line.split(":")[0] for line in message(zzz=1, num_head=2).splitlines()] == [
        "config.s.num_head",
        "config.s.zzz",
    ]


def test_all_missing_keys_are_named_at_once():
    @dataclasses.dataclass
    class Two:
        first: int
        second: str

    with pytest.raises(ConfigError) as caught:
        parse(Two, {}, "config.two")
    lines = str(caught.value).splitlines()
    assert lines == [f"config.two.{key}: missing, and it has no default" for key in ("first", "second")]


@pytest.mark.parametrize(
    ("key", "value", "path", "expected"),
    [
        ("num_heads", 2.0, "num_heads", "int"),
        ("num_heads", True, "num_heads", "int"),
        ("num_heads", "2", "num_heads", "int"),
        ("num_heads", None, "num_heads", "int"),
        ("learning_rate", "1e-3", "learning_rate", "float"),
        ("learning_rate", False, "learning_rate", "float"),
        ("learning_rate", 10**400, "learning_rate", "a number of float64"),
        ("augment", 1, "augment", "bool"),
        ("grid", (1, 2, 3), "grid", "tuple[int, int]"),
        ("grid", (1, 2.5), "grid[1]", "int"),
        ("grid", 3, "grid", "tuple[int, int]"),
        ("names", ("a", 1), "names[1]", "str"),
        ("names", "ab", "names", "tuple[str, ...]"),
        ("stddev", "wide", "stddev", "float | None"),
        ("rates", {"encoder": "fast"}, "rates.encoder", "float"),
        ("rates", 3.0, "rates", "dict[str, float]"),
    ],
)
def test_a_value_of_another_type_is_named_with_both(key, value, path, expected):
    with pytest.raises(ConfigError) as caught:
        parse(Settings, {"learning_rate": 1.0, key: value}, "config.s")
    got = value[1] if path.endswith("[1]") else value["encoder"] if path.endswith(".encoder") else value
    assert str(caught.value) == f"config.s.{path}: expected {expected}, got {got!r}"


def test_a_value_outside_a_literal_lists_the_choices():
    assert message(kind="batch") == "config.s.kind: expected one of 'layer', 'rms', got 'batch'"


def test_a_derived_field_is_set_by_the_caller_and_by_no_key():
    assert parse(Settings, {}, "config.s", learning_rate=0.5) == Settings(0.5)
    with pytest.raises(ConfigError, match=r"config\.s\.learning_rate: this value is derived"):
        parse(Settings, {"learning_rate": 1.0}, "config.s", learning_rate=0.5)


def test_a_table_lookup_names_the_nearest_kind():
    table = {"pool": 1, "resampler": 2}
    assert choose(table, "pool", "config.connector.kind") == 1
    with pytest.raises(ConfigError) as caught:
        choose(table, "resample", "config.connector.kind")
    assert str(caught.value) == "config.connector.kind: no kind 'resample'; did you mean 'resampler'?"


def test_messages_without_a_near_or_any_name():
    assert did_you_mean("x", []) == "; known here: no key at all"
    assert did_you_mean("x", ["bb", "aa"]) == "; known here: aa, bb"


def test_known_keys_pass():
    check_keys(["a", "b"], ["b", "a", "c"], "config")
    with pytest.raises(ConfigError, match=r"config\.d: unknown"):
        check_keys(["a", "d"], ["a"], "config")


def test_nested_values_keep_their_path():
    with pytest.raises(ConfigError, match=r"config\.x\.a\[1\]\[0\]: expected int"):
        convert({"a": ((1,), ("b",))}, dict[str, tuple[tuple[int, ...], ...]], "config.x")


def test_a_section_in_a_section_is_a_dataclass_with_paths_of_its_own():
    @dataclasses.dataclass(frozen=True)
    class Span:
        start: int
        stop: int = 9

        def __post_init__(self):
            if self.start > self.stop:
                raise ValueError("it starts behind its end")

    assert convert(ConfigDict({"start": 2}), Span, "config.span") == Span(2)
    assert convert(None, Span | None, "config.span") is None
    for section, message in (
        ({"start": 2, "end": 3}, r"config\.span\.end: unknown or unused key"),
        ({"start": "x"}, r"config\.span\.start: expected int"),
        ({"start": 10}, r"config\.span: it starts behind its end"),
        (3, r"config\.span: expected Span, got 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            convert(section, Span, "config.span")


def test_plain_is_json():
    config = ConfigDict({"b": (1, (2.5, "c")), "a": {"y": None, "x": True}})
    assert plain(config) == {"a": {"x": True, "y": None}, "b": [1, [2.5, "c"]]}
    assert list(plain(config)) == ["a", "b"]


def test_a_hash_names_the_content_whatever_the_order_of_keys():
    first = config_hash(ConfigDict({"a": 1, "b": {"c": (1, 2), "d": 2.0}}))
    assert first == config_hash({"b": {"d": 2.0, "c": [1, 2]}, "a": 1})
    assert len(first) == 12 and set(first) <= set("0123456789abcdef")
    for other in ({"a": 2, "b": {"c": (1, 2), "d": 2.0}}, {"a": 1, "b": {"c": (2, 1), "d": 2.0}}, {"a": 1}):
        assert config_hash(other) != first


def test_differences_name_every_path():
    ours = {"a": 1, "b": {"c": [1, 2], "d": 2.0}, "e": 0}
    theirs = {"a": 1, "b": {"c": [1, 3], "d": 2.0, "f": None}, "e": {"g": 1}}
    assert differences(ours, theirs) == [
        "config.b.c: [1, 2] here, [1, 3] there",
        "config.b.f: '(absent)' here, None there",
        "config.e: 0 here, {'g': 1} there",
    ]
    assert differences(ours, ours) == []
