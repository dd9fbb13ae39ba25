"""Converts messages to the ids of a prompt, with slots for images."""

import dataclasses
import datetime
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from vlm_jax.processors.as_released import Released
from vlm_jax.processors.chat import ChatTemplate, ChatTemplateError
from vlm_jax.processors.items import Kind, check_kinds, media_items, texts_of
from vlm_jax.processors.layout import Text
from vlm_jax.processors.learned import (
    AS_RELEASED,
    Learned,
    PromptError,
    Span,
    Targets,
    Turns,
    clipped_spans,
    encode_learned,
    render_learned,
    texts,
    without_weights,
)
from vlm_jax.processors.number_words import in_words
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.types import Config, Grid, Message

Stretch = tuple[str | Kind, list[Span]]  # a text or the kind of a placeholder, and its trained spans


@dataclasses.dataclass(frozen=True)
class Slot:
    """The position of an image, or of a part of a video.

    Attributes:
      kind: image or video.
      token_id: placeholder id of its visual tokens.
      first_ids: other ids of the first of them.
      group: see `layout.Text`; 0 where the prompt states none.
    """

    kind: Kind
    token_id: int
    first_ids: tuple[int, ...] = ()
    group: int = 0


@runtime_checkable
class Prompt(Protocol):
    """A system's way from messages to ids.

    Attributes:
      independent_turns: whether the turns of what is trained on do not attend to each other.
      placeholders: kind -> what stands for an image or a video in the text of a message; only these kinds are read.
    """

    @property
    def independent_turns(self) -> bool: ...

    @property
    def placeholders(self) -> Mapping[Kind, tuple[str, ...]]: ...

    def __call__(
        self,
        messages: Sequence[Message],
        places: Sequence[Sequence[float]],
        *,
        add_generation_prompt: bool,
        targets: Targets,
        turns: Turns,
        continuation: str = "",
        grids: Sequence[Grid | None] = (),
        frame_grids: Sequence[Grid | None] = (),
        durations: Sequence[float] = (),
        **variables: Any,
    ) -> list[Text | Slot]:
        """The pieces of one conversation, in order.

        Args:
          messages: from `items.read_messages`: `{"role": "user", "content": "…"}`, or with content such as
            `[{"type": "image"}, {"type": "text", "text": "…"}]`.
          places: of each of the conversation's videos, the time of each of its slots, in seconds.
          add_generation_prompt: ends with the start of the answer.
          targets: as in the release's training: assistants' answers and their end tokens are learned. With
            "as_released" the release's faults are kept; see `as_released`.
          turns: which answers are learned; see `learned.answer_weights`.
          continuation: text that follows the start of the answer, whose tokens are learned; without `targets` only.
          grids: of each of the conversation's images, the rows and columns of tiles that have slots of their own,
            beside a slot of the whole image; None, or none at all, for an image with one slot.
          frame_grids: the same of each frame of each of the conversation's videos.
          durations: of each of the conversation's videos, in seconds.
          **variables: further variables of the template.
        """
        ...


class Slots(NamedTuple):
    """Arguments of `Prompt.__call__`: times of the slots of each video, grids of images and frames, durations."""

    times: Sequence[Sequence[float]]
    grids: Sequence[Grid | None] = ()
    frame_grids: Sequence[Grid | None] = ()
    durations: Sequence[float] = ()


class TiledText(NamedTuple):
    """What is encoded for an image whose tiles have slots of their own, beside the text of an image with one slot.

    Attributes:
      tile: for a tile, with its number `{row}` and `{column}`, from 1, and `{token}` for the placeholder token.
      row_end: after the tiles of a row.
      end: after all tiles, before the text of the whole image; empty where `start` has that.
      start: before all tiles, with `{whole}` for the text of the whole image where it comes first.
      between: between two tiles.
      between_rows: between two rows.
    """

    tile: str
    row_end: str
    end: str
    start: str = ""
    between: str = ""
    between_rows: str = ""


class VideoText(NamedTuple):
    """What is encoded around the slots of a video.

    Attributes:
      start: with `{count}`, the number of slots in words, `{duration}`, as hours:minutes:seconds, and `{index}`, the
        number of the video in the conversation, from 0.
      end: after them.
    """

    start: str
    end: str


