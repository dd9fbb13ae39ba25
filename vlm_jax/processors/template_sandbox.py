"""Jinja with bounds of time and size, for templates of unknown origin.

Jinja's own sandbox keeps a template from the objects of Python, but not from endless loops, `'a' * 10**10` or lists
that double in every round. Here every loop, call, filter, test and operator checks the processor time, and every value
that a template builds has its size estimated before it is made.
"""

import functools
import re
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

MAX_SIZE = 1 << 24  # characters and elements of a value, and of the text
MAX_SECONDS = 2.0  # processor time of a rendering
MAX_SOURCE = 1 << 20  # characters of a template
MAX_BITS = 4096  # of a whole number

# Of HTML pages or for people, with costs that are not bounded by the size of their result.
_REMOVED = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")
# Filters that neither write their value as text nor make a longer one.
_FREE = frozenset(
    (
        *("abs", "attr", "count", "d", "default", "dictsort", "first", "float", "groupby", "int", "items", "last"),
        *("length", "list", "map", "max", "min", "random", "reject", "rejectattr", "reverse", "select", "selectattr"),
        *("sort", "unique"),
    )
)


_CONTAINERS = (list, tuple, dict, type({}.keys()), type({}.values()), type({}.items()))


class TemplateLimit(jinja2.TemplateRuntimeError):
    """A template over a limit of time or size."""


class _Namespace(jinja2.utils.Namespace):
    """Jinja's, which is written without its content."""

    def __repr__(self) -> str:
        return "<Namespace>"


class BoundedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """An environment whose templates end within `MAX_SECONDS` and write at most `MAX_SIZE` characters."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

    def __init__(self, extensions: Sequence[type[jinja2.ext.Extension]] = ()):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=self.finalized)
        self._started = threading.local()
        del self.globals["lipsum"]
        self.globals["namespace"] = _Namespace
        for name in _REMOVED:
            del self.filters[name]
        self.filters = {name: self._filter(name, function) for name, function in self.filters.items()}
        self.tests = {name: self._test(function) for name, function in self.tests.items()}

    def rendered(self, template: jinja2.Template, values: Mapping[str, Any]) -> str:
        """The text of a template of this environment.

        Raises:
          TemplateLimit: it takes too long, or is too large.
          Exception: any that the template's own operations raise.
        """
        self._started.at = time.thread_time()
        return template.render(**values)

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Adds a filter, or replaces one."""
        self.filters[name] = self._filter(name, function)

    def tick(self) -> None:
        """Raises a TemplateLimit where the rendering of this thread has taken too long."""
        if time.thread_time() - getattr(self._started, "at", time.thread_time()) > MAX_SECONDS:
            raise TemplateLimit(f"it takes more than {MAX_SECONDS:g} seconds; does it loop without end?")

    def counted(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items of a loop."""
        for item in items:
            self.tick()
            yield item

    def finalized(self, value: Any) -> Any:
        """A value that is about to be written."""
        self.tick()
        if not isinstance(value, str):
            _check(size(value))
        return value

    def joined(self, *values: Any) -> str:
        """Values as one text: the operator `~`."""
        _check(sum(map(size, values)))
        return "".join(map(str, values))

    def built(self, value: Any) -> Any:
        """A list, tuple or dict that is written out in the template."""
        _check(size(value))
        return value

    def concat(self, pieces: Iterable[str]) -> str:  # type: ignore[override]
        """The text of a template, a macro or a block."""
        parts, total = [], 0
        for part in pieces:
            parts.append(part)
            total += len(part)
            _check(total)
        return "".join(parts)

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """An operator, if its result is small enough."""
        self.tick()
        _BINOPS.get(operator, _free)(left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: jinja2.runtime.Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A function, a method or a macro, if its arguments and the result of a method are small enough."""
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if owner is __self:  # a hook
            return __obj(*args)
        __self.tick()
        given = {key: value for key, value in kwargs.items() if key not in ("_loop_vars", "_block_vars")}
        if isinstance(owner, str | bytes | int):
            if name == "join" and args:
                args = (list(args[0]), *args[1:])
            _check(_of_method(name, owner, [*args, *given.values()]))
        else:
            _check(size([args, given]))
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Jinja's `str.format`, if its result is small enough."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        @functools.wraps(wrapped)
        def bounded(*args: Any, **kwargs: Any) -> str:
            _check(_of_format(value.__self__, "{", [*args, *kwargs.values()]))
            return wrapped(*args, **kwargs)

        return bounded

    def _generate(self, source: jinja2.nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_rewritten(source), *args, **kwargs)  # type: ignore[arg-type]

    def _filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        skipped = int(hasattr(function, "jinja_pass_arg"))

        @functools.wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            if name in ("join", "sum") and len(args) > skipped:
                args = (*args[:skipped], list(args[skipped]), *args[skipped + 1 :])
            if name not in _FREE:
                _check(_of_filter(name, args[skipped:], kwargs))
            return function(*args, **kwargs)

        return bounded

    def _test(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            return function(*args, **kwargs)

        return bounded


def size(value: Any) -> int:
    """Characters and elements of a value, where one that is in it twice counts twice."""
    return _size(value, {})


def _size(value: Any, known: dict[int, int]) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, int):
        return 1 + value.bit_length() // 3
    if not isinstance(value, _CONTAINERS):
        return 16
    if id(value) not in known:
        items: Collection[Any] = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 2 + len(items) + sum(_size(item, known) for item in items)
    return known[id(value)]


def _check(estimate: int) -> None:
    if estimate > MAX_SIZE:
        raise TemplateLimit(f"it builds a value of more than {MAX_SIZE} characters or elements")


def _rewritten(node: jinja2.nodes.Node) -> jinja2.nodes.Node:
    """The tree with the hooks of `BoundedEnvironment` around what Jinja has no hooks for."""
    for name, value in list(node.iter_fields()):
        if isinstance(value, jinja2.nodes.Node):
            setattr(node, name, _rewritten(value))
        elif isinstance(value, list):
            setattr(node, name, [_rewritten(item) if isinstance(item, jinja2.nodes.Node) else item for item in value])
    if isinstance(node, jinja2.nodes.For):
        node.iter = _hooked("counted", node.iter)
    elif isinstance(node, jinja2.nodes.Concat):
        return _hooked("joined", *node.nodes)
    elif isinstance(node, jinja2.nodes.List | jinja2.nodes.Dict) or (
        isinstance(node, jinja2.nodes.Tuple) and node.ctx == "load"
    ):
        return _hooked("built", node)
    return node


def _hooked(name: str, *given: Any) -> Any:
    hook = jinja2.nodes.EnvironmentAttribute(name)
    return jinja2.nodes.Call(hook, list(given), [], None, None).set_lineno(given[0].lineno)


def _free(left: Any, right: Any) -> None:
    del left, right


def _check_bits(bits: int) -> None:
    if bits > MAX_BITS:
        raise TemplateLimit(f"it computes a whole number of more than {MAX_BITS} bits")


def _check_sum(left: Any, right: Any) -> None:
    _check(size(left) + size(right))


def _check_product(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
    elif isinstance(left, int):
        _check(size(right) * left)
    elif isinstance(right, int):
        _check(size(left) * right)


def _check_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * right)


def _check_modulo(left: Any, right: Any) -> None:
    if isinstance(left, str | bytes):
        _check(_of_format(left if isinstance(left, str) else left.decode("latin-1"), "%", [right]))


_BINOPS: Mapping[str, Callable[[Any, Any], None]] = {
    "+": _check_sum,
    "*": _check_product,
    "**": _check_power,
    "%": _check_modulo,
}


def _of_format(form: str, sign: str, values: list[Any]) -> int:
    """At most how large a text is that `form % values` or `form.format(values)` makes."""
    widths = sum(int(digits[:12]) for digits in re.findall(r"\d+", form))
    given = re.search(r"\{[^}]*\{" if sign == "{" else r"\*", form)
    flat = [item for value in values for item in (value if isinstance(value, list | tuple) else [value])]
    if given:  # widths that are values
        widths += form.count(sign) * sum(abs(item) for item in flat if isinstance(item, int))
    return len(form) + widths + form.count(sign) * size(values)


def _of_method(name: str, owner: str | bytes | int, values: list[Any]) -> int:
    """At most how large the result of a method of a text or a number is."""
    whole, numbers = size(owner), sum(abs(value) for value in values if isinstance(value, int))
    if name == "replace" and len(values) > 1 and isinstance(owner, str | bytes):
        old, new = values[:2]
        return whole + (owner.count(old) * size(new) if isinstance(old, type(owner)) else 0)  # pyright: ignore
    if name == "join":
        return size(values) + whole * len(values[0])
    if name == "translate" and values:
        longest = values[0].values() if isinstance(values[0], Mapping) else values
        return whole * max(map(size, longest), default=1)
    if name == "expandtabs":
        return whole * (9 + numbers)
    return whole + size(values) + numbers


def _of_filter(name: str, values: Sequence[Any], keywords: Mapping[str, Any]) -> int:
    """At most how large the result of a filter is."""
    given = [*values, *keywords.values()]
    whole, numbers = size(given), sum(abs(value) for value in given[1:] if isinstance(value, int))
    if name == "replace" and len(given) > 2:
        text, old = str(given[0]), str(given[1])
        return whole + text.count(old) * size(given[2])
    if name == "format":
        return _of_format(str(given[0]), "%", given[1:])
    if name == "join":
        return whole + len(given[0]) * size(given[1:])
    if name == "sum":
        start = keywords.get("start", values[2] if len(values) > 2 else 0)
        return whole * (1 if isinstance(start, int | float) else len(given[0]))  # sums of lists copy them
    if name == "indent":
        return whole + (1 + str(given[0]).count("\n")) * (numbers + size(given[1:]))
    if name == "tojson":
        return whole * (6 + numbers)
    if name == "round":
        _check_bits(4 * numbers)
    return whole + numbers
