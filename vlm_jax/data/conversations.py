"""Conversations about any number of pictures and videos, in files of the common formats, as a data source.

`stores` describes the formats, `schemas` what a record may say. Records are checked when the source is opened; they are
read again, with their pictures, as samples.
"""

import copy
import dataclasses
import functools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal, TypeVar

import grain
import numpy as np

from vlm_jax.config import ConfigError, check_fields, did_you_mean
from vlm_jax.data import media
from vlm_jax.data.media import Media
from vlm_jax.data.mixture import Part, mixed
from vlm_jax.data.packing import fingerprint
from vlm_jax.data.record_files import RecordFile, Rules, open_records
from vlm_jax.data.schemas import Record
from vlm_jax.data.source import Elements, SizedStream, Tools
from vlm_jax.data.spelling import Spelling
from vlm_jax.paths import absolute
from vlm_jax.ranges import Count, Natural, Positive
from vlm_jax.types import Fields, Message, Sample, SampleSizes, VideoSize, images_of, text_of

Found = TypeVar("Found")

# One file has them all: a caption is the last answer of a record with one picture, a preference is one of two answers.
STREAMS = ("questions", "captions", "preferences")
Turns = Literal["last", "all"]
_log = logging.getLogger(__name__)


class TooManyCorruptImages(RuntimeError):
    """More records without a readable image than `max_corrupt`; the message names all of them."""


@dataclasses.dataclass(frozen=True)
class MixturePart:
    """A file of a mixture, `config.data.mixture.NAME`.

    Attributes:
      path: of the file.
      weight: its share of the elements, relative to the other weights.
      columns, tags: as of `Conversations`, where they differ from those.
    """

    path: str
    weight: Positive = 1.0
    columns: dict[str, str] | None = None
    tags: dict[str, str] | None = None


@dataclasses.dataclass(frozen=True)
class Conversations:
    """Settings of a set of files, keys of config.data.

    Attributes:
      train_path: file to train on, or a pattern with `*`, local or `gs://`; None where nothing trains, or `mixture`
        names the files.
      evaluation_path: file of the evaluation; not a training file. The last answer of a record is the reference, what
        is before it the prompt; see `evaluation_turns`. None with `held_out`.
      held_out: records of `train_path` that are the evaluation, and are not trained on: always the same ones, evenly
        spread.
      mixture: files to train on by name, with weights, instead of `train_path`.
      channels: 1 (grey) or 3 (RGB), to which images are converted.
      num_images: images of every record; None for any number.
      tasks: allowed values of a record's `task`.
      columns, tags: names of keys and speakers, as in `spelling.Spelling`.
      max_corrupt: maximum number of records without a readable image or video in each of the files; they are skipped,
        each with a warning. Each input worker counts separately.
      max_pixels: height * width above which an image counts as corrupt.
      evaluation_size: records to evaluate, sampled by the seed; None for all.
      evaluation_turns: which questions of a conversation are asked, `last` or `all`, each after the record's answers to
        those before it; of the stream `questions` alone. `all` leaves out those with an answer that is not learned
        (`loss` false, `weight` 0), but for the last one.
      max_checked: records of a file that are checked when it is opened, evenly spread over it; the others when they are
        read.
    """

    train_path: str | None
    evaluation_path: str | None = None
    held_out: Natural = 0
    mixture: dict[str, MixturePart] = dataclasses.field(default_factory=dict)
    channels: Literal[1, 3] = 3
    num_images: Count | None = 1
    tasks: tuple[str, ...] = ("vqa",)
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    tags: dict[str, str] = dataclasses.field(default_factory=dict)
    max_corrupt: Natural = 0
    max_pixels: Count = 100_000_000
    evaluation_size: Count | None = None
    evaluation_turns: Turns = "last"
    max_checked: Count = 200_000

    streams = STREAMS
    text_streams: ClassVar[dict[str, int]] = {}  # samples without pictures are among the others
    cells = None
    num_classes = 0

    def __post_init__(self):
        check_fields(self, "config.data.")
        if not self.tasks:
            raise ConfigError("config.data.tasks: expected at least one task, got none")
        if self.mixture and self.train_path is not None:
            raise ConfigError("config.data.train_path: config.data.mixture names the training files; set it to None")
        for key, (path, _, _) in self._trained().items():
            if self.evaluation_path is not None and absolute(path) == absolute(self.evaluation_path):
                raise ConfigError(f"config.data.evaluation_path: is {key}, {path}; use a separate file")
        if (self.evaluation_path is None) != bool(self.held_out):
            raise ConfigError(
                "config.data: expected either evaluation_path or held_out, the number of records of train_path that "
                f"are the evaluation, got {self.evaluation_path!r} and {self.held_out}"
            )
        if self.held_out and self.train_path is None:
            raise ConfigError("config.data.held_out: is of train_path, which is None; set evaluation_path instead")
        self.rules()

    def rules(self, columns: dict[str, str] | None = None, tags: dict[str, str] | None = None) -> Rules:
        """What records must satisfy, with other names of keys and speakers where they are given."""
        columns, tags = (self.columns if columns is None else columns), (self.tags if tags is None else tags)
        return Rules(self.tasks, self.num_images, Spelling(dict(columns), dict(tags)), self.max_checked)

    def _trained(self) -> dict[str, tuple[str, float, Rules]]:
        """{key under config.data: (path, weight, rules)} of the training files."""
        if self.train_path is not None:
            return {"train_path": (self.train_path, 1.0, self.rules())}
        return {
            f"mixture.{name}.path": (part.path, part.weight, self.rules(part.columns, part.tags))
            for name, part in self.mixture.items()
        }

    def open(self, tools: Tools) -> "ConversationSource":
        """Reads and checks all files.

        Raises:
          ConfigError: a file does not exist, or has no record.
          MalformedRecords: a file or records of it are not valid.
        """
        trained = {
            key: (Records(path, self, tools, rules, key), weight)
            for key, (path, weight, rules) in self._trained().items()
        }
        if self.evaluation_path is not None:
            return ConversationSource(self, trained, Records(self.evaluation_path, self, tools, key="evaluation_path"))
        (key, (records, weight)), *_ = trained.items()
        kept, held_out = records.divided(self.held_out)
        return ConversationSource(self, {key: (kept, weight)}, held_out)


