"""Converts a ConfigDict to checked, typed settings without unknown, missing or unused keys.

A section of a config is parsed by a dataclass, whose fields are the section's keys: a
settings class, or a Linen module, which is a dataclass too. A key without a field, a field
without a default and without a key, and a value of another type are errors with the
key's path and, for a misspelling, the nearest key.
"""

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from vlm_jax.paths import regular

RunConfig = Any  # an ml_collections.ConfigDict or a section of it, whose keys are attributes of any type; or a dict
Settings = TypeVar("Settings")
Entry = TypeVar("Entry")


class ConfigError(ValueError):
    """An invalid config; the message has the path and the fix."""


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
        raise error(f"{path}: not JSON ({cause})") from cause
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


def choose(table: Mapping[str, Any], kind: str, path: str) -> Any:
    """Looks up `kind` in a registration table; raises a ConfigError with the known kinds."""
    if kind not in table:
        raise ConfigError(f"{path}: no kind '{kind}'{did_you_mean(kind, table)}")
    return table[kind]


def choose_kind(table: Mapping[str, Any], section: Any, path: str) -> Any:
    """The entry of a registration table for a section's `kind`.

    Raises:
      ConfigError: `kind` is missing or unknown.
    """
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
      ConfigError: an unknown, derived, missing or wrongly typed key.
    """
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init and f.name not in ("parent", "name")}  # type: ignore
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
    hints = typing.get_type_hints(cls)
    values = {key: convert(section[key], hints[key], f"{path}.{key}") for key in section}
    return cls(**values, **derived)


def parse_kind(table: Mapping[str, Any], section: Any, path: str, **derived: Any) -> Any:
    """`parse` with the class for a section's `kind` in a registration table."""
    cls = choose_kind(table, section, path)
    return parse(cls, {key: section[key] for key in section if key != "kind"}, path, **derived)


def positive(value: Any, path: str) -> int:
    """Returns the value if it is an integer above 0.

    Raises:
      ConfigError: it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{path}: expected a positive integer, got {value!r}")
    return value


def convert(value: Any, hint: Any, path: str) -> Any:
    """Checks one value against a type hint; converts an int to a float, a list to a tuple, a section to a dataclass.

    Raises:
      ConfigError: the value is of another type.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        for option in args:
            try:
                return convert(value, option, path)
            except ConfigError:
                continue
    elif origin is tuple:
        if isinstance(value, list | tuple):
            if len(args) == 2 and args[1] is Ellipsis:
                return tuple(convert(item, args[0], f"{path}[{i}]") for i, item in enumerate(value))
            if len(args) == len(value):
                return tuple(convert(v, a, f"{path}[{i}]") for i, (v, a) in enumerate(zip(value, args, strict=True)))
    elif origin in (dict, Mapping) or hint is dict:
        if isinstance(value, Mapping) or hasattr(value, "items"):
            pair = args or (str, Any)
            return {str(k): convert(v, pair[1], f"{path}.{k}") for k, v in value.items()}
    elif origin is typing.Literal:
        if value in args:
            return value
        raise ConfigError(f"{path}: expected one of {', '.join(map(repr, args))}, got '{value}'")
    elif isinstance(hint, type) and dataclasses.is_dataclass(hint) and hasattr(value, "items"):
        try:
            return parse(hint, value, path)
        except ConfigError:
            raise
        except ValueError as error:  # for incompatible fields
            raise ConfigError(f"{path}: {error}") from error
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif hint is Any or (isinstance(hint, type) and isinstance(value, hint)):
        return value
    expected = getattr(hint, "__name__", None) if not args else str(hint)
    raise ConfigError(f"{path}: expected {expected or hint}, got {value!r}")


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
