"""A released system's processor: a conversation and its pictures to the batch that its model is given."""

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

from vlm_jax.budget import InfeasibleBudget
from vlm_jax.processors.chat import ChatTemplateError
from vlm_jax.processors.image import CorruptImage, to_picture
from vlm_jax.processors.layout import SequenceTooLong, Text, Visual, lay_out
from vlm_jax.processors.prompt import Kind, Message, Prompt, Slot
from vlm_jax.processors.spelled_prompt import PromptError
from vlm_jax.processors.tiling import Size
from vlm_jax.processors.tokenizer import TokenizerError
from vlm_jax.processors.video import FrameSampler, RateSampler, read_video
from vlm_jax.processors.views import PictureMismatch, PreparedImage, Views, check_list
from vlm_jax.types import Batch

Picture = Image.Image | np.ndarray | str | os.PathLike | bytes
Video = Sequence[Picture] | str | os.PathLike | bytes
Conversation = Sequence[Message]
FRAME_RATE = 2.0  # frames a second of a video that is given as frames


@dataclasses.dataclass(frozen=True)
class Processor:
    """Prompt, views and layout of a system; all of a system's ways are in its fields.

    Attributes:
      prompt: messages to ids.
      views: pictures to pixels and the places that they take.
      pad_id: id of padding.
      num_learned: rows of the visual table before those of pictures: the learned ones.
      learned_ids: what stands as a token where a learned row is; the token of its picture when empty.
      rotary_3d: positions have three axes.
      max_length: most tokens of a conversation; None where the release has no limit.
      end_tokens: names of those that end an answer in the release's own code; its generation config may add more.
      max_pixels: of a picture; more is refused as a decompression bomb.
      frame_sampler: which frames of a video's file are looked at.
    """

    prompt: Prompt
    views: Views
    pad_id: int
    num_learned: int = 0
    learned_ids: tuple[int, ...] = ()
    rotary_3d: bool = False
    max_length: int | None = None
    end_tokens: tuple[str, ...] = ()
    max_pixels: int = 100_000_000
    frame_sampler: FrameSampler = dataclasses.field(default_factory=RateSampler)

    def __call__(
        self,
        messages: Conversation,
        images: Sequence[Picture] = (),
        videos: Sequence[Video] = (),
        **options: Any,
    ) -> Batch:
        """One conversation as a batch of one; see `batch`."""
        return self.batch([messages], [images], [videos], **options)

    def batch(
        self,
        conversations: Sequence[Conversation],
        images: Sequence[Sequence[Picture]] = (),
        videos: Sequence[Sequence[Video]] = (),
        *,
        fps: float | int = FRAME_RATE,
        max_visual_tokens: int | None = None,
        max_video_tokens: int | None = None,
        frame_sampler: FrameSampler | None = None,
        targets: bool = False,
        add_generation_prompt: bool | None = None,
        **variables: Any,
    ) -> Batch:
        """Conversations as prompts that end together, or as what is learned of them.

        Args:
          conversations: messages in the form of chat templates, with an item such as `{"type": "image"}` for every
            picture. A picture may stand in its item under `image`, a video under `video`, instead of below.
          images: pictures of every conversation, in order: files, Pillow's images, or uint8 arrays.
          videos: every video of every conversation: a file, or its frames as pictures.
          fps: frames a second of videos that are given as frames.
          max_visual_tokens: most places of a picture; as the release has it when None.
          max_video_tokens: the same of a video.
          frame_sampler: which frames of videos that are files; the processor's `frame_sampler` when None.
          targets: as the release trains on it, to learn what assistants say, the token that ends it, and no more.
          add_generation_prompt: ends with the head of the answer; when None, only without `targets`.
          **variables: more for the chat template.

        Returns:
          A Batch of NumPy arrays, padded on the left and without `targets` and `loss_weights`, or padded on the right
          and with them.

        Raises:
          PictureMismatch: a conversation has other pictures than it speaks of, or one without a list.
          SequenceTooLong: one has more than `max_length` tokens; nothing is ever cut.
          CorruptImage: a picture cannot be read, or is too large.
          InfeasibleBudget: no picture can be seen with so few tokens.
          PromptError: there is nothing to learn in a conversation, or it is no list of messages.
          ChatTemplateError, TokenizerError: what is learned of one does not show in its template or its ids.
        """
        images, videos = images or [()] * len(conversations), videos or [()] * len(conversations)
        for what, given in (("images", images), ("videos", videos)):
            if len(given) != len(conversations):
                raise PictureMismatch(
                    f"{what}: expected a list for each of {len(conversations)} conversations, got {len(given)}"
                )
        for number, given in enumerate(zip(conversations, images, videos, strict=True)):
            _check_given(f"conversation {number}", *given)
        options = {
            "fps": fps,
            "most": (max_visual_tokens, max_video_tokens),
            "frame_sampler": frame_sampler or self.frame_sampler,
            "add_generation_prompt": not targets if add_generation_prompt is None else add_generation_prompt,
            "targets": targets,
            **variables,
        }
        examples = [
            self._example(f"conversation {number}", *example, **options)
            for number, example in enumerate(zip(conversations, images, videos, strict=True))
        ]
        lengths = [sum(map(_length, pieces)) for pieces, _ in examples]
        if self.max_length is not None and max(lengths) > self.max_length:
            raise SequenceTooLong(
                f"conversation {int(np.argmax(lengths))} is {max(lengths)} tokens long, over the limit of "
                f"{self.max_length}; shorten it or give fewer or smaller pictures (nothing is truncated)"
            )
        side = "right" if targets else "left"
        rows = [self._row(pieces, max(lengths), f"conversation {i}", side) for i, (pieces, _) in enumerate(examples)]
        fields = [
            "tokens",
            "positions",
            "segment_ids",
            "visual_index",
            *(["targets", "loss_weights"] if targets else []),
        ]
        joined = {name: np.concatenate([getattr(row, name) for row in rows]) for name in fields}
        return Batch(**joined, images=self.views.join([seen for _, seen in examples]))

    def count_visual_tokens(self, image_sizes: Sequence[Size]) -> list[int]:
        """Places of the sequence that the pictures of one conversation take, learned rows among them.

        Args:
          image_sizes: (height, width) of every picture, in pixels.
        """
        return [len(layout) for layout in self.views.layouts(image_sizes)]

    def _row(
        self, pieces: Sequence[Text | Visual], length: int, name: str, pad_side: Literal["left", "right"]
    ) -> Batch:
        return lay_out(
            pieces,
            length,
            pad_id=self.pad_id,
            image_id=self.pad_id,
            sample_id=name,
            pad_side=pad_side,
            rotary_3d=self.rotary_3d,
        )

    def _example(
        self,
        name: str,
        messages: Conversation,
        images: Sequence[Picture],
        videos: Sequence[Video],
        *,
        fps: float | int,
        most: tuple[int | None, int | None],
        frame_sampler: FrameSampler,
        **options: Any,
    ) -> tuple[list[Text | Visual], list[PreparedImage]]:
        """The pieces of a conversation, and what is seen in it in the order of the visual table."""
        images = _given(messages, "image", images, name)
        videos = _given(messages, "video", videos, name)
        pictures = [
            to_picture(image, max_pixels=self.max_pixels, name=f"{name}, image {i}") for i, image in enumerate(images)
        ]
        places = []
        for i, video in enumerate(videos):
            with error_context(f"{name}, video {i}"):
                frames = self._frames(video, fps, frame_sampler, f"{name}, video {i}")
                places.append(self.views.video(*frames, most[1]))
        with error_context(name):
            seen = (self.views if most[0] is None else self.views.within(most[0])).images(pictures)
        for kind, limit, counts in (
            ("image", most[0], [len(one.layout) for one in seen]),
            ("video", most[1], [sum(len(part.layout) for part in parts) for parts in places]),
        ):
            for i, count in enumerate(counts):
                if limit is not None and count > limit:
                    raise InfeasibleBudget(f"{name}, {kind} {i}: takes {count} visual tokens at least, over {limit}")
        waiting: dict[Kind, list[PreparedImage]] = {"image": seen, "video": [*itertools.chain(*places)]}
        with error_context(name):
            pieces = self.prompt(messages, [len(parts) for parts in places], **options)
            if options["targets"] and not any(isinstance(piece, Text) and piece.learned for piece in pieces):
                raise PromptError("no assistant says anything in it, so that there is nothing to learn")
        return self._filled(pieces, waiting, name)

    def _frames(
        self, video: Video, fps: float | int, frame_sampler: FrameSampler, name: str
    ) -> tuple[list[Image.Image], float | int]:
        if isinstance(video, str | os.PathLike | bytes):
            return read_video(video, frame_sampler, max_pixels=self.max_pixels, name=name)
        frames = [to_picture(frame, max_pixels=self.max_pixels, name=name) for frame in video]
        if not frames:
            raise PictureMismatch(f"{name}: a video of no frames")
        return frames, fps

    def _filled(
        self, pieces: Sequence[Text | Slot], waiting: dict[Kind, list[PreparedImage]], name: str
    ) -> tuple[list[Text | Visual], list[PreparedImage]]:
        for kind, seen in waiting.items():
            wanted = sum(isinstance(piece, Slot) and piece.kind == kind for piece in pieces)
            if wanted != len(seen):
                raise PictureMismatch(
                    f"{name}: its text has {wanted} places for {kind}s, but {len(seen)} are given; give one "
                    f'{{"type": "{kind}"}} item in the messages for every {kind}'
                )
        filled: list[Text | Visual] = []
        order: list[PreparedImage] = []
        start = self.num_learned
        for piece in pieces:
            if isinstance(piece, Text):
                filled.append(piece)
                continue
            seen = waiting[piece.kind].pop(0)
            rows = np.where(seen.layout < 0, -1 - seen.layout, seen.layout + start)
            ids = np.full(len(rows), piece.token_id)
            if len(piece.first_ids) > len(ids):
                raise PictureMismatch(
                    f"{name}: the name of a picture has {len(piece.first_ids)} bytes, more than the {len(ids)} places "
                    "that the picture takes; rename the file"
                )
            ids[: len(piece.first_ids)] = piece.first_ids
            if self.learned_ids:
                ids = np.where(seen.layout < 0, np.take(self.learned_ids, -1 - seen.layout, mode="clip"), ids)
            filled.append(Visual(rows, ids, seen.positions))
            order.append(seen)
            start += seen.num_rows
        return filled, order


