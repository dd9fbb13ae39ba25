r"""Schemas of conversations about pictures and videos: what a record of a file says, as chat messages.

The key with the turns tells the schema; schemas may be mixed in one file.

| key | schema |
|---|---|
| `conversations` | LLaVA, Qwen: `[{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cat"}]` |
| `messages` | OpenAI, TRL and LLaMA-Factory: `[{"role": "user", "content": …}, {"role": "assistant", "content": …}]` |
| `prompt`, `completion` | TRL: texts, or lists of messages, of which those of the completion are learned |
| `chosen`, `rejected` | TRL: two completions of a `prompt`, or two conversations that begin alike |
| `texts` | Cauldron and FineVision: `[{"user": "what is it?", "assistant": "a cat"}]` |
| `turns` | independent questions about the same pictures: `[["what is it?", "a cat"], ["its colour?", "grey"]]` |
| `question`, `answer` | one such question |
| `caption` | a text to say about a picture |

Other keys: `id` (text or number), `image`, `images`, `video`, `videos` (a path or a list of them), `system` (a text),
`task` (by default the first of the configured tasks) and `references` (all right answers to the last question, such as
those of ten people; with `turns` a list for each). Any of them may be missing, null or empty.

- User and assistant turns alternate after an optional system turn; the last is an assistant's. An assistant's turn
  before the first user's is left out, as in LLaVA, and counted in a warning.
- `<image>` and `<video>` in a user's text are positions of files, and include the line break after them (or before
  them, at the end of the turn). There are as many as files, or none: then the files come first, as in InternVL.
- A content may be a list of items `text`, `image`, `image_url`, `video` and `video_url`; an item without a file stands
  for the next one of `images` or `videos`.
- Files are paths relative to the record's file, `file://` or base64 `data:` URLs, or bytes in tables.
- `loss` and `weight` of a message are kept.
- Keys that no schema has are passed over and counted, unless they are misspelt or hold pictures, videos or turns.

Sources: LLaVA, docs/Finetune_Custom_Data.md, and `preprocess` of llava/train/train.py; Qwen3-VL,
qwen-vl-finetune/README.md; InternVL, `multi_modal_get_item` of internvl_chat_finetune.py; TRL, dataset_formats.md;
LLaMA-Factory, data/README.md; OpenAI, fine-tuning guide; the data cards of the_cauldron and FineVision.
Deviation: LLaVA moves an `<image>` to the start of its turn; here it is not moved.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from vlm_jax.config import did_you_mean
from vlm_jax.data.media import Media, media
from vlm_jax.data.spelling import Notes, Spelling, misspelt, pass_over
from vlm_jax.types import Fields, Message

KINDS = ("image", "video")
COMMON = ("id", "image", "images", "video", "videos", "system", "task", "references")
ITEM_KEYS = ("type", "text", "image", "image_url", "video", "video_url")
PASSED_ON = ("loss", "weight")  # keys of a message that are kept

Turn = tuple[str, list[Fields], Fields]  # role, items, further keys


@dataclasses.dataclass(frozen=True)
class Record:
    """One checked record.

    Attributes:
      record_id: its name in the file; None without one.
      images, videos: files in the order of their items.
      task: determines the metric of its answers.
      messages: a user's content is a list of items `image`, `video` and `text`, any other content is a text.
      independent: whether every question is to be asked by itself.
      rejected: the conversation to which `messages` is preferred; empty without one.
      references: all right answers, for each independent question or for the last one; empty where its answer is the
        only one.
    """

    record_id: str | None
    images: tuple[Media, ...]
    videos: tuple[Media, ...]
    task: str
    messages: tuple[Message, ...]
    independent: bool = False
    rejected: tuple[Message, ...] = ()
    references: tuple[tuple[str, ...], ...] = ()


@dataclasses.dataclass(frozen=True)
class Reader:
    """What reads the records of one file.

    Attributes:
      folder: that paths are relative to.
      tasks: allowed values of `task`; the first is the default.
      spelling: names of keys and speakers.
      notes: what is passed over.
    """

    folder: str
    tasks: tuple[str, ...]
    spelling: Spelling
    notes: Notes

    def record(self, fields: Any) -> Record:
        """Checks one record; raises a ValueError that says what is wrong with it."""
        if not isinstance(fields, dict):
            raise ValueError(f"expected a JSON object, got {type(fields).__name__}")
        fields = {key: value for key, value in self.spelling.renamed(fields).items() if value is not None}
        schema = self._schema(fields)
        pass_over(fields, KEYS, self.notes)
        record_id = fields.get("id")
        if record_id is not None and (isinstance(record_id, bool) or not isinstance(record_id, str | int)):
            raise ValueError(f"id: expected a string or an integer, got {record_id!r}")
        task = fields.get("task", self.tasks[0])
        if task not in self.tasks:
            raise ValueError(f"task {task!r} is not one of config.data.tasks: {', '.join(self.tasks)}")
        files = {kind: self._files(fields, kind) for kind in KINDS}
        rejected = ()
        if schema == "chosen":
            others = {kind: list(of_kind) for kind, of_kind in files.items()}
            rejected = self._messages("rejected", _completion(self, fields, "rejected"), fields, others)
        messages = self._messages(schema, SCHEMAS[schema](self, fields), fields, files)
        name = None if record_id is None else str(record_id)
        independent = schema in ("turns", "question")
        references = _references(fields, len(messages) // 2 if schema == "turns" else None)
        files_of_record = tuple(files["image"]), tuple(files["video"])
        return Record(name, *files_of_record, task, messages, independent, rejected, references)

    def _messages(
        self, schema: str, turns: list[Turn], fields: Fields, files: dict[str, list[Media]]
    ) -> tuple[Message, ...]:
        """The messages of turns, to whose items `files` are assigned, or from whose items they are taken."""
        system = fields.get("system")
        if system:
            if not isinstance(system, str):
                raise ValueError(f"system: expected a text, got {system!r}")
            turns.insert(0, ("system", [_text(system)], {}))
        self._check_roles(schema, turns)
        for kind, of_kind in files.items():
            self._place(schema, turns, kind, of_kind)
        return tuple(_message(turn) for turn in turns)

    def _schema(self, fields: Fields) -> str:
        found = [key for key in SCHEMAS if key in fields]
        if "chosen" in found and "prompt" in found:
            found.remove("prompt")
        if len(found) > 1 and "caption" in found:
            found.remove("caption")
            self.notes.ignored["caption"] += 1
        if not found:
            for name in fields:
                near = misspelt(name, KEYS)
                if name not in KEYS and near is not None:
                    raise ValueError(f"unknown key '{name}'; did you mean '{near}'?")
            partner = next((PARTNERS[key] for key in PARTNERS if key in fields), None)
            if partner is not None:
                raise ValueError(f"key '{partner}' is missing")
            raise ValueError(
                f"no key with turns: expected one of {', '.join(SCHEMAS)}, got {', '.join(fields) or 'none'}"
            )
        if "rejected" in fields and "chosen" not in fields:
            raise ValueError("key 'chosen' is missing")
        rest = [key for key in ("completion", "answer") if key in fields and PARTNERS[key] not in found]
        if len(found) > 1 or rest:
            raise ValueError(f"both '{found[0]}' and '{(found[1:] + rest)[0]}' are given; keep one")
        return found[0]

    def _files(self, fields: Fields, kind: str) -> list[Media]:
        given = [key for key in (kind, f"{kind}s") if fields.get(key) not in (None, "", [])]
        if not given:
            return []
        if len(given) > 1 and fields[given[0]] != fields[given[1]]:
            raise ValueError(f"both '{given[0]}' and '{given[1]}' are given; keep one")
        value = fields[given[0]]
        found = list(value) if isinstance(value, list | tuple) else [value]
        try:
            return [media(one, self.folder) for one in found]
        except ValueError as error:
            raise ValueError(f"{given[0]}: {error}") from None

    def _check_roles(self, schema: str, turns: list[Turn]) -> None:
        given = [role for role, _, _ in turns]
        start = 1 if given[:1] == ["system"] else 0
        if given[start : start + 1] == ["assistant"]:
            del turns[start]
            self.notes.cut += 1
        roles = [role for role, _, _ in turns[start:]]
        if not roles or len(roles) % 2 or roles != ["user", "assistant"] * (len(roles) // 2):
            raise ValueError(
                f"{schema}: expected alternating user and assistant turns, an assistant last and a system turn only "
                f"first, got {', '.join(role for role, _, _ in turns)}"
            )

    def _place(self, schema: str, turns: list[Turn], kind: str, files: list[Media]) -> None:
        """Compares the items of a kind with its files, and puts files without items first."""
        items = [item for _, content, _ in turns for item in content if item["type"] == kind]
        if not items and not files:
            return
        inside = [item.pop(kind) for item in items if kind in item]
        tag = next(text for text, of_kind in self.spelling.placeholders.items() if of_kind == kind)
        if inside:
            if files or len(inside) < len(items):
                outside = len(files) + len(items) - len(inside)
                raise ValueError(
                    f"{schema}: {len(inside)} {kind}s are in its items, and {outside} are not; give all in items, or "
                    f"all in '{kind}s'"
                )
            files.extend(inside)
        elif not items:
            first = next(number for number, turn in enumerate(turns) if turn[0] == "user")
            texts = [item["text"] for _, content, _ in turns[first:] for item in content if item["type"] == "text"]
            if files and schema not in ("turns", "question", "caption") and any(tag in text for text in texts):
                raise ValueError(f'{schema}: {tag} in the text of an item; write {{"type": "{kind}"}} items instead')
            turns[first][1][:0] = [{"type": kind} for _ in files]
        elif len(items) != len(files):
            raise ValueError(f"{schema}: {len(items)} placeholders {tag}, but {len(files)} {kind}s")

    def dialogue(self, name: str, turns: Any) -> list[Turn]:
        """The turns of a list of messages in any spelling."""
        if not isinstance(turns, list) or not turns:
            raise ValueError(f"{name}: expected a list of turns, got {turns!r}")
        return [self._turn(f"{name}, turn {number}", name, turn) for number, turn in enumerate(turns, start=1)]

    def _turn(self, where: str, name: str, turn: Any) -> Turn:
        if not isinstance(turn, dict):
            raise ValueError(f"{where}: expected a JSON object, got {type(turn).__name__}")
        speaker_key, text_key = self._turn_keys(where, name, turn)
        speaker, content = turn[speaker_key], turn[text_key]
        if not isinstance(speaker, str) or speaker not in self.spelling.roles:
            known = self.spelling.roles
            raise ValueError(f"{where}: unknown speaker {speaker!r}{did_you_mean(str(speaker), known)}")
        role = self.spelling.roles[speaker]
        further = {key: _number(f"{where}: {key}", turn[key]) for key in PASSED_ON if turn.get(key) is not None}
        return role, self.items(where, role, content), further

    def _turn_keys(self, where: str, name: str, turn: Fields) -> tuple[str, str]:
        """The keys of a turn's speaker and text, both of which it has."""
        spellings = self.spelling.turn_keys
        for pair in spellings:
            if len(turn) == 2 and pair[0] in turn and pair[1] in turn:
                return pair
        turn = {key: value for key, value in turn.items() if value is not None}
        speaker_key, text_key = max(reversed(spellings), key=lambda pair: sum(key in turn for key in pair))
        for other in (key for pair in spellings for key in pair if key not in (speaker_key, text_key)):
            if other in turn:
                raise ValueError(f"{where}: unknown key '{other}'{did_you_mean(other, (speaker_key, text_key))}")
        try:
            pass_over(turn, (speaker_key, text_key, *PASSED_ON), self.notes, f"{name}.")
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        for key in (speaker_key, text_key):
            if key not in turn:
                raise ValueError(f"{where}: key '{key}' is missing")
        return speaker_key, text_key

    def items(self, where: str, role: str, content: Any) -> list[Fields]:
        """The items of a message's content, a text or a list."""
        if isinstance(content, str) and content:
            return self._parts(where, role, content)
        if not isinstance(content, list) or not content:
            raise ValueError(f"{where}: expected a non-empty string, got {content!r}")
        items = [self._item(f"{where}, item {number}", item) for number, item in enumerate(content, start=1)]
        if role != "user":
            other = next((item["type"] for item in items if item["type"] != "text"), None)
            if other is not None:
                raise ValueError(
                    f"{where}: {other} in a turn of the {role}; images are only allowed in turns of the user"
                )
            return [_text("".join(item["text"] for item in items))]
        return items

    def _parts(self, where: str, role: str, text: str) -> list[Fields]:
        """A text with its placeholders."""
        if not any(tag in text for tag in self.spelling.placeholders):
            return [_text(text)]
        pieces = self.spelling.placeholder.split(text)
        if role != "user" and len(pieces) > 1:
            raise ValueError(
                f"{where}: {pieces[1]} in a turn of the {role}; images are only allowed in turns of the user"
            )
        items: list[Fields] = []
        for place, piece in enumerate(pieces):
            if place % 2:
                items.append({"type": self.spelling.placeholders[piece]})
            elif piece:
                items.append(_text(piece))
        return items

    def _item(self, where: str, item: Any) -> Fields:
        if isinstance(item, str) and item:
            return _text(item)
        if not isinstance(item, dict):
            raise ValueError(f"{where}: expected a JSON object, got {type(item).__name__}")
        item = {key: value for key, value in item.items() if value is not None}
        kind = item.get("type", next((key for key in ITEM_KEYS[1:] if key in item), None))
        if kind not in ITEM_KEYS[1:]:
            raise ValueError(f"{where}: unknown type {kind!r}{did_you_mean(str(kind), ITEM_KEYS[1:])}")
        try:
            pass_over(item, ITEM_KEYS, self.notes, "content.")
            if kind == "text":
                text = item.get("text")
                if not isinstance(text, str) or not text:
                    raise ValueError(f"text: expected a non-empty string, got {text!r}")
                return _text(text)
            what, value = kind.removesuffix("_url"), item.get(kind)
            if isinstance(value, Mapping) and "url" in value:
                pass_over({key: v for key, v in value.items() if key != "url"}, (), self.notes, f"{kind}.")
                value = value["url"]
            return {"type": what} if value is None else {"type": what, what: media(value, self.folder)}
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