@dataclasses.dataclass(frozen=True)
class TemplatePrompt:
    """A chat template and a tokenizer.

    Attributes:
      template: renders the conversation.
      tokenizer: encodes it.
      marks: kind -> what the template writes for an image or a video.
      texts: kind -> the text to encode for it: the placeholder token, and tags around it. `{number}` is the
        number of a video's slot, from 1, and its time is `{seconds}`, with one decimal place, or `{clock}`, as
        minutes:seconds. `{index}` is the number of an image in the conversation, from 0.
      tiled: of an image, or a frame, whose tiles have slots of their own; None where none has.
      around_video: what is encoded around the slots of a video; None for nothing.
      between: text between the slots of one video.
      tokens: kind -> the placeholder token.
      split: encodes the text between the marks separately; then a mark has no text and no tags, and
        `tokens` has the placeholder.
      joined: separator for joining content lists before the template, each image as its mark; None where the
        template takes lists.
      begins: adds the tokenizer's start and end tokens to a text that does not start with the BOS, as
        processors of transformers do; its tokenizers do not.
      training: template for training, where the release has another one.
      of_videos: template of conversations with a video, where the release has another one.
      learned: what the release learns of a conversation.
      released: what its code learns with its faults; None where it has none.
    """

    template: ChatTemplate
    tokenizer: Tokenizer
    marks: Mapping[Kind, str] = dataclasses.field(default_factory=dict)
    tokens: Mapping[Kind, str] = dataclasses.field(default_factory=dict)
    texts: Mapping[Kind, str] = dataclasses.field(default_factory=dict)
    tiled: TiledText | None = None
    around_video: VideoText | None = None
    between: str = "\n"
    split: bool = False
    joined: str | None = None
    begins: bool = True
    training: ChatTemplate | None = None
    of_videos: ChatTemplate | None = None
    learned: Learned = Learned()  # noqa: RUF009
    released: Released | None = None

    independent_turns = False

    @property
    def placeholders(self) -> Mapping[Kind, tuple[str, ...]]:
        """See `Prompt`: the marks, and the tokens where they are encoded with the text."""
        tokens = {} if self.split else self.tokens
        return {kind: tuple({mark: None, tokens.get(kind, mark): None}) for kind, mark in self.marks.items()}

    def __call__(
        self,
        messages: Sequence[Message],
        places: Sequence[Sequence[float]],
        *,
        add_generation_prompt: bool = True,
        targets: Targets = False,
        turns: Turns = "all",
        continuation: str = "",
        grids: Sequence[Grid | None] = (),
        frame_grids: Sequence[Grid | None] = (),
        durations: Sequence[float] = (),
        **variables: Any,
    ) -> list[Text | Slot]:
        """The pieces of one conversation; see `Prompt`. A continuation is encoded together with the text before it."""
        check_kinds(messages, tuple(self.marks))
        with_faults = self.released is not None and targets == AS_RELEASED
        if targets and self.learned.images_first != "never" and not with_faults:
            messages = [self._images_first(message) for message in messages]
        if self.joined is not None:
            messages = [{**message, "content": self._content(message.get("content"))} for message in messages]
        if targets and not self.learned.questions and not with_faults:
            messages = [self._only_images(message) if message["role"] == "user" else message for message in messages]
        variables = {"add_generation_prompt": add_generation_prompt, **variables}
        written = Slots(places, grids, frame_grids, durations)
        shows_video = any(item["type"] == "video" for _, item in media_items(messages))
        template = (self.of_videos if shows_video else None) or self.template
        if with_faults:
            if turns != "all" or any("loss" in message or "weight" in message for message in messages):
                raise PromptError(
                    f"targets='{AS_RELEASED}' learns what the release's code does; remove turns={turns!r} and the keys "
                    "loss and weight of messages"
                )
            return self._as_released(self.training or template, messages, written, variables)
        if targets:
            text, spans = render_learned(
                self.training or template, messages, self.tokenizer, self.learned, turns, **variables
            )
        else:
            text, spans = template.render(without_weights(messages), **variables), []
        self._check_written(messages, text)
        if continuation:
            spans = [*spans, Span(len(text), len(text) + len(continuation))]
            text += continuation
        pieces = self._pieces(text, spans, written)
        return self._with_tokens(pieces) if targets and turns == "all" and self.learned.tokens else pieces

    def _pieces(self, text: str, spans: Sequence[Span], slots: Slots) -> list[Text | Slot]:
        stretches = self._stretches(text, spans)
        return self._in_pieces(stretches, slots.times) if self.split else self._as_whole(stretches, slots)

    def _as_released(
        self, template: ChatTemplate, messages: Sequence[Message], slots: Slots, variables: Config
    ) -> list[Text | Slot]:
        """The pieces with what the release's code learns."""
        assert self.released is not None
        text = self.released.text(template, without_weights(messages), variables)
        pieces = self._pieces(text, (), slots)
        ids: list[int | None] = [i for p in pieces for i in (p.ids if isinstance(p, Text) else (None,))]
        if not self.split:
            for kind, mark in self.marks.items():
                text = text.replace(mark, self.texts.get(kind, mark))
        mask = iter(self.released.learned(self.tokenizer, text, ids))
        found: list[Text | Slot] = []
        for piece in pieces:
            own = [float(next(mask)) for _ in (piece.ids if isinstance(piece, Text) else (None,))]
            if isinstance(piece, Slot) and any(own):
                raise PromptError("as released, the places of an image would be learned, which is not supported")
            found += texts(piece.ids, own) if isinstance(piece, Text) else [piece]
        return found

    def _with_tokens(self, pieces: Sequence[Text | Slot]) -> list[Text | Slot]:
        """The pieces with the tokens that are learned in every turn."""
        always = {index for token in self.learned.tokens for index in self.tokenizer.encode(token)}
        found: list[Text | Slot] = []
        for piece in pieces:
            if isinstance(piece, Text):
                found += texts(piece.ids, [piece.learned or float(i in always) for i in piece.ids])
            else:
                found.append(piece)
        return found

    def _images_first(self, message: Message) -> Message:
        """A message with its images at the start; text that stands beside images is stripped."""
        content, mark = message.get("content"), self.marks.get("image")
        single = self.learned.images_first == "single"
        if isinstance(content, str):
            count = 0 if mark is None else content.count(mark)
            if mark is None or not count or (single and (count > 1 or content.startswith(mark))):
                return message
            return {**message, "content": (f"{mark}\n" * count + content.replace(mark, "").strip()).strip()}
        items = list(content or ())
        images = [item for item in items if item["type"] == "image"]
        if not images or (single and (len(images) > 1 or items[0]["type"] == "image")):
            return message
        others = [item for item in items if item["type"] != "image"]
        others = [{**item, "text": item["text"].strip()} if item["type"] == "text" else item for item in others]
        return {**message, "content": [*images, *others]}

    def _only_images(self, message: Message) -> Message:
        """A message without its text."""
        mark = self.marks["image"]
        return {**message, "content": mark * str(message["content"]).count(mark)}

    def _check_written(self, messages: Sequence[Message], text: str) -> None:
        """Raises unless every image and video of the messages is in the text of the prompt."""
        for kind, mark in self.marks.items():
            given = sum(item["type"] == kind for _, item in media_items(messages))
            wanted = given + sum(part.count(mark) for _, part in texts_of(messages))
            found = text.count(mark)
            if found < wanted:
                raise ChatTemplateError(
                    f"{self.template.origin}: the template writes {found} of the {wanted} {kind}s of the messages; "
                    "give them in a message of a role, and in a form, that it reads"
                )

    def _content(self, content: Any) -> Any:
        if content is None or isinstance(content, str):
            return content
        return (self.joined or "").join(
            item["text"] if item["type"] == "text" else self.marks[item["type"]] for item in content
        )

    def _stretches(self, text: str, spans: Sequence[Span]) -> list[Stretch]:
        """Text, kind, text, kind, …, text, each with its trained spans."""
        kinds: dict[str, Kind] = {mark: kind for kind, mark in self.marks.items()}
        pattern = "|".join(re.escape(mark) for mark in sorted(kinds, key=len, reverse=True))
        found: list[Stretch] = []
        start = 0
        for number, stretch in enumerate(re.split(f"({pattern})", text) if kinds else [text]):
            stop = start + len(stretch)
            found.append((kinds[stretch], []) if number % 2 else (stretch, clipped_spans(spans, start, stop)))
            start = stop
        return found

    def _as_whole(self, stretches: Sequence[Stretch], slots: Slots) -> list[Text | Slot]:
        numbers, written = {kind: itertools.count() for kind in self.marks}, ""
        kinds: list[Kind] = []
        spans: list[Span] = []
        for number, (stretch, own) in enumerate(stretches):
            spans += [Span(len(written) + start, len(written) + stop, weight) for start, stop, weight in own]
            if number % 2:
                kind: Kind = stretch  # type: ignore[assignment]
                index = next(numbers[kind])
                stretch, count = (self._video_slots if kind == "video" else self._image_slots)(index, slots)
                kinds.extend(itertools.repeat(kind, count))
            written += stretch
        holders = {self.tokenizer.id_of(token) for token in self.tokens.values()}
        pieces: list[Text | Slot] = []
        ids, learned = self._encoded(written, spans)
        start = 0
        for place, index in enumerate(ids):
            if index in holders:
                # A text with such a token has more slots than images, for which the processor raises.
                slot = Slot(kinds.pop(0) if kinds else "image", index)
                pieces += [*texts(ids[start:place], learned[start:place]), slot]
                start = place + 1
        return [*pieces, *texts(ids[start:], learned[start:])]

    def _image_slots(self, index: int, slots: Slots) -> tuple[str, int]:
        """The text of an image of the conversation, and its number of slots."""
        text = self.texts.get("image", self.tokens["image"]).replace("{index}", str(index))
        grid = slots.grids[index] if index < len(slots.grids) else None
        return self._with_tiles(text, "image", grid)

    def _with_tiles(self, whole: str, kind: Kind, grid: Grid | None) -> tuple[str, int]:
        """The text of an image, or a frame, with that of its tiles, and its number of slots."""
        if grid is None or self.tiled is None:
            return whole, 1
        (rows, cols), lines = grid, []
        for row in range(1, rows + 1):
            written = []
            for column in range(1, cols + 1):
                tile = self.tiled.tile.replace("{row}", str(row)).replace("{column}", str(column))
                tile = tile.replace("{token}", self.tokens[kind])
                written.append(tile + self.tiled.row_end * (column == cols))
            lines.append(self.tiled.between.join(written))
        start, between = self.tiled.start, self.tiled.between_rows or self.tiled.between
        tiles = start.replace("{whole}", whole) + between.join(lines) + self.tiled.end
        return tiles if "{whole}" in start else tiles + whole, rows * cols + 1

    def _video_slots(self, index: int, slots: Slots) -> tuple[str, int]:
        """The text of a video of the conversation, and its number of slots; a frame's tiles have its time."""
        given = index < len(slots.times)
        times = slots.times[index] if given else (0.0,)
        duration = slots.durations[index] if given and slots.durations else 0.0
        grid = slots.frame_grids[index] if given and slots.frame_grids else None
        form = self.texts.get("video", self.tokens["video"])
        of_frame = 1 if grid is None or self.tiled is None else math.prod(grid) + 1
        parts = [
            self._with_tiles(
                form.replace("{number}", str(number))
                .replace("{seconds}", f"{seconds:.1f}")
                .replace("{clock}", f"{int(seconds // 60):02d}:{int(seconds % 60):02d}"),
                "video",
                grid,
            )[0]
            for number, seconds in enumerate(times[::of_frame], 1)
        ]
        written = self.between.join(parts)
        if self.around_video is None:
            return written, len(times)
        start = self.around_video.start.replace("{count}", in_words(len(times))).replace("{index}", str(index))
        start = start.replace("{duration}", str(datetime.timedelta(seconds=int(duration))))
        return f"{start}{written}{self.around_video.end}", len(times)

    def _in_pieces(self, stretches: Sequence[Stretch], places: Sequence[Sequence[float]]) -> list[Text | Slot]:
        """Every piece with the tokenizer's start and end tokens; only the first keeps its BOS.

        Source: LLaVA, mm_utils.py, tokenizer_image_token.
        """
        remaining = iter(places)
        pieces: list[Text | Slot] = []
        for number, (stretch, spans) in enumerate(stretches):
            if number % 2:
                kind: Kind = stretch  # type: ignore[assignment]
                slot = Slot(kind, self.tokenizer.id_of(self.tokens[kind]))
                pieces += [slot] * (len(next(remaining, (0.0,))) if kind == "video" else 1)
            else:
                ids, learned = self._encoded(stretch, spans)
                skipped = int(number > 0 and bool(ids) and ids[0] == self.tokenizer.bos_id)
                pieces += texts(ids[skipped:], learned[skipped:])
        return pieces

    def _encoded(self, text: str, spans: Sequence[Span]) -> tuple[list[int], list[float]]:
        bos = self.tokenizer.names.get("bos_token")
        special = self.begins and not (bos and text.startswith(bos))
        return encode_learned(self.tokenizer, text, spans, add_special=special, learned=self.learned)
