r"""Conversations about images in a file next to the images, checked before any image is opened.

A `.jsonl` file has one JSON object a line; a `.json` file may also be one array of such objects.
Three schemas, which may be mixed in one file:

    {"id": "42", "image": "images/42.jpg", "question": "what is it?", "answer": "a cat"}
    {"id": "43", "image": ["a.png", "b.png"], "turns": [["which?", "left"], ["why?", "red"]], "task": "vqa"}
    {"id": "44", "image": "c.png", "conversations": [{"from": "human", "value": "<image>\nwhat is it?"},
                                                     {"from": "gpt", "value": "a cat"}]}

`image` is a path relative to the file, or a list of paths, `config.data.num_images` in every record if
that is set. `task` is by default the first of the configured tasks. `id` is a string or an integer.

The first two schemas have the images before the first question, and unique `id`s.

`conversations` is LLaVA's schema:

- A turn has the keys `from` and `value`, or `role` and `content`; speakers are `human` or `user`, `gpt` or
  `assistant`, and `system`, which may only come first. User and assistant turns alternate, the last is an assistant's.
  An assistant's turn before the first user's is omitted, as in LLaVA, and counted in a warning.
- `<image>` in a user's turn is the position of an image, and includes the line break after it (or before it, at the
  end of the turn). There are as many of them as images, or none: then the images come first.
- `image` may be missing, null or empty: a conversation without images.
- `id`s may repeat (as LLaVA's do): a repeated one gets its line or index as suffix, `id@line`.
- The keys of EXTRA_KEYS, which released files have in addition to the schema, are ignored.

Source: LLaVA, docs/Finetune_Custom_Data.md, and `preprocess` and `preprocess_multimodal` of llava/train/train.py.
Deviation: LLaVA moves an `<image>` to the start of its turn; here it is not moved.
"""

import dataclasses
import gzip
import json
import logging
import os
import re
import zlib
from collections.abc import Iterable
from typing import Any

from etils import epath

from vlm_jax.config import ConfigError, did_you_mean
from vlm_jax.types import Fields

KEYS = ("id", "image", "question", "answer", "turns", "conversations", "task")
EXTRA_KEYS = ("model", "source", "dataset", "width", "height", "metadata")
SPELLINGS = (("from", "value"), ("role", "content"))  # alternative names of a turn's two keys
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
PLACEHOLDER = "<image>"
MOST_REPORTED = 20  # faulty records that one error lists
IMAGE = None  # placeholder of an image among the texts of a message

Parts = tuple[str | None, ...]
Content = tuple[str, Parts]
# With the line break after it, and the one before images that end a turn.
_PLACEHOLDER_AND_BREAK = re.compile(rf"(?:\n(?=(?:{PLACEHOLDER}\n?)+\Z))?{PLACEHOLDER}\n?")
_log = logging.getLogger(__name__)


class MalformedRecords(ValueError):
    """Records of a file that cannot be used; the message lists them as file:line or file[index]."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One checked record.

    Attributes:
      record_id: its name in the file.
      images: paths, joined to the file's folder.
      task: determines the metric of its answers.
      contents: (role, parts) of every message in order; a part is a text, or IMAGE for the next image.
    """

    record_id: str
    images: tuple[str, ...]
    task: str
    contents: tuple[Content, ...]

    @property
    def messages(self) -> tuple[Fields, ...]:
        """Chat messages: a user's content is a list of images and texts, any other content is a text."""
        return tuple(
            {"role": role, "content": [_item(part) for part in parts] if role == "user" else parts[0]}
            for role, parts in self.contents
        )