def check_texts(messages: Iterable[Message], placeholders: Sequence[str]) -> None:
    """Raises a ValueError for a text with a placeholder of the model's prompt, which would stand for a further file."""
    for message in messages:
        content = message["content"]
        texts = [content] if isinstance(content, str) else [item["text"] for item in content if item["type"] == "text"]
        for text in texts:
            if found := next((mark for mark in placeholders if mark in text), None):
                raise ValueError(
                    f"{found} in the text {text!r} of the {message['role']} stands for an image or a video in this "
                    "model's prompt; remove it, since files without placeholders come first"
                )


def _text(text: str) -> Fields:
    return {"type": "text", "text": text}


def _message(turn: Turn) -> Fields:
    role, items, further = turn
    return {"role": role, "content": items if role == "user" else items[0]["text"], **further}


def _number(where: str, value: Any) -> bool | int | float:
    if not isinstance(value, bool | int | float) or not 0 <= value < float("inf"):
        raise ValueError(f"{where}: expected true, false or a number of at least 0, got {value!r}")
    return value


def _references(fields: Fields, num_turns: int | None) -> tuple[tuple[str, ...], ...]:
    """The right answers of a record, a list for each of the turns, or without a number of them one list."""
    given = fields.get("references")
    if given in (None, []):
        return ()
    lists = [given] if num_turns is None else given
    if (
        not isinstance(lists, list)
        or (num_turns is not None and len(lists) != num_turns)
        or not all(isinstance(texts, list) and texts for texts in lists)
        or not all(isinstance(text, str) and text for texts in lists for text in texts)
    ):
        expected = "a list of texts" if num_turns is None else f"a list of texts for each of the {num_turns} turns"
        raise ValueError(f"references: expected {expected}, none of them empty, got {given!r}")
    return tuple(map(tuple, lists))