@contextlib.contextmanager
def error_context(name: str) -> Iterator[None]:
    """Errors that do not say which sample they are of say it."""
    try:
        yield
    except (ChatTemplateError, CorruptImage, InfeasibleBudget, PictureMismatch, PromptError, TokenizerError) as error:
        if name in str(error):
            raise
        raise type(error)(f"{name}: {error}") from error


def _length(piece: Text | Visual) -> int:
    return len(piece.ids) if isinstance(piece, Text) else len(piece.rows)


def _check_given(name: str, messages: object, images: object, videos: object) -> None:
    """Refuses what is no list, such as a question or a file by itself, whose letters would be taken for several."""
    form = '{"role": "user", "content": "…"}'
    if isinstance(messages, str):
        form, shown = form.replace('"…"', repr(messages)), f"the string {messages!r}"
        raise PromptError(f"{name}: expected a list of messages, got {shown}; write [{form}]")
    if not isinstance(messages, Sequence):
        shown = f"one {type(messages).__name__}"
        raise PromptError(f"{name}: expected a list of messages such as {form}, got {shown}; write [message]")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise PromptError(f"{name}: message {number}: expected one such as {form}, got {message!r}")
    check_list(images, f"{name}: images")
    check_list(videos, f"{name}: videos")


def _given(messages: Conversation, kind: Kind, beside: Sequence[Any], name: str) -> Sequence[Any]:
    """The pictures of a conversation: those in its messages, or those beside them."""
    contents = [message.get("content") for message in messages]
    items = [
        item
        for content in contents
        if isinstance(content, Sequence) and not isinstance(content, str)
        for item in content
    ]
    inside = [item[kind] for item in items if isinstance(item, Mapping) and item.get("type") == kind and kind in item]
    if inside and beside:
        raise PictureMismatch(f"{name}: {kind}s stand both in its messages and beside them; give them in one place")
    return inside or beside
