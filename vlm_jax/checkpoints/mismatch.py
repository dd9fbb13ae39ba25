"""The error for a checkpoint that does not fit the model: lists all problems, with similar names."""

import difflib
import re
from collections.abc import Iterable, Sequence


class CheckpointMismatch(ValueError):
    """A checkpoint does not fit the model; the message has one line per wrong key."""

    def __init__(self, problems: Sequence[str]):
        self.problems = tuple(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
        super().__init__(f"the checkpoint does not fit the model, {count}:\n  " + "\n  ".join(self.problems))


class Nearest:
    """Finds the name most similar to a misspelt one, among thousands that differ only in numbers."""

    def __init__(self, names: Iterable[str]):
        self._groups: dict[str, list[str]] = {}
        for name in names:
            self._groups.setdefault(self._collapse(name), []).append(name)
        self._found: dict[str, list[str]] = {}

    @staticmethod
    def _collapse(name: str) -> str:
        return re.sub(r"\d+|\{\w+\}", "#", name)

    def suggest(self, name: str, introduction: str) -> str:
        """`; <introduction>: <the nearest name>`, or an empty string where none is similar."""
        collapsed = self._collapse(name)
        if collapsed not in self._found:
            self._found[collapsed] = difflib.get_close_matches(collapsed, self._groups, n=1, cutoff=0.8)
        if not self._found[collapsed]:
            return ""
        group = self._groups[self._found[collapsed][0]]
        same = [other for other in group if re.findall(r"\d+", other) == re.findall(r"\d+", name)]
        return f"; {introduction}: {(same or group)[0]}"
