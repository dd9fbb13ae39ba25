"""How a file names the keys and speakers of its conversations, and what becomes of keys that no schema has."""

import collections
import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from rapidfuzz.distance import Levenshtein

from vlm_jax.config import ConfigError, check_keys
from vlm_jax.data.media import holds_media
from vlm_jax.types import Fields

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",
}
MAX_EDITS = 2  # between a known key and what is taken for a misspelling of it

# Names of LLaMA-Factory's dataset_info.json -> the key that they stand for here.
COLUMNS = {name: name for name in ("messages", "images", "videos", "system", "prompt", "completion", "id")}
COLUMNS |= {"response": "completion"}
TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag", "system_tag", "image_tag", "video_tag")


@dataclasses.dataclass(frozen=True)
class Spelling:
    """Names that differ between files.

    Attributes:
      columns: key of the file by the name of LLaMA-Factory's `columns`, such as {"messages": "dialog"}.
      tags: LLaMA-Factory's `tags`, such as {"role_tag": "speaker", "user_tag": "client"}; and `image_tag` and
        `video_tag`, which stand for files in texts.

    Source: LLaMA-Factory, data/README.md.
    """

    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    tags: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        check_keys(self.columns, COLUMNS, "config.data.columns")
        check_keys(self.tags, TAGS, "config.data.tags")
        if ("role_tag" in self.tags) != ("content_tag" in self.tags):
            raise ConfigError("config.data.tags: role_tag and content_tag are set together")

    def renamed(self, fields: Fields) -> Fields:
        """A record with the keys that are known here.

        Raises:
          ValueError: a column is there under both names.
        """
        if not self.columns:
            return fields
        fields = dict(fields)
        for name, given in self.columns.items():
            known = COLUMNS[name]
            if given != known and given in fields:
                if known in fields:
                    raise ValueError(f"both '{given}' (config.data.columns.{name}) and '{known}' are given; keep one")
                fields[known] = fields.pop(given)
        return fields

    @property
    def turn_keys(self) -> tuple[tuple[str, str], ...]:
        """Alternative names of a turn's speaker and text."""
        if "role_tag" in self.tags:
            return ((self.tags["role_tag"], self.tags["content_tag"]),)
        return (("from", "value"), ("role", "content"))

    @functools.cached_property
    def roles(self) -> dict[str, str]:
        """{speaker of the file: role}."""
        own = {self.tags[f"{role}_tag"]: role for role in ("user", "assistant", "system") if f"{role}_tag" in self.tags}
        return {**ROLES, **own}

    @functools.cached_property
    def placeholders(self) -> dict[str, str]:
        """{text that stands for a file: its kind}."""
        return {self.tags.get("image_tag", "<image>"): "image", self.tags.get("video_tag", "<video>"): "video"}

    @functools.cached_property
    def placeholder(self) -> re.Pattern[str]:
        """A placeholder with the line break after it, or before it at the end of the turn."""
        any_of = "|".join(map(re.escape, self.placeholders))
        return re.compile(rf"(?:\n(?=(?:(?:{any_of})\n?)+\Z))?({any_of})\n?")


@dataclasses.dataclass
class Notes:
    """What reading a file's records passes over, for one line of the log.

    Attributes:
      ignored: records by the key that no schema has; keys of messages follow the key of their list and a point.
      cut: records that begin with an assistant's turn, which is left out.
    """

    ignored: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    cut: int = 0


def pass_over(fields: Mapping[str, Any], known: tuple[str, ...], notes: Notes, prefix: str = "") -> None:
    """Counts the keys that are not known.

    Raises:
      ValueError: one that is a misspelling, or that holds pictures, videos or turns.
    """
    for name, value in fields.items():
        if name in known or value is None:
            continue
        near = misspelt(name, known)
        if near is not None:
            raise ValueError(f"unknown key '{name}'; did you mean '{near}'?")
        what = "pictures or videos" if _holds(value, fields, known) else "turns" if _holds_turns(value) else None
        if what is not None:
            raise ValueError(
                f"unknown key '{name}' holds {what}, which would be lost; rename it to one of {', '.join(known)}, "
                "name it in config.data.columns, or remove it"
            )
        notes.ignored[f"{prefix}{name}"] += 1


def _holds(value: Any, fields: Mapping[str, Any], known: tuple[str, ...]) -> bool:
    """Whether media are in a value, and not under a known key as well."""
    if not holds_media(value):
        return False
    return not (isinstance(value, str) and any(value in _listed(fields.get(key)) for key in known))


def _listed(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list) else [value]


def _holds_turns(value: Any) -> bool:
    if not isinstance(value, list) or not value or not isinstance(value[0], Mapping):
        return False
    return any(pair <= set(value[0]) for pair in ({"from", "value"}, {"role", "content"}, {"user", "assistant"}))


@functools.lru_cache(maxsize=4096)
def misspelt(name: str, known: tuple[str, ...]) -> str | None:
    """The known key of which a name is a misspelling; keys of two letters have none."""
    near = [(Levenshtein.distance(name, key), abs(len(name) - len(key)), key) for key in known if len(key) > MAX_EDITS]
    best = min(near, default=(MAX_EDITS + 1, 0, ""))
    return best[-1] if best[0] <= MAX_EDITS else None
