"""Visual questions in JSONL files next to their images, as a data source.

`vqa_records` describes the format. All lines are checked when the source is opened; an image is opened
when its sample is read.
"""

import dataclasses
import functools
import hashlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import grain
import numpy as np
from etils import epath

from vlm_jax.config import ConfigError, did_you_mean
from vlm_jax.data.packing import fingerprint
from vlm_jax.data.source import SizedStream, Tools
from vlm_jax.data.vqa_records import Record, read_records
from vlm_jax.types import Fields, Sample, SampleSizes, images_of

Found = TypeVar("Found")

STREAMS = ("questions",)
_log = logging.getLogger(__name__)


class TooManyCorruptImages(RuntimeError):
    """More records without a readable image than `max_corrupt`; the message names all of them."""


@dataclasses.dataclass(frozen=True)
class VqaFiles:
    """Settings of a set of files, keys of config.data.

    Attributes:
      train_path: JSONL file, local or `gs://`; None where nothing trains.
      evaluation_path: JSONL file of the evaluation; not the training file.
      channels: 1 (grey) or 3 (RGB), to which images are converted.
      num_images: images of every line; None for any number, such as frames of clips.
      tasks: allowed values of a line's `task`.
      max_corrupt: maximum number of records without a readable image in each of the two files; they are
        skipped, each with a warning. Each input worker counts separately.
      max_pixels: height * width above which an image counts as corrupt.
      evaluation_size: records to evaluate, sampled by the seed; None for all.
    """

    train_path: str | None
    evaluation_path: str
    channels: int = 3
    num_images: int | None = 1
    tasks: tuple[str, ...] = ("vqa",)
    max_corrupt: int = 0
    max_pixels: int = 100_000_000
    evaluation_size: int | None = None

    streams = STREAMS
    cells = None
    context_length = 0
    num_classes = 0

    def __post_init__(self):
        if self.channels not in (1, 3):
            raise ConfigError(f"config.data.channels: expected 1 or 3, got {self.channels}")
        if not self.tasks:
            raise ConfigError("config.data.tasks: expected at least one task, got none")
        if self.num_images is not None and self.num_images < 1:
            raise ConfigError(f"config.data.num_images: expected at least 1, got {self.num_images}")
        if self.max_corrupt < 0:
            raise ConfigError(f"config.data.max_corrupt: expected 0 or more, got {self.max_corrupt}")
        if self.evaluation_size is not None and self.evaluation_size < 1:
            raise ConfigError(f"config.data.evaluation_size: expected at least 1, got {self.evaluation_size}")
        if self.train_path == self.evaluation_path:
            raise ConfigError(f"config.data.evaluation_path: is train_path, {self.train_path}; use a separate file")

    def open(self, tools: Tools) -> "VqaFileSource":
        """Reads and checks both files.

        Raises:
          ConfigError: a file does not exist.
          MalformedRecords: lines that are not valid records.
        """
        return VqaFileSource(self, tools)


class Records:
    """Random access to the samples of a file, for grain; skips unreadable records.

    A record without a readable image is named in a warning and counted, once, and is replaced by the
    next readable record of the file, so that every index has a sample and
    batches keep their order on every shard.
    """

    def __init__(self, path: str, settings: VqaFiles, key: str, tools: Tools):
        self._path = path
        self._settings = settings
        self._tools = tools
        self._corrupt: dict[str, str] = {}
        self._lock = threading.Lock()
        self.records = read_records(path, settings.tasks, settings.num_images, key)

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
        """The sample at `index`, or None if an image of it cannot be read.

        Raises:
          TooManyCorruptImages: more than `max_corrupt` records cannot be read.
        """
        record, settings = self.records[index], self._settings
        read = functools.partial(self._tools.read_image, channels=settings.channels, max_pixels=settings.max_pixels)
        images = self._of_images(record, read)
        return None if images is None else Sample(self._name(record), record.messages, images, record.task)

    def sizes(self, index: int) -> SampleSizes | None:
        """The sample at `index` without its pixels, or None if the header of an image cannot be read.

        Raises:
          TooManyCorruptImages: as `read`.
        """
        record = self.records[index]
        found = self._of_images(record, functools.partial(self._tools.image_size, max_pixels=self._settings.max_pixels))
        return None if found is None else SampleSizes(self._name(record), record.messages, found)

    def fingerprint(self) -> str:
        """Of the file: where it is and what it holds."""
        content = hashlib.blake2b(epath.Path(self._path).read_bytes(), digest_size=16).hexdigest()
        return fingerprint({"path": self._path, "content": content})

    def _name(self, record: Record) -> str:
        return f"{self._path}:{record.record_id}"

    def _of_images(self, record: Record, read: Callable[[str], Found]) -> tuple[Found, ...] | None:
        try:
            return tuple(read(path) for path in record.images)
        except (OSError, ValueError) as error:
            self._count(record, error)
            return None

    def _count(self, record: Record, error: Exception) -> None:
        with self._lock:
            is_new = record.record_id not in self._corrupt
            self._corrupt[record.record_id] = str(error)
            corrupt = dict(self._corrupt)
        limit = self._settings.max_corrupt
        if is_new:
            _log.warning(
                "%s: record '%s' skipped, its image cannot be read: %s (%d of at most %d)",
                *(self._path, record.record_id, error, len(corrupt), limit),
            )
        if len(corrupt) > limit:
            listed = "\n".join(f"  {record_id}: {reason}" for record_id, reason in corrupt.items())
            raise TooManyCorruptImages(
                f"{self._path}: {len(corrupt)} records without a readable image, over "
                f"config.data.max_corrupt={limit}:\n{listed}\nRepair or remove them, or raise the limit."
            )


