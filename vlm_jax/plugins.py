"""Tables of kinds, to which packages outside of vlm_jax add theirs.

A package names a function in its metadata, which registers its kinds:

    [project.entry-points."vlm_jax.plugins"]
    their_package = "their_package.plugin:register"

The functions of all installed packages are called once per process, when a table is listed or asked for a kind that is
not vlm_jax's own. So importing vlm_jax, `--help` and runs with its own kinds neither need nor import a plug-in.

Source: the Python packaging guide, "Creating and discovering plugins", by package metadata.
"""

import contextvars
import dataclasses
import importlib.metadata
import inspect
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, Protocol, TypeVar

from flax import linen as nn

GROUP = "vlm_jax.plugins"
Entry = TypeVar("Entry")
Lacking = Callable[[str, Any], list[str]]  # (name, entry) -> what it lacks of an interface


class PluginError(Exception):
    """A plug-in that cannot be loaded or registered; the message has its package, its entry point and the fix."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a plug-in comes from.

    Attributes:
      package: name of the installed distribution.
      version: its version.
      entry_point: `name = module:function`.
    """

    package: str
    version: str
    entry_point: str

    def __str__(self) -> str:
        return f"{self.package} {self.version}, entry point '{self.entry_point}'"


_LOADING: contextvars.ContextVar[Source | None] = contextvars.ContextVar("loading", default=None)


class Plugins:
    """The entry points of a group, loaded once.

    Args:
      group: name of the group.
    """

    def __init__(self, group: str = GROUP) -> None:
        self._group = group
        self._lock = threading.RLock()
        self._busy, self._loaded = False, False
        self._failures: list[str] = []

    def load(self) -> None:
        """Calls the function of every entry point, once; a later call returns, or raises, at once.

        Raises:
          PluginError: lists every entry point that failed.
        """
        with self._lock:
            if self._busy:  # a plug-in that is being loaded looks a kind up: it sees what is registered so far
                return
            if not self._loaded:
                self._busy = True
                try:
                    self._failures = [text for point in self._entry_points() if (text := _load(point))]
                finally:
                    self._busy = False
                self._loaded = True
        if self._failures:
            raise PluginError("\n".join(self._failures))

    def _entry_points(self) -> list[importlib.metadata.EntryPoint]:
        return sorted(importlib.metadata.entry_points(group=self._group), key=lambda one: (one.name, one.value))


def _load(point: importlib.metadata.EntryPoint) -> str:
    """Calls the function of an entry point; what went wrong, with its package, or ""."""
    package, version = ("unknown", "") if point.dist is None else (point.dist.name, point.dist.version)
    source = Source(package, version, f"{point.name} = {point.value}")
    token = _LOADING.set(source)
    try:
        register = point.load()
        if not callable(register):
            return f"{source}: expected a function that registers kinds, got {register!r}; name it as 'module:function'"
        register()
    except PluginError as error:
        return f"{source}: {error}"
    except Exception as error:  # anything that a package can raise
        return f"{source}: {type(error).__name__}: {error}; repair or uninstall the package"
    finally:
        _LOADING.reset(token)
    return ""


PLUGINS = Plugins()


class Registry(Mapping[str, Entry], Generic[Entry]):
    """A table of kinds: vlm_jax's own, in order, then those of plug-ins.

    Args:
      function: name of the function that registers an entry, for errors.
      own: the kinds of vlm_jax.
      lacking: the check of the interface.
      plugins: what is loaded when a kind is not among `own`.
    """

    def __init__(
        self, function: str, own: Mapping[str, Entry], lacking: Lacking, plugins: Plugins | None = None
    ) -> None:
        self._function, self._lacking, self._plugins = function, lacking, plugins
        self.own = own
        self._added: dict[str, Entry] = {}
        self._sources: dict[str, Source | None] = {}

    def register(self, name: str, entry: Any) -> None:
        """Adds an entry; one that was defined anew, as in a cell of a notebook, replaces the former.

        Raises:
          PluginError: the name is taken, or the entry lacks a part of the interface.
        """
        if not isinstance(name, str) or not name:
            raise PluginError(f"{self._function}: expected a name and a class or function, got {name!r}")
        taken = self.own.get(name, self._added.get(name))
        if name in self.own or (name in self._added and _path(taken) != _path(entry)):
            by = "vlm_jax" if name in self.own else self._sources[name] or "this process"
            raise PluginError(f"{self._function}: '{name}' is taken by {_path(taken)} of {by}; choose another name")
        lacking = self._lacking(name, entry)
        if lacking:
            raise PluginError(
                f"{self._function}: '{name}', {_path(entry)}, lacks {'; '.join(lacking)}; add what is missing"
            )
        self._added[name] = entry
        self._sources[name] = _LOADING.get()

    def kinds_of(self, package: str) -> list[str]:
        """Names that an installed package registered by its entry points; of `vlm_jax`, its own."""
        if package == "vlm_jax":
            return list(self.own)
        self._load()
        named = ((name, source.package) for name, source in self._sources.items() if source is not None)
        return [name for name, own in named if _normalised(own) == _normalised(package)]

    def _load(self) -> None:
        (PLUGINS if self._plugins is None else self._plugins).load()

    def __getitem__(self, name: str) -> Entry:
        if name in self.own:
            return self.own[name]
        self._load()
        return self._added[name]

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter((*self.own, *self._added))

    def __len__(self) -> int:
        self._load()
        return len(self.own) + len(self._added)


