"""What is fuzzed, and how one input is judged."""

import dataclasses
import random
import resource
import traceback
from collections.abc import Callable
from typing import Any

MAX_SECONDS = 10.0
MAX_GROWTH = 500  # MB
_PAGE = resource.getpagesize()


@dataclasses.dataclass(frozen=True)
class Target:
    """One reader of inputs from outside.

    Attributes:
      make: an input from a random generator.
      read: reads it; raises an AssertionError for a result that is wrong.
      errors: the documented errors, the only ones that may leave `read`.
    """

    make: Callable[[random.Random], Any]
    read: Callable[[Any], object]
    errors: tuple[type[Exception], ...]


@dataclasses.dataclass(frozen=True)
class Finding:
    """A fault: `python -m tests.fuzz.run --target=… --seed=… --index=…` shows it again."""

    target: str
    seed: int
    index: int
    told: str

    def __str__(self) -> str:
        return f"--target={self.target} --seed={self.seed} --index={self.index}\n{self.told}"


def made(target: Target, name: str, seed: int, index: int) -> Any:
    """Input number `index` of a target."""
    return target.make(random.Random(f"{name} {seed} {index}"))


def judged(target: Target, value: Any) -> tuple[bool, str | None]:
    """Whether an input is read, and what is wrong, if anything."""
    before, peak = _resident(), _peak()
    accepted, told = True, None
    try:
        target.read(value)
    except target.errors:
        accepted = False
    except Exception as error:
        accepted, told = False, "".join(traceback.format_exception(error)[-6:])
    grown = _peak() - before
    if told is None and _peak() > peak and grown > MAX_GROWTH:
        told = f"{grown} MB more"
    return accepted, told


def _resident() -> int:
    """MB in memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * _PAGE >> 20


def _peak() -> int:
    """MB in memory at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