def read_records(path: str, tasks: tuple[str, ...], num_images: int | None, key: str) -> list[Record]:
    """Reads and checks every record of a file; empty lines are skipped.

    Args:
      path: path of the file, local or `gs://`, in UTF-8; it may be compressed by gzip.
      tasks: allowed values of a record's `task`; the first is the default.
      num_images: images that every record must have; None for any number.
      key: the key of `path` under config.data, for errors.

    Raises:
      ConfigError: there is no such file, or it has no record.
      MalformedRecords: the file cannot be read, or records are malformed, the first MOST_REPORTED
        of which are listed.
    """
    file = epath.Path(path)
    if not file.exists():
        raise ConfigError(f"config.data.{key}: there is no file '{path}'")
    is_array, entries = _entries(file)
    folder = os.fspath(file.parent)
    records: list[Record] = []
    faults: list[str] = []
    places_of_ids: dict[str, str] = {}
    num_cut = 0
    for number, entry in entries:
        try:
            fields = entry if is_array else _json(entry)
            record = _record(fields, folder, tasks)
            if record.record_id in places_of_ids:
                if "conversations" not in fields:
                    raise ValueError(f"id '{record.record_id}' is also the id of {places_of_ids[record.record_id]}")
                record = dataclasses.replace(record, record_id=f"{record.record_id}@{number}")
            places_of_ids[record.record_id] = f"index {number}" if is_array else f"line {number}"
            if num_images not in (None, len(record.images)):
                raise ValueError(f"{len(record.images)} images, but config.data.num_images is {num_images}")
        except ValueError as error:
            faults.append(f"  {path}[{number}]: {error}" if is_array else f"  {path}:{number}: {error}")
            continue
        num_cut += len(record.contents) < len(fields.get("conversations", ()))
        records.append(record)
    if faults:
        more = f"\n  and {len(faults) - MOST_REPORTED} more" if len(faults) > MOST_REPORTED else ""
        listed = "\n".join(faults[:MOST_REPORTED])
        kind = "elements" if is_array else "lines"
        raise MalformedRecords(f"{len(faults)} {kind} are not valid records of visual questions:\n{listed}{more}")
    if not records:
        raise ConfigError(f"config.data.{key}: '{path}' has no record")
    if num_cut:
        _log.warning("%s: %d records begin with an assistant's turn, which is omitted", path, num_cut)
    return records


def _entries(file: epath.Path) -> tuple[bool, Iterable[tuple[int, Any]]]:
    """Whether the file is one JSON array, and its numbered elements or lines.

    Raises:
      MalformedRecords: it is not text, or not valid JSON where it must be an array.
    """
    data = file.read_bytes()
    try:
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
        text = data.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise MalformedRecords(f"{file}: expected UTF-8 text, plain or compressed by gzip: {error}") from error
    if file.name.removesuffix(".gz").endswith(".json") and text.lstrip().startswith("["):
        try:
            return True, enumerate(json.loads(text))
        except json.JSONDecodeError as error:
            raise MalformedRecords(f"{file}:{error.lineno}: not a JSON array: {error}") from None
    return False, ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None


def _record(fields: Any, folder: str, tasks: tuple[str, ...]) -> Record:
    """Checks one record; raises a ValueError that says what is wrong with it."""
    if not isinstance(fields, dict):
        raise ValueError(f"expected a JSON object, got {type(fields).__name__}")
    is_conversation = "conversations" in fields
    for name in fields:
        if name not in KEYS and not (is_conversation and name in EXTRA_KEYS):
            raise ValueError(f"unknown key '{name}'{did_you_mean(name, KEYS)}")
    for name in ("id",) if is_conversation else ("id", "image"):
        if name not in fields:
            raise ValueError(f"key '{name}' is missing")
    record_id = fields["id"]
    if isinstance(record_id, bool) or not isinstance(record_id, str | int):
        raise ValueError(f"id: expected a string or an integer, got {record_id!r}")
    images = _images(fields, may_be_empty=is_conversation)
    task = fields.get("task", tasks[0])
    if task not in tasks:
        raise ValueError(f"task {task!r} is not one of config.data.tasks: {', '.join(tasks)}")
    contents = _conversation(fields, len(images)) if is_conversation else _questions(fields, len(images))
    return Record(str(record_id), tuple(os.path.join(folder, image) for image in images), task, contents)


def _images(fields: Fields, may_be_empty: bool) -> list[str]:
    given = fields.get("image")
    if may_be_empty and given in (None, "", []):
        return []
    images = [given] if isinstance(given, str) else given
    if not isinstance(images, list) or not images or not all(isinstance(i, str) and i for i in images):
        raise ValueError(f"image: expected a path or a list of paths, got {given!r}")
    return images


