"""Visual questions in a JSONL file next to its images: the lines, checked before any image is opened.

One JSON object a line:

    {"id": "42", "image": "images/42.jpg", "question": "what is it?", "answer": "a cat"}
    {"id": "43", "image": ["a.png", "b.png"], "turns": [["which?", "left"], ["why?", "red"]], "task": "vqa"}

`id` is a text or an integer, different in every line. `image` is a path relative to the file, or a
list of them, `config.data.num_images` in every line where that is set. `task` is by default the first
of the configured tasks.
"""

import dataclasses
import json
from typing import Any

from etils import epath

from vlm_jax.config import ConfigError, did_you_mean
from vlm_jax.types import Turn

KEYS = ("id", "image", "question", "answer", "turns", "task")
MOST_REPORTED = 20  # faulty lines that one error lists


class MalformedRecords(ValueError):
    """Lines of a JSONL file that are no records; the message lists them as file:line."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One checked line.

    Attributes:
      record_id: the line's id, as text.
      images: paths, joined to the file's folder.
      turns: the conversation.
    """

    record_id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]


def read_records(path: str, tasks: tuple[str, ...], num_images: int | None, key: str) -> list[Record]:
    """Reads and checks every line of a file; empty lines are passed over.

    Args:
      path: of the JSONL file, local or `gs://`.
      tasks: names that a line's `task` may have; the first is the default.
      num_images: images that every line must have; None for any number.
      key: the key under config.data that `path` is from, for messages.

    Raises:
      ConfigError: there is no such file, or no record in it.
      MalformedRecords: lines that are no records, the first MOST_REPORTED of them listed.
    """
    file = epath.Path(path)
    if not file.exists():
        raise ConfigError(f"config.data.{key}: there is no file '{path}'")
    records: list[Record] = []
    faults: list[str] = []
    lines_of_ids: dict[str, int] = {}
    for number, line in enumerate(file.read_text().split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = _record(line, file.parent, tasks)
            if record.record_id in lines_of_ids:
                raise ValueError(f"id '{record.record_id}' is that of line {lines_of_ids[record.record_id]} too")
            lines_of_ids[record.record_id] = number
            if num_images not in (None, len(record.images)):
                raise ValueError(f"{len(record.images)} images, but config.data.num_images is {num_images}")
        except ValueError as error:
            faults.append(f"  {path}:{number}: {error}")
            continue
        records.append(record)
    if faults:
        more = f"\n  and {len(faults) - MOST_REPORTED} more" if len(faults) > MOST_REPORTED else ""
        listed = "\n".join(faults[:MOST_REPORTED])
        raise MalformedRecords(f"{len(faults)} lines are no records of visual questions:\n{listed}{more}")
    if not records:
        raise ConfigError(f"config.data.{key}: '{path}' has no record")
    return records


def _record(line: str, folder: epath.Path, tasks: tuple[str, ...]) -> Record:
    """Checks one line; raises a ValueError that says what is wrong with it."""
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"a JSON object expected, got {type(fields).__name__}")
    for name in fields:
        if name not in KEYS:
            raise ValueError(f"unknown key '{name}'{did_you_mean(name, KEYS)}")
    for name in ("id", "image"):
        if name not in fields:
            raise ValueError(f"key '{name}' is missing")
    record_id = fields["id"]
    if isinstance(record_id, bool) or not isinstance(record_id, str | int):
        raise ValueError(f"id: a text or an integer expected, got {record_id!r}")
    images = [fields["image"]] if isinstance(fields["image"], str) else fields["image"]
    if not isinstance(images, list) or not images or not all(isinstance(i, str) and i for i in images):
        raise ValueError(f"image: a path or a list of paths expected, got {fields['image']!r}")
    task = fields.get("task", tasks[0])
    if task not in tasks:
        raise ValueError(f"task {task!r} is not one of config.data.tasks: {', '.join(tasks)}")
    turns = tuple(Turn(question, answer, task) for question, answer in _turns(fields))
    return Record(str(record_id), tuple(str(folder / image) for image in images), turns)


def _turns(fields: dict[str, Any]) -> list[tuple[str, str]]:
    """The (question, answer) pairs of a line, in either of the two forms."""
    single = [name for name in ("question", "answer") if name in fields]
    if "turns" in fields:
        if single:
            raise ValueError(f"both 'turns' and '{single[0]}' are given; keep one")
        turns = fields["turns"]
        if not isinstance(turns, list) or not turns:
            raise ValueError(f"turns: a list of [question, answer] pairs expected, got {turns!r}")
    elif len(single) == 2:
        turns = [[fields["question"], fields["answer"]]]
    else:
        raise ValueError("'question' and 'answer', or 'turns', expected")
    for turn in turns:
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) and text for text in turn):
            raise ValueError(f"a question and an answer, two texts that are not empty, expected, got {turn!r}")
    return [(question, answer) for question, answer in turns]
