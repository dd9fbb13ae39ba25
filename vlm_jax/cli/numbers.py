"""Flags of the command line that are numbers, whose range is in their type as that of a setting; see `ranges`."""

from collections.abc import Sequence
from typing import Any

from absl import flags

from vlm_jax import ranges
from vlm_jax.config import ConfigError, convert


class _Parser(flags.ArgumentParser):
    """Text to a number of a type; the range of `hint` is checked."""

    def __init__(self, name: str, hint: Any):
        self.hint = hint
        self._name, self._kind = name, ranges.split(hint)[0]
        self.syntactic_help = f"{'an integer' if self._kind is int else 'a number'} {ranges.split(hint)[1][0]}"

    def parse(self, argument: Any) -> int | float:
        """The number; raises a ValueError, as absl expects, for other text."""
        try:
            value = self._kind(argument)
        except ValueError:
            raise ValueError(f"expected {self.syntactic_help}, got {argument!r}") from None
        try:
            return convert(value, self.hint, f"--{self._name}")
        except ConfigError as error:
            raise ValueError(str(error).split(": ", 1)[1]) from None

    def flag_type(self) -> str:
        return self._kind.__name__


def define(name: str, hint: Any, default: float | int | None, text: str) -> flags.FlagHolder[Any]:
    """Defines a flag of one number.

    Args:
      name: of the flag.
      hint: a type with its range, as `ranges.Count`.
      default: a value in the range; None for a flag that need not be given.
      text: its help.
    """
    return flags.DEFINE(_Parser(name, hint), name, default, text, serializer=flags.ArgumentSerializer())


def integers(words: Sequence[str], name: str) -> tuple[int, ...]:
    """The integers of a flag that is a list.

    Raises:
      ConfigError: a word is not an integer.
    """
    made = []
    for word in words:
        try:
            made.append(int(word))
        except ValueError:
            raise ConfigError(f"--{name}: expected integers, got {word!r}") from None
    return tuple(made)
