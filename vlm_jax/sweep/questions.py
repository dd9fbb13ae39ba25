"""The questions of a release's evaluation, read from any number on, so that it resumes where it was interrupted."""

import functools
import itertools
from collections.abc import Iterator

import numpy as np
from etils import epath

from vlm_jax.config import ConfigError
from vlm_jax.data.conversations import Conversations, EvaluationSamples, Records, Turns, answers_of, random_indices
from vlm_jax.data.source import Tools
from vlm_jax.data.stores import files_of
from vlm_jax.processors.boxes import format_box
from vlm_jax.processors.image import image_size, open_image
from vlm_jax.processors.video import FrameSampler, video_size
from vlm_jax.types import Sample


class Questions:
    """The questions of a file, checked when made; pictures are read as samples are iterated.

    Args:
      path: of the file, as of `data.stores`.
      channels: of the model's pictures, 1 or 3.
      frame_sampler: of the model's videos.
      placeholders: as of `data.source.Tools`.
      tasks: names that a record's `task` may have; the first is the default.
      num_samples: records that are drawn; None for all.
      seed: of that draw.
      turns: as `config.data.evaluation_turns` of conversations.

    Raises:
      ConfigError, MalformedRecords: as of `data.record_files.RecordFile`.
    """

    def __init__(
        self,
        path: str,
        channels: int,
        frame_sampler: FrameSampler,
        *,
        placeholders: tuple[str, ...] = (),
        tasks: tuple[str, ...] = ("vqa",),
        num_samples: int | None = None,
        seed: int = 0,
        turns: Turns = "last",
    ):
        if not files_of(path) or not epath.Path(files_of(path)[0]).exists():
            raise ConfigError(f"--data: there is no file '{path}'")
        files = Conversations(None, path, channels=1 if channels == 1 else 3, num_images=None, tasks=tasks)
        measured = functools.partial(video_size, sampling=frame_sampler)
        tools = Tools(format_box, open_image, image_size, lambda image: image, measured, placeholders)
        self._records = Records(path, files, tools, key="evaluation_path")
        self._indices = random_indices(len(self._records), num_samples, seed)
        self._turns: Turns = turns
        counts = (len(answers_of(self._records.records[index], turns)) for index in self._indices)
        self._ends = np.cumsum(np.fromiter(counts, np.int64))

    def __len__(self) -> int:
        """Questions, of which a record may have several."""
        return int(self._ends[-1])

    def start_at(self, start: int) -> Iterator[Sample]:
        """Samples from number `start` on, in the order of the file; no picture of an earlier record is read."""
        first = int(np.searchsorted(self._ends, start, side="right"))
        before = int(self._ends[first - 1]) if first else 0
        samples = EvaluationSamples(self._records, self._indices[first:], self._turns)
        return itertools.islice(iter(samples), start - before, None)

    def references(self) -> Iterator[tuple[str, str]]:
        """Names of the questions and their reference answers, without reading an image."""
        return EvaluationSamples(self._records, self._indices, self._turns).references()