def lacking_of_class(interface: Any) -> Lacking:
    """The check of a class, a Linen module, against a protocol: names, and the arguments that methods take."""
    wanted = _members(interface)

    def lacking(name: str, cls: Any) -> list[str]:
        if not isinstance(cls, type) or not issubclass(cls, nn.Module):
            return ["the base class flax.linen.Module"]
        fields = {field.name for field in dataclasses.fields(cls)}
        missing = [one for one in wanted if one not in fields and not _defines(cls, one)]
        told = [_told(one, getattr(interface, one, None)) for one in missing]
        if getattr(cls, "kind", name) != name:
            told.append(f"kind = '{name}', has '{cls.kind}'")  # type: ignore[attr-defined]
        for one in wanted:
            method = getattr(interface, one, None)
            if inspect.isroutine(method) and one not in missing and not takes(getattr(cls, one), method):
                told.append(f"{_told(one, method)}, takes {inspect.signature(getattr(cls, one))}")
        return told

    return lacking


def lacking_of_function(interface: Any) -> Lacking:
    """The check of a function against a protocol with `__call__`."""

    def lacking(name: str, function: Any) -> list[str]:
        del name
        if callable(function) and takes(function, interface.__call__, bound=True):
            return []
        return [f"the arguments {_arguments(interface.__call__)} of a function"]

    return lacking


def takes(theirs: Callable[..., Any], ours: Callable[..., Any], *, bound: bool = False) -> bool:
    """Whether one function can be called with the arguments of another; `bound` leaves out its `self`."""
    given = list(inspect.signature(ours).parameters.values())[bound:]
    positional = [one for one in given if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    keywords = {one.name: None for one in given if one.kind is one.KEYWORD_ONLY}
    try:
        inspect.signature(theirs).bind(*positional, **keywords)
    except TypeError:
        return False
    return True


def _members(interface: Any) -> list[str]:
    """Names of a protocol's attributes and methods, in their order."""
    found: dict[str, None] = {}
    for one in reversed(interface.__mro__):
        if one not in (object, Generic, Protocol):
            names = (*getattr(one, "__annotations__", {}), *vars(one))
            found |= {name: None for name in names if not name.startswith("_") or name == "__call__"}
    return list(found)


def _defines(cls: type, name: str) -> bool:
    """Whether a class or one of its bases has an attribute; every class has a `__call__` by its metaclass."""
    return any(name in vars(one) for one in cls.__mro__)


def _told(name: str, method: Any) -> str:
    return f"{name}{_arguments(method)}" if inspect.isroutine(method) else name


def _arguments(method: Any) -> str:
    """The arguments of a method without `self` and types, as `(budget, grid)`."""
    names, keywords = [], []
    for one in inspect.signature(method).parameters.values():
        if one.name != "self":
            (keywords if one.kind is one.KEYWORD_ONLY else names).append(one.name)
    return f"({', '.join(names + (['*'] if keywords else []) + keywords)})"


def _normalised(package: str) -> str:
    """The name of a distribution as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", package).lower()


def _path(entry: Any) -> str:
    """The import path of a class or a function."""
    module, name = getattr(entry, "__module__", None), getattr(entry, "__qualname__", None)
    return f"{module}.{name}" if module and name else repr(entry)
