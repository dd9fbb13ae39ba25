"""Converts a ConfigDict to checked, typed settings without unknown, missing or unused keys.

A section of a config is parsed by a dataclass, whose fields are the section's keys: a
settings class, or a Linen module, which is a dataclass too. A key without a field, a field
without a default and without a key, a value of another type and a number outside the range in
its type (see `ranges`) are errors with the key's path and, for a misspelling, the nearest key.
"""

import dataclasses
import difflib
import functools
import hashlib
import json
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from vlm_jax import ranges
from vlm_jax.paths import regular

RunConfig = Any  # an ml_collections.ConfigDict or a section of it, whose keys are attributes of any type; or a dict
Settings = TypeVar("Settings")
Entry = TypeVar("Entry")


class ConfigError(ValueError):
    """An invalid config; the message has the path and the fix."""


class OutOfRange(ConfigError):
    """A number outside the range of its setting."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest of `known`, or the list of all if none is similar."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known here: {', '.join(known) or 'no key at all'}"


def read_json(path: Any, error: type[Exception]) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
      path: a `pathlib` or `epath` path.
      error: error class for a file that is missing or has another content; the message names the file.
    """
    try:
        value = json.loads(regular(path, error).read_bytes())
    except FileNotFoundError as cause:
        raise error(f"{path}: no such file") from cause
    except error:
        raise
    except (ValueError, RecursionError) as cause:  # also for bytes that are not text
        raise error(f"{path}: not JSON, or nested too deeply ({cause})") from cause
    if not isinstance(value, dict):
        raise error(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def check_keys(given: Iterable[str], known: Iterable[str], path: str) -> None:
    """Raises a ConfigError that lists every key of `given` that is not in `known`."""
    known = list(known)
    unknown = [key for key in given if key not in known]
    if unknown:
        raise ConfigError(
            "\n".join(f"{path}.{key}: unknown or unused key{did_you_mean(key, known)}" for key in unknown)
        )


def check_section(value: Any, path: str) -> None:
    """Raises a ConfigError for a value that has no keys."""
    if not is_section(value):
        raise ConfigError(f"{path}: expected a section, with keys, got {_shown(value)}")


def choose(table: Mapping[str, Any], kind: Any, path: str) -> Any:
    """Looks up `kind` in a registration table; raises a ConfigError with the known kinds."""
    if not isinstance(kind, str):
        raise ConfigError(f"{path}: expected one of {', '.join(table)}, got {_shown(kind)}")
    if kind not in table:
        raise ConfigError(f"{path}: no kind '{kind}'{did_you_mean(kind, table)}")
    return table[kind]


def choose_kind(table: Mapping[str, Any], section: Any, path: str) -> Any:
    """The entry of a registration table for a section's `kind`.

    Raises:
      ConfigError: it is no section, or `kind` is missing or unknown.
    """
    check_section(section, path)
    if "kind" not in section:
        raise ConfigError(f"{path}.kind: missing; expected one of {', '.join(table)}")
    return choose(table, section["kind"], f"{path}.kind")


def parse(cls: type[Settings], section: Any, path: str, **derived: Any) -> Settings:
    """Parses a config section to a `cls`.

    Args:
      cls: a dataclass; for a Linen module its `parent` and `name` are not keys.
      section: the keys and values; every one must be a field of `cls` that `derived` does not set.
      path: path of the section, as `config.connector`, for errors.
      **derived: fields that the caller computes; they cannot be set by a key.

    Raises:
      ConfigError: an unknown, derived, missing or wrongly typed key, or a number outside its range.
    """
    check_section(section, path)
    fields = keys_of(cls)
    own = {key: field for key, field in fields.items() if key not in derived}
    fixed = [key for key in section if key in derived]
    if fixed:
        raise ConfigError(f"{path}.{fixed[0]}: this value is derived from the rest of the config; remove the key")
    check_keys(section, own, path)
    missing = [
        key
        for key, field in own.items()
        if key not in section and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError("\n".join(f"{path}.{key}: missing, and it has no default" for key in missing))
    hints = hints_of(cls)
    values = {key: convert(section[key], hints[key], f"{path}.{key}") for key in section}
    return cls(**values, **derived)


def keys_of(cls: Any) -> dict[str, dataclasses.Field[Any]]:
    """Fields of a settings class or a Linen module that may be keys of a section."""
    return {
        field.name: field for field in dataclasses.fields(cls) if field.init and field.name not in ("parent", "name")
    }


@functools.cache
def hints_of(cls: Any) -> dict[str, Any]:
    """The types of a class's fields, with the ranges in them."""
    return typing.get_type_hints(cls, include_extras=True)


def parse_kind(table: Mapping[str, Any], section: Any, path: str, **derived: Any) -> Any:
    """`parse` with the class for a section's `kind` in a registration table."""
    cls = choose_kind(table, section, path)
    return parse(cls, {key: section[key] for key in section if key != "kind"}, path, **derived)


def convert(value: Any, hint: Any, path: str) -> Any:
    """Checks one value against a type hint; converts an int to a float, a list to a tuple, a section to a dataclass.

    A number is checked against the range in its hint, see `ranges`.

    Raises:
      ConfigError: the value is of another type, or outside its range.
    """
    hint, limits = ranges.split(hint)
    found = _converted(value, hint, path)
    for limit in limits:
        if found not in limit:
            raise OutOfRange(f"{path}: expected {limit.broken_by(found)}, got {value!r}")
    return found


def _converted(value: Any, hint: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _option(value, args, path)
    if origin is tuple:
        if isinstance(value, list | tuple):
            if len(args) == 2 and args[1] is Ellipsis:
                return tuple(convert(item, args[0], f"{path}[{i}]") for i, item in enumerate(value))
            if len(args) == len(value):
                return tuple(convert(v, a, f"{path}[{i}]") for i, (v, a) in enumerate(zip(value, args, strict=True)))
    elif origin in (dict, Mapping) or hint is dict:
        if is_section(value):
            pair = args or (str, Any)
            return {str(k): convert(v, pair[1], f"{path}.{k}") for k, v in value.items()}
    elif origin is typing.Literal:
        if any(type(value) is type(one) and value == one for one in args):
            return value
        raise ConfigError(f"{path}: expected one of {', '.join(map(repr, args))}, got {_shown(value)}")
    elif isinstance(hint, type) and dataclasses.is_dataclass(hint) and is_section(value):
        try:
            return parse(hint, value, path)
        except ConfigError:
            raise
        except ValueError as error:  # for incompatible fields
            raise ConfigError(f"{path}: {error}") from error
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            try:
                return float(value)
            except OverflowError:
                raise ConfigError(f"{path}: expected a number of float64, got {_shown(value)}") from None
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif hint is Any or (isinstance(hint, type) and isinstance(value, hint)):
        return value
    raise ConfigError(f"{path}: expected {_described(hint)}, got {_shown(value)}")


def _option(value: Any, options: tuple[Any, ...], path: str) -> Any:
    """`convert` to the first of several types that takes the value."""
    if value is None and type(None) in options:
        return None
    for option in options:
        try:
            return convert(value, option, path)
        except OutOfRange as error:
            said, got = str(error).rsplit(", got ", 1)
            if not said.startswith(f"{path}: ") or type(None) not in options:
                raise
            raise OutOfRange(f"{said}, or None, got {got}") from None
        except ConfigError:
            if dataclasses.is_dataclass(option) and is_section(value):
                raise  # it names the key inside
    raise ConfigError(f"{path}: expected {' | '.join(map(_described, options))}, got {_shown(value)}")


def _described(hint: Any) -> str:
    """A type as it is written in errors: without modules and ranges."""
    hint, _ = ranges.split(hint)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is type(None):
        return "None"
    if not args:
        return getattr(hint, "__name__", None) or str(hint)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(_described, args))
    if origin is typing.Literal:
        return f"one of {', '.join(map(repr, args))}"
    inner = ", ".join("..." if one is Ellipsis else _described(one) for one in args)
    return f"{getattr(origin, '__name__', origin)}[{inner}]"


def _shown(value: Any) -> str:
    """A value in errors, on one line."""
    return repr(plain(value) if is_section(value) else value)


def is_section(value: Any) -> bool:
    """Whether a value has keys: a ConfigDict, a section of it, or a dict."""
    return isinstance(value, Mapping) or hasattr(value, "items")


def check_fields(settings: Any, path: str) -> None:
    """Checks the values of a settings dataclass against their types and ranges, however it was made.

    Args:
      settings: called from its `__post_init__`.
      path: what stands before a field's name in errors, as `config.optimizer.` or `--`.

    Raises:
      ConfigError: a value of another type, or outside its range.
    """
    hints = hints_of(type(settings))
    for field in dataclasses.fields(settings):
        convert(getattr(settings, field.name), hints[field.name], f"{path}{field.name}")


def plain(config: Any) -> Any:
    """The config as JSON types: dicts, lists, numbers, strings."""
    if hasattr(config, "items"):
        return {key: plain(config[key]) for key in sorted(config)}
    if isinstance(config, list | tuple):
        return [plain(item) for item in config]
    return config


def config_hash(config: Any) -> str:
    """A hash of a config's content, twelve hexadecimal digits, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(plain(config), sort_keys=True).encode()).hexdigest()[:12]


def differences(ours: Any, theirs: Any, path: str = "config") -> list[str]:
    """One line per key in which two plain configs differ: `path: ours here, theirs there`."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        lines = []
        for key in sorted(set(ours) | set(theirs)):
            lines += differences(ours.get(key, "(absent)"), theirs.get(key, "(absent)"), f"{path}.{key}")
        return lines
    return [] if ours == theirs else [f"{path}: {ours!r} here, {theirs!r} there"]