class VqaFileSource:
    """A pair of JSONL files, opened."""

    streams = STREAMS

    def __init__(self, settings: VqaFiles, tools: Tools):
        self.settings = settings
        self.tasks = settings.tasks
        self.channels = settings.channels
        path = settings.train_path
        self.train_records = None if path is None else Records(path, settings, "train_path", tools)
        self.evaluation_records = Records(settings.evaluation_path, settings, "evaluation_path", tools)

    def train(self, stream: str, seed: int) -> grain.MapDataset[Sample]:
        """The training records, shuffled by (seed, epoch), endless.

        Raises:
          ConfigError: no such stream, or no training file.
        """
        _check_stream(stream)
        return _shuffled(self._trained(), seed)

    def sized(self, stream: str, seed: int) -> SizedStream:
        """As `Source.sized`; sizes are those in the headers of the images.

        Raises:
          ConfigError: no such stream.
        """
        _check_stream(stream)
        records = self._trained()
        samples, sizes = (_shuffled(_Elements(read, len(records)), seed) for read in (records.read, records.sizes))
        return SizedStream(samples, sizes, len(records), records.fingerprint())

    def _trained(self) -> Records:
        if self.train_records is None:
            raise ConfigError("config.data.train_path: a stage trains on it, and it is None; name the training file")
        return self.train_records

    def evaluation(self, seed: int, stream: str = "questions") -> "EvaluationSamples":
        """The evaluation records in the order of the file, one sample for every turn.

        Each question of a longer conversation is a separate sample, named `id#turn`.
        Images are read again in every iteration; a record without a readable image is omitted.

        Raises:
          ConfigError: no such stream.
        """
        _check_stream(stream)
        count, size = len(self.evaluation_records), self.settings.evaluation_size
        chosen = np.arange(count)
        if size is not None and size < count:
            chosen = np.sort(np.random.default_rng(seed).choice(count, size, replace=False))
        return EvaluationSamples(self.evaluation_records, chosen.tolist())


@dataclasses.dataclass(frozen=True)
class _Elements:
    """Random access to what a function reads at each of `count` indices."""

    read: Callable[[int], Any]
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.read(index)


def _shuffled(elements: Any, seed: int) -> grain.MapDataset[Any]:
    return grain.MapDataset.source(elements).seed(seed).shuffle().repeat()


@dataclasses.dataclass(frozen=True)
class EvaluationSamples:
    """Samples of one turn, read as they are iterated, any number of times.

    Attributes:
      records: the records of the file.
      indices: the records to read, in order.
    """

    records: Records
    indices: list[int]

    def __iter__(self) -> Iterator[Sample]:
        for index in self.indices:
            sample = self.records.read(index)
            if sample is None:
                continue
            asked = [number for number, message in enumerate(sample.messages) if message["role"] == "user"]
            if len(asked) == 1:
                yield sample
                continue
            for number, place in enumerate(asked, start=1):
                yield _alone(sample, place, f"{sample.sample_id}#{number}")


def _alone(sample: Sample, place: int, name: str) -> Sample:
    """One question of a conversation with its answer, after the images that precede it."""
    shown = [item for message in sample.messages[:place] for item in images_of(message)]
    question = sample.messages[place]
    content = (
        question["content"]
        if not isinstance(question["content"], str)
        else [{"type": "text", "text": question["content"]}]
    )
    count = len(shown) + len(images_of(question))
    system = [message for message in sample.messages[:1] if message["role"] == "system"]
    messages = (*system, {**question, "content": [*shown, *content]}, sample.messages[place + 1])
    return dataclasses.replace(sample, sample_id=name, messages=messages, images=sample.images[:count])


def _check_stream(stream: str) -> None:
    if stream not in STREAMS:
        raise ConfigError(f"vqa_files: no stream '{stream}'{did_you_mean(stream, STREAMS)}")