def _conversations(reader: Reader, fields: Fields) -> list[Turn]:
    return reader.dialogue("conversations", fields["conversations"])


def _messages(reader: Reader, fields: Fields) -> list[Turn]:
    return reader.dialogue("messages", fields["messages"])


def _prompt(reader: Reader, fields: Fields) -> list[Turn]:
    """TRL's prompt and completion."""
    if "completion" not in fields:
        raise ValueError("key 'completion' is missing")
    return _completion(reader, fields, "completion")


def _chosen(reader: Reader, fields: Fields) -> list[Turn]:
    """The better one of TRL's pairs."""
    return _completion(reader, fields, "chosen")


def _completion(reader: Reader, fields: Fields, name: str) -> list[Turn]:
    """A prompt and what answers it; answers inside of the prompt are not learned, unless they say so.

    Args:
      reader: of the file.
      fields: `prompt`, and `name`. Without a prompt, `chosen` and `rejected` are conversations: it is the turns that
        they begin with alike.
      name: of the key of the completion.
    """
    if name not in fields:
        raise ValueError(f"key '{name}' is missing")
    if "prompt" in fields:
        turns = _said(reader, fields, "prompt", "user")
        count, turns = len(turns), turns + _said(reader, fields, name, "assistant")
    elif not isinstance(fields[name], list):
        raise ValueError(f"{name}: expected a list of turns, or a text with the key 'prompt', got {fields[name]!r}")
    else:
        first, second = (one if isinstance(one, list) else [] for one in (fields["chosen"], fields.get("rejected")))
        alike = [one == other for one, other in zip(first, second, strict=False)]
        turns, count = reader.dialogue(name, fields[name]), [*alike, False].index(False)
    return [
        (who, said, {"loss": False, **more} if who == "assistant" and place < count else more)
        for place, (who, said, more) in enumerate(turns)
    ]


