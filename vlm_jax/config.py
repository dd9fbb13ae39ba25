"""From a ConfigDict to checked, typed settings: no key is unknown, missing or unread.

A section of a config is parsed by a dataclass, whose fields are the section's keys: its own
settings class, or a Linen module, which is a dataclass too. A key that no field has, a field
without a default that has no key, and a value of another type are each an error that names the
key's path and, for a misspelling, the nearest key.
"""

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from etils import epath

from vlm_jax.types import Fields

RunConfig = Any  # an ml_collections.ConfigDict or a section of it, whose keys are attributes of any type; or a dict
Settings = TypeVar("Settings")
Entry = TypeVar("Entry")


class ConfigError(ValueError):
    """A config that cannot be used as it is; the message names the path and the fix."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest of `known`, or the list of all when none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known here: {', '.join(known) or 'no key at all'}"


def read_json(path: Path | epath.Path, error: type[Exception]) -> Fields:
    """The object that a JSON file holds.

    Args:
      path: a `pathlib` or `epath` path.
      error: what is raised of a file that is missing or holds something else; the message names it.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as cause:
        raise error(f"{path}: no such file") from cause
    except ValueError as cause:  # of bytes that are no text, too
        raise error(f"{path}: not JSON ({cause})") from cause
    if not isinstance(value, dict):
        raise error(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def check_keys(given: Iterable[str], known: Iterable[str], path: str) -> None:
    """Raises a ConfigError that lists every key of `given` which nothing under `path` reads."""
    known = list(known)
    unknown = [key for key in given if key not in known]
    if unknown:
        raise ConfigError(
            "\n".join(f"{path}.{key}: unknown or unused key{did_you_mean(key, known)}" for key in unknown)
        )


def choose(table: Mapping[str, Entry], kind: str, path: str) -> Entry:
    """Looks `kind` up in a registration table, or says which kinds there are."""
    if kind not in table:
        raise ConfigError(f"{path}: no kind '{kind}'{did_you_mean(kind, table)}")
    return table[kind]


def choose_kind(table: Mapping[str, Entry], section: RunConfig, path: str) -> Entry:
    """The entry of a registration table that a section's `kind` names.

    Raises:
      ConfigError: no such key, or no such kind.
    """
    if "kind" not in section:
        raise ConfigError(f"{path}.kind: missing; one of {', '.join(table)}")
    return choose(table, section["kind"], f"{path}.kind")


def parse(cls: type[Settings], section: RunConfig, path: str, **derived: Any) -> Settings:
    """Makes a `cls` of a config section.

    Args:
      cls: a dataclass; for a Linen module its `parent` and `name` are not keys.
      section: the keys and values; every one must be a field of `cls` that `derived` does not set.
      path: where the section stands, as `config.connector`, for messages.
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


def parse_kind(table: Mapping[str, type[Settings]], section: RunConfig, path: str, **derived: Any) -> Settings:
    """`parse` with the class that a section's `kind` names in a registration table."""
    cls = choose_kind(table, section, path)
    return parse(cls, {key: section[key] for key in section if key != "kind"}, path, **derived)


def positive(value: object, path: str) -> int:
    """The value, where it is an integer above 0.

    Raises:
      ConfigError: it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{path}: expected a positive integer, got {value!r}")
    return value


def convert(value: Any, hint: Any, path: str) -> Any:
    """Checks one value against a type hint; an int serves as a float, a list as a tuple, a section as a dataclass.

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
        raise ConfigError(f"{path}: '{value}' is not one of {', '.join(map(repr, args))}")
    elif isinstance(hint, type) and dataclasses.is_dataclass(hint) and hasattr(value, "items"):
        try:
            return parse(hint, value, path)
        except ConfigError:
            raise
        except ValueError as error:  # of fields that do not fit each other
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


def config_hash(config: object) -> str:
    """Twelve hexadecimal digits that name a config's content, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(plain(config), sort_keys=True).encode()).hexdigest()[:12]


def differences(ours: object, theirs: object, path: str = "config") -> list[str]:
    """One line for every key in which two plain configs differ: `path: ours, not theirs`."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        lines = []
        for key in sorted(set(ours) | set(theirs)):
            lines += differences(ours.get(key, "(absent)"), theirs.get(key, "(absent)"), f"{path}.{key}")
        return lines
    return [] if ours == theirs else [f"{path}: {ours!r} here, {theirs!r} there"]
