"""How a checkpoint and a model that do not fit are reported: every problem at once, with the nearest name."""

import difflib
import re
from collections.abc import Iterable, Sequence


class CheckpointMismatch(ValueError):
    """A checkpoint and a model that do not fit; one line for every key that is wrong."""

    def __init__(self, problems: Sequence[str]):
        self.problems = tuple(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
        super().__init__(f"the checkpoint does not fit the model, {count}:\n  " + "\n  ".join(self.problems))


class Nearest:
    """Finds the name that a misspelt one was meant to be, among thousands that differ in numbers."""

    def __init__(self, names: Iterable[str]):
        self._groups: dict[str, list[str]] = {}
        for name in names:
            self._groups.setdefault(self._collapse(name), []).append(name)
        self._found: dict[str, list[str]] = {}

    @staticmethod
    def _collapse(name: str) -> str:
        return re.sub(r"\d+|\{\w+\}", "#", name)

    def suggest(self, name: str, introduction: str) -> str:
        """`; <introduction>: <the nearest name>`, or nothing where none is near."""
        collapsed = self._collapse(name)
        if collapsed not in self._found:
            self._found[collapsed] = difflib.get_close_matches(collapsed, self._groups, n=1, cutoff=0.8)
        if not self._found[collapsed]:
            return ""
        group = self._groups[self._found[collapsed][0]]
        same = [other for other in group if re.findall(r"\d+", other) == re.findall(r"\d+", name)]
        return f"; {introduction}: {(same or group)[0]}"