def _said(reader: Reader, fields: Fields, name: str, role: str) -> list[Turn]:
    """A text of one role, or a list of turns."""
    given = fields[name]
    return [(role, reader.items(name, role, given), {})] if isinstance(given, str) else reader.dialogue(name, given)


def _texts(reader: Reader, fields: Fields) -> list[Turn]:
    """Cauldron's and FineVision's pairs."""
    pairs = fields["texts"]
    if not isinstance(pairs, list) or not pairs:
        raise ValueError(f"texts: expected a list of turns, got {pairs!r}")
    turns: list[Turn] = []
    for number, pair in enumerate(pairs, start=1):
        where = f"texts, turn {number}"
        if not isinstance(pair, dict):
            raise ValueError(f"{where}: expected a JSON object, got {type(pair).__name__}")
        try:
            pass_over(pair, ("user", "assistant"), reader.notes, "texts.")
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        for role in ("user", "assistant"):
            if role not in pair:
                raise ValueError(f"{where}: key '{role}' is missing")
            turns.append((role, reader.items(where, role, pair[role]), {}))
    return turns


def _questions(reader: Reader, fields: Fields) -> list[Turn]:
    """Independent questions, whose texts have no placeholders."""
    del reader
    turns = fields.get("turns", [[fields.get("question"), fields.get("answer")]])
    if "turns" not in fields and "answer" not in fields:
        raise ValueError("key 'answer' is missing")
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"turns: expected a list of [question, answer] pairs, got {turns!r}")
    found: list[Turn] = []
    for turn in turns:
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) and text for text in turn):
            raise ValueError(f"expected a question and an answer, two non-empty strings, got {turn!r}")
        found += [("user", [_text(turn[0])], {}), ("assistant", [_text(turn[1])], {})]
    return found


def _caption(reader: Reader, fields: Fields) -> list[Turn]:
    """A text about a picture, without a question."""
    caption = fields["caption"]
    if not isinstance(caption, str) or not caption:
        raise ValueError(f"caption: expected a non-empty string, got {caption!r}")
    if not any(reader._files(fields, kind) for kind in KINDS):
        raise ValueError("caption: expected an image or a video, got none")
    return [("user", [], {}), ("assistant", [_text(caption)], {})]


# The key with the turns -> what reads them.
SCHEMAS: dict[str, Callable[[Reader, Fields], list[Turn]]] = {
    "conversations": _conversations,
    "messages": _messages,
    "prompt": _prompt,
    "chosen": _chosen,
    "texts": _texts,
    "turns": _questions,
    "question": _questions,
    "caption": _caption,
}
PARTNERS = {"completion": "prompt", "answer": "question", "rejected": "chosen"}
KEYS = (*COMMON, *SCHEMAS, *PARTNERS)