@dataclasses.dataclass(frozen=True)
class PartOfRecords:
    """Some of the records of a file.

    Attributes:
      whole: all.
      chosen: indices of some, in order.
      others: whether these are the records that are not chosen.
    """

    whole: RecordFile
    chosen: np.ndarray
    others: bool

    def __len__(self) -> int:
        return len(self.whole) - len(self.chosen) if self.others else len(self.chosen)

    def __getitem__(self, index: int) -> Record:
        if not self.others:
            return self.whole[int(self.chosen[index])]
        before = np.searchsorted(self.chosen - np.arange(len(self.chosen)), index, side="right")
        return self.whole[index + int(before)]

    def fingerprint(self) -> str:
        """Of the file and the part."""
        return fingerprint({"whole": self.whole.fingerprint(), "chosen": len(self.chosen), "others": self.others})


class Records:
    """Random access to the samples of a file, for grain; skips unreadable records.

    A record without a readable image is named in a warning and counted, once, and is replaced by the
    next readable record of the file, so that every index has a sample and
    batches keep their order on every shard.
    """

    def __init__(self, path: str, settings: Conversations, tools: Tools, rules: Rules | None = None, key: str = "path"):
        self._path, self._settings, self._tools = path, settings, tools
        self._corrupt: dict[str, str] = {}
        self._lock = threading.Lock()
        rules = dataclasses.replace(rules or settings.rules(), placeholders=tools.placeholders)
        self.records: RecordFile | PartOfRecords = open_records(path, rules, key)

    def divided(self, count: int) -> "tuple[Records, Records]":
        """These records without `count` of them, evenly spread, and those.

        Raises:
          ConfigError: none would be left.
        """
        if count >= len(self):
            raise ConfigError(
                f"config.data.held_out: expected fewer than the {len(self)} records of {self._path}, got {count}"
            )
        assert isinstance(self.records, RecordFile)
        chosen = np.linspace(0, len(self), count, endpoint=False).astype(np.int64)
        halves = copy.copy(self), copy.copy(self)
        for half, others in zip(halves, (True, False), strict=True):
            part = PartOfRecords(self.records, chosen, others)
            half.__setstate__(half.__getstate__() | {"_corrupt": {}, "records": part})
        return halves

    def __len__(self) -> int:
        return len(self.records)

    def __getstate__(self) -> Fields:
        """State for another process, which counts unreadable records separately."""
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: Fields) -> None:
        self.__dict__ |= state
        self._lock = threading.Lock()

    @property
    def corrupt(self) -> dict[str, str]:
        """Records without a readable image so far: id -> reason."""
        with self._lock:
            return dict(self._corrupt)

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`, or the next readable one.

        Raises:
          TooManyCorruptImages: more than `max_corrupt` records cannot be read, or none can.
        """
        for step in range(len(self)):
            sample = self.read((index + step) % len(self))
            if sample is not None:
                return sample
        raise TooManyCorruptImages(f"{self._path}: no record has a readable image")

    def read(self, index: int) -> Sample | None:
        """The sample at `index`, or None if an image or the header of a video of it cannot be read.

        Raises:
          TooManyCorruptImages: more than `max_corrupt` records cannot be read.
          MalformedRecords: the record was not checked, and is not valid.
        """
        record, settings = self.records[index], self._settings
        read = functools.partial(self._tools.read_image, channels=settings.channels, max_pixels=settings.max_pixels)
        images = self._of_media(record, record.images, read)
        if images is None or self._video_sizes(record) is None:
            return None
        videos = tuple(media.content(video) for video in record.videos)
        references = record.references[-1] if record.references else ()
        return Sample(self.name(record), record.messages, images, record.task, videos, record.rejected, references)

    def sizes(self, index: int) -> SampleSizes | None:
        """The sample at `index` without its pixels, or None if the header of an image or video cannot be read.

        Raises:
          As `read`.
        """
        record = self.records[index]
        read = functools.partial(self._tools.image_size, max_pixels=self._settings.max_pixels)
        sizes, videos = self._of_media(record, record.images, read), self._video_sizes(record)
        if sizes is None or videos is None:
            return None
        return SampleSizes(self.name(record), record.messages, sizes, videos)

    def name(self, record: Record) -> str:
        """Of the record's sample."""
        return f"{self._path}:{record.record_id}"

    def _video_sizes(self, record: Record) -> tuple[VideoSize, ...] | None:
        read = functools.partial(self._tools.video_size, max_pixels=self._settings.max_pixels)
        return self._of_media(record, record.videos, read)

    def _of_media(self, record: Record, given: Sequence[Media], read: Callable[..., Found]) -> tuple[Found, ...] | None:
        try:
            found = []
            for one in given:
                content = media.content(one)
                found.append(read(content) if isinstance(content, str) else read(content, name=media.name_of(one)))
            return tuple(found)
        except (OSError, ValueError) as error:
            self._count(str(record.record_id), error)
            return None

    def _count(self, record_id: str, error: Exception) -> None:
        with self._lock:
            is_new = record_id not in self._corrupt
            self._corrupt[record_id] = str(error)
            corrupt = dict(self._corrupt)
        limit = self._settings.max_corrupt
        if is_new:
            _log.warning(
                "%s: record '%s' skipped, its image cannot be read: %s (%d of at most %d)",
                *(self._path, record_id, error, len(corrupt), limit),
            )
        if len(corrupt) > limit:
            listed = "\n".join(f"  {name}: {reason}" for name, reason in corrupt.items())
            raise TooManyCorruptImages(
                f"{self._path}: {len(corrupt)} records without a readable image, over "
                f"config.data.max_corrupt={limit}:\n{listed}\nRepair or remove them, or raise the limit."
            )


class ConversationSource:
    """Files of conversations, opened."""

    streams = STREAMS

    def __init__(self, settings: Conversations, trained: dict[str, tuple[Records, float]], evaluation_records: Records):
        self.settings = settings
        self.tasks = settings.tasks
        self.channels = settings.channels
        self.trained = trained
        self.evaluation_records = evaluation_records

    def train(self, stream: str, seed: int) -> grain.MapDataset[Sample]:
        """The training records, every file's shuffled by (seed, epoch) and mixed by the weights; endless.

        Raises:
          ConfigError: no such stream, or no training file.
        """
        _check_stream(stream)
        parts = [Part(key, records, len(records), weight) for key, (records, weight) in self._given().items()]
        return mixed(parts, seed, log=True)

    def sized(self, stream: str, seed: int) -> SizedStream:
        """As `Source.sized`; sizes are those in the headers of the images.

        Raises:
          ConfigError: no such stream.
        """
        _check_stream(stream)
        given = self._given()

        def read_by(name: str, log: bool = False) -> grain.MapDataset[Any]:
            read = {key: Elements(getattr(records, name), len(records)) for key, (records, _) in given.items()}
            return mixed([Part(key, read[key], len(read[key]), given[key][1]) for key in given], seed, log=log)

        epoch = len(next(iter(given.values()))[0]) if len(given) == 1 else None
        data = {key: [records.records.fingerprint(), weight] for key, (records, weight) in given.items()}
        return SizedStream(read_by("read", log=True), read_by("sizes"), epoch, fingerprint(data))

    def _given(self) -> dict[str, tuple[Records, float]]:
        if not self.trained:
            raise ConfigError(
                "config.data.train_path: a stage trains on it, and it is None; name the training file, or set "
                "config.data.mixture"
            )
        return self.trained

    def evaluation(self, seed: int, stream: str = "questions") -> "EvaluationSamples":
        """The evaluation records in the order of the file; see `EvaluationSamples`.

        Images are read again in every iteration; a record without a readable image is omitted.

        Raises:
          ConfigError: no such stream.
        """
        _check_stream(stream)
        count, size = len(self.evaluation_records), self.settings.evaluation_size
        turns = self.settings.evaluation_turns if stream == "questions" else "last"
        return EvaluationSamples(self.evaluation_records, random_indices(count, size, seed), turns)

    def references(self, seed: int, stream: str = "questions") -> Iterator[tuple[str, str]]:
        """As `Source.references`."""
        return self.evaluation(seed, stream).references()


def random_indices(count: int, size: int | None, seed: int) -> Sequence[int]:
    """`size` random indices below `count`, in increasing order; all of them when `size` is None or larger."""
    if size is None or size >= count:
        return range(count)
    return np.sort(np.random.default_rng(seed).choice(count, size, replace=False)).tolist()


@dataclasses.dataclass(frozen=True)
class EvaluationSamples:
    """Samples to answer, read as they are iterated, any number of times.

    The answer is the reference, and what is before it the prompt. Of independent questions, and of a conversation by
    `turns`, each is a sample of its own, named `id#turn`, with the pictures and videos that it shows.

    Attributes:
      records: the records of the file.
      indices: the records to read, in order.
      turns: which questions of a conversation are samples, as of `answers_of`; all of independent ones are.
    """

    records: Records
    indices: Sequence[int]
    turns: Turns = "last"

    def __iter__(self) -> Iterator[Sample]:
        for index in self.indices:
            sample = self.records.read(index)
            if sample is None:
                continue
            record = self.records.records[index]
            numbers = answers_of(record, self.turns)
            if len(numbers) == 1:
                yield sample
                continue
            for turn, number in enumerate(numbers):
                name = f"{sample.sample_id}#{turn + 1}"
                yield dataclasses.replace(
                    sample, sample_id=name, **(_alone if record.independent else _up_to)(record, sample, number)
                )

    def references(self) -> Iterator[tuple[str, str]]:
        """Names of the samples and their reference answers, without reading an image."""
        for record in (self.records.records[index] for index in self.indices):
            name, numbers = self.records.name(record), answers_of(record, self.turns)
            for turn, number in enumerate(numbers):
                named = name if len(numbers) == 1 else f"{name}#{turn + 1}"
                yield named, text_of(record.messages[number])


def answers_of(record: Record, turns: Turns) -> Sequence[int]:
    """Numbers of the messages that are the references of samples of the evaluation, in order.

    Of a conversation with `turns` `all`, these are its learned answers and the last one: others (`loss` false, `weight`
    0), such as those inside of the prompt in TRL's format, are examples in the prompts of the questions after them.
    """
    if record.independent:
        return range(1, len(record.messages), 2)
    last = len(record.messages) - 1
    if turns == "last":
        return (last,)
    roles = [message["role"] for message in record.messages]
    answers = [number for number in range(1, last + 1) if roles[number - 1 : number + 1] == ["user", "assistant"]]
    return [number for number in answers if number == last or _is_learned(record.messages[number])]


def _is_learned(answer: Message) -> bool:
    """As of `processors.learned.answer_weights`."""
    return answer.get("loss") is not False and answer.get("weight") != 0


def _alone(record: Record, sample: Sample, number: int) -> Fields:
    """What of a sample is an independent question, behind the pictures of the first one, and its answer."""
    question, answer = sample.messages[number - 1 : number + 1]
    if number > 1:
        question = {**question, "content": [*images_of(sample.messages[0]), *question["content"]]}
    references = record.references[number // 2] if record.references else ()
    return {"messages": (question, answer), "references": references}


def _up_to(record: Record, sample: Sample, number: int) -> Fields:
    """What of a sample is a conversation up to an answer."""
    messages = sample.messages[: number + 1]
    items = [
        item["type"] for message in messages if not isinstance(message["content"], str) for item in message["content"]
    ]
    return {
        "messages": messages,
        "images": sample.images[: items.count("image")],
        "videos": sample.videos[: items.count("video")],
        "references": sample.references if number == len(sample.messages) - 1 else (),
        "whole": sample,
    }


def _check_stream(stream: str) -> None:
    if stream not in STREAMS:
        raise ConfigError(f"conversations: no stream '{stream}'{did_you_mean(stream, STREAMS)}")
