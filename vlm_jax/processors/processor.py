"""The processor of every system: a conversation and its images to a row, and rows to a batch."""

import bisect
import dataclasses
import functools
import itertools
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from vlm_jax.budget import InfeasibleBudget
from vlm_jax.processors.conversation import (
    Conversation,
    Picture,
    Video,
    check_given,
    error_context,
    given_media,
)
from vlm_jax.processors.crops import CropViews
from vlm_jax.processors.downsampled import DownsampledViews, TiledViews
from vlm_jax.processors.image import CorruptImage, to_picture
from vlm_jax.processors.items import Kind, MediaItem, read_messages, texts_of
from vlm_jax.processors.layout import SequenceTooLong, Text, Visual, lay_out
from vlm_jax.processors.learned import AS_RELEASED, PromptError, Targets, Turns, answer_weights
from vlm_jax.processors.native import NativeViews
from vlm_jax.processors.prompt import Prompt, Slot
from vlm_jax.processors.question import messages_of
from vlm_jax.processors.reduction import Reduction, Tokens
from vlm_jax.processors.tiling import Size
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.processors.video import (
    Clip,
    FrameSampler,
    FrameSettings,
    RateSampler,
    check_rate,
    read_video,
    times_of_parts,
)
from vlm_jax.processors.views import ItemSize, Layout, PictureMismatch, PreparedImage, Share, Views, check_list
from vlm_jax.types import ROW_KEYS, Batch, Fields, Grid, Load, RowShape, VideoSize

FRAME_RATE = 2.0  # frames a second of a video that is given as frames, for all systems; SmolVLM's own code assumes 24


@dataclasses.dataclass(frozen=True)
class Example:
    """One conversation, before it is laid out in a row.

    Attributes:
      name: name of the sample, for errors.
      pieces: text and visual tokens, in order; rows of `Visual` index the conversation's own image tokens from 0, and
        learned row k is -1 - k.
      images: input of the encoder, in the order of those rows.
      visual_tokens: positions of every image and every video, including learned rows.
      load: length and images that the example takes in a row.
      tokens: with a reducer, the tokens of each of `images` before it.
    """

    name: str
    pieces: tuple[Text | Visual, ...]
    images: tuple[PreparedImage, ...]
    visual_tokens: tuple[int, ...]
    load: Load
    tokens: tuple[Tokens, ...] = ()


class Place(NamedTuple):
    """An image or a part of a video at one position of the text.

    Attributes:
      layout: its visual tokens.
      load: tiles or patches that it takes in a row's images.
      prepared: its pixels; None where only sizes are known.
      tokens: with a reducer, the tokens before it.
      time: of a part of a video, in seconds.
    """

    layout: Layout
    load: int
    prepared: PreparedImage | None
    tokens: Tokens | None
    time: float = 0.0


class ImagePlaces(NamedTuple):
    """The places of one image, or of one video.

    Attributes:
      grid: rows and columns of the tiles of an image or of each frame, where they have places of their own; None where
        the image, the video, or a part of it has one place.
      places: of the tiles row by row and of the whole image, in the order of the text, or the one; of a video those of
        its parts.
    """

    grid: Grid | None
    places: list[Place]