def _questions(fields: Fields, num_images: int) -> tuple[Content, ...]:
    """The messages of a record in either of the two schemas of questions and answers."""
    single = [name for name in ("question", "answer") if name in fields]
    if "turns" in fields:
        if single:
            raise ValueError(f"both 'turns' and '{single[0]}' are given; keep one")
        turns = fields["turns"]
        if not isinstance(turns, list) or not turns:
            raise ValueError(f"turns: expected a list of [question, answer] pairs, got {turns!r}")
    elif len(single) == 2:
        turns = [[fields["question"], fields["answer"]]]
    else:
        raise ValueError("expected 'question' and 'answer', 'turns', or 'conversations' as in LLaVA")
    for turn in turns:
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) and text for text in turn):
            raise ValueError(f"expected a question and an answer, two non-empty strings, got {turn!r}")
    images: Parts = (IMAGE,) * num_images
    contents: list[Content] = []
    for place, (question, answer) in enumerate(turns):
        contents += [("user", (question,) if place else (*images, question)), ("assistant", (answer,))]
    return tuple(contents)


def _conversation(fields: Fields, num_images: int) -> tuple[Content, ...]:
    """The messages of a record in LLaVA's schema."""
    for name in ("question", "answer", "turns"):
        if name in fields:
            raise ValueError(f"both 'conversations' and '{name}' are given; keep one")
    turns = fields["conversations"]
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"conversations: expected a list of turns, got {turns!r}")
    contents = [_turn(number, turn) for number, turn in enumerate(turns, start=1)]
    start = 1 if contents[0][0] == "system" else 0
    if [role for role, _ in contents[start : start + 1]] == ["assistant"]:
        del contents[start]
    roles = [role for role, _ in contents[start:]]
    if not roles or len(roles) % 2 or roles != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError(
            "conversations: expected alternating user and assistant turns, an assistant last and a system "
            f"turn only first, got {', '.join(role for role, _ in contents)}"
        )
    num_placeholders = sum(parts.count(IMAGE) for _, parts in contents)
    if num_placeholders not in (0, num_images):
        raise ValueError(f"conversations: {num_placeholders} placeholders {PLACEHOLDER}, but {num_images} images")
    if not num_placeholders:
        contents[start] = ("user", (IMAGE,) * num_images + contents[start][1])
    return tuple(contents)


def _turn(number: int, turn: Any) -> Content:
    """One message; raises a ValueError that describes the problem."""
    where = f"conversations, turn {number}"
    if not isinstance(turn, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(turn).__name__}")
    speaker_key, text_key = SPELLINGS[1] if "role" in turn or "content" in turn else SPELLINGS[0]
    for name in turn:
        if name not in (speaker_key, text_key):
            raise ValueError(f"{where}: unknown key '{name}'{did_you_mean(name, (speaker_key, text_key))}")
    for name in (speaker_key, text_key):
        if name not in turn:
            raise ValueError(f"{where}: key '{name}' is missing")
    speaker, text = turn[speaker_key], turn[text_key]
    if not isinstance(speaker, str) or speaker not in ROLES:
        raise ValueError(f"{where}: unknown speaker {speaker!r}{did_you_mean(str(speaker), ROLES)}")
    if not isinstance(text, str) or not text:
        raise ValueError(f"{where}: expected a non-empty string, got {text!r}")
    role = ROLES[speaker]
    if role != "user":
        if PLACEHOLDER in text:
            raise ValueError(
                f"{where}: {PLACEHOLDER} in a turn of the {role}; images are only allowed in turns of the user"
            )
        return role, (text,)
    parts: list[str | None] = []
    for place, piece in enumerate(_PLACEHOLDER_AND_BREAK.split(text)):
        parts += [IMAGE] * bool(place) + [piece] * bool(piece)
    return role, tuple(parts)


def _item(part: str | None) -> dict[str, str]:
    """An image or a text of a message's content."""
    return {"type": "image"} if part is None else {"type": "text", "text": part}