@dataclasses.dataclass(frozen=True)
class Processor:
    """Prompt, views and layout of a system; systems differ only in the fields.

    Attributes:
      prompt: converts messages to ids.
      views: converts images to pixels and layouts.
      tokenizer: encodes prompts and decodes answers.
      pad_id: id of padding.
      num_learned: number of learned rows, which come first in the visual table.
      learned_ids: placeholder token ids of the learned rows; the token of the image when empty.
      rotary_3d: positions have three axes.
      max_length: maximum tokens of a conversation; None for no limit.
      end_tokens: names of the tokens that end an answer in the release's code; its generation config may add more.
      max_pixels: maximum pixels of an image; more is treated as a decompression bomb.
      frame_sampler: selects frames of a video file.
      rate_as_asked: times of a video file count with the frames per second that its sampler was asked for
        (Qwen2.5-Omni), instead of those that it selected.
      table_rows: number of tokens in the model's table; None where a text cannot have others.
      reduction: the token reducer, which `views` takes into account; None for none.
      grouped: rows have `types.Batch.group_ids`: the visual tokens of a place attend to each other in both directions,
        where the prompt does not state the group of its slot.
      variables: variables of the chat template, of every conversation; those of a call take precedence.
    """

    prompt: Prompt
    views: Views
    tokenizer: Tokenizer
    pad_id: int
    num_learned: int = 0
    learned_ids: tuple[int, ...] = ()
    rotary_3d: bool = False
    max_length: int | None = None
    end_tokens: tuple[str, ...] = ()
    max_pixels: int = 100_000_000
    frame_sampler: FrameSampler = dataclasses.field(default_factory=RateSampler)
    rate_as_asked: bool = False
    reduction: Reduction | None = None
    table_rows: int | None = None
    grouped: bool = False
    variables: Mapping[str, object] = dataclasses.field(default_factory=dict)

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
        targets: Targets = False,
        continuations: Sequence[str] | None = None,
        shape: RowShape | None = None,
        do_pan_and_scan: bool | None = None,
        **options: Any,
    ) -> Batch:
        """Conversations as left-padded prompts or, with `targets`, as training examples, one per row.

        Args:
          conversations: messages in the form of chat templates, with an item such as `{"type": "image"}` for every
            image. An image may be in its item under `image`, a video under `video`, instead of below; see
            `items.ITEM_TYPES` for all types and keys.
          images: images of every conversation, in order: files or other locations as in `sources.located`, bytes,
            Pillow images, or uint8 arrays.
          videos: videos of every conversation: a location or bytes, or the frames as images.
          targets: what the release's fine-tuning code learns: assistants' answers and their end tokens, and what
            else it learns; without its faults, or with them for "as_released", where those are known.
          continuations: of every conversation the text that follows the start of the answer, to compute its likelihood:
            its tokens have loss weight 1, all others 0.
          shape: shape of every row; the smallest that fits all when None.
          do_pan_and_scan: as in `panned`; as the folder states when None.
          **options: further arguments of `example`.

        Returns:
          A Batch of NumPy arrays, padded on the left and without `targets` and `loss_weights`; with targets or
          continuations, padded on the right and with them.

        Raises:
          PictureMismatch: the images of a conversation do not match its messages, or are not a list.
          PromptError: no conversation, or one that is not a list of messages.
          SequenceTooLong: a conversation is longer than `max_length`, or does not fit `shape`.
          InfeasibleBudget: an image or a video exceeds its limit even at the smallest size.
          ChatTemplateError: the template rejects the messages, does not use a variable, or its trained text cannot be
            found.
        """
        if not conversations or not isinstance(conversations, Sequence) or isinstance(conversations, str):
            raise PromptError(f"expected a list of conversations, each a list of messages, got {conversations!r}")
        if shape is not None and not isinstance(shape, RowShape):
            raise PromptError(f"shape: expected a RowShape, got {shape!r}")
        if "name" in options:
            raise PromptError("name: is set by batch; remove it")
        images, videos = images or [()] * len(conversations), videos or [()] * len(conversations)
        for what, given in (("images", images), ("videos", videos)):
            if len(given) != len(conversations):
                raise PictureMismatch(
                    f"{what}: expected one list for each of {len(conversations)} conversations, got {len(given)}"
                )
        given = list(enumerate(zip(conversations, images, videos, strict=True)))
        for number, parts in given:
            check_given(f"conversation {number}", *parts)
        each: list[Fields] = [{} for _ in given]
        if continuations is not None:
            check_continuations(continuations, len(given))
            each = [{"continuation": text} for text in continuations]
        asked = self if do_pan_and_scan is None else self.panned(do_pan_and_scan)
        examples = [
            asked.example(*parts, targets=targets, name=f"conversation {number}", **own, **options)
            for (number, parts), own in zip(given, each, strict=True)
        ]
        return asked.rows([[one] for one in examples], shape, targets=bool(targets) or continuations is not None)

    def panned(self, do_pan_and_scan: bool) -> "Processor":
        """The same with or without the crops of pan and scan beside an oblong image (Gemma 3).

        Raises:
          PictureMismatch: a system without pan and scan.
        """
        views, reduction = _panned(self.views, do_pan_and_scan), self.reduction
        if reduction is not None:
            reduction = dataclasses.replace(reduction, before=_panned(reduction.before, do_pan_and_scan))
        return dataclasses.replace(self, views=views, reduction=reduction)

    def thinking(self, enable: bool | None) -> "Processor":
        """The same, whose prompts let the model think first or not; as the chat template does by itself when None.

        Args:
          enable: value of the template's variable `enable_thinking`, in every conversation.

        Raises:
          ChatTemplateError, PromptError: the prompts do not depend on this variable.
        """
        if enable is None:
            return self
        made = dataclasses.replace(self, variables={**self.variables, "enable_thinking": enable})
        made.measure([{"role": "user", "content": "?"}], name="enable_thinking")
        return made

    def rows(
        self,
        rows: Sequence[Sequence[Example]],
        shape: RowShape | None = None,
        *,
        targets: bool,
        keys: Mapping[str, str] = ROW_KEYS,
    ) -> Batch:
        """A batch of rows, each of one or several examples.

        Args:
          rows: the examples of each row, in order; each is a segment of its own.
          shape: of every row; the smallest that all fit when None.
          targets: padded on the right, with targets and loss weights; else padded on the left.
          keys: what a row of `shape` can lack -> the config key that it is from, for messages.

        Raises:
          SequenceTooLong: the examples of a row do not fit the shape; nothing is truncated.
        """
        if shape is not None and self.reduction is not None and not shape.kept:
            shape = dataclasses.replace(shape, kept=(shape.length,) * len(self.reduction.drops))
        if shape is not None:
            for row in rows:
                _check_row(row, shape, keys)
                for example in row:
                    self._check_questions(example)
        capacity = None if shape is None else shape.images
        longest = max(sum(one.load.length for one in row) for row in rows)
        length = longest if shape is None else shape.length
        laid = [
            lay_out(
                self._placed(row),
                length,
                pad_id=self.pad_id,
                pad_side="right" if targets else "left",
                rotary_3d=self.rotary_3d,
                interpolates=self.views.interpolates,
            )
            for row in rows
        ]
        most = None if shape is None else shape.pictures
        pictures = self.views.join([[image for one in row for image in one.images] for row in rows], capacity, most)
        branched = targets and self.prompt.independent_turns
        joined = dataclasses.replace(_joined(laid, branched, self.grouped), images=pictures)
        if not targets:
            joined = dataclasses.replace(joined, targets=None, loss_weights=None)
        if pictures is None:
            joined = dataclasses.replace(joined, interpolation=None)
        if self.reduction is None:
            return joined
        tokens = [[one for example in row for one in example.tokens] for row in rows]
        return self.reduction.applied(joined, tokens, self.num_learned, shape)

    def example_row(self, shape: RowShape) -> Batch:
        """Shapes of one training row with its images."""
        row = self.rows([[]], shape, targets=True)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), row)

    def _placed(self, row: Sequence[Example]) -> list[list[Text | Visual]]:
        """The pieces of each example with indices in the whole row's visual table."""
        placed, start = [], self.num_learned
        for example in row:
            pieces: list[Text | Visual] = []
            for piece in example.pieces:
                if isinstance(piece, Visual):
                    own, mixed = np.asarray(piece.rows), piece.interpolation
                    if mixed is not None:
                        mixed = dataclasses.replace(mixed, index=_in_table(np.asarray(mixed.index), start))
                    piece = dataclasses.replace(piece, rows=_in_table(own, start), interpolation=mixed)
                pieces.append(piece)
            placed.append(pieces)
            start += sum(image.num_rows for image in example.images)
        return placed

    def example(
        self,
        messages: Conversation,
        images: Sequence[Picture] = (),
        videos: Sequence[Video] = (),
        *,
        targets: Targets = False,
        turns: Turns = "all",
        name: str = "conversation 0",
        fps: float | int = FRAME_RATE,
        max_visual_tokens: int | None = None,
        max_video_tokens: int | None = None,
        frame_sampler: FrameSampler | None = None,
        allow_network: bool = False,
        do_pan_and_scan: bool | None = None,
        add_generation_prompt: bool | None = None,
        continuation: str = "",
        **variables: object,
    ) -> Example:
        """One conversation with decoded and preprocessed images.

        Args:
          messages, images, videos, targets: as in `batch`.
          turns: which answers have loss weight: "all" or "last". A message's own keys `loss` (true or false) and
            `weight` (a factor of at least 0) take precedence.
          name: name of the sample, for errors.
          fps: frames per second of videos that are given as frames. State it where the text or the positions have
            times: the default holds for every system, although releases assume others (SmolVLM 24).
          max_visual_tokens: maximum visual tokens of an image; the release's limit when None.
          max_video_tokens: the same for a video.
          frame_sampler: selects frames of video files; the processor's own when None.
          allow_network: whether images and videos with a web address are downloaded.
          do_pan_and_scan: as in `batch`.
          add_generation_prompt: ends with the start of the answer; when None, only without `targets`.
          continuation: as an entry of `continuations` of `batch`; empty for none.
          **variables: further variables of the chat template.

        Raises:
          As `batch`.
        """
        if continuation and targets:
            raise PromptError(f"{name}: expected targets or a continuation, got both; remove one of them")
        if targets not in (True, False, AS_RELEASED):
            raise PromptError(f"{name}: targets: expected true, false or '{AS_RELEASED}', got {targets!r}")
        with error_context(name):
            messages, items = read_messages(messages)
            check_rate(fps)
        shown = given_media(items, "image", images, name)
        clips = given_media(items, "video", videos, name)
        mode = "L" if self.views.channels == 1 else "RGB"
        options: Fields = {"max_pixels": self.max_pixels, "mode": mode, "allow_network": allow_network}
        pictures = [to_picture(image.source, name=f"{name}, image {i}", **options) for i, image in enumerate(shown)]
        read: list[Clip] = []
        sampler = frame_sampler or self.frame_sampler
        for i, video in enumerate(clips):
            with error_context(f"{name}, video {i}"):
                if not isinstance(video.source, os.PathLike | Iterable) or isinstance(video.source, Mapping):
                    given = type(video.source).__name__
                    raise CorruptImage(f"{name}, video {i}: expected a file or a sequence of frames, got a {given}")
                read.append(self._frames(video, fps, sampler, f"{name}, video {i}", options))
        parts: list[list[PreparedImage]] = []
        for i, (clip, video) in enumerate(zip(read, clips, strict=True)):
            with error_context(f"{name}, video {i}"):
                parts.append(self.views.sized(video.size).video(clip.frames, clip.fps, max_video_tokens))
        limits = max_visual_tokens, max_video_tokens
        asked = self if do_pan_and_scan is None else self.panned(do_pan_and_scan)
        sizes = [(picture.height, picture.width) for picture in pictures]
        clip_sizes = [
            VideoSize(len(clip.frames), clip.frames[0].height, clip.frames[0].width, clip.times, clip.duration)
            for clip in read
        ]
        with error_context(name):
            places = (
                asked._image_places(sizes, limits[0], [image.size for image in shown], pictures),
                asked._video_places(clip_sizes, limits[1], [video.size for video in clips], parts),
            )
        return asked._example(
            messages,
            *places,
            durations=[_duration(size) for size in clip_sizes],
            name=name,
            targets=targets,
            turns=turns,
            limits=limits,
            add_generation_prompt=add_generation_prompt,
            continuation=continuation,
            **variables,
        )

    def measure(
        self,
        messages: Conversation,
        sizes: Sequence[Size] = (),
        videos: Sequence[VideoSize] = (),
        *,
        targets: Targets = False,
        turns: Turns = "all",
        name: str = "conversation 0",
        fps: float | int = FRAME_RATE,
        max_visual_tokens: int | None = None,
        max_video_tokens: int | None = None,
        do_pan_and_scan: bool | None = None,
        add_generation_prompt: bool | None = None,
        **variables: object,
    ) -> Load:
        """The load of `example` in a row, without decoding images.

        Args:
          messages: of the conversation.
          sizes: (height, width) of every image, in pixels.
          videos: size of every video; of frames without times, these follow from the rate.
          **variables: as in `example`; the other arguments likewise.
        """
        asked = self if do_pan_and_scan is None else self.panned(do_pan_and_scan)
        with error_context(name):
            messages, items = read_messages(messages)
            shown = given_media(items, "image", sizes, name)
            clips = given_media(items, "video", videos, name)
            videos = [
                size if size.times else size._replace(times=_times(size.num_frames, clip.frames.fps or fps))
                for size, clip in zip(videos, clips, strict=True)
            ]
            places = (
                asked._image_places(sizes, max_visual_tokens, [image.size for image in shown]),
                asked._video_places(videos, max_video_tokens, [video.size for video in clips]),
            )
        example = asked._example(
            messages,
            *places,
            durations=[_duration(size) for size in videos],
            name=name,
            targets=targets,
            turns=turns,
            limits=(max_visual_tokens, max_video_tokens),
            add_generation_prompt=add_generation_prompt,
            continuation="",
            **variables,
        )
        if targets:  # for a training row, which has a static shape
            self._check_questions(example)
        return example.load

    def _bounded(self, views: Views, max_visual_tokens: int | None) -> Views:
        return views if max_visual_tokens is None else views.within(max_visual_tokens)

    def _image_places(
        self,
        sizes: Sequence[Size],
        most: int | None,
        own: Sequence[ItemSize],
        pictures: Sequence[Image.Image] | None = None,
    ) -> list[ImagePlaces]:
        """The places of each image of a conversation; those with an own size are laid out one by one."""
        if any(size != ItemSize() for size in own):
            alone = [None] * len(sizes) if pictures is None else [[picture] for picture in pictures]
            every = zip(sizes, own, alone, strict=True)
            return [self._places([size], most, item, picture)[0] for size, item, picture in every]
        return self._places(sizes, most, ItemSize(), pictures)

    def _places(
        self, sizes: Sequence[Size], most: int | None, own: ItemSize, pictures: Sequence[Image.Image] | None
    ) -> list[ImagePlaces]:
        """The places of images with the same settings."""
        views = self._bounded(self.views.sized(own), most)
        full = views if self.reduction is None else self._bounded(self.reduction.before.sized(own), most)
        made = [None] * len(sizes) if pictures is None else views.images(pictures)
        found = []
        for grid, shares, before, one in zip(
            views.tile_grids(sizes), views.shares(sizes), full.shares(sizes), made, strict=True
        ):
            parts = [None] * len(shares) if one is None else [one] if grid is None else one.in_tiles(len(shares))
            every = zip(shares, before, parts, strict=True)
            found.append(ImagePlaces(grid, [self._place(own, first.layout, part) for own, first, part in every]))
        return found

    def _video_places(
        self,
        videos: Sequence[VideoSize],
        most: int | None,
        own: Sequence[ItemSize],
        prepared: Sequence[Sequence[PreparedImage]] | None = None,
    ) -> list[ImagePlaces]:
        """The places of each video of a conversation, over which its load is divided; the grid is that of a frame."""
        found = []
        reduction = self.reduction
        for number, (video, item) in enumerate(zip(videos, own, strict=True)):
            count, height, width, times, _ = video
            views = self.views.sized(item)
            full = views if reduction is None else reduction.before.sized(item)
            of_video = count, (height, width), most
            shares = views.video_shares(*of_video)
            if reduction is not None and reduction.compares_frames and not (reduction.is_packed and len(shares) == 1):
                raise PictureMismatch(
                    "the reducer compares the frames of a video, but this system encodes the frames of a video apart; "
                    "pass images, or choose a reducer that is not for videos"
                )
            made = [None] * len(shares) if prepared is None else prepared[number]
            kept = [times[frame] for frame in views.kept_frames(*of_video)]
            at = times_of_parts(kept, views.frames_per_part)
            # One entry may be of all parts; the tiles of a frame have the same time.
            at = np.repeat(at, max(1, len(shares) // len(at))).tolist()[: len(shares)]
            frames = views.format.num_slots(count) if isinstance(views, NativeViews) else 1
            each = max(1, frames // len(shares))
            parts = zip(shares, full.video_shares(*of_video), made, at, strict=True)
            places = [
                self._place(share, first.layout, part, each)._replace(time=time) for share, first, part, time in parts
            ]
            found.append(ImagePlaces(views.frame_grid(*of_video), places))
        return found

    def _place(self, share: Share, full: Layout, prepared: PreparedImage | None, frames: int = 1) -> Place:
        layout, load = share
        tokens = None if self.reduction is None else self.reduction.tokens(load, layout, full, prepared, frames)
        return Place(layout, load, prepared, tokens)

    def _example(
        self,
        messages: Conversation,
        images: list[ImagePlaces],
        videos: list[ImagePlaces],
        *,
        durations: Sequence[float],
        name: str,
        targets: Targets,
        turns: Turns,
        limits: tuple[int | None, int | None],
        add_generation_prompt: bool | None,
        continuation: str,
        **variables: object,
    ) -> Example:
        counts = tuple(
            [sum(len(one.layout) for one in media.places) for media in of_kind] for of_kind in (images, videos)
        )
        for kind, limit, of_kind in zip(("image", "video"), limits, counts, strict=True):
            for i, count in enumerate(of_kind):
                if limit is not None and count > limit:
                    raise InfeasibleBudget(f"{name}, {kind} {i}: takes at least {count} visual tokens, over {limit}")
        with error_context(name):
            prompt = not targets if add_generation_prompt is None else add_generation_prompt
            pieces = self.prompt(
                messages,
                [[part.time for part in video.places] for video in videos],
                add_generation_prompt=prompt,
                targets=targets,
                turns=turns,
                continuation=continuation,
                grids=[image.grid for image in images],
                frame_grids=[video.grid for video in videos],
                durations=durations,
                **{**self.variables, **variables},
            )
            if targets and targets != AS_RELEASED and not any(answer_weights(messages, turns)):
                raise PromptError("expected at least one assistant message for training, got none")
        waiting: dict[Kind, list[Place]] = {
            "image": list(itertools.chain(*(image.places for image in images))),
            "video": list(itertools.chain(*(video.places for video in videos))),
        }
        self._check_ids(pieces, name)
        parts_of: dict[Kind, list[int]] = {
            "image": [len(image.places) for image in images],
            "video": [len(video.places) for video in videos],
        }
        filled, order = self._filled(pieces, waiting, messages, name, parts_of)
        length = sum(map(len, filled))
        if self.max_length is not None and length > self.max_length:
            raise SequenceTooLong(
                f"{name} is {length} tokens long, over the limit of {self.max_length}; shorten it or pass fewer or "
                "smaller images (nothing is truncated)"
            )
        load = sum(place.load for place in order)
        tokens = tuple(place.tokens for place in order if place.tokens is not None)
        if self.reduction is not None and self.reduction.question is not None:
            kinds: list[Kind] = [piece.kind for piece in pieces if isinstance(piece, Slot)]
            own = self._messages_of(messages, kinds, *parts_of.values())
            learned = np.flatnonzero(answer_weights(messages, turns)).tolist() if targets else ()
            asked = self.reduction.question(messages, self.placeholders, own, name, learned)
            tokens = tuple(dataclasses.replace(one, question=its) for one, its in zip(tokens, asked, strict=True))
        kept = () if self.reduction is None else self.reduction.kept(length, tokens)
        prepared = tuple(place.prepared for place in order if place.prepared is not None)
        each = parts_of["image"] if isinstance(self.views, NativeViews) else [1] * len(images)  # of tiles, one for all
        taken = Load(length, load, kept, sum(each) + sum(parts_of["video"]))
        return Example(name, tuple(filled), prepared, (*counts[0], *counts[1]), taken, tokens)

    def _messages_of(
        self, messages: Conversation, kinds: Sequence[Kind], of_images: Sequence[int], of_videos: Sequence[int]
    ) -> list[int]:
        """The number of the message of each place, from its kind and the number of places of each image and video."""
        images, videos = (
            messages_of(messages, kind, self.prompt.placeholders.get(kind, ())) for kind in ("image", "video")
        )
        own = {
            "image": iter(np.repeat(images, of_images).tolist()),
            "video": iter(np.repeat(videos, of_videos).tolist()),
        }
        return [next(own[kind]) for kind in kinds]

    def _check_questions(self, example: Example) -> None:
        """Raises a `SequenceTooLong` for a question that a row of a static shape has no room for."""
        if self.reduction is not None and self.reduction.question is not None:
            asked = [one.question for one in example.tokens if one.question is not None]
            self.reduction.question.check(asked, example.name)

    @property
    def placeholders(self) -> tuple[str, ...]:
        """Texts that stand for an image or a video in a message."""
        return tuple(itertools.chain(*self.prompt.placeholders.values()))

    def count_visual_tokens(self, image_sizes: Sequence[Size]) -> list[int]:
        """Visual tokens of each image of one conversation, including learned rows.

        Args:
          image_sizes: (height, width) of every image, in pixels.
        """
        return [len(layout) for layout in self.views.layouts(image_sizes)]

    def _frames(
        self, video: MediaItem, fps: float | int, frame_sampler: FrameSampler, name: str, options: Fields
    ) -> Clip:
        source, settings = video.source, video.frames
        if isinstance(source, str | os.PathLike | bytes):
            reading = {key: value for key, value in options.items() if key != "mode"}
            sampler = frame_sampler.following(settings)
            clip = read_video(source, sampler, name=name, **reading)
            if self.rate_as_asked:
                clip = clip._replace(fps=sampler.fps if isinstance(sampler, RateSampler) else FRAME_RATE)
            mode = options["mode"]
            return clip._replace(frames=[one if one.mode == mode else one.convert(mode) for one in clip.frames])
        check_list(source, name)
        if settings not in (FrameSettings(), FrameSettings(fps=settings.fps)):
            raise PictureMismatch(f"{name}: a video that is given as frames takes only fps; remove its other settings")
        frames = [to_picture(frame, name=f"{name}, frame {i}", **options) for i, frame in enumerate(source)]
        if not frames:
            raise PictureMismatch(f"{name}: expected a video of at least one frame, got none")
        rate = fps if settings.fps is None else settings.fps
        return Clip(frames, rate, _times(len(frames), rate))

    def _check_ids(self, pieces: Sequence[Text | Slot], name: str) -> None:
        """Raises a `TokenizerError` for a token of a text that the model's table has no row for."""
        for piece in pieces:
            if isinstance(piece, Text):
                self.tokenizer.check_rows(piece.ids, self.table_rows, name)

    def _filled(
        self,
        pieces: Sequence[Text | Slot],
        waiting: Mapping[Kind, list[Place]],
        messages: Conversation,
        name: str,
        parts_of: Mapping[Kind, list[int]],
    ) -> tuple[list[Text | Visual], list[Place]]:
        """The pieces with their places, which are returned in order; `parts_of` has each image's and video's number."""
        marks = [(mark, kind) for kind, marks in self.prompt.placeholders.items() for mark in marks]
        for kind, places in waiting.items():
            wanted = sum(isinstance(piece, Slot) and piece.kind == kind for piece in pieces)
            if wanted != len(places):
                parts = parts_of[kind]
                ends = list(itertools.accumulate(parts, initial=0))
                beyond = max(wanted - len(places), 0)  # those that no image was given for have one place each
                marked = bisect.bisect_right(ends, wanted) - 1 + beyond
                found = ((n, mark, of) for n, text in texts_of(messages) for mark, of in marks if mark in text)
                said = "".join(f"; message {n} writes '{mark}', which stands for a {of}" for n, mark, of in found)
                raise PictureMismatch(
                    f"{name}: its text has {marked} {kind} placeholders, but got {len(parts)}; pass one "
                    f'{{"type": "{kind}"}} item in the messages for every {kind}{said}'
                )
        filled: list[Text | Visual] = []
        order: list[Place] = []
        start = 0
        for piece in pieces:
            if isinstance(piece, Text):
                filled.append(piece)
                continue
            place = waiting[piece.kind].pop(0)
            layout = place.layout
            ids = np.full(len(layout), piece.token_id)
            if len(piece.first_ids) > len(ids):
                raise PictureMismatch(
                    f"{name}: the name of an image has {len(piece.first_ids)} bytes, more than its {len(ids)} "
                    "visual tokens; rename the file"
                )
            ids[: len(piece.first_ids)] = piece.first_ids
            if self.learned_ids:
                ids = np.where(layout < 0, np.take(self.learned_ids, -1 - layout, mode="clip"), ids)
            rows, mixed = np.where(layout < 0, layout, layout + start), None
            if place.prepared is not None and place.prepared.interpolation is not None:
                mixed = place.prepared.interpolation
                own = np.asarray(mixed.index)
                mixed = dataclasses.replace(mixed, index=np.where(own < 0, own, own + start))
            group = piece.group or (len(filled) + 1 if self.grouped else 0)
            filled.append(Visual(rows, ids, group=group, **self._positions(place), interpolation=mixed))
            order.append(place)
            start += 0 if place.prepared is None else place.prepared.num_rows
        return filled, order

    def _positions(self, place: Place) -> Fields:
        """Fields of `Visual`."""
        prepared, reduction, tokens = place.prepared, self.reduction, place.tokens
        if reduction is None or tokens is None or reduction.num_left is None:
            return {"positions": None if prepared is None else prepared.positions}
        if not reduction.keeps_positions:  # renumbered, unless all tokens of an image are kept
            whole = all(reduction.left(count) == count for count in tokens.groups)
            return {"positions": prepared.positions} if whole and prepared is not None else {}
        found = reduction.positions(tokens, place.layout)
        return {"positions": found, "before": tokens.positions, "extent": tokens.extent}


def _panned(views: Views, active: bool) -> Views:
    """The views with or without crops; those of other tiles in fewer pixels with the others so."""
    if isinstance(views, CropViews):
        return dataclasses.replace(views, active=active)
    if isinstance(views, DownsampledViews):
        base = _panned(views.base, active)
        assert isinstance(base, TiledViews)  # of the same class as before
        return dataclasses.replace(views, base=base)
    raise PictureMismatch("do_pan_and_scan: this system has no pan and scan; remove the option")


def _in_table(rows: np.ndarray, start: int) -> np.ndarray:
    """Rows of one example's images as rows of the visual table, where these begin at `start` and learned rows at 0."""
    return np.where(rows < 0, -1 - rows, rows + start)


def _duration(size: VideoSize) -> float:
    """The duration of a video in seconds; of frames, the time of the last one."""
    return size.times[-1] if size.duration is None else size.duration


def _times(count: int, fps: float | int) -> tuple[float, ...]:
    """The times of `count` frames in seconds."""
    return tuple(number / fps for number in range(count))


def check_continuations(given: object, size: int) -> None:
    """Raises a `PromptError` unless given one text for each of `size` conversations, none of them empty."""
    if isinstance(given, str) or not isinstance(given, Sequence) or not all(isinstance(one, str) for one in given):
        raise PromptError(f"continuations: expected a list of texts, got {given!r}; write ['…']")
    if len(given) != size:
        raise PromptError(f"continuations: expected one for each of {size} conversations, got {len(given)}")
    if "" in given:
        raise PromptError(f"continuations: number {list(given).index('')} is empty; give it at least one token")


def _check_row(row: Sequence[Example], shape: RowShape, keys: Mapping[str, str]) -> None:
    if not row:
        return
    for words, need, size in shape.excess(functools.reduce(operator.add, (one.load for one in row))):
        names = ", ".join(f"'{one.name}'" for one in row)
        taken = f"is {need} tokens long" if words == "positions" else f"has {need} {words}"
        raise SequenceTooLong(
            f"sample {names} {taken}, over the limit of {size}; raise {keys.get(words, 'config.row.kept')} by "
            f"{need - size} or more, or remove the sample (nothing is truncated)"
        )


def _joined(rows: Sequence[Batch], branched: bool, grouped: bool) -> Batch:
    """Rows of one length, all with branches if `branched` or one has them, groups, or positions before a reducer."""
    if grouped:
        groups = [row.group_ids if row.group_ids is not None else np.zeros_like(row.tokens) for row in rows]
        rows = [dataclasses.replace(row, group_ids=ids) for row, ids in zip(rows, groups, strict=True)]
    if branched or any(row.branch_ids is not None for row in rows):
        fill = [row.branch_ids if row.branch_ids is not None else np.zeros_like(row.tokens) for row in rows]
        rows = [dataclasses.replace(row, branch_ids=ids) for row, ids in zip(rows, fill, strict=True)]
    before = [row.visual_positions for row in rows]
    if any(part is not None for part in before):
        size = max(part.shape[1] for part in before if part is not None)
        filled = []
        for row, part in zip(rows, before, strict=True):
            part = row.positions[:, :0] if part is None else part
            width = [(0, 0), (0, size - part.shape[1]), *[(0, 0)] * (part.ndim - 2)]
            filled.append(dataclasses.replace(row, visual_positions=np.pad(part, width)))
        rows = filled
    return jax.tree.map(lambda *parts: np.concatenate(parts), *rows)
